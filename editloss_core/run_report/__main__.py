"""The report of a training run: ``python -m editloss_core.run_report RUN_FOLDER``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from ..extras import need
from .report import text, write_page
from .verdicts import judge_run


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m editloss_core.run_report",
        description="Judge the held-out pictures that a training run has kept, and write one HTML page about the run.",
    )
    parser.add_argument("run_folder", type=Path, help="folder of the run, with log.jsonl")
    parser.add_argument("--out", type=Path, help="file to write; report.html in the run's folder if not given")
    given = parser.parse_args(arguments)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rjudged {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        need("jinja2", "matplotlib")
        run = judge_run(given.run_folder, progress)
        path = write_page(run, given.out)
    except (ImportError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(text(run))
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
