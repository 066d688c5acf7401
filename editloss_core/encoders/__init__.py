"""Encoders behind one protocol: pictures in 0…1 → embeddings, with gradients."""

from importlib import import_module
from typing import Any

from .base import Encoder, EncoderInfo, Preprocess

# Imported on first use: a graph that needs one family does not wait for the others.
_WHERE = {
    "OpenCLIPEncoder": ".openclip",
    "TimmEncoder": ".timm_net",
    "VAEEncoder": ".vae",
    "DiffusionFeatureEncoder": ".diffusion",
    "VAEDecoderEncoder": ".decoder_features",
    "convert_to_safetensors": ".convert",
}

__all__ = [
    "Encoder",
    "EncoderInfo",
    "Preprocess",
    "OpenCLIPEncoder",
    "TimmEncoder",
    "VAEEncoder",
    "DiffusionFeatureEncoder",
    "VAEDecoderEncoder",
    "convert_to_safetensors",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
