"""Verdicts on many outputs as one picture: what failed, how badly, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing.colours import VERDICT_COLORS, text_on
from ..drawing.sheet import BAD, INK, LINE, MUTED, Sheet, cut, new_figure, wrapped
from ..extras import need
from ..objective import ObjectiveReport
from .items import Item, Signal, finite, with_signals
from .judge import FAILURES, GOOD, UNDECIDED, VERDICTS, Verdict

# map of a verdict → what full colour means
MAPS = {
    "unchanged": "red: looks like the before picture",
    "old object": "red: the old object is left",
    "shape": "red: unlike the after picture's object",
    "background": "red: changed outside the mask",
}
FAILURE_OF = {"unchanged": "no edit", "old object": "overlay", "shape": "distorted", "background": "collateral change"}
PICTURES = ("before", "after", "output")
MOST_ROWS = 40
OUTLINE = "#1565c0"  # of the edit mask
SHADES = 256  # of a map
HIGHEST = 8000  # pixels; beyond it viewers and browsers give up on a picture


def heat(picture: Tensor, values: Tensor) -> Tensor:
    """A map laid over the greyed picture: clear at 0, yellow, red at 1.

    Args:
        picture: ``[H, W, 3]`` in 0…1.
        values: ``[h, w]`` in 0…1, of any size; it is brought to the picture's.

    Returns:
        ``[H, W, 3]`` in 0…1.
    """
    need("matplotlib")
    from matplotlib import colormaps

    values = values.float().clamp(0, 1)[None, None]
    values = F.interpolate(values, size=picture.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    shades = colormaps["YlOrRd"](np.linspace(0.15, 0.9, SHADES))[:, :3].astype(np.float32)
    colours = torch.from_numpy(shades.take((values * (SHADES - 1)).round().byte().numpy(), axis=0))
    opacity = 0.9 * values.sqrt()[..., None]
    grey = 0.35 + 0.5 * picture.float().mean(-1, keepdim=True)
    return torch.lerp(grey, colours, opacity)


def _name_of(item: Item) -> Optional[str]:
    """Of its verdict; None where it could not be judged."""
    return item.verdict.verdict if item.verdict else None


class Ranking:
    """Which items have a row where not all can have one: of each failure the first, then of each the second and so on; then what
    could not be judged, then undecided and good ones. Lower ranks come first."""

    def __init__(self) -> None:
        self._seen: Counter[Optional[str]] = Counter()

    def of(self, item: Item) -> tuple[int, int]:
        """The rank of the next item."""
        name = _name_of(item)
        self._seen[name] += 1
        return {None: 2, UNDECIDED: 3, GOOD: 4}.get(name, 1), self._seen[name]


def sheet(
    items: Sequence[Item], width: int = 1600, report: Optional[ObjectiveReport] = None, rows: int = MOST_ROWS
) -> Tensor:
    """A contact sheet: a row per item with its verdict and scores, the pictures, and the maps laid over the output.

    Args:
        items: in the order to show. Where there are more than fit, failures come first, and the title counts the rest.
        width: of the sheet, in pixels.
        report: on the same outputs in the same order; its signal is shown beside the verdict.
        rows: at most; fewer where the sheet would be higher than 8000 pixels.

    Returns:
        ``[1, height, width, 3]`` in 0…1.

    Raises:
        ValueError: no items, or a report on another number of outputs.
    """
    if not items:
        raise ValueError("items: expected at least one output, got none")
    if report is not None:
        items = with_signals(items, report)
    return VerdictSheet(items, width, rows).rendered()


class VerdictSheet(Sheet):
    """The layout, in inches from the top left: words, then a column per picture and per map."""

    WIDTH, LEFT, WORDS, GAP, HEAD, LARGEST = 16.0, 0.25, 3.3, 0.1, 1.5, 2.3
    BAR = 0.21  # height of a score

    def __init__(self, items: Sequence[Item], width: int, rows: int):
        self.items = items
        self.columns = [c for c in PICTURES if any(c in item.pictures for item in items)]
        self.columns += [m for m in MAPS if any(item.verdict and m in item.verdict.maps for item in items)]
        self.signal = any(item.signal for item in items)
        space = self.WIDTH - 2 * self.LEFT - self.WORDS
        self.side = min(self.LARGEST, space / max(1, len(self.columns)) - self.GAP)
        shown = [item.pictures["output"].shape for item in items if "output" in item.pictures]
        aspects = sorted(shape[0] / shape[1] for shape in shown) or [1.0]
        self.cell = self.side * min(max(aspects[len(aspects) // 2], 0.5), 1.6)
        words = 0.42 + self.BAR * len(FAILURES) + (0.62 if self.signal else 0.0)
        self.row = 0.36 + max(self.cell, words) + 0.16
        self.message_row = 0.7
        limit = HIGHEST / width * self.WIDTH - self.HEAD - 0.15
        self.shown = _chosen(items, min(rows, max(1, int(limit / self.row))))
        height = sum(self.row if self.full(item) else self.message_row for item in self.shown)
        super().__init__(new_figure(width, self.WIDTH, self.HEAD + height + 0.15))
        # All pictures and bars share one set of axes, in inches: hundreds of axes take longer to make than to fill.
        self.canvas = self.axes(0, 0, *self.inches)
        self.canvas.set(xlim=(0, self.inches[0]), ylim=(self.inches[1], 0), autoscale_on=False)
        self.canvas.set_axis_off()
        self.pixels_per_inch = width / self.WIDTH
        self.outlines: list[np.ndarray] = []
        self._outlined: Optional[tuple[Optional[Tensor], list[np.ndarray]]] = None
        self._reduced: Optional[tuple[Tensor, Tensor]] = None

    @staticmethod
    def full(item: Item) -> bool:
        return item.verdict is not None or bool(item.pictures)

    def left(self, column: int) -> float:
        return self.LEFT + self.WORDS + column * (self.side + self.GAP)

    def draw(self) -> None:
        from matplotlib.collections import LineCollection

        self.head()
        top = self.HEAD
        for item in self.shown:
            self.line((self.LEFT, self.WIDTH - self.LEFT), top, color=LINE, linewidth=0.8)
            if self.full(item):
                self.draw_row(item, top)
                top += self.row
            else:
                self.write(self.LEFT, top + 0.2, cut(item.name, 60), fontsize=10, weight="bold")
                self.write(self.LEFT, top + 0.47, "NOT JUDGED", fontsize=9, weight="bold", color=MUTED)
                self.write(self.LEFT + self.WORDS, top + 0.47, wrapped(item.message, 170, 2), fontsize=9, color=BAD)
                top += self.message_row
        self.canvas.add_collection(LineCollection(self.outlines, colors=OUTLINE, linewidths=0.9), autolim=False)

    def head(self) -> None:
        self.write(
            self.LEFT, 0.3, f"{len(self.items)} output{'s' * (len(self.items) != 1)}", fontsize=15, weight="bold"
        )
        counts = Counter(item.verdict.verdict if item.verdict else "not judged" for item in self.items)
        x = self.LEFT + 0.55 + 0.13 * len(f"{len(self.items)} outputs")
        for name in (*VERDICTS, "not judged"):
            if counts[name]:
                label = f"{counts[name]} {name}"
                self.write(x, 0.3, label, fontsize=11, weight="bold", **_badge(VERDICT_COLORS.get(name, MUTED)))
                x += 0.3 + 0.1 * len(label)
        hidden = len(self.items) - len(self.shown)
        if hidden:
            left_out = Counter(item.verdict.verdict if item.verdict else "not judged" for item in self.items)
            left_out.subtract(item.verdict.verdict if item.verdict else "not judged" for item in self.shown)
            parts = ", ".join(f"{left_out[v]} {v}" for v in (*VERDICTS, "not judged") if left_out[v])
            self.write(self.LEFT, 0.66, f"{len(self.shown)} rows, failures first. Not shown: {parts}.", color=MUTED)
        self.write(self.LEFT, 1.05, "verdict", fontsize=10.5, weight="bold")
        words = "from pixels and geometry; a score of 0.5\nand more is a failure"
        if self.signal:
            words = "a score of 0.5 and more is a failure\n◆ how far it went by the training signal"
        self.write(self.LEFT, 1.29, words, fontsize=7.5, color=MUTED)
        for k, name in enumerate(self.columns):
            shift = 0.24 if name in MAPS else 0.0
            self.write(self.left(k) + shift, 1.05, name, fontsize=10.5, weight="bold")
            if name in MAPS:
                self.patch(self.left(k), 1.05, VERDICT_COLORS[FAILURE_OF[name]], None)
                self.write(self.left(k), 1.29, wrapped(MAPS[name], int(self.side * 15), 2), fontsize=7.5, color=MUTED)
        if any(name in MAPS for name in self.columns):
            self.legend(self.WIDTH - self.LEFT - 3.9, 0.3)

    def legend(self, left: float, y: float) -> None:
        ramp = torch.linspace(0, 1, 200).expand(8, 200)
        self.picture(heat(torch.full((8, 200, 3), 0.5), ramp), left + 0.4, y - 0.08, 1.5, 0.16)
        self.write(left + 0.33, y, "fine", ha="right", fontsize=8.5)
        self.write(left + 1.97, y, "worst", fontsize=8.5)
        self.line((left + 2.65, left + 2.95), y, color=OUTLINE, linewidth=1.2)
        self.write(left + 3.02, y, "edit mask", fontsize=8.5)

    def draw_row(self, item: Item, top: float) -> None:
        self.write(self.LEFT, top + 0.19, cut(item.name, 36), fontsize=10, weight="bold")
        remarks = item.message and f"Not judged: {item.message}" or " ".join(item.remarks)
        style = {"fontsize": 7.5, "color": BAD if item.message else MUTED, "linespacing": 1.1}
        self.write(self.left(0), top + 0.19, wrapped(remarks, 185, 2), **style)
        top += 0.36
        if item.verdict is None:
            self.badge("not judged", top + 0.14, MUTED)
        else:
            name = item.verdict.verdict
            asked = sum(item.verdict.scores.get(failure) is not None for failure in FAILURES)
            self.badge(name, top + 0.14, VERDICT_COLORS[name], filled=name != UNDECIDED)
            if asked < len(FAILURES):
                words = f"{asked} of {len(FAILURES)} questions answered"
                self.write(self.LEFT + self.WORDS - 0.3, top + 0.14, words, ha="right", fontsize=8, color=MUTED)
            self.scores(item.verdict, item.signal, top + 0.36)
        if item.signal:
            self.say(item, item.signal, top + 0.42 + self.BAR * len(FAILURES))
        for k, name in enumerate(self.columns):
            self.draw_cell(item, name, self.left(k), top)

    def badge(self, words: str, y: float, color: str, filled: bool = True) -> None:
        """A verdict in its colour; only an outline where it is none yet."""
        style = _badge(color) if filled else _badge("#ffffff", edge=color)
        self.write(self.LEFT + 0.06, y, words, fontsize=11, weight="bold", **style)

    def say(self, item: Item, signal: Signal, top: float) -> None:
        self.write(self.LEFT, top + 0.1, f"training signal: {signal.words}", fontsize=8.5)
        if item.disagreement:
            self.write(self.LEFT, top + 0.37, wrapped(item.disagreement, 47, 2), fontsize=8, weight="bold", color=BAD)
        elif item.verdict:
            self.write(self.LEFT, top + 0.3, "agrees with the judge", fontsize=8, color=MUTED)

    def scores(self, verdict: Verdict, signal: Optional[Signal], top: float) -> None:
        left, length = self.LEFT + 1.15, self.WORDS - 1.85
        for k, failure in enumerate(FAILURES):
            score, y = finite(verdict.scores.get(failure)), top + (k + 0.5) * self.BAR
            failed = score is not None and score >= 0.5
            font = {"fontsize": 8, "weight": "bold" if failed else "normal"}
            self.write(self.LEFT, y, failure, color=MUTED if score is None else INK, **font)
            self.write(left + length + 0.08, y, "–" if score is None else f"{score:.2f}", **font)
            self.bar(left, y, length, facecolor="white" if score is None else "#eef1f4", edgecolor=LINE, linewidth=0.5)
            if score is not None:
                style = {"facecolor": VERDICT_COLORS[failure], "alpha": 1.0 if failed else 0.45, "linewidth": 0}
                self.bar(left, y, length * score, **style)
            toward = signal.toward.get(failure) if signal else None
            if toward is not None:
                x = left + length * min(max(toward, 0.0), 1.0)
                self.canvas.plot(x, y, "D", color=INK, markersize=4, markeredgecolor="white", zorder=3)
        half, ends = left + length / 2, (top, top + len(FAILURES) * self.BAR)
        self.canvas.plot([half, half], ends, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))

    def bar(self, left: float, y: float, length: float, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        height = 0.66 * self.BAR
        self.canvas.add_patch(Rectangle((left, y - height / 2), length, height, **style))

    def draw_cell(self, item: Item, name: str, left: float, top: float) -> None:
        verdict, source = item.verdict, item.pictures.get(name if name in PICTURES else "output")
        values = verdict.maps.get(name) if verdict else None
        if source is None or (name not in PICTURES and values is None):
            words = "none given" if name in PICTURES else "not answered" if verdict else "not judged"
            self.empty(words, left, top)
            return
        scale = min(self.side / source.shape[1], self.cell / source.shape[0])
        width, height = scale * source.shape[1], scale * source.shape[0]
        left, top = left + (self.side - width) / 2, top + (self.cell - height) / 2
        picture = self.reduced(source, height, width)
        if values is not None and verdict is not None:
            picture = heat(picture, values)
            self.outlines += [line * (width, height) + (left, top) for line in self.outline(verdict.mask)]
        self.picture(picture, left, top, width, height)

    def reduced(self, picture: Tensor, height: float, width: float) -> Tensor:
        """In 0…1, with the pixels that the sheet has for it; the last one is kept for the maps that are laid over it."""
        if self._reduced is None or self._reduced[0] is not picture:
            pixels = [max(1, round(side * self.pixels_per_inch)) for side in (height, width)]
            planes = picture.float().permute(2, 0, 1)[None] / 255
            if pixels[0] < planes.shape[-2]:
                planes = F.interpolate(planes, size=pixels, mode="area")
            self._reduced = picture, planes[0].permute(1, 2, 0)
        return self._reduced[1]

    def outline(self, mask: Optional[Tensor]) -> list[np.ndarray]:
        """Lines ``[n, 2]`` around a mask, in shares of its width and height; the last mask's are kept for the next map."""
        if self._outlined is None or self._outlined[0] is not mask:
            lines: list[np.ndarray] = []
            if mask is not None:
                from contourpy import contour_generator

                size = (max(1, mask.shape[1] - 1), max(1, mask.shape[0] - 1))
                lines = [np.asarray(line) / size for line in contour_generator(z=mask.numpy()).lines(0.5)]
            self._outlined = mask, lines
        return self._outlined[1]

    def empty(self, words: str, left: float, top: float) -> None:
        xs, ys = (left, left + self.side), (top, top + self.cell)
        frame = [xs[0], xs[1], xs[1], xs[0], xs[0]], [ys[0], ys[0], ys[1], ys[1], ys[0]]
        self.canvas.plot(*frame, color=LINE, linewidth=0.8, linestyle=(0, (3, 3)))
        self.write(sum(xs) / 2, sum(ys) / 2, words, ha="center", fontsize=8, color=MUTED)

    def picture(self, picture: Tensor, left: float, top: float, width: float, height: float) -> None:
        edges = (left, left + width, top + height, top)
        self.canvas.imshow(picture.numpy(), extent=edges, interpolation="bilinear", aspect="auto", vmin=0, vmax=1)


def _chosen(items: Sequence[Item], count: int) -> list[Item]:
    """The items that have a row: all, in their order, or the first by rank, those of a verdict together."""
    if len(items) <= count:
        return list(items)
    order = Ranking()
    ranks = [order.of(item) for item in items]
    kept = sorted(sorted(range(len(items)), key=lambda i: (ranks[i], i))[:count])
    places = {v: k for k, v in enumerate((*FAILURES, None, UNDECIDED, GOOD))}
    return [items[i] for i in sorted(kept, key=lambda i: (places[_name_of(items[i])], i))]


def _badge(color: str, edge: str = "none") -> dict[str, object]:
    """The style of words on a field of this colour."""
    return {"color": text_on(color), "bbox": {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": edge}}
