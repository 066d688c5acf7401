"""Captions as CONDITIONING, one object per pair, encoded once; those that see a picture are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Sequence

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from ...editloss_core.cache import Entry, TensorCache
from ...editloss_core.hashing import hash_tensors
from ...editloss_core.models.base import EditModel
from ...editloss_core.models.captions import Asked, Pairs, distinct_captions
from .denoiser import ComfyDenoiser
from .loading import fingerprint
from .offers import drop_inference_buffers, program

METHOD = "ComfyUI 1"  # part of every key: count up when captions come to be encoded in another way
CONTEXT, EXTRA, NOTHING = "context", "extra.", "nothing"


def conditioning(
    clip, sets: Sequence[Pairs], denoiser: ComfyDenoiser, cache_folder: Optional[Path] = None
) -> list[list[Any]]:
    """CONDITIONING on the CPU for each pair of each set; the first one that the model cannot take is refused.

    What a text encoder makes of a picture takes a thousand tokens, and another picture makes another: those are looked up in
    the cache, under the contents of picture, caption and text encoder. To read captions alone takes less time than to
    hash the text encoder.

    Args:
        clip: ComfyUI CLIP.
        sets: of pairs, such as those to train on and those to watch.
        denoiser: takes them.
        cache_folder: None keeps nothing.
    """
    drop_inference_buffers()
    edit_model = denoiser.edit_model
    distinct, shared = distinct_captions(edit_model, sets)
    own = _fingerprint(clip) if edit_model.reads_picture and cache_folder is not None else None
    cache = TensorCache(None if own is None else cache_folder)
    made, bar = [], ProgressBar(len(distinct))
    for asked in distinct:
        comfy.model_management.throw_exception_if_processing_interrupted()
        key = _key(edit_model, asked, own or "")
        entry = cache.get("captions", key)
        item = _encoded(clip, edit_model, asked) if entry is None else _item(entry)
        denoiser.check(item)
        if entry is None and _can_be_kept(item):
            (context, extra), *_ = item
            tensors = {f"{EXTRA}{name}": value for name, value in extra.items() if value is not None}
            about = {NOTHING: [name for name, value in extra.items() if value is None]}
            cache.put("captions", key, {CONTEXT: context, **tensors}, about)
        made.append(item)
        bar.update(1)
    return [[made[i] for i in own_ones] for own_ones in shared]


def _encoded(clip, edit_model: EditModel, asked: Asked) -> list[Any]:
    with torch.no_grad():
        entries = clip.encode_from_tokens_scheduled(edit_model.tokenize(clip, asked.caption, *asked.pictures()))
    return [[_own(context), {name: _own(value) for name, value in extra.items()}] for context, extra in entries]


def _own(value):
    """A copy that training may keep for its backward pass; what nodes make are inference tensors."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _can_be_kept(item: list[Any]) -> bool:
    """Whether all of it is tensors and nothings, of one prompt."""
    return len(item) == 1 and all(value is None or isinstance(value, Tensor) for value in item[0][1].values())


def _item(entry: Entry) -> list[Any]:
    extra: dict[str, Any] = dict.fromkeys(entry.about[NOTHING])
    extra |= {name.removeprefix(EXTRA): value for name, value in entry.tensors.items() if name.startswith(EXTRA)}
    return [[entry.tensors[CONTEXT], extra]]


def _fingerprint(clip) -> Optional[str]:
    """Of all that makes a caption's features; None while LoRAs are on the weights, of this CLIP's or of another's."""
    patcher, module = clip.patcher, clip.cond_stage_model
    if patcher.patches or getattr(module, "current_weight_patches_uuid", None) not in (None, patcher.patches_uuid):
        return None
    return fingerprint(module, type(module).__qualname__, type(clip.tokenizer).__qualname__, program())


def _key(edit_model: EditModel, asked: Asked, own: str) -> str:
    return hash_tensors([], METHOD, edit_model.id, own, asked.caption, asked.content)
