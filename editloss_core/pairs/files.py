"""The files behind pairs: which belong together, what is wrong with them, and their pixels.

Nothing here knows of training: :mod:`.pair_set` is the door.
"""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
NOT_CAPTIONS = ("readme", "license", "licence", "requirements")  # texts that lie beside pictures and describe none
NOT_FOLDERS = (".", "_", "@")  # beginnings: hidden, of ai-toolkit and macOS (_controls, __MACOSX), of Synology (@eaDir)
LISTED = 12  # entries of a folder without pairs that a message names

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
    """

    def __init__(self, findings: Sequence[Finding], where: str):
        self.findings = tuple(sorted(findings, key=lambda f: (list(KINDS).index(f.kind), f.files)))
        count = len(self.findings)
        lines = [f"pairs: {count} problem{'s' if count > 1 else ''} in {where}; nothing was started"]
        for kind, advice in KINDS.items():
            found = [f for f in self.findings if f.kind == kind]
            if found:
                lines.append(f"• {advice} ({len(found)}):")
                lines += [f"    {' + '.join(f.files)}{f': {f.detail}' if f.detail else ''}" for f in found]
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
        names: the same, → the name as the after picture has it.
        findings: duplicates.
    """

    description: str
    root: Path
    before: dict[str, Path] = field(default_factory=dict)
    after: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    captions: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """How a message calls a file."""
        return relative(path, self.root)

    def add(self, part: str, entries: Iterable[tuple[str, Path]]) -> None:
        """Enter (name of a pair, file) into one of the tables; what is already taken within the same call is a finding."""
        table: dict[str, Path] = getattr(self, part)
        rivals: dict[str, list[Path]] = {}
        for name, path in entries:
            rivals.setdefault(name.casefold(), []).append(path)
            if part == "after":
                self.names.setdefault(name.casefold(), name)
        for key, paths in rivals.items():
            if len(paths) > 1:
                self.findings.append(Finding("duplicate", tuple(map(self.name, paths))))
            table.setdefault(key, paths[0])


def relative(path: Path, folder: Path) -> str:
    """How a message that names the folder calls a file."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return path.as_posix()


def scan(folder: Path, control_folder: Optional[Path] = None) -> Layout:
    """Recognise the layout of a folder; see :func:`~.pairs.find_pairs` for the three there are.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: no layout fits; the message says what was looked for and what is there.
    """
    for path in (folder, control_folder):
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"pairs: there is no folder {path}")
    if control_folder is not None:
        if control_folder.resolve() == folder.resolve():
            raise ValueError(f"control_folder: expected another folder than the after pictures', got {folder} for both")
        found = _two_folders(folder, control_folder)
    else:
        before, after = (part_folder(folder, name) for name in ("before", "after"))
        found = _side_by_side(folder, before, after) if before and after else _suffixed(folder)
    if not found.before and not found.after:
        there = sorted(p.name + "/" * p.is_dir() for p in visible(folder))
        raise ValueError(
            f"pairs: no pairs in {folder}; expected the folders before/ and after/ (or control/ and target/), or files that end in _before and "
            f"_after, or pictures here and a control_folder with the before pictures ({', '.join(SUFFIXES)}); got "
            f"{', '.join(there[:LISTED]) or 'an empty folder'}{', …' if len(there) > LISTED else ''}"
        )
    return found


def _two_folders(folder: Path, control: Path) -> Layout:
    layout = Layout("after pictures in the folder, before pictures in the control folder", folder)
    mask, captions = part_folder(folder, "mask"), subfolder(folder, "captions")
    apart = (mask, captions, control)
    layout.add("after", pictures_in(folder, apart))
    layout.add("before", pictures_in(control, [folder]))
    layout.add("masks", pictures_in(mask))
    _add_captions(layout, _texts(folder, apart))
    _add_captions(layout, _texts(control, [folder]), strict=False)
    _add_captions(layout, _texts(captions))
    return layout


def _side_by_side(folder: Path, before: Path, after: Path) -> Layout:
    layout = Layout("folders before/ and after/", folder)
    mask, captions = part_folder(folder, "mask"), subfolder(folder, "captions")
    layout.add("after", pictures_in(after))
    layout.add("before", pictures_in(before))
    layout.add("masks", pictures_in(mask))
    for place in (after, before, captions):
        _add_captions(layout, _texts(place))
    _add_captions(layout, _texts(folder, (before, after, mask, captions)), strict=False)
    return layout


def _suffixed(folder: Path) -> Layout:
    layout = Layout("one folder with _before and _after", folder)
    captions = subfolder(folder, "captions")
    pictures, texts = list(pictures_in(folder, [captions])), list(_texts(folder, [captions]))
    for part, ending in (("after", "_after"), ("before", "_before"), ("masks", "_mask")):
        layout.add(part, ending_in(ending, pictures))
    _add_captions(layout, [(name, path) for name, path in texts if not name.casefold().endswith(("_after", "_before"))])
    for ending in ("_after", "_before"):
        _add_captions(layout, ending_in(ending, texts))
    _add_captions(layout, _texts(captions))
    return layout


def ending_in(ending: str, entries: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The entries whose names end so, without it."""
    return [
        (name[: -len(ending)], path)
        for name, path in entries
        if name.casefold().endswith(ending) and len(path.stem) > len(ending)
    ]


def _add_captions(layout: Layout, entries: Iterable[tuple[str, Path]], strict: bool = True) -> None:
    """Captions from one more place, for pairs that have none yet. A strict place holds nothing but captions, so that one
    without a pair is a finding."""
    known, taken = layout.before.keys() | layout.after.keys(), dict(layout.captions)
    layout.add(
        "captions",
        (
            (name, path)
            for name, path in entries
            if name.casefold() in known or (strict and path.stem.casefold() not in NOT_CAPTIONS)
        ),
    )
    layout.captions.update(taken)


def visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _files(
    folder: Optional[Path], suffixes: Collection[str], apart: Iterable[Optional[Path]]
) -> Iterator[tuple[str, Path]]:
    """(path below the folder without suffix, file) of every visible file of a kind; ``apart``: folders to stay out of.

    Names are composed (NFC): macOS writes é as two characters, other systems as one. A link to nowhere is a file that
    cannot be read, and no reason to go on without it.
    """
    if folder is None:
        return
    known = {p.resolve() for p in (folder, *apart) if p is not None}
    for root, folders, names in os.walk(folder, followlinks=True):
        inside = {name: Path(root, name).resolve() for name in sorted(folders) if not name.startswith(NOT_FOLDERS)}
        folders[:] = [name for name, place in inside.items() if place not in known]
        known.update(inside.values())  # links may lead back
        for path in (Path(root, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() in suffixes and (path.is_file() or not path.exists()):
                yield unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix()), path


def pictures_in(folder: Optional[Path], apart: Iterable[Optional[Path]] = ()) -> Iterator[tuple[str, Path]]:
    """(path below the folder without suffix, file) of every picture; none for None. ``apart``: folders to stay out of."""
    return _files(folder, SUFFIXES, apart)


def _texts(folder: Optional[Path], apart: Iterable[Optional[Path]] = ()) -> Iterator[tuple[str, Path]]:
    return _files(folder, (".txt",), apart)


# What trainers call the folders of one part, the own name first.
PART_FOLDERS = {
    "before": ("before", "control"),
    "after": ("after", "target"),
    "output": ("output", "outputs", "samples", "sample"),
    "mask": ("mask", "masks"),
}


def part_folder(folder: Path, part: str) -> Optional[Path]:
    """The folder of a part in a folder, by the first of its names that is there; None if there is none."""
    return next((place for name in PART_FOLDERS[part] if (place := subfolder(folder, name)) is not None), None)


def subfolder(folder: Path, name: str) -> Optional[Path]:
    """The folder of this name (lower case) in a folder, however its letters are written; None if there is none."""
    return next((p for p in visible(folder) if p.name.casefold() == name and p.is_dir()), None)


def read_caption(path: Path) -> str:
    """The text of a caption file in one line: what trainers take a line break for differs.

    Raises:
        ValueError: it cannot be read, or is neither UTF-8 nor, by its byte order mark, UTF-16.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    return " ".join(text.split())


def digest_state(paths: Mapping[str, Path]) -> str:
    """sha256 over names, sizes and times of files: changes when a file does, without reading any."""
    digest = hashlib.sha256()
    for name, path in sorted(paths.items()):
        status = path.stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """Pixels of a file: ``values`` float32 in 0…1, ``[H, W, 3]`` or (masks) ``[H, W]``; sha256 of its bytes; whether
    it has transparency."""

    values: np.ndarray
    content: str
    transparent: bool


_truncation = Lock()
_strict: list[bool] = []  # one entry for each thread that reads; the first knows how the flag was


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Other programs in the process may have told Pillow to fill cut-off files with grey.

    The flag is the process', so that threads which read at the same time share the change, and the last one takes it back.
    """
    with _truncation:
        _strict.append(_strict[0] if _strict else ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _truncation:
            previous = _strict.pop()
            if not _strict:
                ImageFile.LOAD_TRUNCATED_IMAGES = previous


def read_picture(path: Path, mask: bool = False) -> Picture:
    """The first frame of a picture file, turned as its EXIF orientation says; colour profiles are not applied.

    Transparency is laid on white, in a mask on black. Grey, palette, CMYK and 16-bit files become RGB, masks grey.

    Raises:
        ValueError: it cannot be read whole, with the reason.
    """
    try:
        data = path.read_bytes()
        with _whole_files_only(), Image.open(io.BytesIO(data)) as image:
            image.load()
            values, transparent = _values(ImageOps.exif_transpose(image), "L" if mask else "RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("its content is not PNG, JPEG, WebP, BMP or TIFF" if data else "it is empty") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    return Picture(values, hashlib.sha256(data).hexdigest(), transparent)


def _values(image: Image.Image, mode: str) -> tuple[np.ndarray, bool]:
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow's own conversion cuts these off at 255.
        grey = np.asarray(image, dtype=np.float32)
        grey = grey if image.mode == "F" else grey / 65535.0
        if not np.isfinite(grey).all():
            raise ValueError("expected finite values, got NaN or infinity")
        grey = grey.clip(0.0, 1.0)
        return (grey if mode == "L" else np.repeat(grey[..., None], 3, axis=2)), False
    transparent = False
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        transparent = bool(np.asarray(image.getchannel("A")).min() < 255)
        if transparent:
            ground = Image.new("RGBA", image.size, "black" if mode == "L" else "white")
            image = Image.alpha_composite(ground, image)
    return np.asarray(image.convert(mode), dtype=np.float32) / 255.0, transparent
