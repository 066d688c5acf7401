"""A run's log as columns of numbers, with the colour that each loss has in every picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing.sheet import INK, from_columns, in_columns
from ..runs.log import VELOCITY, RunLog

BUCKETS = 5  # of t
TOTAL = "total (minimised)"  # among the names of losses
PART = 10  # "first" and "last" are means over the first and last tenth
_VELOCITY_COLOR = "#0072b2"
# Okabe and Ito 2008 ("Color Universal Design") without yellow, which is faint on white, and wine and olive of Paul Tol's
# "muted" scheme (2021). Where there are more terms, the colours come again, dashed or hatched.
_COLORS = ("#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#882255", "#999933")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
_HATCHES = (None, "///", "...")


@dataclass(frozen=True)
class Columns:
    """The log as columns over the steps, float64; NaN where a loss was not evaluated or is not finite.

    Attributes:
        steps, total, rate, gradient_norm: ``[steps]``.
        losses: the velocity and the terms by name, raw, means over the step's samples.
        open: share of open hinges, for the terms that have hinges.
    """

    steps: Tensor
    total: Tensor
    rate: Tensor
    gradient_norm: Tensor
    losses: Mapping[str, Tensor]
    open: Mapping[str, Tensor]

    @classmethod
    def of(cls, log: RunLog) -> Columns:
        count = len(log.steps)
        if not count:
            also = f" (and {counted(len(log.validations), 'validation')})" if log.validations else ""
            raise ValueError(f"log: expected at least one training step, got none{also}")
        # all in one pass with plain lists: a log has a hundred thousand samples and more
        sums: dict[tuple[str, str], tuple[list[float], list[int]]] = {}
        for i, step in enumerate(log.steps):
            for sample in step.samples:
                for name, term in sample.terms.items():
                    for what, value in (("raw", term.raw), ("open", term.open)):
                        if value is None or not math.isfinite(value):
                            continue
                        if (name, what) not in sums:
                            sums[name, what] = [0.0] * count, [0] * count
                        total, number = sums[name, what]
                        total[i] += value
                        number[i] += 1
        means = {key: as_column(total) / as_column(number) for key, (total, number) in sums.items()}
        never = torch.full((count,), math.nan, dtype=torch.float64)
        names = sorted(log.terms, key=lambda name: name != VELOCITY)
        return cls(
            as_column(s.step for s in log.steps),
            as_column(s.loss for s in log.steps),
            as_column(s.learning_rate for s in log.steps),
            as_column(s.gradient_norm for s in log.steps),
            {name: means.get((name, "raw"), never) for name in names},
            {name: means[name, "open"] for name in names if (name, "open") in means},
        )

    @property
    def terms(self) -> list[str]:
        return [name for name in self.losses if name != VELOCITY]

    @property
    def columns(self) -> dict[str, Tensor]:
        """The total, then every loss."""
        return {TOTAL: self.total, **self.losses}

    def style(self, name: str) -> dict[str, Any]:
        """Colour and dashes, the same for a term in every panel."""
        if name in (TOTAL, VELOCITY):
            return {"color": INK if name == TOTAL else _VELOCITY_COLOR, "linestyle": "-"}
        lap, place = divmod(self.terms.index(name), len(_COLORS))
        return {"color": _COLORS[place], "linestyle": _DASHES[lap % len(_DASHES)]}

    def hatch(self, name: str) -> Optional[str]:
        return None if name == VELOCITY else _HATCHES[self.terms.index(name) // len(_COLORS) % len(_HATCHES)]


def value_of(bucket: dict[str, Any], name: str, what: str) -> Optional[float]:
    """A finite number of :meth:`RunLog.by_noise_level`, or None."""
    value = bucket["terms"].get(name, {}).get(what)
    return value if value is not None and math.isfinite(value) else None


def thirds(log: RunLog) -> tuple[Optional[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Means by noise level over the first and the last third; (None, over all) for fewer than three steps."""
    third = len(log.steps) // 3
    if not third:
        return None, log.by_noise_level(BUCKETS)
    return RunLog(steps=log.steps[:third]).by_noise_level(BUCKETS), log.by_noise_level(BUCKETS, last=third)


def as_float(value: Optional[float]) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


def as_column(values: Iterable[Optional[float]]) -> Tensor:
    return torch.tensor([as_float(v) for v in values], dtype=torch.float64)


def ends(column: Tensor) -> tuple[float, float]:
    """Means over the first and the last tenth of what was evaluated."""
    known = column[column.isfinite()]
    count = max(1, len(known) // PART)
    return float(known[:count].mean()), float(known[-count:].mean())


def last_of(column: Tensor) -> float:
    known = column[column.isfinite()]
    return float(known[-1]) if len(known) else math.nan


def smoothed(column: Tensor) -> Tensor:
    """A centred mean with triangular weights over a tenth of the run, of the values that there are; NaN where none is."""
    half = math.ceil(len(column) / 40) if len(column) >= 8 else 0
    known = column.isfinite()
    top, bottom = column.where(known, column.new_zeros(())), known.double()
    for _ in range(2):  # a box twice makes a triangle
        top, bottom = _box(top, half), _box(bottom, half)
    return (top / bottom).where(known, column.new_full((), math.nan))


def _box(x: Tensor, half: int) -> Tensor:
    """Sums over ``half`` neighbours on each side, in one pass."""
    sums, i = F.pad(x.cumsum(0), (1, 0)), torch.arange(len(x))
    return sums[(i + half + 1).clamp(max=len(x))] - sums[(i - half).clamp(min=0)]


def middle_cut(words: str, columns: int) -> str:
    """Cut in the middle, since names of terms differ at their ends."""
    words = in_columns(" ".join(words.split()))
    head = (columns - 1) // 2
    return from_columns(words if len(words) <= columns else f"{words[:head]}…{words[head + 1 - columns :]}")


def number(value: Optional[float]) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.3g}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
