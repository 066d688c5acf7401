"""FLUX.1 Kontext by Hugging Face diffusers: the model as a :class:`~.flow.Denoiser`, its autoencoder, its captions.

Latents, tokens and positions are those of diffusers' ``FluxKontextPipeline``
(https://github.com/huggingface/diffusers). Nothing here imports diffusers: the objects that it loaded come in
(:mod:`~editloss_core.training.diffusers_files`).
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from ..cache import TensorCache
from ..encoders.vae import VAEEncoder
from ..hashing import hash_module, hash_tensors
from ..progress import Progress

PATCH = 2  # latents per token along each side
TEXT_TOKENS = 512  # of T5; the pipeline's own default
CAPTION_METHOD = "1"  # part of every key: count up when captions come to be encoded in another way


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class Caption(NamedTuple):
    """A caption as the model takes it: T5's tokens ``[T, D]`` and CLIP's pooled vector ``[P]``."""

    tokens: Tensor
    pooled: Tensor


def pack(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` → tokens ``[B, h/2 · w/2, 4·C]``, row by row; a token's numbers go by channel, row, column.

    >>> pack(torch.arange(8.0).reshape(1, 2, 2, 2))
    tensor([[[0., 1., 2., 3., 4., 5., 6., 7.]]])
    """
    count, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latents: expected even sides, got {height}×{width}")
    parts = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`, for latents of this height and width."""
    rows, columns = height // PATCH, width // PATCH
    parts = tokens.reshape(len(tokens), rows, columns, -1, PATCH, PATCH)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def position_ids(height: int, width: int, image: int = 0) -> Tensor:
    """``[h/2 · w/2, 3]``: which picture a token is of (0 = the one that is made, 1 = the reference), its row and column."""
    rows, columns = torch.arange(height // PATCH), torch.arange(width // PATCH)
    which = torch.full((1, 1), image)
    grid = torch.stack(torch.broadcast_tensors(which, rows[:, None], columns[None, :]), -1)
    return grid.flatten(0, 1).float()


class FluxDenoiser:
    """Velocity of diffusers' ``FluxTransformer2DModel``, with the before picture as Kontext's reference.

    Picture tokens first, the reference's after them, told apart by the first coordinate of their positions. The base's
    weights are frozen for good.

    Args:
        transformer: on its device, in the dtype that it computes in.
        guidance: what a guidance-distilled model is told; 1 is usual in training, 2.5 in sampling with Kontext. It may be
            changed between calls.
        checkpointing: keep each block's inputs only and compute the blocks again in the backward pass.
        device: where inputs go; None: where the weights are.
    """

    def __init__(
        self,
        transformer: nn.Module,
        guidance: float = 1.0,
        checkpointing: bool = True,
        device: Optional[torch.device] = None,
    ):
        transformer.requires_grad_(False).eval()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        self.module, self.guidance, self.checkpointing = transformer, guidance, checkpointing
        self.device = torch.device(device) if device is not None else next(transformer.parameters()).device
        self.dtype = transformer.dtype
        self._ids: dict[tuple[int, ...], Tensor] = {}

    @property
    def program(self) -> str:
        """What the self-check names."""
        return f"diffusers {metadata.version('diffusers')}, torch {torch.__version__}"

    def stock_velocity(self, x: Tensor, t: Tensor, reference: Tensor, caption: Caption) -> Tensor:
        """(x − x') / t, x' being what ``FluxKontextPipeline`` makes of x in one step from t to 0.

        Args:
            x: ``[B, C, h, w]``, like ``reference``.
            t: ``[B]``, one noise level above 0.
        """
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

        (count, channels, height, width), like = x.shape, {"device": self.device, "dtype": self.dtype}
        # The pipeline asks its autoencoder for the size of a latent alone: pictures come and go as latents.
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        pipeline = FluxKontextPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, self.module)
        pipeline.set_progress_bar_config(disable=True)
        after = pipeline(
            image=reference.to(**like), latents=pack(x.to(**like)), height=8 * height, width=8 * width,
            max_area=64 * height * width, _auto_resize=False, num_images_per_prompt=1, sigmas=[t[0].item()],
            num_inference_steps=1, guidance_scale=self.guidance, output_type="latent", return_dict=False,
            prompt_embeds=caption.tokens[None].expand(count, -1, -1).to(**like),
            pooled_prompt_embeds=caption.pooled[None].expand(count, -1).to(**like),
        )[0]  # fmt: skip
        return (x - unpack(after.float(), height, width)) / t.view(-1, 1, 1, 1)

    def __call__(self, x_t: Tensor, t: Tensor, references: Sequence[Tensor], conditioning: Sequence[Caption]) -> Tensor:
        """As in :class:`~editloss_core.training.flow.Denoiser`.

        Raises:
            ValueError: more or less than one reference, a batch that does not fit together, latents with odd sides.
        """
        if len(references) != 1:
            raise ValueError(
                f"references: expected one, as FluxKontextPipeline takes it for a sample, got {len(references)}"
            )
        if not len(x_t) == len(t) == len(references[0]) == len(conditioning):
            raise ValueError(
                f"x_t: expected one t, reference and conditioning for each of {len(x_t)} latents, got {len(t)}, "
                f"{len(references[0])} and {len(conditioning)}"
            )
        (height, width), like = x_t.shape[2:], {"device": self.device, "dtype": self.dtype}
        tokens = torch.stack([c.tokens for c in conditioning]).to(**like)
        guidance = None
        if self.module.config.guidance_embeds:
            guidance = torch.full((len(x_t),), self.guidance, device=self.device)
        made = pack(x_t.to(**like))
        # The pipeline counts time to 1000 in the model's dtype: rounded there, bf16 gives the numbers that it gives.
        time = (1000 * t.to(self.device)).to(self.dtype) / 1000
        velocity = self.module(
            hidden_states=torch.cat([made, pack(references[0].to(**like))], 1),
            timestep=time,
            guidance=guidance,
            pooled_projections=torch.stack([c.pooled for c in conditioning]).to(**like),
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, **like),
            img_ids=self._positions(height, width, *references[0].shape[2:]),
            return_dict=False,
        )[0]
        return unpack(velocity[:, : made.shape[1]], height, width).float()

    def _positions(self, *sides: int) -> Tensor:
        """Of the picture's and the reference's tokens, in the model's dtype: in bf16 they are whole up to 256."""
        if sides not in self._ids:
            ids = torch.cat([position_ids(*sides[:2]), position_ids(*sides[2:], image=1)])
            self._ids[sides] = ids.to(self.device, self.dtype)
        return self._ids[sides]


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def vae_encoder(vae: nn.Module, image_size: int = 0, scaled: bool = True) -> VAEEncoder:
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


class VAEDecoder:
    """Latents in the model's space ``[B, C, h, w]`` → pictures ``[B, H, W, 3]`` in 0…1 on the VAE's device, with gradients.

    The numbers are the pipeline's. The clamp to 0…1 lets gradients pass: a value out of range would have none, and could
    never come back.

    Args:
        vae: diffusers' ``AutoencoderKL``, or ``AutoencoderTiny`` (TAEF1) as a small, fast decoder; frozen.
    """

    def __init__(self, vae: nn.Module):
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


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def encode_captions(
    captions: Iterable[str],
    load: Callable[[], Any],
    fingerprint: str,
    cache_folder: Optional[Path] = None,
    progress: Optional[Progress] = None,
) -> dict[str, Caption]:
    """Each caption once, from the cache where it is there, on the CPU; nothing is loaded if all are.

    Args:
        captions: texts, in any order and number.
        load: gives a ``FluxKontextPipeline`` with text encoders and tokenizers, on the device where they run. It is let go
            before this returns: nobody needs text encoders after it.
        fingerprint: of the text encoders and tokenizers.
        cache_folder: as in :func:`~editloss_core.training.prepare.prepare`.
        progress: called with (done, total) captions that are not in the cache.

    Raises:
        ValueError: embeddings that are not finite.
    """
    cache = TensorCache(cache_folder)
    keys = {text: hash_tensors([], CAPTION_METHOD, fingerprint, str(TEXT_TOKENS), text) for text in captions}
    found = {text: cache.get("captions", key) for text, key in keys.items()}
    todo = [text for text, entry in found.items() if entry is None]
    pipeline = load() if todo else None
    for done, text in enumerate(todo, 1):
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(text, max_sequence_length=TEXT_TOKENS)
        tensors = {"tokens": tokens[0].cpu(), "pooled": pooled[0].cpu()}
        if not all(bool(x.isfinite().all()) for x in tensors.values()):
            raise ValueError(
                f"caption: expected finite embeddings, got NaN or infinity for {text!r}; T5 needs bfloat16 or float32"
            )
        found[text] = cache.put("captions", keys[text], tensors)
        if progress is not None:
            progress(done, len(todo))
    return {text: Caption(entry.tensors["tokens"], entry.tensors["pooled"]) for text, entry in found.items()}


def hash_folders(folders: Iterable[Path], *texts: str) -> str:
    """sha256 over the files of folders: small ones by content, weights by name, size and time of change.

    T5's weights are 9 GB: what reads them only to find that they are known has lost what the cache saves.
    """
    digest = hashlib.sha256("\0".join(texts).encode())
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            status = path.stat()
            digest.update(f"\0{folder.name}/{path.relative_to(folder).as_posix()} {status.st_size}\0".encode())
            large = status.st_size > 16_000_000
            digest.update(str(status.st_mtime_ns).encode() if large else path.read_bytes())
    return digest.hexdigest()
