"""Report on a training run: one self-contained HTML page, and the same as a picture and as text.

``python -m editloss_core.run_report RUN_FOLDER [--out FILE]``
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor

from ..drawing import grid
from ..drawing.colours import VERDICT_COLORS, text_on
from ..drawing.sheet import INK, LINE, MUTED, Sheet, cell, new_figure, pixels, wrapped
from ..drawing.statistics import percent
from ..extras import need
from ..files import replacing
from ..objective import NO_FAILURE, TERMS
from ..pairs.pictures import read_picture
from ..verdict.judge import FAILURES, GOOD, UNDECIDED
from . import charts
from .columns import Columns, counted, middle_cut, number
from .verdicts import SAYING, Judged, Output, Progress, RunVerdicts, SampledRun, judge_run, matrix

REPORT_FILE = "report.html"
TEMPLATE = "report.html.j2"
THUMBNAIL = 256  # pixels on the long side
MOST_COLUMNS, MOST_ROWS = 8, 24  # validations and pairs that are shown as pictures
_PARTED = 3  # kinds of disagreement in words, the most frequent first
_IN_PICTURE = 3  # validations in the picture of the node, beside before, base and after


def write_report(
    run_folder: Union[str, Path], out: Union[str, Path, None] = None, progress: Optional[Progress] = None
) -> Path:
    """Judge what a run has kept and write the page.

    Args:
        run_folder: the run's folder.
        out: the file to write, or a folder for ``report.html``; None: the run's folder.
        progress: called with (done, total) pictures judged.

    Raises:
        ValueError: no folder of a run, or a log in which nothing can be read.
    """
    return write_page(judge_run(run_folder, progress), out)


def write_page(run: RunVerdicts, out: Union[str, Path, None] = None) -> Path:
    """The page of a run that has been judged; whole or not there."""
    path = run.folder / REPORT_FILE if out is None else Path(out)
    path = path / REPORT_FILE if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    page_text = page(run)
    with replacing(path) as temporary:
        temporary.write_text(page_text, encoding="utf-8")
    return path


def page(run: RunVerdicts) -> str:
    """The HTML: no script, nothing from elsewhere."""
    need("jinja2")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    has_rates = any(v.failing.n for v in run.validations)
    columns = Columns.of(run.log) if run.log.steps else None
    shown = _spread(run)
    return environment.get_template(TEMPLATE).render(
        name=run.name,
        facts=_facts(run),
        cards=_cards(run),
        advice=run.advice(),
        colors={v: (color, text_on(color)) for v, color in VERDICT_COLORS.items()},
        rates=charts.failure_rates(run) if has_rates else None,
        by_failure=[{"failure": f, "svg": charts.failure_rate(run, f)} for f in FAILURES if has_rates],
        table=_table(run),
        rows=list(_rows(run, shown)),
        left_out=_left_out(run, shown),
        has_signal=any(o.says for o in run.outputs),
        matrix=_matrix(run),
        against=[c for f in FAILURES if (c := _against(run, f))] if any(o.says for o in run.outputs) else [],
        terms=[
            {"name": name, "color": columns.style(name)["color"], "svg": charts.term(run.log, columns, name)}
            for name in (columns.losses if columns else ())
        ],
        shares=charts.gradient_shares(run.log, columns) if columns else None,
        objective=_objective(run),
        notes=run.notes(),
        settings=_settings(run),
        sampled=isinstance(run, SampledRun),
        unit=run.unit,
    )


def text(run: RunVerdicts) -> str:
    """The choice, a table of validations and the notes, as Markdown."""
    table = _table(run)
    lines = [f"**{cell(run.name)}**: {' · '.join(_facts(run))}", "", *(f"- {s}" for s in run.advice())]
    if table["rows"]:
        lines += ["", "| " + " | ".join(map(cell, table["heads"])) + " |", "|---" * len(table["heads"]) + "|"]
        lines += ["| " + " | ".join(map(cell, row["cells"])) + " |" for row in table["rows"]]
    both = _matrix(run)
    if both:
        lines += ["", both["text"]]
    notes = run.notes()
    return "\n".join(lines + (["", "Notes:", *(f"- {cell(note)}" for note in notes)] if notes else []))


def picture(run: RunVerdicts, width: int = 1600, rows: int = MOST_ROWS) -> Tensor:
    """Failure rates with the choice, and below them at most ``rows`` pairs with their verdicts: ``[1, H, W, 3]`` in 0…1."""
    head = _head_picture(run, width)
    shown = _few(run)
    if not shown:
        return head[None]
    columns = [*([run.base] if run.base.outputs else []), *shown]
    names = ["before", *(f"{_called(run, v)}{' (best)' if v is run.best else ''}" for v in columns), "after"]
    found_rows, titles, notes = [], [], []
    for pair, caption in _pairs(run)[: min(rows, MOST_ROWS)]:
        outputs = [next((o for o in v.outputs if o.pair == pair), None) for v in columns]
        files = next(o.files for o in outputs if o is not None) if any(outputs) else {}
        found = [_open(files.get("before")), *(_open(o and o.files.get("output")) for o in outputs), _open(files.get("after"))]  # fmt: skip
        size = next((p.shape for p in found if p is not None), None)
        if size is None:
            continue
        found_rows.append([torch.full(size, 0.8) if p is None else p for p in found])
        titles.append(f"{pair}: {caption}" if caption else pair)
        notes.append(["", *("" if o is None else o.judged or "not judged" for o in outputs), ""])
    if not found_rows:
        return head[None]
    table = grid.grid(found_rows, names, titles, notes, width)[0]
    across = max(head.shape[1], table.shape[1])
    return torch.cat([_padded(head, across), _padded(table, across)])[None]


def _head_picture(run: RunVerdicts, width: int) -> Tensor:
    judged = [v for v in (run.base, *run.validations) if v.failing.n]
    words = [wrapped(sentence, 150, 3) for sentence in run.advice()]
    told = 0.22 * sum(w.count("\n") + 1 for w in words)
    chart = 2.7 if judged else 0.0
    sheet = Sheet(new_figure(width, 12.0, 0.75 + told + chart))
    sheet.write(0.3, 0.32, middle_cut(run.name, 70), fontsize=15, weight="bold")
    top = 0.62
    for sentence in words:
        lines = sentence.count("\n") + 1
        sheet.write(0.3, top + 0.11 * lines, sentence, fontsize=9.5, linespacing=1.25)
        top += 0.22 * lines
    if not judged:
        return pixels(sheet.figure)
    across = min(8.8, 1.4 + 0.75 * len(judged))
    axes = sheet.axes(0.95, top + 0.25, across, chart - 0.6)
    for i, v in enumerate(judged):
        bottom = 0.0
        for failure in FAILURES:
            share = v.judged_as(failure).value
            axes.bar(i, share, 0.7, bottom, color=VERDICT_COLORS[failure])
            bottom += share
        low, high = v.failing.interval
        axes.errorbar(i, bottom, [[max(0.0, bottom - low)], [max(0.0, high - bottom)]], color="white", capsize=4, linewidth=3.2, capthick=3.2)  # fmt: skip
        axes.errorbar(i, bottom, [[max(0.0, bottom - low)], [max(0.0, high - bottom)]], color=INK, capsize=3, linewidth=1.1)  # fmt: skip
    often = -(-len(judged) // 14)
    marks = {
        i: ("base" if v.step is None else f"{v.step:,}") + (" ★" if v is run.best else "")
        for i, v in enumerate(judged)
        if i % often == 0 or v is run.best
    }
    axes.set(xlim=(-0.6, len(judged) - 0.4), ylim=(0, 1.02), yticks=(0, 0.5, 1), yticklabels=("0 %", "50 %", "100 %"))
    axes.set_xticks(list(marks), list(marks.values()))
    axes.tick_params(labelsize=8, colors=MUTED, length=2)
    for side, spine in axes.spines.items():
        spine.set(color=LINE, visible=side in ("left", "bottom"))
    axes.set_title(f"failing outputs by {run.unit}, n = {judged[-1].failing.n}; bars: 95 % interval", fontsize=8.5, color=MUTED, loc="left")  # fmt: skip
    for row, failure in enumerate(FAILURES):
        sheet.patch(1.25 + across, top + 0.4 + 0.24 * row, VERDICT_COLORS[failure], None)
        sheet.write(1.55 + across, top + 0.4 + 0.24 * row, failure)
    return pixels(sheet.figure)


def _facts(run: RunVerdicts) -> list[str]:
    settings, info, total = run.settings, run.info, run.settings.get("steps")
    facts = [f"{run.steps:,} of {total:,} steps" if total and total > run.steps else counted(run.steps, run.unit)]
    if run.validations:
        facts.append(
            f"{counted(len(run.validations), 'validation')} with {counted(len(run.validations[-1].outputs), 'picture')}"
        )
    if info.get("model"):
        facts.append(str(info["model"]))
    if info.get("lora"):
        facts.append(f"rank {info['lora']['rank']}, {info['lora']['layers']}")
    if settings:
        facts.append(
            f"{settings['optimizer']}, learning rate {settings['learning_rate']:g}, batch {settings['batch_size']}"
        )
        terms = info.get("objective", ())
        facts.append(counted(len(terms), "term") if terms else "velocity loss alone")
    return facts


def _cards(run: RunVerdicts) -> list[dict[str, str]]:
    def card(head: str, v: Optional[Judged]) -> dict[str, str]:
        if v is None:
            return {"head": head, "big": "–", "text": "not known", "small": ""}
        small = "" if v.step is None else run.where(v.step) + (f"; held-out loss {number(v.loss)}" if v.log else "")
        failing = v.failing
        fails = f"{failing.count} of {failing.n} fail" if failing.n else "not judged"
        fails += f", {v.undecided} undecided" if v.undecided else ""
        return {
            "head": head,
            "big": "base model" if v.step is None else _called(run, v),
            "text": fails,
            "small": small,
        }

    alike = f"Every {run.unit} fails as often: the {'lowest loss' if run.lowest else 'first'} of them"
    cards = [card(alike if run.alike else "Best checkpoint by failure rate", run.best)]
    if isinstance(run, SampledRun):
        last = run.validations[-1] if run.validations else None
        return [*cards, card("Last", last), *([card("Without the LoRA", run.base)] if run.base.outputs else [])]
    cards.append(card("Lowest held-out loss", run.lowest))
    if run.best and run.best_kept and run.best_kept is not run.best:
        cards.insert(1, card("Best of the checkpoints that are there", run.best_kept))
    return cards + [card("Without the LoRA", run.base)]


def _table(run: RunVerdicts) -> dict[str, Any]:
    """A row per validation: shares of failures, losses, and where the checkpoint is."""
    logged = [v.log for v in run.validations if v.log]
    terms = list(dict.fromkeys(name for log in logged for name in log.terms))
    some = [UNDECIDED] if any(v.undecided for v in (run.base, *run.validations)) else []
    losses = ["velocity", *terms] if logged else []
    heads = [run.unit, "failing", "95 % interval", *FAILURES, *some, "checkpoint", *losses]
    rows = []
    for v in (run.base, *run.validations):
        if v.log is None and not v.failing.n:
            continue
        failing, log = v.failing, v.log
        low, high = failing.interval
        shares = [v.judged_as(f) for f in FAILURES]
        base = logged[-1] if logged else None
        losses = [log.velocity, *(log.terms.get(t) for t in terms)] if log else [base.velocity_base, *(base.terms_base.get(t) for t in terms)] if base else []  # fmt: skip
        cells = [
            "base" if v.step is None else f"{v.step:,}",
            f"{failing.count} of {failing.n}" if failing.n else "–",
            f"{percent(low)} to {percent(high)}" if failing.n else "–",
            *(f"{percent(s.value)} ({s.count})" if s.count else "0" if s.n else "–" for s in shares),
            *(str(v.undecided) for _ in some),
            ""
            if v.step is None
            else "there"
            if run.checkpoint(v.step)
            else "gone"
            if run.was_made(v.step)
            else "not found"
            if isinstance(run, SampledRun)
            else "none made",
            *map(number, losses),
        ]
        rows.append({"cells": cells, "best": v is run.best})
    return {"heads": heads, "rows": rows if run.validations else []}


def _spread(run: RunVerdicts) -> list[Judged]:
    """The validations with pictures, at most :data:`MOST_COLUMNS`: evenly, with the best, the lowest loss and the last."""
    found = [v for v in run.validations if v.outputs]
    if len(found) <= MOST_COLUMNS:
        return found
    must = {id(v) for v in (run.best, run.lowest)}
    places = {round(k * (len(found) - 1) / (MOST_COLUMNS - 3)) for k in range(MOST_COLUMNS - 2)}
    return [v for i, v in enumerate(found) if i in places or id(v) in must]


def _few(run: RunVerdicts) -> list[Judged]:
    """For the picture: the best, the lowest loss and the last, in the order of their steps; first the earliest to fill up."""
    found = [v for v in run.validations if v.outputs]
    wanted = [v for v in (run.best, run.lowest, *found[-1:], *found[:1], *found[::-1]) if v in found]
    chosen = {v.step: v for v in reversed(wanted[::-1])}
    return sorted(list(chosen.values())[:_IN_PICTURE], key=lambda v: v.step)


def _left_out(run: RunVerdicts, shown: Sequence[Judged]) -> str:
    said = []
    steps = sum(bool(v.outputs) for v in run.validations)
    if steps > len(shown):
        said.append(f"Shown: {len(shown)} of {steps} validations.")
    pairs = len(_pairs(run))
    if pairs > MOST_ROWS:
        said.append(f"Shown: {MOST_ROWS} of {pairs} pairs.")
    return " ".join(said)


def _pairs(run: RunVerdicts) -> list[tuple[str, str]]:
    return list(dict.fromkeys((o.pair, o.caption) for o in (*run.base.outputs, *run.outputs)))


def _rows(run: RunVerdicts, shown: Sequence[Judged]) -> Iterable[dict[str, Any]]:
    for pair, caption in _pairs(run)[:MOST_ROWS]:
        outputs = [(v, o) for v in (run.base, *shown) for o in v.outputs if (o.pair, o.caption) == (pair, caption)]
        constants = outputs[0][1].files
        cells = [_cell("before", constants.get("before"))]
        for v, o in outputs:
            cells.append(_output_cell(_called(run, v), o, v is run.best))
        cells.append(_cell("after", constants.get("after")))
        yield {"pair": pair, "caption": caption, "cells": cells}


def _called(run: RunVerdicts, v: Judged) -> str:
    return "base" if v.step is None else f"{run.unit} {v.step:,}"


def _cell(label: str, path: Optional[Path], problem: str = "") -> dict[str, Any]:
    src = _data_uri(path)
    problem = problem or ("" if src else f"{path.name if path else label} cannot be read")
    return {"label": label, "src": src, "alt": label, "best": False, "verdict": None, "problem": problem, "says": None}


def _output_cell(label: str, o: Output, best: bool) -> dict[str, Any]:
    found = _cell(label, o.files.get("output"), o.problem)
    scores = [s for s in o.verdict.scores.values() if s is not None] if o.verdict else []
    return {
        **found, "best": best, "verdict": o.judged, "score": f"{max(scores):.2f}" if scores else "", "says": o.says,
        "disagrees": o.agree is False, "alt": f"{o.pair}, {label}: {o.judged or 'not judged'}",
    }  # fmt: skip


def _matrix(run: RunVerdicts) -> Optional[dict[str, Any]]:
    says, counts = matrix(run)
    total = sum(map(sum, counts))
    if not total:
        return None
    same = sum(o.agree is True for o in run.outputs)
    rows = []
    for name, row in zip(says, counts):
        own = GOOD if name == NO_FAILURE else name
        kinds = ["diagonal" if v == own else "off" if count else "" for v, count in zip(SAYING, row)]
        rows.append({"says": name, "cells": [{"count": c, "kind": k} for c, k in zip(row, kinds)]})
    words = f"Signal and judge agree on {same} of {counted(total, 'output')}."
    parted = Counter((o.says, o.judged) for o in run.outputs if o.agree is False)
    for (name, judged), count in parted.most_common(_PARTED):
        if name == NO_FAILURE:
            words += f" In {count} the judge sees {judged} where the signal points to no failure."
        elif judged == GOOD:
            words += f" In {count} the signal points to {name} where the judge finds the output good."
        else:
            words += f" In {count} the signal points to {name}, and the judge sees {judged}."
    return {"heads": SAYING, "rows": rows, "text": words}


def _against(run: RunVerdicts, failure: str) -> Optional[dict[str, Any]]:
    svg = charts.signal_and_judge(run, failure)
    names = run.terms_of.get(failure)
    signal = f"Signal: {', '.join(names)}." if names else "No term of this objective answers it."
    return {"failure": failure, "svg": svg, "text": signal} if svg else None


def _objective(run: RunVerdicts) -> Optional[dict[str, Any]]:
    terms = run.info.get("objective")
    if not terms:
        return None
    rows = []
    for term in terms:
        known = TERMS.get(term.get("kind"))
        others = {k: term.get(k) for k in known.defaults} if known else {}
        options = ", ".join(f"{k} {v}" for k, v in others.items() if v is not None)
        gate = f"t {term.get('t_min', 0):g} to {term.get('t_max', 1):g}"
        failure = known.failure if known and known.failure else "–"
        rows.append([term["name"], term["encoder"], f"{term['weight']:g}", gate, failure, options])
    return {"heads": ["term", "encoder", "weight", "counts at", "against", "settings"], "rows": rows}


def _settings(run: RunVerdicts) -> list[tuple[str, str]]:
    flat: dict[str, Any] = {}
    for name, value in {
        **run.settings,
        **{k: v for k, v in run.info.items() if k not in ("settings", "objective")},
    }.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}: {k}": v for k, v in value.items()})
        else:
            flat[name] = value
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in flat.items()]


def _open(path: Optional[Path]) -> Optional[Tensor]:
    try:
        return torch.from_numpy(read_picture(path).values) if path else None
    except ValueError:
        return None


def _data_uri(path: Optional[Path]) -> Optional[str]:
    """A small copy of a picture as text."""
    from PIL import Image

    values = _open(path)
    if values is None:
        return None
    image = Image.fromarray((values * 255).round().to(torch.uint8).numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=86, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _padded(image: Tensor, width: int) -> Tensor:
    return (
        torch.cat([image, torch.ones(image.shape[0], width - image.shape[1], 3)], 1)
        if image.shape[1] < width
        else image
    )
