"""Pairs that teach a failure: after pictures in which nothing was edited, and those that still show the old object.

Told from what a set has in common, with pixels alone. Pairs of one target ("… with my stool") are looked at together. Of each
the changed region C is taken, the background's movement and tone taken out, and

* **put in**: the colours of the after picture in C that are not those around it, as a histogram in Oklab.
* **laid bare**: where the old object stood beside the new one, the room behind it is seen afterwards. Two signs of it: pixels of C
  that go on what is around C, which they did not before, and stretches of C's border where the step in colour across it went
  (after < half of before). Where the new object has the room's colours both come up with nothing gone, so each counts with the
  square of p(its colour | around C) / (p(… | around C) + p(… | put in by the other pairs)). Where the new object was painted over
  the old one, next to nothing of C is the room behind.
* **cut**: the share of C's border at which the before picture goes on from inside to outside, and is of the old object there: its
  colours are common in C before, and beside C, and rare farther away. In a right pair the old object ends within C; an overlaid
  one cuts through it.

A set can be judged where its pairs put the same thing in (median cosine of their histograms) and most of them lay something bare.
There, a pair that puts the same in is overlaid if (bare + 0.02) / (median + 0.02) < min((cut + 0.002)^0.35, 0.3): 0.11 where nothing
is cut, 0.3 from 3 % of the border on. Where the median is small, the new object hides most of the old one, and a right pair may lay
nothing bare: there a pair is overlaid only if 4 % of the border is cut, and the limit ends at 0.4. A pair that changes next to
nothing is unedited. Everywhere else (a removal, another colour, an addition, edits of all kinds) no pair is called overlaid, and a
note says why; without a common edit only pairs that do not change at all are called unedited. What was measured:
``benchmarks/results/flawed_pairs.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur, how_they_differ, oklab
from ..pairs import PairSet, bucket_size, load
from ..progress import Progress
from .between_pairs import adds, group_of
from .measures import CLOSE, change_between, fitted, grown_by
from .registration import register, warp

KINDS = {"unedited": "nothing was edited", "overlaid": "the old object is still there"}
SETTINGS = ("leave out", "keep", "stop")

RESOLUTION = 512  # pixels squared at which pictures are read, whatever they are trained at
SIZE = 192  # pixels on the long side at which they are compared
LEAST = 4  # pairs with an edit
COMMON = 0.6  # median cosine of what pairs put in, from which it is one thing
SAME = 0.45  # the same of one pair to the others, from which it puts in what they do
BARES = 0.05  # median share that is laid bare, from which a set takes something away
LITTLE, CUT, POWER, HIGHEST, HIGHEST_HIDING = 0.02, 0.002, 0.35, 0.3, 0.4  # of the rule above
HIDES = 0.12  # median share below which the new object may hide the old one,
CUTS = 0.04  # and share of the border that must then at least be cut
NOTHING = 0.05  # of the usual change
DRIFT = 0.06  # Oklab: a larger change of the whole picture is an edit,
TONE = 0.02  # and where the pairs ask for different things, one that is just visible
MOST = 1 / 3  # of a set that is left out
BINS = (12, 15, 15)  # of L, a and b
TOTAL = BINS[0] * BINS[1] * BINS[2]
CHROMA = 0.36
FLUSH = 0.06  # Oklab: nearer to its surroundings than this a pixel goes on them


@dataclass(frozen=True)
class Look:
    """What is asked of a pair.

    Attributes:
        changed: share of the picture that changed, 0…1.
        tone: difference in brightness and colour of the rest, in Oklab, ≥ 0.
        put_in: what the after picture has in the changed region that is not around it, a unit vector; None where nothing changed.
        around: the colours around that region, a histogram.
        bare: the colours where the room behind may be seen, a histogram whose sum is their share, 0…1.
        cut: share of that region's border that cuts through what stood there before, 0…1.
        everywhere: whether the pictures differ all over though little of them stands out (light, colour, noise).
    """

    changed: float
    tone: float
    put_in: Optional[np.ndarray] = None
    around: Optional[np.ndarray] = None
    bare: Optional[np.ndarray] = None
    cut: float = 0.0
    everywhere: bool = False


class Flaw(NamedTuple):
    """A pair by its name, one of :data:`KINDS`, and what was seen."""

    name: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {KINDS[self.kind]} ({self.detail})"


class Flaws(NamedTuple):
    """What :func:`find_flawed` found, and what it could not tell."""

    found: tuple[Flaw, ...]
    notes: tuple[str, ...]


class Handled(NamedTuple):
    """A set after :func:`handle`.

    Attributes:
        pairs: to train on; what was found and done stands in its notes.
        found: the flawed ones.
        left_out: names of those that are gone.
        untold: what could not be told.
    """

    pairs: PairSet
    found: tuple[Flaw, ...]
    left_out: tuple[str, ...]
    untold: tuple[str, ...]


def find_flawed(
    pairs: PairSet, progress: Optional[Progress] = None, check: Optional[Callable[[], None]] = None
) -> Flaws:
    """The flawed pairs of a set. About 0.13 s a pair of 512² pixels on a core; masks are not asked.

    Args:
        pairs: the set, whose pictures are read one by one.
        progress: called with (done, total) pairs.
        check: called before each pair; may raise to stop.
    """
    looks = {}
    for index, pair in enumerate(pairs):
        if check is not None:
            check()
        images = load(pair, bucket_size(pairs.sizes[index], RESOLUTION))
        looks[pair.name] = look(images.before, images.after)
        if progress is not None:
            progress(index + 1, len(pairs))
    return flaws(looks, {pair.name: pair.caption for pair in pairs})


def check_setting(flawed: str) -> None:
    """Raises ValueError for what is none of :data:`SETTINGS`."""
    if flawed not in SETTINGS:
        raise ValueError(f"flawed: expected one of {', '.join(map(repr, SETTINGS))}, got {flawed!r}")


def handle(
    pairs: PairSet,
    flawed: str = "leave out",
    progress: Optional[Progress] = None,
    check: Optional[Callable[[], None]] = None,
) -> Handled:
    """Find flawed pairs and do with them what was asked.

    Args:
        pairs: the set.
        flawed: "leave out"; "keep", which only notes them; "stop", which raises. More than a third of a set are never left out:
            the set may be mixed, and all of it is kept, with a note.
        progress, check: as in :func:`find_flawed`.

    Raises:
        ValueError: another setting, or with "stop" the flawed pairs, by name.
    """
    check_setting(flawed)
    found, untold = find_flawed(pairs, progress, check)
    listed = "; ".join(map(str, found))
    many = f"{len(found)} of {len(pairs)} pairs {'is' if len(found) == 1 else 'are'} flawed"
    if found and flawed == "stop":
        raise ValueError(f"pairs: {many}; nothing was started. Mend them, or set flawed to “leave out”. {listed}")
    too_many = len(found) > MOST * len(pairs)
    names = tuple(flaw.name for flaw in found) if flawed == "leave out" and not too_many else ()
    kept = pairs.subset([i for i, pair in enumerate(pairs) if pair.name not in names])
    if too_many and flawed == "leave out":
        many += ", more than a third, so that it may be a set of different edits; all are kept"
    else:
        many += ", and left out" if names else ", and kept as asked"
    notes = (*pairs.notes, f"{many}. {listed}") if found else pairs.notes
    return Handled(replace(kept, flawed=flawed, notes=notes), found, names, untold)


# ---------------------------------------------------------------------------------------------------------------------
# Of a set
# ---------------------------------------------------------------------------------------------------------------------


def flaws(looks: Mapping[str, Look], captions: Mapping[str, str]) -> Flaws:
    """As :func:`find_flawed`, for pairs that were looked at, by name."""
    groups: dict[str, list[str]] = {}
    for name in looks:
        groups.setdefault(group_of(captions[name]), []).append(name)
    edited = {g: sum(looks[n].put_in is not None for n in names) for g, names in groups.items()}
    rest = [name for g, names in groups.items() if edited[g] < LEAST for name in names]
    judged = {g: names for g, names in groups.items() if edited[g] >= LEAST}
    found: list[Flaw] = []
    notes: list[str] = []
    for group, names in [*judged.items(), *([("", rest)] if rest else [])]:
        of_group, why = _of_group({n: looks[n] for n in names}, captions, bool(group))
        found += of_group
        if why:
            which = f"“{group}”: " if group and len(groups) > 1 else "" if len(names) == len(looks) else f"{len(names)} pairs of rare captions: "  # fmt: skip
            notes.append(f"{which}whether an after picture still shows the old object cannot be told: {why}")
    order = {name: place for place, name in enumerate(looks)}
    return Flaws(tuple(sorted(found, key=lambda flaw: order[flaw.name])), tuple(notes))


def _of_group(looks: Mapping[str, Look], captions: Mapping[str, str], asked: bool) -> tuple[list[Flaw], str]:
    """(flaws, why overlaid pairs cannot be told; empty if they can). ``asked``: whether all ask for the same."""
    names = [n for n, seen in looks.items() if seen.put_in is not None]
    usual = float(np.median([looks[n].changed for n in names])) if names else 0.0
    alike = _alike([looks[n].put_in for n in names]) if len(names) >= LEAST else np.zeros(len(names))
    common = len(names) >= LEAST and float(np.median(alike)) >= COMMON
    least, drift = NOTHING * usual if common else 0.0, DRIFT if common or asked else TONE
    found = [
        Flaw(n, "unedited", f"{seen.changed:.1%} of the picture changes, in the others {usual:.0%}")
        for n, seen in looks.items()
        if names and seen.changed <= least and seen.tone <= drift and (common or not seen.everywhere)
    ]
    if len(names) < LEAST:
        return found, f"it takes {LEAST} pairs with an edit, there are {len(names)}"
    if not common:
        return found, "the pairs do not put one and the same thing in"
    same = alike >= SAME
    bare = _bare([looks[n] for n in names], same)
    usually = float(np.median(bare[same]))
    if usually < BARES:
        return found, "in most of the pairs next to nothing is taken away"
    cut = np.array([looks[n].cut for n in names])
    hides = usually < HIDES
    limit = np.minimum((cut + CUT) ** POWER, HIGHEST_HIDING if hides else HIGHEST)
    overlaid = same & ((bare + LITTLE) / (usually + LITTLE) < limit)
    if hides:
        overlaid &= cut >= CUTS
    unedited = {flaw.name for flaw in found}
    added = {n for n in names if adds(captions[n])}
    if 2 * len(added) >= len(names):
        added = set()  # only among replacements is a pair right because its caption adds
    for i in np.flatnonzero(overlaid):
        if names[i] not in unedited | added:
            detail = f"of what changed {bare[i]:.0%} shows the room behind, in the others {usually:.0%}"
            found.append(Flaw(names[i], "overlaid", detail))
    hiding = "in many pairs the new object hides most of the old one; only plain cases are found"
    return found, hiding if hides else ""


def _alike(put_in: Sequence[Optional[np.ndarray]]) -> np.ndarray:
    """Median cosine of each with the others."""
    units = np.stack([v for v in put_in if v is not None]).astype(np.float32)
    cosines = units @ units.T
    others = ~np.eye(len(units), dtype=bool)
    return np.median(cosines[others].reshape(len(units), -1), axis=1)


def _bare(looks: Sequence[Look], same: np.ndarray) -> np.ndarray:
    """Share of each changed region that shows the room behind; the ``same`` pairs tell the new object's colours."""
    put_in, around, bare = (
        np.stack([np.asarray(getattr(seen, part), np.float32) for seen in looks])
        for part in ("put_in", "around", "bare")
    )
    new = put_in**2
    others = new[same].sum(0) - same[:, None] * new
    others /= others.sum(1, keepdims=True).clip(1e-9)
    return (bare * (around / (around + others + 1e-12)) ** 2).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Of a pair
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def look(before: Tensor, after: Tensor) -> Look:
    """Look at a pair of pictures ``[H, W, 3]`` in 0…1."""
    size = (before.shape[0], before.shape[1])
    old, new = (fitted(t.permute(2, 0, 1), SIZE, size) for t in (before, after))
    found = register(old, new)
    known = torch.ones(old.shape[-2:], dtype=torch.bool)
    if found.trusted and found.farthest(*size) * max(known.shape) > CLOSE:
        new, known = warp(new, found)
    change = change_between(old, new, known, found)
    region = change.above > 0
    share = float(region.float().mean())
    if not bool(region.any()):
        pictures = (fitted(t.permute(2, 0, 1), RESOLUTION, size).permute(1, 2, 0) for t in (before, after))
        return Look(share, change.tone, everywhere=how_they_differ(*pictures) == "all over")
    if bool(region.all()):
        return Look(share, change.tone)
    was, is_now = (blur(oklab(t[None]), 0.7, 2)[0] for t in (old, new))
    solid = region.float()
    near = (grown_by(solid, max(3, round(0.05 * max(region.shape)))) > 0) & (grown_by(solid, 2) == 0)
    around, border = _colours(is_now, near), _border(region)
    return Look(
        share, change.tone, _put_in(is_now, region, around), around.half().numpy(),
        _laid_bare(was, is_now, region, border).half().numpy(), _cut(was, is_now, region, border),
    )  # fmt: skip


class _Border(NamedTuple):
    """The outermost pixels of a region, and the unit vector inwards at each, ``[n]``."""

    rows: Tensor
    columns: Tensor
    down: Tensor
    right: Tensor

    def at(self, picture: Tensor, *inwards: int) -> Tensor:
        """``[…, h, w]`` at so many pixels inwards → ``[k, …, n]``."""
        height, width = picture.shape[-2:]
        taken = []
        for k in inwards:
            y = (self.rows + k * self.down).round().long().clamp(0, height - 1)
            x = (self.columns + k * self.right).round().long().clamp(0, width - 1)
            taken.append(picture[..., y, x])
        return torch.stack(taken)


def _border(region: Tensor) -> _Border:
    solid = region.float()
    slopes = torch.gradient(blur(solid[None, None], 2.0, 5)[0, 0])
    length = torch.stack(slopes).norm(dim=0).clamp_min(1e-6)
    border = region & (grown_by(1 - solid, 1) > 0)
    border[0], border[-1], border[:, 0], border[:, -1] = False, False, False, False
    rows, columns = border.nonzero().unbind(1)
    down, right = ((s / length)[rows, columns] for s in slopes)
    return _Border(rows, columns, down, right)


def _put_in(after: Tensor, region: Tensor, around: Tensor) -> np.ndarray:
    """Square root of the histogram of the colours in the region that are rarer around it, as a unit vector (float16)."""
    native = (around / (_colours(after, region) + 1e-9)).clamp_max(1)
    root = _smooth(_counts(after, region) * (1 - native)).sqrt()
    return F.normalize(root, dim=0).half().numpy()


def _laid_bare(before: Tensor, after: Tensor, region: Tensor, border: _Border) -> Tensor:
    """Colours of the region's pixels that go on its surroundings and did not before, and of its border where the step across it
    is less than half of what it was; either counts half."""
    outside = _filled(after, (grown_by(region.float(), 1) == 0).float())
    revealed = region & ((after - outside).norm(dim=0) < FLUSH) & ((before - outside).norm(dim=0) > FLUSH)
    colours = _counts(after, revealed) / region.sum()
    if not len(border.rows):
        return 0.5 * colours

    def step(lab: Tensor) -> Tensor:
        """The largest squared one between one to three pixels inside and as many outside."""
        inside, out = border.at(lab, 1, 2, 3), border.at(lab, -1, -2, -3)
        return (inside[:, None] - out[None]).square().sum(2).amax((0, 1))

    went = step(after) < 0.25 * step(before)
    places = border.at(_places(after), 2)[0, went]
    return 0.5 * (colours + torch.bincount(places, minlength=TOTAL).float() / len(went))


def _filled(lab: Tensor, known: Tensor) -> Tensor:
    """``[3, h, w]`` with what is not ``known`` made from what is nearest."""
    filled, have = torch.zeros_like(lab), torch.zeros_like(known, dtype=torch.bool)
    for sigma in (3, 6, 12):
        sums, share = (blur(t[None], float(sigma), 2 * sigma)[0] for t in (lab * known, known[None]))
        filled = torch.where(have, filled, sums / share.clamp_min(1e-4))
        have |= share[0] > 0.02
    return filled


def _cut(before: Tensor, after: Tensor, region: Tensor, border: _Border) -> float:
    """Share of the border at which what stood there before goes on outside."""
    if not len(border.rows):
        return 0.0
    solid = region.float()
    wide = max(5, round(0.04 * max(region.shape)))
    beside = (grown_by(solid, wide) > 0) & (grown_by(solid, 3) == 0)
    former, near, rest = (
        _colours(picture, where)
        for picture, where in ((before, region), (after, beside), (after, grown_by(solid, wide + 2) == 0))
    )
    old = (former - rest).clamp_min(0)
    old = old / old.sum().clamp_min(1e-9)
    parts = torch.stack([rest, old, torch.full_like(old, 1 / TOTAL)])
    shares = torch.full((3, 1), 1 / 3)
    for _ in range(40):  # what is beside the region is a mixture of these; expectation and maximisation
        belongs = shares * parts
        belongs = belongs / (belongs.sum(0) + 1e-12)
        shares = (belongs * near).sum(1, keepdim=True)
        shares = shares / shares.sum().clamp_min(1e-12)
    of_old = (shares * parts)[1] / ((shares * parts).sum(0) + 1e-12)
    is_old = of_old[_places(before)]
    inside, outside = border.at(before, 1, 2, 3).mean(0), border.at(before, -3, -4).mean(0)
    goes_on = torch.exp(-(inside - outside).square().sum(0) / 0.05**2)
    both = torch.minimum(border.at(is_old, 1, 2).mean(0), border.at(is_old, -3, -4).mean(0))
    return float((goes_on * both).mean())


def _counts(lab: Tensor, where: Tensor) -> Tensor:
    return torch.bincount(_places(lab)[where], minlength=TOTAL).float()


def _colours(lab: Tensor, where: Tensor) -> Tensor:
    """Smoothed histogram with a sum of 1."""
    counts = _counts(lab, where)
    return _smooth(counts) / counts.sum().clamp_min(1)


def _places(lab: Tensor) -> Tensor:
    """The bin of each pixel ``[h, w]``."""
    scaled = [lab[0], *(0.5 + c / (2 * CHROMA) for c in lab[1:])]
    light, green, blue = ((c * n).long().clamp(0, n - 1) for c, n in zip(scaled, BINS))
    return (light * BINS[1] + green) * BINS[2] + blue


def _smooth(histogram: Tensor) -> Tensor:
    values = histogram.view(1, 1, *BINS)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    for dim in range(3):
        shape, padding = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[2 + dim], padding[dim] = 3, 1
        values = F.conv3d(values, kernel.view(shape), padding=padding)
    return values.flatten()
