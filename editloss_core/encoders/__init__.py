"""Encoders behind one protocol: pictures in 0…1 → embeddings, with gradients."""

from .base import Encoder, EncoderInfo, Preprocess

__all__ = ["Encoder", "EncoderInfo", "Preprocess"]
