"""ComfyUI around the core's trainer: progress, previews, the cancel button, and whose weights are on the device when."""

from __future__ import annotations

import time
from typing import Any, Optional, Sequence

import comfy.model_base
import comfy.model_management
import torch
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor

from ...editloss_core.drawing import grid
from ...editloss_core.run_report import curves
from ...editloss_core.runs.log import RunLog, StepLog, ValidationLog
from ...editloss_core.runs.pictures import PreviewRow
from ...editloss_core.training.estimate import HALO
from ...editloss_core.training.host import Host
from ...editloss_core.training.prepare import Prepared
from .denoiser import ComfyDenoiser
from .frames import memory_to_decode

PREVIEW_SECONDS = 5.0  # between two pictures of the curves
PREVIEW_SIZE = 1024
GIB = 1 << 30


class ComfyHost(Host):
    """Reports to the node that runs, and obeys its cancel button.

    Args:
        denoiser: the model that is trained.
        patchers: of decoder and encoders that take part in a step, which have to stay on the device with the model.
        reserve: bytes of the device to leave free for a step's activations; weights that do not fit beside them wait in
            main memory.
        steps: of the whole run.
    """

    def __init__(
        self,
        denoiser: ComfyDenoiser,
        patchers: Sequence[Any],
        reserve: int,
        steps: int,
    ):
        self.denoiser, self.patchers, self.reserve = denoiser, list(patchers), reserve
        self.log = RunLog()
        self._bar = ProgressBar(steps)
        self._held_out: Optional[Image.Image] = None  # as they were at the last validation
        self._shown = time.monotonic()

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def before_step(self) -> None:
        self.denoiser.load(self.patchers, self.reserve)

    def on_step(self, log: StepLog, total: int) -> None:
        self.log.add(log)
        self._show(log.step, time.monotonic() - self._shown > PREVIEW_SECONDS)

    def on_validation(self, log: Optional[ValidationLog], pictures: Sequence[PreviewRow]) -> None:
        if log is not None:
            self.log.add(log)
        if pictures:
            self._held_out = to_pil(grid.grid(pictures)[0])
            self._show(self.log.validations[-1].step if self.log.validations else 0, True)

    def _show(self, step: int, with_picture: bool) -> None:
        preview = None
        if with_picture:
            self._shown = time.monotonic()
            preview = ("JPEG", self._picture(), PREVIEW_SIZE)
        self._bar.update_absolute(step, self._bar.total, preview)

    def _picture(self) -> Image.Image:
        """The curves, and below them the held-out pairs of the last validation."""
        if self._held_out is None:
            return to_pil(curves.live(self.log))
        if not self.log.steps:
            return self._held_out
        width = self._held_out.width
        above = to_pil(curves.live(self.log, width, width * 3 // 8))
        page = Image.new("RGB", (width, above.height + self._held_out.height), "white")
        page.paste(above, (0, 0))
        page.paste(self._held_out, (0, above.height))
        return page


def to_pil(picture: Tensor) -> Image.Image:
    """``[H, W, 3]`` in 0…1 → an 8-bit picture."""
    return Image.fromarray((picture.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def step_memory(
    model, train: Prepared, batch_size: int, checkpointing: bool, decoder: Optional[Any], encoders: Sequence[Any]
) -> int:
    """Bytes that a training step takes beside the weights, roughly: a guess built on ComfyUI's estimates for inference.

    The larger one of two moments, and a GiB for the LoRA and its optimiser:

    * the backward pass of the model: ComfyUI's estimate of a forward pass over picture and reference, three times with
      gradient checkpointing (one block with its gradients, and every block's input), eight times without;
    * that of the objective, when the model holds what it will need (once the estimate with checkpointing, else eight times)
      and either the decoder or one encoder is computed again: three times ComfyUI's estimate for decoding one crop, for
      the blocks of the decoder are checkpointed (its estimate is of the large VAE; what TAEF1 keeps beside an encoder is a
      fraction of it); eight times its estimate for a diffusion model; and for other encoders, of which it has none, twice
      their weights per picture. A vision transformer keeps about 17 · width · tokens · depth values and has
      12 · width² · depth weights: 0.4 times its weights for ViT-L/14 at 224 pixels, 2.5 times for DINOv2 ViT-B/14 at 518.

    The factors three, eight and two are not measured.

    Args:
        model: ComfyUI MODEL.
        train: the pairs, prepared.
        decoder: ComfyUI VAE that decodes crops in a step, if one does.
        encoders: patchers of the networks of the objective's encoders.
    """
    shapes = [train.after([i]).shape for i in range(len(train))]
    channels = shapes[0][1]
    height, width = max((shape[2:] for shape in shapes), key=lambda size: size[0] * size[1])
    seen = 2 + max(len(pair.references) for pair in train.pairs)  # the picture and its references
    forward = model.model.memory_required([batch_size, channels, seen * height, width])
    objective = 0.0
    if decoder is not None:
        windows = [
            [min(side // train.downscale + 2 * HALO, whole) for side, whole in zip(crop[2:4], shape[2:])]
            for crop, shape in zip(train.crops, shapes)
        ]
        window = max(windows, key=lambda size: size[0] * size[1])
        objective = 3 * memory_to_decode(decoder, 1, *window)
    for patcher in encoders:
        if isinstance(patcher.model, comfy.model_base.BaseModel):
            needed = 8 * patcher.model.memory_required([batch_size, channels, height, width])
        else:
            needed = 2 * batch_size * patcher.model_size()
        objective = max(objective, needed)
    own, held = (3, 1) if checkpointing else (8, 8)
    return int(max(own * forward, held * forward + objective)) + GIB
