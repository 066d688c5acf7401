"""Judge a folder of outputs: ``python -m editloss_core.verdict FOLDER --out DIR``."""

from __future__ import annotations

import argparse
import csv
import heapq
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from ..drawing.statistics import Share, percent
from ..extras import need
from ..files import replacing
from . import folder as folders
from . import picture
from .items import Failing, Item, unanswered, verdict_share
from .judge import FAILURES, MEASURES, REMEDIES, UNDECIDED, VERDICTS
from .picture import MOST_ROWS, Ranking

PASSED, EXCEEDED, UNUSABLE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
ANY = "any"
LISTED = 10  # names of a kind on the screen; verdicts.csv has them all
EPILOG = """\
FOLDER holds before/ and output/, and optionally after/ and mask/ (white where the edit belongs). Pictures belong together
by file stem, without regard to case: before/Chair 1.jpg, output/chair 1.png. Outputs of another size are brought to that of
the before picture where the proportions agree within two per cent.

Written to DIR: verdicts.csv (a row per name: verdict, scores, measures, and why it could not be judged), sheet.png, and
with --maps the heat maps. A score of 0.5 and more is a failure; an empty cell could not be answered. Undecided: no failure
was found, and not all could be asked, as without after/; that is never counted as good.

exit status:
  0  everything was judged, and no rate is above its limit
  1  a rate is above its limit (also if pictures could not be judged)
  2  wrong arguments, or nothing in FOLDER to judge
  3  pictures could not be judged (--allow-errors forgives that while at least one was), the pictures cannot answer what a
     limit asks (any: undecided ones may take it above its limit), or DIR cannot be written to
  130  interrupted; what was judged so far is written
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        need("matplotlib")
        found = folders.scan(given.folder)
        _check_out(given.out, found)
        given.out.mkdir(parents=True, exist_ok=True)
        if not os.access(given.out, os.W_OK):
            raise PermissionError(f"--out: expected a folder to write to, got {given.out}")
    except (ImportError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return UNUSABLE

    items, stopped = _judge(found.entries, given.out / "maps" if given.maps else None, given.workers)
    if not items:
        print(f"{parser.prog}: {stopped}; nothing was judged", file=sys.stderr)
        return INTERRUPTED if stopped == "interrupted" else INCOMPLETE
    try:
        write_csv(items, given.out / "verdicts.csv")
        folders.save(picture.sheet(items, given.width, rows=given.rows)[0], given.out / "sheet.png")
    except OSError as error:
        print(f"{parser.prog}: cannot write to {given.out}: {error}", file=sys.stderr)
        return INCOMPLETE
    limits = dict(given.fail_above)
    print(report(items, limits))
    for path in found.unused:
        print(f"not used: {path}")
    print(f"\n{given.out / 'verdicts.csv'}\n{given.out / 'sheet.png'}")
    if stopped:
        print(f"{parser.prog}: {stopped} after {len(items)} of {len(found.entries)}; they are written", file=sys.stderr)
        return INTERRUPTED if stopped == "interrupted" else INCOMPLETE
    return status(items, limits, given.allow_errors)


def status(items: Sequence[Item], limits: Mapping[str, float], allow_errors: bool = False) -> int:
    """The exit status: see ``--help``."""
    kept = [_keeps(items, name, limit) for name, limit in limits.items()]
    if False in kept:
        return EXCEEDED
    errors = sum(item.verdict is None for item in items)
    return INCOMPLETE if errors == len(items) or None in kept or (errors and not allow_errors) else PASSED


def rate(items: Sequence[Item], name: str) -> Share:
    """Share with a verdict of the judged pictures; of a failure, of those that could be asked for it: a picture without an after
    picture would otherwise count as one that is not distorted."""
    if name in FAILURES:
        items = [item for item in items if item.verdict and item.verdict.scores.get(name) is not None]
    return verdict_share(items, name)


def _keeps(items: Sequence[Item], name: str, limit: float) -> Optional[bool]:
    """Whether a rate is within its limit; None where that cannot be answered."""
    if name == ANY:
        failing = Failing.of(items)
        low, high = failing.least.value, failing.most.value
    else:
        low = high = rate(items, name).value
    if low is None or high is None:
        return None
    return False if low > limit else True if high <= limit else None


def report(items: Sequence[Item], limits: Mapping[str, float]) -> str:
    """What the command prints: a line per verdict, the limits, what could not be answered, and what could not be judged."""
    rows = [("", "count", "share", "95 % interval", "limit")]
    for name in VERDICTS:
        part = rate(items, name)
        if name != UNDECIDED or part.count:
            rows.append((name, f"{part.count} of {part.n}", *_shares(part, part), _verdict_on(items, name, limits)))
    any_ = Failing.of(items)
    counts = f"{any_.failed} to {any_.most.count}" if any_.undecided else str(any_.failed)
    shares = _shares(any_.least, any_.most)
    rows.append(("any failure", f"{counts} of {any_.n}", *shares, _verdict_on(items, ANY, limits)))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    undecided = [item for item in items if item.verdict and item.verdict.verdict == UNDECIDED]
    if undecided:
        lines += ["", f"undecided: {len(undecided)}; no failure was found, and not all could be asked"]
        lines += [_unanswered(text, f"{count} of {len(undecided)}") for text, count in unanswered(undecided)]
    errors = [item for item in items if item.verdict is None]
    if errors:
        lines += ["", f"not judged: {len(errors)}"]
        lines += [f"  {item.name}: {item.message}" for item in errors[:LISTED]]
        if len(errors) > LISTED:
            lines.append(f"  … and {len(errors) - LISTED} more; verdicts.csv has them all")
    return "\n".join(lines)


def write_csv(items: Sequence[Item], path: Path) -> None:
    """A row per item, UTF-8; an empty cell could not be answered."""
    heads = ["stem", "verdict", *FAILURES, *MEASURES, "unanswered", "notes", "message"]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        for item in items:
            row = item.as_dict()
            numbers = [*(row["scores"].get(f) for f in FAILURES), *(row["measures"].get(m) for m in MEASURES)]
            words = ["; ".join(row["unanswered"]), " ".join(row["notes"]), row["message"]]
            cells = ["" if number is None else f"{number:.4f}" for number in numbers]
            writer.writerow([item.name, row["verdict"] or "", *cells, *words])


def _judge(entries: Sequence[folders.Entry], maps: Optional[Path], workers: Optional[int]) -> tuple[list[Item], str]:
    """(the items that were judged, why it stopped before the end or "").

    Only the items that may have a row in the sheet keep their pictures, so that memory does not grow with the folder.
    """
    items: list[Item] = []
    ranking, kept = Ranking(), list[tuple[tuple[int, int], int]]()
    quiet = {} if sys.stderr.isatty() else {"mininterval": 10.0}  # not a line every tenth of a second in a log
    try:
        for item in tqdm(folders.judge_folder(entries, maps, workers), total=len(entries), unit="picture", **quiet):
            first, second = ranking.of(item)
            heapq.heappush(kept, ((-first, -second), -len(items)))
            items.append(item)
            if len(kept) > MOST_ROWS:
                last = -heapq.heappop(kept)[1]
                items[last] = items[last].without_pictures()
    except KeyboardInterrupt:
        return items, "interrupted"
    except BrokenProcessPool:
        return items, "a worker process was killed, perhaps for want of memory (take fewer --workers)"
    except OSError as error:
        return items, str(error)
    return items, ""


def _verdict_on(items: Sequence[Item], name: str, limits: Mapping[str, float]) -> str:
    if name not in limits:
        return ""
    words = {True: "kept", False: "EXCEEDED", None: "could not be answered"}
    return f"{limits[name]:.0%}: {words[_keeps(items, name, limits[name])]}"


def _shares(least: Share, most: Share) -> tuple[str, str]:
    """Share and interval in words."""
    if least.value is None or most.value is None:
        return "–", "–"
    shares = dict.fromkeys(percent(part.value) for part in (least, most) if part.value is not None)
    return " to ".join(shares), f"{percent(least.interval[0])} to {percent(most.interval[1])}"


def _unanswered(text: str, count: str) -> str:
    add = f". Add {REMEDIES[text]}" if text in REMEDIES else ""
    return f"  {count}: {text}{add}"


def _check_out(out: Path, found: folders.Folder) -> None:
    for part, place in found.parts.items():
        if place.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(
                f"--out: expected a folder outside of {part}/, got {out}: its pictures would be judged the next time"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m editloss_core.verdict",
        description="Which outputs of an edit model failed, how and where; from pixels and geometry, without an encoder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="see below")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to; it is made if it is not there"
    )
    parser.add_argument(
        "--fail-above", type=_limit, action="extend", nargs="+", default=[], metavar="FAILURE=RATE",
        help=f"exit with 1 where a larger share fails so, of the pictures that could be asked: {', '.join(map(_option, FAILURES))} or "
        "any, and a number from 0 to 1; several behind each other, as in --fail-above overlay=0.1 no-edit=0.05",
    )  # fmt: skip
    parser.add_argument(
        "--allow-errors", action="store_true", help="pictures that cannot be judged do not fail the command"
    )
    parser.add_argument("--maps", action="store_true", help="write every heat map, laid over its output, to DIR/maps")
    parser.add_argument(
        "--rows",
        type=_whole(1, MOST_ROWS),
        default=MOST_ROWS,
        help=f"most rows of the sheet, 1 to {MOST_ROWS} (%(default)s)",
    )
    parser.add_argument(
        "--width", type=_whole(640, 4096), default=1600, help="of the sheet, in pixels, 640 to 4096 (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=_whole(1, 64), help="processes; by default one per core, for small folders one"
    )
    return parser


def _option(failure: str) -> str:
    return failure.replace(" ", "-")


def _limit(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    known = {_option(failure): failure for failure in (*FAILURES, ANY)}
    key = name.strip().casefold().replace(" ", "-").replace("_", "-")
    if key not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {name!r}")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a rate from 0 to 1, as in {key}=0.1, got {text!r}")
    return known[key], value


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else -1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return number

    return read


if __name__ == "__main__":
    sys.exit(main())
