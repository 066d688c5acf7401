"""A run's log as one picture, as a small live picture, and as text: what each term did, and at which noise levels."""

from __future__ import annotations

import math
from typing import Optional

from torch import Tensor

from ..drawing.sheet import LINE, MUTED, Sheet, cell, new_figure, percent, pixels, wrapped
from ..runs.log import VELOCITY, RunLog, ValidationLog
from .columns import (
    BUCKETS,
    TOTAL,
    Columns,
    as_column,
    as_float,
    counted,
    ends,
    last_of,
    middle_cut,
    number,
    smoothed,
    thirds,
    value_of,
)
from .plotting import draw_held_out, draw_line, draw_raw, frame, level_frame, say, scale


def picture(log: RunLog, width: int = 1600) -> Tensor:
    """What a run did, on one page.

    Above, the total and the velocity loss over the steps, with held-out pairs where they were validated, the learning
    rate and the gradient's norm. Then a panel per term of the objective with its raw loss and the share of open hinges.
    Below, by noise level: how much of the gradient came from which term, and each loss in the first third of the run
    against the last.

    Args:
        log: with at least one step.
        width: of the picture, in pixels.

    Returns:
        ``[1, height, width, 3]`` in 0…1.

    Raises:
        ValueError: a log without steps.
    """
    run = Columns.of(log)
    figure = new_figure(width, CurvesSheet.WIDTH, CurvesSheet.height_for(len(run.terms)))
    CurvesSheet(figure, log, run).draw()
    return pixels(figure)[None]


def live(log: RunLog, width: int = 768, height: int = 384) -> Tensor:
    """A small picture for a progress preview: total, velocity and terms, smoothed, with their last values.

    Args:
        log: with at least one step.
        width, height: of the picture, in pixels.

    Returns:
        ``[height, width, 3]`` in 0…1.

    Raises:
        ValueError: a log without steps.
    """
    run = Columns.of(log)
    inches = 6.0, 6.0 * height / width
    figure = new_figure(width, *inches)
    page = Sheet(figure)
    names_at, top = inches[0] - 2.4, 0.4
    axes = page.axes(0.6, top, names_at - 0.75, inches[1] - top - 0.45)
    curves = {name: smoothed(column) for name, column in run.columns.items()}
    scale(axes, [], list(curves.values()), may_be_log=True)
    for name, curve in curves.items():
        draw_line(axes, run.steps, curve, run.style(name), 3.0 if name == TOTAL else 1.5)
    frame(axes, run.steps, "step")
    page.write(0.6, 0.2, f"step {int(run.steps[-1]):,}", fontsize=10, weight="bold")
    page.write(inches[0] - 0.12, 0.2, "last, smoothed", fontsize=7, color=MUTED, ha="right")
    room = max(1, int((inches[1] - top - 0.1) / 0.19))
    shown = list(curves) if len(curves) <= room else list(curves)[: room - 1]
    for row, name in enumerate(shown):
        y = top + 0.1 + 0.19 * row
        page.line((names_at, names_at + 0.22), y, **run.style(name), linewidth=2.2)
        page.write(names_at + 0.3, y, middle_cut(name, 21), fontsize=8)
        page.write(inches[0] - 0.12, y, number(last_of(curves[name])), fontsize=8, ha="right")
    if len(shown) < len(curves):
        page.write(names_at + 0.3, top + 0.1 + 0.19 * len(shown), f"and {len(curves) - len(shown)} more", fontsize=8, color=MUTED)  # fmt: skip
    return pixels(figure)


def text(log: RunLog) -> str:
    """The run as Markdown: a table of losses, one by noise level, and the last validation.

    "First" and "last" are means over the first and last tenth of the steps at which a loss was evaluated. Raises
    ValueError for a log without steps.
    """
    run = Columns.of(log)
    whole = log.by_noise_level(1)[0]["terms"]
    lines = [
        f"**{counted(len(log.steps), 'step')}**, {counted(len(run.terms), 'term')}",
        "",
        "| loss | first → last | change | open hinges | gradient share |",
        "|---|---|---|---|---|",
    ]
    for name, column in run.columns.items():
        first, last = ends(column)
        change = f"{last / first - 1:+.0%}" if first and math.isfinite(last / first) else "–"
        numbers = whole.get(name, {}) if name != TOTAL else {}
        cells = (cell(name), f"{number(first)} → {number(last)}", change, percent(numbers.get("active")), percent(numbers.get("share")))  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    early, late = thirds(log)
    buckets = log.by_noise_level(BUCKETS)
    lines += ["", "| loss by noise level | " + " | ".join(f"t {b['t'][0]:g}–{b['t'][1]:g}" for b in buckets) + " |"]
    lines.append("|---" * (1 + BUCKETS) + "|")
    for name in run.losses:
        cells = []
        for k, bucket in enumerate(buckets):
            share = value_of(bucket, name, "share")
            raw = [value_of(part[k], name, "raw") for part in (early, late) if part]
            change = "–" if raw.count(None) == len(raw) else " → ".join(map(number, raw))
            cells.append(change + ("" if share is None else f" ({share:.0%})"))
        lines.append(f"| {cell(name)} | " + " | ".join(cells) + " |")
    part = "Means over the first third of the steps → over the last third" if early else "Means over all steps"
    lines += ["", f"{part}; in brackets the share of the summed gradient norms at the model's output, over all steps."]
    if log.validations:
        lines += ["", *_validation_text(log.validations[-1])]
    return "\n".join(lines)


def _validation_text(last: ValidationLog) -> list[str]:
    lines = [f"| held-out pairs, step {last.step} | without LoRA | with LoRA | change |", "|---|---|---|---|"]
    rows = {VELOCITY: (last.velocity_base, last.velocity)}
    rows.update((f"{VELOCITY} at t {t}", (base, lora)) for t, (lora, base) in last.noise_levels.items())
    rows.update((name, (last.terms_base.get(name), value)) for name, value in last.terms.items())
    for name, (base, lora) in rows.items():
        base, lora = as_float(base), as_float(lora)
        change = f"{lora / base - 1:+.1%}" if base and math.isfinite(lora / base) else "–"
        lines.append(f"| {cell(name)} | {number(base)} | {number(lora)} | {change} |")
    return lines


class CurvesSheet(Sheet):
    """The layout of :func:`picture`: the run, four panels of terms in a row, then six places in a row by noise level."""

    WIDTH, LEFT = 16.0, 0.3
    RUN, HEAD = 5.0, 0.75  # heights
    TERM = 3.85, 2.45  # width and height of a panel with its words
    LEVEL = 2.57, 2.35

    @classmethod
    def height_for(cls, terms: int) -> float:
        rows, levels = -(-terms // 4), -(-(terms + 3) // 6)  # the gradient takes two places, the velocity one
        return cls.RUN + cls.HEAD + rows * cls.TERM[1] + cls.HEAD + levels * cls.LEVEL[1] + 0.1

    def __init__(self, figure, log: RunLog, run: Columns):
        super().__init__(figure)
        self.log, self.run = log, run

    def draw(self) -> None:
        self.draw_run()
        top = self.RUN
        terms = self.run.terms
        if terms:
            words = "raw loss before weights. Thin: every step; thick: smoothed; grey and dotted: share of open hinges (right)"
            if any(v.terms for v in self.log.validations):
                words += "; ● held-out pairs with the LoRA, ○ without"
            self.head(top, "Terms of the objective", words)
        else:
            self.head(top, "Terms of the objective", "none: this run trained on the velocity loss alone")
        top += self.HEAD
        for i, name in enumerate(terms):
            self.draw_term(name, self.LEFT + i % 4 * self.TERM[0], top + i // 4 * self.TERM[1])
        top += -(-len(terms) // 4) * self.TERM[1]
        self.head(
            top, "By noise level", "t from 0 (clean) to 1 (noise). Raw losses, mean over the first third of the run (pale) and "
            "over the last third (full colour); –: never evaluated there",
        )  # fmt: skip
        top += self.HEAD
        self.draw_shares(self.LEFT, top)
        early, late = thirds(self.log)
        for i, name in enumerate(self.run.losses, start=2):
            self.draw_levels(name, early, late, self.LEFT + i % 6 * self.LEVEL[0], top + i // 6 * self.LEVEL[1])

    def head(self, top: float, title: str, words: str) -> None:
        self.line((self.LEFT, self.WIDTH - self.LEFT), top, color=LINE, linewidth=1.0)
        self.write(self.LEFT, top + 0.25, title, fontsize=13, weight="bold")
        self.write(self.LEFT, top + 0.5, words, color=MUTED)

    def draw_run(self) -> None:
        run, log = self.run, self.log
        changes = (f"{name} {number(a)} → {number(b)}" for name in (TOTAL, VELOCITY) if name in run.columns for a, b in [ends(run.columns[name])])  # fmt: skip
        self.write(self.LEFT, 0.3, f"Training: {counted(len(run.steps), 'step')}", fontsize=15, weight="bold")
        self.write(self.LEFT, 0.6, ", ".join(changes) + "  (means of the first and last tenth)", color=MUTED)
        axes = self.axes(0.95, 1.2, 10.3, 3.2)
        shown = {name: run.columns[name] for name in (TOTAL, VELOCITY) if name in run.columns}
        smooth = {name: smoothed(column) for name, column in shown.items()}
        held_out = [(v.velocity, v.velocity_base) for v in log.validations]
        scale(axes, list(shown.values()), [*smooth.values(), *(as_column(pair) for pair in held_out)], may_be_log=True)
        for name in shown:
            draw_raw(axes, run.steps, shown[name], run.style(name)["color"])
        handles = {}
        for name, wide in zip(shown, (3.2, 1.6)):  # where they are the same, both are to be seen
            handles[name] = draw_line(axes, run.steps, smooth[name], run.style(name), wide)
        legend = [(handles[name], name) for name in shown]
        if held_out:
            with_lora, without = draw_held_out(axes, log, run.style(VELOCITY)["color"], held_out, lines=True)
            legend += [(with_lora, "velocity, held-out pairs"), (without, "the same without LoRA")]
        axes.legend(
            *zip(*legend), loc="lower left", bbox_to_anchor=(-0.008, 1.0), ncols=4, frameon=False, fontsize=9, handlelength=2.2,
        )  # fmt: skip
        frame(axes, run.steps, "step", "loss, log scale" if axes.get_yscale() == "log" else "loss")
        for top, title, column in (
            (1.2, "learning rate", run.rate),
            (3.25, "gradient norm before clipping", run.gradient_norm),
        ):
            axes = self.axes(12.35, top, 3.3, 1.15)
            smooth = column if title == "learning rate" else smoothed(column)
            scale(axes, [column], [smooth])
            if smooth is not column:
                draw_raw(axes, run.steps, column, MUTED)
            draw_line(axes, run.steps, smooth, {"color": MUTED})
            frame(axes, run.steps, "step")
            self.write(12.35, top - 0.17, title)

    def titled(self, name: str, left: float, top: float, columns: int) -> None:
        """The colour, and a name in up to two lines that end above the panel."""
        self.write(left, top, "■", color=self.run.style(name)["color"], fontsize=10)
        words = wrapped(middle_cut(name, 2 * columns - 4), columns, 2) or "(no name)"
        self.write(left + 0.2, top, words, weight="bold", linespacing=1.05)

    def draw_term(self, name: str, left: float, top: float) -> None:
        column, log = self.run.losses[name], self.log
        self.titled(name, left + 0.1, top + 0.15, 38)
        axes = self.axes(left + 0.6, top + 0.42, self.TERM[0] - 1.15, 1.5)
        points = [(v.terms.get(name), v.terms_base.get(name)) for v in log.validations]
        smooth = smoothed(column)
        scale(axes, [column], [smooth, *(as_column(pair) for pair in points)])
        if name in self.run.open:
            right = axes.twinx()
            draw_line(right, self.run.steps, smoothed(self.run.open[name]), {"color": MUTED, "linestyle": ":"})
            right.set(ylim=(-0.03, 1.03), yticks=(0, 0.5, 1), yticklabels=("0 %", "50 %", "100 %"))
            frame(right, self.run.steps, grid=False)
        style = self.run.style(name)
        draw_raw(axes, self.run.steps, column, style["color"])
        draw_line(axes, self.run.steps, smooth, style)
        if any(v is not None for pair in points for v in pair):
            draw_held_out(axes, log, style["color"], points)
        frame(axes, self.run.steps, "step")
        if not column.isfinite().any():
            say(axes, "never a finite value")

    def draw_shares(self, left: float, top: float) -> None:
        """How much of the gradient at the model's output came from which loss."""
        self.write(left + 0.1, top + 0.15, "share of the gradient", weight="bold")
        axes = self.axes(left + 0.6, top + 0.42, self.LEVEL[0] - 0.55, 1.4)
        names = list(self.run.losses)
        buckets = self.log.by_noise_level(BUCKETS)
        base = [0.0] * BUCKETS
        places = [sum(b["t"]) / 2 for b in buckets]
        for name in names:
            shares = [value_of(b, name, "share") or 0.0 for b in buckets]
            axes.bar(
                places, shares, 0.85 / BUCKETS, base, color=self.run.style(name)["color"], hatch=self.run.hatch(name),
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            base = [b + s for b, s in zip(base, shares)]
        level_frame(axes)
        axes.set(ylim=(0, 1), yticks=(0, 0.5, 1), yticklabels=("0 %", "50 %", "100 %"))
        if not any(base):
            say(axes, "not measured in this run\n(gradients_every is 0,\nor it was too short)")
            return
        for place, height in zip(places, base):
            if not height:
                axes.text(place, 0.5, "not measured", rotation=90, ha="center", va="center", color=MUTED, fontsize=7)
        shown = names[-14:]
        step = min(0.2, 1.9 / len(shown))
        for row, name in enumerate(reversed(shown)):  # as they lie on each other
            x, y = left + self.LEVEL[0] + 0.2, top + 0.3 + step * row
            self.patch(x, y, color=self.run.style(name)["color"], hatch=self.run.hatch(name))
            self.write(x + 0.25, y, middle_cut(name, 32), fontsize=7.5)
        if len(shown) < len(names):
            self.write(x + 0.25, y + step, f"and {len(names) - len(shown)} more", fontsize=7.5, color=MUTED)

    def draw_levels(self, name: str, early: Optional[list[dict]], late: list[dict], left: float, top: float) -> None:
        self.titled(name, left + 0.1, top + 0.15, 24)
        axes = self.axes(left + 0.6, top + 0.42, self.LEVEL[0] - 0.75, 1.4)
        color, width = self.run.style(name)["color"], 0.4 / BUCKETS
        values = [[value_of(b, name, "raw") for b in part] for part in (early or [], late) if part]
        finite = [v for part in values for v in part if v is not None]
        scale(axes, [], [as_column([0.0, *finite])])
        for k, bucket in enumerate(late):
            middle = sum(bucket["t"]) / 2
            for i, part in enumerate(values):
                place = middle + (i - (len(values) - 1) / 2) * width
                if part[k] is not None:
                    axes.bar(place, part[k], width, color=color, alpha=0.35 if i < len(values) - 1 else 1.0)
                if not part[k]:  # a bar of height 0 is not to be seen
                    words = "–" if part[k] is None else "0"
                    axes.annotate(words, (place, 0), (0, 2), textcoords="offset points", ha="center", color=MUTED, fontsize=7)  # fmt: skip
        level_frame(axes)
