"""FLUX.2 klein, distilled: the same network as klein base, told apart by the name of its file."""

from __future__ import annotations

from typing import Any

from ._flux2 import build as _build
from ._flux2 import latents, prompt, qwen3, vae

SINCE = "0.3.72"
clip = qwen3
__all__ = ["SINCE", "build", "clip", "latents", "prompt", "vae"]


def build() -> Any:
    return _build(False, "/models/diffusion_models/flux-2-klein-4b-fp8.safetensors")
