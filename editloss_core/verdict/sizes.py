"""Pictures of another size than the before picture: edit models choose their own, near it in proportions."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor
from torch.nn import functional as F

PROPORTIONS = 0.02  # relative; the 17 sizes of FLUX.1 Kontext are further apart, so that the nearest of them fits


def check_proportions(name: str, size: Sequence[int], wanted: Sequence[int]) -> None:
    """Sizes are (height, width). One pixel more or less on a side is never too much.

    Raises:
        ValueError: they are of other proportions.
    """
    (height, width), (wanted_height, wanted_width) = size, wanted
    off = abs(width * wanted_height - height * wanted_width)
    one_pixel = abs(width - wanted_width) <= 1 and abs(height - wanted_height) <= 1
    if min(height, width) < 1 or (off > PROPORTIONS * height * wanted_width and not one_pixel):
        raise ValueError(
            f"{name}: expected the before picture's proportions within {PROPORTIONS:.0%}, {wanted_width} x {wanted_height} pixels or "
            f"the like, got {width} x {height}"
        )


def fitting(name: str, picture: Tensor, size: Sequence[int], notes: list[str]) -> Tensor:
    """``[1, C, h, w]`` in 0…1 at ``size``; a resizing is noted."""
    came = tuple(picture.shape[-2:])
    if came == tuple(size):
        return picture
    notes.append(f"The {name if name == 'mask' else f'{name} picture'} was resized from {came[1]} x {came[0]} to {size[1]} x {size[0]} pixels.")  # fmt: skip
    if picture.shape[1] == 1:
        return F.interpolate(picture, size=tuple(size), mode="bilinear", antialias=True).clamp(0, 1)
    return F.interpolate(picture, size=tuple(size), mode="bicubic", antialias=True).clamp(0, 1)
