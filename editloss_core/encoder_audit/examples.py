"""What an encoder is shown in an audit: the after picture of a pair, harmless copies of it, and failures made from the pair."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur, dilate, estimate_mask
from ..negatives import SAME_PIXEL, OverlaySettings, make_overlays
from ..pairs import PairSet
from ..pairs.geometry import find_crop

FAINT = OverlaySettings(kinds=("old_over_new",), opacity=(0.25, 0.25), min_visible=0.25)
MOVED = (
    1 / 256
)  # of the window's longer side, at least a pixel: an encoder that scales pictures down sees it move by that much
BENDS = {"bent slightly": 0.04, "bent": 0.08}  # amplitude as a share of the edit region's size
SCALES = {"20 % wider": (1.2, 1.0), "20 % lower": (1.0, 0.8)}  # along x, along y


@dataclass(frozen=True)
class Examples:
    """Pictures of one pair in the window around its edit, as a trainer shows them to an encoder.

    Attributes:
        pair: its name.
        after, before: ``[h, w, 3]``, 8 bits like everything here: what a file holds.
        benign: change → copy of *after* that a person would call the same.
        failures: failure → construction → picture: ``"no edit"``, ``"overlay"`` and ``"distorted"``; without the last where
            *after* has nothing in the edit region that could be bent.
        negatives: failure → the constructions that the loss itself is given as negatives.
        mask: ``[h, w]`` in 0…1, the edit region.
        notes: what was left out, in words.
    """

    pair: str
    after: Tensor
    before: Tensor
    benign: Mapping[str, Tensor]
    failures: Mapping[str, Mapping[str, Tensor]]
    negatives: Mapping[str, tuple[str, ...]]
    mask: Tensor
    notes: tuple[str, ...] = ()


@torch.no_grad()
def make_examples(pairs: PairSet, index: int, crop: int) -> Examples:
    """The pictures of one pair, the same in every call.

    Args:
        pairs: where it is from.
        index: its place there.
        crop: largest side of the window around the edit in pixels, a multiple of 16; 0 for the whole picture.

    Raises:
        ValueError: the pair cannot be used: a file cannot be read, or nothing visible was edited.
    """
    loaded = pairs.load(index)
    before, after = loaded.before[None], loaded.after[None]
    mask = estimate_mask(before, after) if loaded.mask is None else loaded.mask[None]
    if float(mask.max()) < 0.5:
        raise ValueError("before and after show no difference from which an edit region could be estimated")
    window = find_crop(mask[0], (mask.shape[1], mask.shape[2]), crop)
    before, after, mask = (window(x.movedim(-1, -3)) for x in (before, after, mask[..., None]))
    before, after, mask = before.movedim(1, -1), after.movedim(1, -1), mask[:, 0]

    usual = make_overlays(before, after, mask, indices=[index])
    faint = make_overlays(before, after, mask, settings=FAINT, indices=[index])
    kinds = usual.kinds
    overlays = dict(zip((*kinds, "old_over_new at 25 %"), (*usual.images, *faint.images)))
    unchanged = {
        "before": before[0],
        "before, JPEG 70": _jpeg(before[0]),
        "before, 10 % changed": torch.lerp(before, after, 0.1 * mask[..., None])[0],
    }
    failures = {"no edit": unchanged, "overlay": overlays}
    bent = distortions(after, mask)
    visible = {name: (x - after).abs().mean(-1)[mask > 0.5].mean().item() > SAME_PIXEL for name, x in bent.items()}
    notes = []
    if all(visible.values()):
        failures["distorted"] = {name: x[0] for name, x in bent.items()}
    else:
        notes.append("the after picture has too little structure in the edit region to show a distortion")
    pixels = max(1, round(MOVED * max(mask.shape[1:])))
    shifted = F.pad(after.movedim(-1, 1), (pixels, 0, pixels, 0), mode="replicate")[..., :-pixels, :-pixels]
    benign = {
        "JPEG 70": _jpeg(after[0]),
        "slight blur": blur(after.movedim(-1, 1), 0.7, 2).movedim(1, -1)[0],
        "5 % brighter": after[0] * 1.05,
        "5 % darker": after[0] * 0.95,
        f"moved by {pixels} px": shifted[0].movedim(0, -1),
    }
    return Examples(
        pairs[index].name,
        _8bit(after[0]),
        _8bit(before[0]),
        {name: _8bit(x) for name, x in benign.items()},
        {failure: {name: _8bit(x) for name, x in made.items()} for failure, made in failures.items()},
        {"no edit": ("before",), "overlay": kinds},
        mask[0],
        tuple(notes),
    )


def distortions(after: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Misshapen copies of a picture: bent in waves, and scaled along one side, only in and next to the edit region.

    Args:
        after: ``[1, H, W, 3]``.
        mask: ``[1, H, W]``, which reaches 0.5.

    Returns:
        Name → ``[1, H, W, 3]``. A pixel p comes from p + w(p) · u(p): u moves by a smooth field, w is 1 in the region and
        falls to 0 around it, so that nothing is cut off.
    """
    height, width = mask.shape[1:]
    rows, columns = ((mask[0] >= 0.5).any(dim).nonzero()[:, 0] for dim in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    tall, wide = bottom - top, right - left
    size = math.sqrt(tall * wide)
    reach = min(max(2, round(0.08 * size)), min(height, width) - 1)
    weight = blur(dilate(mask[:, None] >= 0.5, reach).float(), reach / 2, reach)[0, 0]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    v, u = (y - top) / tall, (x - left) / wide
    fields = {}
    for name, share in BENDS.items():  # 1.5 waves over the region; below 0.1 nothing folds over
        waves = (torch.sin(3 * math.pi * v + 0.6), torch.sin(3 * math.pi * u))
        fields[name] = tuple(share * size * wave for wave in waves)
    for name, (along_x, along_y) in SCALES.items():  # about the middle of the ground that a thing stands on
        fields[name] = ((x - (left + right) / 2) * (1 / along_x - 1), (y - bottom) * (1 / along_y - 1))
    result = {}
    for name, (dx, dy) in fields.items():
        places = torch.stack([2 * (x + weight * dx) / width - 1, 2 * (y + weight * dy) / height - 1], -1)
        moved = F.grid_sample(
            after.movedim(-1, 1), places[None].to(after), mode="bicubic", padding_mode="border", align_corners=False
        )
        result[name] = moved.clamp(0, 1).movedim(1, -1)
    return result


def _jpeg(picture: Tensor, quality: int = 70) -> Tensor:
    """``[h, w, 3]`` through JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(_8bit(picture).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).float() / 255.0


def _8bit(picture: Tensor) -> Tensor:
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
