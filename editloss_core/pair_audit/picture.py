"""The pair audit as one picture: the pairs with findings, worst first, and for each what was found."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_whole
from ..drawing.sheet import BAD, GOOD, LINE, MUTED, WARN, Sheet, new_figure, wrapped
from ..masks import oklab
from ..pairs import Pair
from ..pairs.pictures import read_picture
from .result import AuditFinding, PairAudit
from .rules import KINDS, SEVERITIES

TONE = {"error": BAD, "warning": WARN, "note": MUTED}
MOST = 10  # pairs
SIDE = 360  # pixels of a thumbnail
COLUMNS = 92  # letters in a line
_LINE = 0.165  # inches
STRONG = 0.35  # Oklab: a difference that is drawn as black


def audit_picture(audit: PairAudit, width: int = 1600) -> Tensor:
    """``[1, height, width, 3]`` in 0…1.

    Raises:
        ValueError: a width that is not a positive integer.
    """
    check_whole("width", width, 1, "pixels")
    return PairAuditSheet(audit, width).rendered()


def _chosen(audit: PairAudit) -> list[tuple[str, list[AuditFinding]]]:
    """The pairs to show with what is wrong with them; one of each kind first, the rest in the order of the findings."""
    of_pair: dict[str, list[AuditFinding]] = {}
    for found in audit.findings:
        for name in found.pairs:
            if name in audit.pairs:
                of_pair.setdefault(name, []).append(found)
    first: dict[str, str] = {}  # kind → the pair to show for it
    for found in audit.findings:
        for name in found.pairs:
            if name in of_pair:
                first.setdefault(found.kind, name)
    order = list(dict.fromkeys([*first.values(), *of_pair]))[:MOST]
    shown = [(name, found) for name, found in of_pair.items() if name in order]
    return shown or [(name, []) for name in list(audit.pairs)[:4]]


class Words(NamedTuple):
    """A finding and its detail and advice, in lines that fit."""

    finding: AuditFinding
    detail: str
    advice: str


class Row(NamedTuple):
    """What is shown of a pair: its findings, before, after and difference (None for what cannot be read), the words of the
    first findings, and the height of all that in inches."""

    name: str
    found: list[AuditFinding]
    pictures: list[Tensor | None]
    words: list[Words]
    height: float


class PairAuditSheet(Sheet):
    """The layout, in inches from the top left."""

    LEFT, CELL, GAP, WORDS, WIDE, HEAD = 0.25, 1.75, 0.1, 5.95, 12.0, 1.05

    def __init__(self, audit: PairAudit, width: int):
        self.audit = audit
        self.rows: list[Row] = []
        for name, found in _chosen(audit):
            pictures = _thumbnails(audit.pairs[name])
            known = [t for t in pictures if t is not None]
            shape = max((t.shape[0] / t.shape[1] for t in known), default=0.5)
            words = [Words(f, wrapped(f.detail, COLUMNS, 3), wrapped(f.advice, COLUMNS, 2)) for f in found[:3]]
            lines = 0.42 + sum(_tall(w.detail, w.advice) for w in words)
            self.rows.append(Row(name, found, pictures, words, max(self.CELL * min(shape, 1.5), lines) + 0.22))
        listed = {row.name for row in self.rows}
        missing = {n for f in audit.findings for n in f.pairs if n in audit.pairs} - listed
        alone = sum(not any(n in audit.pairs for n in f.pairs) for f in audit.findings)
        self.rest = [f"and {len(missing)} more pairs with findings, in the text"] if missing else []
        if alone:
            self.rest.append(f"{alone} finding{'s' if alone > 1 else ''} about files that make no pair, in the text")
        height = self.HEAD + sum(row.height for row in self.rows) + 0.26 * len(self.rest) + 0.2
        super().__init__(new_figure(width, self.WIDE, height))

    def draw(self) -> None:
        counts = self.audit.counts()
        tone = next((TONE[s] for s in SEVERITIES[:2] if counts[s]), GOOD)
        self.write(self.LEFT, 0.32, f"Pair audit   {self.audit.headline()}", fontsize=14, weight="bold", color=tone)
        heads = ("before", "after", "difference") if self.rows else ()
        for i, head in enumerate(heads):
            self.write(self.LEFT + i * (self.CELL + self.GAP), 0.75, head, fontsize=10, weight="bold")
        note = "outline: the mask; difference: as the files lie, black = 0.35 in Oklab or more"
        self.write(self.LEFT + 3 * (self.CELL + self.GAP) + 0.1, 0.75, note, fontsize=8, color=MUTED)
        y = self.HEAD - 0.12
        for row in self.rows:
            self.line((self.LEFT, self.WIDE - self.LEFT), y, color=LINE, linewidth=0.8)
            self.draw_row(row, y + 0.11)
            y += row.height
        for words in self.rest:
            self.write(self.LEFT, y + 0.1, words, color=MUTED)
            y += 0.26

    def draw_row(self, row: Row, top: float) -> None:
        for i, picture in enumerate(row.pictures):
            left = self.LEFT + i * (self.CELL + self.GAP)
            if picture is None:
                self.write(left, top + 0.2, "no picture", color=MUTED, fontsize=8)
                continue
            tall = min(self.CELL * picture.shape[0] / picture.shape[1], row.height - 0.22)
            axes = self.axes(left, top, self.CELL, tall)
            axes.imshow(picture.numpy(), aspect="equal", interpolation="antialiased")
            axes.set_anchor("NW")
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set(color=LINE, linewidth=0.6)
        x, y = self.LEFT + 3 * (self.CELL + self.GAP) + 0.1, top + 0.1
        self.write(x, y, wrapped(row.name, 70, 1), fontsize=10, weight="bold")
        y += 0.27
        if not row.found:
            self.write(x, y, "nothing found; is the picture on the left where the edit starts?", color=MUTED)
        for finding, detail, advice in row.words:
            self.write(x, y, KINDS[finding.kind].title, weight="bold", color=TONE[finding.severity])
            self.write(x, y + 0.11, detail, fontsize=8.5, va="top", linespacing=1.25)
            self.write(
                x, y + 0.11 + _LINE * _lines(detail), advice, fontsize=8.5, va="top", color=MUTED, linespacing=1.25
            )
            y += _tall(detail, advice)
        if len(row.found) > len(row.words):
            self.write(x, y, f"and {len(row.found) - len(row.words)} more, in the text", fontsize=8, color=MUTED)


def _lines(words: str) -> int:
    return words.count("\n") + 1 if words else 0


def _tall(detail: str, advice: str) -> float:
    """Inches of a finding: title, detail and advice."""
    return 0.3 + _LINE * (_lines(detail) + _lines(advice))


def _thumbnails(pair: Pair) -> list[Tensor | None]:
    """Before and after with the mask's outline, and their difference; None for what cannot be read (any more)."""
    loaded = []
    for part in ("before", "after", "mask"):
        source = getattr(pair, part)
        try:
            values = (
                source
                if isinstance(source, Tensor)
                else None
                if source is None
                else read_picture(source, part == "mask").values
            )
            loaded.append(None if values is None else torch.as_tensor(np.array(values), dtype=torch.float32))
        except ValueError:
            loaded.append(None)
    before, after, mask = loaded
    small = [None if t is None else _small(t) for t in (before, after)]
    difference = None
    if small[0] is not None and small[1] is not None:
        size = small[0].shape[:2]
        other = small[1] if small[1].shape[:2] == size else _resized(small[1], size)
        lab = [oklab(t.permute(2, 0, 1)[None])[0] for t in (small[0], other)]
        distance = (lab[0] - lab[1]).norm(dim=0)
        difference = (1 - distance / STRONG).clamp(0, 1)[..., None].expand(-1, -1, 3)
    if mask is not None:
        small = [None if t is None else _outlined(t, mask) for t in small]
    return [*small, difference]


def _small(picture: Tensor) -> Tensor:
    ratio = min(1.0, SIDE / max(picture.shape[:2]))
    return _resized(picture, tuple(max(1, round(side * ratio)) for side in picture.shape[:2]))


def _resized(picture: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[H, W, 3]`` or ``[H, W]``, antialiased."""
    if tuple(picture.shape[:2]) == tuple(size):
        return picture
    stack = picture[None, None] if picture.ndim == 2 else picture.permute(2, 0, 1)[None]
    found = F.interpolate(stack, size=tuple(size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return found[0, 0] if picture.ndim == 2 else found[0].permute(1, 2, 0)


def _outlined(picture: Tensor, mask: Tensor) -> Tensor:
    """A line around the mask, white within black, so that it shows on anything."""
    inside = (_resized(mask, tuple(picture.shape[:2])) > 0.5).float()[None, None]
    grown = [F.max_pool2d(inside, 2 * r + 1, stride=1, padding=r)[0, 0] > 0 for r in (1, 2)]
    shrunk = -F.max_pool2d(-inside, 3, stride=1, padding=1)[0, 0] > 0
    line = (inside[0, 0] > 0) & ~shrunk | grown[0] & ~(inside[0, 0] > 0)
    dark = grown[1] & ~grown[0]
    return torch.where(dark[..., None], 0.0, torch.where(line[..., None], 1.0, picture))
