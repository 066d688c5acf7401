"""Where the parts of a run lie: in its own folder, or copied from there under its name, as ``workflows/run.py`` does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Union

from .log import LOG_FILE
from .pictures import PICTURE_FOLDER


class RunPlace(NamedTuple):
    """Attributes:
    folder: of the run, or of what was copied from it.
    log: the file of its log.
    pictures: the folder of its held-out pictures; it need not be there.
    """

    folder: Path
    log: Path
    pictures: Path


def find_run(folder: Union[str, Path]) -> RunPlace:
    """The run of a folder with ``log.jsonl`` and ``pictures/``, or with ``NAME.log.jsonl`` and ``NAME.pictures/``; of several of
    these, the log itself may be named.

    Raises:
        ValueError: no run, or several, with what is there.
    """
    folder = Path(folder)
    if folder.is_file() and folder.name.endswith(LOG_FILE):
        return _place(folder)
    if (folder / LOG_FILE).is_file():
        return _place(folder / LOG_FILE)
    logs = sorted(folder.glob(f"*.{LOG_FILE}"))
    if len(logs) == 1:
        return _place(logs[0])
    if logs:
        raise ValueError(
            f"run_folder: expected one run, got {', '.join(p.name for p in logs)} in {folder.name!r}; name one of them"
        )
    found = f"no {LOG_FILE} in {folder.name!r}" if folder.is_dir() else f"{folder.name!r}, which is no folder"
    raise ValueError(f"run_folder: expected a folder that a training run has written, got {found}")


def _place(log: Path) -> RunPlace:
    own = log.with_name(log.name[: -len(LOG_FILE)] + PICTURE_FOLDER)  # NAME.pictures beside NAME.log.jsonl
    return RunPlace(log.parent, log, own if own.is_dir() else log.parent / PICTURE_FOLDER)
