"""A VAE as a decoder with gradients."""

from __future__ import annotations

import contextlib
from typing import Callable

import torch
from comfy.taesd.taesd import TAESD
from torch import Tensor

from .encoders import check_vae, idle_blocks
from .frames import decode, downscale, memory_to_decode
from .gradients import checkpointed, differentiable, replaced_forwards, usable
from .loading import load_for_call
from .offers import static_vae


def check_decoder(decoder, vae) -> None:
    """ValueError unless ``decoder`` is a VAE that decodes the latents of ``vae`` to pictures of the same size."""
    check_vae(decoder, "decoder")
    (channels, scale), found = ((v.latent_channels, downscale(v)) for v in (vae, decoder))
    if found != (channels, scale):
        raise ValueError(
            f"decoder: expected one for the latents of the VAE, {channels} channels and {scale} pixels each, got "
            f"{found[0]} channels and {found[1]} pixels"
        )


class VAEDecoder:
    """Latents in a model's space ``[B, C, h, w]`` → pictures ``[B, H, W, 3]`` in 0…1 on the VAE's device, with gradients.

    The numbers are those of ``VAE.decode``. The clamp to 0…1 lets gradients pass, as everywhere in the pack: a value out
    of range would have none, and could never come back.

    Args:
        vae: ComfyUI VAE; one in TAESD's layout is a small, fast decoder.
        from_model: from the model's latents to the VAE's, ``ComfyDenoiser.from_model``.

    Attributes:
        checkpointing: whether the decoder's blocks are computed again in the backward pass. One in TAESD's layout has too little
            to keep.

    Raises:
        ValueError: for a VAE of audio or video or without weights; when called, for latents of other channels.
    """

    def __init__(self, vae, from_model: Callable[[Tensor], Tensor] = lambda z: z):
        check_vae(vae)
        vae = static_vae(vae)
        self.vae, self.from_model = vae, from_model
        self.checkpointing = not isinstance(vae.first_stage_model, TAESD)
        vae.first_stage_model.requires_grad_(False)
        self._idle = idle_blocks(vae.first_stage_model)
        zero, half = (float(vae.process_output(torch.tensor(v))) for v in (0.0, 0.5))
        self._offset, self._slope = zero, 2 * (half - zero)  # of what process_output does before it clamps

    @property
    def patcher(self):
        """For :meth:`ComfyDenoiser.load`."""
        return self.vae.patcher

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def scale(self) -> int:
        """Pixels per latent along each side."""
        return downscale(self.vae)

    def __call__(self, latents: Tensor) -> Tensor:
        vae, net = self.vae, self.vae.first_stage_model
        if latents.ndim != 4 or latents.shape[1] != vae.latent_channels:
            raise ValueError(
                f"latents: expected [B, {vae.latent_channels}, h, w] for this VAE, got {list(latents.shape)}"
            )
        load_for_call(vae.patcher, memory_to_decode(vae, len(latents), *latents.shape[2:]))
        training = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with contextlib.ExitStack() as stack:
            stack.enter_context(differentiable(net))
            stack.enter_context(replaced_forwards(self._idle))
            if training and self.checkpointing:
                stack.enter_context(checkpointed(getattr(net, "decoder", net)))
            z = self.from_model(usable(latents, vae.device)).to(vae.vae_dtype)
            decoded = decode(vae, z).float()
        pictures = vae.process_output(decoded.clone())  # it may work in place
        if training:
            unclamped = self._offset + self._slope * decoded
            pictures = unclamped + (pictures - unclamped).detach()
        return pictures.movedim(1, -1)
