"""What only shows between pairs: swapped pictures, duplicates, wrong partners.

**Swapped.** Pairs with one caption put the same thing in, so that what their edits add and take away points one way. With
φ, colours (a joint histogram in Oklab) and shapes (histograms of oriented gradients; Dalal and Triggs 2005) of the changed
part, and δᵢ = (φ(afterᵢ) − φ(beforeᵢ)) / ‖·‖:

    support(i) = Σ_{j≠i} sⱼ ⟨δᵢ, δⱼ⟩ / (n − 1),     s = signs that agree best with one another, the majority +1

A pair is perhaps swapped where sᵢ = −1, its support for the swap exceeds 0.04, its before crop is more like the others'
after crops than its own after crop is, four fifths of the group support the direction by 0.1, and the after side is the
more alike one once the signs are followed. Measured with one or a quarter of n pairs swapped:

* rendered chairs that become one stool, bench, barrel, cabinet or crate, n = 6 to 10: 89 % of the swapped pairs are found
  with the meshes that the thresholds were fitted on, 96 % with others; n = 4: 72 and 80 %;
* drawn scenes with one target, n = 6 to 20: 99 %; n = 4: 96 %; removals by this comparison: 48 %;
* in 14,900 draws of pairs that were not swapped, from 190 pairs, there was no false alarm;
* where one caption stands for several targets next to nothing is found, and 0.1 to 0.7 % of the right pairs are false
  alarms (n = 4: 1 to 3 %), so that fewer than half of those named are swapped.

**Removed, added.** A caption that removes something, and an edit region with 1.5 times the edges afterwards: found for 86 %
of 136 swapped removals from rendered and drawn rooms, a false alarm for 1 of the 136 as they are.

A set that is swapped as a whole looks like a set of the opposite edit: that cannot be told from within.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np
import torch
from torch.nn import functional as F

from ..encoders.base import Encoder
from ..masks import oklab
from .measures import Sketch

LEAST = 4  # pairs of one caption
SUPPORT = 0.04  # mean cosine with the others
ALIKE = 0.03  # by which the after side must be the more alike one, as a mean cosine
GROUP = 0.1  # support that four fifths of the pairs of a group must reach
MINORITY = 0.34  # share of swapped pairs above which either side may be the wrong one
EDGES = 0.4  # log of edge energy that a removal may add, and an addition may take away
CELLS, ANGLES = 4, 8
SAME_MEAN, SAME_MOST = 0.02, 0.08  # Oklab: root mean square and maximum over a thumbnail of two copies
PARTNER = 0.15  # correlation of detail at 32 × 32 that makes another pair's picture worth a closer look; own ones have 0.2 to 1

_TARGET = re.compile(r"\b(?:with|into|to|by)\b(.*)$", re.IGNORECASE)
_REMOVES = re.compile(r"\b(remove|delete|erase|take away|get rid of)\b", re.IGNORECASE)
_ADDS = re.compile(r"\b(add|insert|put|place)\b", re.IGNORECASE)


def group_of(caption: str) -> str:
    """What pairs must share to be compared: the target, where a caption names one, else the whole caption.

    >>> group_of("Replace the chair with my stool.") == group_of("replace the table with my stool")
    True
    """
    words = " ".join(re.sub(r"[^\w\s]", " ", caption.lower()).split())
    if _REMOVES.search(words):
        return "remove"
    target = _TARGET.search(words)
    return f"… {target[1].strip()}" if target and target[1].strip() else words


def adds(caption: str) -> bool:
    """Whether a caption puts something in and takes nothing out, as far as its words say."""
    return bool(_ADDS.search(caption)) and not _REMOVES.search(caption)


def removes(caption: str) -> bool:
    """Whether it takes something out and puts nothing in."""
    return bool(_REMOVES.search(caption)) and not _ADDS.search(caption)


def find_swapped(
    sketches: Mapping[str, Sketch],
    captions: Mapping[str, str],
    edges: Mapping[str, float],
    encoder: Optional[Encoder] = None,
) -> tuple[dict[str, str], list[str], dict[str, float]]:
    """(name of a pair that may be swapped → why, what to know about the rest, name → support, negative for swapped).

    Args:
        sketches: of the pairs with a visible edit, by name.
        captions: of the same.
        edges: logarithm of edge energy, after over before.
        encoder: its embeddings of the crops are taken as well.
    """
    groups: dict[str, list[str]] = {}
    for name in sketches:
        groups.setdefault(group_of(captions[name]), []).append(name)
    swaps: dict[str, str] = {}
    supports: dict[str, float] = {}
    notes, small = [], 0
    for group, names in groups.items():
        if len(names) < LEAST:
            small += len(names)
            continue
        signs, support, alike, fits = _direction(*_features([sketches[n] for n in names], encoder))
        supports |= {n: float(v) for n, v in zip(names, support)}
        against = signs < 0
        if np.quantile(signs * support, 0.2) < GROUP:
            continue  # no common direction: the caption stands for different edits
        if against.mean() > MINORITY and abs(alike) > ALIKE:
            notes.append(
                f"“{group}”: {int((~against).sum())} pairs change one way and {int(against.sum())} the other way, for instance "
                f"{names[int(against.argmax())]}. If they are to show one edit, one of the two kinds is swapped; look at both"
            )
        elif alike < -ALIKE:
            notes.append(
                f"“{group}”: the before pictures of these {len(names)} pairs are more alike than the after pictures. If the edit "
                "puts one and the same thing in, all of them may be swapped; look at the picture"
            )
        elif alike > ALIKE:
            for i in np.flatnonzero(against & (-support > SUPPORT) & (fits > 0)):
                usual = np.median(support[~against])
                swaps[names[i]] = (
                    f"it changes the opposite way of the {len(names) - 1} others of “{group}” (agreement {support[i]:+.2f}, "
                    f"theirs {usual:+.2f}), and its before picture looks like their after pictures"
                )
    for name in sketches:
        if name in swaps:
            continue
        ratio = edges[name]
        if removes(captions[name]) and ratio > EDGES:
            swaps[name] = (
                f"its caption removes something, and the edit region has {math.exp(ratio):.1f} times the edges afterwards"
            )
        elif adds(captions[name]) and ratio < -EDGES:
            swaps[name] = (
                f"its caption adds something, and the edit region had {math.exp(-ratio):.1f} times the edges before"
            )
    if small:
        notes.append(
            f"{small} of the pairs share what they ask for with fewer than {LEAST - 1} others, so that the set cannot tell whether "
            "they are swapped"
        )
    if sketches:
        notes.append(
            "a set in which every pair is swapped looks like a set of the opposite edit: look at a few yourself"
        )
    return swaps, notes, supports


def _features(sketches: Sequence[Sketch], encoder: Optional[Encoder]) -> tuple[np.ndarray, np.ndarray]:
    """φ of before and after, ``[n, D]`` each."""
    sides = []
    for side in ("before", "after"):
        crops = [getattr(s, side) for s in sketches]
        rows = [np.concatenate([_colours(c, s.changed), _shapes(c, s.changed)]) for c, s in zip(crops, sketches)]
        sides.append(np.stack(rows))
        if encoder is not None:
            pictures = torch.from_numpy(np.stack(crops)).float() / 255
            embedded = encoder.embed(pictures)
            embedded = embedded.flatten(1, -2).mean(1) if embedded.ndim > 2 else embedded
            sides[-1] = np.concatenate([sides[-1], F.normalize(embedded, dim=1).numpy()], 1)
    return sides[0], sides[1]


def _direction(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """(sign per pair, support per pair, by how much the after side is the more alike one once the signs are followed,
    by how much each pair's then before crop is less like the others' after crops than its after crop)."""
    count = len(before)
    delta = _unit(after - before)
    cosines = delta @ delta.T
    np.fill_diagonal(cosines, 0.0)
    signs = np.where(np.linalg.eigh(cosines)[1][:, -1] >= 0, 1, -1)
    for _ in range(20):
        better = np.where(cosines @ signs >= 0, 1, -1)
        if (better == signs).all():
            break
        signs = better
    signs = signs if signs.sum() >= 0 else -signs
    support = cosines @ signs / (count - 1)
    right = (signs > 0)[:, None]
    a, b = _unit(np.where(right, after, before)), _unit(np.where(right, before, after))
    others = ~np.eye(count, dtype=bool)
    within, across = a @ a.T, b @ a.T
    alike = float(within[others].mean() - (b @ b.T)[others].mean())
    fits = ((within - across) * others).sum(1) / (count - 1)
    return signs, support, alike, fits


def _unit(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9)


def _colours(crop: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Square root of the joint histogram of Oklab, 6 × 5 × 5, over the changed pixels."""
    lab = oklab(torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255)[0].permute(1, 2, 0).numpy()
    parts = [
        _soft(lab[..., k], low, high, n)
        for k, (low, high, n) in enumerate([(0, 1, 6), (-0.15, 0.15, 5), (-0.15, 0.15, 5)])
    ]
    histogram = np.einsum("hwi,hwj,hwk,hw->ijk", *parts, changed / 255.0, optimize=True).ravel()
    return np.sqrt(histogram / (histogram.sum() + 1e-9))


def _shapes(crop: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Square root of the energy of edges over 4 × 4 cells and 8 directions, in the changed part; length 1."""
    grey = crop.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32) / 255
    down, right = np.gradient(grey)
    angle = np.arctan2(down, right) % np.pi / np.pi * ANGLES
    first, share = angle.astype(int) % ANGLES, angle - np.floor(angle)
    energy = np.hypot(down, right) * changed / 255.0
    planes = np.zeros((*grey.shape, ANGLES), np.float32)
    np.put_along_axis(planes, first[..., None], ((1 - share) * energy)[..., None], -1)
    beside = np.zeros_like(planes)
    np.put_along_axis(beside, ((first + 1) % ANGLES)[..., None], (share * energy)[..., None], -1)
    size = len(grey) // CELLS
    cells = np.sqrt((planes + beside).reshape(CELLS, size, CELLS, size, ANGLES).sum((1, 3)).ravel())
    return cells / (np.linalg.norm(cells) + 1e-3)


def _soft(values: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    """A value's share in its two nearest bins, ``[…, bins]``."""
    place = np.clip((values - low) / (high - low) * (bins - 1), 0, bins - 1)
    return np.maximum(0.0, 1 - np.abs(place[..., None] - np.arange(bins)))


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


def copies(
    sketches: Mapping[str, Sketch], others: Optional[Mapping[str, Sketch]] = None
) -> dict[tuple[str, str], dict[str, bool]]:
    """(name, other name) → which of their pictures are copies: keys ``"bb"``, ``"aa"``, ``"ba"`` (before of the first, after
    of the second), ``"ab"``; values: whether they are the same file. Near copies (another compression or size) count.

    Args:
        sketches: by name.
        others: another set; if None, every two of ``sketches`` are compared once.
    """
    left, right = sketches, sketches if others is None else others
    names, partners = list(left), list(right)
    if not names or not partners:
        return {}
    ours, theirs = (np.stack([s.thumbs for s in side.values()]).astype(np.float32) for side in (left, right))
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for first, second, key in ((0, 0, "bb"), (1, 1, "aa"), (0, 1, "ba"), (1, 0, "ab")):
        for i, j in _close(ours[:, first], theirs[:, second]):
            if others is None and i >= j:
                continue  # each two once, and none with itself
            contents = left[names[i]].contents[first], right[partners[j]].contents[second]
            found.setdefault((names[i], partners[j]), {})[key] = contents[0] == contents[1]
    return found


def _close(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """Which thumbnails ``[n, h, w, 3]`` and ``[m, h, w, 3]`` are copies."""
    flat = [x.reshape(len(x), -1).astype(np.float64) for x in (a, b)]
    square = [(x**2).sum(1) for x in flat]
    distance = square[0][:, None] + square[1] - 2 * flat[0] @ flat[1].T
    near = np.argwhere(distance < 1.1 * SAME_MEAN**2 * a.shape[1] * a.shape[2])
    exact = ((i, j, np.square(a[i] - b[j]).sum(-1)) for i, j in near)
    return [(int(i), int(j)) for i, j, d in exact if d.mean() < SAME_MEAN**2 and d.max() < SAME_MOST**2]


def likely_partners(sketches: Mapping[str, Sketch], lonely: Sequence[str]) -> dict[str, list[str]]:
    """Pairs of ``lonely`` → up to three other pairs whose after pictures their before picture is most like, best first."""
    if not lonely:
        return {}
    names = list(sketches)
    afters = np.stack([sketches[n].details[1] for n in names]).astype(np.float32)
    found = {}
    for name in lonely:
        correlation = afters @ sketches[name].details[0].astype(np.float32)
        correlation[names.index(name)] = -1.0
        best = np.argsort(-correlation)[:3]
        found[name] = [names[i] for i in best if correlation[i] > PARTNER]
    return found
