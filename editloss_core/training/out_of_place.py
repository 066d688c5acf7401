"""Gradients through networks that add in place."""

from __future__ import annotations

import dis
import functools
import sys
import types

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OutOfPlace(TorchFunctionMode):
    """Answers ``x += y`` and ``x *= y`` with a new tensor, so that backward can go through ComfyUI's Flux blocks.

    ``x.mul_(y)``, which torch reports in the same way, still changes x: as a statement of its own (ComfyUI's dequantising
    has one) it has no other effect.

    >>> x = kept = torch.zeros(2)
    >>> with OutOfPlace():
    ...     x += 1
    >>> kept.tolist(), x.tolist()
    ([0.0, 0.0], [1.0, 1.0])
    """

    _ANSWERS = {Tensor.add_: torch.add, Tensor.mul_: torch.mul}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        answer = self._ANSWERS.get(func)
        if answer is not None:
            frame = sys._getframe(1)
            if _is_augmented(frame.f_code, frame.f_lasti):
                return answer(*args)
        return func(*args, **(kwargs or {}))


@functools.cache
def _is_augmented(code: types.CodeType, offset: int) -> bool:
    """Whether the instruction is an augmented assignment: INPLACE_ADD in Python 3.10, BINARY_OP (+=) from 3.11 on."""
    instruction = next((i for i in dis.get_instructions(code) if i.offset == offset), None)
    if instruction is None:
        return False
    return instruction.opname.startswith("INPLACE_") or (
        instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("=")
    )
