"""An objective's report as text and as one picture: which output fails, by which term, and where."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Mapping, Optional

import torch
from torch import Tensor

from .drawing.colours import VERDICT_COLORS, color_of
from .drawing.sheet import BAD, GOOD, INK, LINE, MUTED, WARN, Sheet, cell, cut, new_figure, percent, wrapped
from .encoders.base import check_images
from .objective import NOT_A_NUMBER, TERMS, ObjectiveReport, TermReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAILURE_NAMES = {
    "no edit": "NO EDIT",
    "distorted": "DISTORTED",
    "overlay": "OVERLAY",
    None: "no failure signal",
    NOT_A_NUMBER: "NOT A NUMBER",
}
MAX_COLUMNS = 8  # outputs in one picture; the text has them all


def text_table(report: ObjectiveReport) -> str:
    """The report as a Markdown table of terms, then one of outputs."""
    lines = [
        f"**total {float(report.total.detach()):.4f}**, {len(report.terms)} terms",
        "",
        "| term | weight | value | weighted | active | mean distances |",
        "|---|---|---|---|---|---|",
    ]
    for t in report.terms:
        distances = ", ".join(f"{label} {float(d.detach().mean()):.4f}" for label, d in t.distances.items())
        lines.append(
            f"| {cell(t.term.name)} | {t.term.weight:g} | {float(t.value.detach()):.4f} | {float(t.weighted.detach()):.4f} "
            f"| {percent(t.active)} | {distances} |"
        )
    lines += ["", "| output | signal | " + " | ".join(cell(t.term.name) for t in report.terms) + " |"]
    lines.append("|---" * (2 + len(report.terms)) + "|")
    for i, failure in enumerate(_signal(report)):
        cells = " | ".join(f"{float(t.per_sample[i].detach()):.4f}{_toward(t, i)}" for t in report.terms)
        lines.append(f"| {i + 1} | {failure} | {cells} |")
    lines += [
        "",
        "In brackets: how far the output went towards the failure (0 % at the target, 100 % at the negative, or as far off "
        "as the picture before the edit). This reads the training signal; it is not an independent judge.",
    ]
    return "\n".join(lines)


def _signal(report: ObjectiveReport) -> list[str]:
    """The signal in words; an en dash where no term can tell."""
    if all(t.toward_failure is None or not TERMS[t.term.kind].failure for t in report.terms):
        return ["–"] * len(report.terms[0].per_sample)
    return [FAILURE_NAMES[failure] for failure in report.signal()]


def _toward(t: TermReport, i: int) -> str:
    return "" if t.toward_failure is None else f" ({float(t.toward_failure[i]):.0%})"


def picture(
    report: ObjectiveReport,
    pred: Optional[Tensor] = None,
    gt: Optional[Tensor] = None,
    src: Optional[Tensor] = None,
    width: int = 1600,
) -> Tensor:
    """The report over the pictures it is about.

    One column per output (a band per output where there are one or two): what the signal says, how far the output went
    towards each failure, before, after and output, then one heat map per term that has tokens, laid over the output.
    Red: nearer to the negative than to the target (hinge terms), or far from the target (match terms). Tokens that did
    not count are pale.

    Args:
        report: from :meth:`EditObjective.evaluate` with ``details=True``.
        pred: outputs ``[B, H, W, 3]`` in 0…1; B = 1 stands for the whole batch; None draws the maps on plain grey.
        gt, src: after and before pictures, B or 1 of them.
        width: of the picture, in pixels.

    Returns:
        ``[1, height, width, 3]`` in 0…1.

    Raises:
        ValueError: numbers of pictures that do not fit the report.
    """
    total = len(report.terms[0].per_sample)
    for name, images in (("pred", pred), ("gt", gt), ("src", src)):
        if images is not None:
            check_images(name, images)
            if len(images) not in (1, total):
                raise ValueError(f"{name}: expected 1 or {total} pictures like the report, got {len(images)}")
    rows = {"before": src, "after": gt, "output": pred}
    ground = pred  # what the maps are drawn on
    if ground is None:
        shape = next((images.shape[1:] for images in (gt, src) if images is not None), (256, 256, 3))
        ground = torch.full((1, *shape), 0.6)
    return ObjectiveSheet(report, ground, rows, min(total, MAX_COLUMNS), width).rendered()


class ObjectiveSheet(Sheet):
    """The layout, in inches from the top left: a column per output, or for one or two outputs a band each."""

    LABEL, CELL, GAP, PER_BAND = 2.3, 2.15, 0.12, 6

    def __init__(
        self, report: ObjectiveReport, ground: Tensor, rows: Mapping[str, Optional[Tensor]], shown: int, width: int
    ):
        self.report, self.ground, self.shown = report, ground, shown
        self.rows = {name: images for name, images in rows.items() if images is not None}
        self.items: list[str | TermReport] = [*self.rows, *(t for t in report.terms if t.token_map is not None)]
        aspect = min(max(ground.shape[1] / ground.shape[2], 0.4), 1.8)  # beyond it pictures get margins
        self.height = self.CELL * aspect
        self.bars = 0.26 * max(1, sum(t.toward_failure is not None for t in report.terms)) + 0.1
        self.in_bands = shown <= 2
        step = self.CELL + self.GAP
        if self.in_bands:
            columns = min(self.PER_BAND, max(1, len(self.items)))
            lines = -(-len(self.items) // self.PER_BAND)
            self.band = max(lines * (self.height + 0.85), self.bars + 1.5)
            size = self.LABEL + columns * step + 0.4, 0.7 + shown * self.band
        else:
            size = self.LABEL + shown * step + 0.2, 1.0 + self.bars + len(self.items) * (self.height + self.GAP)
        self.table = size[1]
        super().__init__(new_figure(width, max(size[0], 11.0), size[1] + 0.3 * (len(report.terms) + 1) + 0.25))

    def draw(self) -> None:
        signal, step = _signal(self.report), self.CELL + self.GAP
        self.write(0.2, 0.28, f"Objective: total {float(self.report.total.detach()):.4f}", fontsize=14, weight="bold")
        total = len(self.report.terms[0].per_sample)
        if total > self.shown:
            self.write(0.2, 0.56, f"the first {self.shown} of {total} outputs", color=MUTED, fontsize=9)
        for i in range(self.shown):
            left, top = (0.2, 0.75 + i * self.band) if self.in_bands else (self.LABEL + i * step, 0.3)
            x, ha = (left, "left") if self.in_bands else (left + self.CELL / 2, "center")
            color = (
                VERDICT_COLORS["good"]
                if signal[i] == FAILURE_NAMES[None]
                else color_of(signal[i]) or (MUTED if signal[i] == "–" else BAD)
            )
            self.write(x, top, f"output {i + 1}", ha=ha, color=MUTED, fontsize=10)
            self.write(x, top + 0.3, signal[i], ha=ha, color=color, fontsize=13, weight="bold")
            if self.in_bands:
                self.bars_of(i, left, top + 0.62, self.LABEL - 0.45, named=False)
            else:
                self.bars_of(i, left, 0.9, self.CELL, named=i == 0)
        for j, item in enumerate(self.items):
            for i in range(self.shown):
                if self.in_bands:
                    left = self.LABEL + (j % self.PER_BAND) * step
                    top = 0.75 + i * self.band + (j // self.PER_BAND) * (self.height + 0.85)
                    self.title(item, left, top + 0.05, columns=30)
                    self.cell(item, i, left, top + 0.68)
                else:
                    left, top = self.LABEL + i * step, 0.95 + self.bars + j * (self.height + self.GAP)
                    if i == 0:
                        self.title(item, 0.2, top + self.height / 2 - 0.4, columns=32)
                    self.cell(item, i, left, top)
        self.draw_table(self.table + 0.15)

    def title(self, item: str | TermReport, x: float, y: float, columns: int) -> None:
        """What a picture or a map is; in a band one line of each, since the next column is near."""
        if isinstance(item, str):
            self.write(x, y, item, fontsize=11, weight="bold")
            return
        term = item.term
        if self.in_bands:
            self.write(x, y, cut(term.name, 22), fontsize=11, weight="bold")
            self.write(x, y + 0.2, cut(term.encoder, 36), fontsize=7, color=MUTED)
            self.write(x, y + 0.44, wrapped(item.map_meaning, columns, 2), fontsize=8)
        else:
            self.write(x, y, wrapped(term.name, 22), fontsize=11, weight="bold")
            self.write(x, y + 0.4, wrapped(term.encoder, columns), fontsize=8, color=MUTED)
            self.write(x, y + 0.85, wrapped(item.map_meaning, columns), fontsize=8)

    def cell(self, item: str | TermReport, i: int, left: float, top: float) -> None:
        axes = self.axes(left, top, self.CELL, self.height)
        if isinstance(item, str):
            _draw_picture(axes, _nth(self.rows[item], i))
            return
        assert item.token_map is not None  # a term without one is no item
        scale = max(float(item.token_map[: self.shown].abs().nan_to_num(0.0).max()), 1e-6)
        _draw_map(axes, _nth(self.ground, i), item, item.token_map[i].float().cpu(), i, scale)
        self.write(
            left + 0.05, top + 0.13, f"loss {float(item.per_sample[i].detach()):.3f}", fontsize=8, color="white",
            weight="bold", bbox={"facecolor": "#000000a0", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip

    def bars_of(self, i: int, left: float, top: float, width: float, named: bool) -> None:
        """How far an output went towards each term's failure, 0 to 100 %, with a mark at the half."""
        terms = [t for t in self.report.terms if t.toward_failure is not None]
        if not terms:
            return
        step = (self.bars - 0.1) / len(terms)
        names = [f"towards {TERMS[t.term.kind].failure or t.term.name}"[:34] for t in terms]
        towards = [float(t.toward_failure[i]) for t in terms if t.toward_failure is not None]
        values = [min(max(v, 0.0), 1.0) if math.isfinite(v) else 0.0 for v in towards]
        colors = [GOOD if v <= 0.25 else WARN if v <= 0.5 else BAD for v in values]
        axes = self.axes(left, top, width, self.bars - 0.1)
        axes.barh(range(len(terms)), [1.0] * len(terms), color="#eef1f4", height=0.7)
        axes.barh(range(len(terms)), values, color=colors, height=0.7, alpha=0.5 if self.in_bands else 1.0)
        axes.axvline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
        for row, (toward, value) in enumerate(zip(towards, values)):
            number = f"{toward:.0%}"
            style: dict[str, Any] = {"fontsize": 8, "va": "center", "parse_math": False}
            if self.in_bands:  # the name stands on the bar, since there is no column for it
                axes.text(0.02, row, f"{names[row]} {number}", color=INK, **style)
                continue
            if value > 0.75:
                axes.text(value - 0.02, row, number, ha="right", color="white", **style)
            else:
                axes.text(value + 0.02, row, number, color=INK, **style)
            if named:
                self.write(0.2, top + (row + 0.5) * step, names[row], fontsize=9)
        axes.set(xlim=(0, 1), ylim=(len(terms) - 0.5, -0.5))
        axes.set_axis_off()

    def draw_table(self, top: float) -> None:
        heads = ("term", "weight", "value", "weighted", "active", "mean distances")
        xs = (0.2, 4.3, 4.95, 5.6, 6.4, 7.0)
        for x, head in zip(xs, heads):
            self.write(x, top, head, color=MUTED)
        width = self.inches[0]
        for n, t in enumerate(self.report.terms):
            y = top + 0.3 * (n + 1)
            self.line((0.2, width - 0.2), y - 0.15, color=LINE, linewidth=0.8)
            distances = " · ".join(f"{name} {float(d.detach().mean()):.3f}" for name, d in t.distances.items())
            cells = (
                cut(f"{t.term.name} · {t.term.encoder}", 58), f"{t.term.weight:g}", _number(t.value),
                _number(t.weighted), percent(t.active), cut(distances, int((width - 7.2) / 0.062)),
            )  # fmt: skip
            for x, words in zip(xs, cells):
                self.write(x, y, words)


def _nth(images: Tensor, i: int) -> Tensor:
    return images[i if len(images) > 1 else 0].detach().float().cpu().clamp(0, 1)


def _number(value: Tensor) -> str:
    number = float(value.detach())
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.5g}"


def _draw_picture(ax: Axes, image: Tensor) -> None:
    ax.imshow(image.numpy(), interpolation="bilinear", aspect="equal")
    ax.set_axis_off()


def _draw_map(ax: Axes, image: Tensor, t: TermReport, values: Tensor, i: int, scale: float) -> None:
    """Diverging colours for differences of distances, pale where a token did not count; over a grey output."""
    from matplotlib import colormaps

    grey = (0.25 + 0.75 * image.mean(-1)).numpy()
    shown = (colormaps["RdBu_r"]((values / scale / 2 + 0.5).numpy())).copy()
    weights = torch.ones_like(values) if t.token_weights is None else t.token_weights[i].float().cpu()
    weights = weights / weights.max().clamp_min(1e-12)
    shown[..., 3] = (weights * (0.1 + 0.75 * (values.abs() / scale).sqrt())).clamp(0, 0.85).numpy()
    height, width = image.shape[:2]
    top, left, bottom, right = t.region
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="bilinear", aspect="equal")
    ax.imshow(
        shown,
        extent=(left * width, right * width, bottom * height, top * height),
        interpolation="nearest",
        aspect="equal",
    )
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
