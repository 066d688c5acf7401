"""A run's saved outputs, judged: how often each validation fails and how, and which checkpoint fails least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor

from ..drawing.statistics import Share
from ..objective import NO_FAILURE, NOT_A_NUMBER, TERMS
from ..pairs.files import read_picture
from ..progress import Progress
from ..runs.checkpoint import CHECKPOINT_FOLDER, SET_ASIDE
from ..runs.log import LOG_FILE, OWN_FAILURES, PictureLog, RunLog, ValidationLog
from ..runs.pictures import PICTURE_FOLDER
from ..verdict.items import as_signal
from ..verdict.judge import FAILURES, GOOD, UNDECIDED, VERDICTS, Verdict
from ..verdict.judge import judge as judge_picture
from .columns import counted

BEGINNINGS = ("started", "resumed")  # events that carry what was trained
# Where a setting is, in the graph and in a configuration file.
OPTIONS = {
    "keep": "Run Options; keep in [run]",
    "previews": "Run Options; [validation]",
    "validate_every": "Run Options; [validation]",
}
SAYING = tuple(v for v in VERDICTS if v != UNDECIDED)  # verdicts that a signal can agree with
Judge = Callable[..., Verdict]


@dataclass(frozen=True)
class Output:
    """One saved output of a held-out pair.

    Attributes:
        pair, caption: of the pair.
        step: of the LoRA; None for the base.
        files: "before", "output", "after" and perhaps "mask".
        verdict: None where it could not be judged; ``problem`` says why.
        signal: what the objective says about the same picture, as in :class:`~editloss_core.runs.log.PictureLog`; empty
            for a run without an objective.
    """

    pair: str
    caption: str
    step: Optional[int]
    files: Mapping[str, Path]
    verdict: Optional[Verdict]
    problem: str = ""
    signal: Mapping[str, Any] = field(default_factory=dict)

    @property
    def judged(self) -> Optional[str]:
        return self.verdict.verdict if self.verdict else None

    @property
    def says(self) -> Optional[str]:
        """The signal in a word; None where no term can tell."""
        return (self.signal["says"] or NO_FAILURE) if "says" in self.signal else None

    @property
    def agree(self) -> Optional[bool]:
        """Whether signal and judge say the same; None where one of them says nothing."""
        if self.verdict is None or self.verdict.verdict == UNDECIDED or self.says is None:
            return None
        return self.says == as_signal(self.verdict.verdict)


@dataclass(frozen=True)
class Judged:
    """The outputs of one validation, or those of the base (``step`` and ``log`` are None)."""

    step: Optional[int]
    log: Optional[ValidationLog]
    outputs: tuple[Output, ...]

    @cached_property
    def counts(self) -> Mapping[str, int]:
        return Counter(o.judged for o in self.outputs if o.verdict)

    @property
    def undecided(self) -> int:
        """Outputs in which no failure was found, and of which not all could be asked: they count as neither good nor failing."""
        return self.counts[UNDECIDED]

    def judged_as(self, *verdicts: str) -> Share:
        """Of the outputs that are good or have a failure."""
        return Share(sum(self.counts[v] for v in verdicts), sum(self.counts.values()) - self.undecided)

    @property
    def failing(self) -> Share:
        return self.judged_as(*FAILURES)

    @property
    def not_good(self) -> float:
        """What the best step is chosen by: the share of all judged outputs that is not known to be good."""
        return 1 - self.counts[GOOD] / max(1, sum(self.counts.values()))

    @property
    def loss(self) -> Optional[float]:
        """Velocity loss of the held-out pairs: what other trainers choose by."""
        return self.log.velocity if self.log else None

    def score(self, failure: str) -> Optional[float]:
        """The judge's mean score."""
        return _mean(o.verdict.scores.get(failure) for o in self.outputs if o.verdict)

    def toward(self, names: Sequence[str]) -> Optional[float]:
        """How far these terms say that the outputs went towards their failure: the mean, over the pairs, of the highest."""
        return _mean(
            max((t for t in (o.signal.get("terms", {}).get(n, {}).get("toward_failure") for n in names) if t is not None), default=None)
            for o in self.outputs
        )  # fmt: skip


@dataclass(frozen=True)
class RunVerdicts:
    """A run, judged.

    Attributes:
        folder: of the run.
        log: as it was read.
        base: the model without the LoRA, from the last validation with pictures.
        validations: by step.
        cut_off: lines of the log that could not be read.
    """

    folder: Path
    log: RunLog
    base: Judged
    validations: tuple[Judged, ...]
    cut_off: int = 0

    @property
    def info(self) -> Mapping[str, Any]:
        """What was trained, as the run last started or went on; empty for a log that does not say."""
        return next((e.info for e in reversed(self.log.events) if e.event in BEGINNINGS and e.info), {})

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.info.get("settings", {})

    @property
    def steps(self) -> int:
        return self.log.steps[-1].step if self.log.steps else 0

    @property
    def terms_of(self) -> dict[str, list[str]]:
        """Failure → names of the terms that answer it."""
        found: dict[str, list[str]] = {}
        for term in self.info.get("objective", ()):
            failure = TERMS[term["kind"]].failure if term.get("kind") in TERMS else None
            if failure:
                found.setdefault(failure, []).append(term["name"])
        return found

    @property
    def outputs(self) -> list[Output]:
        """Of all validations."""
        return [o for v in self.validations for o in v.outputs]

    @cached_property
    def best(self) -> Optional[Judged]:
        """The validation that fails least; of equals the one with the lower loss, then the earlier one."""
        return self._least([v for v in self.validations if v.failing.n])

    @cached_property
    def best_kept(self) -> Optional[Judged]:
        """The same among those whose checkpoint is still there."""
        return self._least([v for v in self.validations if v.failing.n and self.checkpoint(v.step)])

    @cached_property
    def lowest(self) -> Optional[Judged]:
        """The validation with the lowest loss."""
        known = [v for v in self.validations if v.loss is not None]
        return min(known, key=lambda v: (v.loss, v.step), default=None)

    @property
    def alike(self) -> bool:
        """Whether several validations fail equally often, so that failures choose none of them."""
        return len(self.validations) > 1 and len({v.not_good for v in self.validations if v.failing.n}) == 1

    @staticmethod
    def _least(found: Sequence[Judged]) -> Optional[Judged]:
        def rank(v: Judged) -> tuple:
            return v.not_good, float("inf") if v.loss is None else v.loss, v.step

        return min(found, key=rank, default=None)

    def checkpoint(self, step: int) -> Optional[Path]:
        """The checkpoint of a step, if it is still there."""
        name, place = f"step_{step:06d}.safetensors", self.folder / CHECKPOINT_FOLDER
        return next((path for path in (place / name, place / SET_ASIDE / name) if path.is_file()), None)

    def was_made(self, step: int) -> bool:
        """Whether the settings asked for a checkpoint at this step; taken for granted where the log does not say."""
        every = self.settings.get("checkpoint_every")
        return every is None or step == self.settings.get("steps") or bool(every and step % every == 0)

    def where(self, step: int) -> str:
        """The file of a step's checkpoint, or why there is none, in words that go on from "is"."""
        path = self.checkpoint(step)
        if path:
            return path.relative_to(self.folder).as_posix()
        if not self.was_made(step):
            every, watched = self.settings["checkpoint_every"], self.settings.get("validate_every", "unknown")
            return f"not there: none was made at this step (checkpoint_every {every}, validate_every {watched})"
        kept = self.settings.get("keep", "few")
        return f"not there any more: a run keeps its last {kept} ({OPTIONS['keep']})"

    def advice(self) -> list[str]:
        """The choice in sentences: which checkpoint, where the loss would have led, and how much can be trusted."""
        best, lowest = self.best, self.lowest
        if not self.validations:
            return [
                "No validation: this run watched no held-out pairs, or ended before the first. Set hold_out, and validate_every "
                f"({OPTIONS['validate_every']})."
            ]
        if best is None:
            undecided = sum(v.undecided for v in self.validations)
            if undecided:
                return [
                    f"No failure rates: all {counted(undecided, 'output')} that could be judged are undecided: no failure was found, and "
                    "not all could be asked. The notes say what."
                ]
            kept = "they could not be judged" if self.outputs else "none were kept"
            return [
                f"No failure rates: of {counted(len(self.validations), 'validation')} with sampled pictures {kept}. Set previews and "
                f"preview_steps above 0 ({OPTIONS['previews']})."
            ]
        rates = {v.not_good for v in self.validations if v.failing.n}
        if not self.alike:
            alone = len(self.validations) == 1
            said = [
                f"Step {best.step} {'is the only one that was watched; failing' if alone else 'fails least'}: {best.failing}."
            ]
        else:
            said = [f"Every step fails as often: {best.failing}. Step {best.step} has the lowest loss of them."]
        if best.undecided:
            said.append(f"{counted(best.undecided, 'more output')} of that step: undecided, neither good nor failing.")
        if self.base.failing.n and best.not_good >= self.base.not_good:
            said.append("The base model without the LoRA fails no more often than that.")
        if not self.checkpoint(best.step):
            other = self.best_kept
            fails = (
                "fails as often"
                if other and other.failing == best.failing
                else f"fails least: {other and other.failing}"
            )
            instead = f" Of those that are there, step {other.step} {fails}." if other else ""
            said.append(f"Its checkpoint is {self.where(best.step)}.{instead}")
        if lowest is None:
            said.append("No validation has a loss to choose by.")
        elif lowest.step == best.step:
            said += ["It has the lowest loss as well."] if len(rates) > 1 else []
        elif lowest.failing.n:
            more = lowest.failing.count - best.failing.count
            fails = f"{more} more of {lowest.failing.n} fail" if more > 0 else "as many fail" if not more else "fewer fail, and fewer are good"
            said.append(f"Choosing by loss would have taken step {lowest.step}, where {fails}.")
        if len(self.validations) > 1:
            worst = max((v for v in self.validations if v.failing.n), key=lambda v: v.failing.value)
            if best.failing.interval[1] >= worst.failing.interval[0] and len(rates) > 1:
                n = best.failing.n
                said.append(
                    f"{counted(n, 'picture')} a validation cannot tell its best step from its worst: the intervals overlap. "
                    f"Hold out more pairs, and raise previews ({OPTIONS['previews']})."
                )
        else:
            said.append(
                f"There is one validation only: lower validate_every ({OPTIONS['validate_every']}) to have a choice."
            )
        return said

    def notes(self) -> list[str]:
        """What happened to the run, and what of it is missing here."""
        found = []
        looks = [event for event in self.log.events if event.event == OWN_FAILURES]
        happened = [event for event in self.log.events if event.event != OWN_FAILURES]
        for event in happened:
            if event.event in ("checked", "unchecked"):
                found += [note[:1].upper() + note[1:] for note in event.notes]
                continue
            words = {"started": "Started", "resumed": f"Went on from step {event.step}"}
            said = words.get(event.event, f"{event.event.capitalize()} at step {event.step}")
            if event.event != "started" or event.notes:
                found.append(said + (f": {'; '.join(event.notes)}" if event.notes else ""))
        if looks:
            found.append(f"Own failures at step {looks[-1].step}, the last look: {'; '.join(looks[-1].notes)}")
        total = self.settings.get("steps")
        if happened and happened[-1].event in ("started", "resumed", "checked", "unchecked"):
            found.append(f"The log ends at step {self.steps} of {total}: the run goes on, or was killed.")
        if self.cut_off:
            found.append(f"{counted(self.cut_off, 'line')} of the log could not be read (cut off, or damaged).")
        watched = [(v.step, _watched(v)) for v in self.validations if v.outputs]
        others = [step for step, what in watched if what != watched[-1][1]]
        if others:
            found.append(
                f"The validations up to step {others[-1]} watched other pairs or sampled the base otherwise than the last one: "
                "their rates are not of the same pictures."
            )
        unanswered = Counter(
            text for o in (*self.base.outputs, *self.outputs) if o.judged == UNDECIDED for text in o.verdict.unanswered
        )
        found += [f"Undecided, {counted(count, 'output')}: {text}" for text, count in unanswered.most_common()]
        found += [
            f"{o.pair}, {'base' if o.step is None else f'step {o.step}'}: not judged: {o.problem}"
            for o in (*self.base.outputs, *self.outputs)
            if o.problem
        ]
        return found


def judge_run(
    folder: Union[str, Path], progress: Optional[Progress] = None, judge: Optional[Judge] = None
) -> RunVerdicts:
    """Judge the outputs that a run has kept; what cannot be read or judged is left out and named.

    Args:
        folder: of a run: it holds ``log.jsonl`` and, if it sampled held-out pairs, ``pictures/``.
        progress: called with (done, total); raises to stop.
        judge: called like :func:`~editloss_core.verdict.judge.judge`, which is the default.

    Raises:
        ValueError: no folder of a run, or a log in which nothing can be read.
    """
    folder = Path(folder)
    path = folder / LOG_FILE
    if not path.is_file():
        found = f"no {LOG_FILE} in {folder.name!r}" if folder.is_dir() else f"{folder.name!r}, which is no folder"
        raise ValueError(f"run_folder: expected a folder that a training run has written, got {found}")
    log = RunLog.read(folder)
    log.validations.sort(key=lambda v: v.step)
    entries = len(log.steps) + len(log.validations) + len(log.events)
    cut_off = sum(bool(line.strip()) for line in path.read_bytes().splitlines()) - entries
    if not entries:
        raise ValueError(
            f"run_folder: nothing can be read in {folder.name}/{LOG_FILE}; the run ended before its first step"
        )
    work = [(v.step, "lora", p) for v in log.validations for p in v.pictures]
    last = next((v for v in reversed(log.validations) if v.pictures), None)
    work += [(None, "base", p) for p in (last.pictures if last else ())]
    outputs: dict[Optional[int], list[Output]] = {}
    known: dict[tuple, tuple[Optional[Verdict], str]] = {}
    for done, (step, which, entry) in enumerate(work):
        files = {("output" if part == which else part): folder / PICTURE_FOLDER / Path(name).name
                 for part, name in entry.files.items() if part in (which, "before", "after", "mask")}  # fmt: skip
        key = tuple(sorted(files.items()))
        if key not in known:
            known[key] = _judge(files, judge or judge_picture)
        outputs.setdefault(step, []).append(
            Output(entry.pair, entry.caption, step, files, *known[key], entry.signals.get(which, {}))
        )
        if progress:
            progress(done + 1, len(work))
    validations = tuple(Judged(v.step, v, tuple(outputs.get(v.step, ()))) for v in log.validations)
    return RunVerdicts(folder, log, Judged(None, None, tuple(outputs.get(None, ()))), validations, cut_off)


def _judge(files: Mapping[str, Path], judge: Judge) -> tuple[Optional[Verdict], str]:
    try:
        found = {part: _read(path, part) for part, path in files.items()}
        missing = [part for part in ("before", "output") if part not in found]
        if missing:
            return None, f"the log names no {missing[0]} picture"
        verdict = judge(found["before"], found["output"], found.get("after"), found.get("mask"))
    except ValueError as error:
        return None, str(error)
    return verdict, ""


def _read(path: Path, part: str) -> Tensor:
    try:
        return torch.from_numpy(read_picture(path, part == "mask").values)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _watched(validation: Judged) -> list[tuple]:
    """Which pictures the outputs of a validation are of."""

    def constants(p: PictureLog) -> tuple:
        return p.pair, *((part, name) for part, name in sorted(p.files.items()) if part != "lora")

    return [constants(p) for p in validation.log.pictures]


def _mean(values) -> Optional[float]:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def matrix(run: RunVerdicts) -> tuple[list[str], list[list[int]]]:
    """How often the signal (rows) and the judge (columns: :data:`SAYING`) said what, over all validations."""
    outputs = [o for o in run.outputs if o.agree is not None]
    rows = [NO_FAILURE, *(f for f in FAILURES if f in run.terms_of), NOT_A_NUMBER]
    rows += sorted({o.says for o in outputs} - set(rows))
    rows = [row for row in rows if row != NOT_A_NUMBER or any(o.says == row for o in outputs)]
    return rows, [[sum(o.says == says and o.judged == v for o in outputs) for v in SAYING] for says in rows]
