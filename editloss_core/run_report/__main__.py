"""When to stop, and which checkpoint: ``python -m editloss_core.run_report RUN_FOLDER``."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Optional

from ..commands.exits import DONE, FOUND, INCOMPLETE
from ..commands.places import file_to_write
from ..commands.program import give
from ..commands.programs import REPORT
from ..commands.tables import Answer
from ..extras import need
from ..pairs.outputs import PARTS
from ..progress import ConsoleBar
from ..runs.log import LOG_FILE
from ..runs.place import find_run
from ..verdict.folder import scan
from ..verdict.judge import FAILURES, UNDECIDED
from .report import REPORT_FILE, text, write_page
from .verdicts import Judged, RunVerdicts, judge_run, judge_samples

main = REPORT.main


def report(given: argparse.Namespace) -> int:
    """Judge the run that the arguments name, write its page, and print the choice."""
    need("jinja2", "matplotlib")
    parts = {part: getattr(given, part) for part in PARTS if getattr(given, part) is not None}
    folder = given.run_folder
    if folder is None and "output" not in parts:
        given.parser.error("expected RUN_FOLDER, or --output with --before")
    samples = None
    if parts or not _is_run(folder):
        samples = _samples(folder, parts)
        place = folder if folder is not None else parts["output"]
    else:
        place = find_run(folder).folder
    out = file_to_write("--out", given.out if given.out is not None else place, REPORT_FILE)
    with ConsoleBar("judging", unit=" pictures", delay=1.0) as bar:
        run = judge_run(folder, bar.update) if samples is None else judge_samples(samples, place, bar.update)
    path = write_page(run, out)
    answer = Answer(f"{text(run)}", _rows(run), _summary(run), {"advice": run.advice(), "notes": run.notes()})
    return give(given, answer, _status(run, given.stop_after), [path])


def _is_run(folder: Any) -> bool:
    """Whether a folder, or log, is that of a run of EditLoss; a folder with several logs is, and is refused as such."""
    return not folder.is_dir() or (folder / LOG_FILE).is_file() or any(folder.glob(f"*.{LOG_FILE}"))


def _samples(folder: Any, parts: dict[str, Any]) -> Any:
    try:
        return scan(folder, parts)
    except ValueError as error:
        if parts:
            raise
        raise ValueError(
            f"run_folder: expected the folder of a run, or sample pictures with --before, the pictures that they were made from, "
            f"got no log.jsonl in {folder.name!r}, and of samples: {error}"
        ) from error


def _status(run: RunVerdicts, stop_after: Optional[int]) -> int:
    if run.best is None:
        return INCOMPLETE
    return FOUND if stop_after is not None and run.since_best >= stop_after else DONE


def _rows(run: RunVerdicts) -> list[dict[str, Any]]:
    def row(v: Judged) -> dict[str, Any]:
        low, high = v.failing.interval if v.failing.n else (None, None)
        kept = run.checkpoint(v.step) if v.step is not None else None
        return {
            run.unit: "base" if v.step is None else v.step, "outputs": len(v.outputs), "judged": v.failing.n,
            "failing": v.failing.value, "low": low, "high": high, **{f: v.judged_as(f).value for f in FAILURES},
            "undecided": v.judged_as(UNDECIDED).value,
            "loss": v.loss, "checkpoint": None if kept is None else str(kept), "best": v is run.best,
        }  # fmt: skip

    return [row(v) for v in (*([run.base] if run.base.outputs else []), *run.validations)]


def _summary(run: RunVerdicts) -> dict[str, Any]:
    best, last = run.best, run.validations[-1] if run.validations else None
    kept = run.checkpoint(best.step) if best is not None and best.step is not None else None
    return {
        f"best_{run.unit}": best and best.step, "best_checkpoint": None if kept is None else str(kept),
        "best_failing": best and best.failing.value, f"last_{run.unit}": last and last.step,
        "last_failing": last and last.failing.value, "validations_since_best": run.since_best,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
