"""What runs leave behind: put in place together, replaced by the next run of the same workflow, found again by others.

A folder of results has ``.editloss.json`` in it: workflow → the files of its last run. What is not listed there is
the user's and is never removed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LISTED = ".editloss.json"
LORAS = "loras"  # in a folder of results, with the names that the loaders show below it
_SCRATCH = ".part-"


class Results:
    """The files of one run on their way into a folder.

    Attributes:
        folder: where to write them.
        placed: their final paths, once they are there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.placed = folder, list[Path]()


@contextmanager
def replacing_results(out: Path, workflow: str) -> Iterator[Results]:
    """Collect a run's files in a folder of their own; at the end they take the places of the workflow's run before.

    Nothing of that run is touched if the body raises. Then each file is replaced whole, and what the run before had and
    this one has not is removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=_SCRATCH) as scratch:
        results = Results(Path(scratch))
        yield results
        made = sorted(p.relative_to(scratch).as_posix() for p in Path(scratch).rglob("*") if p.is_file())
        listed = {name: sorted({*files} - {*made}) for name, files in _read(out).items()}
        stale = listed.pop(workflow, [])
        _write(out, {**listed, workflow: [*made, *stale]})  # if it stops here, the next run clears up
        for name in made:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(results.folder / name, out / name)
        for name in stale:
            _remove(out, name)
        _write(out, {**listed, workflow: made})
        results.placed = [out / name for name in made]


def _read(out: Path) -> dict[str, list[str]]:
    """The list in a folder of results; a damaged one is as none, so that nothing is removed."""
    try:
        listed = json.loads((out / LISTED).read_text(encoding="utf-8"))
        return {name: [file for file in files if isinstance(file, str)] for name, files in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(out: Path, listed: dict[str, list[str]]) -> None:
    scratch = out / f"{LISTED}.part"
    scratch.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(scratch, out / LISTED)


def _remove(out: Path, name: str) -> None:
    """Unlink a file that is still there, and the folders that it leaves empty, if it is where a run can have put it."""
    path = out / name
    if not path.is_file() or not path.parent.resolve().is_relative_to(out.resolve()):
        return
    path.unlink()
    for folder in path.parents:
        if folder == out or any(folder.iterdir()):
            break
        folder.rmdir()


def give_loras(results: Path, folder: Path) -> dict[str, Path]:
    """Copy the LoRAs of every run in ``results`` into a folder of ComfyUI's; of two with one name, the later one.

    Returns:
        Name as the stock loaders list it → the file that it is a copy of.
    """
    found = [(p.relative_to(run / LORAS), p) for run in results.glob("*") for p in (run / LORAS).rglob("*.safetensors")]
    given = {}
    for name, path in sorted(found, key=lambda item: (item[1].stat().st_mtime_ns, item[1])):
        given[name.as_posix()] = path
    for name, path in given.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return given
