"""diffusers' transformers as denoisers: what is the same for every edit model."""

from __future__ import annotations

import copy
from importlib import metadata
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor

from .base import EditModel


class DiffusersDenoiser:
    """Velocity of a transformer that diffusers has loaded, with the before picture as the model's reference.

    The base's weights are frozen for good.

    Args:
        edit_model: of the transformer.
        transformer: of diffusers, on its device, in the dtype that it computes in.
        guidance: what a guidance-distilled model is told; None takes the model's own for training.
        checkpointing: keep each block's inputs only and compute the blocks again in the backward pass.
        device: where inputs go; None: where the weights are.
    """

    def __init__(
        self,
        edit_model: EditModel,
        transformer: Any,
        guidance: Optional[float] = None,
        checkpointing: bool = True,
        device: Optional[torch.device] = None,
    ):
        transformer.requires_grad_(False).eval()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        self.edit_model, self.module, self.checkpointing = edit_model, transformer, checkpointing
        self.guidance = edit_model.guidance if guidance is None else guidance
        self.device = torch.device(device) if device is not None else next(transformer.parameters()).device
        self.dtype = transformer.dtype
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    @property
    def program(self) -> str:
        """What the self-check names."""
        return f"diffusers {metadata.version('diffusers')}, torch {torch.__version__}"

    def told(self, guidance: Optional[float]) -> DiffusersDenoiser:
        """The same transformer, told another guidance; None: the model's own for pictures."""
        other = copy.copy(self)
        other.guidance = self.edit_model.preview_guidance if guidance is None else guidance
        return other

    def stock_velocity(self, x: Tensor, t: Tensor, reference: Tensor, caption: Any) -> Tensor:
        """What the pipeline's own sampling path computes, see :meth:`~.base.EditModel.stock_velocity`.

        Args:
            x: ``[B, C, h, w]``, like ``reference``.
            t: ``[B]``, one noise level above 0.
        """
        return self.edit_model.stock_velocity(self, x, t, reference, caption)

    def __call__(self, x_t: Tensor, t: Tensor, references: Sequence[Tensor], conditioning: Sequence[Any]) -> Tensor:
        """As in :class:`~.base.Denoiser`.

        Raises:
            ValueError: no reference or more than the model takes, a batch that does not fit together, latents with odd sides.
        """
        most = self.edit_model.references
        if not 1 <= len(references) <= most:
            wanted = "one" if most == 1 else f"1 to {most}"
            raise ValueError(
                f"references: expected {wanted}, as {self.edit_model.parts.pipeline} takes it for a sample, got {len(references)}"
            )
        counts = [len(reference) for reference in references]
        if {len(x_t), len(t), *counts, len(conditioning)} != {len(x_t)}:
            found = counts[0] if len(counts) == 1 else counts
            raise ValueError(
                f"x_t: expected one t, reference and conditioning for each of {len(x_t)} latents, got {len(t)}, "
                f"{found} and {len(conditioning)}"
            )
        return self.edit_model.velocity(self, x_t, t, references, conditioning).float()

    def kept(self, make: Callable[..., Tensor], *sizes: int) -> Tensor:
        """``make(*sizes)`` on the model's device, fractions in its dtype, made once for these sizes."""
        key = (make, *sizes)
        if key not in self._kept:
            made = make(*sizes)
            self._kept[key] = made.to(self.device, self.dtype if made.is_floating_point() else made.dtype)
        return self._kept[key]
