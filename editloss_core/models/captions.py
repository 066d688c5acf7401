"""Captions as a model takes them, one object per pair, encoded once and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence, Union, cast

import torch
from torch import Tensor

from ..cache import TensorCache
from ..hashing import hash_tensors
from ..pairs import PairSet
from ..progress import Progress
from .base import EditModel

CAPTION_METHOD = "1"  # part of every key: count up when captions come to be encoded in another way

Pairs = Union[PairSet, tuple[()]]  # perhaps none


def encode_captions(
    model: EditModel,
    sets: Sequence[Pairs],
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
    distinct, shared = distinct_captions(model, sets)
    keys = [_key(model, asked, fingerprint) for asked in distinct]
    found = {key: cache.get("captions", key) for key in keys}
    todo = [(key, asked) for key, asked in zip(keys, distinct) if found[key] is None]
    pipeline = load() if todo else None
    for done, (key, asked) in enumerate(todo, 1):
        with torch.no_grad():
            tensors = model.encode(pipeline, asked.caption, *asked.pictures())
        if not all(bool(x.isfinite().all()) for x in tensors.values()):
            raise ValueError(
                f"caption: expected finite embeddings, got NaN or infinity for {asked.caption!r}; a T5 needs bfloat16 or float32"
            )
        found[key] = cache.put("captions", key, tensors)
        if progress is not None:
            progress(done, len(todo))
    made = {key: model.caption(entry.tensors) for key, entry in found.items() if entry is not None}
    return [[made[keys[i]] for i in own] for own in shared]


@dataclass(frozen=True)
class Asked:
    """A caption to encode: of the pair with this number in its set.

    Attributes:
        content: of the before picture, where the model reads it; else empty.
    """

    caption: str
    content: str
    pairs: PairSet
    index: int

    def pictures(self) -> tuple[Any, ...]:
        """The before picture ``[H, W, 3]`` and further references where the model reads them, else None alone."""
        if not self.content:
            return (None,)
        images = self.pairs.load_checked(self.index)
        return images.before, *images.references


def check_references(model: EditModel, sets: Sequence[PairSet]) -> None:
    """ValueError if a pair has more references than the model looks at."""
    most, at = max((1 + len(pair.references), pair.name) for pairs in sets for pair in pairs)
    if most > model.references:
        raise ValueError(
            f"pairs: {model.title} looks at {model.references} picture{'s' * (model.references > 1)} for a sample at the most, "
            f"{at!r} has {most} (before, before_2 …)"
        )


def distinct_captions(model: EditModel, sets: Sequence[Pairs]) -> tuple[list[Asked], list[list[int]]]:
    """(what there is to encode, each once; for each pair of each set which of them is its own).

    Pairs whose captions are equal, and whose before pictures are where the model reads them, share one.
    """
    numbers: dict[tuple[str, str], int] = {}
    distinct: list[Asked] = []
    shared: list[list[int]] = []
    for pairs in sets:
        shared.append([])
        for i, pair in enumerate(pairs):
            own = cast(PairSet, pairs)  # an empty tuple has no pair
            asked = Asked(pair.caption, own.fingerprint(i) if model.reads_picture else "", own, i)
            number = numbers.setdefault((asked.caption, asked.content), len(distinct))
            if number == len(distinct):
                distinct.append(asked)
            shared[-1].append(number)
    return distinct, shared


class Captions(NamedTuple):
    """What a run tells the model, one object per pair of each set of :func:`caption_sets`.

    Attributes:
        own: of the pairs to train on.
        dropped: of the same with empty captions, or none.
        watched: of the held-out pairs.
        away: what the first of these are guided away from in pictures, or none.
    """

    own: list[Any]
    dropped: list[Any]
    watched: list[Any]
    away: list[Any]


def caption_sets(
    pairs: PairSet, held_out: Optional[PairSet], dropout: float, sampled: int, cfg: float
) -> tuple[Pairs, Pairs, Pairs, Pairs]:
    """The pairs whose captions a run needs, as :class:`Captions` has them.

    Args:
        dropout: chance of an empty caption in training.
        sampled: held-out pairs of which pictures are made.
        cfg: scale of classifier-free guidance in these pictures, 1 = none. Its negative is an empty caption.
    """
    away: Pairs = ()
    if held_out is not None and cfg != 1.0 and sampled:
        away = _without_words(held_out.subset(range(min(sampled, len(held_out)))))
    return pairs, _without_words(pairs) if dropout else (), held_out or (), away


def _without_words(pairs: PairSet) -> PairSet:
    """With empty captions; a model that reads the before picture sees it still."""
    return replace(pairs, pairs=tuple(replace(pair, caption="") for pair in pairs))


def same_words(words: Mapping[str, Tensor]) -> list[str]:
    """A note where different captions are the same to the model: caption → what its text encoder made of it."""
    groups: dict[str, list[str]] = {}
    for caption, made in words.items():
        groups.setdefault(hash_tensors([("words", made)]), []).append(caption)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    shown = "; ".join(" = ".join(f"“{_short(caption)}”" for caption in group[:3]) for group in alike[:3])
    return [
        f"captions: {sum(map(len, alike))} different ones are only {len(alike)} to the model, as its text encoder does not know "
        f"what they differ in: {shown}. Write them in words that it knows, as a rule English"
    ]


def _short(caption: str) -> str:
    return caption if len(caption) <= 40 else f"{caption[:39]}…"


def _key(model: EditModel, asked: Asked, fingerprint: str) -> str:
    seen = [asked.content, model.parts.pipeline] if asked.content else []  # one text encoder, and another template
    return hash_tensors([], CAPTION_METHOD, fingerprint, str(model.text_tokens), asked.caption, *seen)
