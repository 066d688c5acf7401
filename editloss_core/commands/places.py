"""Places to write to, looked at before any work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .exits import INCOMPLETE
from .program import Stop


def folder_to_write(option: str, folder: Path) -> Path:
    """Make a folder if it is not there, and try to write to it: rights alone do not tell (a full disk, an administrator).

    Raises:
        Stop: with a sentence, and the exit status for what cannot be written.
    """
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            if not place.is_dir():
                raise Stop(f"{option}: expected a folder to write to, got {folder}: {place} is a file", INCOMPLETE)
            break
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise Stop(
            f"{option}: expected a folder to write to, got {folder}: {error.strerror or error}", INCOMPLETE
        ) from error
    return folder


def file_to_write(option: str, path: Path, name: str) -> Path:
    """The file of an option; of a folder, or a name without a suffix, the one called ``name`` in it. Its folder can be written
    to.

    Raises:
        Stop: as :func:`folder_to_write`.
    """
    path = path / name if path.is_dir() or not path.suffix else path
    folder_to_write(option, path.parent)
    return path
