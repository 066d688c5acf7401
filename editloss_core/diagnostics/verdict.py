"""Which failure is it? A verdict on an edit from pixels and geometry, without any encoder.

Pictures: s the before picture, x the output, g the after picture, b the background behind the objects. What is measured, in
this order (``MEASURES`` has a line for each number):

1. The output's colours are brought to those of the before picture (or the after picture, if that is nearer) by a gain and
   an offset per channel, fitted outside the mask: a brighter picture is no failure.
2. **collateral change**: what moved outside the mask, by a distance that forgives a shift by a pixel.
3. Inside the mask each pixel belongs to the old object, to the new one, to both or to none: in which of s and g does it look
   like the surroundings? (:mod:`.regions`)
4. The new object is looked for in the output under shifts, turns and scalings (:mod:`.alignment`), so that a displaced object
   is not called a distorted one. What the output should be is then e: the background with the object where it was found.
5. **no edit**: how near x is to s. **overlay**: the least-squares share α of x ≈ e + α (s − e) where the old object was, in
   colours and in edges. **distorted**: what is left of x − e inside the object, forgiving small shifts; and how much the
   object is stretched.

Each score is a measure on a scale on which 0.5 is the line between failure and none. The lines were fitted on one half of
a set of rendered pairs, with other meshes and backgrounds than those on which the results are reported
(``benchmarks/edit_failures``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Mapping, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur, dilate, estimate_mask, oklab, tolerant_distance
from .alignment import Alignment, align, look_up, warp
from .regions import find_regions

__all__ = ["FAILURES", "MEASURES", "VERDICTS", "Verdict", "judge"]

VERDICTS = ("good", "no edit", "overlay", "distorted", "collateral change")
FAILURES = VERDICTS[1:]

MEASURES = {
    "unchanged": "1 − ‖x − s‖ / ‖g − s‖ where s and g differ: 1 for a copy of the before picture",
    "old left": "share of the old object's colours that is left where it stood",
    "old edges": "share of the old object's edges that is left where it stood",
    "new there": "share of the new object's colours that has come, where it was found",
    "shape": "what differs from the after picture's object, aligned, in the worst part of it; 1 is its contrast",
    "outline": "1 − intersection over union of the object's outline with the after picture's, aligned",
    "soft": "1 − share of the strength of the after picture's edges that the object has, by that of its surroundings",
    "stretch": "ratio of the two main scalings of the object, less 1",
    "displaced": "shift of the object as a share of its size",
    "resized": "scale of the object, less 1",
    "background": "largest change of a neighbourhood outside the mask, in Oklab",
}

WHOLE = 256  # pixels on the long side at which the surroundings are compared
CROP = 192  # the same for the crop around the edit
AROUND = 0.35  # of the mask's long side that the crop takes in on each side
VISIBLE = 0.04  # Oklab
STAYED = 0.015  # of the object's size, and of its scale
RIDGE = 1.0  # of sums of squared differences in 0…1, about ten pixels of a well visible object


@dataclass(frozen=True)
class Verdict:
    """What became of one edit.

    Attributes:
        verdict: one of ``VERDICTS``.
        scores: failure → 0…1, where 0.5 and more is a failure; None where it cannot be answered.
        measures: the numbers behind it, see ``MEASURES``; None where it cannot be answered.
        unanswered: sentences on what could not be answered, and why.
        maps: "unchanged", "old object", "shape", "background" → ``[h, w]`` of the whole picture in 0…1, 1 the worst.
        mask: the edit mask that was used, ``[h, w]``.
    """

    verdict: str
    scores: Mapping[str, Optional[float]]
    measures: Mapping[str, Optional[float]]
    unanswered: tuple[str, ...] = ()
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Optional[Tensor] = None


@torch.no_grad()
def judge(before: Tensor, output: Tensor, after: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Verdict:
    """The verdict on one output.

    Without an after picture: no edit, collateral change, and whether the old object's edges are still there. Without a mask
    it is estimated from before and after; without both, nothing but no edit can be answered.

    Args:
        before, output, after: ``[H, W, 3]``, floating, in 0…1, of one size.
        mask: ``[H, W]`` in 0…1, where the edit belongs: both objects, with their shadows if possible.

    Raises:
        ValueError: shapes, dtypes, values or sizes that do not fit; a mask that is empty or a few pixels; before and after
            without a visible difference.

    >>> from ..demo.scenes import draw
    >>> pair = draw(3, "replace", "chair", "table")
    >>> judge(pair.before, pair.before, pair.after).verdict
    'no edit'
    >>> judge(pair.before, pair.after, pair.after).verdict
    'good'
    """
    _check(before, output, after, mask)
    s, x, g = (
        None if t is None else t.detach().float().cpu().clamp(0, 1).permute(2, 0, 1)[None]
        for t in (before, output, after)
    )
    if mask is not None:
        region = mask.detach().float().cpu()[None, None]
    else:
        other = output if after is None else after
        region = estimate_mask(before.float().cpu()[None], other.float().cpu()[None])[:, None]
    whole = _Whole.of(s, x, g, region)
    if not bool((region > 0.5).any()):  # no mask was given
        if after is not None:
            raise ValueError("after: expected a visible difference from before, got none; is it the before picture?")
        return _without_edit(whole, "no mask and no after picture: what belongs to the edit is unknown")
    if after is None:
        return _judge_alone(whole, mask is not None)
    return _judge_by(whole)


# ---------------------------------------------------------------------------------------------------------------------
# The surroundings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Whole:
    """The whole picture at a working size, and the output in the before picture's colours."""

    s: Tensor
    x: Tensor
    g: Optional[Tensor]
    mask: Tensor  # boolean
    pictures: tuple[Tensor, Tensor, Optional[Tensor]]  # at full size, the output in the before picture's colours
    full_mask: Tensor

    @classmethod
    def of(cls, s: Tensor, x: Tensor, g: Optional[Tensor], region: Tensor) -> _Whole:
        size = _fitting(s.shape[-2:], WHOLE)
        small = [None if t is None else _resized(t, size) for t in (s, x, g)]
        mask = _resized(region, size) > 0.25
        outside = ~dilate(mask, 4)
        # A pair's two pictures may differ in colour everywhere; the output is like one of them.
        gain, offset, _ = min(
            (_colour_balance(small[1], t, outside) for t in small[::2] if t is not None), key=lambda b: b[2]
        )
        balanced = [(t * gain + offset).clamp(0, 1) for t in (small[1], x)]
        return cls(small[0], balanced[0], small[2], mask, (s, balanced[1], g), region)

    def background(self, also: Optional[Tensor] = None) -> tuple[Optional[float], Tensor]:
        """(largest mean change of a neighbourhood outside the mask, the changes); None where there is no outside."""
        x = blur(oklab(self.x), 1.0, 3)
        d = torch.stack([tolerant_distance(x, blur(oklab(t), 1.0, 3)) for t in (self.s, self.g) if t is not None]).amin(
            0
        )
        taken = self.mask if also is None else self.mask | also
        outside = (~dilate(taken, 8)).float()
        if float(outside.mean()) < 0.02:
            return None, d * 0
        share = F.avg_pool2d(outside, 13, 1, 6)
        mean = F.avg_pool2d(d * outside, 13, 1, 6) / share.clamp_min(1e-6)
        return float(mean[share > 0.3].amax()) if bool((share > 0.3).any()) else None, d * outside


def _colour_balance(x: Tensor, s: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, float]:
    """(gain, offset, what is left): per channel ``[1, 3, 1, 1]``, to take x to s outside the mask, by reweighted least squares.

    A ridge keeps the gain at 1 where the surroundings have few colours; neither goes beyond what a camera or a codec does.
    """
    one, zero = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    if int(outside.sum()) < 64:
        return one, zero, 0.0
    where = outside[0, 0]
    gains, offsets = [], []
    for a, b in zip(x[0, :, where], s[0, :, where]):
        weight, gain, offset = torch.ones_like(a), 1.0, 0.0
        for _ in range(5):
            total = weight.sum()
            mean_a, mean_b = (weight * a).sum() / total, (weight * b).sum() / total
            spread = (weight * (a - mean_a).square()).sum() / total
            together = (weight * (a - mean_a) * (b - mean_b)).sum() / total
            gain = float(((together + 1e-3) / (spread + 1e-3)).clamp(0.75, 1.33))
            offset = float((mean_b - gain * mean_a).clamp(-0.15, 0.15))
            weight = 1 / (1 + ((b - gain * a - offset) / 0.03).square())
        gains.append(gain)
        offsets.append(offset)
    gain, offset = (torch.tensor(t).view(1, 3, 1, 1) for t in (gains, offsets))
    return gain, offset, float((gain * x + offset - s).abs()[..., where].mean())


# ---------------------------------------------------------------------------------------------------------------------
# The edit
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Crop:
    """The edit and some of its surroundings at a working size."""

    s: Tensor
    x: Tensor
    g: Optional[Tensor]
    mask: Tensor
    box: tuple[int, int, int, int]  # top, left, bottom, right of the whole picture at full size
    full: tuple[int, int]

    @classmethod
    def of(cls, whole: _Whole) -> _Crop:
        height, width = whole.full_mask.shape[-2:]
        rows, columns = (whole.full_mask[0, 0] > 0.5).nonzero().unbind(1)
        top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
        margin = max(4, round(AROUND * max(bottom - top, right - left)))
        box = max(0, top - margin), max(0, left - margin), min(height, bottom + margin), min(width, right + margin)
        size = _fitting((box[2] - box[0], box[3] - box[1]), CROP)
        cut = [
            None if t is None else _resized(t[..., box[0] : box[2], box[1] : box[3]], size)
            for t in (*whole.pictures, whole.full_mask)
        ]
        return cls(cut[0], cut[1], cut[2], cut[3] > 0.25, box, (height, width))

    def in_whole(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Values of the crop in the whole picture at another size, 0 elsewhere."""
        top, left, bottom, right = self.box
        canvas = torch.zeros(1, 1, *self.full)
        canvas[..., top:bottom, left:right] = F.interpolate(
            values, size=(bottom - top, right - left), mode="bilinear", align_corners=False
        )
        return _resized(canvas, size)


def _judge_by(whole: _Whole) -> Verdict:
    """With the after picture."""
    crop = _Crop.of(whole)
    lab_s, lab_x, lab_g = (blur(oklab(t), 1.0, 3) for t in (crop.s, crop.x, crop.g))
    regions = find_regions(lab_s, lab_g, crop.mask)
    changed = crop.mask & ((lab_g - lab_s).norm(dim=1, keepdim=True) > VISIBLE)
    old, new = regions.old * crop.mask, regions.new * crop.mask
    placed = float(new.sum()) > max(60.0, 0.08 * float(old.sum()))
    expected = _Expected.of(crop, lab_x, lab_g, old, new, placed)
    e, w = expected.picture, expected.object
    new = expected.new
    known = (~dilate((old > 0.3) & (new > 0.3) & (w < 0.5), 1)).float()  # elsewhere neither s nor g shows the room

    s, x, g = crop.s, crop.x, crop.g
    weight = changed.float()
    moved, wanted = blur(x - s, 1.0, 3), blur(g - s, 1.0, 3)
    unchanged = 1 - _above_noise(moved, weight, ~crop.mask) / _norm(wanted, weight)
    towards, off = blur(s - e, 1.0, 3), blur(x - e, 1.0, 3)
    old_left = _share(off, towards, old * (1 - w) * known)
    edges_s, edges_x, edges_e = (_slopes(blur(t, 1.0, 3)) for t in (s, x, e))
    old_edges = max(_shares(edges_x, (edges_s, edges_e), part)[0] for part in (old * known, w) if bool(part.any()))
    soft = _softness(edges_x, edges_e, w, ~dilate(crop.mask, 4)) if placed else None
    new_there = _share(x - s, e - s, w) if placed else None
    arrived = min(1.0, max(new_there or 0.0, 1 - unchanged) / 0.3)

    shape_map, shape, outline = _shape(lab_x, expected, old, known)
    whole_size = whole.s.shape[-2:]
    also = crop.in_whole(w, whole_size) > 0.25
    background, background_map = whole.background(also)
    affine = expected.affine
    measures = {
        "unchanged": unchanged, "old left": old_left, "old edges": old_edges, "new there": new_there,
        "shape": shape, "outline": outline, "soft": soft,
        "stretch": None if affine is None else affine.stretch - 1,
        "displaced": None if affine is None else expected.similarity.displacement,
        "resized": None if affine is None else expected.similarity.scale - 1,
        "background": background,
    }  # fmt: skip
    scores = _scores(measures, arrived)
    old_map = (_local_share(off, towards, old * known)).clamp(0, 1)
    unchanged_map = weight * (
        1 - moved.norm(dim=1, keepdim=True) / wanted.norm(dim=1, keepdim=True).clamp_min(0.02)
    ).clamp(0, 1)
    maps = {
        "unchanged": crop.in_whole(unchanged_map, whole_size), "old object": crop.in_whole(old_map, whole_size),
        "shape": crop.in_whole(shape_map.clamp(0, 1), whole_size), "background": (background_map / 0.2).clamp(0, 1),
    }  # fmt: skip
    unanswered = () if background is not None else ("collateral change: the mask leaves no surroundings to compare",)
    return Verdict(
        _decide(scores), scores, measures, unanswered, {k: v[0, 0] for k, v in maps.items()}, whole.full_mask[0, 0]
    )


@dataclass
class _Expected:
    """What the output should be: the background, with the object of the after picture where it was found.

    Attributes:
        picture, plate: with the object and without it, sRGB.
        moved: Oklab of the whole after picture moved like the object.
        object: soft mask of the object where it was found.
        new: the same in the after picture.
    """

    picture: Tensor
    plate: Tensor
    object: Tensor
    new: Tensor
    moved: Tensor
    similarity: Optional[Alignment]
    affine: Optional[Alignment]

    @classmethod
    def of(cls, crop: _Crop, lab_x: Tensor, lab_g: Tensor, old: Tensor, new: Tensor, placed: bool) -> _Expected:
        if not placed:
            return cls(crop.g, _plate(crop, old, new), torch.zeros_like(new), new, lab_g, None, None)
        similarity, affine = align(lab_x, lab_g, new)
        if similarity.displacement < STAYED and abs(similarity.scale - 1) < STAYED:
            return cls(crop.g, _plate(crop, old, new), new, new, warp(lab_g, similarity), similarity, affine)
        # What stayed where it was while the object moved is not the object.
        stay, move = ((t - lab_g).norm(dim=1, keepdim=True) for t in (lab_x, look_up(lab_x, similarity)))
        new = new * (1 - F.avg_pool2d(((stay < VISIBLE) & (move > VISIBLE)).float(), 3, 1, 1))
        plate = _plate(crop, old, new)
        moved, there, lab = warp(torch.cat([crop.g, new, lab_g], 1), similarity).split([3, 1, 3], 1)
        return cls(there * moved + (1 - there) * plate, plate, there, new, lab, similarity, affine)


def _plate(crop: _Crop, old: Tensor, new: Tensor) -> Tensor:
    """The room without objects: s where the new one is, g where the old one is; where both are, it is filled in."""
    in_g = crop.mask & ((old >= new) | (new < 0.3))
    plate = torch.where(in_g, crop.g, crop.s)
    hidden = ((old > 0.3) & (new > 0.3)).float()
    return hidden * _filled(plate, 1 - hidden) + (1 - hidden) * plate


def _filled(picture: Tensor, known: Tensor) -> Tensor:
    """The picture where it is known, spread into where it is not, from coarse to fine."""
    if min(picture.shape[-2:]) < 4:
        return (picture * known).sum((2, 3), keepdim=True) / known.sum().clamp_min(1e-6) + 0 * picture
    size = picture.shape[-2:]
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    small = F.avg_pool2d(picture * known, 2, ceil_mode=True) / share.clamp_min(1e-6)
    coarse = F.interpolate(
        _filled(small, share.clamp_max(1).ceil() * share), size=size, mode="bilinear", align_corners=False
    )
    return known * picture + (1 - known) * coarse


def _shape(
    lab_x: Tensor, expected: _Expected, old: Tensor, known: Tensor
) -> tuple[Tensor, Optional[float], Optional[float]]:
    """(map, what differs in the worst part of the object, 1 − IoU of the outlines); the differences as shares of the
    object's contrast."""
    e, b = (blur(oklab(t), 1.0, 3) for t in (expected.picture, expected.plate))
    w = expected.object if expected.similarity is not None else old
    contrast = (e - b).norm(dim=1, keepdim=True) if expected.similarity is not None else None
    if contrast is None or float(w.sum()) < 1:
        d = tolerant_distance(lab_x, e)
        return d / 0.2 * old, None, None
    level = max(VISIBLE, float(((w * contrast.square()).sum() / w.sum()).sqrt()))
    # the room shows through and around the object, where it was or moved along: either will do
    d = torch.minimum(tolerant_distance(lab_x, e), tolerant_distance(lab_x, expected.moved)) / level
    near = dilate(w > 0.5, 6).float() * known
    share = F.avg_pool2d(near, 15, 1, 7)
    mean = (F.avg_pool2d(d.square() * near, 15, 1, 7) / share.clamp_min(1e-6)).sqrt()
    counted = share > 0.4
    worst = float(mean[counted].amax()) if bool(counted.any()) else 0.0
    outlines = [(tolerant_distance(t, b) > max(VISIBLE, 0.35 * level)) & (near > 0.5) for t in (lab_x, e)]
    union = float((outlines[0] | outlines[1]).sum())
    outline = 1 - float((outlines[0] & outlines[1]).sum()) / union if union else None
    return d * near, worst, outline


def _norm(x: Tensor, weight: Tensor) -> float:
    return float((weight * x.square()).sum().sqrt()) + 1e-6


def _above_noise(x: Tensor, weight: Tensor, outside: Tensor) -> float:
    """The norm of x under a weight without what it has outside of the edit as well (a codec's noise)."""
    squared = x.square().sum(1, keepdim=True)
    noise = squared[outside].median() if bool(outside.any()) else squared.new_zeros(())
    return float((weight * (squared - noise)).sum().clamp_min(0).sqrt())


def _share(x: Tensor, y: Tensor, weight: Tensor) -> float:
    """The least-squares α of x ≈ α · y; near 0 where y has little to tell by."""
    return float((weight * x * y).sum() / ((weight * y.square()).sum() + RIDGE))


def _shares(x: Tensor, basis: tuple[Tensor, ...], weight: Tensor) -> list[float]:
    """The same of x ≈ Σ αᵢ yᵢ."""
    y = torch.stack([t.flatten() for t in basis]).double()
    w = weight.expand_as(x).flatten().double()
    gram = (y * w) @ y.T
    gram = gram + torch.eye(len(gram)) * (0.01 * float(gram.diagonal().mean()) + 1e-3)
    return torch.linalg.solve(gram, (y * w) @ x.flatten().double()).tolist()


def _softness(edges_x: Tensor, edges_e: Tensor, w: Tensor, outside: Tensor) -> float:
    """1 − how much of its edges the object has, where those of the surroundings, softer or not, are 1."""

    def kept(weight: Tensor) -> float:
        there, wanted = ((weight * t.square()).sum() for t in (edges_x, edges_e))
        return math.sqrt(float((there + 1e-2) / (wanted + 1e-2)))

    return 1 - kept(w) / min(1.0, max(0.5, kept(outside.float())))


def _local_share(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    top = F.avg_pool2d((weight * x * y).sum(1, keepdim=True), 9, 1, 4)
    return top / (F.avg_pool2d((weight * y.square()).sum(1, keepdim=True), 9, 1, 4) + 1e-3) * weight


def _slopes(x: Tensor) -> Tensor:
    return torch.cat(torch.gradient(x, dim=(2, 3)), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Without an after picture
# ---------------------------------------------------------------------------------------------------------------------

WITHOUT_AFTER = "distorted: without an after picture the new object's shape is unknown"


def _judge_alone(whole: _Whole, masked: bool) -> Verdict:
    crop = _Crop.of(whole)
    size = whole.s.shape[-2:]
    inside = crop.mask.float()
    around = _filled(crop.s, 1 - dilate(crop.mask, 2).float())
    s, x = crop.s, crop.x
    contrast = max(_norm(s - around, inside), 0.05 * float(inside.sum() * 3) ** 0.5)
    moved = blur(x - s, 1.0, 3)
    unchanged = 1 - _above_noise(moved, inside, ~crop.mask) / contrast
    core = (~dilate(~crop.mask, 3)).float()
    if float(core.sum()) < 30:
        core = inside
    slopes_s, slopes_x = (_slopes(blur(t, 1.0, 3)) for t in (s, x))
    old_edges = _share(slopes_x, slopes_s, core)
    background, background_map = whole.background() if masked else (None, torch.zeros(1, 1, *size))
    measures = dict.fromkeys(MEASURES)
    measures.update({"unchanged": unchanged, "old edges": old_edges, "background": background})
    if not masked:
        measures["old edges"] = None
    scores = _scores(measures, min(1.0, (1 - unchanged) / 0.3), "old edges, alone")
    unanswered = [WITHOUT_AFTER]
    if not masked:
        unanswered += [
            "overlay, collateral change: without a mask or an after picture what belongs to the edit is unknown"
        ]
    elif background is None:
        unanswered.append("collateral change: the mask leaves no surroundings to compare")
    unchanged_map = inside * (1 - moved.norm(dim=1, keepdim=True) / 0.1).clamp(0, 1)
    old_map = _local_share(slopes_x, slopes_s, core).clamp(0, 1)
    maps = {
        "unchanged": crop.in_whole(unchanged_map, size),
        "old object": crop.in_whole(old_map, size),
        "background": (background_map / 0.2).clamp(0, 1),
    }
    if not masked:
        maps = {}
    return Verdict(
        _decide(scores),
        scores,
        measures,
        tuple(unanswered),
        {k: v[0, 0] for k, v in maps.items()},
        whole.full_mask[0, 0],
    )


def _without_edit(whole: _Whole, why: str) -> Verdict:
    """The output shows no visible difference from the before picture anywhere."""
    scores = {"no edit": 1.0, "overlay": None, "distorted": None, "collateral change": None}
    measures = {**dict.fromkeys(MEASURES), "unchanged": 1.0}
    return Verdict(
        "no edit", scores, measures, (f"overlay, distorted, collateral change: {why}",), {}, whole.full_mask[0, 0]
    )


# ---------------------------------------------------------------------------------------------------------------------
# From measures to scores
# ---------------------------------------------------------------------------------------------------------------------

# measure → (line, full): the score is 0.5 on the line and 1 at full
LINES = {"no edit": (0.8, 1.0), "old left": (0.15, 0.6), "old edges": (0.1, 0.5), "shape": (0.4, 1.0), "outline": (0.3, 0.6), "soft": (0.22, 0.7), "stretch": (0.12, 0.5), "background": (0.05, 0.3)}  # fmt: skip


def _scores(m: Mapping[str, Optional[float]], arrived: float, edges: str = "old edges") -> dict[str, Optional[float]]:
    def ramp(name: str, value: Optional[float]) -> Optional[float]:
        if value is None:
            return None
        line, full = LINES[name]
        below = 0.5 * max(0.0, value) / line
        return min(1.0, below if value <= line else 0.5 + 0.5 * (value - line) / (full - line))

    def worst(*values: Optional[float]) -> Optional[float]:
        known = [v for v in values if v is not None]
        return arrived * max(known) if known else None

    return {
        "no edit": ramp("no edit", m["unchanged"]),
        "overlay": worst(ramp("old left", m["old left"]), ramp(edges, m["old edges"])),
        "distorted": worst(
            ramp("shape", m["shape"]),
            ramp("outline", m["outline"]),
            ramp("soft", m["soft"]),
            ramp("stretch", m["stretch"]),
        ),
        "collateral change": ramp("background", m["background"]),
    }


def _decide(scores: Mapping[str, Optional[float]]) -> str:
    return next((failure for failure in FAILURES if (scores[failure] or 0.0) >= 0.5), "good")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and checks
# ---------------------------------------------------------------------------------------------------------------------


def _fitting(size: tuple[int, int], longest: int) -> tuple[int, int]:
    ratio = longest / max(size)
    return max(8, round(size[0] * ratio)), max(8, round(size[1] * ratio))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if size[0] <= x.shape[-2] and size[1] <= x.shape[-1]:
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _check(before: Tensor, output: Tensor, after: Optional[Tensor], mask: Optional[Tensor]) -> None:
    for name, picture in (("before", before), ("output", output), ("after", after)):
        if picture is None:
            continue
        if (
            not isinstance(picture, Tensor)
            or picture.ndim != 3
            or picture.shape[-1] != 3
            or not picture.is_floating_point()
        ):
            came = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
            raise ValueError(f"{name}: expected a picture [H, W, 3] of floats in 0…1, got {came}")
        if not bool(picture.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
        if picture.shape != before.shape:
            sizes = [f"{p.shape[1]} x {p.shape[0]}" for p in (before, picture)]
            raise ValueError(f"{name}: expected {sizes[0]} pixels like the before picture, got {sizes[1]}")
    if min(before.shape[:2]) < 16:
        raise ValueError(f"before: expected at least 16 x 16 pixels, got {before.shape[1]} x {before.shape[0]}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.is_floating_point():
        came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected [H, W] of floats in 0…1, got {came}")
    if mask.shape != before.shape[:2]:
        raise ValueError(
            f"mask: expected {before.shape[1]} x {before.shape[0]} pixels like the before picture, got {mask.shape[1]} x {mask.shape[0]}"
        )
    area = int((mask > 0.5).sum())
    if area < SMALLEST:
        raise ValueError(f"mask: expected at least {SMALLEST} pixels above one half, got {area}")


SMALLEST = 16
