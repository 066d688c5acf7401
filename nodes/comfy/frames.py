"""Networks made for films, used for pictures: Qwen-Image's latents, and its VAE (Wan 2.1's), have a time axis of one frame.

The core knows pictures ``[B, C, h, w]`` alone; the axis comes in front of such a network and goes behind it.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator

from comfy.ldm.wan.vae import WanVAE
from torch import Tensor, nn

from .gradients import replaced_forwards


def framed(pictures: Tensor, films: bool) -> Tensor:
    """``[B, C, h, w]`` → ``[B, C, 1, h, w]`` where the network takes films; else as it is."""
    return pictures.unsqueeze(2) if films else pictures


def unframed(made: Tensor, films: bool) -> Tensor:
    """The inverse of :func:`framed`."""
    return made.squeeze(2) if films else made


def takes_films(vae) -> bool:
    """Whether a VAE is one of films that makes one latent of one picture, and is known to be used for pictures."""
    return isinstance(vae.first_stage_model, WanVAE)


def downscale(vae) -> int:
    """Pixels per latent along each side of a VAE of pictures."""
    ratio = vae.downscale_ratio
    return ratio[-1] if isinstance(ratio, tuple) else ratio


def encode(vae, pixels: Tensor) -> Tensor:
    """A VAE's own pixels ``[B, 3, H, W]`` → its latents ``[B, C, h, w]``, each picture for itself.

    ``VAE.encode`` would take a batch for the frames of one film.
    """
    films = takes_films(vae)
    with _without_memory(vae.first_stage_model) if films else contextlib.nullcontext():
        return unframed(vae.first_stage_model.encode(framed(pixels, films)), films)


def decode(vae, latents: Tensor) -> Tensor:
    """The inverse of :func:`encode`."""
    films = takes_films(vae)
    with _without_memory(vae.first_stage_model) if films else contextlib.nullcontext():
        return unframed(vae.first_stage_model.decode(framed(latents, films)), films)


def memory_to_encode(vae, batch: int, height: int, width: int) -> float:
    """ComfyUI's estimate for pictures of this size in pixels."""
    shape = (batch, 3, 1, height, width) if takes_films(vae) else (batch, 3, height, width)
    return vae.memory_used_encode(shape, vae.vae_dtype)


def memory_to_decode(vae, batch: int, height: int, width: int) -> float:
    """The same for latents."""
    channels = vae.latent_channels
    shape = (batch, channels, 1, height, width) if takes_films(vae) else (batch, channels, height, width)
    return vae.memory_used_decode(shape, vae.vae_dtype)


@contextlib.contextmanager
def _without_memory(net: nn.Module) -> Iterator[None]:
    """Inside, what remembers a film's earlier frames remembers nothing. The first frame, with none before it, is the same.

    Older ComfyUI counts through that memory, block by block, for a single frame too: a block that is computed again in a
    backward pass would count on.
    """

    def forgetful(stock: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, feat_cache=None, feat_idx=None, **options: stock(x, **options)

    with replaced_forwards({part: forgetful(part.forward) for part in (net.encoder, net.decoder)}):
        yield
