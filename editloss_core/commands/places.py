"""Places to write to, looked at before any work."""

from __future__ import annotations

from pathlib import Path

from ..files import NotWritten, check_writable, make_folder
from .exits import INCOMPLETE
from .program import Stop


def folder_to_write(option: str, folder: Path) -> Path:
    """Make a folder if it is not there, and try to write to it: rights alone do not tell (a full disk, an administrator).

    Raises:
        Stop: with a sentence, and the exit status for what cannot be written.
    """
    try:
        check_writable(folder)
        make_folder(folder)
    except NotWritten as error:
        raise Stop(f"{option}: expected a folder to write to; {error}", INCOMPLETE) from error
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
