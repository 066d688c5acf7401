"""What one pair shows: the change, the movement between its pictures, and how its mask lies on the change.

Everything is measured once per pair on pictures of at most 512 pixels, so that a set of any size streams through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur, how_they_differ, oklab, tolerant_distance
from ..pairs.geometry import Size, same_proportions
from .registration import Registration, detail, luminance, register, turned, warp

FINE, COARSE = 512, 256  # pixels on the long side: for movement, for the change
TRAINED = 1024  # pixels on the long side at which pictures are about trained
LOW, TOP = 0.025, 0.15  # Oklab: bounds of what counts as changed; 0.02 is just visible
DRIFT = 0.06  # Oklab: a difference of the whole picture that is taken out; more is an edit,
SAME_DRIFT = 0.2  # unless half of the background agrees in its detail
CLOSE = 0.25  # pixels of FINE below which the pictures are compared as they are
CROP, THUMB = 64, 24  # pixels
FLAT = 0.004  # standard deviation of a picture without content: one step of 8 bits


@dataclass(frozen=True)
class Sketch:
    """What is kept of a pair for comparisons with the others; about 40 kB.

    Attributes:
        before, after: the window around the edit, ``[CROP, CROP, 3]`` uint8.
        changed: where in the window the pictures differ, ``[CROP, CROP]`` uint8.
        thumbs: Oklab of before and after, ``[2, THUMB, THUMB, 3]`` float16.
        details: normalised detail of both at 32 × 32, unit vectors ``[2, 1024]`` float16.
        contents: sha256 of before and after.
    """

    before: np.ndarray
    after: np.ndarray
    changed: np.ndarray
    thumbs: np.ndarray
    details: np.ndarray
    contents: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Movement:
    """How the background of the after picture lies on that of the before picture.

    Attributes:
        agreement: share of the blocks with detail that are the same before and after, 0…1.
        at_rest: the same share as the pictures lie.
        asked: whether there was detail to compare.
        registered: whether the background was found again, so that what follows can be trusted.
        shift_x, shift_y: to the right and down, in pixels of the before picture.
        zoom: growth in per cent.
        rotation: degrees, clockwise.
        stretch: growth in width over growth in height, in per cent.
        moved: the farthest way of a corner, in pixels of the before picture, ≥ 0.
        moved_sd: standard error of it, in pixels; None where there was nothing to go by.
    """

    agreement: float
    at_rest: float
    asked: bool
    registered: bool
    shift_x: float
    shift_y: float
    zoom: float
    rotation: float
    stretch: float
    moved: float
    moved_sd: Optional[float]


@dataclass(frozen=True)
class Texture:
    """Fine detail and compression of the unchanged part, of pictures of one size.

    Attributes:
        detail_ratio: fine detail after over before, > 0; None where there is next to none.
        blocks: strength of JPEG's 8 × 8 blocks before and after, ≥ 0; 0: none.
    """

    detail_ratio: Optional[float]
    blocks: tuple[float, float]


@dataclass(frozen=True)
class Coverage:
    """How the mask lies on the change; shares are 0…1.

    Attributes:
        share: of the picture that the mask covers.
        uncovered: of the change that lies outside the mask.
        changed: of the mask in which the picture changes.
        border: of the picture's border that the mask covers.
        pixels: white pixels of the mask, at its own size.
    """

    share: float
    uncovered: float
    changed: float
    border: float
    pixels: int


@dataclass(frozen=True)
class PairMeasures:
    """A pair's numbers. :meth:`as_dict` gives them by the names of :data:`MEASURES`.

    Attributes:
        before_size, after_size: width and height, in pixels.
        flat: which of "before" and "after" have one colour only.
        movement: of the background.
        fit: for other proportions: how the pictures fit, in words; else "".
        turned: how the after picture is mirrored or turned, in words; "" if it is not.
        noise: difference that counts as no change, in Oklab, > 0.
        tone: difference in brightness and colour of the unchanged part, in Oklab, ≥ 0.
        brightness: the part of it in lightness, -1…1; positive: brighter.
        changed_share: share of the picture that changed, 0…1.
        change: 95th percentile of the change in Oklab, where the picture changed; 0 without a change.
        edges: logarithm of edge energy in the edit region, after over before.
        texture: None for pictures of two sizes.
        mask: None without a mask.
        support: mean agreement of the edit with the others of its caption, -1…1; below 0: the opposite edit; None where
            too few share the caption.
        differ: "all over" or "in a spot", if they differ by more than a copy that was saved again; else "".
    """

    before_size: tuple[int, int]
    after_size: tuple[int, int]
    flat: tuple[str, ...]
    movement: Movement
    fit: str
    turned: str
    noise: float
    tone: float
    brightness: float
    changed_share: float
    change: float
    edges: float
    texture: Optional[Texture] = None
    mask: Optional[Coverage] = None
    support: Optional[float] = None
    differ: str = ""

    def as_dict(self) -> dict[str, object]:
        """Measure → value, of those that the pair has."""
        values: dict[str, object] = {"before_size": self.before_size, "after_size": self.after_size, "flat": self.flat}
        values |= vars(self.movement)
        if self.fit:
            values["fit"] = self.fit
        values |= {"turned": self.turned, "noise": self.noise, "tone": self.tone, "brightness": self.brightness}
        values |= {"changed_share": self.changed_share, "change": self.change}
        if self.texture is not None:
            values |= vars(self.texture)
        if self.mask is not None:
            values |= {
                "mask_share": self.mask.share,
                "uncovered": self.mask.uncovered,
                "mask_changed": self.mask.changed,
                "mask_border": self.mask.border,
                "mask_pixels": self.mask.pixels,
            }
        values["edges"] = self.edges
        values["differ"] = self.differ
        if self.support is not None:
            values["support"] = self.support
        return values


@dataclass(frozen=True)
class Measured:
    """A pair's numbers and sketch."""

    values: PairMeasures
    sketch: Sketch


MEASURES = {
    "before_size": "width and height of the before picture, in pixels",
    "after_size": "width and height of the after picture, in pixels",
    "flat": "which of the pictures have one colour only",
    "fit": "for other proportions: how the pictures fit, in words",
    "noise": "difference that counts as no change, in Oklab",
    "changed_share": "share of the picture that changed",
    "change": "95th percentile of the change in Oklab, where the picture changed; 0.02 is just visible",
    "agreement": "share of the blocks with detail that are the same before and after",
    "at_rest": "the same share as the pictures lie",
    "asked": "whether there was detail to compare",
    "registered": "whether the background was found again, so that the movement below can be trusted",
    "shift_x": "to the right, in pixels of the before picture",
    "shift_y": "down, in pixels of the before picture",
    "zoom": "growth in per cent",
    "rotation": "degrees, clockwise",
    "stretch": "growth in width over growth in height, in per cent",
    "moved": "the farthest way of a corner, in pixels of the before picture",
    "moved_sd": "standard error of it, in pixels",
    "turned": "how the after picture is mirrored or turned, in words",
    "tone": "difference in brightness and colour of the unchanged part, in Oklab",
    "brightness": "the part of it in lightness",
    "detail_ratio": "fine detail of the unchanged part, after over before",
    "blocks": "strength of the 8 × 8 blocks of JPEG, before and after; 0: none",
    "mask_share": "share of the picture that the mask covers",
    "uncovered": "share of the change that lies outside the mask",
    "mask_changed": "share of the mask in which the picture changes",
    "mask_border": "share of the picture's border that the mask covers",
    "mask_pixels": "white pixels of the mask, at its own size",
    "differ": "“all over” or “in a spot”, if by more than a copy that was saved again",
    "support": "mean agreement of the edit with the others of its caption, -1 to 1; below 0: the opposite edit",
    "edges": "logarithm of edge energy in the edit region, after over before",
}


@torch.no_grad()
def measure(before: Tensor, after: Tensor, mask: Optional[Tensor]) -> Measured:
    """Measure a pair.

    Args:
        before, after: ``[H, W, 3]`` in 0…1, at least 16 pixels on a side; they may differ in size.
        mask: ``[H, W]`` in 0…1 that reaches one half, or None.
    """
    size, after_size = (before.shape[0], before.shape[1]), (after.shape[0], after.shape[1])
    full = before.permute(2, 0, 1), after.permute(2, 0, 1)
    fine = fitted(full[0], FINE, size), fitted(full[1], FINE, size)
    old, new = fitted(fine[0], COARSE, size), fitted(fine[1], COARSE, size)
    cover = None if mask is None else _mask(mask, old.shape[-2:])
    found = _registered(*fine, cover)
    movement, fit = _movement(found, size), ""
    if not same_proportions(size, after_size):  # no movement of a picture that is cut or squeezed
        movement, fit = replace(movement, registered=False), _fit_of(*full)
    moved = found.trusted and found.farthest(*size) * max(fine[0].shape[-2:]) > CLOSE
    known = torch.ones(old.shape[-2:], dtype=torch.bool)
    if moved:
        new, known = warp(new, found)
    change = change_between(old, new, known, found)
    region = change.above > 0
    values = PairMeasures(
        before_size=size[::-1],
        after_size=after_size[::-1],
        flat=tuple(n for n, t in (("before", before), ("after", after)) if float(t.std(dim=(0, 1)).max()) < FLAT),
        movement=movement,
        fit=fit,
        turned="" if found.trusted else turned(*fine),
        noise=change.noise,
        tone=change.tone,
        brightness=change.brightness,
        changed_share=float(region.float().mean()),
        change=float(change.above[region].quantile(0.95)) if bool(region.any()) else 0.0,
        edges=_edges(old, new, region),
        texture=_texture(*full, change.quiet) if after_size == size else None,
        mask=None if mask is None or cover is None else _coverage(mask, cover, change.above),
        differ=how_they_differ(*(fitted(t, TRAINED, size).permute(1, 2, 0) for t in full)),
    )
    window = _window(region if bool(region.any()) or cover is None else cover > 0.5)
    return Measured(values, _sketch([old, new], region.float(), window))


@torch.no_grad()
def agreeing(before: Tensor, after: Tensor) -> float:
    """Share of the blocks with detail that two pictures ``[H, W, 3]`` have in common; 0 where that is chance."""
    size = tuple(before.shape[:2])
    found = register(*(fitted(t.permute(2, 0, 1), COARSE, size) for t in (before, after)))
    return found.agreement if found.trusted else 0.0


def fitted(picture: Tensor, long: int, size: tuple[int, ...]) -> Tensor:
    """``[C, h, w]`` with the proportions of ``size`` (height, width), at most ``long`` pixels on a side."""
    ratio = min(1.0, long / max(size))
    target = tuple(max(16, round(side * ratio)) for side in size)
    if target == tuple(picture.shape[-2:]):
        return picture
    scaled = F.interpolate(picture[None], size=target, mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].clamp(0, 1)


def _mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(mask[None, None].float(), size=tuple(size), mode="area")[0, 0]


def _fit_of(before: Tensor, after: Tensor) -> str:
    """How two pictures of different proportions fit: squeezed, cropped, or not at all."""
    height, width = before.shape[-2:]
    wide = after.shape[-1] / after.shape[-2]
    cut_before, cut_after = _cut(before, wide), _cut(after, width / height)
    ways = {
        "one is the other squeezed: resize it to the other's proportions": (before, after),
        "the after picture is cropped: crop the before picture in the same way": (cut_before, after),
        "the before picture is cropped: crop the after picture in the same way": (before, cut_after),
    }
    agreement = {}
    for words, (one, other) in ways.items():
        pictures = [fitted(t, COARSE, tuple(one.shape[-2:])) for t in (one, other)]
        found = register(*pictures)
        straight = abs(found.stretch - 1) < 0.02 and abs(found.zoom - 1) < 0.05
        agreement[words] = found.agreement if found.trusted and straight else 0.0
    best = max(agreement, key=lambda words: agreement[words])
    if agreement[best] >= 0.25:
        return best
    way = turned(before, after)
    return f"the after picture is {way}" if way else "they fit neither squeezed nor cropped to their middle"


def _cut(picture: Tensor, wide: float) -> Tensor:
    """The middle of a picture, with ``wide`` times its height for its width."""
    height, width = picture.shape[-2:]
    rows, columns = min(height, round(width / wide)), min(width, round(height * wide))
    top, left = (height - rows) // 2, (width - columns) // 2
    return picture[:, top : top + rows, left : left + columns]


def grown_by(mask: Tensor, radius: int) -> Tensor:
    """By a square, a side at a time, which is many times faster."""
    rows = F.max_pool2d(mask[None, None], (2 * radius + 1, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(rows, (1, 2 * radius + 1), stride=1, padding=(0, radius))[0, 0]


def _registered(before: Tensor, after: Tensor, mask: Optional[Tensor]) -> Registration:
    """Outside the mask if that is enough to go by: a mask may be wrong, or cover nearly all."""
    if mask is not None and float(mask.mean()) < 0.7:
        found = register(before, after, grown_by(mask, max(1, max(mask.shape) // 64)))
        if found.trusted:
            return found
    return register(before, after)


def _movement(found: Registration, size: Size) -> Movement:
    long = max(size)
    return Movement(
        agreement=found.agreement,
        at_rest=found.at_rest,
        asked=found.asked,
        registered=found.trusted,
        shift_x=float(found.shift[0]) * long,
        shift_y=float(found.shift[1]) * long,
        zoom=100 * (found.zoom - 1),
        rotation=found.rotation,
        stretch=100 * (found.stretch - 1),
        moved=found.farthest(*size) * long,
        moved_sd=found.sd * long if math.isfinite(found.sd) else None,
    )


class Change(NamedTuple):
    """Where two pictures differ: ``above`` the noise ``[h, w]`` in Oklab (0 elsewhere), where it is ``quiet`` ``[h, w]``,
    and of the whole picture ``noise``, ``tone`` and ``brightness`` as in :class:`PairMeasures`."""

    above: Tensor
    quiet: Tensor
    noise: float
    tone: float
    brightness: float


def change_between(before: Tensor, after: Tensor, known: Tensor, found: Registration) -> Change:
    """The change between two pictures that lie on one another.

    Brightness, contrast and colour of the whole picture, as the quiet half of the pixels has them, are taken out first:
    gain and offset per channel of Oklab.
    """
    lab = [blur(oklab(t[None]), 1.0, 3) for t in (before, after)]
    known = known[None, None]
    d = tolerant_distance(*lab) * known
    quiet = (d <= d[known].median())[0, 0] & known[0, 0] if bool(known.any()) else known[0, 0]
    tone, brightness = 0.0, 0.0
    for _ in range(2):
        old, new = (t[0, :, quiet] for t in lab)
        spread = old - old.mean(1, keepdim=True)
        gain = (spread * (new - new.mean(1, keepdim=True))).sum(1) / (spread.square().sum(1) + 1e-2)
        gain = torch.where(spread.square().mean(1) > 1e-4, gain.clamp(0.75, 1.33), torch.ones(3))
        levelled = gain[:, None] * (old - old.mean(1, keepdim=True)) + new.mean(1, keepdim=True)
        difference = (levelled - old).square().mean(1)
        if float(difference.sum().sqrt()) > (SAME_DRIFT if found.agreement > 0.5 else DRIFT):
            break
        tone, brightness = float(difference.sum().sqrt()), float(new[0].mean() - old[0].mean())
        mapped = gain.view(1, 3, 1, 1) * (lab[0] - old.mean(1).view(1, 3, 1, 1)) + new.mean(1).view(1, 3, 1, 1)
        d = tolerant_distance(mapped, lab[1]) * known
        quiet = (d <= d[known].quantile(0.6))[0, 0] & known[0, 0]
    background = d[0, 0][quiet]
    median = background.median()
    noise = float(median + 8 * 1.4826 * (background - median).abs().median())
    # Without a common background there is no noise to measure.
    low = min(max(noise, LOW), TOP) if found.trusted else 2 * LOW
    d = d[0, 0]
    above = (d > low).float()
    crowded = F.avg_pool2d(above[None, None], 3, stride=1, padding=1)[0, 0] > 0.5  # no single pixels, no thin edges
    core = grown_by(((d > 1.6 * low) & crowded).float(), 4) > 0
    region = (above > 0) & crowded & core
    return Change(torch.where(region, d, 0.0), (d <= low) & known[0, 0], low, tone, brightness)


def _texture(before: Tensor, after: Tensor, quiet: Tensor) -> Texture:
    """Fine detail and JPEG's blocks of the unchanged part, at full size."""
    fine, blocks = [], []
    for picture in (before, after):
        grey = luminance(picture)[0, 0]
        inner = grey[1:-1, 1:-1]
        bend = (4 * inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).abs()
        still = F.interpolate(quiet[None, None].float(), size=tuple(grey.shape), mode="nearest")[0, 0] > 0.5
        fine.append(float(bend[still[1:-1, 1:-1]].mean()) if bool(still.any()) else 0.0)
        blocks.append(_blocks(grey, still))
    ratio = fine[1] / fine[0] if min(fine) > 3.0 / 255 else None  # below that it is rounding
    return Texture(ratio, (blocks[0], blocks[1]))


def _blocks(grey: Tensor, still: Tensor) -> float:
    """By how much steps at every eighth pixel exceed those half-way between, over both directions, in shares of the usual
    step: an enlarged picture, whose steps repeat after 2 or 4 pixels, has none."""
    excess, usual = 0.0, 1e-6
    for picture, at in ((grey, still), (grey.T, still.T)):
        step = (picture[:, 1:] - picture[:, :-1]).abs()
        step = torch.where(at[:, 1:], step, 0.0).sum(0)
        count = at[:, 1:].sum(0).clamp_min(1)
        mean = step / count
        border = torch.arange(1, len(mean) + 1) % 8 == 0
        beside = torch.arange(1, len(mean) + 1) % 8 == 4
        if bool(border.any()) and bool(beside.any()):
            excess += float(mean[border].mean() - mean[beside].mean())
            usual += float(mean[~border].mean())
    return max(0.0, excess / max(usual, 0.5 / 255))


def _coverage(mask: Tensor, cover: Tensor, change: Tensor) -> Coverage:
    """How a mask, and the same at the change's size (``cover``, ``[h, w]``), lies on the change, which is weighed by its
    square, so that faint shadows weigh little."""
    radius = max(1, round(0.012 * max(cover.shape)))
    solid = (cover > 0.5).float()
    grown = grown_by((cover > 0.1).float(), radius)
    energy = change.square()
    total = float(energy.sum())
    border = torch.cat([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    area = float(solid.sum())
    return Coverage(
        share=float(cover.mean()),
        uncovered=float((energy * (1 - grown)).sum()) / total if total > 0 else 0.0,
        changed=float((solid * (change > 0)).sum()) / area if area else float((grown * (change > 0)).any()),
        border=float(border.mean()),
        pixels=int((mask >= 0.5).sum()),
    )


def _window(region: Tensor) -> tuple[int, int, int, int]:
    """A square (top, left, bottom, right) around the region with some air, or the whole picture."""
    height, width = region.shape
    rows, columns = region.any(1).nonzero()[:, 0], region.any(0).nonzero()[:, 0]
    if not len(rows):
        return 0, 0, height, width
    side = 1.1 * max(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 4
    spans = []
    for first, last, length in ((rows[0], rows[-1], height), (columns[0], columns[-1], width)):
        wide = min(int(side), length)
        start = min(max(int((int(first) + int(last)) / 2 - wide / 2), 0), length - wide)
        spans.append((start, start + wide))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def _edges(before: Tensor, after: Tensor, region: Tensor) -> float:
    """log of the energy of edges in the region, after over before."""
    if not bool(region.any()):
        return 0.0
    energy = []
    for picture in (before, after):
        grey = blur(luminance(picture), 0.7, 2)
        slopes = torch.gradient(grey, dim=2)[0].square() + torch.gradient(grey, dim=3)[0].square()
        energy.append(float(slopes[0, 0][region].sqrt().mean()) + 2e-3)
    return math.log(energy[1] / energy[0])


def _sketch(pictures: list[Tensor], region: Tensor, window: tuple[int, int, int, int]) -> Sketch:
    top, left, bottom, right = window

    def crop(t: Tensor, size: int) -> Tensor:
        part = t[None, :, top:bottom, left:right]
        return F.interpolate(part, size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]

    def small(t: Tensor, size: int) -> Tensor:
        return F.interpolate(t[None], size=(size, size), mode="area")

    def bytes_of(t: Tensor) -> np.ndarray:
        return (t.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    details = torch.stack([detail(luminance(small(t, 32)[0])).flatten() for t in pictures])
    return Sketch(
        before=bytes_of(crop(pictures[0], CROP)),
        after=bytes_of(crop(pictures[1], CROP)),
        changed=bytes_of(crop(region[None], CROP))[..., 0],
        thumbs=torch.cat([oklab(small(t, THUMB)) for t in pictures]).permute(0, 2, 3, 1).half().numpy(),
        details=F.normalize(details - details.mean(1, keepdim=True), dim=1).half().numpy(),
    )
