"""Flow matching in velocity space: noise levels, one-step estimates, the loss, and a sampler for previews.

x_t = (1 − t)·x0 + t·ε, velocity v = ε − x0 (rectified flow, Liu et al. 2022, https://arxiv.org/abs/2209.03003; as in
FLUX). Latents are ``[B, C, h, w]`` in the model's own space, noise levels t ``[B]`` in 0…1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Callable, Optional, Protocol, Sequence

import torch
from torch import Tensor, nn

from ..checks import check_number, check_option

TIMESTEPS = ("logit_normal", "uniform", "shifted")
ESTIMATE_WEIGHTINGS = ("none", "inverse_square")
LEAST_T = 0.1  # below it x̂0 is nearly x_t whatever the model says


class Denoiser(Protocol):
    """A model that predicts velocity.

    Attributes:
        module: the network; LoRA layers are found in it, by the names that files use (without prefix).
        device: where it wants its inputs.

    The self-check (:mod:`~editloss_core.training.self_check`) also uses what a denoiser has of these:

    * ``program``: what it runs in, with its version; ``dtype``: what it computes in; ``patches``: text that changes with
      what else acts on the model; ``code``: folders or files whose code it depends on.
    * ``stock_velocity(x_t, t, reference, conditioning)``: what the program's own sampling path computes for a batch of one
      pair at one noise level, with the one conditioning object.
    * ``exact_products()``: a context in which quantised layers do not round their inputs.
    """

    module: nn.Module
    device: torch.device

    def __call__(self, x_t: Tensor, t: Tensor, references: Sequence[Tensor], conditioning: Sequence[Any]) -> Tensor:
        """Velocity ``[B, C, h, w]`` in float32, differentiable with respect to x_t and the LoRA's weights.

        Args:
            x_t: ``[B, C, h, w]`` float32.
            t: ``[B]`` float32 in 0…1.
            references: latents ``[B, C, h', w']`` that the model looks at: the before picture.
            conditioning: B objects, one per sample, that only the denoiser understands.
        """
        ...


@dataclass(frozen=True)
class Timesteps:
    """How noise levels are drawn in training.

    ``"uniform"``; ``"logit_normal"``: t = sigmoid(mean + std·n), n ~ N(0, 1) (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206); ``"shifted"``: the same with the mean raised by μ, FLUX's shift, a straight line
    through 0.5 at 256 and 1.15 at 4096 tokens, so that large pictures train at higher noise
    (https://github.com/black-forest-labs/flux).

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

    def __post_init__(self):
        check_option("timesteps", self.kind, TIMESTEPS)
        check_number("timestep mean", self.mean, -10.0)
        check_number("timestep std", self.std, 0.0, open_low=True)
        for name in ("minimum", "maximum"):
            check_number(f"{name} t", getattr(self, name), 0.0)
        if not self.minimum < self.maximum <= 1.0:
            raise ValueError(
                f"minimum t: expected 0 ≤ minimum < maximum ≤ 1, got minimum {self.minimum:g}, maximum {self.maximum:g}"
            )

    def draw(self, count: int, tokens: int, generator: torch.Generator) -> Tensor:
        """``[count]`` noise levels for pictures of ``tokens`` tokens, by the inverse of the distribution function."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        ends = torch.tensor([self.minimum, self.maximum], dtype=torch.float64)
        if self.kind == "uniform":
            low, high = ends
            return (low + u * (high - low)).float()
        mean = self.mean + (shift(tokens) if self.kind == "shifted" else 0.0)
        ends = (torch.logit(ends) - mean) / self.std
        side = -1.0 if ends[0] > 0 else 1.0  # the upper tail by its mirror image: beside 1 there are no digits left
        low, high = 0.5 * torch.special.erfc(-side * ends / math.sqrt(2.0))  # ndtr itself is 0 from −8.3 on
        t = torch.sigmoid(mean + side * self.std * torch.special.ndtri(low + u * (high - low)))
        return t.clamp(self.minimum, self.maximum).float()


def shift(tokens: int) -> float:
    """FLUX's μ: logit(t) is raised by it."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def token_count(latents: Tensor, patch: int = 2) -> int:
    """Tokens of one picture whose latents are cut into patches."""
    return math.ceil(latents.shape[-2] / patch) * math.ceil(latents.shape[-1] / patch)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·x0 + t·ε."""
    return torch.lerp(x0, noise, _per_sample(t, x0))


def estimate(x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """x̂0 = x_t − t·v̂; its error is t times the velocity's."""
    return x_t - _per_sample(t, x_t) * velocity


def velocity_loss(predicted: Tensor, target: Tensor, mask: Optional[Tensor] = None, edit_weight: float = 1.0) -> Tensor:
    """Σ w·(v̂ − v)² / Σ w per sample, with w = ``edit_weight`` inside the edit and 1 outside.

    Args:
        predicted, target: ``[B, C, h, w]``.
        mask: ``[B, h, w]`` in 0…1 at latent resolution, 1 = edited; None weighs all alike.
        edit_weight: above 1 looks at the edit more.

    Returns:
        ``[B]`` in float32.
    """
    if mask is not None and mask.shape != (len(predicted), *predicted.shape[2:]):
        raise ValueError(
            f"mask: expected {[len(predicted), *predicted.shape[2:]]} like the latents, got {list(mask.shape)}"
        )
    error = (predicted.float() - target.float()).square().mean(1)
    if mask is None or edit_weight == 1.0:
        return error.flatten(1).mean(1)
    weights = 1.0 + (edit_weight - 1.0) * mask.to(error)
    return (weights * error).flatten(1).sum(1) / weights.flatten(1).sum(1)


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


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    references: Sequence[Tensor],
    conditioning: Sequence[Any],
    steps: int = 20,
    progress: Optional[Callable[[int, int], None]] = None,
) -> Tensor:
    """Latents by Euler's method from pure noise, on FLUX's schedule (shifted by μ of the picture's size).

    Args:
        denoiser, references, conditioning: as in :class:`Denoiser`.
        noise: ε ``[B, C, h, w]``.
        steps: calls of the model.
        progress: called with (done, steps).
    """
    raised = shift(token_count(noise))
    times = torch.sigmoid(torch.logit(torch.linspace(1, 0, steps + 1, dtype=torch.float64)) + raised).float()
    x = noise
    for i, (t, following) in enumerate(zip(times, times[1:])):
        v = denoiser(x, t.expand(len(x)).to(x.device), references, conditioning)
        x = x + (following - t).item() * v.to(x)
        if progress is not None:
            progress(i + 1, steps)
    return x
