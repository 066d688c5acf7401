"""Sizes of pictures, and what of them is looked at: buckets, the box that covers one, resampling, and the crop around an edit.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 16  # pixels: 8 per latent and 2 latents per token in FLUX
SAME_PROPORTIONS = 0.01  # relative
MASK_PROPORTIONS = (
    0.02  # the same, of masks to their pictures: they are drawn by hand, or for a size that a model rounds to
)

Size = tuple[int, int]


def bucket_size(size: Size, resolution: int, upscale: bool = False) -> Size:
    """The size to train a picture at: multiples of 16 with its proportions and about ``resolution²`` pixels.

    Of the four ways to round the ideal sides up or down to multiples of 16, the one whose proportions, and half as much
    whose area, come closest on a logarithmic scale, among those of at most 1.02 · resolution² pixels.

    Args:
        size: of the picture, (height, width).
        resolution: see above.
        upscale: if False, neither side is longer than the picture's, unless that is below 16.

    >>> bucket_size((2000, 3000), 1024), bucket_size((500, 500), 1024), bucket_size((500, 500), 1024, upscale=True)
    ((832, 1248), (496, 496), (1024, 1024))
    """
    target = resolution**2
    scale = math.sqrt(target / (size[0] * size[1]))
    if not upscale:
        scale = min(1.0, scale)
    ideal = [side * scale for side in size]
    options = []
    for side, longest in zip(ideal, size):
        steps = {math.floor(side / MULTIPLE + 1e-9), math.ceil(side / MULTIPLE - 1e-9)}
        fitting = [MULTIPLE * n for n in steps if n > 0 and (upscale or MULTIPLE * n <= longest)]
        options.append(fitting or [MULTIPLE])

    def cost(option: Size) -> tuple[bool, float, Size]:
        height, width = option
        shape = abs(math.log(width / height * size[0] / size[1]))
        area = abs(math.log(height * width / (ideal[0] * ideal[1])))
        return height * width > 1.02 * target, shape + 0.5 * area, option

    return min(((h, w) for h in options[0] for w in options[1]), key=cost)


class Box(NamedTuple):
    """A part of a picture, as fractions of its height and width."""

    top: float
    left: float
    bottom: float
    right: float


def cover(size: tuple[int, int], target: tuple[int, int], keep: Optional[Box] = None) -> Box:
    """The largest part of a picture of ``size`` (height, width) with the proportions of ``target``.

    It is central, or moved by as little as it takes for ``keep`` to be inside; where ``keep`` does not fit, their
    centres are as near as can be.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    spans = []
    for axis in range(2):
        length = min(1.0, target[axis] / (size[axis] * scale))
        start = (1.0 - length) / 2
        if keep is not None:
            first, last = keep[axis], keep[axis + 2]
            wanted = (first + last - length) / 2
            if last - first <= length:
                wanted = min(max(start, last - length), first)
            start = min(max(wanted, 0.0), 1.0 - length)
        spans.append((start, start + length))
    return Box(spans[0][0], spans[1][0], spans[0][1], spans[1][1])


def bounding_box(mask: np.ndarray) -> Optional[Box]:
    """Where a mask is at least one half; None if it is nowhere."""
    solid = mask >= 0.5
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if not len(rows):
        return None
    height, width = mask.shape
    return Box(rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width)


class PairImages(NamedTuple):
    """Pixels of a pair after the shared resize and crop: float32 in 0…1, ``[H, W, 3]`` and ``[H, W]`` or None.

    ``valid`` is 1 where the pictures are, and 0 where a variant shows what lies beyond them; None: they are everywhere.
    ``references`` are further pictures that the model looks at, each in a size of its own.
    """

    before: Tensor
    after: Tensor
    mask: Optional[Tensor]
    valid: Optional[Tensor] = None
    references: tuple[Tensor, ...] = ()


def resample(values: np.ndarray, box: Box, size: tuple[int, int]) -> Tensor:
    """The part ``box`` of ``[H, W]`` or ``[H, W, 3]`` at ``size`` (height, width): antialiased, float32 in 0…1.

    Pictures bicubically, masks linearly; both about the same centres, so that what lay on one another still does.
    """
    height, width = values.shape[:2]
    if box == (0, 0, 1, 1) and size == (height, width):
        return torch.from_numpy(values.copy())
    edges = (box.left * width, box.top * height, min(box.right * width, width), min(box.bottom * height, height))
    filter_ = Image.Resampling.BILINEAR if values.ndim == 2 else Image.Resampling.BICUBIC
    channels = [values] if values.ndim == 2 else [values[..., c] for c in range(values.shape[2])]
    parts = [
        np.asarray(Image.fromarray(np.ascontiguousarray(c)).resize(size[::-1], filter_, box=edges)) for c in channels
    ]
    return torch.from_numpy(np.stack(parts, -1) if values.ndim == 3 else parts[0].copy()).clamp(0.0, 1.0)


def times(size: Size) -> str:
    """A size in words, width first."""
    return f"{size[1]}×{size[0]}"


def same_proportions(a: Size, b: Size, within: float = SAME_PROPORTIONS) -> bool:
    """Whether two sizes have the same proportions within 1 % (or another share), or within a pixel of the smaller one."""
    ratio = a[1] / a[0] * b[0] / b[1]
    if abs(math.log(ratio)) <= math.log1p(within):
        return True
    small, large = sorted((a, b))
    scale = min(small[0] / large[0], small[1] / large[1]), max(small[0] / large[0], small[1] / large[1])
    return any(all(abs(large[k] * s - small[k]) <= 1.0 for k in (0, 1)) for s in scale)


class Crop(NamedTuple):
    """A window of a pair's pictures, in pixels: multiples of 16.

    ``coverage`` is the share of the edit mask inside it; 1 without a mask.
    """

    top: int
    left: int
    height: int
    width: int
    coverage: float = 1.0

    def __call__(self, x: Tensor, downscale: int = 1) -> Tensor:
        """The window of ``[..., H, W]``; of latents with their pixels per latent as ``downscale``."""
        top, left, height, width = (v // downscale for v in self[:4])
        return x[..., top : top + height, left : left + width]


def find_crop(mask: Optional[Tensor], size: tuple[int, int], crop: int) -> Crop:
    """The window with the most of a mask in it; among equals the one nearest to the centre of the mask's bounding box.

    Args:
        mask: ``[H, W]`` in 0…1, or None for a window in the middle.
        size: (H, W), multiples of 16.
        crop: see :func:`prepare`.
    """
    blocks = [side // MULTIPLE for side in size]
    window = [min(crop // MULTIPLE, n) if crop else n for n in blocks]
    free = [n - w for n, w in zip(blocks, window)]
    if mask is None:
        return Crop(MULTIPLE * (free[0] // 2), MULTIPLE * (free[1] // 2), MULTIPLE * window[0], MULTIPLE * window[1])
    sums = F.avg_pool2d(mask[None, None].double(), MULTIPLE)[0, 0] * MULTIPLE**2
    total = sums.sum().item()
    table = F.pad(sums.cumsum(0).cumsum(1), (1, 0, 1, 0))
    (h, w), (rows, columns) = window, (free[0] + 1, free[1] + 1)
    inside = table[h:, w:] - table[:rows, w:] - table[h:, :columns] + table[:rows, :columns]
    solid = mask >= 0.5
    centre = []
    for axis in (1, 0):
        hit = solid.any(axis).nonzero()[:, 0]
        centre.append((int(hit[0]) + int(hit[-1]) + 1) / 2 / MULTIPLE)
    tops, lefts = (torch.arange(n + 1, dtype=torch.float64) for n in free)
    far = (tops + h / 2 - centre[0]).square()[:, None] + (lefts + w / 2 - centre[1]).square()
    best = int(torch.where(inside >= inside.max() - 1e-6 * total, far, math.inf).argmin())
    top, left = divmod(best, columns)
    share = min(1.0, inside[top, left].item() / total)
    return Crop(MULTIPLE * top, MULTIPLE * left, MULTIPLE * h, MULTIPLE * w, share)
