"""The outputs of a folder, judged one by one: what lies where, and what became of each file."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from ..drawing.written import save
from ..pairs.files import readable
from ..pairs.outputs import PARTS, TABLES, Moment, find_outputs, natural
from ..pairs.pictures import read_picture
from .items import Item
from .picture import heat

LONGEST_NAME = 255  # bytes of a file's name, on all common file systems
MOST_WORKERS = 8  # more would read more pictures at a time than disks and memory like
# Pictures: workers take about 4 s to start, one picture 0.3 s (512 x 512, one core of a Xeon at 2.1 GHz).
POOL_PAYS = 24


@dataclass(frozen=True)
class Entry:
    """One output of a folder.

    Attributes:
        name: path below the outputs' folder without suffix, as it is spelled there.
        files: "before", "output" and perhaps "after" and "mask".
        problem: why it cannot be judged, found without opening a file; else "".
        notes: sentences for a person.
        pair: name of the pair that it is an output of, as its before picture has it; "" where there is none.
        moment: when in a training it was sampled, as its name says.
    """

    name: str
    files: Mapping[str, Path]
    problem: str = ""
    notes: tuple[str, ...] = ()
    pair: str = ""
    moment: Moment = Moment()


@dataclass(frozen=True)
class Folder:
    """What lies in a folder, before any picture is opened.

    Attributes:
        entries: every output, and every before picture that has none, in natural order (2 before 10), earlier steps first.
        unused: files of other parts that belong to no output.
        parts: the folders that are there.
        notes: what a person should know of how outputs were matched to pairs; what was passed over, with the reason.
    """

    entries: tuple[Entry, ...]
    unused: tuple[str, ...] = ()
    parts: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def moments(self) -> list[Moment]:
        """When outputs were sampled, each once, the earliest first; empty where no name says it."""
        return sorted({e.moment for e in self.entries if e.moment.count is not None}, key=lambda m: (m.unit, m.count))

    def at(self, count: int) -> Folder:
        """The entries of one step alone; -1: of the last.

        Raises:
            ValueError: there is none.
        """
        counts = [m.count for m in self.moments]
        wanted = counts[-1] if count == -1 and counts else count
        found = tuple(e for e in self.entries if e.moment.count == wanted)
        if not found:
            raise ValueError(
                f"--step: expected one of {', '.join(map(str, counts)) or 'none: no name has a step in it'}, got {count}"
            )
        return replace(self, entries=found, unused=())


def scan(folder: Optional[Path] = None, parts: Optional[Mapping[str, Path]] = None) -> Folder:
    """Match the outputs of a folder, or of parts that are named, to before pictures and, where they are there, to after
    pictures and masks; the layouts are those of :func:`~..pairs.outputs.find_outputs`.

    Stems are compared without case and with composed characters; folders inside these are followed, and belong to the name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no before pictures or no outputs.
    """
    found = find_outputs(None if folder is None else Path(folder), parts)
    layout = found.layout
    tables = {part: getattr(layout, table) for part, table in TABLES.items()}
    twice = {name: f for f in layout.findings if f.kind == "duplicate" for name in f.files}
    lacking = [part for part in PARTS[2:] if tables[part]]
    entries, claimed = [], set[str]()
    rivals: dict[tuple[str, str], list[Path]] = {}
    for o in found.outputs:
        rivals.setdefault((o.name.casefold(), str(o.moment)), []).append(o.path)
    for o in found.outputs:
        files = {"output": o.path}
        files |= {part: table[o.key] for part, table in tables.items() if o.key in table}
        claimed.add(o.key)
        same = rivals[o.name.casefold(), str(o.moment)]
        if o.path != same[0]:
            continue  # told with the first of them
        files = {part: files[part] for part in PARTS if part in files}
        double = [("output", [layout.name(p) for p in same])] if len(same) > 1 else []
        double += [(p, list(twice[n].files)) for p in files if p != "output" and (n := layout.name(files[p])) in twice]
        problem = o.problem or "".join(
            f"{part}: expected one file, got {' and '.join(names)}" for part, names in double[:1]
        )
        if not problem and "before" not in files:
            problem = f"before: there is no picture for {layout.name(o.path)}"
        notes = [o.note] if o.note else []
        notes += [] if problem else [f"No {part} picture of this name." for part in lacking if part not in files]
        pair = layout.names[o.key] if "before" in files else ""
        entries.append(Entry(o.name, files, problem, tuple(notes), pair, o.moment))
    alone = [key for key in layout.before if key not in claimed]
    if not found.sampled:  # a trainer samples a few pairs of many
        for key in alone:
            path = layout.before[key]
            entries.append(
                Entry(layout.names[key], {"before": path}, f"output: there is no picture for {layout.name(path)}")
            )
    unused = [layout.name(p) for part in PARTS[2:] for key, p in tables[part].items() if key not in claimed and (found.sampled or key not in layout.before)]  # fmt: skip
    unused += [layout.name(layout.before[key]) for key in alone] if found.sampled else []
    ordered = sorted(entries, key=lambda e: (e.moment.unit, e.moment.count or 0, natural(e.name)))
    return Folder(tuple(ordered), tuple(sorted(unused, key=natural)), found.places, found.notes)


def judge_entry(entry: Entry, maps: Optional[Path] = None) -> Item:
    """Read and judge one output; whatever is wrong with its files becomes the item's message.

    Args:
        entry: from :func:`scan`.
        maps: folder into which the heat maps go, laid over the output, as NAME.MAP.png; a name that would be too long for the
            file system is cut, and ends in a part of its hash.

    Raises:
        OSError: the maps cannot be written.
    """
    if entry.problem:
        return Item(entry.name, None, entry.problem)
    pictures: dict[str, Tensor] = {}
    notes = list(entry.notes)
    try:
        for part, path in entry.files.items():
            try:
                picture = read_picture(path, mask=part == "mask")
            except ValueError as error:
                return Item(entry.name, None, f"{part}: {readable(path.name)} cannot be read: {error}", tuple(notes))
            pictures[part] = torch.from_numpy(picture.values.copy())
            notes += [f"The {part} picture: {remark}." for remark in picture.remarks]
        item = Item.judged(entry.name, notes=notes, **pictures)
    except Exception as error:  # nothing that is odd about one picture should cost the other 499 their verdicts
        reason = "not enough memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        return Item(entry.name, None, f"judging it failed: {reason}", tuple(notes))
    if maps is not None and item.verdict:
        for name, values in item.verdict.maps.items():
            save(heat(pictures["output"], values), maps / _file_name(entry.name, f".{name.replace(' ', '_')}.png"))
    return item


def judge_folder(
    entries: Sequence[Entry], maps: Optional[Path] = None, workers: Optional[int] = None
) -> Iterator[Item]:
    """The items of :func:`scan`, in their order, as they are judged.

    Args:
        entries: what to judge.
        maps: see :func:`judge_entry`.
        workers: processes; None takes as many as there are cores, at most 8, or this process alone where starting others
            would take longer than it saves.

    Raises:
        OSError: the maps cannot be written.
        concurrent.futures.process.BrokenProcessPool: a worker was killed, most often for want of memory.
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, MOST_WORKERS) if len(entries) >= POOL_PAYS else 1
    workers = min(workers, len(entries))
    if workers < 2:
        for entry in entries:
            yield judge_entry(entry, maps)
        return
    # Spawned, since a fork of a process with threads (torch's, tqdm's) can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        for item in pool.map(_judged, entries, [maps] * len(entries)):
            yield _with_values(item, torch.from_numpy)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """A worker: one core each, and Ctrl-C is the parent's to answer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _judged(entry: Entry, maps: Optional[Path]) -> Item:
    """With arrays: torch would send each of a dozen small tensors as a shared memory file of its own."""
    return _with_values(judge_entry(entry, maps), Tensor.numpy)


def _with_values(item: Item, change: Callable[[Any], Any]) -> Item:
    """The item with each of its tensors, or arrays in their place, changed."""
    verdict = item.verdict
    if verdict is not None:
        maps = {name: change(values) for name, values in verdict.maps.items()}
        verdict = replace(verdict, maps=maps, mask=None if verdict.mask is None else change(verdict.mask))
    return replace(item, verdict=verdict, pictures={part: change(x) for part, x in item.pictures.items()})


def _file_name(name: str, ending: str) -> str:
    """NAME and the ending, where the last part of NAME is cut to fit."""
    place, slash, last = name.rpartition("/")
    given, most = os.fsencode(last), LONGEST_NAME - len(ending)
    if len(given) > most:
        digest = f"~{hashlib.sha256(given).hexdigest()[:10]}"
        last = os.fsdecode(given)
        while len(os.fsencode(last)) > most - len(digest):
            last = last[:-1]  # whole characters, of one to four bytes
        last += digest
    return place + slash + last + ending
