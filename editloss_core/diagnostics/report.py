"""An objective's report as text and as one picture: which output fails, by which term, and where."""

from __future__ import annotations

import textwrap
from typing import Optional, Sequence

import torch
from torch import Tensor

from ..encoders.base import check_images
from ..objective import TERMS, ObjectiveReport, TermReport

FAILURE_NAMES = {"no edit": "NO EDIT", "distorted": "DISTORTED", "overlay": "OVERLAY", None: "no failure signal"}
MAX_COLUMNS = 8  # outputs in one picture; the text has them all

_INK, _MUTED, _GOOD, _WARN, _BAD, _LINE = "#1b1f24", "#667080", "#2e7d4f", "#d98c00", "#c62828", "#d7dce2"


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
            f"| {_cell(t.term.name)} | {t.term.weight:g} | {float(t.value.detach()):.4f} | {float(t.weighted.detach()):.4f} "
            f"| {_percent(t.active)} | {distances} |"
        )
    lines += ["", "| output | signal | " + " | ".join(_cell(t.term.name) for t in report.terms) + " |"]
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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _signal(report: ObjectiveReport) -> list[str]:
    """The signal in words; an en dash where no term can tell."""
    if all(t.toward_failure is None or not TERMS[t.term.kind].failure for t in report.terms):
        return ["–"] * len(report.terms[0].per_sample)
    return [FAILURE_NAMES[failure] for failure in report.signal()]


def _percent(share: Optional[float]) -> str:
    return "–" if share is None else f"{share:.0%}"


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

    One column per output: the verdict of the signal, before, after and output, then one heat map per term that has
    tokens, laid over the output. Red: nearer to the negative than to the target (hinge terms), or far from the target
    (match terms). Tokens that did not count are pale.

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = len(report.terms[0].per_sample)
    for name, images in (("pred", pred), ("gt", gt), ("src", src)):
        if images is not None:
            check_images(name, images)
            if len(images) not in (1, total):
                raise ValueError(f"{name}: expected 1 or {total} pictures like the report, got {len(images)}")
    rows = {"before": src, "after": gt, "output": pred}
    ground = next((images for images in (pred, gt, src) if images is not None), None)
    ground = torch.full((1, 256, 256, 3), 0.6) if ground is None else torch.full_like(ground[:1], 0.6)
    ground = ground if pred is None else pred
    shown = min(total, MAX_COLUMNS)
    names = [name for name, images in rows.items() if images is not None]
    mapped = [t for t in report.terms if t.token_map is not None]

    label, cell, gap = 2.3, 2.15, 0.12  # inches
    aspect = min(max(ground.shape[1] / ground.shape[2], 0.4), 1.8)  # of a row; beyond it pictures get margins
    picture_rows = len(names) + len(mapped)
    bars = 0.26 * max(1, sum(t.toward_failure is not None for t in report.terms)) + 0.1
    table = 0.3 * (len(report.terms) + 1)
    inches = (label + shown * (cell + gap) + 0.2, 1.0 + bars + picture_rows * (cell * aspect + gap) + table + 0.1)
    inches = (max(inches[0], 11.0), inches[1])
    figure = Figure(figsize=inches, dpi=width / inches[0], facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def axes(left: float, top: float, w: float, h: float):
        return figure.add_axes((left / inches[0], 1 - (top + h) / inches[1], w / inches[0], h / inches[1]))

    def write(x: float, y: float, text: str, **style):
        style = {"color": _INK, "fontsize": 10, "va": "center", "ha": "left", "parse_math": False, **style}
        figure.text(x / inches[0], 1 - y / inches[1], text, **style)

    signal = _signal(report)
    write(0.2, 0.28, f"Objective: total {float(report.total.detach()):.4f}", fontsize=14, weight="bold")
    if total > shown:
        write(0.2, 0.56, f"the first {shown} of {total} outputs", color=_MUTED, fontsize=9)
    lefts = [label + i * (cell + gap) for i in range(shown)]
    for i, left in enumerate(lefts):
        color = {FAILURE_NAMES[None]: _GOOD, "–": _MUTED}.get(signal[i], _BAD)
        write(left + cell / 2, 0.3, f"output {i + 1}", ha="center", color=_MUTED, fontsize=10)
        write(left + cell / 2, 0.6, signal[i], ha="center", color=color, fontsize=13, weight="bold")

    top = 0.9
    _draw_bars(axes, write, report, lefts, top, cell, bars)
    top += bars + 0.05
    for name in names:
        write(0.2, top + cell * aspect / 2, name, fontsize=11, weight="bold")
        for i, left in enumerate(lefts):
            _draw_picture(axes(left, top, cell, cell * aspect), _nth(rows[name], i))
        top += cell * aspect + gap
    for t in mapped:
        middle = top + cell * aspect / 2
        write(0.2, middle - 0.5, _wrapped(t.term.name, 22), fontsize=11, weight="bold")
        write(0.2, middle - 0.08, _wrapped(t.term.encoder, 32), fontsize=8, color=_MUTED)
        write(0.2, middle + 0.42, _wrapped(t.map_meaning, 32), fontsize=8)
        scale = max(float(t.token_map[:shown].abs().max()), 1e-6)
        for i, left in enumerate(lefts):
            _draw_map(axes(left, top, cell, cell * aspect), _nth(ground, i), t, i, scale)
            write(
                left + 0.05, top + 0.13, f"loss {float(t.per_sample[i].detach()):.3f}", fontsize=8, color="white", weight="bold",
                bbox={"facecolor": "#000000a0", "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
        top += cell * aspect + gap
    _draw_table(write, figure, report, top + 0.15, inches)
    canvas.draw()
    buffer = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    columns, lines = canvas.get_width_height()
    return buffer.view(lines, columns, 4)[None, ..., :3].float() / 255.0


def _nth(images: Tensor, i: int) -> Tensor:
    return images[i if len(images) > 1 else 0].detach().float().cpu().clamp(0, 1)


def _wrapped(text: str, columns: int) -> str:
    return "\n".join(textwrap.wrap(text, columns, break_long_words=True)[:4])


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 1] + "…"


def _draw_picture(ax, image: Tensor) -> None:
    ax.imshow(image.numpy(), interpolation="bilinear", aspect="equal")
    ax.set_axis_off()


def _draw_map(ax, image: Tensor, t: TermReport, i: int, scale: float) -> None:
    """Diverging colours for differences of distances, pale where a token did not count; over a grey output."""
    from matplotlib import colormaps

    grey = (0.25 + 0.75 * image.mean(-1)).numpy()
    values = t.token_map[i].float().cpu()
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


def _draw_bars(
    axes, write, report: ObjectiveReport, lefts: Sequence[float], top: float, cell: float, height: float
) -> None:
    """How far each output went towards each term's failure, 0 to 100 %, with a mark at the half."""
    terms = [t for t in report.terms if t.toward_failure is not None]
    if not terms:
        return
    step = (height - 0.1) / len(terms)
    for row, t in enumerate(terms):
        write(0.2, top + (row + 0.5) * step, f"towards {TERMS[t.term.kind].failure or t.term.name}"[:34], fontsize=9)
    for i, left in enumerate(lefts):
        ax = axes(left, top, cell, height - 0.1)
        values = [min(float(t.toward_failure[i]), 1.0) for t in terms]
        colors = [_GOOD if v <= 0.25 else _WARN if v <= 0.5 else _BAD for v in values]
        ax.barh(range(len(terms)), [1.0] * len(terms), color="#eef1f4", height=0.7)
        ax.barh(range(len(terms)), values, color=colors, height=0.7)
        ax.axvline(0.5, color=_MUTED, linewidth=0.8, linestyle=":")
        for row, (t, value) in enumerate(zip(terms, values)):
            inside = value > 0.75
            ax.text(
                value - 0.02 if inside else value + 0.02, row, f"{float(t.toward_failure[i]):.0%}", fontsize=8, va="center",
                ha="right" if inside else "left", color="white" if inside else _INK,
            )  # fmt: skip
        ax.set(xlim=(0, 1), ylim=(len(terms) - 0.5, -0.5))
        ax.set_axis_off()


def _draw_table(write, figure, report: ObjectiveReport, top: float, inches: tuple[float, float]) -> None:
    from matplotlib.lines import Line2D

    heads = ("term", "weight", "value", "weighted", "active", "mean distances")
    xs = (0.2, 4.3, 4.95, 5.6, 6.4, 7.0)
    for x, head in zip(xs, heads):
        write(x, top, head, color=_MUTED, fontsize=9)
    for n, t in enumerate(report.terms):
        y = top + 0.3 * (n + 1)
        line = 1 - (y - 0.15) / inches[1]
        figure.add_artist(Line2D((0.2 / inches[0], 1 - 0.2 / inches[0]), (line, line), color=_LINE, linewidth=0.8))
        distances = "   ".join(f"{name} {float(d.detach().mean()):.3f}" for name, d in t.distances.items())
        room = int((inches[0] - 7.2) / 0.062)
        cells = (
            _cut(f"{t.term.name} · {t.term.encoder}", 58), f"{t.term.weight:g}", f"{float(t.value.detach()):.4f}",
            f"{float(t.weighted.detach()):.4f}", _percent(t.active), _cut(distances, room),
        )  # fmt: skip
        for x, cell in zip(xs, cells):
            write(x, y, cell, fontsize=9)
