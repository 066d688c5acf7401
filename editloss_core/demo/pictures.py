"""Edits to look at: a rendered room or a drawn one, and for each an output of every kind that diagnostics tell apart.

The rendered rooms lie in ``pictures/`` (where they come from: ``pictures/ATTRIBUTION.md``), the drawn one is of
:mod:`.scenes`. The outputs are made from the pair by simple means, so that the same five can be had for every room; what a
model gives may be harder to tell.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from ..pairs import PairSet
from .scenes import edit_region, stool_pairs

__all__ = ["FOLDER", "KINDS", "SCENES", "Edit", "edit", "example_pairs", "outputs"]

FOLDER = Path(__file__).with_name("pictures")
DRAWN = "drawn room"
# What a person chooses → the file; rooms in which every output is what it is called, by the judge of diagnostics.
SCENES = {
    "oak chair": "oak_chair",
    "folding chair": "osaka_chair",
    "metal chair": "bar_stool",
    "bentwood chair": "thonet",
    DRAWN: "",
}
PARTS = ("before", "after", "mask")
KINDS = ("good", "no edit", "overlay", "distorted", "collateral change")

# What is put in, where it is not the stool.
_TARGETS = {"armchair": "bedside table", "cushion_chair": "crate", "thonet": "crate"}
_TARGETS |= {"not_edited": _TARGETS["armchair"], "mask_elsewhere": _TARGETS["cushion_chair"]}
_OPACITY = 0.6  # of the new object over the old one
_BEND = 0.035  # of the width


class Edit(NamedTuple):
    """A pair: ``[H, W, 3]`` in 0…1 twice, the edit region ``[H, W]``, and what was asked for."""

    before: Tensor
    after: Tensor
    mask: Tensor
    caption: str


def edit(scene: str) -> Edit:
    """The pair of one of ``SCENES``.

    >>> [tuple(picture.shape) for picture in edit("drawn room")[:3]]
    [(128, 128, 3), (128, 128, 3), (128, 128)]
    """
    if scene not in SCENES:
        raise ValueError(f"scene: expected one of {', '.join(SCENES)}, got {scene!r}")
    if scene == DRAWN:
        (drawn,) = stool_pairs(1)
        return Edit(drawn.before, drawn.after, edit_region(drawn), drawn.prompt)
    name = SCENES[scene]
    before, after, mask = (_tensor(_read(part, name)) for part in PARTS)
    return Edit(before, after, mask, _caption(name))


def outputs(pair: Edit) -> dict[str, Tensor]:
    """An output of each of ``KINDS``, none equal to its source to the bit, as none of a model is."""
    before, after = _bytes(pair.before), _bytes(pair.after)
    made = {
        "good": after,
        "no edit": before,
        "overlay": _overlaid(before, after, _bytes(pair.mask)),
        "distorted": _bent(after, _bytes(pair.mask)),
        "collateral change": _with_a_ball(after, _bytes(pair.mask)),
    }
    return {kind: _tensor(_recompressed(made[kind], 85)) for kind in KINDS}


def example_pairs(resolution: int = 1024) -> PairSet:
    """The rendered pairs, and four more as people have them by mistake, each named after its mistake."""
    names = sorted(path.stem for path in (FOLDER / "before").iterdir())
    pairs = {name: [_read(part, name) for part in PARTS] for name in names}
    flipped = {name: [part[:, ::-1] for part in pair] for name, pair in pairs.items()}  # other rooms to the eye
    before, after, mask = flipped["armchair"]
    pairs["not_edited"] = [before, _recompressed(before, 60), mask]
    before, after, mask = flipped["bar_stool"]
    pairs["shifted"] = [before, np.pad(after, ((0, 0), (6, 0), (0, 0)), mode="edge")[:, :-6], mask]
    before, after, mask = flipped["cushion_chair"]
    pairs["mask_elsewhere"] = [before, after, mask[:, ::-1]]
    pairs["twice"] = pairs["oak_chair"]
    sides = [torch.stack([_tensor(pair[k]) for pair in pairs.values()]) for k in range(len(PARTS))]
    return PairSet.from_images(
        sides[0], sides[1], sides[2], list(map(_caption, pairs)), names=list(pairs), resolution=resolution
    )


def _caption(name: str) -> str:
    return f"replace the chair with the {_TARGETS.get(name, 'stool')}"


def _read(part: str, name: str) -> np.ndarray:
    (path,) = (FOLDER / part).glob(f"{name}.*")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L" if part == "mask" else "RGB"))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def _bytes(picture: Tensor) -> np.ndarray:
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _recompressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _soft(mask: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius))) / 255.0


def _overlaid(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The new object painted translucently over the old one, which is still there."""
    share = _OPACITY * _soft(mask, mask.shape[1] / 128)[..., None]
    return (share * after + (1 - share) * before).round().astype(np.uint8)


def _bent(after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The new object bent to and fro, the room left alone as far as a warp can."""
    height, width = mask.shape
    by = _BEND * width * _soft(mask, width / 48)
    y, x = np.mgrid[:height, :width].astype(float)
    return _sample(
        after, x + by * np.sin(2 * np.pi * y / (0.22 * width)), y + by * np.sin(2 * np.pi * x / (0.3 * width))
    )


def _sample(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear lookup, clamped at the border."""
    x, y = np.clip(x, 0, pixels.shape[1] - 1.001), np.clip(y, 0, pixels.shape[0] - 1.001)
    x0, y0 = x.astype(int), y.astype(int)
    right, down = (x - x0)[..., None], (y - y0)[..., None]
    p = pixels.astype(float)
    top = (1 - right) * p[y0, x0] + right * p[y0, x0 + 1]
    bottom = (1 - right) * p[y0 + 1, x0] + right * p[y0 + 1, x0 + 1]
    return ((1 - down) * top + down * bottom).round().astype(np.uint8)


def _with_a_ball(after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The right edit, and a ball that nobody asked for, on the side where there is more room."""
    height, width = mask.shape
    columns = np.flatnonzero(mask.any(0))
    middle = columns[0] / 2 if columns[0] > width - columns[-1] else (columns[-1] + width) / 2
    radius = 0.07 * width
    picture = Image.fromarray(after.copy())
    draw = ImageDraw.Draw(picture)
    for size, colour in ((1.0, (168, 60, 24)), (0.8, (214, 92, 36)), (0.4, (240, 150, 84))):
        x, y = middle - (1 - size) * 0.4 * radius, 0.72 * height - (1 - size) * 0.4 * radius
        draw.ellipse((x - size * radius, y - size * radius, x + size * radius, y + size * radius), fill=colour)
    return np.asarray(picture)
