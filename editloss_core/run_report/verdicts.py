"""A run's saved outputs, judged: how often each validation fails and how, and which checkpoint fails least."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor

from ..drawing.statistics import Share
from ..objective import NO_FAILURE, NOT_A_NUMBER, TERMS
from ..pairs.files import relative
from ..pairs.outputs import moment_of
from ..pairs.pictures import read_picture
from ..progress import Progress
from ..runs.checkpoint import CHECKPOINT_FOLDER, SET_ASIDE
from ..runs.log import OWN_FAILURES, PictureLog, RunLog, ValidationLog
from ..runs.place import find_run
from ..verdict.folder import Folder
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
_CHECKPOINT_ENDINGS = (".safetensors", ".ckpt", ".pt", "")  # "": a folder, as diffusers writes it
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
        """Outputs in which no failure was found, and of which not all could be asked: they are neither good nor failing."""
        return self.counts[UNDECIDED]

    def judged_as(self, *verdicts: str) -> Share:
        """Of all outputs that were judged, undecided ones among them: of a failure, so many at least."""
        return Share(sum(self.counts[v] for v in verdicts), sum(self.counts.values()))

    @property
    def failing(self) -> Share:
        return self.judged_as(*FAILURES)

    @property
    def badness(self) -> tuple[float, float]:
        """What the best step is chosen by: the share that is not known to be good; then, as where no after picture lets any be
        known so, the share that fails."""
        return 1 - (self.judged_as(GOOD).value or 0.0), self.failing.value or 0.0

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
        pictures: the folder of the pictures that the log names.
        unit: what ``step`` counts: "step", or "epoch" of trainers that name their samples so.
    """

    folder: Path
    log: RunLog
    base: Judged
    validations: tuple[Judged, ...]
    cut_off: int = 0
    pictures: Optional[Path] = None
    unit: str = "step"

    # What to change for a surer answer, as a sentence goes on.
    MORE_PICTURES = f"Hold out more pairs, and raise previews ({OPTIONS['previews']})."
    MORE_OFTEN = f"lower validate_every ({OPTIONS['validate_every']})"

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def called(self, step: Optional[int]) -> str:
        """``step 250``; ``base`` for None."""
        return "base" if step is None else f"{self.unit} {step}"

    @property
    def since_best(self) -> int:
        """How many validations that were judged came after the best one."""
        return sum(v.failing.n > 0 and v.step > self.best.step for v in self.validations) if self.best else 0

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
        decided = any(v.failing.n > v.undecided for v in self.validations)
        return self._least([v for v in self.validations if v.failing.n]) if decided else None

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
        return len(self.validations) > 1 and len({v.badness for v in self.validations if v.failing.n}) == 1

    @staticmethod
    def _least(found: Sequence[Judged]) -> Optional[Judged]:
        def rank(v: Judged) -> tuple:
            return *v.badness, float("inf") if v.loss is None else v.loss, v.step

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
        """The choice in sentences: which checkpoint, where the loss would have led, when to stop, and how much can be trusted."""
        best, lowest = self.best, self.lowest
        if not self.validations:
            return [
                "No validation: this run watched no held-out pairs, or ended before the first. Set hold_out, and validate_every "
                f"({OPTIONS['validate_every']})."
            ]
        if best is None:
            return [self._nothing_judged()]
        rates = {v.badness for v in self.validations if v.failing.n}
        at = self.called(best.step)
        if not self.alike:
            alone = len(self.validations) == 1
            said = [
                f"{at.capitalize()} {'is the only one that was watched; failing' if alone else 'fails least'}: {best.failing}."
            ]
        else:
            which = "has the lowest loss of them" if lowest else "is the first of them"
            said = [f"Every {self.unit} fails as often: {best.failing}. {at.capitalize()} {which}."]
        if best.undecided:
            said.append(
                f"{counted(best.undecided, 'output')} of that {self.unit} {'is' if best.undecided == 1 else 'are'} undecided: no failure was "
                "found, and not all could be asked."
            )
        if self.base.failing.n and best.badness >= self.base.badness:
            said.append("The base model without the LoRA fails no more often than that.")
        said += self._where_it_is(best)
        said += self._by_loss(best, lowest, rates)
        if len(rates) > 1:
            later = self.since_best
            said.append(
                f"None of the {later} later ones fails less: it could have stopped there."
                if later > 1
                else "The one after it does not fail less."
                if later
                else "It is the last one: going on may help."
            )
        if len(self.validations) > 1:
            worst = max((v for v in self.validations if v.failing.n), key=lambda v: v.failing.value)
            if best.failing.interval[1] >= worst.failing.interval[0] and len(rates) > 1:
                n = best.failing.n
                said.append(
                    f"{counted(n, 'picture')} a validation cannot tell its best {self.unit} from its worst: the intervals overlap. "
                    f"{self.MORE_PICTURES}"
                )
        else:
            said.append(f"There is one validation only: {self.MORE_OFTEN} to have a choice.")
        return said

    def _nothing_judged(self) -> str:
        """Why there are validations and no failure rates."""
        undecided = sum(v.undecided for v in self.validations)
        if undecided:
            return (
                f"No failure rates: all {counted(undecided, 'output')} that could be judged are undecided: no failure was found, and "
                "not all could be asked. The notes say what."
            )
        return self._none_kept()

    def _none_kept(self) -> str:
        named = sum(len(v.log.pictures) for v in self.validations if v.log)
        if named and self.pictures is not None and not self.pictures.is_dir():
            return (
                f"No failure rates: the log names pictures of {counted(named, 'output')}, and there is no folder {self.pictures.name}/ in "
                f"{self.name}. Copy it from the folder in which the run was made."
            )
        kept = "they could not be judged" if self.outputs else "none were kept"
        return (
            f"No failure rates: of {counted(len(self.validations), 'validation')} with sampled pictures {kept}. Set previews and "
            f"preview_steps above 0 ({OPTIONS['previews']})."
        )

    def _where_it_is(self, best: Judged) -> list[str]:
        """Where to find the checkpoint of the best step, if not in its place."""
        if self.checkpoint(best.step):
            return []
        other = self.best_kept
        fails = (
            "fails as often" if other and other.failing == best.failing else f"fails least: {other and other.failing}"
        )
        instead = f" Of those that are there, {self.called(other.step)} {fails}." if other else ""
        return [f"Its checkpoint is {self.where(best.step)}.{instead}"]

    def _by_loss(self, best: Judged, lowest: Optional[Judged], rates: set) -> list[str]:
        """Where the held-out loss would have led."""
        if lowest is None:
            return ["No validation has a loss to choose by."]
        if lowest.step == best.step:
            return ["It has the lowest loss as well."] if len(rates) > 1 else []
        if not lowest.failing.n:
            return []
        more = lowest.failing.count - best.failing.count
        fails = (
            f"{more} more of {lowest.failing.n} fail"
            if more > 0
            else "as many fail"
            if not more
            else "fewer fail, and fewer are good"
        )
        return [f"Choosing by loss would have taken step {lowest.step}, where {fails}."]

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
        return found + self._of_pictures()

    def _of_pictures(self) -> list[str]:
        """Whether all validations are of the same pictures, and what could not be judged."""
        found = []
        watched = [(v.step, self._watched(v)) for v in self.validations if v.outputs]
        others = [step for step, what in watched if what != watched[-1][1]]
        if others:
            found.append(
                f"The validations up to {self.called(others[-1])} watched other pairs or sampled the base otherwise than the last one: "
                "their rates are not of the same pictures."
            )
        unanswered = Counter(
            text for o in (*self.base.outputs, *self.outputs) if o.judged == UNDECIDED for text in o.verdict.unanswered
        )
        found += [f"Undecided, {counted(count, 'output')}: {text}" for text, count in unanswered.most_common()]
        if self.pictures is None or self.pictures.is_dir():  # without the folder none can be, which the advice says
            found += [
                f"{o.pair}, {self.called(o.step)}: not judged: {o.problem}"
                for o in (*self.base.outputs, *self.outputs)
                if o.problem
            ]
        return found

    def _watched(self, validation: Judged) -> list[tuple]:
        """Which pictures the outputs of a validation are of."""

        def constants(p: PictureLog) -> tuple:
            return p.pair, *((part, name) for part, name in sorted(p.files.items()) if part != "lora")

        return [constants(p) for p in validation.log.pictures]


@dataclass(frozen=True)
class SampledRun(RunVerdicts):
    """A run of another trainer, known by the sample pictures that it has left.

    Attributes:
        checkpoints: step → file or folder, as far as their names tell.
        remarks: how the pictures were matched to pairs, and what was not used.
    """

    checkpoints: Mapping[int, Path] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    MORE_PICTURES = "Sample more pairs that are not trained on."
    MORE_OFTEN = "sample more often"

    @property
    def steps(self) -> int:
        return self.validations[-1].step if self.validations else 0

    def checkpoint(self, step: int) -> Optional[Path]:
        return self.checkpoints.get(step)

    def was_made(self, step: int) -> bool:
        return step in self.checkpoints

    def where(self, step: int) -> str:
        path = self.checkpoint(step)
        if path is None:
            return f"not known: no file of {self.called(step)} was found beside the samples"
        return relative(path, self.folder)

    def _none_kept(self) -> str:
        return "No failure rates: none of the sample pictures could be judged; the notes say why."

    def _where_it_is(self, best: Judged) -> list[str]:
        return (
            [f"Its checkpoint: {self.where(best.step)}."] if self.checkpoint(best.step) else super()._where_it_is(best)
        )

    def _by_loss(self, best: Judged, lowest: Optional[Judged], rates: set) -> list[str]:
        return []  # it is not in the pictures

    def notes(self) -> list[str]:
        return [*self.remarks, *self._of_pictures()]

    def _watched(self, validation: Judged) -> list[tuple]:
        return sorted(Counter(o.pair for o in validation.outputs).items())


def judge_run(
    folder: Union[str, Path], progress: Optional[Progress] = None, judge: Optional[Judge] = None
) -> RunVerdicts:
    """Judge the outputs that a run has kept; what cannot be read or judged is left out and named.

    Args:
        folder: of a run: it holds ``log.jsonl`` and, if it sampled held-out pairs, ``pictures/``; or what
            :func:`~..runs.place.find_run` finds beside that.
        progress: called with (done, total); raises to stop.
        judge: called like :func:`~editloss_core.verdict.judge.judge`, which is the default.

    Raises:
        ValueError: no folder of a run, or a log in which nothing can be read.
    """
    place = find_run(folder)
    log = RunLog.read(place.folder, file=place.log)
    log.validations.sort(key=lambda v: v.step)
    entries = len(log.steps) + len(log.validations) + len(log.events)
    cut_off = sum(bool(line.strip()) for line in place.log.read_bytes().splitlines()) - entries
    if not entries:
        raise ValueError(
            f"run_folder: nothing can be read in {place.folder.name}/{place.log.name}; the run ended before its first step"
        )
    work = [(v.step, "lora", p) for v in log.validations for p in v.pictures]
    last = next((v for v in reversed(log.validations) if v.pictures), None)
    work += [(None, "base", p) for p in (last.pictures if last else ())]
    outputs: dict[Optional[int], list[Output]] = {}
    known: dict[tuple, tuple[Optional[Verdict], str]] = {}
    for done, (step, which, entry) in enumerate(work):
        files = {("output" if part == which else part): place.pictures / Path(name).name
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
    base = Judged(None, None, tuple(outputs.get(None, ())))
    return RunVerdicts(place.folder, log, base, validations, cut_off, place.pictures)


def judge_samples(
    samples: Folder, folder: Path, progress: Optional[Progress] = None, judge: Optional[Judge] = None
) -> SampledRun:
    """Judge the sample pictures that another trainer has made in the course of a run.

    Args:
        samples: as :func:`~editloss_core.verdict.folder.scan` finds them, with steps in their names. Those of step 0 are the base's.
        folder: of the run, or of its samples: checkpoints are looked for in it and above it.
        progress, judge: as in :func:`judge_run`.

    Raises:
        ValueError: no name has a step in it, or steps and epochs are mixed.
    """
    entries = [e for e in samples.entries if e.moment.count is not None]
    units = {e.moment.unit for e in entries}
    if len(units) != 1:
        told = "steps in some names and epochs in others" if units else f"none in {samples.entries[0].name}"
        raise ValueError(
            f"samples: expected names with the step in them, as in kitchen_000000250.png or step_250/kitchen.png, got {told}; "
            "outputs without steps are for editloss diagnose"
        )
    (unit,) = units
    outputs: dict[int, list[Output]] = {}
    for done, entry in enumerate(entries):
        found = (None, entry.problem) if entry.problem else _judge(entry.files, judge or judge_picture)
        count = entry.moment.count
        outputs.setdefault(count, []).append(Output(entry.pair or entry.name, "", count or None, entry.files, *found))
        if progress:
            progress(done + 1, len(entries))
    base = Judged(None, None, tuple(outputs.pop(0, ())))
    validations = tuple(Judged(count, None, tuple(outputs[count])) for count in sorted(outputs))
    left = len(samples.entries) - len(entries)
    remarks = [note[:1].upper() + note[1:] + "." for note in samples.notes]
    remarks += (
        [f"{counted(left, 'output')} without a {unit} in the name {'was' if left == 1 else 'were'} left out."]
        if left
        else []
    )
    return SampledRun(
        folder,
        RunLog(),
        base,
        validations,
        unit=unit,
        checkpoints=_checkpoints(folder, unit, outputs),
        remarks=tuple(remarks),
    )


def _checkpoints(folder: Path, unit: str, steps: Collection[int]) -> dict[int, Path]:
    """Checkpoints in the folder of the samples and in the one above it, by the step in their names."""
    found: dict[int, Path] = {}
    for place in (folder.resolve(), folder.resolve().parent):
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in _CHECKPOINT_ENDINGS and path.is_dir() == (path.suffix == ""):
                moment = _checkpoint_moment(path.stem, unit, steps)
                if moment is not None and (path.is_file() or any(path.glob("*.safetensors"))):
                    found.setdefault(moment, path)
    return found


def _checkpoint_moment(stem: str, unit: str, steps: Collection[int]) -> Optional[int]:
    """After how many steps, or epochs, a checkpoint was made; kohya's NAME-000003 does not say which of the two it counts, and a
    number at the end that is none of those sampled at may be anything."""
    moment = moment_of(stem)
    last = re.search(r"(?<!\d)(\d+)$", stem)
    if moment.count is None and last:
        return int(last[1]) if int(last[1]) in steps else None
    kohya = unit == "epoch" and re.search(r"-\d{6}$", stem) is not None
    return moment.count if moment.unit == unit or kohya else None


def _judge(files: Mapping[str, Path], judge: Judge) -> tuple[Optional[Verdict], str]:
    try:
        found = {part: _read(path, part) for part, path in files.items()}
        missing = [part for part in ("before", "output") if part not in found]
        if missing:
            return None, f"there is no {missing[0]} picture"
        verdict = judge(found["before"], found["output"], found.get("after"), found.get("mask"))
    except ValueError as error:
        return None, str(error)
    return verdict, ""


def _read(path: Path, part: str) -> Tensor:
    try:
        return torch.from_numpy(read_picture(path, part == "mask").values)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


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
