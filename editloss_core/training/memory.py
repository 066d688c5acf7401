"""Advice for a run that does not fit: what to change, and by about how much it helps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping, Optional

import torch

GIB = 1 << 30


class OutOfMemory(RuntimeError):
    """The device's memory was not enough; the message is advice, and the last checkpoint is safe."""


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
    objective_every: int,
    blocks: int,
    settings: Mapping[str, object],
) -> str:
    """What would help, most effective first.

    Activations of a transformer are proportional to batch and tokens, so to the area of the picture; those of a decoder
    to the area of the crop. Checkpointing keeps one block's activations and each block's input, roughly
    (1 + blocks / 17) / blocks of all (a block of width d keeps about 17 d values per token beside its input: qkv 3,
    normalised input 2, attention 1, MLP 4 + 4, and 3 in the residual and gates). The shares are this arithmetic, not
    measurements.

    Args:
        memory: of the step that failed.
        tokens: of one sample, references included.
        batch_size: samples per pass.
        checkpointing: whether blocks are checkpointed already.
        crop: (height, width) that is decoded for image encoders, None if nothing is decoded.
        objective_every: as in the settings.
        blocks: of the network.
        settings: further settings to name, for example ``{"resolution": 1024}``.
    """
    in_objective, training = memory.current == "objective", memory.current != "validation"
    lines = []
    if not training:  # which has no gradients, so that only the size of the pictures counts
        lines.append("no preview pictures: they are decoded whole, the losses of a validation by crop")
    if training and not checkpointing and blocks:
        share = (1 + blocks / 17) / blocks
        lines.append(f"turn gradient checkpointing on: the model's activations fall to about {share:.0%}")
    if training and batch_size > 1:
        lines.append(
            f"batch size {batch_size} → 1 with accumulation {batch_size}: activations fall to about {1 / batch_size:.0%}, "
            "the gradient stays the same"
        )
    if training and crop is not None:
        height, width = crop
        smaller = max(64, min(height, width) * 3 // 4 // 16 * 16)
        if smaller < min(height, width):
            share = smaller**2 / (height * width)
            lines.append(f"crop {height}×{width} → {smaller}: decoding and encoders fall to about {share:.0%}")
        if in_objective:
            lines.append("connect a small decoder (a TAEF1 VAE), whose activations are a fraction of the full VAE's")
    resolution = settings.get("resolution")
    if isinstance(resolution, int) and resolution > 256:
        smaller = max(256, resolution * 3 // 4 // 64 * 64)
        lines.append(
            f"resolution {resolution} → {smaller}: activations fall to about {(smaller / resolution) ** 2:.0%}"
        )
    if training and crop is not None and objective_every == 1:
        lines.append("objective every N steps saves time, not memory: its steps need as much as now")
    if memory.device.type == "cuda":
        lines.append("leave more of the device free for a step, and let weights that do not fit wait in main memory")
    sizes = ", ".join(f"{stage} {size / GIB:.1f} GiB" for stage, size in memory.stages.items() if size > 0)
    where = {"model": "in the model", "objective": "in the objective (decoder, encoders, losses)"}.get(
        memory.current, f"during {memory.current or 'the step'}"
    )
    text = f"Out of memory {where}, at {tokens} tokens a sample and batch size {batch_size}."
    if sizes:
        text += f" Held by then: {sizes}."
    if lines:
        text += " What would help, in this order:\n" + "\n".join(f"- {line}" for line in lines)
    else:
        text += " Everything that saves activations is on; a quantised (fp8) model or a smaller rank is what is left."
    return text
