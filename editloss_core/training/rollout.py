"""Estimates of states that the model itself reaches, for losses to act on.

The one-step estimate of a noised after picture is, at high noise, a mean over all that could be there, and a hinge on a mean
bends it instead of choosing. A rollout starts from pure noise, as sampling does, goes k of K steps of the model's own
schedule without gradients, k drawn, and takes the next call of the model with gradients: x̂0 = x_t − t·v̂ of that state is
what the objective acts on, and a regression on the after picture's latents, ‖x̂0 − x0‖² / max(t, 0.1)² (the velocity from
that state to the target, as in a step of DAgger: Ross et al. 2011, https://arxiv.org/abs/1011.0686). PuLID (Guo et al. 2024,
https://arxiv.org/abs/2404.16022) takes an identity loss through four such steps.

It costs (K − 1) / 2 calls without gradients and one with them, on average, beside those of the step itself.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from ..models.base import Denoiser

REGRESSION = "rollout regression"  # name of the regression among the terms


def draw_step(steps: int, generator: torch.Generator) -> int:
    """How many of ``steps`` steps are gone without gradients: 0 to ``steps`` − 1, all alike."""
    return int(torch.randint(steps, (), generator=generator))


def state(
    denoiser: Denoiser,
    noise: Tensor,
    references: Sequence[Tensor],
    conditioning: Sequence[Any],
    steps: int,
    gone: int,
    check: Callable[[], None],
) -> tuple[float, Tensor]:
    """(t, x_t) after ``gone`` of ``steps`` steps from pure noise; ``check`` is called before each, and raises to stop."""
    path = denoiser.edit_model.path(denoiser, noise, references, conditioning, steps)
    for _ in range(gone):
        check()
        next(path)
    return next(path)


def passes(steps: int, every: int) -> tuple[float, float]:
    """(calls of the model without gradients, calls with them) of a step, on average."""
    return (steps - 1) / 2 / every, 1 + 1 / every
