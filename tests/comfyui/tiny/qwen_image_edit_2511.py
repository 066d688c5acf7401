"""Qwen-Image-Edit 2511, which a key in its file tells, or the name of its file."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

from tiny._qwen import UNUSED, clip, latents, network, prompt, sampled, vae
from tiny._qwen import plus as stock

__all__ = ["SINCE", "UNUSED", "VARIANTS", "build", "clip", "latents", "prompt", "sampled", "stock", "vae"]

SINCE = "0.5.0"


def build() -> Any:
    _check()
    return network(default_ref_method="index_timestep_zero")


def by_its_name() -> Any:
    """A copy without the key."""
    _check()
    model = network()
    model.cached_patcher_init = (network, ("/models/Qwen-Image-Edit-2511-Q4_K_M.gguf",))
    return model


def _check() -> None:
    import inspect

    import comfy.ldm.qwen_image.model

    if "default_ref_method" not in inspect.signature(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel).parameters:
        raise SkipTest(f"this ComfyUI does not know its reference method, which came with {SINCE}")


VARIANTS = {"by its name": by_its_name}
