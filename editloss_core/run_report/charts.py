"""Charts of a run as inline SVG, whose colours follow the page: light or dark."""

from __future__ import annotations

import math
from typing import Mapping, Optional, Sequence

from markupsafe import Markup
from torch import Tensor

from ..drawing.colours import VERDICT_COLORS
from ..drawing.statistics import percent
from ..runs.log import VELOCITY, RunLog
from ..verdict.judge import FAILURES
from .columns import BUCKETS, Columns, smoothed, value_of
from .plotting import thinned
from .verdicts import RunVerdicts

_BASE = "base"
PANEL = 262, 150  # width and height of a small chart, in pixels


class _Axes:
    """A frame with ticks; places are in the numbers of the data."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float], foot: int = 24):
        self.width, self.height, self.x, self.y = width, height, x, y
        left = 40
        self.box = left, 10, width - left - 12, height - 10 - foot  # left, top, width, height
        self.parts: list[Markup] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, width, height = self.box
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return round(left + across * width, 1), round(top + height - min(max(up, -0.05), 1.05) * height, 1)

    def add(self, pattern: str, *values: object) -> None:
        """A part; what is put in for {} is escaped."""
        self.parts.append(Markup(pattern).format(*values))

    def y_ticks(self, ticks: Mapping[float, str]) -> None:
        for value, words in ticks.items():
            _, y = self.at(self.x[0], value)
            left = self.box[0]
            self.add('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', left, left + self.box[2], y, y)
            self.add('<text x="{}" y="{}" class="tick end">{}</text>', left - 6, y + 3.5, words)

    def x_ticks(self, ticks: Mapping[float, str]) -> None:
        for value, words in ticks.items():
            x, _ = self.at(value, self.y[0])
            self.add('<text x="{}" y="{}" class="tick mid">{}</text>', x, self.height - 7, words)

    def line(self, xs: Sequence[float], ys: Sequence[float], color: str, style: str = "") -> None:
        places = [self.at(x, y) for x, y in zip(xs, ys) if math.isfinite(y)]
        points = " ".join(f"{x:g},{y:g}" for x, y in places)
        if len(places) == 1:
            self.dot(xs[0], ys[0], color)
        elif places:
            self.add('<polyline class="data" points="{}" stroke="{}" {}/>', points, color, Markup(style))

    def dot(self, x: float, y: float, color: str, hollow: bool = False, title: str = "") -> None:
        if math.isfinite(y):
            self.add(
                '<circle class="data" cx="{}" cy="{}" r="3.4" stroke="{}" fill="{}"><title>{}</title></circle>',
                *self.at(x, y), color, "var(--panel)" if hollow else color, title or f"{y:.3g}",
            )  # fmt: skip

    def svg(self, label: str) -> Markup:
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, label, Markup("").join(self.parts)
        )


def failure_rates(run: RunVerdicts) -> Markup:
    """A column per validation, the base first: the share of each failure, and the interval of all failures together."""
    judged = [v for v in (run.base, *run.validations) if v.failing.n]
    axes = _Axes(560, 376, (-0.6, len(judged) - 0.4), (0.0, 1.0), foot=40)
    axes.y_ticks({k / 4: f"{25 * k} %" for k in range(5)})
    often = -(-len(judged) // 16)
    for i, validation in enumerate(judged):
        bottom = 0.0
        chosen = run.best is validation
        for failure in FAILURES:
            share = validation.judged_as(failure)
            if share.count:
                (x0, y0), (x1, y1) = axes.at(i - 0.34, bottom + share.value), axes.at(i + 0.34, bottom)
                axes.add(
                    '<rect class="data" x="{}" y="{}" width="{}" height="{}" fill="{}"><title>{}: {}</title></rect>',
                    x0, y0, round(x1 - x0, 1), round(y1 - y0, 1), VERDICT_COLORS[failure], failure, share,
                )  # fmt: skip
                bottom += share.value
        if not bottom:
            x, y = axes.at(i, 0)
            axes.add('<text x="{}" y="{}" class="tick mid">none fails</text>', x, y - 6)
        low, high = validation.failing.interval
        (x, top), (_, foot) = axes.at(i, high), axes.at(i, low)
        for style in ("halo", "whisker"):  # dark on dark bars, without a halo
            axes.add(
                '<path class="{5}" d="M{0} {1}V{2}M{3} {1}h8M{3} {2}h8"><title>all failures: {4}</title></path>',
                x, top, foot, x - 4, validation.failing, style,
            )  # fmt: skip
        if i % often == 0 or chosen:
            name = _BASE if validation.step is None else f"{validation.step:,}"
            axes.add(
                '<text x="{}" y="{}" class="tick mid{}">{}</text>', x, axes.height - 23, " strong" if chosen else "",
                f"{name} ★" if chosen else name,
            )  # fmt: skip
            axes.add('<text x="{}" y="{}" class="tick mid">n {}</text>', x, axes.height - 8, validation.failing.n)
    return axes.svg("Share of failing outputs at each validation")


def failure_rate(run: RunVerdicts, failure: str) -> Markup:
    """One failure over the validations, with its interval; dotted: the base."""
    judged = [v for v in run.validations if v.failing.n]
    steps = [v.step for v in judged]
    axes = _Axes(*PANEL, _widened(steps), (0.0, 1.0))
    axes.y_ticks({0.0: "0 %", 0.5: "50 %", 1.0: "100 %"})
    axes.x_ticks(_step_ticks(steps))
    shares = [v.judged_as(failure) for v in judged]
    ends = [axes.at(s, x.interval[1]) for s, x in zip(steps, shares)]
    ends += [axes.at(s, x.interval[0]) for s, x in reversed(list(zip(steps, shares)))]
    if len(judged) > 1:
        points = " ".join(f"{x:g},{y:g}" for x, y in ends)
        axes.add('<polygon class="data" points="{}" fill="{}" opacity="0.2"/>', points, VERDICT_COLORS[failure])
    else:
        axes.add('<path class="whisker" d="M{} {}V{}"/>', *ends[0], ends[1][1])
    if run.base.failing.n:
        value = run.base.judged_as(failure).value
        (x0, y), (x1, _) = axes.at(axes.x[0], value), axes.at(axes.x[1], value)
        axes.add('<line class="threshold" x1="{}" x2="{}" y1="{}" y2="{}"/>', x0, x1, y, y)
    axes.line(steps, [x.value for x in shares], VERDICT_COLORS[failure])
    for step, share in zip(steps, shares):
        axes.dot(step, share.value, VERDICT_COLORS[failure], title=f"step {step:,}: {share}")
    return axes.svg(f"{failure}: share of the outputs over the steps")


def signal_and_judge(run: RunVerdicts, failure: str) -> Optional[Markup]:
    """Over the validations: the judge's mean score (line) and how far the terms say the outputs went (dashes)."""
    names = run.terms_of.get(failure, [])
    points = [(v.step, v.score(failure), v.toward(names)) for v in run.validations if v.outputs]
    values = [x for _, *pair in points for x in pair if x is not None]
    if not values:
        return None
    steps = [step for step, *_ in points]
    axes = _Axes(*PANEL, _widened(steps), (0.0, max(1.0, min(1.5, max(values)))))
    axes.y_ticks({0.0: "0", 0.5: "0.5", 1.0: "1"})
    axes.x_ticks(_step_ticks(steps))
    (x0, y), (x1, _) = axes.at(axes.x[0], 0.5), axes.at(axes.x[1], 0.5)
    axes.add('<line class="threshold" x1="{}" x2="{}" y1="{}" y2="{}"/>', x0, x1, y, y)
    for place, color, style in ((1, VERDICT_COLORS[failure], ""), (2, "var(--ink)", 'stroke-dasharray="5 4"')):
        known = [(step, pair[place - 1]) for step, *pair in points if pair[place - 1] is not None]
        axes.line(*([list(c) for c in zip(*known)] or ([], [])), color, style)
        for step, value in known:
            axes.dot(step, value, color, hollow=place == 2)
    return axes.svg(f"{failure}: judge and signal over the steps")


def term(log: RunLog, columns: Columns, name: str) -> Markup:
    """A loss over the steps: every step (thin), smoothed, and the held-out pairs with the LoRA (full) and without."""
    column, color = columns.losses[name], columns.style(name)["color"]
    smooth = smoothed(column)
    held_out = [
        (v.step, v.velocity, v.velocity_base) if name == VELOCITY
        else (v.step, v.terms.get(name), v.terms_base.get(name))
        for v in log.validations
    ]  # fmt: skip
    ends = [x for _, *pair in held_out for x in pair if x is not None]
    known = column[column.isfinite()]
    tops = [*ends, *smooth[smooth.isfinite()].tolist(), *([float(known.quantile(0.98))] if len(known) else [])]
    high = max(tops, default=1.0) or 1.0
    axes = _Axes(*PANEL, _widened(columns.steps.tolist()), (0.0, 1.06 * high))
    axes.y_ticks({tick: f"{tick:g}" for tick in _ticks(0.0, high, 3)})
    axes.x_ticks(_step_ticks(columns.steps.tolist()))
    for part, style in ((column, 'opacity="0.3" style="stroke-width:0.8"'), (smooth, "")):
        steps, values = _finite(columns.steps, part)
        axes.line(steps, values, color, style)
    for step, with_lora, without in held_out:
        for value, hollow in ((without, True), (with_lora, False)):
            if value is not None:
                axes.dot(step, value, color, hollow)
    return axes.svg(f"{name} over the steps")


def gradient_shares(log: RunLog, columns: Columns) -> Optional[Markup]:
    """By noise level: which part of the gradient at the model's output each loss has. None if it was not measured."""
    axes = _Axes(520, 240, (0.0, 1.0), (0.0, 1.0))
    axes.y_ticks({0.0: "0 %", 0.5: "50 %", 1.0: "100 %"})
    axes.x_ticks({k / BUCKETS: f"t {k / BUCKETS:g}" for k in range(BUCKETS + 1)})
    measured = False
    for bucket in log.by_noise_level(BUCKETS):
        middle, bottom = sum(bucket["t"]) / 2, 0.0
        for name in columns.losses:
            share = value_of(bucket, name, "share")
            if share:
                measured = True
                (x0, y0), (x1, y1) = axes.at(middle - 0.085, bottom + share), axes.at(middle + 0.085, bottom)
                axes.add(
                    '<rect class="data" x="{}" y="{}" width="{}" height="{}" fill="{}"><title>{}: {}</title></rect>',
                    x0, y0, round(x1 - x0, 1), round(y1 - y0, 1), columns.style(name)["color"], name, percent(share),
                )  # fmt: skip
                if share > 0.12:
                    axes.add(
                        '<text x="{}" y="{}" class="inside">{}</text>', (x0 + x1) / 2, (y0 + y1) / 2 + 4, percent(share)
                    )
                bottom += share
        if not bottom:
            axes.add('<text x="{}" y="{}" class="tick mid">not measured</text>', *axes.at(middle, 0.5))
    return axes.svg("Share of the gradient by noise level") if measured else None


def _finite(steps: Tensor, column: Tensor) -> tuple[list[float], list[float]]:
    known = column.isfinite()
    if not bool(known.any()):
        return [], []
    steps, column = thinned(steps[known], column[known])
    return steps.tolist(), column.tolist()


def _widened(steps: Sequence[float]) -> tuple[float, float]:
    low, high = min(steps), max(steps)
    pad = max(0.03 * (high - low), 0.5)
    return low - pad, high + pad


def _step_ticks(steps: Sequence[float]) -> dict[float, str]:
    low, high = min(steps), max(steps)
    if low == high:
        return {low: f"step {low:,.0f}"}
    ticks = [t for t in _ticks(low, high, 5) if t == int(t)]
    return {t: f"{t:,.0f}" for t in ticks}


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about ``count`` of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= count)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
