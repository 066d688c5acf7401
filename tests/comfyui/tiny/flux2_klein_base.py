"""FLUX.2 klein base: no guidance embedded, Qwen3's features."""

from __future__ import annotations

from typing import Any

from ._flux2 import build as _build
from ._flux2 import latents, prompt, qwen3, vae

SINCE = "0.3.72"
clip = qwen3
__all__ = ["SINCE", "build", "clip", "latents", "prompt", "vae"]


def build() -> Any:
    return _build(False, "flux-2-klein-base-4b.safetensors")
