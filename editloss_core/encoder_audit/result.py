"""What an encoder audit found: rows, recommendations, and the tables they are read from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Mapping, Optional

from ..drawing.sheet import cell
from ..drawing.statistics import Interval
from ..objective import TERMS
from .examples import Examples

BASELINE = "pixels (8×8 means)"
SEES = 0.8  # AUROC from which an encoder counts as one that notices a failure


@dataclass(frozen=True)
class AuditRow:
    """One encoder (at one layer) against one failure.

    Attributes:
        encoder: its name in the audit; :data:`BASELINE` for the means of pixels.
        layer: of an encoder that has several, counted from 0 as in its node; None otherwise.
        failure: ``"no edit"``, ``"overlay"`` or ``"distorted"``.
        term: the loss against it.
        dist: the distance that this loss uses unless told otherwise.
        pairs: how many could be used.
        auroc: P(d(failure, gt) > d(harmless, gt)), all pairs together, with a 95 % interval.
        constructions: construction → its AUROC alone.
        reach: d(gt, negative) that 90 % of the pictures exceed, the negatives being those that the loss is given (the before
            picture, or overlays as the trainer makes them) and all misshapen copies for the match. No margin above it can be
            met by most pairs.
        median: the median of the same.
        noise: d(gt, harmless copy) that 95 % stay below.
        margin: half of ``reach``, rounded down to two digits; None if that is not above ``noise``, and for a loss without
            one.
    """

    encoder: str
    layer: Optional[int]
    failure: str
    term: str
    dist: str
    pairs: int
    auroc: Interval
    constructions: Mapping[str, float]
    reach: float
    median: float
    noise: float
    margin: Optional[float]

    @property
    def judgement(self) -> str:
        """``"sees"``: the interval lies above :data:`SEES`; ``"blind"``: below; ``"unsure"``: more pairs would tell."""
        if self.auroc.low is None or self.auroc.high is None:
            return "blind" if self.auroc.value < SEES else "unsure"
        return "sees" if self.auroc.low >= SEES else "blind" if self.auroc.high < SEES else "unsure"

    @property
    def called(self) -> str:
        return self.encoder if self.layer is None else f"{self.encoder}, layer {self.layer}"

    @property
    def hardest(self) -> str:
        """The construction that is nearest to harmless."""
        return min(self.constructions, key=self.constructions.__getitem__)


@dataclass(frozen=True)
class Recommendation:
    """What to wire to one loss.

    Attributes:
        term, failure, dist: see :class:`AuditRow`.
        encoder, layer: the best of those given.
        margin: to set; None for a loss without margin, or where no fixed one fits.
        good: whether the encoder is shown to notice the failure.
        reason: in words.
    """

    term: str
    failure: str
    dist: str
    encoder: str
    layer: Optional[int]
    margin: Optional[float]
    good: bool
    reason: str


@dataclass(frozen=True)
class EncoderAudit:
    """The result of :func:`~.encoder_audit.audit_encoders`.

    Attributes:
        rows: encoder by encoder, layer by layer, failure by failure; the baseline last.
        recommendations: one for each loss.
        pairs: how many pairs were used.
        notes: what was left out, and what to beware of.
        example: pictures of the first pair.
    """

    rows: tuple[AuditRow, ...]
    recommendations: tuple[Recommendation, ...]
    pairs: int
    notes: tuple[str, ...]
    example: Examples

    def row(self, encoder: str, failure: str, layer: Optional[int] = None) -> AuditRow:
        """The row of an encoder (at a layer) and a failure; KeyError if there is none."""
        for row in self.rows:
            if (row.encoder, row.failure, row.layer) == (encoder, failure, layer):
                return row
        raise KeyError(f"{encoder}, layer {layer}, {failure}")

    def text(self) -> str:
        """Recommendations, AUROCs and distances as Markdown."""
        lines = [f"**Encoder audit**, {count_of(self.pairs)}", ""]
        lines += [f"- **{r.term}**: {r.reason}" for r in self.recommendations]
        failures = list(dict.fromkeys(row.failure for row in self.rows))
        subjects = list(dict.fromkeys((row.encoder, row.layer) for row in self.rows))
        lines += ["", f"| encoder | layer | {' | '.join(f'{f}: AUROC' for f in failures)} |"]
        lines.append("|---" * (2 + len(failures)) + "|")
        by_place = {(row.encoder, row.layer, row.failure): row for row in self.rows}
        for name, layer in subjects:
            found = [by_place.get((name, layer, failure)) for failure in failures]
            cells = ["–" if row is None else f"{interval(row.auroc)} {row.judgement}" for row in found]
            lines.append(f"| {cell(name)} | {'–' if layer is None else layer} | {' | '.join(cells)} |")
        lines += [
            "",
            "AUROC: how often a failure is farther from the after picture than a harmless copy is, 0.5 = chance; in brackets "
            f"95 % intervals. sees: at least {SEES} for sure; blind: below it for sure; unsure: more pairs would tell.",
            "",
            "| encoder | layer | loss | distance | harmless, 95 % | failure, 10 % | failure, median | margin | hardest to see |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            lines.append(
                f"| {cell(row.encoder)} | {'–' if row.layer is None else row.layer} | {row.term} | {row.dist} "
                f"| {short(row.noise)} | {short(row.reach)} | {short(row.median)} | {margin_of(row)} "
                f"| {cell(row.hardest)} {row.constructions[row.hardest]:.2f} |"
            )
        lines += [
            "",
            "failure, 10 %: 90 % of the pictures that the loss is given as negatives are farther from the after picture; a "
            "larger margin cannot be met. margin: half of it, where that is above what harmless changes do.",
        ]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        rows = [
            {**asdict(row), "auroc": row.auroc._asdict(), "judgement": row.judgement, "hardest": row.hardest}
            for row in self.rows
        ]
        recommendations = [asdict(r) for r in self.recommendations]
        return {"pairs": self.pairs, "rows": rows, "recommendations": recommendations, "notes": list(self.notes)}


def count_of(pairs: int) -> str:
    """``1 pair``, ``2 pairs``."""
    return f"{pairs} pair{'' if pairs == 1 else 's'}"


def margin_of(row: AuditRow) -> str:
    if "margin" not in TERMS[row.term].defaults:
        return "–"
    return "none fits" if row.margin is None else f"{row.margin:g}"


def interval(auroc: Interval, form: str = "{:.2f} ({:.2f}–{:.2f})") -> str:
    """In this form, its ends rounded outwards; the value alone where there is no interval."""
    if auroc.low is None or auroc.high is None:
        return f"{auroc.value:.2f}"
    return form.format(auroc.value, math.floor(100 * auroc.low) / 100, math.ceil(100 * auroc.high) / 100)


def short(distance: float, digits: int = 3) -> str:
    """So many digits, and a comma instead of a power of ten in what is large."""
    return f"{float(f'{distance:.{digits}g}'):,.10g}"
