"""FLUX.2 dev: guidance embedded, Mistral's features."""

from __future__ import annotations

from typing import Any

from ._flux2 import build as _build
from ._flux2 import latents, mistral, prompt, vae

SINCE = "0.3.72"
clip = mistral
__all__ = ["SINCE", "build", "clip", "latents", "prompt", "vae"]


def build() -> Any:
    return _build(True, "flux2_dev_fp8mixed.safetensors")
