"""Judge a folder of outputs: ``python -m editloss_core.verdict FOLDER --out DIR``."""

from __future__ import annotations

import argparse
import csv
import heapq
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from ..commands.exits import DONE, FOUND, INCOMPLETE, INTERRUPTED
from ..commands.places import folder_to_write
from ..commands.program import give, refuse, say
from ..commands.programs import DIAGNOSE
from ..commands.tables import Answer, aligned
from ..drawing.statistics import Share, percent
from ..drawing.written import save
from ..extras import need
from ..files import replacing
from ..pairs.outputs import PARTS, Moment
from . import folder as folders
from . import picture
from .items import Failing, Item, unanswered, verdict_share
from .judge import FAILURES, MEASURES, REMEDIES, UNDECIDED, VERDICTS
from .picture import MOST_ROWS, Ranking

ANY = "any"
LISTED = 10  # names of a kind on the screen; verdicts.csv has them all
main = DIAGNOSE.main


def diagnose(given: argparse.Namespace) -> int:
    """Judge what the arguments name, write what there is to write, and print it."""
    parts = {part: getattr(given, part) for part in PARTS if getattr(given, part) is not None}
    if given.maps and not given.out:
        raise ValueError("--maps: expected --out DIR with it, where the maps are written to")
    if given.out:
        need("matplotlib")
    found = folders.scan(given.folder, parts)
    if given.step is not None:
        found = found.at(given.step)
    if given.out:
        _check_out(given.out, found)
        folder_to_write("--out", given.out)

    items, stopped = _judge(found.entries, given.out / "maps" if given.maps else None, given.workers)
    if not items:
        return refuse(given, f"{stopped}; nothing was judged", INTERRUPTED if stopped == "interrupted" else INCOMPLETE)
    limits = dict(given.fail_above)
    written = [given.out / "verdicts.csv", given.out / "sheet.png"] if given.out else []
    if given.out:
        try:
            write_csv(items, given.out / "verdicts.csv", found.entries)
            save(picture.sheet(items, given.width, rows=given.rows)[0], given.out / "sheet.png")
        except OSError as error:
            return refuse(given, f"cannot write to {given.out}: {error}", INCOMPLETE)
    if stopped:
        ended = INTERRUPTED if stopped == "interrupted" else INCOMPLETE
    else:
        ended = status(items, limits, given.allow_errors)
    said = "\n".join([*(f"not used: {path}" for path in found.unused), *(f"note: {note}" for note in found.notes)])
    if given.format == "text":
        text = "\n".join([report(items, limits), *_over_steps(items, found.entries), *([said] if said else [])])
    else:
        text = ""
        if said:
            say(given, said)
    give(given, Answer(text, _rows(items, found.entries), _summary(items, found.entries, limits), _details(items, found)), ended, written)  # fmt: skip
    if stopped:
        say(given, f"{stopped} after {len(items)} of {len(found.entries)}" + ("; they are written" if written else ""))
    return ended


def status(items: Sequence[Item], limits: Mapping[str, float], allow_errors: bool = False) -> int:
    """The exit status: see ``--help``."""
    kept = [_keeps(items, name, limit) for name, limit in limits.items()]
    if False in kept:
        return FOUND
    errors = sum(item.verdict is None for item in items)
    return INCOMPLETE if errors == len(items) or None in kept or (errors and not allow_errors) else DONE


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
    rows.append(("any failure", _failed(any_), *_shares(any_.least, any_.most), _verdict_on(items, ANY, limits)))
    lines = [aligned(rows)]
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


def write_csv(items: Sequence[Item], path: Path, entries: Sequence[folders.Entry] = ()) -> None:
    """A row per item, UTF-8; an empty cell could not be answered."""
    rows = _rows(items, entries)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)


def _rows(items: Sequence[Item], entries: Sequence[folders.Entry]) -> list[dict[str, str]]:
    """The table: an item a row; where outputs were sampled in the course of a training, with the pair and the step."""
    found = []
    sampled = any(entry.moment.count is not None for entry in entries)
    for i, item in enumerate(items):
        row = item.as_dict()
        cells = {"stem": item.name, "verdict": row["verdict"] or ""}
        numbers = {**{f: row["scores"].get(f) for f in FAILURES}, **{m: row["measures"].get(m) for m in MEASURES}}
        cells |= {name: "" if number is None else f"{number:.4f}" for name, number in numbers.items()}
        cells |= {
            "unanswered": "; ".join(row["unanswered"]),
            "notes": " ".join(row["notes"]),
            "message": row["message"],
        }
        if sampled:
            moment = entries[i].moment
            cells |= {"pair": entries[i].pair, moment.unit: "" if moment.count is None else str(moment.count)}
        found.append(cells)
    return found


def _at(items: Sequence[Item], entries: Sequence[folders.Entry]) -> dict[Moment, list[Item]]:
    """The items by step, the earliest first; empty where no name says one."""
    found: dict[Moment, list[Item]] = {}
    for item, entry in zip(items, entries):
        if entry.moment.count is not None:
            found.setdefault(entry.moment, []).append(item)
    return dict(sorted(found.items(), key=lambda at: (at[0].unit, at[0].count or 0)))


def _over_steps(items: Sequence[Item], entries: Sequence[folders.Entry]) -> list[str]:
    """A table of rates over the steps, where there are several."""
    at = _at(items, entries)
    if len(at) < 2:
        return []
    rows: list[tuple[str, ...]] = [("", "any failure", "95 % interval", *FAILURES)]
    for moment, some in at.items():
        any_ = Failing.of(some)
        counts = (f"{verdict_share(some, name).count}" for name in FAILURES)
        rows.append((str(moment), _failed(any_), _shares(any_.least, any_.most)[1], *counts))
    return [
        "",
        aligned(rows),
        "",
        "Which checkpoint to take, as a page with the pictures: editloss report, with the same folders.",
    ]


def _summary(items: Sequence[Item], entries: Sequence[folders.Entry], limits: Mapping[str, float]) -> dict[str, Any]:
    """The numbers that a script asks for."""
    found: dict[str, Any] = {"outputs": len(items), "judged": sum(item.verdict is not None for item in items)}
    steps = list(_at(items, entries))
    if steps:
        found |= {steps[-1].unit: steps[-1].count}
    found["rates"] = {**{name: rate(items, name).value for name in VERDICTS}, ANY: Failing.of(items).least.value}
    kept = {name: _keeps(items, name, limit) for name, limit in limits.items()}
    found["exceeded"] = [name for name, within in kept.items() if within is False]
    found["unanswered"] = [name for name, within in kept.items() if within is None]
    return found


def _details(items: Sequence[Item], found: folders.Folder) -> dict[str, Any]:
    def told(item: Item, entry: folders.Entry) -> dict[str, Any]:
        where = {"pair": entry.pair, entry.moment.unit: entry.moment.count} if found.moments else {}
        return {**item.as_dict(), **where}

    return {"items": [told(*both) for both in zip(items, found.entries)], "unused": found.unused, "notes": found.notes}


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


def _failed(failing: Failing) -> str:
    """How many of how many; of undecided ones, any may have failed as well."""
    most = f" to {failing.most.count}" if failing.undecided else ""
    return f"{failing.failed}{most} of {failing.n}"


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
    for part, place in ((part, place) for part, places in found.parts.items() for place in places):
        if place.is_dir() and place.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(
                f"--out: expected a folder outside of {part}/, got {out}: its pictures would be judged the next time"
            )


if __name__ == "__main__":
    sys.exit(main())
