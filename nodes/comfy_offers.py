"""What one ComfyUI has and another has not. Each question is asked of the program itself, once, and here alone.

Nothing here looks at a version number: a fork may be ahead of its number, and a number says nothing about a field.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import Any, Callable, Iterator

import comfy.model_management
import torch

# Families of the fused kernels whose answers are differentiable functions of activations; quantised products are not.
FUSED = ("apply_rope", "rms_rope", "adaln", "rms_adaln", "na3d")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory was not enough.

    Newer drivers report it as an accelerator error as well, which ComfyUI's ``is_oom`` knows where it has one.
    """
    ask = getattr(comfy.model_management, "is_oom", None)
    return ask(error) if ask else isinstance(error, comfy.model_management.OOM_EXCEPTION)


@contextlib.contextmanager
def in_training() -> Iterator[None]:
    """Inside, models whose fast path has no derivative take another, where ComfyUI has a flag for it."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


def fused_kernels() -> list[tuple[Any, Callable[..., Any]]]:
    """Operators of the package comfy_kitchen, and what each does in plain torch; none where ComfyUI comes without it.

    A kernel that changes its inputs has an underscore at its end, and stands beside the function that does not.
    """
    if importlib.util.find_spec("comfy_kitchen") is None:
        return []
    from comfy_kitchen.backends import eager

    found = []
    for name in dir(eager):
        if name.startswith(FUSED) and hasattr(torch.ops.comfy_kitchen, name):
            found.append((getattr(torch.ops.comfy_kitchen, name), getattr(eager, name.rstrip("_"))))
    return found
