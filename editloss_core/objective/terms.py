"""The kinds of terms: which distances each is made of, and what it says about a batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Callable, Iterable, Mapping, Optional, Sequence

import torch
from torch import Tensor

from .. import losses
from ..checks import check_number, check_option
from ..embeddings import NEGATIVE_ROLES, ROLES, EmbeddingSet
from ..encoders.base import WHOLE, Region

TOKEN_WEIGHTS = ("mask", "difference", "none")
NOT_A_NUMBER = "not a number"
NO_FAILURE = "no failure"  # what a signal says that points to none


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
        t_min, t_max: the noise levels at which a trainer counts the term, both ends included.
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
    t_min: float = 0.0
    t_max: float = 1.0

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
        self._check()

    def _check(self) -> None:
        """Everything that the public loss would refuse, under this term's own names and before any work."""
        if not isinstance(self.encoder, str) or not self.encoder:
            raise ValueError(f"encoder: expected the name of an encoder, got {self.encoder!r}")
        check_number("weight", self.weight, 0.0)
        check_option("agg", self.agg, losses.AGGREGATIONS)
        check_option("token_weights", self.token_weights, TOKEN_WEIGHTS)
        for name in ("t_min", "t_max"):
            check_number(name, getattr(self, name), 0.0)
        if not self.t_min <= self.t_max <= 1.0:
            raise ValueError(f"t_min: expected 0 ≤ t_min ≤ t_max ≤ 1, got t_min {self.t_min:g}, t_max {self.t_max:g}")
        if self.dist is not None:
            l1_too = self.kind in ("geometry_match", "feature_match")
            check_option("dist", self.dist, losses.MATCHES if l1_too else losses.DISTANCES)
        if (
            self.margin is not None
            and losses.margin_fraction(self.margin)
            and self.kind in ("margin_ranking", "contrastive")
        ):
            raise ValueError(f"margin: a {self.kind} term needs a number, got {self.margin!r}")
        if self.smooth is not None:
            check_number("smooth", self.smooth, 0.0)
        if self.neg_agg is not None:
            check_option("neg_agg", self.neg_agg, losses.AGGREGATIONS)
        if self.temperature is not None:
            check_number("temperature", self.temperature, 0.0, open_low=True)
        if self.label not in (None, 0, 1):
            raise ValueError(f"label: expected 1 (same) or 0 (different), got {self.label!r}")
        pictures = tuple(role for role in ROLES if role not in NEGATIVE_ROLES)
        negatives = (*ROLES, "in_batch") if self.kind == "info_nce" else ROLES
        for name, options in (
            ("anchor", pictures),
            ("positive", pictures),
            ("reference", pictures),
            ("negative", negatives),
        ):
            if getattr(self, name) is not None:
                check_option(name, getattr(self, name), options)

    @property
    def across_batch(self) -> bool:
        """Whether a sample's loss depends on the other samples of the batch."""
        return self.negative == "in_batch"

    def gate(self, t: Tensor) -> Tensor:
        """Which samples of noise levels ``t`` ``[B]`` the term counts, as booleans ``[B]``."""
        return (t >= self.t_min) & (t <= self.t_max)

    def describe(self) -> str:
        """The term in one line, with its margin or temperature and what differs from the defaults of its kind.

        >>> LossTerm("triplet", "dino", weight=0.5, negative="overlay", t_max=0.8).describe()
        '0.5 × triplet (negative overlay, margin 0.2, t 0…0.8)'
        """
        usual = {f.name: f.default for f in fields(self)[4:]} | TERMS[self.kind].defaults
        always = {"margin", "temperature"} & TERMS[self.kind].defaults.keys()
        notes = []
        for name in usual:
            value = getattr(self, name)
            if name not in ("t_min", "t_max") and (name in always or value != usual[name]):
                notes.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        if (self.t_min, self.t_max) != (0.0, 1.0):
            notes.append(f"t {self.t_min:g}…{self.t_max:g}")
        line = f"{self.weight:g} × {self.name}"
        return f"{line} ({', '.join(notes)})" if notes else line


@dataclass(frozen=True)
class TermReport:
    """What one term says about a batch.

    Attributes:
        term: the term.
        value: mean loss over the samples that count, unweighted, with its graph; 0 if none counts.
        per_sample: ``[B]`` unweighted losses.
        distances: label such as ``"d(pred, gt)"`` → ``[B]``, or ``[B, K]`` for K negatives of a pair.
        open: ``[B]``: 1 where the hinge is open (above 0), 0 where it is not, NaN where the loss is; a tensor without a
            graph, so that reading it is what waits for a GPU; None for terms without a hinge.
        toward_failure: ``[B]`` or None. Hinge terms: max_k 1 − d(anchor, negative_k) / d(positive, negative_k), at least 0:
            0 = no nearer to a negative than the target is, 1 = at the negative. Match terms: d(pred, gt) / d(src, gt):
            0 = at the target, 1 = as far off as the picture before the edit.
        token_map: ``[B, h, w]`` or None. Hinge terms: d₊ − d₋ per token to the nearest of several negatives (above 0:
            nearer to the negative than to the target); the others: the distance per token.
        token_weights: ``[B, h, w]`` or None: how much each token counted.
        region: the part of the pictures that the map covers: top, left, bottom, right as fractions.
        map_meaning: what a high (red) and a low (blue) value of the map say, in words.
        sample_weights: ``[B]`` factors of the samples in the total, 0 outside the term's gate; None when all count alike.
    """

    term: LossTerm
    value: Tensor
    per_sample: Tensor
    distances: Mapping[str, Tensor]
    open: Optional[Tensor] = None
    toward_failure: Optional[Tensor] = None
    token_map: Optional[Tensor] = None
    token_weights: Optional[Tensor] = None
    region: Region = WHOLE
    map_meaning: str = ""
    sample_weights: Optional[Tensor] = None

    @property
    def active(self) -> Optional[Tensor]:
        """Share of the samples that count whose hinge is open; None for terms without a hinge."""
        if self.open is None or self.sample_weights is None:
            return None if self.open is None else self.open.mean()
        return self.open[self.sample_weights > 0].mean()

    @property
    def weighted(self) -> Tensor:
        """What the term adds to the total: its weight times the mean over the batch of sample weight · loss."""
        if self.sample_weights is None and self.term.weight:
            return self.value * self.term.weight
        return self.weighted_per_sample.mean()

    @property
    def weighted_per_sample(self) -> Tensor:
        """``[B]``; their mean is :attr:`weighted`. What is outside the gate or of weight 0 adds nothing, not even NaN."""
        if not self.term.weight:
            return torch.zeros_like(self.per_sample)
        if self.sample_weights is None:
            return self.per_sample * self.term.weight
        counted = torch.where(self.sample_weights > 0, self.per_sample, torch.zeros_like(self.per_sample))
        return counted * self.sample_weights * self.term.weight

    def counting(self, weights: Optional[Tensor]) -> TermReport:
        """This report with the samples weighted: ``[B]``, 0 where they do not count; None leaves it as it is."""
        if weights is None:
            return self
        weights = weights.to(self.per_sample).expand_as(self.per_sample)
        inside = self.per_sample[weights > 0]
        value = inside.mean() if len(inside) else torch.zeros_like(self.value)
        return replace(self, value=value, sample_weights=weights)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: role names → distances, each computed once
# ---------------------------------------------------------------------------------------------------------------------


class Evaluation:
    """The token distances of one evaluation, keyed by encoder, distance and the two roles in the order of ROLES."""

    def __init__(self, terms: Sequence[LossTerm], embeddings: EmbeddingSet, details: bool):
        self.embeddings, self.details = embeddings, details
        self.batch = 1
        self.tokens: dict[tuple[str, str, str, str], list[Tensor]] = {}
        self._weights: dict[tuple[str, str], Optional[Tensor]] = {}
        self._prefetch(terms)

    def roles(self, role: str, encoder: str) -> list[Tensor]:
        """A role's embeddings, K of them for negatives, each broadcast to the batch and on the device of the outputs."""
        tensor = self.embeddings.get(role, encoder)
        items = list(tensor.unbind(1)) if role in NEGATIVE_ROLES else [tensor]
        if len(tensor) not in (1, self.batch):
            raise ValueError(f"{role}: expected 1 or {self.batch} samples like the largest role, got {len(tensor)}")
        device = self.embeddings.tensors.get(("pred", encoder), tensor).device
        return [item.to(device).expand(self.batch, *item.shape[1:]) for item in items]

    def _prefetch(self, terms: Sequence[LossTerm]) -> None:
        """One pass of the primitive per (encoder, distance, anchor), over every reference that any term needs.

        Distances that are constants for the gradient (automatic margins, weights, what pictures show) come last and
        without a graph, unless a term has them as its own.
        """
        own: dict[tuple, None] = {}
        constant: dict[tuple, None] = {}
        for term in terms:
            kind = TERMS[term.kind]
            needed = kind.constants(term, False)
            if term.token_weights == "difference" and term.encoder in self.embeddings.grids:
                needed.append(("cos", "gt", "src"))
            if self.details:  # but a picture must not make a role necessary
                there = {role for role, encoder in self.embeddings.tensors if encoder == term.encoder}
                needed += [pair for pair in kind.constants(term, True) if there.issuperset(pair[1:])]
            for pairs, group in ((kind.pairs(term), own), (needed, constant)):
                for dist, *roles in pairs:
                    for role in roles:
                        self.embeddings.get(role, term.encoder)
                    group[(term.encoder, dist, *sorted(roles, key=ROLES.index))] = None
        # The outputs make the batch, whether or not a term reads them; a role that no term reads does not.
        used = {(role, encoder) for encoder, _, *roles in (*own, *constant) for role in ("pred", *roles)}
        self.batch = max(len(t) for key, t in self.embeddings.tensors.items() if key in used)
        self._compute(own)
        with torch.no_grad():
            self._compute(key for key in constant if key not in own)

    def _compute(self, keys: Iterable[tuple[str, str, str, str]]) -> None:
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for *group, reference in keys:
            grouped.setdefault(tuple(group), []).append(reference)
        for (encoder, dist, anchor), references in grouped.items():
            lists = [self.roles(role, encoder) for role in references]
            flat = [tensor for items in lists for tensor in items]
            results = iter(losses.token_distances(self.roles(anchor, encoder)[0], flat, dist))
            for role, items in zip(references, lists):
                self.tokens[encoder, dist, anchor, role] = [next(results) for _ in items]

    def token_distances(self, term: LossTerm, a: str, b: str, dist: Optional[str] = None) -> list[Tensor]:
        anchor, reference = sorted((a, b), key=ROLES.index)
        return self.tokens.get((term.encoder, dist or term.dist, anchor, reference), [])

    def distances(self, term: LossTerm, a: str, b: str, dist: Optional[str] = None) -> Tensor:
        """Aggregated: ``[B]``, or ``[B, K]`` for a role of several negatives."""
        weights = self.weights(term)
        parts = [losses.aggregate_tokens(d, term.agg, weights) for d in self.token_distances(term, a, b, dist)]
        return torch.stack(parts, 1) if {a, b} & set(NEGATIVE_ROLES) else parts[0]

    def weights(self, term: LossTerm) -> Optional[Tensor]:
        """Token weights of a term, shaped like its token distances; None when every token counts the same."""
        key = (term.encoder, term.token_weights)
        if key not in self._weights:
            self._weights[key] = self._make_weights(term)
        return self._weights[key]

    def _make_weights(self, term: LossTerm) -> Optional[Tensor]:
        if term.encoder not in self.embeddings.grids or term.token_weights == "none":
            return None
        if term.token_weights == "difference":
            return self.token_distances(term, "gt", "src", "cos")[0].detach()
        weights = self.embeddings.token_weights(term.encoder)
        if weights is None:
            return None
        if len(weights) not in (1, self.batch):
            raise ValueError(f"mask: expected 1 or {self.batch} masks like the pictures, got {len(weights)}")
        unseen = [i for i, w in enumerate(weights) if w.max() == 0]
        if unseen:
            raise ValueError(
                f"mask: the edit region of sample {unseen[0]} lies outside what {term.encoder!r} sees of the picture; turn "
                "its crop off"
            )
        device = self.embeddings.get(term.anchor, term.encoder).device
        return weights.to(device).expand(self.batch, *weights.shape[1:])

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
            region=self.embeddings.regions.get(term.encoder, WHOLE),
            **extra,
        )


def _name(anchor: str, reference: str) -> str:
    return f"d({anchor}, {reference})"


def _share(d: Tensor, whole: Tensor) -> Tensor:
    """d / whole, and 0 where the whole is nothing; NaN stays NaN."""
    return torch.where(whole <= 1e-6, torch.zeros_like(d), d / whole.clamp_min(1e-6)).detach()


def _as_open(condition: Tensor, per_sample: Tensor) -> Tensor:
    """A condition as 0 and 1; NaN where the losses that it speaks about are."""
    return condition.detach().to(per_sample.dtype) + 0.0 * per_sample.detach()


def _match(e: Evaluation, term: LossTerm) -> TermReport:
    d = e.distances(term, term.anchor, term.positive)
    distances = {_name(term.anchor, term.positive): d}
    toward = None
    if e.details and (term.anchor, term.positive) == ("pred", "gt") and e.token_distances(term, "gt", "src"):
        edit = distances["d(src, gt)"] = e.distances(term, "gt", "src").detach()
        toward = _share(d, edit)
    return e.report(
        term, d, e.token_distances(term, term.anchor, term.positive)[0], distances=distances, toward_failure=toward,
        map_meaning=f"red: {term.anchor} far from {term.positive}",
    )  # fmt: skip


def _ranking(e: Evaluation, term: LossTerm) -> TermReport:
    compared = term.reference or term.anchor
    d_pos = e.distances(term, term.anchor, term.positive)
    d_neg = e.distances(term, compared, term.negative)
    distances = {_name(term.anchor, term.positive): d_pos, _name(compared, term.negative): d_neg}
    margin, fraction, reach = term.margin, losses.margin_fraction(term.margin), None
    if compared == term.anchor and (fraction is not None or e.details):
        reach = distances[_name(term.positive, term.negative)] = e.distances(
            term, term.positive, term.negative
        ).detach()
    if fraction is not None:
        margin = fraction * reach
    per_sample = losses.margin_ranking_on_distances(
        d_pos, d_neg, margin, "none", smooth=term.smooth, neg_agg=term.neg_agg or "mean"
    )
    columns = d_neg.detach().reshape(len(d_pos), -1)
    width = margin.reshape(len(d_pos), -1) if isinstance(margin, Tensor) else margin
    is_open = _as_open((d_pos.detach().unsqueeze(1) - columns + width > 0).any(1), per_sample)
    toward = None
    if e.details and reach is not None:
        reach = reach.reshape(len(d_pos), -1)
        toward = (
            torch.where(reach <= 1e-6, torch.zeros_like(reach), 1.0 - _share(columns, reach)).amax(1).clamp_min(0.0)
        )
    meaning = f"red: nearer to {term.negative} than to {term.positive}; blue: nearer to {term.positive}"
    if compared != term.anchor:
        first, second = distances
        meaning = f"red: {first} above {second}; blue: below"
    return e.report(
        term, per_sample, _difference_map(e, term, compared, columns), distances=distances, open=is_open,
        toward_failure=toward, map_meaning=meaning,
    )  # fmt: skip


def _difference_map(e: Evaluation, term: LossTerm, compared: str, d_neg: Tensor, dist: Optional[str] = None) -> Tensor:
    """d₊ − d₋ per token, with the negative that is nearest to each sample as a whole."""
    negatives = torch.stack(e.token_distances(term, compared, term.negative, dist), 1)
    nearest = negatives[torch.arange(len(d_neg), device=d_neg.device), d_neg.argmin(1)]
    return e.token_distances(term, term.anchor, term.positive, dist)[0] - nearest


def _contrastive(e: Evaluation, term: LossTerm) -> TermReport:
    kind = _contrastive_dist(term)
    d = e.distances(term, term.anchor, term.positive, kind)
    per_sample = losses.contrastive_on_distances(d, term.label, term.margin, "none")
    token_map = e.token_distances(term, term.anchor, term.positive, kind)[0]
    meaning = f"red: {term.anchor} far from {term.positive}"
    if term.label:
        condition = d > 0
    else:
        condition, token_map = d < term.margin, (term.margin - token_map).clamp_min(0.0)
        meaning = f"red: {term.anchor} near {term.positive}, inside the margin"
    return e.report(
        term, per_sample, token_map, distances={_name(term.anchor, term.positive): d},
        open=_as_open(condition, per_sample), map_meaning=meaning,
    )  # fmt: skip


def _info_nce(e: Evaluation, term: LossTerm) -> TermReport:
    d_pos = e.distances(term, term.anchor, term.positive, "cos")
    distances = {_name(term.anchor, term.positive): d_pos}
    if term.negative == "in_batch":
        anchor, positive = (e.roles(role, term.encoder)[0] for role in (term.anchor, term.positive))
        per_sample = losses.info_nce_loss(anchor, positive, None, term.temperature, term.agg, "none", e.weights(term))
        token_map = e.token_distances(term, term.anchor, term.positive, "cos")[0]
        meaning = f"red: {term.anchor} far from {term.positive}"
    else:
        d_neg = distances[_name(term.anchor, term.negative)] = e.distances(term, term.anchor, term.negative, "cos")
        per_sample = losses.info_nce_on_distances(d_pos, d_neg, term.temperature, "none")
        token_map = _difference_map(e, term, term.anchor, d_neg.detach().reshape(len(d_pos), -1), "cos")
        meaning = f"red: nearer to {term.negative} than to {term.positive}; blue: nearer to {term.positive}"
    return e.report(term, per_sample, token_map, distances=distances, map_meaning=meaning)


# ---------------------------------------------------------------------------------------------------------------------
# The table of terms
# ---------------------------------------------------------------------------------------------------------------------


Pairs = list[tuple[str, str, str]]  # (dist, role, role)


def _ranking_pairs(term: LossTerm) -> Pairs:
    return [(term.dist, term.anchor, term.positive), (term.dist, term.reference or term.anchor, term.negative)]


def _ranking_constants(term: LossTerm, details: bool) -> Pairs:
    if losses.margin_fraction(term.margin) is not None or (details and term.reference in (None, term.anchor)):
        return [(term.dist, term.positive, term.negative)]
    return []


def _match_pairs(term: LossTerm) -> Pairs:
    return [(term.dist, term.anchor, term.positive)]


def _match_constants(term: LossTerm, details: bool) -> Pairs:
    return [(term.dist, "gt", "src")] if details and (term.anchor, term.positive) == ("pred", "gt") else []


def _contrastive_dist(term: LossTerm) -> str:
    return "euclidean" if term.dist == "l2" else "cos"


def _contrastive_pairs(term: LossTerm) -> Pairs:
    return [(_contrastive_dist(term), term.anchor, term.positive)]


def _info_nce_pairs(term: LossTerm) -> Pairs:
    references = [term.positive] + ([] if term.negative == "in_batch" else [term.negative])
    return [("cos", term.anchor, reference) for reference in references]


def _no_constants(term: LossTerm, details: bool) -> Pairs:
    return []


@dataclass(frozen=True)
class TermKind:
    """A row of the table: the public loss, its settings with defaults, and how it is evaluated.

    Attributes:
        loss: the public function that the term equals.
        defaults: field of :class:`LossTerm` → default; other optional fields do not exist for this kind.
        evaluate: makes the report.
        pairs: the distances that the loss is made of.
        constants: those that are constants for its gradient; with details, also those that only pictures need.
        failure: the failure of an edit model that it answers, if one.
    """

    loss: Callable
    defaults: Mapping[str, object]
    evaluate: Callable[[Evaluation, LossTerm], TermReport]
    pairs: Callable[[LossTerm], Pairs]
    constants: Callable[[LossTerm, bool], Pairs] = _no_constants
    failure: Optional[str] = None


_MATCH = {"anchor": "pred", "positive": "gt"}


def _hinge(negative: str, **roles: str) -> dict:
    """Defaults of a hinge term, in the order in which a person fills them: roles first."""
    return {**_MATCH, **roles, "negative": negative, "dist": "cos", "margin": 0.2, "smooth": 0.0}


_RANKING = (_ranking, _ranking_pairs, _ranking_constants)
_MATCHING = (_match, _match_pairs, _match_constants)

TERMS: dict[str, TermKind] = {
    "no_edit_identity": TermKind(losses.loss_no_edit_identity, _hinge("src"), *_RANKING, "no edit"),
    "geometry_match": TermKind(losses.loss_geometry_match, {**_MATCH, "dist": "l2"}, *_MATCHING, "distorted"),
    "overlay_avoidance": TermKind(
        losses.loss_overlay_avoidance, {**_hinge("overlay"), "neg_agg": "mean"}, *_RANKING, "overlay"
    ),
    "pair_distance": TermKind(losses.pair_distance, {**_MATCH, "dist": "cos"}, *_MATCHING),
    "feature_match": TermKind(losses.feature_match_loss, {**_MATCH, "dist": "l2"}, *_MATCHING),
    "contrastive": TermKind(
        losses.contrastive_pair_loss,
        {**_MATCH, "dist": "l2", "margin": 1.0, "label": 1},
        _contrastive,
        _contrastive_pairs,
    ),
    "triplet": TermKind(losses.triplet_margin_loss, _hinge("src"), *_RANKING),
    "margin_ranking": TermKind(
        losses.margin_ranking_on_distances,
        {**_hinge("gt", reference="src"), "neg_agg": "mean"},
        *_RANKING,
    ),
    "multi_negative": TermKind(
        losses.multi_negative_ranking_loss, {**_hinge("hard_negative"), "neg_agg": "mean"}, *_RANKING
    ),
    "info_nce": TermKind(
        losses.info_nce_loss, {**_MATCH, "negative": "in_batch", "temperature": 0.07}, _info_nce, _info_nce_pairs
    ),
}
