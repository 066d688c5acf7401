"""What the verdicts are computed from: the pictures at working sizes, what the output should be, and distances from that."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur, box_mean, dilate, oklab, tolerant_distance
from .alignment import CLOSE, Alignment, align, look_up, warp

WHOLE = 256  # pixels on the long side at which the surroundings are compared
CROP = 192  # the same for the crop around the edit
AROUND = 0.35  # of the mask's long side that the crop takes in on each side
VISIBLE = 0.04  # Oklab
LEAST_SHIFT = 0.1  # pixels of the working size; less is not worth a resampling
LARGEST_SHIFT = 0.012  # of the long side: a pixel of a small picture; more is a picture that moved
STAYED = 0.015  # of the object's size, and of its scale
NOISIEST = 0.003  # squared difference in 0…1, three channels together; JPEG at quality 35 has about a tenth of it
FAINT, TOLD = 0.3, 1.0  # sums of squared slopes per pixel: a ridge; what an outline of a hundred pixels has
RIDGE = 1.0  # of sums of squared differences in 0…1, about ten pixels of a well visible object


@dataclass
class Whole:
    """The whole picture at a working size, and the output in the before picture's colours."""

    s: Tensor
    x: Tensor
    g: Optional[Tensor]
    mask: Tensor  # boolean
    pictures: tuple[Tensor, Tensor, Optional[Tensor]]  # at full size, the output in the before picture's colours
    full_mask: Tensor

    @classmethod
    def of(cls, s: Tensor, x: Tensor, g: Optional[Tensor], region: Tensor) -> Whole:
        size = _fitting(s.shape[-2:], min(WHOLE, max(s.shape[-2:])))
        small_s, small_x, small_g = resized(s, size), resized(x, size), None if g is None else resized(g, size)
        mask = resized(region, size) > 0.25
        outside = ~dilate(mask, 4)
        # A pair's two pictures may differ in colour everywhere; the output is like one of them.
        known = [small_s] if small_g is None else [small_s, small_g]
        fits = [_colour_balance(small_x, t, outside) for t in known]
        (gain, offset, _), like = min(zip(fits, known), key=lambda fit: fit[0][2])
        balanced = [(t * gain + offset).clamp(0, 1) for t in (small_x, x)]
        shift = _small_shift(balanced[0], like, outside)
        if float(shift.norm()) >= LEAST_SHIFT:
            ratio = s.shape[-1] / size[1]
            balanced = [moved_by(balanced[0], shift), moved_by(balanced[1], shift * ratio)]
        return cls(small_s, balanced[0], small_g, mask, (s, balanced[1], g), region)

    def background(self, also: Optional[Tensor] = None) -> tuple[Optional[float], Tensor]:
        """(largest mean change of a neighbourhood outside the mask, the changes); None where there is no outside."""
        known = [t for t in (self.s, self.g) if t is not None]
        return largest_change(self.x, known, self.mask if also is None else self.mask | also)


def largest_change(x: Tensor, known: Sequence[Tensor], mask: Tensor) -> tuple[Optional[float], Tensor]:
    """(largest mean Oklab distance of x from the nearest of the known pictures in a neighbourhood outside the mask, the
    distances); None where there is no outside."""
    x = blur(oklab(x), 1.0, 3)
    d = torch.stack([tolerant_distance(x, blur(oklab(t), 1.0, 3)) for t in known]).amin(0)
    outside = (~dilate(mask, 8)).float()
    if float(outside.mean()) < 0.02:
        return None, d * 0
    share = box_mean(outside, 13)
    mean = box_mean(d * outside, 13) / share.clamp_min(1e-6)
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
        weight, factor, shift = torch.ones_like(a), 1.0, 0.0
        for _ in range(5):
            total = weight.sum()
            mean_a, mean_b = (weight * a).sum() / total, (weight * b).sum() / total
            spread = (weight * (a - mean_a).square()).sum() / total
            together = (weight * (a - mean_a) * (b - mean_b)).sum() / total
            factor = float(((together + 1e-3) / (spread + 1e-3)).clamp(0.75, 1.33))
            shift = float((mean_b - factor * mean_a).clamp(-0.15, 0.15))
            weight = 1 / (1 + ((b - factor * a - shift) / 0.03).square())
        gains.append(factor)
        offsets.append(shift)
    gain, offset = (torch.tensor(t).view(1, 3, 1, 1) for t in (gains, offsets))
    return gain, offset, float((gain * x + offset - s).abs()[..., where].mean())


def _small_shift(x: Tensor, s: Tensor, outside: Tensor) -> Tensor:
    """(x, y) in pixels by which x lies beside s outside the mask; 0 where that is more than a codec's or a VAE's doing.

    Gauss–Newton steps with Cauchy's weights (Baker and Matthews 2004).
    """
    s, x = (blur(t, 1.0, 3) for t in (s, x))
    shift, where = torch.zeros(2), outside[0, 0]
    limit = LARGEST_SHIFT * max(s.shape[-2:])
    if int(where.sum()) < 64:
        return shift
    for _ in range(6):
        looked = moved_by(x, shift)
        slopes_x, slopes_y = (torch.gradient(looked, dim=d)[0][0, :, where].flatten() for d in (3, 2))
        off = (looked - s)[0, :, where].flatten()
        weight = 1 / (1 + (off / 0.05).square())
        jacobian = torch.stack([slopes_x, slopes_y])
        gram = (jacobian * weight) @ jacobian.T + 1e-3 * torch.eye(2)
        step = torch.linalg.solve(gram, (jacobian * weight) @ off)
        shift = shift - step
        if not bool(shift.isfinite().all()) or float(shift.norm()) > 2 * limit:
            return torch.zeros(2)
        if float(step.norm()) < CLOSE:
            break
    return shift if float(shift.norm()) <= limit else torch.zeros(2)


def moved_by(x: Tensor, shift: Tensor) -> Tensor:
    """x looked up at every place plus ``shift``."""
    return look_up(x, Alignment(torch.zeros(2), torch.eye(2), shift, 1.0))


@dataclass
class Crop:
    """The edit and some of its surroundings at a working size."""

    s: Tensor
    x: Tensor
    g: Optional[Tensor]
    mask: Tensor
    box: tuple[int, int, int, int]  # top, left, bottom, right of the whole picture at full size
    full: tuple[int, int]

    @classmethod
    def of(cls, whole: Whole) -> Crop:
        height, width = whole.full_mask.shape[-2:]
        rows, columns = (whole.full_mask[0, 0] > 0.5).nonzero().unbind(1)
        top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
        margin = max(4, round(AROUND * max(bottom - top, right - left)))
        box = max(0, top - margin), max(0, left - margin), min(height, bottom + margin), min(width, right + margin)
        size = _fitting((box[2] - box[0], box[3] - box[1]), CROP)

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
    def of(
        cls, crop: Crop, g: Tensor, lab_x: Tensor, lab_g: Tensor, old: Tensor, new: Tensor, placed: bool
    ) -> Expected:
        """``g``: the after picture in the crop; Oklab of the output and of it; the two objects, and whether one is new."""
        if not placed:
            return cls(g, _plate(crop, g, old, new), torch.zeros_like(new), new, lab_g, None, None)
        similarity, affine = align(lab_x, lab_g, new)
        if similarity.displacement < STAYED and abs(similarity.scale - 1) < STAYED:
            return cls(g, _plate(crop, g, old, new), new, new, warp(lab_g, similarity), similarity, affine)
        # What stayed where it was while the object moved is not the object.
        stay, move = (length(t - lab_g) for t in (lab_x, look_up(lab_x, similarity)))
        new = new * (1 - F.avg_pool2d(((stay < VISIBLE) & (move > VISIBLE)).float(), 3, 1, 1))
        plate = _plate(crop, g, old, new)
        moved, there, lab = warp(torch.cat([g, new, lab_g], 1), similarity).split([3, 1, 3], 1)
        return cls(there * moved + (1 - there) * plate, plate, there, new, lab, similarity, affine)


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
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    small = F.avg_pool2d(picture * known, 2, ceil_mode=True) / share.clamp_min(1e-6)
    coarse = F.interpolate(
        filled(small, share.clamp_max(1).ceil() * share), size=size, mode="bilinear", align_corners=False
    )
    return known * picture + (1 - known) * coarse


def shape_errors(
    lab_x: Tensor, lab_g: Tensor, expected: Expected, old: Tensor, known: Tensor
) -> tuple[Tensor, Optional[float], Optional[float], Optional[float]]:
    """(map, what differs in the worst part of the object, 1 − IoU of the outlines with the object where it was found, and where
    the after picture has it); the differences as shares of the object's contrast."""
    e, b = (blur(oklab(t), 1.0, 3) for t in (expected.picture, expected.plate))
    w = expected.object
    if expected.similarity is None or float(w.sum()) < 1:
        return tolerant_distance(lab_x, e) / 0.2 * old, None, None, None
    contrast = length(e - b)
    level = max(VISIBLE, float(((w * contrast.square()).sum() / w.sum()).sqrt()))
    # the room shows through and around the object, where it was or moved along: either will do
    d = torch.minimum(tolerant_distance(lab_x, e), tolerant_distance(lab_x, expected.moved)) / level
    near = dilate(w > 0.5, 6) * known
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


def codec_change(picture: Tensor, small: Tensor, mask: Tensor, quality: int = 50) -> Optional[float]:
    """What a round trip through JPEG does to a picture ``[1, 3, H, W]``, as :meth:`Whole.background` measures it."""
    pixels = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    again = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None].float() / 255
    return largest_change(resized(again, small.shape[-2:]), [small], mask)[0]


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


def softness(edges_x: Tensor, edges_e: Tensor, w: Tensor, outside: Tensor) -> float:
    """1 − how much of its edges the object has, where those of the surroundings, softer or not, are 1."""

    def kept(weight: Tensor) -> float:
        there, wanted = ((weight * t.square()).sum() for t in (edges_x, edges_e))
        return math.sqrt(float((there + 1e-2) / (wanted + 1e-2)))

    return 1 - kept(w) / min(1.0, max(0.5, kept(outside.float())))


def local_share(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    top = box_mean((weight * x * y).sum(1, keepdim=True), 9)
    return top / (box_mean((weight * y.square()).sum(1, keepdim=True), 9) + 1e-3) * weight


def slopes(x: Tensor) -> Tensor:
    return torch.cat(torch.gradient(x, dim=(2, 3)), 1)


def _fitting(size: Sequence[int], longest: int) -> tuple[int, int]:
    ratio = longest / max(size)
    return max(8, round(size[0] * ratio)), max(8, round(size[1] * ratio))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    ratio = x.shape[-2] // size[0]
    if (ratio * size[0], ratio * size[1]) == tuple(x.shape[-2:]):
        return F.avg_pool2d(x, ratio)  # the same, faster
    if size[0] <= x.shape[-2] and size[1] <= x.shape[-1]:
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
