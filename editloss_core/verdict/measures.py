"""What the verdicts are computed from: the pictures at working sizes, what the output should be, and distances from that."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Optional, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..masks import JUST_VISIBLE, blur, box_mean, dilate, mean_pool, oklab, tolerant_distance
from .alignment import CLOSE, Alignment, align, cost, look_up, warp

WHOLE = 256  # pixels on a side at which the surroundings are compared; as many in all where the picture is not square
CROP = 192  # the same for the crop around the edit
AROUND = 0.35  # of the mask's long side that the crop takes in on each side
VISIBLE = 0.04  # Oklab
LEAST_SHIFT = 0.1  # pixels of the working size; less is not worth a resampling
LARGEST_SHIFT = 0.012  # of the long side: a pixel of a small picture; more is a picture that moved
LARGEST_SCALE = 0.025  # of an axis of an output of another size: its proportions may be off by two per cent
STAYED = 0.015  # of the object's size, and of its scale
NOISIEST = 0.003  # squared difference in 0…1, three channels together; JPEG at quality 35 has about a tenth of it
FAINT, TOLD = 0.3, 1.0  # sums of squared slopes per pixel: a ridge; what an outline of a hundred pixels has
FINE = 1.0  # pixels of the working size, by which a picture is blurred whose fine edges are asked for
FEW = 1e-2  # sum of squared slopes in Oklab, about that of a pixel
ENOUGH = 0.2  # share of the picture outside the mask by which the room is told
LARGE, MOST = (
    0.15,
    0.4,
)  # shares of the picture, in the region and anywhere, that an edit without an object changes visibly
MOVED = 0.5  # of the surroundings' cost that is left once a picture that moved is laid back
GRAIN = 0.02  # of luma, in 0…1, by which an output has more than the known pictures; noise of 0.02 in each channel has 0.015
PLAINLY = 0.5  # likeness of edges above which nothing has to be laid on anything
UNSEEN = 0.004  # Oklab, of a neighbourhood: a step of an 8-bit code is about half of it
RIDGE = 1.0  # of sums of squared differences in 0…1, about ten pixels of a well visible object


@dataclass
class AtWorkingSize:
    """Before, output and, where there is one, after at a working size, and the edit region in them."""

    s: Tensor
    x: Tensor
    g: Optional[Tensor]
    mask: Tensor  # boolean

    @property
    def known_rgb(self) -> list[Tensor]:
        """The before picture and, where there is one, the after picture."""
        return [t for t in (self.s, self.g) if t is not None]

    @cached_property
    def known(self) -> list[Tensor]:
        """The same in Oklab."""
        return [oklab(t) for t in self.known_rgb]

    @cached_property
    def lab_x(self) -> Tensor:
        """The output in Oklab."""
        return oklab(self.x)


@dataclass
class Whole(AtWorkingSize):
    """The whole picture, and the output in the before picture's colours."""

    pictures: tuple[Tensor, Tensor, Optional[Tensor]]  # at full size, the output in the before picture's colours
    full_mask: Tensor
    raw: Tensor  # the output in its own colours

    @classmethod
    def of(cls, s: Tensor, x: Tensor, g: Optional[Tensor], region: Tensor, another_size: bool = False) -> Whole:
        """``another_size``: the output was resized, so that it may show a little more or less than the before picture."""
        size = fitting_pixels(s.shape[-2:], WHOLE, enlarge=False)
        small_s, small_x, small_g = resized(s, size), resized(x, size), None if g is None else resized(g, size)
        mask = resized(region, size) > 0.25
        outside = ~dilate(mask, 4)
        # A pair's two pictures may differ in colour everywhere; the output is like one of them.
        known = [small_s] if small_g is None else [small_s, small_g]
        fits = [_colour_balance(small_x, t, outside) for t in known]
        (gain, offset, _), like = min(zip(fits, known), key=lambda fit: fit[0][2])
        balanced = [(t * gain + offset).clamp(0, 1) for t in (small_x, x)]
        move = _small_move(balanced[0], like, outside, another_size)
        if move is not None:
            full = _at_scale(move, s.shape[-1] / size[1])
            balanced = [_laid_on(balanced[0], move, small_s), _laid_on(balanced[1], full, s)]
            small_x = _laid_on(small_x, move, small_s)
        return cls(small_s, balanced[0], small_g, mask, (s, balanced[1], g), region, small_x)

    @cached_property
    def jpeg(self) -> Tensor:
        """The last of the known pictures after a round trip through JPEG of quality 50."""
        s, _, g = self.pictures
        return resized(_jpeg(s if g is None else g, 50), self.s.shape[-2:])

    @cached_property
    def lab_jpeg(self) -> Tensor:
        return oklab(self.jpeg)

    @cached_property
    def changes(self) -> Tensor:
        """:func:`changes` of the output from the pictures that are known."""
        return changes(self.lab_x, self.known)

    def background(self, also: Optional[Tensor] = None) -> tuple[Optional[float], Tensor]:
        """(largest mean change of a neighbourhood outside the mask, the changes); None where there is no outside."""
        return largest_change(self.changes, self.mask if also is None else self.mask | also)

    def tint(self, also: Optional[Tensor] = None) -> Optional[float]:
        """The largest change of the mean colour of a large neighbourhood outside the mask; None where there is no outside."""
        return largest_tint(self.x, self.known_rgb, self.mask if also is None else self.mask | also)

    def laid_back(self) -> Optional[Whole]:
        """The same with the output laid on the last of the known pictures, where all of it was moved, zoomed or turned; None where
        it was not."""
        outside = (~dilate(self.mask, 4)).float()
        x, last = (blur(t, 1.0, 3) for t in (self.lab_x, self.known[-1]))
        if float(outside.mean()) < ENOUGH:
            return None
        found, _ = align(x, last, outside)
        start = Alignment(found.centre, torch.eye(2), torch.zeros(2), found.size)
        if cost(x, last, outside, found) > MOVED * cost(x, last, outside, start):
            return None
        s, full, g = self.pictures
        full = _laid_on(full, _at_scale(found, s.shape[-1] / self.s.shape[-1]), s)
        small, raw = (_laid_on(t, found, self.s) for t in (self.x, self.raw))
        return Whole(self.s, small, self.g, self.mask, (s, full, g), self.full_mask, raw)

    def codec_change(self, mask: Tensor) -> Optional[float]:
        """What JPEG does to the last of the known pictures, as :meth:`background` measures it."""
        return largest_change(changes(self.lab_jpeg, self.known[-1:]), mask)[0]

    def codec_tint(self, mask: Tensor) -> Optional[float]:
        """The same, as :meth:`tint` measures it."""
        return largest_tint(self.jpeg, self.known_rgb[-1:], mask)

    def is_last(self, lab: Tensor) -> bool:
        """Whether a picture in Oklab is the last of the known ones up to what a codec does to it: nowhere further from it than
        JPEG takes it, and a little."""
        last = self.known[-1]
        mean = box_mean(length(lab - last), 13)
        if float(mean.amax()) <= UNSEEN:
            return True
        if float(mean.amax()) > VISIBLE * 2:
            return False
        return bool((mean <= box_mean(length(self.lab_jpeg - last), 13) + UNSEEN).all())

    def is_tone(self) -> bool:
        """Whether a pair's edit keeps what is in the picture: a large part has other colours, light or sharpness, but the region
        has the same edges."""
        s, g = self.known
        apart = length(blur(g - s, 1.0, 3)) > JUST_VISIBLE
        inside = (apart & self.mask).float()
        if float(inside.mean()) < LARGE and float(apart.float().mean()) < MOST:
            return False
        return abs(likeness(edges(s, 2.0), edges(g, 2.0), inside)) >= PLAINLY

    def room_seen(self, mask: Tensor) -> float:
        """How much the coarse edges of the output outside a mask are those of one of the known pictures, 0 to 1: of noise and of
        another scene nearly nothing. A picture that was moved or zoomed is laid on the known one first. Where the mask leaves
        little, the whole picture counts."""
        outside = (~dilate(mask, 4)).float()
        if float(outside.mean()) < ENOUGH:
            outside = torch.ones_like(outside)
        longest = max(self.x.shape[-2:])
        scales = [max(1.0, sigma * longest / WHOLE) for sigma in (3.0, 6.0)]
        size = 2 * max(3, longest // 14) + 1  # a seventh of the long side
        there = {k: [edges(t, k) for t in self.known] for k in scales}

        def of(lab: Tensor) -> float:
            return max(abs(found) for k in scales for found in local_likeness(edges(lab, k), there[k], outside, size))

        found = of(self.lab_x)
        if found >= PLAINLY:
            return found
        similarity, _ = align(blur(self.lab_x, 1.0, 3), blur(self.known[0], 1.0, 3), outside)
        return max(found, of(oklab(look_up(self.x, similarity))))


def changes(x: Tensor, known: Sequence[Tensor]) -> Tensor:
    """How far x is from the nearest of the known pictures, all in Oklab, with shifts by a pixel forgiven: ``[1, 1, h, w]``."""
    x = blur(x, 1.0, 3)
    return torch.stack([tolerant_distance(x, blur(t, 1.0, 3)) for t in known]).amin(0)


def largest_change(d: Tensor, mask: Tensor) -> tuple[Optional[float], Tensor]:
    """(the largest mean of the :func:`changes` d in a neighbourhood outside the mask, the changes there); None where there is no
    outside."""
    outside = (~dilate(mask, 8)).float()
    if float(outside.mean()) < 0.02:
        return None, d * 0
    share = box_mean(outside, 13)
    mean = box_mean(d * outside, 13) / share.clamp_min(1e-6)
    return float(mean[share > 0.3].amax()) if bool((share > 0.3).any()) else None, d * outside


def largest_tint(x: Tensor, known: Sequence[Tensor], mask: Tensor) -> Optional[float]:
    """The same as :func:`largest_change` of mean colours, of pictures in sRGB, where dithering keeps them: noise, dithering and shifts
    within a neighbourhood add up to nothing."""
    outside = (~dilate(mask, 8)).float()
    size = 2 * max(6, max(x.shape[-2:]) // 14) + 1  # a seventh of the long side
    share = box_mean(outside, size)
    if float(outside.mean()) < 0.02 or not bool((share > 0.3).any()):
        return None

    def colours(t: Tensor) -> Tensor:
        return oklab(box_mean(t * outside, size, 2) / some.clamp_min(1e-6))

    some = share[..., ::2, ::2]
    there = colours(x)
    tints = torch.stack([length(there - colours(t)) for t in known]).amin(0)
    counted = tints[some > 0.3]
    return float(counted.amax()) if len(counted) else None


def _colour_balance(x: Tensor, s: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, float]:
    """(gain, offset, what is left): per channel ``[1, 3, 1, 1]``, to take x to s outside the mask, by reweighted least squares.

    A ridge keeps the gain at 1 where the surroundings have few colours; neither goes beyond what a camera or a codec does.
    """
    one, zero = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    if int(outside.sum()) < 64:
        return one, zero, 0.0
    where = outside[0, 0]
    gains, offsets = [], []
    for a, b in zip(x[0, :, where].double(), s[0, :, where].double()):
        moments = torch.stack([torch.ones_like(a), a, b, a * a, a * b])
        weight, factor, shift = moments[0], 1.0, 0.0
        for _ in range(5):
            total, *sums = (moments @ weight).tolist()
            mean_a, mean_b, squared, product = (value / total for value in sums)
            spread, together = squared - mean_a**2, product - mean_a * mean_b
            factor = min(max((together + 1e-3) / (spread + 1e-3), 0.75), 1.33)
            shift = min(max(mean_b - factor * mean_a, -0.15), 0.15)
            weight = (b - factor * a).sub_(shift).div_(0.03).square_().add_(1).reciprocal_()
        gains.append(factor)
        offsets.append(shift)
    gain, offset = (torch.tensor(t).view(1, 3, 1, 1) for t in (gains, offsets))
    return gain, offset, float((gain * x + offset - s).abs()[..., where].mean())


def _small_move(x: Tensor, s: Tensor, outside: Tensor, scaled: bool) -> Optional[Alignment]:
    """The shift, and the scale of each axis if ``scaled``, by which x lies beside s outside the mask; None where there is too
    little to move, or more than a codec's, a VAE's or a resizing's doing.

    Gauss–Newton steps with Cauchy's weights (Baker and Matthews 2004), from coarse to fine.
    """
    height, width = s.shape[-2:]
    longest = max(height, width)
    where = outside[0, 0]
    if int(where.sum()) < 64:
        return None
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    index = where.flatten().nonzero()[:, 0]
    y, x_ = (index // width).float(), (index % width).float()
    u, v = ((t - c) / longest for t, c in ((x_, centre[0]), (y, centre[1])))
    move = Alignment(centre, torch.eye(2), torch.zeros(2), 1.0)
    for sigma in (4.0, 2.0, 1.0) if scaled else (1.0,):
        radius = min(math.ceil(3 * sigma), min(height, width) - 1)
        near_s, near_x = _at(blur(s, sigma, radius), index), blur(x, sigma, radius)
        for _ in range(6):
            looked = look_up(near_x, move)
            slopes_x, slopes_y = (_at(torch.gradient(looked, dim=d)[0], index) for d in (3, 2))
            off = (_at(looked, index) - near_s).flatten()
            weight = 1 / (1 + (off / 0.05).square())
            rows = [slopes_x, slopes_y, *((slopes_x * u * longest, slopes_y * v * longest) if scaled else ())]
            jacobian = torch.stack([row.flatten() for row in rows])
            gram = (jacobian * weight) @ jacobian.T
            ridge = torch.tensor([1.0, 1.0, longest**2 / 12, longest**2 / 12][: len(rows)]) * 1e-3
            step = torch.linalg.solve(gram + torch.diag(ridge), (jacobian * weight) @ off)
            matrix = move.matrix - torch.diag(step[2:]) if scaled else move.matrix
            move = Alignment(centre, matrix, move.shift - step[:2], 1.0)
            if not _is_small(move, longest, 2.0):
                return None
            if float(step[:2].norm()) < CLOSE and (not scaled or float(step[2:].norm()) * longest < CLOSE):
                break
    corner = (move.matrix - torch.eye(2)).diagonal() * centre
    least = float(move.shift.norm() + corner.norm())
    return move if least >= LEAST_SHIFT and _is_small(move, longest, 1.0) else None


def _at(x: Tensor, index: Tensor) -> Tensor:
    """The values ``[channels, n]`` of the pixels of these numbers."""
    return x[0].flatten(1).index_select(1, index)


def _is_small(move: Alignment, longest: int, times: float) -> bool:
    scales = (move.matrix.diagonal() - 1).abs()
    if not bool(move.shift.isfinite().all()) or not bool(scales.isfinite().all()):
        return False
    return float(move.shift.norm()) <= times * LARGEST_SHIFT * longest and float(scales.max()) <= times * LARGEST_SCALE


def _at_scale(move: Alignment, ratio: float) -> Alignment:
    """The same move of the picture with ``ratio`` times the pixels on a side."""
    return Alignment(move.centre * ratio + (ratio - 1) / 2, move.matrix, move.shift * ratio, 1.0)


def _laid_on(x: Tensor, move: Alignment, s: Tensor) -> Tensor:
    """x after the move; the before picture where it shows nothing."""
    height, width = x.shape[-2:]
    (cx, cy), (dx, dy), ((xx, xy), (yx, yy)) = move.centre.tolist(), move.shift.tolist(), move.matrix.tolist()
    rows, columns = torch.arange(height).float()[:, None] - cy, torch.arange(width).float()[None] - cx
    x_, y = columns * xx + rows * xy + cx + dx, columns * yx + rows * yy + cy + dy
    inside = (y > -1) & (y < height) & (x_ > -1) & (x_ < width)
    return torch.where(inside, look_up(x, move), s)


@dataclass
class Crop(AtWorkingSize):
    """The edit and some of its surroundings."""

    box: tuple[int, int, int, int]  # top, left, bottom, right of the whole picture at full size
    full: tuple[int, int]

    @classmethod
    def of(cls, whole: Whole) -> Crop:
        height, width = whole.full_mask.shape[-2:]
        rows, columns = (whole.full_mask[0, 0] > 0.5).nonzero().unbind(1)
        top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
        margin = max(4, round(AROUND * max(bottom - top, right - left)))
        box = max(0, top - margin), max(0, left - margin), min(height, bottom + margin), min(width, right + margin)
        size = fitting_pixels((box[2] - box[0], box[3] - box[1]), CROP)

        def cut(t: Tensor) -> Tensor:
            return resized(t[..., box[0] : box[2], box[1] : box[3]], size)

        s, x, g = whole.pictures
        mask = cut(whole.full_mask) > 0.25
        return cls(cut(s), cut(x), None if g is None else cut(g), mask, box, (height, width))

    def in_whole(self, values: Tensor, size: Sequence[int]) -> Tensor:
        """Values of the crop in the whole picture at another size, 0 elsewhere."""
        top, left, bottom, right = self.box
        canvas = torch.zeros(1, 1, *self.full)
        canvas[..., top:bottom, left:right] = F.interpolate(
            values, size=(bottom - top, right - left), mode="bilinear", align_corners=False
        )
        return resized(canvas, size)


@dataclass
class Expected:
    """What the output should be: the background, with the object of the after picture where it was found.

    Attributes:
        picture, plate: with the object and without it, sRGB.
        lab_picture: the first in Oklab.
        moved: Oklab of the whole after picture moved like the object.
        in_place: whether the object is where the after picture has it, so that this is the picture.
        object: soft mask of the object where it was found.
        new: the same in the after picture.
    """

    picture: Tensor
    plate: Tensor
    lab_picture: Tensor
    object: Tensor
    new: Tensor
    moved: Tensor
    in_place: bool
    similarity: Optional[Alignment]
    affine: Optional[Alignment]

    @cached_property
    def lab_plate(self) -> Tensor:
        return oklab(self.plate)

    @classmethod
    def of(
        cls, crop: Crop, g: Tensor, lab_x: Tensor, lab_g: Tensor, old: Tensor, new: Tensor, placed: bool
    ) -> Expected:
        """``g``: the after picture in the crop; Oklab of the output and of it; the two objects, and whether one is new."""
        if not placed:
            plate = _plate(crop, g, old, new)
            return cls(g, plate, crop.known[1], torch.zeros_like(new), new, lab_g, True, None, None)
        similarity, affine = align(lab_x, lab_g, new)
        if similarity.displacement < STAYED and abs(similarity.scale - 1) < STAYED:
            plate, moved = _plate(crop, g, old, new), warp(lab_g, similarity)
            return cls(g, plate, crop.known[1], new, new, moved, True, similarity, affine)
        # What stayed where it was while the object moved is not the object.
        stay, move = (length(t - lab_g) for t in (lab_x, look_up(lab_x, similarity)))
        new = new * (1 - F.avg_pool2d(((stay < VISIBLE) & (move > VISIBLE)).float(), 3, 1, 1))
        plate = _plate(crop, g, old, new)
        moved, there, lab = warp(torch.cat([g, new, lab_g], 1), similarity).split([3, 1, 3], 1)
        picture = there * moved + (1 - there) * plate
        return cls(picture, plate, oklab(picture), there, new, lab, False, similarity, affine)


@dataclass(frozen=True)
class Against:
    """The output and the before picture beside what is expected, all blurred by a pixel: what several measures read.

    Attributes:
        off, towards: what the output, and the before picture, has more than what is expected.
        slopes_s, slopes_x, slopes_e: of the before picture, the output and what is expected.
    """

    off: Tensor
    towards: Tensor
    slopes_s: Tensor
    slopes_x: Tensor
    slopes_e: Tensor

    @classmethod
    def of(cls, s: Tensor, x: Tensor, e: Tensor) -> Against:
        off, towards = (blur(t - e, 1.0, 3) for t in (x, s))
        return cls(off, towards, *(slopes(blur(t, 1.0, 3)) for t in (s, x, e)))


def _plate(crop: Crop, g: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The room without objects: s where the new one is, g where the old one is; where both are, it is filled in."""
    in_g = crop.mask & ((old >= new) | (new < 0.3))
    plate = torch.where(in_g, g, crop.s)
    hidden = ((old > 0.3) & (new > 0.3)).float()
    return hidden * filled(plate, 1 - hidden) + (1 - hidden) * plate


def filled(picture: Tensor, known: Tensor) -> Tensor:
    """The picture where it is known, spread into where it is not, from coarse to fine."""
    if min(picture.shape[-2:]) < 4:
        return (picture * known).sum((2, 3), keepdim=True) / known.sum().clamp_min(1e-6) + 0 * picture
    size = picture.shape[-2:]
    share = _halved(known)
    small = _halved(picture * known) / share.clamp_min(1e-6)
    coarse = F.interpolate(
        filled(small, share.clamp_max(1).ceil() * share), size=size, mode="bilinear", align_corners=False
    )
    return known * picture + (1 - known) * coarse


def _halved(x: Tensor) -> Tensor:
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        return F.avg_pool2d(x, 2, ceil_mode=True)
    return mean_pool(x, 2, 2)


def shape_errors(
    lab_s: Tensor, lab_x: Tensor, lab_g: Tensor, expected: Expected, old: Tensor, known: Tensor, mask: Tensor
) -> tuple[Tensor, Optional[float], Optional[float], Optional[float]]:
    """(map, what differs in the worst part of the object, 1 − IoU of the outlines with the object where it was found, and where
    the after picture has it); the differences as shares of the object's contrast."""
    e = lab_g if expected.in_place else blur(expected.lab_picture, 1.0, 3)
    b, w = blur(expected.lab_plate, 1.0, 3), expected.object
    if expected.similarity is None or float(w.sum()) < 1:
        return tolerant_distance(lab_x, e) / 0.2 * old, None, None, None
    contrast = length(e - b)
    level = max(VISIBLE, float(((w * contrast.square()).sum() / w.sum()).sqrt()))
    # the room shows through and around the object, where it was or moved along: either will do
    d = torch.minimum(tolerant_distance(lab_x, e), tolerant_distance(lab_x, expected.moved)) / level
    # what stood there before is the room, or an overlay's to find, where the object has left its place
    left = (expected.new > 0.3) & (w < 0.5)
    d = torch.where(left, torch.minimum(d, tolerant_distance(lab_x, lab_s) / level), d)
    near = ((dilate(w > 0.5, 6) > 0) & mask | (w > 0.5)).float() * known  # beyond the mask the room is asked elsewhere
    share = box_mean(near, 15)
    mean = (box_mean(d.square() * near, 15) / share.clamp_min(1e-6)).sqrt()
    counted = share > 0.4
    worst = float(mean[counted].amax()) if bool(counted.any()) else 0.0
    seen, there, wanted = (tolerant_distance(t, b) > max(VISIBLE, 0.35 * level) for t in (lab_x, e, lab_g))
    either = torch.maximum(near, dilate(expected.new > 0.5, 6) * known)
    return d * near, worst, _apart(seen, there, near > 0.5), _apart(seen, wanted, either > 0.5)


def _apart(a: Tensor, b: Tensor, where: Tensor) -> Optional[float]:
    """1 − intersection over union of two outlines in a region; None where there is nothing."""
    union = float(((a | b) & where).sum())
    return 1 - float((a & b & where).sum()) / union if union else None


def _jpeg(picture: Tensor, quality: int) -> Tensor:
    pixels = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None].float() / 255


def length(x: Tensor) -> Tensor:
    """Over the channels, ``[1, 1, h, w]``; faster than torch's norm over them."""
    return x.square().sum(1, keepdim=True).sqrt()


def norm(x: Tensor, weight: Tensor) -> float:
    return float((weight * x.square()).sum().sqrt()) + 1e-6


def above_noise(x: Tensor, weight: Tensor, outside: Tensor) -> float:
    """The norm of x under a weight without what it has outside of the edit as well (a codec's noise)."""
    squared = x.square().sum(1, keepdim=True)
    noise = squared[outside].median().clamp_max(NOISIEST) if bool(outside.any()) else squared.new_zeros(())
    return float((weight * (squared - noise)).sum().clamp_min(0).sqrt())


def progress_of(moved: Tensor, wanted: Tensor, weight: Tensor) -> tuple[float, float]:
    """(share of the wanted change that has been made, what was changed at right angles to it as a share of it)."""
    whole = norm(wanted, weight)
    progress = float((weight * moved * wanted).sum()) / whole**2
    return progress, norm(moved - progress * wanted, weight) / whole


def likeness(x: Tensor, y: Tensor, weight: Tensor) -> float:
    """The cosine of x and y under a weight, −1 to 1; near 0 where one of them has little to tell by."""
    together, squared = (weight * x * y).sum(), [(weight * t.square()).sum() + FEW for t in (x, y)]
    return float(together / (squared[0] * squared[1]).sqrt())


def local_likeness(x: Tensor, known: Sequence[Tensor], weight: Tensor, size: int) -> list[float]:
    """For each y of the known ones the mean of the cosines of x and y in all neighbourhoods, each counted by what y has there: what
    was added to x in one place counts for that place alone."""

    def near(t: Tensor) -> Tensor:
        return box_mean((weight * t).sum(1, keepdim=True), size)

    in_x, found = near(x.square()), []
    for y in known:
        in_y = near(y.square())
        cosines = near(x * y) / (in_x * in_y + 1e-12).sqrt()
        found.append(float((in_y * cosines).sum() / (in_y.sum() + 1e-9)))
    return found


def edges(lab: Tensor, sigma: float) -> Tensor:
    """Slopes of a picture in Oklab that is blurred first."""
    return slopes(blur(lab, sigma, min(math.ceil(2 * sigma), min(lab.shape[-2:]) - 1)))


def surroundings(region: Tensor) -> float:
    """The share of the picture that a mask leaves to compare."""
    size = fitting_pixels(region.shape[-2:], WHOLE, enlarge=False)
    return 1 - float(dilate(resized(region, size) > 0.25, 8).float().mean())


def coefficient(x: Tensor, y: Tensor, weight: Tensor) -> float:
    """The least-squares α of x ≈ α · y; near 0 where y has little to tell by."""
    return float((weight * x * y).sum() / ((weight * y.square()).sum() + RIDGE))


def coefficients(x: Tensor, basis: tuple[Tensor, ...], weight: Tensor) -> list[float]:
    """The same of x ≈ Σ αᵢ yᵢ."""
    y = torch.stack([t.flatten() for t in basis]).double()
    w = weight.expand_as(x).flatten().double()
    gram = (y * w) @ y.T
    gram = gram + torch.eye(len(gram)) * (0.01 * float(gram.diagonal().mean()) + 1e-3)
    return torch.linalg.solve(gram, (y * w) @ x.flatten().double()).tolist()


def ghost(x: Tensor, y: Tensor, weight: Tensor) -> tuple[float, bool]:
    """(|α| of x ≈ α · y in the colour channel where it is largest, whether y has enough to tell by); of slopes ``[1, 6, h, w]``."""
    together, squared = ((weight * t).sum((0, 2, 3)).view(2, 3).sum(0) for t in (x * y, y.square()))
    return float((together / (squared + FAINT)).abs().max()), float(squared.sum()) >= TOLD


def like_old(x: Tensor, expected: Expected, against: Against, old: Tensor, region: Tensor) -> float:
    """How much of what is not as expected in a region is the old object, 0 to 1: the largest of

    * the share of it, squared, that is at pixels where a mixture of e and s, the same all over 9 × 9 pixels, explains 70 %, and
      does so better than the room behind both objects;
    * twice the share of the squared slopes that the old object's slopes explain, with a factor for each 9 × 9 pixels: of ghosts in
      other colours, and of edges alone. A share of 0.15 is what any two objects' slopes have;
    * 0.7 times the likeness of its light to the old object's outline: of a line drawn where that was.
    """
    plate, off, towards = expected.plate, against.off, against.towards
    there, around = (old > 0.3) * region, dilate(old > 0.3, 3) * region
    squared, of_room = (_summed(t.square()) for t in (off, blur(x - plate, 1.0, 3)))
    share = box_mean(there * _summed(off * towards), 9) / (box_mean(there * _summed(towards.square()), 9) + 1e-4)
    share = share.clamp(0, 1.1)
    left = _summed((off - share * towards).square())
    mixed = there * ((left < 0.3 * squared) & (left <= of_room) & (share > 0.1))
    in_colours = float((mixed * squared).sum() / ((region * squared).sum() + 1e-3))

    old_edges, off_edges = against.slopes_s - slopes(blur(plate, 1.0, 3)), against.slopes_x - against.slopes_e
    share = box_mean(around * _summed(off_edges * old_edges), 9) / (
        box_mean(around * _summed(old_edges.square()), 9) + 1e-4
    )
    gained = around * _summed(off_edges.square() - (off_edges - share.clamp(-1.2, 1.2) * old_edges).square())
    in_edges = float(gained.sum() / ((region * _summed(off_edges.square())).sum() + 1e-3))

    outline, light = around * length(old_edges), region * off.mean(1, keepdim=True)
    drawn = (light * outline).sum().abs() / ((light.square().sum() + 1e-3) * outline.square().sum() + 1e-9).sqrt()
    return max(in_colours, 2 * in_edges, 0.7 * float(drawn))


def _summed(x: Tensor) -> Tensor:
    """Over the channels."""
    return x.sum(1, keepdim=True)


def palette_of(picture: Tensor, most: int) -> Optional[Tensor]:
    """The colours ``[n, 3]`` of a picture ``[1, 3, H, W]`` in 8 bits; None if they are more than ``most``."""
    codes = (picture[0] * 255).round().int()
    packed = (codes[0] * 65536 + codes[1] * 256 + codes[2]).flatten()
    if len(packed[:: max(1, len(packed) // 4096)].unique()) > most:
        return None
    found = packed.unique()
    return None if len(found) > most else torch.stack([found // 65536, found // 256 % 256, found % 256], 1)


def share_nearer(x: Tensor, y: Tensor, to: Tensor) -> float:
    """Of the pixels in which x differs from a picture, the share in which it is nearer to y, twice and more."""
    before, now = (length(x - t) for t in (to, y))
    differs = before > 2 / 255
    return float((now <= 0.5 * before)[differs].float().mean()) if bool(differs.any()) else 0.0


def in_palette(picture: Tensor, colours: Tensor, dithered: bool) -> Tensor:
    """A picture ``[1, 3, H, W]`` in these colours: each pixel's nearest one, or its error spread over its neighbours."""
    palette = Image.new("P", (1, 1))
    padded = torch.cat(
        [colours, colours[:1].expand(256 - len(colours), 3)]
    )  # a short palette would be filled up with black
    palette.putpalette(padded.flatten().tolist())
    image = Image.fromarray((picture[0].permute(1, 2, 0) * 255).round().byte().numpy())
    how = Image.Dither.FLOYDSTEINBERG if dithered else Image.Dither.NONE
    brought = np.array(image.quantize(palette=palette, dither=how).convert("RGB"))
    return torch.from_numpy(brought).permute(2, 0, 1)[None].float() / 255


def softness(edges_x: Tensor, edges_e: Tensor, w: Tensor, outside: Tensor) -> float:
    """1 − how much of its edges the object has, where those of the surroundings, softer or not, are 1."""

    def kept(weight: Tensor) -> float:
        there, wanted = ((weight * t.square()).sum() for t in (edges_x, edges_e))
        return math.sqrt(float((there + 1e-2) / (wanted + 1e-2)))

    return 1 - kept(w) / min(1.0, max(0.5, kept(outside.float())))


def edges_lost(lab_s: Tensor, lab_x: Tensor, lab_e: Tensor, region: Tensor, outside: Tensor) -> float:
    """1 − the least-squares share of the expected object's fine edges that the output has, where the share of the before picture's
    that its surroundings have is 1: all that bends, moves or takes away a part of the object takes edges from their places.

    Args:
        lab_s, lab_x, lab_e: before picture, output and what is expected, Oklab.
        region: where its edges are compared, some pixels around it.
        outside: the surroundings.
    """
    s, x, e = (edges(lab, FINE) for lab in (lab_s, lab_x, lab_e))

    def there(y: Tensor, weight: Tensor) -> float:
        return float(((weight * x * y).sum() + FEW) / ((weight * y.square()).sum() + FEW))

    return 1 - there(e, region.float()) / min(1.0, max(0.5, there(s, outside.float())))


def local_share(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    top = box_mean((weight * x * y).sum(1, keepdim=True), 9)
    return top / (box_mean((weight * y.square()).sum(1, keepdim=True), 9) + 1e-3) * weight


def grain(picture: Tensor, outside: Tensor) -> float:
    """The fine noise of a picture: the median deviation of its luma from the mean of 3 × 3 pixels, as the deviation of a Gaussian
    that has it."""
    luma = (picture * picture.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    fine = (luma[..., 1:-1, 1:-1] - mean_pool(luma, 3, 1)).abs()[outside[..., 1:-1, 1:-1]]
    return float(fine.median()) / 0.6745 if len(fine) else 0.0


def slopes(x: Tensor) -> Tensor:
    return torch.cat(torch.gradient(x, dim=(2, 3)), 1)


def fitting_pixels(size: Sequence[int], side: int, enlarge: bool = True) -> tuple[int, int]:
    """A size of the same proportions, with as many pixels as a square of this side has: by its long side a panorama would lose
    what a square picture keeps."""
    ratio = side / math.sqrt(size[0] * size[1])
    if not enlarge:
        ratio = min(1.0, ratio)
    return max(8, round(size[0] * ratio)), max(8, round(size[1] * ratio))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    ratio = x.shape[-2] // size[0]
    if (ratio * size[0], ratio * size[1]) == tuple(x.shape[-2:]):
        return mean_pool(x, ratio, ratio)  # the same, faster
    if size[0] <= x.shape[-2] and size[1] <= x.shape[-1]:
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
