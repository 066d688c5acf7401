"""diffusers' autoencoders: latents of pictures, and pictures of latents with gradients."""

from __future__ import annotations

from typing import Any, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..encoders.decoder_features import VAEDecoderEncoder
from ..encoders.vae import VAEEncoder
from ..hashing import hash_module
from .flux2 import patchify, unpatchify


class Pictures:
    """What is asked of an autoencoder, with the answers of ``AutoencoderKL``; ``AutoencoderTiny`` (TAEF1) decodes so too.

    Attributes:
        vae: of diffusers, on its device, frozen.
        channels: of a latent.
        shift, scale: (z − shift) · scale are its latents as the model takes them; numbers, or one for each channel.
        checkpointing: whether a decoder's activations are worth computing again.
    """

    def __init__(self, vae: Any):
        self.vae, config = vae, vae.config
        self.channels: int = config.latent_channels
        self.shift: Any = config.shift_factor or 0.0
        self.scale: Any = config.scaling_factor
        self.checkpointing = hasattr(vae, "quant_conv")  # a small one has too little to keep

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in −1…1 → the posterior's mean ``[B, C, h, w]``, as the pipeline takes it."""
        return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()

    def checkpoint(self) -> None:
        """Compute the decoder's blocks again in a backward pass from now on. diffusers does that by itself."""
        self.vae.enable_gradient_checkpointing()

    def decode(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents ``[B, C, h, w]`` → ``[B, 3, H, W]`` about −1…1."""
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]


class Frames(Pictures):
    """``AutoencoderKLQwenImage``, one of films, whose films have one picture.

    Its own ``decode`` clamps what it made, and what was out of range would have no gradient. It keeps states between pictures
    of a film, of which one picture needs none: its parts are called here without.
    """

    def __init__(self, vae: Any):
        self.vae, config = vae, vae.config
        self.channels, self.shift = config.z_dim, config.latents_mean
        self.scale = [1 / deviation for deviation in config.latents_std]
        self.checkpointing = True
        self._again = False

    @property
    def downscale(self) -> int:
        return self.vae.spatial_compression_ratio

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels[:, :, None])[:, :, 0]

    def checkpoint(self) -> None:
        """diffusers has no checkpointing for it: its blocks are checkpointed here."""
        self._again = True

    def decode(self, z: Tensor) -> Tensor:
        decoder = self.vae.decoder
        x = decoder.conv_in(self.vae.post_quant_conv(z.to(self.vae.dtype)[:, :, None]))
        for block in (decoder.mid_block, *decoder.up_blocks):
            again = self._again and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))[:, :, 0]


class Patches(Pictures):
    """``AutoencoderKLFlux2``, whose latents are 2×2 of its own in one, with mean and deviation of its batch norm."""

    def __init__(self, vae: Any):
        self.vae, norm = vae, vae.bn
        self.channels = norm.num_features
        self.shift = norm.running_mean.float()
        self.scale = (norm.running_var.float() + vae.config.batch_norm_eps).rsqrt()
        self.checkpointing = True

    @property
    def downscale(self) -> int:
        return 2 * super().downscale

    def encode(self, pixels: Tensor) -> Tensor:
        return patchify(super().encode(pixels))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(unpatchify(z))


KINDS = {"AutoencoderKLQwenImage": Frames, "AutoencoderKLFlux2": Patches}


def of_vae(vae: Any) -> Pictures:
    """By its class."""
    return KINDS.get(type(vae).__name__, Pictures)(vae)


def vae_encoder(vae: Any, image_size: int = 0, scaled: bool = True) -> VAEEncoder:
    """Latents of diffusers' autoencoder; the posterior's mean, as the pipeline takes it.

    Args:
        vae: on its device, frozen.
        image_size: side of the square that is encoded, in pixels; 0 keeps each picture's size.
        scaled: as the model takes them; if not, as the autoencoder makes them, which is what losses on latents read.
    """
    made, kind = of_vae(vae), type(vae).__name__
    return VAEEncoder(
        made.encode,
        name=f"vae/{kind.lower()}-{made.channels}ch",
        fingerprint=hash_module(vae, kind, str(vae.dtype)),
        downscale=made.downscale,
        device=vae.device,
        image_size=image_size,
        shift=made.shift if scaled else 0.0,
        scale=made.scale if scaled else 1.0,
    )


def vae_decoder_encoder(vae: Any, depths: Sequence[int] = (1,), image_size: int = 0) -> VAEDecoderEncoder:
    """Features of the decoder of diffusers' autoencoder.

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
        of_vae(vae).decode,
        f"vae-decoder/{name}",
        encoder.latent_space,
        depths=depths,
    )


class VAEDecoder:
    """Latents in the model's space ``[B, C, h, w]`` → pictures ``[B, H, W, 3]`` in 0…1 on the VAE's device, with gradients.

    The numbers are the pipeline's. The clamp to 0…1 lets gradients pass: a value out of range would have none, and could
    never come back.

    Args:
        vae: diffusers' autoencoder of the model, or ``AutoencoderTiny`` (TAEF1) as a small, fast decoder; frozen.
    """

    def __init__(self, vae: Any):
        self.vae, self._made = vae, of_vae(vae)
        self.scale, self.shift = (
            torch.as_tensor(v, dtype=torch.float32, device=vae.device).reshape(1, -1, 1, 1)
            for v in (self._made.scale, self._made.shift)
        )
        self.checkpointing = self._made.checkpointing
        if self.checkpointing:
            self._made.checkpoint()

    def __call__(self, latents: Tensor) -> Tensor:
        z = latents.to(self.vae.device) / self.scale + self.shift
        pictures = self._made.decode(z).float() / 2 + 0.5
        return (pictures + (pictures.clamp(0, 1) - pictures).detach()).movedim(1, -1)
