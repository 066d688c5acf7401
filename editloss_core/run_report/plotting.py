"""Parts that pictures of curves are made of: lines, their scales and frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing.sheet import LINE, MUTED
from ..runs.log import RunLog
from .columns import BUCKETS, as_float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_QUANTILES = torch.tensor([0.02, 0.98], dtype=torch.float64)
_THIN = 400  # bins of the raw line, two points each


def thinned(steps: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """At most two points per bin, the lowest and the highest, so that no spike is lost."""
    known = column.isfinite()
    steps, column = steps[known], column[known]
    size = -(-len(column) // _THIN)
    if size <= 2:
        return steps, column
    whole = F.pad(column, (0, -len(column) % size), value=float(column[-1])).view(-1, size)
    ends = torch.stack([whole.argmin(1), whole.argmax(1)], 1).sort(1).values
    places = (ends + size * torch.arange(len(whole))[:, None]).flatten().clamp(max=len(column) - 1)
    return steps[places], column[places]


def scale(axes: Axes, raws: Sequence[Tensor], curves: Sequence[Tensor], may_be_log: bool = False) -> None:
    """Limits that hold all curves and nearly all raw values; a spike runs out of the frame."""
    curves = [curve[curve.isfinite()] for curve in curves]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        axes.set_ylim(0, 1)
        return
    values = torch.cat([*curves, *(raw[raw.isfinite()].quantile(_QUANTILES) for raw in raws if raw.isfinite().any())])
    low, high = float(values.min()), float(values.max())
    peaks = [float(curve.max()) for curve in curves if curve.max() > 0]
    if may_be_log and low >= 0 and peaks and min(peaks) * 10 < max(peaks):
        low = min(max(float(curve[curve > 0].min()), float(curve.max()) / 30) for curve in curves if curve.max() > 0)
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(low / 1.5, high * 1.5)
        return
    if 0 <= low <= 0.6 * high:
        low = 0.0
    if high == low == 0:
        high = 1.0
    span = high - low or abs(high) or 1.0
    axes.set_ylim(low - (0.03 if low == 0 else 0.1) * span, high + 0.1 * span)


def draw_raw(axes: Axes, steps: Tensor, column: Tensor, color: str) -> None:
    known = int(column.isfinite().sum())
    steps, column = thinned(steps, column)
    dots: dict[str, Any] = (
        {"marker": "o", "markersize": 3.5, "linestyle": "none"} if known <= 40 else {"linewidth": 0.7}
    )
    axes.plot(steps.numpy(), column.numpy(), color=color, alpha=0.3, markeredgewidth=0, **dots)


def draw_line(axes: Axes, steps: Tensor, curve: Tensor, style: Mapping[str, Any], width: float = 1.8) -> Line2D:
    """The line through what is known; a dot where it is a single value."""
    known = curve.isfinite()
    dot: dict[str, Any] = {"marker": "o", "markersize": 3 + width} if int(known.sum()) == 1 else {}
    (line,) = axes.plot(steps[known].numpy(), curve[known].numpy(), linewidth=width, **style, **dot)
    return line


def draw_held_out(
    axes: Axes, log: RunLog, color: str, pairs: Sequence[tuple[Optional[float], ...]], lines: bool = False
) -> tuple[Line2D, Line2D]:
    """Validations with the LoRA (full) and without (hollow), over the steps."""
    at = [v.step for v in log.validations]
    with_lora, without = ([as_float(pair[i]) for pair in pairs] for i in (0, 1))
    often = -(-len(at) // 20)  # more marks than this hide the lines
    common: dict[str, Any] = {
        "markevery": ((len(at) - 1) % often, often),
        "color": color,
        "marker": "o",
        "markersize": 5.5 if lines else 4.5,
        "markeredgecolor": color,
        "zorder": 4,
    }
    styles: list[dict[str, Any]] = [{"linewidth": 1.0, "linestyle": s if lines else "none"} for s in ("-", (0, (4, 2)))]
    (hollow,) = axes.plot(at, without, markerfacecolor="white", **common, **styles[1])
    (full,) = axes.plot(at, with_lora, markerfacecolor=color, **common, **styles[0])
    return full, hollow


def frame(axes: Axes, steps: Tensor, x: str = "", y: str = "", grid: bool = True) -> None:
    """Thin frame, whole steps, few numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    first, last = float(steps[0]), float(steps[-1])
    pad = max(0.01 * (last - first), 0.5 if len(steps) < 20 else 0.0)
    axes.set_xlim(first - pad, last + pad)
    axes.xaxis.set_major_locator(MaxNLocator(5 if len(steps) > 2 else 2, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    if grid:
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    _bare(axes, grid)
    axes.set_xlabel(x, fontsize=8, color=MUTED, labelpad=2)
    axes.set_ylabel(y, fontsize=8, color=MUTED)


def level_frame(axes: Axes) -> None:
    """The axis of t."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set(xlim=(-0.01, 1.01), xticks=[k / BUCKETS for k in range(BUCKETS + 1)])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _bare(axes, grid=True)
    axes.set_xlabel("t", fontsize=8, color=MUTED, labelpad=1)


def _bare(axes: Axes, grid: bool) -> None:
    axes.tick_params(labelsize=8, colors=MUTED, length=2, which="both")
    for side, spine in axes.spines.items():
        spine.set(color=LINE, visible=side in ("left", "bottom"))
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color=LINE, linewidth=0.6)


def say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=9)
