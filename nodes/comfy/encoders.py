"""VAE, CLIP_VISION and MODEL as encoders of the core, its own encoders under ComfyUI's model management, and gradients
through them.

ComfyUI's own paths are written for inference: ``ClipVisionModel.encode_image`` rounds pixels, and see gradients.py. What is made
here goes around all of it when a gradient is asked for, and is a plain forward pass when not.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional, Sequence

import comfy.model_management
import comfy.sampler_helpers
import torch
from comfy.taesd.taesd import Block
from torch import Tensor, nn

from ...editloss_core.device_memory import is_out_of_memory
from ...editloss_core.encoders.base import EncoderInfo, PixelEncoder, Preprocess, check_output
from ...editloss_core.encoders.decoder_features import VAEDecoderEncoder
from ...editloss_core.encoders.diffusion import DiffusionFeatureEncoder
from ...editloss_core.encoders.openclip import OpenCLIPEncoder
from ...editloss_core.encoders.timm_net import TimmEncoder
from ...editloss_core.encoders.vae import VAEEncoder
from ...editloss_core.hashing import hash_tensors
from .flow_model import check_flow_model, model_inputs
from .frames import decode, downscale, encode, framed, memory_to_decode, memory_to_encode, takes_films
from .gradients import differentiable, replaced_forwards
from .loading import WholePatcher, fingerprint, load_for_call
from .offers import static_clip_vision, static_model, static_vae

CLIP_VISION_LAYERS = ("last", "penultimate")
# SD3's and Qwen-Image's blocks answer (text, picture), Flux's (picture, text)
PICTURE_SECOND = ("JointBlock", "QwenImageTransformerBlock")


class _Managed(PixelEncoder):
    """An encoder of the core whose ``network`` comes to ComfyUI's device when it is used, and goes when others need room."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        management = comfy.model_management
        patcher = WholePatcher(self.network, management.get_torch_device(), management.text_encoder_offload_device())
        self.patchers, self.device = (patcher,), patcher.load_device

    def features(self, pixels: Tensor) -> Tensor:
        load_for_call(self.patchers[0], 0)
        with differentiable(self.network):
            return super().features(pixels)


class ManagedOpenCLIP(_Managed, OpenCLIPEncoder):
    """See :class:`~editloss_core.encoders.openclip.OpenCLIPEncoder`."""


class ManagedTimm(_Managed, TimmEncoder):
    """See :class:`~editloss_core.encoders.timm_net.TimmEncoder`."""


# ---------------------------------------------------------------------------------------------------------------------
# VAE
# ---------------------------------------------------------------------------------------------------------------------


def check_vae(vae, name: str = "vae") -> None:
    """ValueError, under the input's name, unless it is a VAE of pictures with weights."""
    if getattr(vae, "first_stage_model", None) is None:
        raise ValueError(f"{name}: this VAE has no weights; the checkpoint it came from does not contain one")
    if not takes_films(vae) and (vae.latent_dim != 2 or not isinstance(vae.downscale_ratio, int)):
        raise ValueError(
            f"{name}: expected a VAE of pictures, got one with {vae.latent_dim} latent dimensions (video or audio)"
        )
    if vae.output_channels != 3:
        raise ValueError(f"{name}: expected a VAE of pictures in 3 colours, got one of {vae.output_channels} channels")


def idle_blocks(net: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """The blocks in TAESD's layout whose last convolution is all zeros, each with the little that it does.

    The demo's autoencoder is trained without the blocks that cost most, and ComfyUI's class has them all: of its encoder's
    arithmetic they are nine tenths, of its decoder's three fifths.
    """
    return {
        block: block.fuse.forward
        for block in net.modules()
        if isinstance(block, Block)
        and isinstance(block.skip, nn.Identity)
        and getattr(block, "pool", None) is None
        and not any(p.any() for p in block.conv[-1].parameters())
    }


def vae_encoder(vae, image_size: int = 0, latent_format=None) -> VAEEncoder:
    """Latents of a ComfyUI VAE as a grid ``[B, h, w, C]``; the posterior's mean, as ComfyUI itself encodes.

    Args:
        vae: ComfyUI VAE.
        image_size: side of the square that is encoded, in pixels; 0 keeps each picture's size.
        latent_format: ``comfy.latent_formats.LatentFormat`` of a diffusion model, whose latents are then made; None gives
            the VAE's own.

    Raises:
        ValueError: for a VAE of audio or video, or with other channels than the format.
    """
    check_vae(vae)
    vae = static_vae(vae)
    shift, scale = _affine(latent_format, vae.latent_channels)
    idle = idle_blocks(vae.first_stage_model)

    def latents(pixels: Tensor) -> Tensor:
        load_for_call(vae.patcher, memory_to_encode(vae, len(pixels), *pixels.shape[2:]))
        with differentiable(vae.first_stage_model), replaced_forwards(idle):
            inputs = vae.process_input((pixels + 1.0) / 2.0).to(vae.device, vae.vae_dtype)
            return encode(vae, inputs).float()

    kind = type(vae.first_stage_model).__name__
    encoder = VAEEncoder(
        latents,
        name=f"vae/{kind.lower()}-{vae.latent_channels}ch",
        fingerprint=fingerprint(vae.first_stage_model, kind, str(vae.vae_dtype)),
        downscale=downscale(vae),
        device=vae.device,
        image_size=image_size,
        shift=shift,
        scale=scale,
    )
    encoder.patchers = (vae.patcher,)
    return encoder


class ManagedVAEDecoder(VAEDecoderEncoder):
    """Features of a ComfyUI VAE's decoder: see :class:`~editloss_core.encoders.decoder_features.VAEDecoderEncoder`.

    Args:
        vae: ComfyUI VAE in TAESD's layout or that of Stable Diffusion's autoencoder.
        depths, image_size: see there and :func:`vae_encoder`.

    Raises:
        ValueError: as :func:`vae_encoder`; a decoder of another layout; depths that it has not.
    """

    def __init__(self, vae, depths: Sequence[int] = (1,), image_size: int = 0):
        encoder = vae_encoder(vae, image_size)
        self.comfy_vae = vae = static_vae(vae)
        net = vae.first_stage_model
        decoder = getattr(net, "taesd_decoder", None) or getattr(net, "decoder", net)
        name = encoder.info.name.removesuffix("/grid").removeprefix("vae/")
        made = functools.partial(decode, vae)
        super().__init__(encoder, decoder, made, f"vae-decoder/{name}", encoder.latent_space, depths=depths)
        self.patchers = (vae.patcher,)

    def features(self, z: Tensor) -> list[Tensor]:
        vae = self.comfy_vae
        load_for_call(vae.patcher, memory_to_decode(vae, len(z), *z.shape[2:]))
        with differentiable(vae.first_stage_model):
            return super().features(z.to(vae.device, vae.vae_dtype))


def _affine(latent_format, channels: int) -> tuple[Any, Any]:
    """(shift, scale) with which a latent format's ``process_in(z)`` is (z − shift) · scale, numbers or one per channel."""
    if latent_format is None:
        return 0.0, 1.0
    if latent_format.latent_channels != channels:
        raise ValueError(
            f"vae: the model takes latents of {latent_format.latent_channels} channels, this VAE makes {channels} channels"
        )
    with torch.inference_mode(False):
        films = latent_format.latent_dimensions == 3
        zero, one = (latent_format.process_in(framed(torch.full((1, channels, 1, 1), v), films)) for v in (0.0, 1.0))
    scale = one - zero
    return (-zero / scale).flatten(), scale.flatten()


# ---------------------------------------------------------------------------------------------------------------------
# CLIP_VISION
# ---------------------------------------------------------------------------------------------------------------------


class ClipVisionEncoder(PixelEncoder):
    """ComfyUI's CLIP_VISION (CLIP, SigLIP, DINOv2) with differentiable preprocessing and without rounding.

    Args:
        clip_vision: a ``comfy.clip_vision.ClipVisionModel``.
        output: ``"global"`` is the pooled (projected) vector, or for SigLIP, whose pooling ComfyUI does not load, the
            mean of the patches; ``"tokens"`` and ``"grid"`` are the patches, without the class token.
        layer: ``"last"`` or ``"penultimate"``, for tokens and grid.
        crop: True crops the centre as CLIP was trained; False stretches, so that nothing is out of sight.
    """

    def __init__(self, clip_vision, output: str = "global", layer: str = "last", crop: bool = False):
        check_output(output)
        if layer not in CLIP_VISION_LAYERS:
            raise ValueError(f"layer: expected one of {', '.join(CLIP_VISION_LAYERS)}, got {layer!r}")
        if output == "global" and layer != "last":
            raise ValueError("layer: the global vector exists for 'last' only; choose tokens or grid for 'penultimate'")
        clip_vision = static_clip_vision(clip_vision)
        self.clip, self.layer = clip_vision, layer
        size = clip_vision.image_size
        self.side = size // _patch_size(clip_vision.model)
        preprocess = Preprocess(size, size, tuple(clip_vision.image_mean), tuple(clip_vision.image_std), crop=crop)
        kind = type(clip_vision.model).__name__
        described = preprocess.describe()
        info = EncoderInfo(
            name=f"clip_vision/{kind.lower()}-{size}{'' if layer == 'last' else f'/{layer}'}/{output}",
            preprocessing=described,
            fingerprint=fingerprint(clip_vision.model, kind, described, output, layer),
            output=output,
        )
        super().__init__(info, preprocess, clip_vision.load_device)
        self.patchers = (clip_vision.patcher,)

    def grid(self, height: int, width: int) -> Optional[tuple[int, int]]:
        return None if self.info.output == "global" else (self.side, self.side)

    def features(self, pixels: Tensor) -> Tensor:
        load_for_call(self.clip.patcher, 0)
        with differentiable(self.clip.model):
            last, intermediate, pooled, *_ = self.clip.model(
                pixel_values=pixels, intermediate_output=-2 if self.layer == "penultimate" else None
            )
        if self.info.output == "global":
            return pooled.float() if pooled.ndim == 2 else pooled.float().mean(1)
        patches = (last if self.layer == "last" else intermediate)[:, -(self.side**2) :].float()
        return patches.transpose(1, 2).unflatten(2, (self.side, self.side))


def _patch_size(model: nn.Module) -> int:
    """The stride of the convolution that cuts a picture into patches: the first one of every image encoder here."""
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).stride[0]


# ---------------------------------------------------------------------------------------------------------------------
# MODEL
# ---------------------------------------------------------------------------------------------------------------------


def diffusion_encoder(
    model, vae, conditioning, block: str, noise_level: float, seed: int, output: str = "grid", image_size: int = 0
) -> DiffusionFeatureEncoder:
    """Features of one block of a flow model (FLUX and kin) for a picture noised to ``noise_level``.

    Args:
        model: ComfyUI MODEL.
        vae: the VAE that belongs to it.
        conditioning: CONDITIONING; the first entry is used, with reference latents if it has them.
        block: name of a whole block of the diffusion model, for example ``double_blocks.9`` or ``single_blocks.20``.
        noise_level: t in (0, 1): x_t = (1 − t) · x0 + t · ε.
        seed: of ε.

    Raises:
        ValueError: a model that is not a flow model, an unknown block (with the names there are), a VAE with other
            latents, empty conditioning; when called, conditioning that does not fit the model.
    """
    check_flow_model(model)
    model = static_model(model)
    base = model.model
    net = base.diffusion_model
    blocks = {n: m for n, m in net.named_modules() if n.count(".") == 1 and n.split(".")[1].isdigit()}
    if block not in blocks:  # parts of blocks are left out: their answers say nothing about which tokens are whose
        raise ValueError(f"block: {type(net).__name__} has no block {block!r}; try one of {_abridged(list(blocks))}")
    module = blocks[block]
    if not conditioning:
        raise ValueError("conditioning: expected at least one entry, got none")
    channels = base.latent_format.latent_channels
    if vae.latent_channels != channels:
        raise ValueError(
            f"vae: {type(base).__name__} takes latents of {channels} channels, this VAE makes {vae.latent_channels} channels"
        )
    kind = type(base).__name__
    patch, films = getattr(net, "patch_size", 1), base.latent_format.latent_dimensions == 3
    place = int(type(module).__name__ in PICTURE_SECOND)
    seen = {"text": 0, "picture": 0}  # tokens of the last call

    def predict(x: Tensor, t: Tensor) -> None:
        load_for_call(model, base.memory_required(x.shape))
        x, t = framed(x.to(model.load_device), films), t.to(model.load_device)
        cond = comfy.sampler_helpers.convert_cond(conditioning)[0]
        inputs = {name: value.cond for name, value in model_inputs(base, cond, x).items()}
        seen["text"] = inputs["c_crossattn"].shape[1] if "c_crossattn" in inputs else 0
        seen["picture"] = -(-x.shape[-2] // patch) * -(-x.shape[-1] // patch)
        options = model.model_options.get("transformer_options", {}).copy()
        try:
            with differentiable(net):
                base.apply_model(x, t, transformer_options=options, **inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"conditioning: {kind} cannot be run with it; use the model's own text encoder ({error})"
            ) from error

    def select(result) -> Tensor:
        """The picture's own tokens: references follow them, and in single-stream blocks the text precedes them."""
        features = result[place] if isinstance(result, tuple) else result
        if features.ndim != 3:
            return features
        start = 0 if isinstance(result, tuple) else seen["text"]
        features = features[:, start : start + seen["picture"]]
        if features.shape[1] != seen["picture"]:
            raise ValueError(
                f"block: expected {seen['picture']} picture tokens from {block!r}, got {features.shape[1]}; try another block"
            )
        return features

    # LoRAs are applied when the model is loaded and change what it computes; their id is new in every session, so that an
    # embedding file made with one is never taken for another's.
    patches = str(model.patches_uuid) if model.patches else ""
    encoder = DiffusionFeatureEncoder(
        vae_encoder(vae, image_size, base.latent_format),
        predict,
        module,
        select,
        name=f"diffusion/{kind.lower()}/{block}",
        fingerprint=fingerprint(net, kind, hash_tensors(_tensors_of(conditioning)), patches),
        t=noise_level,
        seed=seed,
        patch=patch,
        output=output,
    )
    encoder.patchers = (model,)
    return encoder


def _tensors_of(conditioning) -> list[tuple[str, Tensor]]:
    context, extra = conditioning[0]
    named = [("context", context)]
    for key, value in sorted(extra.items()):
        for i, item in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(item, Tensor):
                named.append((f"{key}.{i}", item))
    return named


def _abridged(names: list[str], most: int = 6) -> str:
    shown = names if len(names) <= most else [*names[: most // 2], "…", *names[-most // 2 :]]
    return ", ".join(shown) or "nothing: it has no numbered blocks"
