"""What a run says about itself: a line of JSON per step and per validation, and the means over noise levels."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence, Union

from ..files import NotWritten, make_folder, replacing, writing

VELOCITY = "velocity"  # name of the flow-matching loss among the terms
LOG_FILE = "log.jsonl"
OWN_FAILURES = "own failures"


@dataclass(frozen=True)
class TermSample:
    """What one term said about one sample.

    Attributes:
        raw: the loss, unweighted.
        weighted: what it added to the total, before the mean over the batch (weight, gate and noise-level weight).
        open: 1 where its hinge is open, 0 where not; None for terms without one.
        gradient: norm of the gradient of its weighted loss at the model's output v̂; None where it was not measured.
    """

    raw: float
    weighted: float
    open: Optional[float] = None
    gradient: Optional[float] = None


@dataclass(frozen=True)
class Sample:
    """One pair at one noise level.

    Attributes:
        pair: its name.
        t: noise level.
        terms: term name → what it said; the velocity loss is the term ``"velocity"``.
    """

    pair: str
    t: float
    terms: Mapping[str, TermSample]


@dataclass(frozen=True)
class StepLog:
    """One optimiser step; ``step`` counts from 1.

    Attributes:
        loss: mean total over the step's samples.
        gradient_norm: of all LoRA weights together, before clipping.
        learning_rate: that the step was made with (Prodigy: times its own factor).
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    samples: Sequence[Sample]
    seconds: float = 0.0

    def term(self, name: str) -> Optional[float]:
        """Mean raw loss of a term over the samples that have it."""
        return _mean(s.terms[name].raw for s in self.samples if name in s.terms)


@dataclass(frozen=True)
class PictureLog:
    """A held-out pair that was sampled at a validation.

    Attributes:
        pair, caption: its name and its instruction.
        files: "before", "base", "lora", "after" and, if it has one, "mask" → name of a file in the run's picture folder.
        signals: "base" and "lora" → what the objective says about that output, see :attr:`PreviewRow.signals`.
    """

    pair: str
    caption: str
    files: Mapping[str, str]
    signals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationLog:
    """Held-out pairs after ``step`` steps, each with the same noise at every validation.

    Attributes:
        velocity: mean velocity loss with the LoRA.
        velocity_base: without it, from the same noise: their difference has far less variance than either.
        terms: term name → mean raw loss on one-step estimates with the LoRA.
        terms_base: without it.
        noise_levels: t → (with, without) mean velocity loss.
        pictures: that were sampled and kept; none without a folder.
    """

    step: int
    velocity: float
    velocity_base: float
    terms: Mapping[str, float] = field(default_factory=dict)
    terms_base: Mapping[str, float] = field(default_factory=dict)
    noise_levels: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    pictures: Sequence[PictureLog] = ()


@dataclass(frozen=True)
class EventLog:
    """What happened to a run after ``step`` steps, beside its steps.

    Attributes:
        event: ``"started"``, ``"resumed"``, ``"checked"`` (the self-check), ``"unchecked"`` (it was off), ``"own failures"``
            (a look at the LoRA's outputs, within ``step``), ``"stopped"`` or ``"ended"``; a process that is killed leaves
            none of the last two.
        notes: what a person should know.
        info: settings, objective and pairs, where a run starts or goes on; of a look, "outputs" and "failed" (failure → how
            many).
    """

    step: int
    event: str
    notes: Sequence[str] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


Entry = Union[StepLog, ValidationLog, EventLog]
_KINDS = {StepLog: "step", ValidationLog: "validation", EventLog: "event"}  # as the file calls them, in its order


@dataclass
class RunLog:
    """The log of a run: in memory and, with a folder, in ``folder/log.jsonl``, line by line."""

    folder: Optional[Path] = None
    steps: list[StepLog] = field(default_factory=list)
    validations: list[ValidationLog] = field(default_factory=list)
    events: list[EventLog] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Append in memory and on disk; who is killed loses at most the line being written.

        Raises:
            NotWritten: no room left, for example; the file is as it was.
        """
        self._append(entry)
        if self.folder is None:
            return
        path = self.folder / LOG_FILE
        size = path.stat().st_size if path.is_file() else 0
        try:
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(_line(entry))
        except NotWritten:
            with suppress(OSError):  # a line that was cut off would spoil the next
                os.truncate(path, size)
            raise

    @classmethod
    def read(cls, folder: Path, last_step: Optional[int] = None, file: Optional[Path] = None) -> RunLog:
        """The log of a folder, or another file, up to ``last_step``; a line that was cut off is left out."""
        log = cls(folder)
        path = folder / LOG_FILE if file is None else file
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                parsed = _PARSERS[entry.pop("kind")](entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if last_step is None or parsed.step <= last_step:
                log._append(parsed)
        return log

    def rewrite(self) -> None:
        """Write the file anew from memory: on resume, without the steps that are done again."""
        if self.folder is None:
            return
        make_folder(self.folder)
        order = list(_KINDS)
        everything: list[Entry] = [*self.steps, *self.validations, *self.events]
        entries = sorted(everything, key=lambda e: (e.step, order.index(type(e))))
        with replacing(self.folder / LOG_FILE) as temporary:
            temporary.write_text("".join(map(_line, entries)), encoding="utf-8")

    def _append(self, entry: Entry) -> None:
        if isinstance(entry, StepLog):
            self.steps.append(entry)
        elif isinstance(entry, ValidationLog):
            self.validations.append(entry)
        else:
            self.events.append(entry)

    @property
    def terms(self) -> list[str]:
        """Names of the terms that were ever evaluated, the velocity first."""
        names = dict.fromkeys(name for step in self.steps for s in step.samples for name in s.terms)
        return list(names)

    def loss_map(self) -> dict[str, list[float]]:
        """``{"loss": [...], "velocity": [...], ...}`` as ComfyUI's LOSS_MAP: totals and raw terms per step.

        A step at which a term was not evaluated repeats its last value, and those before its first value have the first:
        a 0 there would look like a loss that was perfect and got worse. A term without any value has no column.
        """
        columns: dict[str, list[float]] = {"loss": [s.loss for s in self.steps]}
        for name in self.terms:
            values = [step.term(name) for step in self.steps]
            last = next((v for v in values if v is not None), None)
            if last is None:
                continue
            columns[name] = []
            for value in values:
                last = last if value is None else value
                columns[name].append(last)
        return columns

    def by_noise_level(self, buckets: int = 5, last: Optional[int] = None) -> list[dict[str, Any]]:
        """Means per bucket of t and term over the last ``last`` steps (all without it).

        Returns:
            One entry per bucket: ``{"t": (low, high), "samples": n, "terms": {name: {"raw", "weighted", "active",
            "gradient", "share"}}}``; what was not measured is None. ``share`` is the term's part of the summed gradient
            norms.
        """
        steps = self.steps if last is None else self.steps[max(0, len(self.steps) - last) :]
        found = []
        for k in range(buckets):
            low, high = k / buckets, (k + 1) / buckets
            inside = [
                s for step in steps for s in step.samples if low <= s.t < high or (k == buckets - 1 and s.t == 1.0)
            ]
            terms = {}
            for name in dict.fromkeys(n for s in inside for n in s.terms):
                rows = [s.terms[name] for s in inside if name in s.terms]
                terms[name] = {
                    "raw": _mean(r.raw for r in rows),
                    "weighted": _mean(r.weighted for r in rows),
                    "active": _mean(r.open for r in rows),
                    "gradient": _mean(r.gradient for r in rows),
                }
            whole = sum(t["gradient"] or 0.0 for t in terms.values())
            for t in terms.values():
                t["share"] = t["gradient"] / whole if t["gradient"] is not None and whole else None
            found.append({"t": (low, high), "samples": len(inside), "terms": terms})
        return found


def _mean(values: Iterable[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None and math.isfinite(v)]  # as the file has it
    return sum(known) / len(known) if known else None


def _line(entry: Entry) -> str:
    return json.dumps({"kind": _KINDS[type(entry)], **_plain(asdict(entry))}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """What JSON holds: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(entry: dict[str, Any]) -> StepLog:
    samples = [
        Sample(s["pair"], s["t"], {name: TermSample(**term) for name, term in s["terms"].items()})
        for s in entry.pop("samples")
    ]
    return StepLog(samples=samples, **entry)


def _validation(entry: dict[str, Any]) -> ValidationLog:
    entry["noise_levels"] = {t: tuple(pair) for t, pair in entry["noise_levels"].items()}
    entry["pictures"] = tuple(PictureLog(**picture) for picture in entry.get("pictures", ()))
    return ValidationLog(**entry)


def _event(entry: dict[str, Any]) -> EventLog:
    return EventLog(**{**entry, "notes": tuple(entry["notes"])})


_PARSERS: dict[str, Callable[[dict[str, Any]], Entry]] = {"step": _step, "validation": _validation, "event": _event}
