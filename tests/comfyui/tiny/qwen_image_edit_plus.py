"""Qwen-Image-Edit 2509."""

from __future__ import annotations

from tiny._qwen import UNUSED, clip, latents, prompt, sampled, vae
from tiny._qwen import network as build
from tiny._qwen import plus as stock

__all__ = ["SINCE", "UNUSED", "build", "clip", "latents", "prompt", "sampled", "stock", "vae"]

SINCE = "0.3.60"
