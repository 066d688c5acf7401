"""A term's weight as its share of the gradient at the model's output, so that it means the same for every model and encoder."""

from __future__ import annotations

import math
from typing import Sequence

from ..objective import LossTerm

DECAY = 0.9  # of the running means, per measurement
BOUND = 1e6  # a factor is in 1 / BOUND … BOUND


def check_shares(terms: Sequence[LossTerm]) -> None:
    """ValueError unless the weights are shares that leave something to the rest."""
    total = sum(term.weight for term in terms)
    if total >= 1.0:
        listed = ", ".join(f"{term.name} {term.weight:g}" for term in terms)
        raise ValueError(
            f"weight: as shares of the gradient, the terms' weights have to leave something to flow matching: expected a sum "
            f"below 1, got {total:g} ({listed})"
        )


class Shares:
    """Factors that bring each term's gradient to its share.

    With n₀ the norm of the gradient of the velocity loss at the model's output and nᵢ that of term i of weight 1, each of one
    sample, as running means over the samples where it is not 0, and sᵢ the shares, the weight of term i becomes

        wᵢ = sᵢ / (1 − Σ s) · n₀ / nᵢ

    so that the norms of a sample where all act are to one another as the shares. A hinge that is closed has no gradient and
    does not count: its factor does not grow while it is closed, and where nothing fails the term does nothing. Until a term
    has been measured its factor is 0.

    The idea is that of GradNorm (Chen et al. 2018, https://arxiv.org/abs/1711.02257), with fixed shares and no learnt weights;
    VQGAN (Esser et al. 2021, https://arxiv.org/abs/2012.09841) balances its adversarial loss by such a ratio.

    Args:
        terms: their weights are the shares, Σ < 1.
        reference: name of the part that the rest falls to.

    Attributes:
        means: running means of log norms by name; a run that goes on brings its own.
    """

    def __init__(self, terms: Sequence[LossTerm], reference: str):
        check_shares(terms)
        self.reference = reference
        self.shares = {term.name: term.weight for term in terms if term.weight}
        self.means: dict[str, float] = {}

    def measured(self, name: str, norms: Sequence[float]) -> None:
        """Norms of the gradient of a part with its share as its weight, of one sample each; those that are 0 do not count."""
        share = self.shares.get(name, 1.0)
        logs = [math.log(n / share) for n in norms if n > 0 and math.isfinite(n)]
        if logs:
            mean = sum(logs) / len(logs)
            self.means[name] = mean if name not in self.means else DECAY * self.means[name] + (1 - DECAY) * mean

    @property
    def complete(self) -> bool:
        """Whether everything has been measured."""
        return all(name in self.means for name in (self.reference, *self.shares))

    def factor(self, name: str) -> float:
        """wᵢ / sᵢ; 0 until the term has been measured, and for one that only watches."""
        if name not in self.shares or name not in self.means or self.reference not in self.means:
            return 0.0
        factor = math.exp(self.means[self.reference] - self.means[name]) / (1.0 - sum(self.shares.values()))
        return min(BOUND, max(1 / BOUND, factor))
