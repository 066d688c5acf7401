"""The first Qwen-Image-Edit, which the name of its file alone tells from 2509."""

from __future__ import annotations

from typing import Any

from tiny._qwen import UNUSED, clip, latents, network, prompt, sampled, vae
from tiny._qwen import edit as stock

__all__ = ["SINCE", "UNUSED", "build", "clip", "latents", "prompt", "sampled", "stock", "vae"]

SINCE = "0.3.51"


def build() -> Any:
    model = network()
    model.cached_patcher_init = (network, ("/models/qwen_image_edit_bf16.safetensors",))
    return model
