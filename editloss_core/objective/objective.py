"""Named, weighted terms over roles and encoders, evaluated together: one total, one report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Collection, Iterable, Optional, Sequence

import torch
from torch import Tensor

from ..embeddings import EmbeddingSet
from .distances import DistanceTable
from .evaluation import TermReport, evaluate
from .terms import TERMS, LossTerm

NOT_A_NUMBER = "not a number"
NO_FAILURE = "no failure"  # what a signal says that points to none


def _plain(values: Optional[Tensor]) -> Any:
    """A tensor as numbers in lists, with None for what JSON cannot hold."""

    def finite(x: Any) -> Any:
        return [finite(v) for v in x] if isinstance(x, list) else (x if math.isfinite(x) else None)

    return None if values is None else finite(values.detach().tolist())


@dataclass(frozen=True)
class ObjectiveReport:
    """Total (with its graph) and the report of each term."""

    total: Tensor
    terms: tuple[TermReport, ...]

    @classmethod
    def of(cls, reports: Iterable[TermReport], terms: Sequence[LossTerm]) -> ObjectiveReport:
        """The reports of ``terms``, which come in any order; what only watches adds nothing to the total."""
        by_name = {report.term.name: report for report in reports}
        in_order = tuple(by_name[term.name] for term in terms)
        counted = [report.weighted for report in in_order if report.term.weight > 0]
        return cls(sum(counted, torch.zeros(())), in_order)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; what is not finite becomes None."""
        return {
            "total": _plain(self.total),
            "terms": {
                t.term.name: {
                    "kind": t.term.kind,
                    "encoder": t.term.encoder,
                    "weight": t.term.weight,
                    "value": _plain(t.value),
                    "weighted": _plain(t.weighted),
                    "active": _plain(t.active),
                    "per_sample": _plain(t.per_sample),
                    "distances": {label: _plain(d) for label, d in t.distances.items()},
                    "toward_failure": _plain(t.toward_failure),
                }
                for t in self.terms
            },
        }

    def signal(self) -> list[Optional[str]]:
        """Per sample, the failure that the terms point to, None, or ``"not a number"`` where a loss is NaN or infinite.

        The negative that the output has gone furthest towards, if more than halfway; else ``"distorted"`` if it is more
        than half as far from the target as the picture before the edit. This reads the training signal itself; it is
        not an independent judge of the picture.
        """
        found: list[Optional[str]] = []
        for i in range(len(self.terms[0].per_sample)):
            if any(not t.per_sample[i].isfinite() for t in self.terms):
                found.append(NOT_A_NUMBER)
                continue
            past = [
                (float(t.toward_failure[i]), TERMS[t.term.kind].failure)
                for t in self.terms
                if t.toward_failure is not None and TERMS[t.term.kind].failure and t.toward_failure[i] > 0.5
            ]
            named = [item for item in past if item[1] != "distorted"] or past
            found.append(max(named)[1] if named else None)
        return found


@dataclass(frozen=True)
class EditObjective:
    """An ordered set of terms. Adding a term returns a new objective, the way LoRA stacks chain.

    Raises:
        ValueError: for two terms of one name.
    """

    terms: tuple[LossTerm, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        names = [t.name for t in self.terms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"name: expected a name for each term, got {name!r} twice; with_term numbers them")

    def with_term(self, term: LossTerm) -> EditObjective:
        """Append; a name that is taken gets a number."""
        names = {t.name for t in self.terms}
        name, count = term.name, 2
        while name in names:
            name, count = f"{term.name} #{count}", count + 1
        return EditObjective((*self.terms, replace(term, name=name)))

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders that the terms read, each once, in order."""
        return tuple(dict.fromkeys(t.encoder for t in self.terms))

    def describe(self) -> str:
        """A line per term; encoders are named where there are several."""
        several = len(self.encoders) > 1
        return "\n".join(f"{t.describe()}{f' on {t.encoder}' if several else ''}" for t in self.terms)

    def reads(self, role: str) -> bool:
        """Whether any term needs embeddings of a role."""
        return any(role in term.roles for term in self.terms)

    def at(self, t: Tensor) -> EditObjective:
        """The terms that count for at least one of the noise levels ``[B]``: what a trainer has to compute."""
        return EditObjective(tuple(term for term in self.terms if bool(term.gate(t).any())))

    def counts(self, t: Tensor, encoders: Collection[str]) -> Tensor:
        """Which samples of noise levels ``t`` ``[B]`` count for a term that reads one of these encoders, as booleans."""
        return torch.stack([term.gate(t) for term in self.terms if term.encoder in encoders]).any(0)

    def evaluate(
        self,
        embeddings: EmbeddingSet,
        details: bool = False,
        t: Optional[Tensor] = None,
        sample_weights: Optional[Tensor] = None,
    ) -> ObjectiveReport:
        """Σ weight · term, with each distance that terms of one gate share computed once.

        A sample that does not count for a term gets no gradient from it, not even the NaN that 0 · NaN would be.

        Args:
            embeddings: must hold every role × encoder that a term names; ``pred`` may carry a graph.
            details: also compute ``toward_failure`` and the token maps for pictures, which training does not need.
            t: noise levels ``[B]`` of the samples, which the terms' gates compare; None: every sample counts.
            sample_weights: ``[B]`` factors of the samples, at least 0; the total is still divided by B.

        Raises:
            ValueError: no terms, a missing role or encoder, batches or token grids that do not fit.
        """
        if not self.terms:
            raise ValueError("objective: expected at least one term, got none")
        by_gate: dict[Optional[tuple[float, float]], list[LossTerm]] = {}
        for term in self.terms:
            always = t is None or (term.t_min, term.t_max) == (0.0, 1.0)
            by_gate.setdefault(None if always else (term.t_min, term.t_max), []).append(term)
        reports: list[TermReport] = []
        for gate, terms in by_gate.items():
            weights, seen = sample_weights, embeddings
            if gate is not None and t is not None:
                inside = terms[0].gate(t)
                weights = inside if weights is None else weights * inside.to(weights)
            if weights is not None:
                seen = _with_gradients_where(weights > 0, embeddings)
            table = DistanceTable(terms, seen, details)
            reports += [evaluate(table, term).counting(weights) for term in terms]
        return ObjectiveReport.of(reports, self.terms)


def _with_gradients_where(counts: Tensor, embeddings: EmbeddingSet) -> EmbeddingSet:
    preds = {key: gradient_where(counts, x) for key, x in embeddings.tensors.items() if key[0] == "pred"}
    return replace(embeddings, tensors={**embeddings.tensors, **preds})


def gradient_where(counts: Tensor, x: Tensor) -> Tensor:
    """``x`` ``[B, …]`` as it is, with a gradient for the samples that count (``[B]`` booleans) only.

    The others' is 0 whatever comes back: a factor of 0 would let NaN through.
    """
    if counts.device.type == "cpu" and bool(counts.all()):  # elsewhere the question would cost a wait
        return x
    return torch.where(counts.to(x.device).reshape(-1, *[1] * (x.ndim - 1)), x, x.detach())


def recommended(encoder: str, geometry_encoder: str = "", geometry_dist: str = "cos") -> EditObjective:
    """The starting mix: no-edit identity 1.0 and overlay avoidance 0.7, both with margin 0.25, geometry match 0.5.

    Geometry is matched by cosine here, so that the three weights are on one scale whatever the norm of the encoder's
    features; ``geometry_dist="l2"`` brings the squared L2 of :func:`~editloss_core.losses.loss_geometry_match` back.

    Args:
        encoder: name of the encoder for identity and overlay.
        geometry_encoder: name of one for geometry (tokens or a grid); empty for the same.
    """
    objective = EditObjective()
    for term in (
        LossTerm("no_edit_identity", encoder, weight=1.0, margin=0.25),
        LossTerm("geometry_match", geometry_encoder or encoder, weight=0.5, dist=geometry_dist),
        LossTerm("overlay_avoidance", encoder, weight=0.7, margin=0.25),
    ):
        objective = objective.with_term(term)
    return objective


def on_rollouts(encoder: str, geometry_encoder: str = "", geometry_dist: str = "cos") -> EditObjective:
    """The three task losses for training on rollouts, each with a share of 0.1 of the gradient (``weights = "shares"``).

    Margins are half of what the after picture itself reaches, so that a perfect output never pays. What it does in the demo,
    beside other ways to train: ``benchmarks/results/efficacy.md``.

    Args:
        encoder, geometry_encoder, geometry_dist: as in :func:`recommended`.
    """
    objective = EditObjective()
    for term in (
        LossTerm("no_edit_identity", encoder, weight=0.1, margin="auto:0.5"),
        LossTerm("geometry_match", geometry_encoder or encoder, weight=0.1, dist=geometry_dist),
        LossTerm("overlay_avoidance", encoder, weight=0.1, margin="auto:0.5"),
    ):
        objective = objective.with_term(term)
    return objective


PRESETS: dict[str, Callable[..., EditObjective]] = {"recommended": recommended, "on rollouts": on_rollouts}
