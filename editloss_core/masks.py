"""Edit masks: where before and after differ, soft edges, and the checks that pictures and masks share.

Pictures are floats ``[B, H, W, 3]`` in 0…1, masks ``[B, H, W]`` in 0…1. Everything here is data, not part of a loss: it
runs without gradients, in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_number

__all__ = ["edit_region", "estimate_mask", "feather_mask", "how_they_differ"]

# Differences in Oklab, where 0.02 is about the smallest that an eye sees (Ottosson 2020, "A perceptual color space for
# image processing"). Measured on three pairs of real edit models: the 95th percentile of an untouched background,
# re-encoded as WebP, is 0.015 to 0.03 after the blur below; the edited objects reach 0.13 to 0.45.
JUST_VISIBLE = 0.02
LARGEST_DRIFT = 0.06  # a colour shift of the whole picture; the pairs above have 0.003 to 0.016. More is an edit.
SHORT = 32  # pixels that the short side keeps where a mask is estimated: of a strip two pixels high, all is border
LARGEST_NOISE = 0.15  # what differs by more is changed, even if it is the whole picture
# Of luma. Measured on five pictures: JPEG of quality 95 to 30 leaves 0.002 to 0.015 of fine detail, of one with grain 0.008 at 95,
# 0.017 at 80 and 0.02 at 60; noise of σ 0.02, 0.03 and 0.05 in each channel 0.013, 0.02 and 0.033. Spots of 5 × 5 reach 0.06 by
# JPEG of quality 10.
FINE = 0.02
SPOT = 0.08
REGION = "region 2"  # part of every key of what depends on edit_region: count up when it comes to find another one
STANDS_OUT = 3.0  # times as large a difference as that of the rest


@torch.no_grad()
def feather_mask(mask: Tensor, feather: float) -> Tensor:
    """A mask with a soft edge: a Gaussian of standard deviation ``feather / 2``, cut off at ``ceil(feather)`` pixels.

    Farther than ``ceil(feather)`` pixels (along rows or columns) from the mask the result is exactly 0. The borders of
    the picture are reflected, so that a full mask stays full.

    Args:
        mask: ``[B, H, W]`` in 0…1.
        feather: half-width of the edge in pixels, ≥ 0 and less than H and W; 0 returns ``mask`` itself.

    Returns:
        ``[B, H, W]`` in 0…1.

    Raises:
        ValueError: for a wrong shape, dtype or feather.

    >>> feather_mask(torch.ones(1, 4, 4), 2.0).eq(1).all()
    tensor(True)
    """
    _check_floating("mask", mask)
    if mask.ndim != 3 or mask.numel() == 0:
        raise ValueError(f"mask: expected [B, H, W], got {_shape(mask)}")
    check_number("feather", feather, 0.0)
    if feather >= min(mask.shape[-2:]):
        raise ValueError(f"feather: expected less than the mask's {mask.shape[-2]} x {mask.shape[-1]}, got {feather:g}")
    if feather == 0:
        return mask
    # reflect padding needs radius < size
    radius = min(math.ceil(feather), mask.shape[-1] - 1, mask.shape[-2] - 1)
    return blur(mask[:, None], feather / 2, radius)[:, 0].clamp(0, 1)


def blur(x: Tensor, sigma: float, radius: int) -> Tensor:
    """Separable Gaussian over [B, C, H, W], reflected at the borders."""
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim in (-1, -2):
        length = x.shape[dim]
        padded = F.pad(x, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="reflect")
        x = padded.narrow(dim, radius, length) * (weights[0] / total)
        for k in range(1, radius + 1):  # several times faster than a grouped convolution
            both = padded.narrow(dim, radius - k, length) + padded.narrow(dim, radius + k, length)
            x = x.add_(both, alpha=weights[k] / total)
    return x


def box_mean(x: Tensor, size: int, step: int = 1) -> Tensor:
    """Mean over a square of an odd side around each pixel of [B, C, H, W], 0 beyond the borders; rows and columns in turn.
    With a step, around every second, third, … pixel of every second, third, … row alone.

    As differences of running sums, whose cost does not grow with the side; in float64, where they lose nothing.
    """
    before, after = size // 2 + 1, size // 2
    for dim in (-1, -2):
        length = x.shape[dim]
        padding = (before, after, 0, 0) if dim == -1 else (0, 0, before, after)
        sums = F.pad(x, padding).cumsum(dim, dtype=torch.float64)
        upper, lower = (sums.narrow(dim, at, length) for at in (size, 0))
        kept = (..., slice(None, None, step)) if dim == -1 else (..., slice(None, None, step), slice(None))
        x = ((upper[kept] - lower[kept]) / size).to(x.dtype)
    return x


@torch.no_grad()
def estimate_mask(
    before: Tensor,
    after: Tensor,
    threshold: float | str = "auto",
    margin: float = 0.01,
    min_area: float = 0.001,
    feather: float = 0.0,
    working_size: int = 384,
) -> Tensor:
    """The region in which two pictures of a pair differ, made to survive re-encoding and shifts by a pixel.

    1. Both pictures are reduced to at most ``working_size`` pixels on the long side, but no less than 32 on the short one,
       taken to Oklab and blurred.
    2. d(p) = max(min_q ‖before(p) − after(q)‖, min_q ‖after(p) − before(q)‖) over q at most one pixel from p, so that
       edges that moved by a pixel do not count as changed. A colour shift of the whole background, measured as the
       median over the unchanged pixels, is taken out first.
    3. Pixels with d above a low threshold are kept if they are connected to enough pixels above a high one.
       ``"auto"``: with the noise n = median + 4 · 1.4826 · MAD of the pixels below Otsu's threshold, low is
       max(n, 0.02), at most 0.15, and high is max(Otsu, low, 0.04), at most 0.3. A number is used for low and its
       double for high.
    4. The region is closed, pieces smaller than ``min_area`` (or than 2 % of the largest) go, holes up to 2 % of the
       picture are filled, and the rest grows by ``margin``.

    Args:
        before: ``[B, H, W, 3]`` in 0…1.
        after: the same shape.
        threshold: ``"auto"`` or a distance in Oklab, > 0; 0.02 is just visible, black and white are 1 apart. Lower it
            if the mask misses parts of the object, raise it if it takes in the background.
        margin: growth on every side, as a fraction of the long side, 0…0.25.
        min_area: smallest piece that counts, as a fraction of the picture's area, 0…1.
        feather: half-width of the soft edge in pixels, see :func:`feather_mask`; 0 leaves the mask in {0, 1}.
        working_size: pixels on the long side at which the work is done, ≥ 32; strips beyond 12 : 1 have more.

    Returns:
        ``[B, H, W]`` in the dtype of ``before``; all zeros for a sample without a visible edit.

    Raises:
        ValueError: for a wrong shape, dtype, device, range or option.
    """
    check_pair(before, after)
    if not (isinstance(threshold, str) and threshold == "auto"):
        check_number("threshold", threshold, 0.0, open_low=True, also="'auto' or ")
    check_number("margin", margin, 0.0, 0.25)
    check_number("min_area", min_area, 0.0, 1.0)
    check_number("feather", feather, 0.0)
    if not isinstance(working_size, int) or working_size < 32:
        raise ValueError(f"working_size: expected a whole number >= 32, got {working_size!r}")
    height, width = before.shape[1:3]
    ratio = min(1.0, max(working_size / max(height, width), SHORT / min(height, width)))
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    masks = []
    for b in range(before.shape[0]):  # one at a time: the thresholds are each sample's own
        small = [t[b : b + 1].float().permute(0, 3, 1, 2) for t in (before, after)]
        if size != (height, width):
            small = [F.interpolate(t, size=size, mode="area") for t in small]
        found = _changed(small[0], small[1], threshold, min_area, round(margin * max(size)))
        if size != (height, width):
            found = F.interpolate(found.float(), size=(height, width), mode="bilinear", align_corners=False) > 0.5
        masks.append(found[:, 0])
    result = torch.cat(masks).float()
    return (feather_mask(result, feather) if feather else result).to(before.dtype)


@torch.no_grad()
def how_they_differ(before: Tensor, after: Tensor) -> str:
    """Whether two pictures differ by more than a copy that was saved again, whatever of them it is.

    With d = after − before, in 0…1, they differ

    * "all over" if the root mean square of d in Oklab, of pictures reduced to an eighth, is above 0.02, which is just visible, or
      that of the luma of d, less its mean over 8 × 8 pixels, above 0.02 (noise, blur);
    * else "in a spot" if the mean of the luma of d over 5 × 5 pixels reaches 0.08 somewhere.

    It says nothing of where: see :func:`edit_region`.

    Args:
        before, after: ``[H, W, 3]`` in 0…1, of one size, at least 8 pixels on a side.

    Returns:
        "all over", "in a spot", or "": they do not.
    """
    x, y = (t.float().permute(2, 0, 1)[None] for t in (before, after))
    if _all_over(x, y):
        return "all over"
    return "in a spot" if F.avg_pool2d(_luma(y - x), 5, 1).abs().max().item() >= SPOT else ""


@torch.no_grad()
def edit_region(before: Tensor, after: Tensor) -> Tensor | None:
    """The mask of :func:`estimate_mask`, where a region stands out.

    Where all of the picture was edited, something is left above the thresholds that are taken from it. That is no region: the
    rest differs "all over" as well (:func:`how_they_differ`), and the root mean square of the difference inside is less than
    3 times that of the rest.

    Args:
        before, after: ``[H, W, 3]`` in 0…1, of one size, at least 8 pixels on a side.

    Returns:
        ``[H, W]`` in {0, 1} with a 1 somewhere, or None.
    """
    mask = estimate_mask(before[None], after[None])[0]
    inside = mask >= 0.5
    if not bool(inside.any()):
        return None
    if bool(inside.all()):
        return mask
    d = (after - before).float()
    most = d[inside].square().mean().sqrt().item()
    if most >= STANDS_OUT * d[~inside].square().mean().sqrt().item():
        return mask
    rest = torch.where(inside[..., None], before, after)
    x, y = (t.float().permute(2, 0, 1)[None] for t in (before, rest))
    return None if _all_over(x, y) else mask


def _luma(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _all_over(before: Tensor, after: Tensor) -> bool:
    small = [oklab(F.avg_pool2d(t, 8)) for t in (before, after)]
    if (small[1] - small[0]).square().sum(1).mean().sqrt().item() > JUST_VISIBLE:
        return True
    luma = _luma(after - before)
    means = F.interpolate(F.avg_pool2d(luma, 8), size=luma.shape[-2:], mode="nearest")
    return (luma - means).square().mean().sqrt().item() > FINE


def _changed(before: Tensor, after: Tensor, threshold: float | str, min_area: float, grow: int) -> Tensor:
    """The edit region of one pair [1, 3, H, W] as a boolean [1, 1, H, W]."""
    height, width = before.shape[-2:]
    lab0, lab1 = (oklab(t) for t in (before, after))
    if min(height, width) > 3:
        lab0, lab1 = (blur(t, 1.0, 3) for t in (lab0, lab1))
    d = tolerant_distance(lab0, lab1)
    quiet = (d < _otsu(d))[0, 0]
    if quiet.float().mean() > 0.5:  # otherwise the "background" may be the edit itself
        drift = (lab1 - lab0)[0, :, quiet].median(dim=1).values
        if drift.norm().item() <= LARGEST_DRIFT:
            d = tolerant_distance(lab0, lab1 - drift.view(1, 3, 1, 1))
    if threshold == "auto":
        otsu = _otsu(d)
        background = d[d < otsu] if bool((d < otsu).any()) else d.flatten()
        median = background.median()
        noise = (median + 4 * 1.4826 * (background - median).abs().median()).item()
        low = min(max(noise, JUST_VISIBLE), LARGEST_NOISE)
        high = min(max(otsu, low, 2 * JUST_VISIBLE), 2 * LARGEST_NOISE)
    else:
        low, high = float(threshold), 2 * float(threshold)
    seeds = d > high
    for edge in (seeds[..., 0, :], seeds[..., -1, :], seeds[..., 0], seeds[..., -1]):
        edge.fill_(False)  # a picture that moved by a pixel has a new row at its border
    if not seeds.any():
        return seeds
    # A piece needs a core of strong pixels, not one stray: a hundredth of the smallest piece that counts, and 3 pixels.
    # Closing by one pixel mends lines; the wider closing comes after stray pixels of the background are gone.
    pixels = height * width
    labels = components(_close(d > low, 1))
    core = torch.bincount(labels[seeds], minlength=pixels + 1)
    core[0] = 0
    region = (core >= max(3, 0.01 * min_area * pixels))[labels]
    region = _close(region, max(1, round(0.01 * max(height, width))))
    labels = components(region)
    area = torch.bincount(labels.flatten(), minlength=pixels + 1)
    area[0] = 0
    region = ((area >= min_area * pixels) & (area >= 0.02 * area.max()) & (area > 0))[labels]
    # Holes: pieces of the complement that do not reach the border.
    outside = components(~region)
    area = torch.bincount(outside.flatten(), minlength=pixels + 1)
    area[0] = 0
    for side in (outside[..., 0, :], outside[..., -1, :], outside[..., 0], outside[..., -1]):
        area[side.flatten()] = 0
    region = region | ((area > 0) & (area <= 0.02 * pixels))[outside]
    return dilate(region, grow)


def mean_pool(x: Tensor, size: int, stride: int) -> Tensor:
    """Means of all whole squares of this side in [B, C, H, W], as torch's avg_pool2d to the last bit; with the few pixels of a
    side of 2 or 3 in a third to a sixth of its time."""
    if size > 3:
        return F.avg_pool2d(x, size, stride)
    rows, columns = (x.shape[dim] - size + 1 for dim in (-2, -1))
    first, *rest = (x[..., i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size))
    total = first.clone(memory_format=torch.contiguous_format)
    for some in rest:
        total += some
    return total.div_(size * size)


def oklab(image: Tensor) -> Tensor:
    """sRGB [B, 3, H, W] in 0…1 → Oklab (Ottosson 2020): L in 0.14…1, a and b about −0.4…0.4.

    Near black the cube root goes over into CIELAB's straight line (CIE 15:2004). Left as it is, one step of an 8-bit code
    at black is a distance of 0.07, and every JPEG of a dark picture a visible change.
    """
    image = image.clamp(0, 1)
    linear = torch.where(image <= 0.04045, image / 12.92, _power((image + 0.055) / 1.055, 2.4))
    to_lms = linear.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = linear.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lms = torch.einsum("ij,bjhw->bihw", to_lms, linear).clamp_min(0)
    lms = torch.where(lms > (6 / 29) ** 3, _power(lms, 1 / 3), lms * (29 / 6) ** 2 / 3 + 4 / 29)
    return torch.einsum("ij,bjhw->bihw", to_lab, lms)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x to a power, x ≥ 0; in a third of the time of torch's, and as it to seven digits."""
    return x.log2().mul_(exponent).exp2_()


def tolerant_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance [B, 1, H, W] of two pictures that forgives shifts by one pixel, symmetric in its arguments."""
    height, width = a.shape[-2:]
    a, b = (F.pad(t, (1, 1, 1, 1), mode="replicate") for t in (a, b))
    from_a: Tensor | None = None
    from_b: Tensor | None = None
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            # |a(p) − b(p + d)|² wherever both are; at p + d it is |b(q) − a(q − d)|²
            top, left = max(0, -dy), max(0, -dx)
            rows, columns = height + 2 - abs(dy), width + 2 - abs(dx)
            apart = (a[..., top : top + rows, left : left + columns] - b[..., top + dy : top + dy + rows, left + dx : left + dx + columns])  # fmt: skip
            apart = apart.square_().sum(1, keepdim=True)
            at_a = apart[..., 1 - top : 1 - top + height, 1 - left : 1 - left + width]
            at_b = apart[..., 1 - top - dy : 1 - top - dy + height, 1 - left - dx : 1 - left - dx + width]
            from_a = at_a if from_a is None else torch.minimum(from_a, at_a)
            from_b = at_b if from_b is None else torch.minimum(from_b, at_b)
    assert from_a is not None and from_b is not None
    return torch.maximum(from_a, from_b).sqrt_()


def _otsu(d: Tensor, bins: int = 256) -> float:
    """Otsu's threshold (1979): the split with the largest variance between the two sides."""
    top = d.max().item()
    if top <= 0:
        return 0.0
    counts = torch.histc(d.flatten().cpu(), bins=bins, min=0.0, max=top).double()
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * top / bins
    below = counts.cumsum(0)
    above = counts.sum() - below
    sums = (counts * centres).cumsum(0)
    gap = sums / below.clamp_min(1) - (sums[-1] - sums) / above.clamp_min(1)
    best = int((below * above * gap.square()).argmax())
    return (best + 1) * top / bins


def dilate(region: Tensor, radius: int) -> Tensor:
    """Growth of a boolean [B, 1, H, W] by a disc-like octagon of the given radius in pixels."""
    square = radius // 2  # a diamond of the other half; their order makes no difference
    for dim in (-1, -2):
        reach = 0
        while reach < square:  # a step of one more than was reached leaves no gap
            step = min(reach + 1, square - reach)
            region = _spread(region, dim, step)
            reach += step
    for _ in range(radius - square):
        region = _spread(region, -1, 1).logical_or_(_spread(region, -2, 1))
    return region


def _spread(region: Tensor, dim: int, step: int) -> Tensor:
    """A boolean region and its copies ``step`` pixels to both sides; ten times as fast as a max pooling of floats."""
    grown, rest = region.clone(), region.shape[dim] - step
    if rest > 0:
        for to, source in ((step, 0), (0, step)):
            grown.narrow(dim, to, rest).logical_or_(region.narrow(dim, source, rest))
    return grown


def _close(region: Tensor, radius: int) -> Tensor:
    """Growth, then the same shrinking. The border of the picture does not eat into the region."""
    return ~dilate(~dilate(region, radius), radius)


def components(region: Tensor) -> Tensor:
    """Labels of the 8-connected pieces of a boolean [1, 1, H, W].

    0 outside; within a piece, the largest pixel number in it, counted from 1. Every round joins each label to the
    largest one beside it, found by max pooling, and follows the joins to their end, so that even a spiral takes a few
    rounds only.
    """
    numbers = torch.arange(region.numel() + 1, device=region.device)
    labels = torch.where(region, numbers[1:].view_as(region), 0)
    exact = torch.float32 if region.numel() < 1 << 24 else torch.float64  # the pooled type has to hold every label
    while True:
        beside = F.max_pool2d(labels.to(exact), 3, stride=1, padding=1).long()
        beside = torch.where(region, beside, 0)
        if torch.equal(beside, labels):
            return labels
        joined = numbers.scatter_reduce(0, labels.flatten(), beside.flatten(), "amax")
        while not torch.equal(joined, joined[joined]):
            joined = joined[joined]
        labels = joined[labels]


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype with values in 0…1, got {x.dtype}")


def _check_values(name: str, x: Tensor) -> None:
    low, high = (v.item() for v in torch.aminmax(x))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails as well
        raise ValueError(f"{name}: expected values in 0…1, got values from {low:g} to {high:g}")


def check_pair(before: Tensor, after: Tensor) -> None:
    for name, x in (("before", before), ("after", after)):
        _check_floating(name, x)
        if x.ndim != 4 or x.shape[-1] != 3 or x.numel() == 0:
            raise ValueError(f"{name}: expected pictures [B, H, W, 3], got {_shape(x)}")
        _check_values(name, x)
    if after.shape != before.shape:
        raise ValueError(f"after: expected shape {_shape(before)} like before, got {_shape(after)}")
    if after.device != before.device:
        raise ValueError(f"after: expected device {before.device} like before, got {after.device}")


def checked_mask(name: str, mask: Tensor, images: Tensor) -> Tensor:
    """[B, H, W] or [1, H, W] → [B, 1, H, W] in float32, in 0…1, no sample empty."""
    _check_floating(name, mask)
    batch, height, width, _ = images.shape
    if mask.ndim != 3:
        raise ValueError(f"{name}: expected [B, H, W], got {_shape(mask)}")
    if mask.numel() and not mask.any():  # before the size: Load Image makes up one of 64 x 64
        raise ValueError(
            f"{name}: is empty (all zero), as Load Image's mask of a picture without transparency is; "
            "leave it out or paint the edit region"
        )
    if mask.shape[1:] != (height, width):
        raise ValueError(
            f"{name}: expected height and width {height} x {width} like the pictures, "
            f"got {mask.shape[1]} x {mask.shape[2]}"
        )
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"{name}: expected a batch of {batch} like the pictures, or of 1, got {mask.shape[0]}")
    if mask.device != images.device:
        raise ValueError(f"{name}: expected device {images.device} like the pictures, got {mask.device}")
    _check_values(name, mask)
    empty = (mask.amax((1, 2)) < 0.5).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"{name}: expected a mask that reaches 0.5 somewhere in every sample, got an empty one for sample "
            f"{empty[0]}; pass None to do without"
        )
    return mask.float().clamp(0, 1).expand(batch, height, width)[:, None]
