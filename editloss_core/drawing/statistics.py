"""How well numbers of two kinds can be told apart, and how far that can be trusted with few pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

DRAWS = 2000
_95 = 1.959964  # standard deviations that hold 95 % of a normal distribution


class Interval(NamedTuple):
    """A number with its 95 % interval; ``low`` and ``high`` are None where one pair is all there is."""

    value: float
    low: Optional[float] = None
    high: Optional[float] = None


def auroc(positives: Tensor, negatives: Tensor) -> float:
    """Area under the ROC curve: P(positive > negative) + ½ P(positive = negative).

    The Mann-Whitney statistic by midranks, in O(n log n). 1: a threshold separates the two; 0.5: they cannot be told apart;
    below 0.5: the positives are the smaller ones.

    Args:
        positives: numbers that should be large, any shape.
        negatives: numbers that should be small, any shape.

    Raises:
        ValueError: nothing in one of them, or NaN.

    >>> auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    x, y = _numbers("positives", positives), _numbers("negatives", negatives)
    ordered = y.sort().values
    below = torch.searchsorted(ordered, x, right=False)
    up_to = torch.searchsorted(ordered, x, right=True)
    return float((below + up_to).double().mean() / (2 * len(y)))


def grouped_auroc(
    positives: Sequence[Tensor], negatives: Sequence[Tensor], draws: int = DRAWS, seed: int = 0
) -> Interval:
    """AUROC of numbers that come in groups, such as several pictures of one pair, with a 95 % interval.

    What comes from one pair is alike, so that the pairs are what is drawn anew, not the numbers: a percentile bootstrap
    over groups. It collapses where nearly every group agrees, as if four perfect pairs were proof; the interval is therefore
    at least as wide as :func:`score_interval` of as many independent numbers as there are groups. Of simulated intervals
    around an AUROC of 0.96, the bootstrap alone held the true one 31, 46 and 70 times in 100 with 4, 8 and 20 groups; the
    wider of the two held it 99 times or more, and 97 times or more around 0.6 and 0.8.

    Args:
        positives: a tensor per group; it may be empty.
        negatives: the same groups in the same order.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: different numbers of groups, nothing to compare, or NaN.
    """
    if len(positives) != len(negatives):
        raise ValueError(f"negatives: expected {len(positives)} groups like positives, got {len(negatives)}")
    kept = [(x.flatten(), y.flatten()) for x, y in zip(positives, negatives) if len(x) and len(y)]
    if not kept:
        raise ValueError("positives: expected a group with numbers of both kinds, got none")
    xs, ys = (list(side) for side in zip(*kept))
    value = auroc(torch.cat(xs), torch.cat(ys))
    count = len(kept)
    if count < 2:
        return Interval(value)
    wins = _wins(xs, ys)
    sizes = [torch.tensor([float(len(g)) for g in side], dtype=torch.float64) for side in (xs, ys)]
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(count, (draws, count), generator=generator)
    times = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
        1, picked, torch.ones(draws, count, dtype=torch.float64)
    )
    values = ((times @ wins) * times).sum(1) / ((times @ sizes[0]) * (times @ sizes[1]))
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    least, most = score_interval(value, count)
    return Interval(value, min(low, least), max(high, most))


def score_interval(value: float, count: int) -> tuple[float, float]:
    """95 % interval of an AUROC from ``count`` independent positives and as many negatives.

    All A with (A − value)² ≤ 1.96² · SE²(A), where SE is Hanley's and McNeil's with the symmetric variance of Newcombe 2006
    ("Confidence intervals for an effect size measure based on the Mann-Whitney statistic", method 5). At value 1 it is
    still an interval: 8 groups give 0.76 to 1, 24 give 0.92 to 1.

    Raises:
        ValueError: a value outside 0…1, or a count below 2.
    """
    if not 0.0 <= value <= 1.0 or count < 2:
        raise ValueError(f"value: expected 0…1 from a count of at least 2, got {value!r} from {count!r}")
    return _root(value, 0.0, count), _root(value, 1.0, count)


def quantile(values: Tensor, share: float) -> float:
    """The quantile of a few numbers, between neighbours by linear interpolation."""
    return float(values.flatten().double().quantile(share))


def _wins(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """``[groups, groups]``: how often numbers of group i on the one side exceed those of group j on the other, ties ½."""
    flat = torch.cat(list(ys)).double()
    owner = torch.cat([torch.full((len(y),), j) for j, y in enumerate(ys)])
    rows = []
    for x in xs:
        x = x.double().unsqueeze(1)
        above = ((x > flat).double() + 0.5 * (x == flat).double()).sum(0)
        rows.append(torch.zeros(len(ys), dtype=torch.float64).index_add_(0, owner, above))
    return torch.stack(rows)


def _root(value: float, end: float, count: int) -> float:
    """Where the interval stops between ``value`` and ``end``."""
    inside, outside = value, end
    for _ in range(60):
        middle = (inside + outside) / 2
        spread = middle * (1 - middle) / count**2
        spread *= 1 + (count - 1) * ((1 - middle) / (2 - middle) + middle / (1 + middle))
        if abs(middle - value) <= _95 * math.sqrt(spread):
            inside = middle
        else:
            outside = middle
    return inside


def _numbers(name: str, values: Tensor) -> Tensor:
    values = values.flatten().double()
    if not len(values) or bool(values.isnan().any()):
        raise ValueError(f"{name}: expected at least one number and no NaN, got {len(values)}")
    return values


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The interval of 95 % for a share (E. B. Wilson, Journal of the American Statistical Association 22, 1927).

    Unlike the textbook's ± 1.96 standard errors it stays within 0…1 and keeps a width at 0 of n and n of n.

    Raises:
        ValueError: n below 1, or more successes than n.

    >>> [round(end, 3) for end in wilson(0, 4)]
    [0.0, 0.49]
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes: expected 0 to n out of at least 1, got {successes!r} of {n!r}")
    centre = (successes + _95 * _95 / 2) / (n + _95 * _95)
    half = _95 / (n + _95 * _95) * math.sqrt(successes * (n - successes) / n + _95 * _95 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Share:
    """``count`` of ``n``, with Wilson's interval of 95 %."""

    count: int
    n: int

    @property
    def value(self) -> Optional[float]:
        return self.count / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.count, self.n) if self.n else (0.0, 1.0)

    def __str__(self) -> str:
        if not self.n:
            return "none judged"
        low, high = self.interval
        return f"{self.count} of {self.n} ({percent(self.count / self.n)}, 95 % interval {percent(low)} to {percent(high)})"
