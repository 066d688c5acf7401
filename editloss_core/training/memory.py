"""Advice for a run that does not fit: what to change, and by about how much it helps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping, Optional

import torch

GIB = 1 << 30


class OutOfMemory(RuntimeError):
    """The device's memory was not enough; the message is advice. What was written until then is whole."""


@dataclass
class StepMemory:
    """What a step has allocated so far, by stage, as far as the device tells.

    Attributes:
        device: CUDA devices count; others do not, and the advice then has no sizes.
        stages: stage → bytes that were still allocated at its end, beyond those at the start of the step.
        current: the stage that runs.
    """

    device: torch.device
    stages: dict[str, int] = field(default_factory=dict)
    current: str = ""
    _start: int = 0

    def begin(self) -> None:
        self.stages.clear()
        self.current = ""
        self._start = self._allocated()

    def enter(self, stage: str) -> None:
        if self.current:
            self.stages[self.current] = self._allocated() - self._start
        self.current = stage

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def advice(
    memory: StepMemory,
    *,
    tokens: int,
    batch_size: int,
    checkpointing: bool,
    crop: Optional[tuple[int, int]],
    blocks: int,
    settings: Mapping[str, object],
) -> str:
    """What would help in the stage that failed, and nothing else; most effective first.

    Activations of a transformer are proportional to batch and tokens, so to the area of the picture; those of a decoder
    to the area of the crop. Checkpointing keeps one block's activations and each block's input, roughly
    (1 + blocks / 17) / blocks of all (a block of width d keeps about 17 d values per token beside its input: qkv 3,
    normalised input 2, attention 1, MLP 4 + 4, and 3 in the residual and gates). At full size TAEF1's decoder is 64
    channels wide and FLUX's 256. The shares are this arithmetic, not measurements.

    Args:
        memory: of the step that failed.
        tokens: of one sample, references included.
        batch_size: samples per pass.
        checkpointing: whether blocks are checkpointed already.
        crop: (height, width) that is decoded for image encoders, None if nothing is decoded.
        blocks: of the network.
        settings: further settings to name, for example ``{"resolution": 1024, "rank": 16, "optimizer": "adamw"}``.
    """
    stage = memory.current
    activations = stage in ("model", "objective", "backward")  # the model's: held from its forward to its backward pass
    helps: list[tuple[float, str]] = []  # (share that is left, what to do)
    if stage == "validation":  # has no gradients, so that only the size of the pictures counts
        helps.append((0.0, "no preview pictures: they are decoded whole, the losses of a validation by crop"))
    if activations and not checkpointing and blocks:
        share = (1 + blocks / 17) / blocks
        helps.append((share, f"turn gradient checkpointing on: the model's activations fall to about {share:.0%}"))
    if activations and batch_size > 1:
        line = f"batch size {batch_size} → 1 with accumulation {batch_size}: activations fall to about"
        helps.append((1 / batch_size, f"{line} {1 / batch_size:.0%}, the gradient stays the same"))
    if stage == "objective" and crop is not None:  # elsewhere what was decoded is gone, or not there yet
        height, width = crop
        smaller = max(64, min(height, width) * 3 // 4 // 16 * 16)
        if smaller < min(height, width):
            share = smaller**2 / (height * width)
            line = f"crop {height}×{width} → {smaller}: decoding and encoders fall to about {share:.0%}"
            helps.append((share, line))
        helps.append((0.25, "connect a small decoder (a TAEF1 VAE): decoding falls to about 25% or less"))
    resolution = settings.get("resolution")
    if stage == "own failures":
        helps.append((0.0, "own_failures_every 0: no outputs of training pairs, which are decoded whole"))
    if (
        (activations or stage in ("validation", "rollout", "own failures"))
        and isinstance(resolution, int)
        and resolution > 256
    ):
        smaller = max(256, resolution * 3 // 4 // 64 * 64)
        share = (smaller / resolution) ** 2
        helps.append((share, f"resolution {resolution} → {smaller}: activations fall to about {share:.0%}"))
    if stage == "optimiser":
        if settings.get("optimizer") in ("adamw", "prodigy"):
            helps.append((0.25, "optimizer adamw8bit: the optimiser's state falls to about 25%"))
        rank = settings.get("rank")
        if isinstance(rank, int) and rank > 1:
            helps.append((0.5, f"rank {rank} → {rank // 2}: weights, gradients and the optimiser's state fall to 50%"))
    if memory.device.type == "cuda":
        line = "in ComfyUI a larger memory_reserve, so that more weights wait in main memory; elsewhere weights of fewer bits"
        helps.append((1.0, line))
    sizes = ", ".join(f"{done} {size / GIB:.1f} GiB" for done, size in memory.stages.items() if size > 0)
    where = {"model": "in the model", "objective": "in the objective (decoder, encoders, losses)"}.get(
        stage, f"during {stage or 'the step'}"
    )
    text = f"Out of memory {where}, at {tokens} tokens a sample and batch size {batch_size}."
    if sizes:
        text += f" Held by then: {sizes}."
    if helps:
        lines = [line for _, line in sorted(helps, key=lambda found: found[0])]
        return text + " What would help, in this order:\n" + "\n".join(f"- {line}" for line in lines)
    left = "Everything that saves activations is on; a" if activations else "A"
    return f"{text} {left} quantised (fp8) model or a smaller rank is what is left."
