"""diffusers' autoencoders: latents of pictures, and pictures of latents with gradients."""

from __future__ import annotations

from typing import Any, Sequence

from torch import Tensor

from ..encoders.decoder_features import VAEDecoderEncoder
from ..encoders.vae import VAEEncoder
from ..hashing import hash_module


def vae_encoder(vae: Any, image_size: int = 0, scaled: bool = True) -> VAEEncoder:
    """Latents of diffusers' ``AutoencoderKL``; the posterior's mean, as the pipeline takes it.

    Args:
        vae: on its device, frozen.
        image_size: side of the square that is encoded, in pixels; 0 keeps each picture's size.
        scaled: as the model takes them; if not, as the autoencoder makes them, which is what losses on latents read.
    """
    channels = vae.config.latent_channels
    return VAEEncoder(
        lambda pixels: vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float(),
        name=f"vae/autoencoderkl-{channels}ch",
        fingerprint=hash_module(vae, "AutoencoderKL", str(vae.dtype)),
        downscale=2 ** (len(vae.config.block_out_channels) - 1),
        device=vae.device,
        image_size=image_size,
        shift=(vae.config.shift_factor or 0.0) if scaled else 0.0,
        scale=vae.config.scaling_factor if scaled else 1.0,
    )


def vae_decoder_encoder(vae: Any, depths: Sequence[int] = (1,), image_size: int = 0) -> VAEDecoderEncoder:
    """Features of the decoder of diffusers' ``AutoencoderKL``.

    Args:
        vae: on its device, frozen.
        depths: see :class:`~editloss_core.encoders.decoder_features.VAEDecoderEncoder`.
        image_size: side of the square that is encoded, in pixels; 0 keeps each picture's size.
    """
    encoder = vae_encoder(vae, image_size, scaled=False)
    name = encoder.info.name.removesuffix("/grid").removeprefix("vae/")
    return VAEDecoderEncoder(
        encoder,
        vae.decoder,
        lambda z: vae.decode(z.to(vae.dtype)),
        f"vae-decoder/{name}",
        encoder.latent_space,
        depths=depths,
    )


class VAEDecoder:
    """Latents in the model's space ``[B, C, h, w]`` → pictures ``[B, H, W, 3]`` in 0…1 on the VAE's device, with gradients.

    The numbers are the pipeline's. The clamp to 0…1 lets gradients pass: a value out of range would have none, and could
    never come back.

    Args:
        vae: diffusers' ``AutoencoderKL``, or ``AutoencoderTiny`` (TAEF1) as a small, fast decoder; frozen.
    """

    def __init__(self, vae: Any):
        self.vae = vae
        self.scale, self.shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        # diffusers checkpoints the blocks of its decoders by itself; a small one has too little to keep.
        self.checkpointing = hasattr(vae, "quant_conv")
        if self.checkpointing:
            vae.enable_gradient_checkpointing()

    def __call__(self, latents: Tensor) -> Tensor:
        z = (latents.to(self.vae.device) / self.scale + self.shift).to(self.vae.dtype)
        pictures = self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5
        return (pictures + (pictures.clamp(0, 1) - pictures).detach()).movedim(1, -1)
