"""Captions as a model takes them, one object per pair, encoded once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch

from ..cache import TensorCache
from ..hashing import hash_tensors
from ..pairs import PairSet
from ..progress import Progress
from .base import EditModel

CAPTION_METHOD = "1"  # part of every key: count up when captions come to be encoded in another way


def encode_captions(
    model: EditModel,
    sets: Sequence[PairSet],
    load: Callable[[], Any],
    fingerprint: str,
    cache_folder: Optional[Path] = None,
    progress: Optional[Progress] = None,
) -> list[list[Any]]:
    """What the model takes for each pair of each set, from the cache where it is there, on the CPU; nothing is loaded if all are.

    Pairs whose captions are equal, and whose before pictures are where the model reads them, share one object.

    Args:
        model: whose captions they are.
        sets: of pairs, such as those to train on and those to watch; text encoders are loaded once for all.
        load: gives diffusers' pipeline with text encoders and tokenizers, on the device where they run. It is let go before
            this returns: nobody needs text encoders after it.
        fingerprint: of the text encoders and tokenizers.
        cache_folder: as in :func:`~editloss_core.training.prepare.prepare`.
        progress: called with (done, total) captions that are not in the cache.

    Raises:
        ValueError: embeddings that are not finite.
    """
    cache = TensorCache(cache_folder)
    keys = [[_key(model, pairs, i, fingerprint) for i in range(len(pairs))] for pairs in sets]
    where: dict[str, tuple[PairSet, int]] = {}  # key → the first pair that has it
    for pairs, own in zip(sets, keys):
        for i, key in enumerate(own):
            where.setdefault(key, (pairs, i))
    found = {key: cache.get("captions", key) for key in where}
    todo = [key for key, entry in found.items() if entry is None]
    pipeline = load() if todo else None
    for done, key in enumerate(todo, 1):
        pairs, i = where[key]
        text = pairs[i].caption
        before = pairs.load(i).before if model.reads_picture else None
        with torch.no_grad():
            tensors = model.encode(pipeline, text, before)
        if not all(bool(x.isfinite().all()) for x in tensors.values()):
            raise ValueError(
                f"caption: expected finite embeddings, got NaN or infinity for {text!r}; a T5 needs bfloat16 or float32"
            )
        found[key] = cache.put("captions", key, tensors)
        if progress is not None:
            progress(done, len(todo))
    made = {key: model.caption(entry.tensors) for key, entry in found.items() if entry is not None}
    return [[made[key] for key in own] for own in keys]


def _key(model: EditModel, pairs: PairSet, index: int, fingerprint: str) -> str:
    seen = [pairs.fingerprint(index)] if model.reads_picture else []
    return hash_tensors([], CAPTION_METHOD, fingerprint, str(model.text_tokens), pairs[index].caption, *seen)
