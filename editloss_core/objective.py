"""Named, weighted terms over roles and encoders, evaluated together: one total, one report."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Callable, Mapping, Optional

import torch
from torch import Tensor

from . import losses
from .embeddings import NEGATIVE_ROLES, EmbeddingSet, check_role

TOKEN_WEIGHTS = ("mask", "difference", "none")


@dataclass(frozen=True)
class LossTerm:
    """One term of an objective. Only the fields that its ``kind`` uses may differ from their defaults' None.

    Attributes:
        kind: a key of :data:`TERMS`.
        encoder: name of the encoder whose embeddings the term reads.
        weight: factor in the total; 0 only watches.
        name: unique in an objective (a second one gets a number); made from the kind when empty.
        anchor, positive, negative: roles; ``negative`` may be ``"in_batch"`` for InfoNCE.
        reference: role whose distance to ``negative`` the margin ranking compares with.
        dist: ``"cos"`` or ``"l2"``; match terms know ``"l1"`` too.
        agg: ``"mean"``, ``"max"`` or ``"sum"`` over tokens.
        margin: number ≥ 0, ``"auto"`` or ``"auto:F"`` (see :mod:`editloss_core.losses`).
        smooth: softness of the hinge in units of the distance, 0 = hard.
        neg_agg: over several negatives of one pair.
        temperature: of InfoNCE.
        label: 1 pulls, 0 pushes (contrastive).
        token_weights: ``"mask"``: the edit mask if the embeddings have one; ``"difference"``: d(gt, src) per token;
            ``"none"``.
    """

    kind: str
    encoder: str
    weight: float = 1.0
    name: str = ""
    anchor: Optional[str] = None
    positive: Optional[str] = None
    negative: Optional[str] = None
    reference: Optional[str] = None
    dist: Optional[str] = None
    agg: str = "mean"
    margin: Optional[float | str] = None
    smooth: Optional[float] = None
    neg_agg: Optional[str] = None
    temperature: Optional[float] = None
    label: Optional[int] = None
    token_weights: str = "mask"

    def __post_init__(self):
        if self.kind not in TERMS:
            raise ValueError(f"kind: expected one of {', '.join(TERMS)}, got {self.kind!r}")
        defaults = TERMS[self.kind].defaults
        for f in fields(self):
            if f.default is not None:
                continue
            if f.name in defaults and getattr(self, f.name) is None:
                object.__setattr__(self, f.name, defaults[f.name])
            elif f.name not in defaults and getattr(self, f.name) is not None:
                raise ValueError(f"{f.name}: a {self.kind} term has no such setting; it has {', '.join(defaults)}")
        if not self.name:
            object.__setattr__(self, "name", self.kind.replace("_", " "))
        losses._check_number("weight", self.weight, minimum=0.0)
        losses._check_option("agg", self.agg, losses.AGGREGATIONS)
        losses._check_option("token_weights", self.token_weights, TOKEN_WEIGHTS)
        if self.dist is not None:
            match = TERMS[self.kind].evaluate is _match
            losses._check_option("dist", self.dist, losses.MATCHES if match else losses.DISTANCES)
        if self.margin is not None and losses.margin_fraction(self.margin) and self.kind in ("margin_ranking", "contrastive"):
            raise ValueError(f"margin: a {self.kind} term needs a number, got {self.margin!r}")
        for role in (self.anchor, self.positive, self.reference, self.negative):
            if role is not None and not (role == "in_batch" and self.kind == "info_nce"):
                check_role(role)
        for role in (self.anchor, self.positive, self.reference):
            if role in NEGATIVE_ROLES:
                raise ValueError(f"anchor, positive, reference: expected pred, gt or src, got {role!r}")

    @property
    def label_roles(self) -> str:
        """The comparison in words, for tables: ``pred → gt, away from src``."""
        text = f"{self.anchor} → {self.positive}"
        return f"{text}, away from {self.negative}" if self.negative else text


@dataclass(frozen=True)
class TermReport:
    """What one term says about a batch.

    Attributes:
        term: the term.
        value: mean loss over the batch, unweighted, with its graph.
        per_sample: ``[B]`` unweighted losses.
        distances: label such as ``"d(pred, gt)"`` → ``[B]``, or ``[B, K]`` for K negatives of a pair.
        active: share of the batch where the hinge is open (above 0); None for terms without a hinge.
        toward_failure: ``[B]`` or None. Hinge terms: max_k 1 − d(anchor, negative_k) / d(positive, negative_k), at least 0:
            0 = no nearer to a negative than the target is, 1 = at the negative. Match terms: d(pred, gt) / d(src, gt):
            0 = at the target, 1 = as far off as the picture before the edit.
        token_map: ``[B, h, w]`` or None. Hinge terms: d₊ − d₋ per token to the nearest of several negatives (above 0:
            nearer to the negative than to the target); the others: the distance per token.
        token_weights: ``[B, h, w]`` or None: how much each token counted.
    """

    term: LossTerm
    value: Tensor
    per_sample: Tensor
    distances: Mapping[str, Tensor]
    active: Optional[float] = None
    toward_failure: Optional[Tensor] = None
    token_map: Optional[Tensor] = None
    token_weights: Optional[Tensor] = None

    @property
    def weighted(self) -> Tensor:
        """``value`` times the term's weight."""
        return self.value * self.term.weight


@dataclass(frozen=True)
class ObjectiveReport:
    """Total (with its graph) and the report of each term."""

    total: Tensor
    terms: tuple[TermReport, ...]

    def as_dict(self) -> dict:
        """Plain numbers and lists, for JSON."""
        return {
            "total": float(self.total.detach()),
            "terms": {
                t.term.name: {
                    "kind": t.term.kind,
                    "encoder": t.term.encoder,
                    "weight": t.term.weight,
                    "value": float(t.value.detach()),
                    "weighted": float(t.weighted.detach()),
                    "active": t.active,
                    "per_sample": t.per_sample.detach().tolist(),
                    "distances": {label: d.detach().tolist() for label, d in t.distances.items()},
                    "toward_failure": None if t.toward_failure is None else t.toward_failure.tolist(),
                }
                for t in self.terms
            },
        }

    def signal(self) -> list[Optional[str]]:
        """Per sample, the failure that the terms point to, or None.

        The negative that the output has gone furthest towards, if more than halfway; else ``"distorted"`` if it is more
        than half as far from the target as the picture before the edit. This reads the training signal itself; it is
        not an independent judge of the picture.
        """
        found: list[Optional[str]] = []
        for i in range(len(self.terms[0].per_sample)):
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
    """An ordered set of terms. Adding a term returns a new objective, the way LoRA stacks chain."""

    terms: tuple[LossTerm, ...] = field(default_factory=tuple)

    def with_term(self, term: LossTerm) -> "EditObjective":
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

    def evaluate(self, embeddings: EmbeddingSet, details: bool = False) -> ObjectiveReport:
        """Σ weight · term, with each distance that terms share computed once.

        Args:
            embeddings: must hold every role × encoder that a term names; ``pred`` may carry a graph.
            details: also compute ``toward_failure`` and the token maps for pictures, which training does not need.

        Raises:
            ValueError: no terms, a missing role or encoder, batches or token grids that do not fit.
        """
        if not self.terms:
            raise ValueError("objective: expected at least one term, got none")
        evaluation = _Evaluation(embeddings, details)
        evaluation.prefetch(self.terms)
        reports = tuple(TERMS[term.kind].evaluate(evaluation, term) for term in self.terms)
        return ObjectiveReport(sum(r.weighted for r in reports), reports)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: role names → distances, each computed once
# ---------------------------------------------------------------------------------------------------------------------


class _Evaluation:
    """The distances of one evaluation, keyed by (encoder, distance, anchor role, reference role, k)."""

    def __init__(self, embeddings: EmbeddingSet, details: bool):
        self.embeddings, self.details = embeddings, details
        self.batches: dict[str, int] = {}
        self.tokens: dict[tuple[str, str, str, str], list[Tensor]] = {}

    def roles(self, role: str, encoder: str) -> list[Tensor]:
        """A role's embeddings, K of them for negatives, each broadcast to the batch of the outputs."""
        tensor = self.embeddings.get(role, encoder)
        items = list(tensor.unbind(1)) if role in NEGATIVE_ROLES else [tensor]
        batch = self.batch(encoder)
        if len(items[0]) not in (1, batch):
            raise ValueError(f"{role}: expected 1 or {batch} samples like the largest role, got {len(items[0])}")
        device = self.embeddings.get("pred", encoder).device if ("pred", encoder) in self.embeddings.tensors else None
        return [item.to(device or item.device).expand(batch, *item.shape[1:]) for item in items]

    def batch(self, encoder: str) -> int:
        if encoder not in self.batches:
            self.batches[encoder] = max(len(t) for (_, name), t in self.embeddings.tensors.items() if name == encoder)
        return self.batches[encoder]

    def prefetch(self, terms: tuple[LossTerm, ...]) -> None:
        """One pass of the primitive per (encoder, distance, anchor), over every reference that any term needs."""
        wanted: dict[tuple[str, str, str], dict[str, None]] = {}
        for term in terms:
            for dist, anchor, reference in TERMS[term.kind].pairs(term):
                self.embeddings.get(anchor, term.encoder), self.embeddings.get(reference, term.encoder)
                wanted.setdefault((term.encoder, dist, anchor), {})[reference] = None
        for (encoder, dist, anchor), references in wanted.items():
            lists = {role: self.roles(role, encoder) for role in references}
            flat = [tensor for items in lists.values() for tensor in items]
            results = iter(losses.token_distances(self.roles(anchor, encoder)[0], flat, dist))
            for role, items in lists.items():
                self.tokens[encoder, dist, anchor, role] = [next(results) for _ in items]

    def token_distances(self, term: LossTerm, anchor: str, reference: str, dist: str | None = None) -> list[Tensor]:
        return self.tokens[term.encoder, dist or term.dist, anchor, reference]

    def distances(self, term: LossTerm, anchor: str, reference: str, dist: str | None = None) -> Tensor:
        """Aggregated: ``[B]``, or ``[B, K]`` for a role of several negatives."""
        weights = self.weights(term)
        parts = [losses.aggregate_tokens(d, term.agg, weights) for d in self.token_distances(term, anchor, reference, dist)]
        return torch.stack(parts, 1) if reference in NEGATIVE_ROLES else parts[0]

    def constant_distances(self, term: LossTerm, anchor: str, reference: str) -> Tensor:
        """As :meth:`distances`, without a graph, between roles that no term needs a gradient of."""
        key = (term.encoder, term.dist, anchor, reference)
        with torch.no_grad():
            if key not in self.tokens:
                self.tokens[key] = losses.token_distances(
                    self.roles(anchor, term.encoder)[0], self.roles(reference, term.encoder), term.dist
                )
            return self.distances(term, anchor, reference).detach()

    def weights(self, term: LossTerm) -> Optional[Tensor]:
        """Token weights of a term, shaped like its token distances; None when every token counts the same."""
        if term.encoder not in self.embeddings.grids or term.token_weights == "none":
            return None
        if term.token_weights == "difference":
            with torch.no_grad():
                gt, src = self.roles("gt", term.encoder)[0], self.roles("src", term.encoder)[0]
                return losses.token_distances(gt, [src], "cos")[0]
        weights = self.embeddings.token_weights(term.encoder)
        if weights is None:
            return None
        batch = self.batch(term.encoder)
        if len(weights) not in (1, batch):
            raise ValueError(f"mask: expected 1 or {batch} masks like the pictures, got {len(weights)}")
        device = self.embeddings.get(term.anchor, term.encoder).device
        return weights.to(device).expand(batch, *weights.shape[1:])

    def map(self, term: LossTerm, values: Optional[Tensor]) -> Optional[Tensor]:
        """Values per token as ``[B, h, w]``."""
        if not self.details or values is None or term.encoder not in self.embeddings.grids:
            return None
        return values.detach().reshape(len(values), *self.embeddings.grids[term.encoder])

    def report(self, term: LossTerm, per_sample: Tensor, token_map: Optional[Tensor] = None, **extra) -> TermReport:
        weights = self.weights(term) if self.details else None
        return TermReport(
            term,
            per_sample.mean(),
            per_sample,
            token_map=self.map(term, token_map),
            token_weights=self.map(term, weights),
            **extra,
        )


def _name(anchor: str, reference: str) -> str:
    return f"d({anchor}, {reference})"


def _match(e: _Evaluation, term: LossTerm) -> TermReport:
    d = e.distances(term, term.anchor, term.positive)
    distances = {_name(term.anchor, term.positive): d}
    toward = None
    if e.details and (term.anchor, term.positive) == ("pred", "gt") and ("src", term.encoder) in e.embeddings.tensors:
        edit = distances["d(src, gt)"] = e.constant_distances(term, "src", "gt")
        toward = d.detach() / edit.clamp_min(1e-12)
    token_map = e.token_distances(term, term.anchor, term.positive)[0]
    return e.report(term, d, token_map, distances=distances, toward_failure=toward)


def _ranking(e: _Evaluation, term: LossTerm) -> TermReport:
    compared = term.reference or term.anchor
    d_pos = e.distances(term, term.anchor, term.positive)
    d_neg = e.distances(term, compared, term.negative)
    distances = {_name(term.anchor, term.positive): d_pos, _name(compared, term.negative): d_neg}
    margin, fraction = term.margin, losses.margin_fraction(term.margin)
    reach = None
    if fraction is not None or (e.details and compared == term.anchor):
        reach = distances[_name(term.positive, term.negative)] = e.constant_distances(term, term.positive, term.negative)
    if fraction is not None:
        margin = fraction * reach
    per_sample = losses.margin_ranking_on_distances(
        d_pos, d_neg, margin, "none", smooth=term.smooth, neg_agg=term.neg_agg or "mean"
    )
    with torch.no_grad():
        columns = d_neg.detach().reshape(len(d_pos), -1)
        width = margin.reshape(len(d_pos), -1) if isinstance(margin, Tensor) else margin
        active = float((d_pos.detach().unsqueeze(1) - columns + width > 0).any(1).float().mean())
        toward = token_map = None
        if e.details and compared == term.anchor:
            toward = (1.0 - columns / reach.reshape(len(d_pos), -1).clamp_min(1e-12)).amax(1).clamp_min(0.0)
        if e.details:
            negatives = torch.stack(e.token_distances(term, compared, term.negative), 1)
            nearest = negatives[torch.arange(len(columns), device=columns.device), columns.argmin(1)]
            token_map = e.token_distances(term, term.anchor, term.positive)[0] - nearest
    return e.report(term, per_sample, token_map, distances=distances, active=active, toward_failure=toward)


def _contrastive(e: _Evaluation, term: LossTerm) -> TermReport:
    kind = "euclidean" if term.dist == "l2" else "cos"
    d = e.distances(term, term.anchor, term.positive, kind)
    label = torch.full((len(d),), term.label, device=d.device)
    per_sample = losses.contrastive_on_distances(d, label, term.margin, "none")
    active = float((d > 0 if term.label else d < term.margin).float().mean())
    token_map = e.token_distances(term, term.anchor, term.positive, kind)[0]
    return e.report(term, per_sample, token_map, distances={_name(term.anchor, term.positive): d}, active=active)


def _info_nce(e: _Evaluation, term: LossTerm) -> TermReport:
    d_pos = e.distances(term, term.anchor, term.positive, "cos")
    distances = {_name(term.anchor, term.positive): d_pos}
    token_map = e.token_distances(term, term.anchor, term.positive, "cos")[0]
    if term.negative == "in_batch":
        anchor, positive = (e.roles(role, term.encoder)[0] for role in (term.anchor, term.positive))
        per_sample = losses.info_nce_loss(
            anchor, positive, None, term.temperature, term.agg, "none", e.weights(term)
        )
    else:
        d_neg = distances[_name(term.anchor, term.negative)] = e.distances(term, term.anchor, term.negative, "cos")
        per_sample = losses.info_nce_on_distances(d_pos, d_neg, term.temperature, "none")
        token_map = token_map - torch.stack(e.token_distances(term, term.anchor, term.negative, "cos")).mean(0)
    return e.report(term, per_sample, token_map, distances=distances)


# ---------------------------------------------------------------------------------------------------------------------
# The table of terms
# ---------------------------------------------------------------------------------------------------------------------


def _ranking_pairs(term: LossTerm) -> list[tuple[str, str, str]]:
    return [(term.dist, term.anchor, term.positive), (term.dist, term.reference or term.anchor, term.negative)]


def _single_pair(term: LossTerm) -> list[tuple[str, str, str]]:
    dist = "euclidean" if term.kind == "contrastive" and term.dist == "l2" else term.dist
    return [(dist, term.anchor, term.positive)]


def _info_nce_pairs(term: LossTerm) -> list[tuple[str, str, str]]:
    references = [term.positive] + ([] if term.negative == "in_batch" else [term.negative])
    return [("cos", term.anchor, reference) for reference in references]


@dataclass(frozen=True)
class TermKind:
    """A row of the table: the public loss, its settings with defaults, and how it is evaluated.

    Attributes:
        loss: the public function that the term equals.
        defaults: field of :class:`LossTerm` → default; other optional fields do not exist for this kind.
        pairs: the distances that it needs, as (dist, anchor role, reference role).
        evaluate: makes the report.
        failure: the failure of an edit model that it answers, if one.
    """

    loss: Callable
    defaults: Mapping[str, object]
    pairs: Callable[[LossTerm], list[tuple[str, str, str]]]
    evaluate: Callable[[_Evaluation, LossTerm], TermReport]
    failure: Optional[str] = None


_MATCH = {"anchor": "pred", "positive": "gt"}
_HINGE = {**_MATCH, "dist": "cos", "margin": 0.2, "smooth": 0.0}

TERMS: dict[str, TermKind] = {
    "no_edit_identity": TermKind(
        losses.loss_no_edit_identity, {**_HINGE, "negative": "src"}, _ranking_pairs, _ranking, "no edit"
    ),
    "geometry_match": TermKind(
        losses.loss_geometry_match, {**_MATCH, "dist": "l2"}, _single_pair, _match, "distorted"
    ),
    "overlay_avoidance": TermKind(
        losses.loss_overlay_avoidance,
        {**_HINGE, "negative": "overlay", "neg_agg": "mean"},
        _ranking_pairs,
        _ranking,
        "overlay",
    ),
    "pair_distance": TermKind(losses.pair_distance, {**_MATCH, "dist": "cos"}, _single_pair, _match),
    "feature_match": TermKind(losses.feature_match_loss, {**_MATCH, "dist": "l2"}, _single_pair, _match),
    "contrastive": TermKind(
        losses.contrastive_pair_loss, {**_MATCH, "dist": "l2", "margin": 1.0, "label": 1}, _single_pair, _contrastive
    ),
    "triplet": TermKind(losses.triplet_margin_loss, {**_HINGE, "negative": "src"}, _ranking_pairs, _ranking),
    "margin_ranking": TermKind(
        losses.margin_ranking_on_distances,
        {**_HINGE, "reference": "src", "negative": "gt"},
        _ranking_pairs,
        _ranking,
    ),
    "multi_negative": TermKind(
        losses.multi_negative_ranking_loss,
        {**_HINGE, "negative": "hard_negative", "neg_agg": "mean"},
        _ranking_pairs,
        _ranking,
    ),
    "info_nce": TermKind(
        losses.info_nce_loss,
        {**_MATCH, "negative": "in_batch", "temperature": 0.07},
        _info_nce_pairs,
        _info_nce,
    ),
}


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


PRESETS: dict[str, Callable[..., EditObjective]] = {"recommended": recommended}
