"""What an audit of pairs found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..drawing.sheet import cell, percent
from ..pairs import Pair
from .measures import MEASURES, PairMeasures
from .rules import KINDS, SEVERITIES

ROWS = 100  # of the table in the text


@dataclass(frozen=True)
class AuditFinding:
    """One thing that was found.

    Attributes:
        kind: one of :data:`KINDS`, which has the advice.
        severity: ``"error"`` (training would refuse it, or learn the wrong thing), ``"warning"`` or ``"note"``.
        pairs: names of the pairs.
        files: as a person finds them, below the folder; names of pairs where they have no files.
        detail: what was found, with its number.
    """

    kind: str
    severity: str
    pairs: tuple[str, ...]
    files: tuple[str, ...]
    detail: str

    @property
    def advice(self) -> str:
        return KINDS[self.kind].advice

    def __str__(self) -> str:
        return f"{' + '.join(self.files)}{f': {self.detail}' if self.detail else ''}"


@dataclass(frozen=True)
class PairAudit:
    """What :func:`audit` found.

    Attributes:
        findings: errors first, each kind together.
        per_pair: name → what was measured. Pairs that could not be read have none.
        count: pairs in the set, broken ones included.
        notes: what could not be checked, and what the pictures cannot tell.
        where: the folder, in words.
        pairs: the pairs that have both pictures, by name, for :func:`~.picture.audit_picture`.
    """

    findings: tuple[AuditFinding, ...]
    per_pair: Mapping[str, PairMeasures]
    count: int
    notes: tuple[str, ...] = ()
    where: str = ""
    pairs: Mapping[str, Pair] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """No errors and no warnings."""
        return all(f.severity == "note" for f in self.findings)

    def counts(self) -> dict[str, int]:
        """Severity → number of findings."""
        return {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}

    def headline(self) -> str:
        """One line: how many pairs, and how many findings of each severity."""
        pairs = f"{self.count} pair{'s' if self.count != 1 else ''}"
        said = [f"{n} {s}{'s' if n != 1 else ''}" for s, n in self.counts().items() if n]
        return f"{pairs}: {', '.join(said) or 'nothing found'}"

    def summary(self) -> str:
        """The headline and a line per kind, without files."""
        lines = [self.headline()]
        for kind in dict.fromkeys(f.kind for f in self.findings):
            members = [f for f in self.findings if f.kind == kind]
            first = " + ".join(members[0].files[:2])
            lines.append(f"- {KINDS[kind].title}: {len(members)}, such as {first}" if len(members) > 1 else f"- {KINDS[kind].title}: {first}")  # fmt: skip
        return "\n".join(lines)

    def text(self) -> str:
        """The report as Markdown: findings by kind with files and advice, what could not be checked, a row per pair."""
        lines = [f"# Pair audit: {self.headline()}"] + (["", cell(self.where)] if self.where else [])
        for severity in SEVERITIES:
            found = [f for f in self.findings if f.severity == severity]
            lines += ["", f"## {severity.capitalize()}s"] if found else []
            for kind in dict.fromkeys(f.kind for f in found):
                members = [f for f in found if f.kind == kind]
                lines += ["", f"**{KINDS[kind].title}** ({len(members)}): {KINDS[kind].advice}", ""]
                lines += [f"- {cell(str(f))}" for f in members]
        if self.notes:
            lines += ["", "## To know", "", *(f"- {cell(note)}" for note in self.notes)]
        if self.per_pair:
            head = (
                "pair",
                "changed",
                "by (Oklab)",
                "shift x, y (px)",
                "zoom",
                "tone (Oklab)",
                "change outside the mask",
            )
            lines += ["", "## Measured", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [_row(name, values) for name, values in list(self.per_pair.items())[:ROWS]]
            if len(self.per_pair) > ROWS:
                lines += ["", f"and {len(self.per_pair) - ROWS} more pairs"]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, object]:
        """Everything as numbers and texts that JSON can hold."""
        parts = ("kind", "severity", "pairs", "files", "detail", "advice")
        return {
            "ok": self.ok,
            "pairs": self.count,
            "where": self.where,
            "counts": self.counts(),
            "findings": [{part: _plain(getattr(f, part)) for part in parts} for f in self.findings],
            "notes": list(self.notes),
            "per_pair": {
                name: {k: _plain(v) for k, v in values.as_dict().items()} for name, values in self.per_pair.items()
            },
            "measures": dict(MEASURES),
        }


def _row(name: str, v: PairMeasures) -> str:
    m = v.movement
    x, y, zoom = (round(number, 1) + 0.0 for number in (m.shift_x, m.shift_y, m.zoom))  # + 0.0: no minus before a zero
    moved = [f"{x:.1f}, {y:.1f}", f"{zoom:.1f} %"] if m.registered else ["unknown", "unknown"]
    cells = [cell(name), f"{v.changed_share:.1%}", f"{v.change:.2f}", *moved, f"{v.tone:.3f}"]
    return f"| {' | '.join(cells)} | {percent(None if v.mask is None else v.mask.uncovered)} |"


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
