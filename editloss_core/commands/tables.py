"""One answer in four forms: text for a person, CSV for a table, JSON for a program, and one line of JSON for a log."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FORMATS = ("text", "csv", "json", "line")


@dataclass(frozen=True)
class Answer:
    """What a program has found.

    Attributes:
        text: for a person.
        rows: the table, each row with the same keys; what is None is an empty cell.
        columns: the keys, where there may be no row.
        summary: the few numbers that a script asks for: all of ``line``, and the head of ``json``.
        details: the rest of ``json``.
    """

    text: str
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()


def formatted(answer: Answer, form: str, command: str, status: int) -> str:
    """The answer as one of :data:`FORMATS`; status and command are in both of JSON."""
    if form == "text":
        return answer.text
    if form == "csv":
        return _csv(answer.rows, answer.columns)
    head = {"command": command, "exit": status, **answer.summary}
    if form == "line":
        return json.dumps(_plain(head), ensure_ascii=False, allow_nan=False)
    return json.dumps(_plain({**head, **answer.details}), ensure_ascii=False, allow_nan=False, indent=2)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text below each other, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if rows else columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue().rstrip("\n")


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """What JSON holds: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
