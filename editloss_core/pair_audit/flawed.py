"""Pairs that teach a failure: after pictures in which nothing was edited, and those that still show the old object.

Told from what a set has in common, with pixels alone. Pairs of one target ("… with my stool") are looked at together. Of each
the changed region C is taken, the background's movement and tone taken out, and

* **taken away**: along the border of C the steps in colour across it, before and after. Where the old object ended and went,
  the step is gone (after < half of before); where the new one ends, it is new. The share of the border at which a step went is
  large in a right pair. Where the new object was painted over the old one, only the new one's outline borders on C, and next to
  nothing went.
* **left beside**: colours of the before picture in C that are close around C in the after picture, and not farther away. In a right
  pair the old object went with its colours; in an overlaid one the rest of it stands there.
* **put in**: the colours of the after picture in C that are not those around it, as a histogram in Oklab.

A set can be judged where its pairs put the same thing in (median cosine of their histograms) and most of them take something
away. There, a pair that puts the same in is overlaid if it takes little away and has more left beside than the others, or, where
the others are far from that, if it takes next to nothing away. A pair that changes next to nothing is unedited. Everywhere else (a removal, another colour, an addition, edits of all kinds) no pair is called overlaid, and a note says
why; without a common edit only pairs that do not change at all are called unedited. What was measured:
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
TAKES = 0.2  # median share of the border where something went, from which a set takes something away
LITTLE, OF_MEDIAN = 0.16, 0.5  # share of the border below which little went: at most, and of the set's median
LEFT = 0.1  # by which more than the set's median is left beside
PLAINLY = 0.25  # median share of the border from which the border alone may do
HARDLY, OF_USUAL = 0.1, 0.4  # share below which next to nothing went: at most, and of the set's median
CLEAR = 2.0  # by which factor nine tenths of the others must at least lie above that
NOTHING = 0.05  # of the usual change
DRIFT = 0.06  # Oklab: a larger change of the whole picture is an edit,
TONE = 0.02  # and where the pairs ask for different things, one that is just visible
MOST = 1 / 3  # of a set that is left out
BINS = (12, 15, 15)  # of L, a and b
CHROMA = 0.36


@dataclass(frozen=True)
class Look:
    """What is asked of a pair.

    Attributes:
        changed: share of the picture that changed, 0…1.
        tone: difference in brightness and colour of the rest, in Oklab, ≥ 0.
        taken: share of the changed region's border where something was taken away, 0…1; None where nothing changed.
        everywhere: whether the pictures differ all over though little of them stands out (light, colour, noise).
        beside: share of the colours close around that region which the old object had and the rest of the room has not, 0…1.
        put_in: what the after picture has there that is not around it, a unit vector; None where nothing changed.
    """

    changed: float
    tone: float
    taken: Optional[float] = None
    put_in: Optional[np.ndarray] = None
    beside: float = 0.0
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
    """The flawed pairs of a set. About 0.13 s a pair of 512² pixels on a busy core; masks are not asked.

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
    edited = {g: sum(looks[n].taken is not None for n in names) for g, names in groups.items()}
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
    names = [n for n, seen in looks.items() if seen.taken is not None]
    taken = np.array([looks[n].taken for n in names], float)
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
    beside = np.array([looks[n].beside for n in names])
    usually, left = float(np.median(taken[same])), float(np.median(beside[same]))
    if usually < TAKES:
        return found, "in most of the pairs next to nothing is taken away"
    overlaid = (taken < min(LITTLE, OF_MEDIAN * usually)) & (beside >= left + LEFT)
    limit = min(HARDLY, OF_USUAL * usually)
    few = taken < limit
    others = taken[same & ~few & ~overlaid]
    clear = usually >= PLAINLY and len(others) and float(np.quantile(others, 0.1, method="lower")) >= CLEAR * limit
    overlaid = same & (overlaid | few if clear else overlaid)
    unedited = {flaw.name for flaw in found}
    added = {n for n in names if adds(captions[n])}
    if 2 * len(added) >= len(names):
        added = set()  # only among replacements is a pair right because its caption adds
    for i in np.flatnonzero(overlaid):
        if names[i] not in unedited | added:
            detail = f"something was taken away along {taken[i]:.0%} of what changed, in the others {usually:.0%}"
            found.append(Flaw(names[i], "overlaid", detail))
    unclear = "how much is taken away differs so much from pair to pair that only plain cases are found"
    return found, "" if clear else unclear


def _alike(put_in: Sequence[Optional[np.ndarray]]) -> np.ndarray:
    """Median cosine of each with the others."""
    units = np.stack([v for v in put_in if v is not None]).astype(np.float32)
    cosines = units @ units.T
    others = ~np.eye(len(units), dtype=bool)
    return np.median(cosines[others].reshape(len(units), -1), axis=1)


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
    return Look(share, change.tone, _taken(was, is_now, region), _put_in(is_now, region), _beside(was, is_now, region))


def _taken(before: Tensor, after: Tensor, region: Tensor) -> float:
    """Share of the region's border where the step across it is less than half of what it was."""
    solid = region.float()
    slopes = torch.gradient(blur(solid[None, None], 2.0, 5)[0, 0])
    length = torch.stack(slopes).norm(dim=0).clamp_min(1e-6)
    border = region & (grown_by(1 - solid, 1) > 0)
    border[0], border[-1], border[:, 0], border[:, -1] = False, False, False, False
    rows, columns = border.nonzero().unbind(1)
    if not len(rows):
        return 0.0
    down, right = ((s / length)[rows, columns] for s in slopes)  # inwards
    height, width = region.shape

    def at(lab: Tensor, inwards: int) -> Tensor:
        y = (rows + inwards * down).round().long().clamp(0, height - 1)
        x = (columns + inwards * right).round().long().clamp(0, width - 1)
        return lab[:, y, x]

    def step(lab: Tensor) -> Tensor:
        """The largest squared one between one to three pixels inside and as many outside."""
        outside = torch.stack([at(lab, -k) for k in (1, 2, 3)])
        inside = torch.stack([at(lab, k) for k in (1, 2, 3)])
        return (inside[:, None] - outside[None]).square().sum(2).amax((0, 1))

    return float((step(after) < 0.25 * step(before)).float().mean())


def _put_in(after: Tensor, region: Tensor) -> np.ndarray:
    """Square root of the histogram of the colours in the region that are rarer around it, as a unit vector (float16)."""
    solid = region.float()
    around = (grown_by(solid, max(3, round(0.05 * max(region.shape)))) > 0) & (grown_by(solid, 2) == 0)
    place, total = _places(after), BINS[0] * BINS[1] * BINS[2]
    inside, outside = (
        _smooth(torch.bincount(place[where], minlength=total).float()) / max(1, int(where.sum()))
        for where in (region, around)
    )
    native = (outside / (inside + 1e-9)).clamp_max(1)
    counts = torch.bincount(place[region], minlength=total).float()
    root = _smooth(counts * (1 - native)).sqrt()
    return F.normalize(root, dim=0).half().numpy()


def _beside(before: Tensor, after: Tensor, region: Tensor) -> float:
    """How much of what is close around the region has the region's former colours, beyond what the rest has of them."""
    solid = region.float()
    wide = max(5, round(0.04 * max(region.shape)))
    close = (grown_by(solid, wide) > 0) & (grown_by(solid, 3) == 0)
    far = grown_by(solid, wide + 2) == 0
    shares = []
    for picture, where in ((before, region), (after, close), (after, far)):
        counts = torch.bincount(_places(picture)[where], minlength=BINS[0] * BINS[1] * BINS[2]).float()
        shares.append(_smooth(counts) / counts.sum().clamp_min(1))
    former, near, rest = shares
    return float(torch.minimum((former - rest).clamp_min(0), near).sum())


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
