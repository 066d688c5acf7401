"""Pictures of held-out pairs, as a run keeps them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from ..files import make_folder, replacing
from .log import PictureLog

PICTURE_FOLDER = "pictures"  # of a run


@dataclass(frozen=True)
class PreviewRow:
    """One held-out pair as pictures ``[H, W, 3]`` in 0…1 on the CPU.

    Attributes:
        mask: ``[H, W]``, of the edit, or None.
        caption: the instruction.
        signals: "base" and "lora" → what the objective says about that output, whatever the gates: ``{"says": the failure
            it points to or None, "terms": {name: {"raw": loss, "toward_failure": share or None}}}``, without "says" where no
            term answers a failure. Empty without an objective.
    """

    pair: str
    before: Tensor
    base: Tensor
    lora: Tensor
    after: Tensor
    mask: Optional[Tensor] = None
    caption: str = ""
    signals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def save_pictures(folder: Path, rows: Sequence[PreviewRow]) -> tuple[PictureLog, ...]:
    """Keep pictures as lossless files below a run's folder.

    A name ends in the hash of what is in the file: what is the same at every validation is written once, nothing is ever
    written over, and a run that was interrupted and resumed names its files as one that was not.
    """
    if not rows:
        return ()
    place = folder / PICTURE_FOLDER
    make_folder(place)
    kept = []
    for row in rows:
        parts = {part: getattr(row, part) for part in ("before", "base", "lora", "after", "mask")}
        files = {part: _keep(place, row.pair, part, p) for part, p in parts.items() if p is not None}
        kept.append(PictureLog(row.pair, row.caption, files, row.signals))
    return tuple(kept)


def _keep(place: Path, pair: str, part: str, picture: Tensor) -> str:
    from PIL import Image

    values = (
        (picture.detach().cpu().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
    )
    content = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9]+", "_", pair).strip("_")[:40] or "pair"
    path = place / f"{readable}-{part}-{content}.png"
    if not path.exists():
        with replacing(path) as temporary:
            Image.fromarray(values).save(temporary, "PNG")
    return path.name
