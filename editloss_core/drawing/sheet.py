"""What every page shares: colours, places in inches, words that fit, and the way from a figure to a tensor."""

from __future__ import annotations

import textwrap
import unicodedata
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from torch import Tensor

from ..extras import need
from .fonts import quiet, use_families

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GOOD, WARN, BAD, LINE = "#1b1f24", "#667080", "#2e7d4f", "#d98c00", "#c62828", "#d7dce2"


class Sheet:
    """A figure on which places are inches from the top left. A subclass says in :meth:`draw` what is on it."""

    def __init__(self, figure: Figure):
        width, height = figure.get_size_inches()
        self.figure, self.inches = figure, (float(width), float(height))

    def draw(self) -> None:
        raise NotImplementedError

    def rendered(self) -> Tensor:
        """Drawn, as ``[1, H, W, 3]`` in 0…1."""
        self.draw()
        return pixels(self.figure)[None]

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self.inches
        axes = self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
        axes.set_facecolor("none")
        return axes

    def write(self, x: float, y: float, words: str, **style: Any) -> None:
        style = {"color": INK, "fontsize": 9, "va": "center", "ha": "left", "parse_math": False, **style}
        self.figure.text(x / self.inches[0], 1 - y / self.inches[1], words, **style)

    def patch(self, x: float, y: float, color: str, hatch: Optional[str]) -> None:
        """A small field of a legend."""
        from matplotlib.patches import Rectangle

        w, h = self.inches
        corner, size = (x / w, 1 - (y + 0.045) / h), (0.18 / w, 0.09 / h)
        field = Rectangle(corner, *size, transform=self.figure.transFigure, facecolor=color, hatch=hatch, edgecolor="white", linewidth=0)  # fmt: skip
        self.figure.add_artist(field)

    def line(self, xs: tuple[float, float], y: float, **style: Any) -> None:
        from matplotlib.lines import Line2D

        w, h = self.inches
        self.figure.add_artist(Line2D([x / w for x in xs], [1 - y / h] * 2, **style))


def new_figure(width: int, across: float, high: float) -> Figure:
    """A figure of this size in inches, ``width`` pixels wide."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = width / across
    size = (round(across * dpi) + 0.01) / dpi, (round(high * dpi) + 0.01) / dpi
    figure = Figure(figsize=size, dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def pixels(figure: Figure) -> Tensor:
    """``[height, width, 3]`` in 0…1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)  # as `new_figure` makes it
    use_families(figure)
    with quiet():
        canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32)).div_(255.0)


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def percent(share: Optional[float | Tensor]) -> str:
    return "–" if share is None else f"{float(share):.0%}"


_HALF = "\0"  # the second column of a wide character


def in_columns(text: str) -> str:
    """With one character per column, so that lengths are widths: Chinese, Japanese and Korean ones take two."""
    return "".join(c + _HALF if unicodedata.east_asian_width(c) in "WF" else c for c in text)


def from_columns(text: str) -> str:
    return text.replace(_HALF, "")


def wrapped(text: str, columns: int, lines: int = 4) -> str:
    folded = textwrap.wrap(in_columns(text), columns, break_long_words=True, max_lines=lines, placeholder="…")
    return from_columns("\n".join(folded))


def cut(text: str, columns: int) -> str:
    """In one line, cut at the end."""
    text = in_columns(" ".join(text.split()))
    return from_columns(text if len(text) <= columns else text[: columns - 1] + "…")
