"""The outputs of a folder, judged one by one: what lies where, and what became of each file."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from PIL import Image
from torch import Tensor

from ..files import replacing
from ..pairs.files import pictures_in, read_picture, relative, subfolder
from .items import Item
from .picture import heat

PARTS = ("before", "output", "after", "mask")
LONGEST_NAME = 255  # bytes of a file's name, on all common file systems
MOST_WORKERS = 8  # more would read more pictures at a time than disks and memory like
# Pictures: workers take about 4 s to start, one picture 0.3 s (512 x 512, one core of a Xeon at 2.1 GHz).
POOL_PAYS = 24


@dataclass(frozen=True)
class Entry:
    """One output of a folder.

    Attributes:
        name: path below ``output/`` without suffix, as it is spelled there.
        files: "before", "output" and perhaps "after" and "mask".
        problem: why it cannot be judged, found without opening a file; else "".
        notes: sentences for a person.
    """

    name: str
    files: Mapping[str, Path]
    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folder:
    """What lies in a folder, before any picture is opened.

    Attributes:
        entries: every name in ``before/`` or ``output/``, in natural order (2 before 10).
        unused: files in ``after/`` and ``mask/`` that belong to no output.
        parts: the folders that are there.
    """

    entries: tuple[Entry, ...]
    unused: tuple[str, ...] = ()
    parts: Mapping[str, Path] = field(default_factory=dict)


def scan(folder: Path) -> Folder:
    """Match the pictures of ``before/``, ``output/`` and, where they are there, ``after/`` and ``mask/`` by file stem.

    Stems are compared without case and with composed characters; folders inside these are followed, and belong to the name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no folder before/ or output/, or no pictures in them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {folder}")
    parts = {part: place for part in PARTS if (place := subfolder(folder, part)) is not None}
    missing = [f"{part}/" for part in PARTS[:2] if part not in parts]
    if missing:
        there = ", ".join(sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())[:12]) or "nothing"
        raise ValueError(
            f"folder: expected before/ and output/ in {folder}, got no {' and no '.join(missing)}; there is: {there}"
        )
    found: dict[str, dict[str, list[Path]]] = {part: {} for part in PARTS}
    names: dict[str, str] = {}
    for part, place in parts.items():
        for name, path in pictures_in(place):
            found[part].setdefault(name.casefold(), []).append(path)
            if part in PARTS[:2]:
                names[name.casefold()] = name  # as the output has it, which comes last
    if not names:
        raise ValueError(f"folder: expected pictures in before/ and output/ of {folder}, got none")
    entries = [_entry(folder, names[key], {part: found[part].get(key, []) for part in parts}) for key in names]
    unused = [
        relative(p, folder)
        for part in PARTS[2:]
        for key, paths in found[part].items()
        if key not in names
        for p in paths
    ]
    return Folder(tuple(sorted(entries, key=lambda e: _natural(e.name))), tuple(sorted(unused, key=_natural)), parts)


def _entry(folder: Path, name: str, files: Mapping[str, Sequence[Path]]) -> Entry:
    first = {part: paths[0] for part, paths in files.items() if paths}
    twice = [
        f"{part}: expected one file, got {' and '.join(relative(p, folder) for p in ps)}"
        for part, ps in files.items()
        if len(ps) > 1
    ]
    if twice:
        return Entry(name, first, twice[0])
    for part, other in (PARTS[:2], PARTS[1::-1]):
        if part not in first:
            return Entry(name, first, f"{part}: there is no picture for {relative(first[other], folder)}")
    lacking = [part for part in files if part not in first]
    return Entry(name, first, "", tuple(f"No {part} picture of this name." for part in lacking))


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key for sorting in which 2 comes before 10."""
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(p), "") if p.isdecimal() and p.isascii() else (1, 0, p) for p in pieces], name


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
                return Item(entry.name, None, f"{part}: {path.name} cannot be read: {error}", tuple(notes))
            pictures[part] = torch.from_numpy(picture.values.copy())
            if picture.transparent:
                notes.append(
                    f"The {part} picture is transparent in places; it was laid on {'black' if part == 'mask' else 'white'}."
                )
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


def save(picture: Tensor, path: Path) -> None:
    """Write ``[H, W, 3]`` in 0…1 as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy()).save(temporary, format="PNG")
