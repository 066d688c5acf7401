"""The encoder audit as one picture: what to wire, what was shown to the encoders, and a matrix of encoders × failures."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor

from ..checks import check_whole
from ..drawing.sheet import BAD, GOOD, INK, LINE, MUTED, WARN, Sheet, new_figure, wrapped
from ..objective import TERMS
from .result import SEES, AuditRow, EncoderAudit, count_of, short

TONE = {"sees": GOOD, "unsure": WARN, "blind": BAD}
LOWEST = 0.3  # where the scale of AUROC begins; what is below is drawn at its end


def audit_picture(audit: EncoderAudit, width: int = 1600) -> Tensor:
    """``[1, height, width, 3]`` in 0…1.

    Raises:
        ValueError: a width that is not a positive integer.
    """
    check_whole("width", width, 1, "pixels")
    return EncoderAuditSheet(audit, width).rendered()


class EncoderAuditSheet(Sheet):
    """The layout, in inches from the top left."""

    LABEL, COLUMN, ROW, THUMB, LEFT = 2.75, 3.55, 0.56, 1.02, 0.25

    def __init__(self, audit: EncoderAudit, width: int):
        self.audit = audit
        self.rows = {(row.encoder, row.layer, row.failure): row for row in audit.rows}
        self.subjects = list(dict.fromkeys((row.encoder, row.layer) for row in audit.rows))
        self.failures = list(dict.fromkeys(row.failure for row in audit.rows))
        self.best = {(r.encoder, r.layer, r.failure) for r in audit.recommendations}
        example = audit.example
        self.shown = [
            ("target", [("after", example.after)]),
            ("harmless", list(example.benign.items())),
            *((failure, list(made.items())) for failure, made in example.failures.items()),
        ]
        # Of each kind as many as fit into one line: the first and the last ones span what there is.
        self.shown = [(kind, made if len(made) <= 3 else [made[0], made[-2], made[-1]]) for kind, made in self.shown]
        aspect = min(max(example.after.shape[0] / example.after.shape[1], 0.5), 1.5)
        self.thumb = self.THUMB * aspect
        self.advice = [wrapped(r.reason, 145, 2) for r in audit.recommendations]
        self.strip = 0.75 + sum(self.line_of(words) for words in self.advice)
        self.matrix = self.strip + self.thumb + 1.35
        notes = [*audit.notes[:4], *([f"and {len(audit.notes) - 4} more, in the text"] if len(audit.notes) > 4 else [])]
        self.notes = [wrapped(f"· {note}", 165, 2) for note in notes]
        bottom = self.matrix + self.ROW * len(self.subjects) + 0.85
        across = max(self.LEFT + self.LABEL + self.COLUMN * len(self.failures) + 0.2, 11.0)
        super().__init__(new_figure(width, across, bottom + sum(map(self.line_of, self.notes))))

    def draw(self) -> None:
        audit = self.audit
        self.write(
            self.LEFT, 0.3, f"Which encoder would have noticed?   {count_of(audit.pairs)}", fontsize=14, weight="bold"
        )
        y = 0.7
        for r, words in zip(audit.recommendations, self.advice):
            tone = TONE[self.rows[r.encoder, r.layer, r.failure].judgement]
            self.write(self.LEFT, y, r.term, fontsize=10, weight="bold", color=tone, va="top")
            self.write(self.LEFT + 1.75, y, words, fontsize=9.5, va="top")
            y += self.line_of(words)
        self.draw_strip(self.strip)
        self.draw_heads(self.matrix - 0.42)
        for i, (name, layer) in enumerate(self.subjects):
            top = self.matrix + i * self.ROW
            self.line((self.LEFT, self.inches[0] - 0.2), top, color=LINE, linewidth=0.8)
            first = i == 0 or self.subjects[i - 1][0] != name
            if first:
                self.write(self.LEFT, top + self.ROW / 2, wrapped(name, 22, 3), fontsize=9, weight="bold")
            if layer is not None:
                self.write(self.LEFT + self.LABEL - 0.25, top + self.ROW / 2, f"layer {layer}", ha="right", color=MUTED)
            for j, failure in enumerate(self.failures):
                self.draw_cell(self.rows.get((name, layer, failure)), self.LEFT + self.LABEL + j * self.COLUMN, top)
        y = self.matrix + len(self.subjects) * self.ROW
        self.line((self.LEFT, self.inches[0] - 0.2), y, color=LINE, linewidth=0.8)
        legend = (
            f"Dot: AUROC, line: its 95 % interval; dotted: 0.5, chance, and {SEES}, which the whole interval exceeds where it says "
            "sees and stays below where it says blind. Green field: recommended.",
            "Bar: distances from the after picture. Grey: 95 % of the harmless copies stay below its end. Dark: 90 % of the "
            "failures exceed its beginning (reach), half of them its end. Margin: half of reach, if harmless copies stay below it.",
        )
        for n, words in enumerate(legend):
            self.write(self.LEFT, y + 0.2 + 0.22 * n, words, fontsize=8, color=MUTED)
        y += 0.7
        for note in self.notes:
            self.write(self.LEFT, y, note, fontsize=8.5, va="top")
            y += self.line_of(note)

    @staticmethod
    def line_of(words: str) -> float:
        """The height of a recommendation or a note."""
        return 0.28 + 0.17 * words.count("\n")

    def draw_strip(self, top: float) -> None:
        """Some of what one pair was shown as."""
        count = sum(len(made) for _, made in self.shown)
        step = min((self.inches[0] - 2 * self.LEFT - 0.15 * len(self.shown)) / count, self.THUMB * 1.25)
        x, size = self.LEFT, min(self.THUMB, step - 0.06)
        for kind, made in self.shown:
            self.write(x, top + 0.1, kind, fontsize=10, weight="bold")
            for name, picture in made:
                axes = self.axes(x, top + 0.25, size, self.thumb)
                axes.imshow(picture.numpy(), aspect="equal", interpolation="antialiased")
                axes.set_axis_off()
                self.write(
                    x, top + self.thumb + 0.4, wrapped(name.replace(" %", "\u00a0%"), 17, 2), fontsize=7, color=MUTED
                )
                x += step
            x += 0.15

    def draw_heads(self, y: float) -> None:
        for j, failure in enumerate(self.failures):
            row = next(row for row in self.audit.rows if row.failure == failure)
            x = self.LEFT + self.LABEL + j * self.COLUMN
            self.write(x, y, failure, fontsize=11, weight="bold")
            self.write(x, y + 0.22, f"for {row.term}, distance {row.dist}", fontsize=8, color=MUTED)

    def draw_cell(self, row: Optional[AuditRow], left: float, top: float) -> None:
        middle = top + self.ROW / 2
        if row is None:
            self.write(left, middle, "no picture", color=MUTED, fontsize=8)
            return
        if (row.encoder, row.layer, row.failure) in self.best:
            self.field(left - 0.08, top + 0.03, self.COLUMN - 0.1, self.ROW - 0.06)
        tone = TONE[row.judgement]
        axes = self.axes(left, top + 0.1, 1.15, self.ROW - 0.2)
        for mark in (0.5, SEES):
            axes.axvline(mark, color=MUTED, linewidth=0.7, linestyle=":")
        value, low, high = row.auroc
        if low is not None and high is not None:
            axes.plot(
                [max(low, LOWEST), max(high, LOWEST)],
                [0, 0],
                color=tone,
                linewidth=2.2,
                solid_capstyle="butt",
                alpha=0.55,
            )
        axes.plot([max(value, LOWEST)], [0], marker="o", markersize=6, color=tone, clip_on=False)
        axes.set(xlim=(LOWEST, 1.0), ylim=(-1, 1))
        axes.set_axis_off()
        self.write(left + 1.25, middle - 0.1, f"{row.auroc.value:.2f}", fontsize=11, weight="bold", color=tone)
        self.write(left + 1.25, middle + 0.12, row.judgement, fontsize=8, color=tone)
        self.draw_distances(row, left + 1.75, top)

    def draw_distances(self, row: AuditRow, left: float, top: float) -> None:
        """How the distances of harmless copies and failures lie to each other."""
        axes = self.axes(left, top + 0.1, 1.5, 0.12)
        most = max(row.median, row.reach, row.noise, 1e-12)
        axes.barh([0], [1.0], color="#eef1f4", height=1)
        axes.barh([0], [max(row.median - row.reach, 0.01 * most) / most], left=row.reach / most, color=INK, height=1)
        axes.barh([0], [row.noise / most], color="#9aa5b1", height=0.55)
        axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
        axes.set_axis_off()
        self.write(
            left, top + 0.33, f"harmless {short(row.noise, 2)}   reach {short(row.reach, 2)}", fontsize=7.5, color=MUTED
        )
        if "margin" in TERMS[row.term].defaults:
            chosen = "no margin fits" if row.margin is None else f"margin {row.margin:g}"
            self.write(left, top + 0.46, chosen, fontsize=7.5, color=BAD if row.margin is None else INK)

    def field(self, x: float, y: float, width: float, height: float) -> None:
        """The ground of the recommended cell."""
        from matplotlib.patches import Rectangle

        w, h = self.inches
        corner = (x / w, 1 - (y + height) / h)
        style: dict[str, Any] = {"facecolor": "#eaf3ee", "edgecolor": GOOD, "linewidth": 0.8, "zorder": 0}
        self.figure.add_artist(Rectangle(corner, width / w, height / h, transform=self.figure.transFigure, **style))
