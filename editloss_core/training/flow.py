"""Flow matching in velocity space: noise levels, one-step estimates, and the loss.

x_t = (1 − t)·x0 + t·ε, velocity v = ε − x0 (rectified flow, Liu et al. 2022, https://arxiv.org/abs/2209.03003; as in
FLUX). Latents are ``[B, C, h, w]`` in the model's own space, noise levels t ``[B]`` in 0…1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..checks import check_number, check_option

TIMESTEPS = ("logit_normal", "uniform", "shifted")
ESTIMATE_WEIGHTINGS = ("none", "inverse_square")
LEAST_T = 0.1  # below it x̂0 is nearly x_t whatever the model says


@dataclass(frozen=True)
class Timesteps:
    """How noise levels are drawn in training.

    ``"uniform"``; ``"logit_normal"``: t = sigmoid(mean + std·n), n ~ N(0, 1) (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206); ``"shifted"``: the same with the mean raised by the model's μ, which
    grows with the number of tokens, so that large pictures train at higher noise (:meth:`.EditModel.mu`).

    Attributes:
        kind: one of the three.
        mean, std: of the normal, in logits; not used by ``"uniform"``.
        minimum, maximum: the distribution is cut off there, not clamped: 0 ≤ minimum < maximum ≤ 1.
    """

    kind: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    minimum: float = 0.0
    maximum: float = 1.0

    def __post_init__(self) -> None:
        check_option("timesteps", self.kind, TIMESTEPS)
        check_number("timestep mean", self.mean, -10.0)
        check_number("timestep std", self.std, 0.0, open_low=True)
        for name in ("minimum", "maximum"):
            check_number(f"{name} t", getattr(self, name), 0.0)
        if not self.minimum < self.maximum <= 1.0:
            raise ValueError(
                f"minimum t: expected 0 ≤ minimum < maximum ≤ 1, got minimum {self.minimum:g}, maximum {self.maximum:g}"
            )

    def draw(self, count: int, mu: float, generator: torch.Generator) -> Tensor:
        """``[count]`` noise levels, by the inverse of the distribution function; ``mu``: the model's shift for the size."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        ends = torch.tensor([self.minimum, self.maximum], dtype=torch.float64)
        if self.kind == "uniform":
            low, high = ends
            return (low + u * (high - low)).float()
        mean = self.mean + (mu if self.kind == "shifted" else 0.0)
        ends = (torch.logit(ends) - mean) / self.std
        side = -1.0 if ends[0] > 0 else 1.0  # the upper tail by its mirror image: beside 1 there are no digits left
        low, high = 0.5 * torch.special.erfc(-side * ends / math.sqrt(2.0))  # ndtr itself is 0 from −8.3 on
        t = torch.sigmoid(mean + side * self.std * torch.special.ndtri(low + u * (high - low)))
        return t.clamp(self.minimum, self.maximum).float()


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·x0 + t·ε."""
    return torch.lerp(x0, noise, _per_sample(t, x0))


def estimate(x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """x̂0 = x_t − t·v̂; its error is t times the velocity's."""
    return x_t - _per_sample(t, x_t) * velocity


def velocity_loss(
    predicted: Tensor,
    target: Tensor,
    mask: Optional[Tensor] = None,
    edit_weight: float = 1.0,
    valid: Optional[Tensor] = None,
) -> Tensor:
    """Σ w·(v̂ − v)² / Σ w per sample, with w = ``edit_weight`` inside the edit and 1 outside, times ``valid``.

    Args:
        predicted, target: ``[B, C, h, w]``.
        mask: ``[B, h, w]`` in 0…1 at latent resolution, 1 = edited; None weighs all alike.
        edit_weight: above 1 looks at the edit more.
        valid: ``[B, h, w]`` in 0…1, what counts at all; None counts everything. A sample of which nothing counts has the
            loss 0.

    Returns:
        ``[B]`` in float32.
    """
    shape = (len(predicted), *predicted.shape[2:])
    for name, region in (("mask", mask), ("valid", valid)):
        if region is not None and region.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} like the latents, got {list(region.shape)}")
    error = (predicted.float() - target.float()).square().mean(1)
    weights = torch.ones_like(error)
    if mask is not None and edit_weight != 1.0:
        weights = 1.0 + (edit_weight - 1.0) * mask.to(error)
    elif valid is None:
        return error.flatten(1).mean(1)
    if valid is not None:
        weights = weights * valid.to(error)
    total = weights.flatten(1).sum(1)
    return (weights * error).flatten(1).sum(1) / torch.where(total > 0, total, 1.0)


def estimate_weights(t: Tensor, weighting: str = "none", cap: float = 100.0) -> Tensor:
    """``[B]`` factors for losses on x̂0: 1, or 1 / max(t, 0.1)² but at most ``cap``.

    The error of x̂0 is t times that of the velocity, so a squared error on x̂0 with the second weighting counts every
    noise level as the velocity loss does.

    Raises:
        ValueError: an unknown weighting, a cap that is not above 0.
    """
    check_option("weighting", weighting, ESTIMATE_WEIGHTINGS)
    check_number("cap", cap, 0.0, open_low=True)
    if weighting == "none":
        return torch.ones_like(t)
    return t.clamp_min(LEAST_T).square().reciprocal().clamp_max(cap)


def generator_for(*key: object) -> torch.Generator:
    """A random generator on the CPU that depends on its key alone, so that nothing has to be restored on resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
