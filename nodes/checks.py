"""What reaches a node is checked against its own schema.

ComfyUI 0.3.75 lets a lot through: linked values and NaN are not held to min and max, options of V3 combos are not
compared, sockets take typed-in constants, and a link into an input that no longer exists is passed on.
"""

from __future__ import annotations

import functools
import math

import torch
from comfy_api.latest import io

from ..editloss_core.embeddings import EmbeddingSet
from ..editloss_core.encoders.base import Encoder
from ..editloss_core.pairs import PairSet
from .sockets import (
    EmbeddingsSocket,
    EncoderSocket,
    ObjectiveSocket,
    OptionsSocket,
    PairsSocket,
    ResumePoint,
    ResumeSocket,
    RunSocket,
    TrainingOptions,
    TrainingRun,
    WiredObjective,
)

OWN_SOCKETS = {
    EncoderSocket.io_type: (Encoder, "an encoder from one of the Encoder nodes"),
    EmbeddingsSocket.io_type: (EmbeddingSet, "embeddings from Encode by Role or Load Embeddings"),
    ObjectiveSocket.io_type: (WiredObjective, "an objective from a Loss node or the preset"),
    PairsSocket.io_type: (PairSet, "pairs from Load Pairs, Make Pairs or Demo Pairs"),
    OptionsSocket.io_type: (TrainingOptions, "options from one of the Options nodes"),
    ResumeSocket.io_type: (ResumePoint, "a checkpoint from Resume Training"),
    RunSocket.io_type: (TrainingRun, "a run from Train Edit LoRA"),
}


def checked(*open_lists: str):
    """Decorates ``execute``: every value has the type, range and options that the schema promises.

    Args:
        open_lists: combos whose options are files and may be older than the folder; ``execute`` looks there itself.
    """

    def decorate(execute):
        @functools.wraps(execute)
        def run(cls, **values):
            inputs = {i.id: i for i in cls.define_schema().inputs}
            values = {name: value for name, value in values.items() if name in inputs}
            for name, value in values.items():
                if not (value is None and inputs[name].optional):
                    expected = _fault(inputs[name], value, name in open_lists)
                    if expected:
                        raise ValueError(f"{name}: expected {expected}, got {_described(value)}")
            return execute(cls, **values)

        return run

    return decorate


def _fault(declared: io.Input, value: object, any_text: bool) -> str:
    """What was expected instead of ``value``; empty if it is fine."""
    kind = declared.get_io_type()
    if kind in (io.Int.io_type, io.Float.io_type):
        whole = kind == io.Int.io_type
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        low = -math.inf if declared.min is None else declared.min
        high = math.inf if declared.max is None else declared.max
        if number and math.isfinite(value) and low <= value <= high:
            return ""
        return f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
    if kind == io.Combo.io_type and not any_text:
        fine = isinstance(value, str) and value in declared.options
        return "" if fine else f"one of {', '.join(map(repr, declared.options))}"
    if kind in (io.String.io_type, io.Combo.io_type):
        return "" if isinstance(value, str) and _readable(value) else "text"
    if kind == io.Boolean.io_type:
        return "" if isinstance(value, bool) else "true or false"
    if kind == io.Image.io_type:
        fine = _floating(value) and value.ndim == 4 and value.shape[-1] >= 3 and value.numel()
        return "" if fine else "a batch of pictures [B, H, W, 3]"
    if kind == io.Mask.io_type:
        return "" if _floating(value) and value.ndim in (2, 3) and value.numel() else "a mask [B, H, W]"
    if kind in OWN_SOCKETS:
        return "" if isinstance(value, OWN_SOCKETS[kind][0]) else OWN_SOCKETS[kind][1]
    if kind == io.Conditioning.io_type:
        fine = isinstance(value, list) and all(map(_is_cond, value))
        return "" if fine else "CONDITIONING from a link"
    constant = value is None or isinstance(value, (str, int, float, bool, list, dict))
    return f"a {kind} from a link" if constant else ""


def _readable(text: str) -> bool:
    """Without lone surrogates, which JSON can carry and neither a file nor a font can take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_cond(entry: object) -> bool:
    pair = isinstance(entry, (list, tuple)) and len(entry) == 2
    return pair and isinstance(entry[0], torch.Tensor) and isinstance(entry[1], dict)


def _floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if value is None or isinstance(value, (str, int, float, bool, list, dict)):
        text = repr(value)
        return text if len(text) <= 120 else f"{text[:117]}…"
    return f"a {type(value).__name__}"
