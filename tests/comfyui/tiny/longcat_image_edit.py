"""LongCat-Image-Edit: ComfyUI's Flux without guidance and without a pooled vector, whose text encoder is Qwen's."""

from __future__ import annotations

from typing import Any

import torch
from driver_model_encoders import flux_config, randomised, small_vae

from tiny._qwen import CPU, WIDTH, latents, prompt, text_encoder
from tiny._qwen import edit as stock

__all__ = ["SINCE", "build", "clip", "latents", "prompt", "stock", "vae"]

SINCE = "0.16.0"


def build(**changed: Any) -> Any:
    import comfy.model_patcher
    import comfy.supported_models

    config = flux_config(context_in_dim=WIDTH, vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2], **changed)
    settings = comfy.supported_models.LongCatImage(config)
    settings.set_inference_dtype(torch.float32, None)
    base = settings.get_model({}, device=CPU)
    randomised(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def clip() -> Any:
    from comfy.text_encoders import longcat_image

    return text_encoder(longcat_image.LongCatImageTokenizer, longcat_image.te(dtype_llama=torch.float32))


def vae() -> Any:
    return small_vae(16)
