"""What a term says about a batch, from the table of distances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Mapping, Optional, Union

import torch
from torch import Tensor

from .. import losses
from ..encoders.base import WHOLE, Region
from .distances import DistanceTable
from .families import Contrastive, InfoNCE, Match, Ranking
from .terms import LossTerm


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


def evaluate(table: DistanceTable, term: LossTerm) -> TermReport:
    """The report of one of the terms that the table was made for."""
    s = term.settings
    if isinstance(s, Match):
        return _match(table, term, s)
    if isinstance(s, Ranking):
        return _ranking(table, term, s)
    if isinstance(s, Contrastive):
        return _contrastive(table, term, s)
    return _info_nce(table, term, s)


def _report(
    table: DistanceTable,
    term: LossTerm,
    per_sample: Tensor,
    token_map: Tensor,
    distances: Mapping[str, Tensor],
    meaning: str,
    open: Optional[Tensor] = None,
    toward: Optional[Tensor] = None,
) -> TermReport:
    return TermReport(
        term, per_sample.mean(), per_sample, distances, open, toward,
        token_map=table.map(term, token_map),
        token_weights=table.map(term, table.weights(term)) if table.details else None,
        region=table.embeddings.regions.get(term.encoder, WHOLE),
        map_meaning=meaning,
    )  # fmt: skip


def _name(anchor: str, reference: str) -> str:
    return f"d({anchor}, {reference})"


def _fraction_of(d: Tensor, whole: Tensor) -> Tensor:
    """d / whole, and 0 where the whole is nothing; NaN stays NaN."""
    return torch.where(whole <= 1e-6, torch.zeros_like(d), d / whole.clamp_min(1e-6)).detach()


def _as_open(condition: Tensor, per_sample: Tensor) -> Tensor:
    """A condition as 0 and 1; NaN where the losses that it speaks about are."""
    return condition.detach().to(per_sample.dtype) + 0.0 * per_sample.detach()


def _match(table: DistanceTable, term: LossTerm, s: Match) -> TermReport:
    d = table.per_sample(term, s.dist, s.anchor, s.positive)
    distances, toward = {_name(s.anchor, s.positive): d}, None
    seen = table.details and (s.anchor, s.positive) == ("pred", "gt")
    if seen and table.per_token(term.encoder, s.dist, "gt", "src"):
        edit = distances["d(src, gt)"] = table.per_sample(term, s.dist, "gt", "src").detach()
        toward = _fraction_of(d, edit)
    token_map = table.per_token(term.encoder, s.dist, s.anchor, s.positive)[0]
    meaning = f"red: {s.anchor} far from {s.positive}"
    return _report(table, term, d, token_map, distances, meaning, toward=toward)


def _ranking(table: DistanceTable, term: LossTerm, s: Ranking) -> TermReport:
    d_pos = table.per_sample(term, s.dist, s.anchor, s.positive)
    d_neg = table.per_sample(term, s.dist, s.compared, s.negative)
    distances = {_name(s.anchor, s.positive): d_pos, _name(s.compared, s.negative): d_neg}
    reach = None
    if s.compared == s.anchor and (s.fraction is not None or table.details):
        reach = table.per_sample(term, s.dist, s.positive, s.negative).detach()
        distances[_name(s.positive, s.negative)] = reach
    margin: Union[float, Tensor] = (
        s.fraction * reach if s.fraction is not None and reach is not None else float(s.margin)
    )
    per_sample = losses.margin_ranking_on_distances(d_pos, d_neg, margin, "none", smooth=s.smooth, neg_agg=s.neg_agg)
    columns = d_neg.detach().reshape(len(d_pos), -1)
    width = margin.reshape(len(d_pos), -1) if isinstance(margin, Tensor) else margin
    is_open = _as_open((d_pos.detach().unsqueeze(1) - columns + width > 0).any(1), per_sample)
    toward = None
    if table.details and reach is not None:
        reach = reach.reshape(len(d_pos), -1)
        gone = torch.where(reach <= 1e-6, torch.zeros_like(reach), 1.0 - _fraction_of(columns, reach))
        toward = gone.amax(1).clamp_min(0.0)
    meaning = f"red: nearer to {s.negative} than to {s.positive}; blue: nearer to {s.positive}"
    if s.compared != s.anchor:
        first, second = distances
        meaning = f"red: {first} above {second}; blue: below"
    token_map = _difference_map(table, term, s.dist, s.anchor, s.positive, s.compared, s.negative, columns)
    return _report(table, term, per_sample, token_map, distances, meaning, is_open, toward)


def _difference_map(
    table: DistanceTable, term: LossTerm, dist: str, anchor: str, positive: str, compared: str, negative: str, d_neg: Tensor
) -> Tensor:  # fmt: skip
    """d₊ − d₋ per token, with the negative that is nearest to each sample as a whole."""
    negatives = torch.stack(table.per_token(term.encoder, dist, compared, negative), 1)
    nearest = negatives[torch.arange(len(d_neg), device=d_neg.device), d_neg.argmin(1)]
    return table.per_token(term.encoder, dist, anchor, positive)[0] - nearest


def _contrastive(table: DistanceTable, term: LossTerm, s: Contrastive) -> TermReport:
    d = table.per_sample(term, s.measured, s.anchor, s.positive)
    per_sample = losses.contrastive_on_distances(d, float(s.label), s.width, "none")
    token_map = table.per_token(term.encoder, s.measured, s.anchor, s.positive)[0]
    meaning = f"red: {s.anchor} far from {s.positive}"
    if s.label:
        condition = d > 0
    else:
        condition, token_map = d < s.width, (s.width - token_map).clamp_min(0.0)
        meaning = f"red: {s.anchor} near {s.positive}, inside the margin"
    distances = {_name(s.anchor, s.positive): d}
    return _report(table, term, per_sample, token_map, distances, meaning, _as_open(condition, per_sample))


def _info_nce(table: DistanceTable, term: LossTerm, s: InfoNCE) -> TermReport:
    d_pos = table.per_sample(term, "cos", s.anchor, s.positive)
    distances = {_name(s.anchor, s.positive): d_pos}
    if s.in_batch:
        anchor, positive = (table.roles(role, term.encoder)[0] for role in (s.anchor, s.positive))
        weights = table.weights(term)
        per_sample = losses.info_nce_loss(anchor, positive, None, s.temperature, term.agg, "none", weights)
        token_map = table.per_token(term.encoder, "cos", s.anchor, s.positive)[0]
        meaning = f"red: {s.anchor} far from {s.positive}"
    else:
        d_neg = distances[_name(s.anchor, s.negative)] = table.per_sample(term, "cos", s.anchor, s.negative)
        per_sample = losses.info_nce_on_distances(d_pos, d_neg, s.temperature, "none")
        columns = d_neg.detach().reshape(len(d_pos), -1)
        token_map = _difference_map(table, term, "cos", s.anchor, s.positive, s.anchor, s.negative, columns)
        meaning = f"red: nearer to {s.negative} than to {s.positive}; blue: nearer to {s.positive}"
    return _report(table, term, per_sample, token_map, distances, meaning)
