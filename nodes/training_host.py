"""ComfyUI around the core's trainer: progress, previews, the cancel button, and whose weights are on the device when."""

from __future__ import annotations

import time
from typing import Any, Optional, Sequence

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor

from ..editloss_core.diagnostics import compare, curves
from ..editloss_core.training.log import RunLog, StepLog, ValidationLog
from ..editloss_core.training.trainer import Host
from ..editloss_core.training.validation import PreviewRow
from .comfy_denoiser import ComfyDenoiser

PREVIEW_SECONDS = 5.0  # between two pictures of the curves
PREVIEW_SIZE = 1024


class ComfyHost(Host):
    """Reports to the node that runs, and obeys its cancel button.

    Args:
        denoiser: the model that is trained.
        decoders: patchers of the decoders that take part in a step, which have to stay on the device with the model.
        preview_guidance: what a guidance-distilled model is told while pictures are sampled.
        reserve: bytes of the device to leave free for a step's activations; weights that do not fit beside them wait in
            main memory.
    """

    def __init__(
        self, denoiser: ComfyDenoiser, decoders: Sequence[Any], preview_guidance: Optional[float], reserve: int
    ):
        self.denoiser, self.decoders, self.preview_guidance = denoiser, list(decoders), preview_guidance
        self.training_guidance, self.reserve = denoiser.guidance, reserve
        self.log = RunLog()
        self._bar: Optional[ProgressBar] = None
        self._shown = time.monotonic()

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def before_step(self) -> None:
        self.denoiser.guidance = self.training_guidance
        self.denoiser.load(self.decoders, self.reserve)

    def before_pictures(self) -> None:
        self.denoiser.guidance = self.preview_guidance

    def on_step(self, log: StepLog, total: int) -> None:
        if self._bar is None:
            self._bar = ProgressBar(total)
        self.log.add(log)
        picture = None
        if time.monotonic() - self._shown > PREVIEW_SECONDS:
            picture = curves.live(self.log)
        self._show(log.step, total, picture)

    def on_validation(self, log: Optional[ValidationLog], pictures: Sequence[PreviewRow]) -> None:
        self.denoiser.guidance = self.training_guidance
        if log is not None:
            self.log.add(log)
        if pictures and self._bar is not None:
            self._show(log.step, self._bar.total, compare.grid(pictures)[0])

    def _show(self, step: int, total: int, picture: Optional[Tensor]) -> None:
        preview = None
        if picture is not None:
            self._shown = time.monotonic()
            preview = ("JPEG", to_pil(picture), PREVIEW_SIZE)
        self._bar.update_absolute(step, total, preview)


def to_pil(picture: Tensor) -> Image.Image:
    """``[H, W, 3]`` in 0…1 → an 8-bit picture."""
    return Image.fromarray((picture.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def step_memory(model, latents: Sequence[int], checkpointing: bool) -> int:
    """Bytes that a training step takes beside the weights, roughly.

    ComfyUI's own estimate for a forward pass over picture and reference, three times with gradient checkpointing (one
    block with its gradients, and every block's input), eight times without, and a GiB for the LoRA and its optimiser.

    Args:
        model: ComfyUI MODEL.
        latents: the largest batch's shape ``[B, C, h, w]``.
    """
    batch, channels, height, width = latents
    forward = model.model.memory_required([batch, channels, 2 * height, width])
    return int(forward * (3 if checkpointing else 8)) + (1 << 30)
