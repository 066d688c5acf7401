"""Outputs with their verdicts, in words and numbers, beside what a training objective says of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Mapping, Optional, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..drawing.sheet import cell
from ..drawing.statistics import Share
from ..objective import NO_FAILURE, NOT_A_NUMBER, TERMS, ObjectiveReport
from .judge import FAILURES, GOOD, UNDECIDED, VERDICTS, Verdict, judge

KEPT = 384  # pixels on the long side of the pictures that wait for a sheet: its cells are smaller


@dataclass(frozen=True)
class Signal:
    """What an objective says about one output.

    Attributes:
        says: a failure, None, or "not a number", as :meth:`~editloss_core.objective.ObjectiveReport.signal` has it.
        toward: failure → how far the output went towards it, 0 at the target and 1 at the negative; only those that a term of
            the objective looks for.
    """

    says: Optional[str]
    toward: Mapping[str, float]

    @property
    def words(self) -> str:
        return self.says or (NO_FAILURE if self.toward else "cannot tell")

    def disagreement(self, verdict: Verdict) -> str:
        """A sentence if it says something else than the judge, or one of them cannot see what the other sees; else ""."""
        name = verdict.verdict
        judged = as_signal(name)
        if self.words == judged or (self.says is None and name in (GOOD, UNDECIDED)):
            return ""
        if self.says in FAILURES and verdict.scores.get(self.says) is None:
            return f"The training signal says {self.says}; the judge could not answer that."
        if self.says != NOT_A_NUMBER and name in FAILURES and name not in self.toward:
            return f"No term of the objective looks for {_called(name)}."
        return f"They disagree: the training signal says {self.words}, the judge {judged}."


def as_signal(verdict: str) -> str:
    """What a signal has to say to agree with a verdict."""
    return NO_FAILURE if verdict in (GOOD, UNDECIDED) else verdict


def signals(report: ObjectiveReport) -> list[Signal]:
    """The signal of every sample of a report."""
    found = []
    for i, says in enumerate(report.signal()):
        toward: dict[str, float] = {}
        for t in report.terms:
            failure = TERMS[t.term.kind].failure
            if failure and t.toward_failure is not None and bool(t.toward_failure[i].isfinite()):
                toward[failure] = max(toward.get(failure, -math.inf), float(t.toward_failure[i]))
        found.append(Signal(says, toward))
    return found


def with_signals(items: Sequence[Item], report: ObjectiveReport) -> list[Item]:
    """The items with what a report on the same outputs, in the same order, says of them.

    Raises:
        ValueError: a report on another number of outputs.
    """
    said = signals(report)
    if len(said) != len(items):
        raise ValueError(f"report: expected {len(items)} outputs like items, got {len(said)}")
    return [replace(item, signal=signal) for item, signal in zip(items, said)]


@dataclass(frozen=True)
class Item:
    """One output and what became of it.

    Attributes:
        name: shown and written; any text.
        verdict: None where it could not be judged.
        message: why there is no verdict; else "".
        notes: sentences that a person should know beside the verdict.
        pictures: "before", "output" and perhaps "after" → ``[h, w, 3]`` uint8, reduced to what a sheet shows; empty for an
            item that a sheet only counts.
        signal: what an objective says about it.
    """

    name: str
    verdict: Optional[Verdict] = None
    message: str = ""
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    signal: Optional[Signal] = None

    @classmethod
    def judged(
        cls, name: str, before: Tensor, output: Tensor, after: Optional[Tensor] = None, mask: Optional[Tensor] = None,
        notes: Sequence[str] = (),
    ) -> Item:  # fmt: skip
        """Judge one output; what :func:`.verdict.judge` refuses becomes the message."""
        given = {"before": before, "after": after, "output": output}
        pictures = {part: _reduced(x) for part, x in given.items() if x is not None}
        try:
            verdict = judge(before, output, after, mask)
        except ValueError as error:
            return cls(name, None, str(error), tuple(notes), pictures)
        assert verdict.mask is not None  # `judge` gives the one that it used
        small = F.interpolate(verdict.mask[None, None], size=pictures["output"].shape[:2], mode="area")[0, 0]
        return cls(name, replace(verdict, mask=small), "", (*notes, *verdict.notes, *_flat(output)), pictures)

    @property
    def disagreement(self) -> str:
        return self.signal.disagreement(self.verdict) if self.signal and self.verdict else ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Everything there is to say in words."""
        unanswered = self.verdict.unanswered if self.verdict else ()
        return tuple(f"Not answered: {text}." for text in unanswered) + self.notes

    def without_pictures(self) -> Item:
        verdict = self.verdict and replace(self.verdict, maps={}, mask=None)
        return replace(self, verdict=verdict, pictures={})

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON; what is not finite becomes None."""
        v, s = self.verdict, self.signal
        return {
            "name": self.name,
            "verdict": v and v.verdict,
            "scores": {k: finite(x) for k, x in v.scores.items()} if v else {},
            "measures": {k: finite(x) for k, x in v.measures.items()} if v else {},
            "unanswered": list(v.unanswered) if v else [],
            "notes": list(self.notes),
            "message": self.message,
            **({"signal": {"says": s.words, "toward": dict(s.toward)}, "disagreement": self.disagreement} if s else {}),
        }


def verdict_share(items: Sequence[Item], *verdicts: str) -> Share:
    """How many of the judged items have one of these verdicts."""
    judged = [item.verdict.verdict for item in items if item.verdict]
    return Share(sum(v in verdicts for v in judged), len(judged))


@dataclass(frozen=True)
class Failing:
    """How many of ``n`` judged items have a failure; any of the undecided ones may have one as well."""

    failed: int
    undecided: int
    n: int

    @classmethod
    def of(cls, items: Sequence[Item]) -> Failing:
        counts = [verdict_share(items, *names) for names in (FAILURES, (UNDECIDED,))]
        return cls(counts[0].count, counts[1].count, counts[0].n)

    @property
    def least(self) -> Share:
        return Share(self.failed, self.n)

    @property
    def most(self) -> Share:
        """What is not known to be good."""
        return Share(self.failed + self.undecided, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        return self.least.interval[0], self.most.interval[1]

    def __str__(self) -> str:
        if not self.undecided:
            return str(self.least)
        return f"{self.failed} to {self.most.count} of {self.n}: {self.undecided} undecided"


def unanswered(items: Sequence[Item]) -> list[tuple[str, int]]:
    """What could not be answered of the judged items, and of how many; the most frequent first."""
    said = Counter(text for item in items if item.verdict for text in item.verdict.unanswered)
    return said.most_common()


def table(items: Sequence[Item]) -> str:
    """The items as a Markdown table, under a line with their numbers."""
    with_signal = any(item.signal for item in items)
    heads = ["output", "verdict", *(["training signal"] if with_signal else []), *FAILURES, "notes"]
    lines = [f"**{summary(items)}**", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for item in items:
        scores = item.verdict.scores if item.verdict else {}
        words = [item.disagreement, item.message, *item.remarks]
        cells = [
            item.name,
            item.verdict.verdict if item.verdict else "not judged",
            *([item.signal.words if item.signal else "–"] if with_signal else []),
            *(_number(scores.get(failure)) for failure in FAILURES),
            " ".join(w for w in words if w),
        ]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    lines += [
        "",
        "Scores: 0.5 and more is a failure; – could not be answered. Undecided: no failure found, and not all could be asked.",
    ]
    return "\n".join(lines)


def summary(items: Sequence[Item]) -> str:
    """The numbers of each verdict in a line."""
    counts = Counter(item.verdict.verdict if item.verdict else "not judged" for item in items)
    parts = [f"{counts[v]} {v}" for v in (*VERDICTS, "not judged") if counts[v]]
    return f"{len(items)} output{'s' * (len(items) != 1)}: {', '.join(parts)}"


def _reduced(picture: Tensor) -> Tensor:
    values = (picture.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte().numpy()
    scale = KEPT / max(values.shape[:2])
    if scale >= 1:
        return torch.from_numpy(values)
    size = [max(1, round(side * scale)) for side in values.shape[1::-1]]
    return torch.from_numpy(np.array(Image.fromarray(values).resize((size[0], size[1]), Image.Resampling.BOX)))


def _flat(output: Tensor) -> tuple[str, ...]:
    """A note where an output is all one colour: a decoder's NaN, or a safety filter."""
    values = output.detach().float().flatten(0, 1)
    for some in (values[:: max(1, len(values) // 256)], values):  # few suffice to say that it is not
        if float((some.amax(0) - some.amin(0)).max()) > 2 / 255:
            return ()
    middle = values.mean(0)
    name = "black" if float(middle.max()) < 0.02 else "white" if float(middle.min()) > 0.98 else "one colour"
    return (f"The output is all {name}.",)


def _called(failure: str) -> str:
    words = {"no edit": "a missing edit", "overlay": "an overlay", "distorted": "a distortion"}
    return {**words, "unusable": "an unusable output"}.get(failure, failure)


def finite(value: Optional[float]) -> Optional[float]:
    """The number, or None where it is NaN, infinite or not known."""
    return value if value is not None and math.isfinite(value) else None


def _number(value: Optional[float]) -> str:
    return "–" if finite(value) is None else f"{value:.2f}"
