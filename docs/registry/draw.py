"""Draws icon.png and banner.png beside this file, for the registry: ``python docs/registry/draw.py``.

A chair was to become a stool. Three tiles show how that fails, in the colours that the verdicts have everywhere in the
pack: no edit, distorted, overlay. The fourth is the edit that was asked for.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from editloss_core.drawing.colours import VERDICT_COLORS

HERE = Path(__file__).parent
ICON, BANNER = (400, 400), (1680, 720)  # pixels; 21:9
PAGE, PAPER, SOFT, BEFORE = "#12161b", "#f4f6f8", "#9aa7b4", "#39434e"
POINTS = 72 / 100  # of a pixel at 100 dots per inch

# Strokes in a unit square, y upwards: (width, points). A curve has four points, a line two.
CHAIR = [
    (0.08, [(0.27, 0.82), (0.27, 0.08)]),
    (0.15, [(0.29, 0.86), (0.29, 0.66)]),
    (0.12, [(0.31, 0.44), (0.68, 0.44)]),
    (0.08, [(0.70, 0.44), (0.70, 0.08)]),
]
STOOL = [
    (0.14, [(0.28, 0.68), (0.72, 0.68)]),
    (0.08, [(0.35, 0.66), (0.24, 0.08)]),
    (0.08, [(0.65, 0.66), (0.76, 0.08)]),
    (0.06, [(0.30, 0.34), (0.70, 0.34)]),
]
BENT = [
    (0.14, [(0.26, 0.62), (0.44, 0.84), (0.58, 0.58), (0.76, 0.76)]),
    (0.08, [(0.35, 0.64), (0.20, 0.46), (0.44, 0.32), (0.18, 0.08)]),
    (0.08, [(0.64, 0.66), (0.86, 0.48), (0.56, 0.30), (0.80, 0.08)]),
    (0.06, [(0.32, 0.36), (0.44, 0.22), (0.56, 0.46), (0.68, 0.32)]),
]


def moved(strokes: list, x: float) -> list:
    return [(width, [(px + x, py) for px, py in points]) for width, points in strokes]


# Each drawing with the share of white in it.
TILES = {
    "no edit": [(CHAIR, 1.0)],
    "overlay": [(moved(CHAIR, -0.10), 0.45), (moved(STOOL, 0.08), 1.0)],
    "distorted": [(BENT, 1.0)],
    "good": [(STOOL, 1.0)],
}


class Page:
    """A figure whose units are pixels from the bottom left."""

    def __init__(self, width: int, height: int, color: str = "none"):
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=color)
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def box(self, x: float, y: float, width: float, height: float, corner: float, color: str) -> None:
        style = f"round,pad=0,rounding_size={corner}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, linewidth=0))

    def stroke(self, points: list[tuple[float, float]], width: float, color: object) -> None:
        codes = [Curve.MOVETO, *([Curve.CURVE4] * 3 if len(points) == 4 else [Curve.LINETO] * (len(points) - 1))]
        line = FancyArrowPatch(path=Curve(points, codes), arrowstyle="-", linewidth=width * POINTS, color=color)
        line.set_capstyle("round")
        line.set_joinstyle("round")
        self.axes.add_patch(line)

    def tile(self, x: float, y: float, side: float, color: str, drawing: list, tick: bool = False) -> None:
        self.box(x, y, side, side, 0.16 * side, color)
        for strokes, white in drawing:
            for width, points in strokes:
                places = [(x + side * (0.07 + 0.86 * px), y + side * (0.09 + 0.86 * py)) for px, py in points]
                self.stroke(places, 0.8 * width * side, [white + (1 - white) * part for part in to_rgb(color)])
        if tick:
            cx, cy, r = x + 0.88 * side, y + 0.88 * side, 0.145 * side
            self.axes.add_patch(Circle((cx, cy), r, facecolor="white", linewidth=0))
            self.stroke(
                [(cx - 0.48 * r, cy), (cx - 0.12 * r, cy - 0.4 * r), (cx + 0.5 * r, cy + 0.42 * r)], 0.3 * r, color
            )

    def write(self, x: float, y: float, words: str, pixels: float, color: str, **style) -> None:
        self.axes.text(x, y, words, fontsize=pixels * POINTS, color=color, **{"va": "center", "ha": "left", **style})

    def save(self, name: str) -> None:
        self.figure.savefig(HERE / name, metadata={"Software": None})


def icon() -> Page:
    page = Page(*ICON)
    page.box(0, 0, 400, 400, 72, PAGE)
    for i, (verdict, drawing) in enumerate(TILES.items()):
        page.tile(30 + 175 * (i % 2), 205 - 175 * (i // 2), 165, VERDICT_COLORS[verdict], drawing, verdict == "good")
    return page


def banner() -> Page:
    page = Page(*BANNER, PAGE)
    page.write(80, 470, "EditLoss", 124, "white", weight="bold")
    for i, words in enumerate(
        ("Why did the edit fail?", "Losses, a LoRA trainer and diagnostics", "for edit models such as FLUX.1 Kontext")
    ):
        page.write(86, 342 - 50 * i, words, 32, SOFT if i else PAPER)
    page.tile(812, 282, 196, BEFORE, [(CHAIR, 1.0)])
    page.write(910, 246, "chair → stool", 27, PAPER, ha="center")
    page.stroke([(1038, 380), (1082, 380)], 9, SOFT)
    page.stroke([(1068, 396), (1086, 380), (1068, 364)], 9, SOFT)
    for i, (verdict, drawing) in enumerate(TILES.items()):
        x, y = 1122 + 256 * (i % 2), 412 - 312 * (i // 2)
        page.tile(x, y, 228, VERDICT_COLORS[verdict], drawing, verdict == "good")
        page.write(x + 114, y - 34, verdict, 27, PAPER, ha="center")
    return page


if __name__ == "__main__":
    icon().save("icon.png")
    banner().save("banner.png")
