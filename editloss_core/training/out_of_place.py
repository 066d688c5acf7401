"""Gradients through networks that add in place."""

from __future__ import annotations

import dis
import functools
import sys
import types
from typing import Any, Callable, Iterable, Mapping, Optional

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OutOfPlace(TorchFunctionMode):
    """Answers ``x += y`` and ``x *= y`` with a new tensor, so that backward can go through ComfyUI's Flux blocks.

    ``x.mul_(y)``, which torch reports in the same way, still changes x: as a statement of its own (ComfyUI's dequantising
    has one) it has no other effect.

    ``x[a:b] *= y`` changes x as well, when the answer is put in its place; what the product keeps for its backward pass is a
    copy of the slice. Without it plain autograd would raise, and gradient checkpointing, which does not look for changes,
    would compute wrong gradients without a word.

    Args:
        kernels: operator → function that answers in its place while gradients are on, for operators without a derivative.

    >>> x = kept = torch.zeros(2)
    >>> with OutOfPlace():
    ...     x += 1
    >>> kept.tolist(), x.tolist()
    ([0.0, 0.0], [1.0, 1.0])
    """

    _ANSWERS: Mapping[Any, Callable[..., Tensor]] = {Tensor.add_: torch.add, Tensor.mul_: torch.mul}

    def __init__(self, kernels: Optional[Mapping[Any, Callable[..., Any]]] = None):
        super().__init__()
        self._kernels = kernels or {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Optional[Mapping[str, Any]] = None,
    ) -> Any:
        answer = self._ANSWERS.get(func)
        if answer is not None:
            frame = sys._getframe(1)
            if _is_augmented(frame.f_code, frame.f_lasti):
                x, *others = args
                return answer(x.clone() if x._is_view() else x, *others)
        elif func in self._kernels and torch.is_grad_enabled():
            func = self._kernels[func]
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
