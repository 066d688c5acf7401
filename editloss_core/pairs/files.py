"""The files behind pairs: which belong together, what is wrong with them, and what is passed over.

Nothing here knows of training: :mod:`.pair_set` is the door. :mod:`.pictures` knows what a picture is.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Optional

from .pictures import endings, needs

CAPTION_ENDINGS = (".txt", ".caption")  # kohya has either
NOT_CAPTIONS = ("readme", "license", "licence", "requirements")  # texts that lie beside pictures and describe none
NOT_FOLDERS = (".", "_", "@")  # beginnings: hidden, of ai-toolkit and macOS (_controls, __MACOSX), of Synology (@eaDir)
SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir")  # left everywhere; not worth a word
LISTED = 12  # files that a message names where there may be thousands

# What the folders of one part are called; the first of these names that is there is the one.
PART_FOLDERS = {
    "before": ("before", "control"),
    "after": ("after", "target"),
    "output": ("output", "outputs", "samples", "sample"),
    "mask": ("mask", "masks"),
    "captions": ("captions", "caption"),
}

# Every kind of finding, in the order of the report, with what to do about it.
KINDS = {
    "unreadable": "files that cannot be read; export them again",
    "no after": "before pictures without an after picture of the same name",
    "no before": "after pictures without a before picture of the same name",
    "duplicate": "files that claim the same place; keep one of each",
    "mask alone": "masks without a pair of the same name",
    "caption alone": "captions without a pair of the same name; rename them, or take them out of the folder",
    "no caption": "pairs without a caption; write a .txt of the same name, or set default_caption",
    "proportions": "before and after of different proportions; crop both in the same way",
    "mask proportions": "masks of other proportions than their pictures",
    "mask empty": "masks without an edit; expected white where the picture changes",
    "too small": "pictures that are too small",
    "reference alone": "further references without a pair of the same name",
    "reference gap": "further references whose number does not follow; begin with before_2 and leave none out",
    "no edit": "pairs without a visible edit; is the before picture in both places?",
}


class Finding(NamedTuple):
    """One thing that is wrong with a folder of pairs.

    Attributes:
        kind: one of :data:`KINDS`.
        files: what it is about, relative to the folder; names of pairs where they have no files.
        detail: what was found, or "".
    """

    kind: str
    files: tuple[str, ...]
    detail: str = ""


class PairProblems(ValueError):
    """Everything that is wrong with a set of pairs, in one message grouped by kind, with every file.

    Attributes:
        findings: all of them, in the order of the message.
        notes: what a person should know beside them.
    """

    def __init__(self, findings: Sequence[Finding], where: str, notes: Sequence[str] = ()):
        self.notes = tuple(notes)
        self.findings = tuple(sorted(findings, key=lambda f: (list(KINDS).index(f.kind), f.files)))
        count = len(self.findings)
        lines = [f"pairs: {count} problem{'s' if count > 1 else ''} in {where}; nothing was started"]
        for kind, advice in KINDS.items():
            found = [f for f in self.findings if f.kind == kind]
            if found:
                lines.append(f"• {advice} ({len(found)}):")
                lines += [f"    {' + '.join(f.files)}{f': {f.detail}' if f.detail else ''}" for f in found]
        if notes:
            lines += ["• to know:", *(f"    {note}" for note in notes)]
        super().__init__("\n".join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """What lies where in a folder of pairs, before any picture is opened.

    Attributes:
        description: the layout that was recognised, in words.
        root: the folder that names in messages are relative to.
        before, after, masks, captions: name of the pair without case → file.
        references: of before_2, before_3 … in this order: the same.
        names: the same, → the name as the after picture has it.
        findings: duplicates.
        notes: what was passed over, and names that cannot be written as they are.
        unread: stem without case → what a picture of that name would need to be read.
    """

    description: str
    root: Path
    before: dict[str, Path] = field(default_factory=dict)
    after: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    captions: dict[str, Path] = field(default_factory=dict)
    references: list[dict[str, Path]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    _used: set[Path] = field(default_factory=set)
    _reasons: dict[Path, str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """How a message calls a file."""
        return relative(path, self.root)

    def use(self, path: Path) -> None:
        """A file that is not passed over."""
        self._used.add(path)

    def add(self, part: str, entries: Iterable[tuple[str, Path]]) -> None:
        """Enter (name of a pair, file) into one of the tables; what is already taken within the same call is a finding."""
        table: dict[str, Path] = (
            self.references[int(part[7:]) - 2] if part.startswith("before_") else getattr(self, part)
        )
        rivals: dict[str, list[Path]] = {}
        for name, path in entries:
            self.use(path)
            rivals.setdefault(name.casefold(), []).append(path)
            if part == "after":
                self.names.setdefault(name.casefold(), name)
        for key, paths in rivals.items():
            if len(paths) > 1:
                self.findings.append(Finding("duplicate", tuple(map(self.name, paths))))
            table.setdefault(key, paths[0])

    def add_captions(self, entries: Iterable[tuple[str, Path]], strict: bool = True) -> None:
        """Captions from one more place, for pairs that have none yet. A strict place holds nothing but captions, so that
        one without a pair is a finding. Of a name with both endings, the .txt is read."""
        known, taken = self.before.keys() | self.after.keys(), dict(self.captions)
        wanted = [
            (name, path)
            for name, path in entries
            if name.casefold() in known or (strict and path.stem.casefold() not in NOT_CAPTIONS)
        ]
        of_txt = {name.casefold() for name, path in wanted if path.suffix.lower() == CAPTION_ENDINGS[0]}
        first = [(n, p) for n, p in wanted if p.suffix.lower() == CAPTION_ENDINGS[0] or n.casefold() not in of_txt]
        self.add("captions", first)
        self.captions.update(taken)
        read = {path for name, path in first if name.casefold() not in taken}
        second = {path for _, path in wanted} - read
        self._used -= second
        self._reasons.update(dict.fromkeys(second, "the pair has another caption"))

    def account(self, files: Iterable[Path], others: str, parts: Sequence[str] = ()) -> None:
        """Note what of ``files`` is in no table, and why.

        Args:
            files: everything below a folder, by :func:`walk`.
            others: why a picture is in no table in this layout.
            parts: where only their folders are looked into, and others named as a whole.
        """
        names = [name for part in parts for name in PART_FOLDERS[part]]
        names += [f"{name}_{2 + i}" for i in range(len(self.references)) for name in PART_FOLDERS["before"]]
        passed: dict[str, dict[str, None]] = {}
        odd = []
        for path in files:
            top = path.relative_to(self.root).parts[0] if parts and path.parent != self.root else ""
            if path in self._used:
                odd += [self.name(path)] if readable(path.name) != path.name else []
            elif top and top.casefold() not in names and path not in self._reasons:
                passed.setdefault("folders that are no part of the pairs", {}).setdefault(f"{readable(top)}/")
            else:
                reason = self._reasons.get(path) or _passed_over(path, others)
                if reason:
                    passed.setdefault(reason, {}).setdefault(self.name(path) + "/" * path.is_dir())
                wanted = needs(path.suffix.lower())
                if wanted:
                    self.unread[_bare(path)] = f"{self.name(path)} needs {wanted}"
        self.notes += [f"passed over ({reason}): {listed(names)}" for reason, names in passed.items()]
        if odd:
            self.notes.append(
                f"names that are not UTF-8, or have control characters, are written with \\x: {listed(odd)}"
            )

    def partner(self, path: Path) -> str:
        """What is known of the picture that a lone one lacks, or ""."""
        return self.unread.get(_bare(path), "")


def _bare(path: Path) -> str:
    """The stem that the files of a pair share."""
    return re.sub("_(before|after|mask)$", "", path.stem.casefold())


def _passed_over(path: Path, others: str) -> str:
    """Why a file is in no table; "" for what systems leave."""
    name, ending = path.name.casefold(), path.suffix.lower()
    if name in SYSTEM or name.startswith("._"):
        return ""
    if path.is_dir():
        return f"folders that begin with {', '.join(NOT_FOLDERS[:-1])} or {NOT_FOLDERS[-1]}"
    a_picture, a_text = ending in endings() or bool(needs(ending)), ending in CAPTION_ENDINGS
    if name.startswith("."):
        return "hidden" if a_picture or a_text else ""
    if os.path.exists(path) and not os.path.isfile(path):
        return "no files"
    if needs(ending):
        return f"{ending[1:].upper()} needs {needs(ending)}; or save it as PNG"
    return others if a_picture else "texts of no pair" if a_text else "neither pictures nor captions"


def listed(names: Collection[str]) -> str:
    """The first names of many."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(list(names)[:LISTED]) + more


def readable(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes that are no UTF-8 and control characters as \x and two
    digits, half surrogate pairs as \u and four.

    >>> print(readable("caf\udce9\n.png"))
    caf\xe9\x0a.png
    """

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
        return f"\\x{byte:02x}" if byte < 256 else f"\\u{byte:04x}"

    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escaped, name)


def relative(path: Path, folder: Path) -> str:
    """How a message that names the folder calls a file."""
    try:
        return readable(Path(os.path.relpath(path, folder)).as_posix())
    except ValueError:  # on another drive of Windows
        return readable(path.as_posix())


def scan(folder: Path, control_folder: Optional[Path] = None) -> Layout:
    """Recognise the layout of a folder; see :func:`~.pairs.find_pairs` for the three there are.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: no layout fits; the message says what was looked for and what is there.
    """
    for path in (folder, control_folder):
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"pairs: there is no folder {readable(str(path))}")
    if control_folder is not None:
        if control_folder.resolve() == folder.resolve():
            raise ValueError(
                "control_folder: expected another folder than the after pictures', got "
                f"{readable(str(folder))} for both"
            )
        found = _two_folders(folder, control_folder)
    else:
        before, after = (part_folders(folder, part) for part in ("before", "after"))
        found = _side_by_side(folder, before, after) if before and after else _suffixed(folder)
    if not found.before and not found.after:
        there = sorted(readable(p.name) + "/" * p.is_dir() for p in visible(folder))
        wanting = [f"; {reason}" for reason in found.unread.values()]
        raise ValueError(
            f"pairs: no pairs in {readable(str(folder))}; expected the folders before/ and after/ (or control/ and target/), or files that end in "
            "_before and _after, or pictures here and a control_folder with the before pictures (PNG, JPEG, WebP and others); "
            f"got {', '.join(there[:LISTED]) or 'an empty folder'}{', …' if len(there) > LISTED else ''}"
            + "".join(wanting[:LISTED])
        )
    return found


def _two_folders(folder: Path, control: Path) -> Layout:
    layout = Layout("after pictures in the folder, before pictures in the control folder", folder)
    mask, captions = (part_folders(folder, part) for part in ("mask", "captions"))
    apart = (*mask, *captions, control)
    layout.add("after", pictures_in(folder, apart))
    layout.add("before", pictures_in(control, [folder]))
    layout.add("masks", _each(pictures_in, mask))
    layout.add_captions(_texts(folder, apart))
    layout.add_captions(_texts(control, [folder]), strict=False)
    layout.add_captions(_each(_texts, captions))
    others = "pictures among the captions"
    layout.account(chain(walk(folder, [control]), walk(control, [folder])), others)
    return layout


def _side_by_side(folder: Path, before: Sequence[Path], after: Sequence[Path]) -> Layout:
    layout = Layout("folders before/ and after/", folder)
    mask, captions = (part_folders(folder, part) for part in ("mask", "captions"))
    layout.add("after", _each(pictures_in, after))
    layout.add("before", _each(pictures_in, before))
    layout.add("masks", _each(pictures_in, mask))
    further = _further(folder)
    for number, there in enumerate(further, 2):
        layout.references.append({})
        layout.add(f"before_{number}", _each(pictures_in, there))
    for places in (after, before, captions):
        layout.add_captions(_each(_texts, places))
    apart = (*before, *after, *mask, *captions, *chain.from_iterable(further))
    layout.add_captions(_texts(folder, apart), strict=False)
    layout.account(walk(folder), "pictures outside before/, after/ and mask/", ("before", "after", "mask", "captions"))
    return layout


def _further(folder: Path) -> list[list[Path]]:
    """The folders of before_2, before_3 … (or control_2 …) up to the largest number that is there."""
    found: dict[int, list[Path]] = {}
    for path in visible(folder):
        match = re.fullmatch(f"({'|'.join(PART_FOLDERS['before'])})_([2-9])", path.name.casefold())
        if match and path.is_dir():
            found.setdefault(int(match[2]), []).append(path)
    return [found.get(number, []) for number in range(2, max(found, default=1) + 1)]


def _suffixed(folder: Path) -> Layout:
    layout = Layout("one folder with _before and _after", folder)
    mask, captions = (part_folders(folder, part) for part in ("mask", "captions"))
    pictures, texts = list(pictures_in(folder, captions)), list(_texts(folder, captions))
    for part, ending in (("after", "_after"), ("before", "_before")):
        layout.add(part, ending_in(ending, pictures))
    masks = {path: name for name, path in ending_in("_mask", pictures)}
    for name, path in _each(pictures_in, mask):  # unless the folder is one of pairs, of people who wear one
        pairs_own = masks.get(path, "").casefold() in layout.before.keys() | layout.after.keys()
        if not pairs_own and not _bare_of(name, ("_before", "_after")):
            masks[path] = _bare_of(name, ("_mask",)) or name
    layout.add("masks", [(name, path) for path, name in masks.items()])
    layout.add_captions([(name, path) for name, path in texts if not _bare_of(name, ("_after", "_before"))])
    for ending in ("_after", "_before"):
        layout.add_captions(ending_in(ending, texts))
    layout.add_captions(_each(_texts, captions))
    layout.account(walk(folder), "pictures whose names end in none of _before, _after and _mask")
    return layout


def _each(read: Callable[[Path], Iterator[tuple[str, Path]]], places: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    return chain.from_iterable(map(read, places))


def _bare_of(name: str, suffixes: Sequence[str]) -> str:
    """A name without the first of these that it ends in; "" if it ends in none."""
    return next((name[: -len(s)] for s in suffixes if name.casefold().endswith(s)), "")


def ending_in(ending: str, entries: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The entries whose names end so, without it."""
    return [
        (name[: -len(ending)], path)
        for name, path in entries
        if name.casefold().endswith(ending) and len(path.stem) > len(ending)
    ]


def visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def part_folders(folder: Path, part: str) -> list[Path]:
    """The folders of a part: those of the first of its names that is there, however its letters are written."""
    inside = [p for p in visible(folder) if p.is_dir()]
    found = ([p for p in inside if p.name.casefold() == name] for name in PART_FOLDERS[part])
    return next((places for places in found if places), [])


def walk(folder: Path, apart: Iterable[Path] = ()) -> Iterator[Path]:
    """Every file below a folder, and those folders that are not looked into for their names, sorted within each folder.

    Links are followed, and circles end. ``apart``: folders to stay out of.
    """
    known = {p.resolve() for p in (folder, *apart)}
    for root, folders, names in os.walk(folder, followlinks=True):
        skipped = [name for name in sorted(folders) if name.startswith(NOT_FOLDERS)]
        inside = {name: Path(root, name).resolve() for name in sorted(folders) if name not in skipped}
        folders[:] = [name for name, place in inside.items() if place not in known]
        known.update(inside.values())  # links may lead back
        yield from (Path(root, name) for name in (*sorted(names), *skipped))


def _files(folder: Path, suffixes: Collection[str], apart: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """(path below the folder without suffix, file) of every visible file of a kind; ``apart``: folders to stay out of.

    Names are composed (NFC): macOS writes é as two characters, other systems as one. A link to nowhere is a file that
    cannot be read, and no reason to go on without it.
    """
    for path in walk(folder, apart):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if os.path.isfile(path) or not os.path.exists(path):
            name = path.relative_to(folder).with_suffix("").as_posix()
            yield readable(unicodedata.normalize("NFC", name)), path


def pictures_in(folder: Path, apart: Iterable[Path] = ()) -> Iterator[tuple[str, Path]]:
    """(path below the folder without suffix, file) of every picture. ``apart``: folders to stay out of."""
    return _files(folder, endings(), apart)


def _texts(folder: Path, apart: Iterable[Path] = ()) -> Iterator[tuple[str, Path]]:
    return _files(folder, CAPTION_ENDINGS, apart)


BOMS = {  # the longer first: one of UTF-32 begins as one of UTF-16 does
    BOM_UTF32_LE: "utf-32",
    BOM_UTF32_BE: "utf-32",
    BOM_UTF8: "utf-8-sig",
    BOM_UTF16_LE: "utf-16",
    BOM_UTF16_BE: "utf-16",
}


def read_caption(path: Path) -> str:
    """The text of a caption file in one line: what trainers take a line break for differs.

    UTF-8, or UTF-16 or UTF-32, told by a byte order mark or, without one, by the zeros between the letters.

    Raises:
        ValueError: it cannot be read, or is no text in one of these.
    """
    try:
        data = path.read_bytes()
        text = _decoded(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in text):
        what = "zeros" if "\0" in text else "control characters"
        raise ValueError(f"expected text in UTF-8, got {'nothing but ' * (not data.strip(bytes(1)))}{what}")
    return " ".join(text.split())


def _decoded(data: bytes) -> str:
    for mark, codec in BOMS.items():
        if data.startswith(mark):
            return data.decode(codec)
    found = []
    for codec in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be") if 0 in data else ():
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            continue
        if all(c.isspace() or unicodedata.category(c) not in ("Cc", "Cn", "Co", "Cs") for c in text):
            found.append(text)
    # Read the wrong way round, English is rare signs: the right way has more of the common ones.
    return max(found, key=lambda text: sum(c.isascii() for c in text) / len(text)) if found else data.decode("utf-8")


def digest_state(paths: Mapping[str, Path]) -> str:
    """sha256 over names, sizes and times of files: changes when a file does, without reading any."""
    digest = hashlib.sha256()
    for name, path in sorted(paths.items()):
        digest.update(f"{name} {file_state(path)}\n".encode())
    return digest.hexdigest()


def file_state(path: Path) -> str:
    """Changes when a file does, or another one takes its place: size, and times of its content and of itself, which the tools
    that copy times along do not set."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
