"""Negatives that the model makes itself: outputs of the LoRA on training pairs which the judge fails.

A before picture and a pasted overlay are failures that somebody thought of. What the LoRA gets wrong now is the negative for
what it learns next: now and then it samples the pairs of a batch, the verdict on each output decides, and what is not good
stands in the role hard_negative beside gt and src of its pair.

SPIN-Diffusion (Yuan et al. 2024, https://arxiv.org/abs/2402.10210) plays the data against all samples of an earlier model;
DiffusionNFT (Zheng et al. 2025, https://arxiv.org/abs/2509.16117) parts the samples by a reward and contrasts good with bad
ones in the velocity. Here they are parted by the judge, and what is contrasted are embeddings, by whatever term reads them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Callable, ContextManager, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ..encoders.base import Encoder
from ..files import read_safetensors
from ..hard_negatives import TENSOR, HardNegativeBuffer, dequantize_image, image_key, quantize_image
from ..hashing import hash_tensors
from ..verdict.judge import FAILURES, judge
from .gradients import NonFinite
from .prepare import Prepared

ROLE = "hard_negative"
FOLDER = "hard_negatives"  # in that of the run


class Judged(NamedTuple):
    """What became of an output.

    Attributes:
        said: the verdict; empty where there is none. An undecided output is no failure to learn from.
        picture: of a failure, uint8 ``[H, W, 3]``.
        score: the largest of the verdict's.
        problem: why there is no verdict.
    """

    said: str
    picture: Optional[Tensor] = None
    score: float = 0.0
    problem: str = ""


def judged(prepared: Prepared, index: int, output: Tensor, where: str) -> Judged:
    """The verdict on an output of a pair ``[H, W, 3]``, as 8 bits show it, beside the pair's own pictures and mask.

    Where a variant of a pair shows what lies beyond its pictures, nothing is learnt and nothing is judged: there the output is
    taken to be the before picture.

    Raises:
        NonFinite: the output is not.
    """
    if not bool(output.isfinite().all()):
        raise NonFinite(f"{where}: the output for the pair {prepared.pairs[index].name!r} has NaN or infinity")
    try:
        images = prepared.pairs.load(index)
    except ValueError as error:  # it was there when the run began
        return Judged("", problem=f"its pictures cannot be read any more ({error})")
    seen = output.detach().float().cpu()
    if images.valid is not None:
        seen = torch.where(images.valid[..., None] > 0.5, seen, images.before)
    picture = quantize_image(seen)
    try:
        verdict = judge(images.before, dequantize_image(picture), images.after, prepared.masks[index])
    except ValueError as error:  # of the pair: an edit of a few pixels, or one that is not to be seen
        return Judged("", problem=str(error))
    if verdict.verdict not in FAILURES:
        return Judged(verdict.verdict)
    return Judged(verdict.verdict, picture, max(s for s in verdict.scores.values() if s is not None))


class OwnFailures:
    """The newest failed outputs of each pair, as embeddings, and all of them as pictures in the run's folder.

    Args:
        prepared: the pairs.
        encoders: by name, of the terms that read the role.
        kept: most per pair that are embeddings.
        most: outputs that a run looks at; so many pictures the folder can hold.
        frozen: a context in which encoders run, see :class:`~editloss_core.training.estimate.EstimateObjective`.
        folder: of the run; None keeps no pictures.
        writes: whether this process writes them.
    """

    def __init__(
        self,
        prepared: Prepared,
        encoders: Mapping[str, Encoder],
        kept: int,
        most: int,
        frozen: Callable[[], ContextManager[None]],
        folder: Optional[Path] = None,
        writes: bool = True,
    ):
        self.prepared, self.encoders, self.kept, self.most, self.frozen = prepared, dict(encoders), kept, most, frozen
        self.folder, self.writes = None if folder is None else folder / FOLDER, writes
        self._contents: dict[int, list[str]] = {}  # of the pictures that are held, the newest first
        self._embeddings: dict[tuple[str, int], Tensor] = {}  # the same

    def hold(self, index: int, found: Judged, step: int) -> None:
        """Keep a failure of a pair that was found in ``step``; one that is held already is not kept twice."""
        if found.picture is None or not self._embed(index, found.picture) or self.folder is None or not self.writes:
            return
        note = f"{found.said} of {self.prepared.pairs[index].name}"
        self._buffer(self.folder).store(self._key(index), found.picture, found.score, note, step)

    def recall(self, step: int) -> None:
        """Hold what the folder has of steps up to ``step``, for a run that goes on from there."""
        if self.folder is None or not self.folder.is_dir():
            return
        numbers = {pair.name: i for i, pair in enumerate(self.prepared.pairs)}
        of_pair: dict[int, list[Path]] = {}
        for entry in self._buffer(self.folder).entries():
            index = numbers.get(entry.note.partition(" of ")[2])
            if index is not None and entry.step is not None and entry.step <= step and entry.key == self._key(index):
                of_pair.setdefault(index, []).append(entry.path)
        for index, paths in of_pair.items():
            for path in paths[-self.kept :]:
                self._embed(index, read_safetensors(path)[TENSOR])

    def forget(self, step: int) -> None:
        """Remove what the folder has of steps after ``step``: a run goes another way from there."""
        if self.folder is not None and self.folder.is_dir():
            self._buffer(self.folder).clear(after=step)

    def embeddings(self, indices: Sequence[int], encoder: str, src: Tensor) -> Tensor:
        """``[B, kept, ...]``: each pair's failures, the newest first and then again; the before picture where there is none.

        Args:
            indices: of the pairs.
            encoder: its name.
            src: embeddings of their before pictures ``[B, ...]``, on the CPU.
        """
        rows = []
        for index, before in zip(indices, src):
            held = self._embeddings.get((encoder, index), before[None])
            rows.append(held[torch.arange(self.kept) % len(held)])
        return torch.stack(rows)

    def _embed(self, index: int, picture: Tensor) -> bool:
        """Whether the picture is new among those that are held; it is held then, in the place of the oldest."""
        content, held = hash_tensors([("", picture)]), self._contents.setdefault(index, [])
        if content in held:
            return False
        held.insert(0, content)
        del held[self.kept :]
        image = dequantize_image(picture)[None]
        for name, encoder in self.encoders.items():
            with self.frozen():
                new = self.prepared.embed(encoder, index, image)
            old = self._embeddings.get((name, index), new[:0])
            self._embeddings[name, index] = torch.cat([new, old])[: self.kept]
        return True

    def _key(self, index: int) -> str:
        return image_key(self.prepared.pairs.load(index).before)

    def _buffer(self, folder: Path) -> HardNegativeBuffer:
        return HardNegativeBuffer(folder, capacity=self.most, per_key=self.most)


def summary(outputs: int, failed: Mapping[str, int]) -> str:
    """How many of the outputs failed, and how."""
    kinds = ", ".join(f"{verdict} {count}" for verdict, count in sorted(failed.items(), key=lambda v: (-v[1], v[0])))
    return f"{sum(failed.values())} of {outputs} outputs failed" + (f": {kinds}" if kinds else "")


def tally(found: Sequence[Judged]) -> dict[str, int]:
    """Failure → how many."""
    return dict(Counter(one.said for one in found if one.picture is not None))
