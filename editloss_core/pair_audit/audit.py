"""Before training: what is wrong with a set of pairs, which files it is, and what to do.

:func:`audit` takes a folder, also one that :func:`~..pairs.find_pairs` refuses, or a set that it accepted. A broken pair is a
finding, and the others are still measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor

from ..encoders.base import Encoder
from ..hashing import hash_tensors
from ..pairs import Pair, PairSet, find_pairs
from ..pairs.files import PairProblems, read_caption, readable, relative, scan
from ..pairs.geometry import MASK_PROPORTIONS, same_proportions
from ..pairs.pictures import read_picture
from ..progress import Progress
from .between_pairs import copies, find_swapped, likely_partners
from .flawed import Look, flaws, look
from .measures import Measured, PairMeasures, Sketch, agreeing, measure
from .result import AuditFinding, PairAudit
from .rules import AGREEMENT, KINDS, REPAINTED, SEVERITIES, of_caption, of_letters, of_pair


def audit(
    pairs: Union[PairSet, str, Path],
    control_folder: Union[str, Path] = "",
    *,
    default_caption: str = "",
    others: Optional[PairSet] = None,
    encoder: Optional[Encoder] = None,
    progress: Optional[Progress] = None,
    check: Optional[Callable[[], None]] = None,
) -> PairAudit:
    """Look for everything that spoils a set of pairs.

    Pictures are read one by one, and about 40 kB of each pair are kept. On one core 0.2 s a pair of 512² pixels, 0.35 s of
    1024². A folder is read twice: once as :func:`~..pairs.find_pairs` checks it, once to measure.

    Args:
        pairs: a set, or a folder in one of the layouts of :func:`~..pairs.find_pairs`, broken or not.
        control_folder, default_caption: as in :func:`~..pairs.find_pairs`; for a folder.
        others: another set that should share no picture with this one, such as the validation pairs.
        encoder: its embeddings help to find swapped pairs; without one, colours and shapes are compared.
        progress: called with (done, total).
        check: called before each pair; may raise to stop.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: none of the layouts fits, or an argument is something else.
    """
    if not isinstance(pairs, (PairSet, str, Path)):
        raise ValueError(f"pairs: expected a PairSet or a folder, got {type(pairs).__name__}")
    if others is not None and not isinstance(others, PairSet):
        raise ValueError(f"others: expected a PairSet, got {type(others).__name__}")
    run = _Run(progress, check)
    if isinstance(pairs, PairSet):
        run.expect(len(pairs), others)
        run.folder, run.count, items = pairs.folder, len(pairs), list(pairs)
        run.notes += pairs.notes
        where = f"{readable(pairs.folder.name)} ({pairs.layout})" if pairs.folder else ""
    else:
        items, where = run.scan(
            Path(pairs), Path(control_folder) if str(control_folder) else None, default_caption, others
        )
    run.items = {pair.name: pair for pair in items}
    for pair in items:
        run.look_at(pair)
    run.compare(others, encoder)
    order = {kind: place for place, kind in enumerate(KINDS)}
    found = sorted(run.findings.values(), key=lambda f: (SEVERITIES.index(f.severity), order[f.kind], f.files))
    values = {name: measured.values for name, measured in run.measured.items()}
    return PairAudit(tuple(found), values, run.count, tuple(run.notes), where, run.items)


class _Run:
    """One audit in progress."""

    def __init__(self, progress: Optional[Progress], check: Optional[Callable[[], None]]):
        self.progress, self.check = progress, check
        self.done, self.total, self.count = 0, 0, 0
        self.folder: Optional[Path] = None
        self.items: dict[str, Pair] = {}
        self.findings: dict[tuple[str, tuple[str, ...]], AuditFinding] = {}  # (kind, files): each is told once
        self.measured: dict[str, Measured] = {}
        self.looks: dict[str, Look] = {}
        self.notes: list[str] = []

    def expect(self, steps: int, others: Optional[PairSet]) -> None:
        self.total = steps + (len(others) if others is not None else 0)

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def add(self, kind: str, pairs: Sequence[str], files: Sequence[str], detail: str, severity: str = "") -> None:
        found = AuditFinding(kind, severity or KINDS[kind].severity, tuple(pairs), tuple(files), detail)
        self.findings.setdefault((kind, found.files), found)

    def scan(
        self, folder: Path, control: Optional[Path], caption: str, others: Optional[PairSet]
    ) -> tuple[list[Pair], str]:
        """The pairs with both pictures, whether :func:`find_pairs` takes the folder or not; its refusals are findings."""
        layout = scan(folder, control)
        keys = sorted(layout.before.keys() & layout.after.keys())
        self.folder, self.count = folder, len(layout.before.keys() | layout.after.keys())
        self.expect(2 * len(keys), others)
        where = f"{readable(folder.name)} ({layout.description})"

        def checked(done: int, total: int) -> None:
            if self.check is not None:
                self.check()
            self.step()

        try:
            found = find_pairs(folder, control or "", default_caption=caption, progress=checked)
            self.notes += found.notes
            return list(found), where
        except PairProblems as problems:
            self.notes += problems.notes
            of_file = {
                layout.name(path): layout.names.get(key, key)
                for table in (layout.before, layout.after, layout.masks, layout.captions)
                for key, path in table.items()
            }
            for kind, files, detail in problems.findings:
                names = dict.fromkeys(of_file[file] for file in files if file in of_file)
                self.add(kind, list(names), files, detail)
        pairs = []
        for key in keys:
            words = ""
            if key in layout.captions:
                try:
                    words = read_caption(layout.captions[key])
                except ValueError:
                    pass  # find_pairs has said so
            pair = Pair(
                layout.names[key], layout.before[key], layout.after[key], words or caption, layout.masks.get(key)
            )
            pairs.append(pair)
        return pairs, where

    def file(self, pair: Pair, part: str) -> str:
        """As :meth:`PairSet.called`."""
        source = pair.after if part == "caption" else getattr(pair, part)
        if self.folder is not None and isinstance(source, Path):
            return relative(source, self.folder)
        return f"{pair.name} {part}"

    def files(self, *names: str, parts: Sequence[str] = ("before", "after")) -> list[str]:
        return [self.file(self.items[name], part) for name in names for part in parts]

    def look_at(self, pair: Pair) -> None:
        """Read, measure and judge one pair."""
        if self.check is not None:
            self.check()
        told = of_caption(pair.caption.strip()) + of_letters(pair.caption)
        try:
            measured, self.looks[pair.name] = read_and_measure(pair)
            self.measured[pair.name] = measured
            told += of_pair(measured.values)
            self._complete(pair, measured.values)
        except _Unreadable as error:
            self.add("unreadable", [pair.name], [self.file(pair, error.part)], str(error))
        for kind, parts, detail, severity in told:
            self.add(kind, [pair.name], [self.file(pair, part) for part in parts], detail, severity)
        self.step()

    def _complete(self, pair: Pair, values: PairMeasures) -> None:
        """:func:`find_pairs` says that the proportions differ; what follows from the pictures belongs to it."""
        key = ("proportions", tuple(self.files(pair.name)))
        if key in self.findings:
            found = self.findings[key]
            self.findings[key] = replace(found, detail=f"{found.detail}; {values.fit}")

    def compare(self, others: Optional[PairSet], encoder: Optional[Encoder]) -> None:
        """What shows between pairs, and between sets."""
        usable = {n: m for n, m in self.measured.items() if not m.values.flat}
        sketches = {n: m.sketch for n, m in usable.items()}
        edited = {n: s for n, s in sketches.items() if usable[n].values.changed_share > 0}
        lonely = [n for n in edited if usable[n].values.movement.agreement < REPAINTED]
        for name, other, agreement in self._strangers(sketches, lonely):
            self._forget(name, ("background", "mask short", "mask elsewhere", "mask large"))
            detail = f"{self.file(self.items[other], 'after')} shows the place of {self.file(self.items[name], 'before')} ({agreement:.0%} of its blocks)"
            self.add("wrong partner", [name], self.files(name), detail)
        odd = {
            n for f in self.findings.values() if f.kind in ("turned", "size swapped", "proportions") for n in f.pairs
        }
        comparable = {n: s for n, s in edited.items() if n not in lonely and n not in odd}
        captions = {n: self.items[n].caption for n in comparable}
        edges = {n: usable[n].values.edges for n in comparable}
        swaps, notes, support = find_swapped(comparable, captions, edges, encoder)
        for name, reason in swaps.items():
            self.add("swapped", [name], self.files(name), reason)
        for name, value in support.items():
            self.measured[name] = replace(usable[name], values=replace(usable[name].values, support=value))
        self.notes += notes
        self._flawed([n for n in usable if n not in odd and n not in swaps])
        self._copies(sketches)
        if others is not None:
            self._leaks(sketches, others)

    def _strangers(self, sketches: Mapping[str, Sketch], lonely: Sequence[str]) -> Iterator[tuple[str, str, float]]:
        """(pair, the pair whose after picture fits its before picture, share of agreeing blocks)."""
        for name, candidates in likely_partners(sketches, lonely).items():
            for other in candidates:
                if self.check is not None:
                    self.check()
                with contextlib.suppress(ValueError):  # a file that was there is gone
                    before, _ = _pixels(self.items[name].before, mask=False)
                    after, _ = _pixels(self.items[other].after, mask=False)
                    agreement = agreeing(before, after)
                    if agreement >= AGREEMENT:
                        yield name, other, agreement
                        break

    def _forget(self, name: str, kinds: Sequence[str]) -> None:
        """What a pair was said to have, and has only because its pictures do not belong together."""
        gone = [key for key, f in self.findings.items() if f.kind in kinds and f.pairs == (name,)]
        for key in gone:
            del self.findings[key]

    def _flawed(self, names: Sequence[str]) -> None:
        found, untold = flaws({n: self.looks[n] for n in names}, {n: self.items[n].caption for n in names})
        self.notes += untold
        for flaw in found:
            kind = "no edit" if flaw.kind == "unedited" else flaw.kind
            self.add(kind, [flaw.name], self.files(flaw.name), flaw.detail)

    def _copies(self, sketches: Mapping[str, Sketch]) -> None:
        for (one, two), same in copies(sketches).items():
            exact = "the same file" if all(same.values()) else "copies of one another, to the eye"
            if "bb" in same and "aa" in same:
                self.add("duplicate pair", [one, two], self.files(one, two), exact)
            elif "ba" in same and "ab" in same:
                self.add("reversed", [one, two], self.files(one, two), "what is before in one is after in the other")
            elif "bb" in same and self.items[one].caption == self.items[two].caption:
                detail = f"{exact}, with one caption and two targets"
                self.add("same before", [one, two], self.files(one, two, parts=["before"]), detail)
            elif "aa" in same:
                self.add("same after", [one, two], self.files(one, two, parts=["after"]), exact)

    def _leaks(self, sketches: Mapping[str, Sketch], others: PairSet) -> None:
        theirs: dict[str, Sketch] = {}
        for pair in others:
            if self.check is not None:
                self.check()
            try:
                theirs[pair.name] = read_and_measure(pair)[0].sketch
            except _Unreadable as error:
                self.notes.append(f"the other set's {pair.name} cannot be read ({error.part}: {error})")
            self.step()
        for (own, other), same in copies(sketches, theirs).items():
            parts = {"bb": "before", "aa": "after", "ba": "before", "ab": "after"}
            files = dict.fromkeys(self.file(self.items[own], parts[key]) for key in same)
            self.add("leak", [own], list(files), f"also in the other set, in {other}")


class _Unreadable(ValueError):
    def __init__(self, part: str, error: ValueError):
        super().__init__(str(error))
        self.part = part


def read_and_measure(pair: Pair) -> tuple[Measured, Look]:
    """The measures of a pair from its files or tensors, and what flawed pairs are told by. A mask that is unreadable, empty or of other proportions, which is
    :func:`find_pairs`' finding, is left out.

    Raises:
        _Unreadable: the before or the after picture cannot be read.
    """
    pictures, contents = [], []
    for part in ("before", "after"):
        try:
            picture, content = _pixels(getattr(pair, part), mask=False)
        except ValueError as error:
            raise _Unreadable(part, error) from error
        pictures.append(picture)
        contents.append(content)
    mask = None
    if pair.mask is not None:
        try:
            mask, _ = _pixels(pair.mask, mask=True)
        except ValueError:
            mask = None
        if mask is not None:
            size = mask.shape[0], mask.shape[1]
            fits = any(same_proportions(size, (p.shape[0], p.shape[1]), MASK_PROPORTIONS) for p in pictures)
            mask = None if not fits or float(mask.max()) < 0.5 else mask
    measured = measure(pictures[0], pictures[1], mask)
    sketch = replace(measured.sketch, contents=(contents[0], contents[1]))
    return replace(measured, sketch=sketch), look(*pictures)


def _pixels(source: Union[Path, Tensor], mask: bool) -> tuple[Tensor, str]:
    """(pixels, their sha256)."""
    if isinstance(source, Path):
        picture = read_picture(source, mask)
        return torch.from_numpy(
            picture.values if picture.values.flags.writeable else picture.values.copy()
        ), picture.content
    return source.float().clamp(0, 1), hash_tensors([("picture", source)])
