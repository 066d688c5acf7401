"""An encoder as one text, for command lines: ``timm:vit_small_patch14_dinov2,weights=dinov2_vits14.safetensors``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Union

import torch

from .base import Encoder

_SETTINGS = {"weights": str, "output": str, "image_size": int, "crop": bool, "random_seed": int}


class Kind(NamedTuple):
    """A kind of encoder that is made from a name and a file of weights.

    Attributes:
        class_name: in :mod:`editloss_core.encoders`.
        first: its argument that names the model.
        settings: its other arguments → type.
    """

    class_name: str
    first: str
    settings: Mapping[str, type]


KINDS: Mapping[str, Kind] = {
    "timm": Kind("TimmEncoder", "model_name", {**_SETTINGS, "layer": int}),
    "openclip": Kind("OpenCLIPEncoder", "architecture", {**_SETTINGS, "pretrained_tag": str, "normalize": bool}),
}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder that is not loaded yet; made by :meth:`parse`.

    Attributes:
        kind: a key of :data:`KINDS`.
        name: of the model, as its library calls it.
        settings: further arguments of the encoder's class.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> EncoderSpec:
        """Read ``KIND:NAME[,SETTING=VALUE…]``.

        Raises:
            ValueError: another form, an unknown kind or setting, a value of another type, or no weights; the message says
                what is known.

        >>> EncoderSpec.parse("timm:test_vit,random_seed=0,output=tokens").settings
        {'random_seed': 0, 'output': 'tokens'}
        """
        head, *rest = text.split(",")
        kind, colon, name = head.partition(":")
        if not colon or not name.strip():
            raise ValueError(
                f"expected KIND:NAME,SETTING=VALUE, as in timm:vit_small_patch14_dinov2,weights=FILE, got {text!r}"
            )
        if kind not in KINDS:
            raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
        known, settings = KINDS[kind].settings, {}
        for item in rest:
            key, equals, value = item.partition("=")
            if not equals or key not in known:
                raise ValueError(f"expected SETTING=VALUE with one of {', '.join(known)}, got {item!r}")
            settings[key] = _value(key, value, known[key])
        if not {"weights", "random_seed"} & settings.keys():
            raise ValueError(f"expected weights=FILE.safetensors, got {text!r}")
        return cls(kind, name.strip(), settings)

    def load(self, device: Union[str, torch.device, None] = None) -> Encoder:
        """The encoder.

        Raises:
            FileNotFoundError, ValueError: as its class.
        """
        from .. import encoders

        if "weights" in self.settings and not Path(self.settings["weights"]).is_file():
            raise FileNotFoundError(f"weights: no such file: {self.settings['weights']}")
        kind = KINDS[self.kind]
        return getattr(encoders, kind.class_name)(**{kind.first: self.name}, **self.settings, device=device)


def encoder_spec(given: argparse.Namespace, text: str) -> EncoderSpec:
    """The value of a program's ``--encoder``; a wrong one ends the program as any wrong argument does."""
    try:
        return EncoderSpec.parse(text)
    except ValueError as error:
        given.parser.error(f"argument --encoder: {error}")
        raise  # not reached


def _value(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        raise ValueError(f"{key}: expected true or false, got {text!r}")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}: expected a whole number, got {text!r}") from None
