"""How much each pair teaches, from what the losses say of its own after picture.

A hinge asks the output to be nearer to the after picture than to a negative: the before picture, or an overlay. What a pair
can teach of that is the distance between its after picture and the negative, its *reach*. A pair in which nothing was edited
has none, and one whose after picture is an overlay has little, though its target is what flow matching is drawn to. With
d_i the reach of pair i for a term (the mean over several negatives), and m its median over the set,

    r_i = d_i / m,   w_i = min over the terms of clamp((r_i − 0.6) / 0.15, 0, 1)

is the pair's weight in every loss, divided by the mean of those above 0; pairs of weight 0 are in no batch. In a set of one
target right pairs are alike: in the demo r is 0.78 to 1.2 for right pairs, 0.45 to 0.57 for overlaid ones and 0 for unedited
ones (no-edit identity, VAE latents, three seeds). In a set of many kinds of edits small ones are not wrong; there it is not to
be used.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from ..objective import EditObjective, LossTerm
from ..objective.families import Ranking
from .prepare import Prepared

PAIR_WEIGHTS = ("alike", "reach")
NOTHING, ALL = 0.6, 0.75  # r up to which a pair teaches nothing, and from which it teaches as much as any


def hinges(terms: Sequence[LossTerm]) -> list[LossTerm]:
    """The terms that have a reach: hinges of pred between gt and src or overlay."""
    found = []
    for term in terms:
        s = term.settings
        if isinstance(s, Ranking) and s.compared == "pred" and s.positive == "gt" and s.negative in ("src", "overlay"):
            found.append(term)
    return found


def check_pair_weights(terms: Sequence[LossTerm]) -> None:
    """ValueError if no term has a reach."""
    if not hinges(terms):
        raise ValueError(
            "pair_weights: reach needs a loss between gt and src or overlay, such as No-Edit Identity or Overlay Avoidance; "
            f"got {', '.join(term.name for term in terms) or 'no objective'}"
        )


@torch.no_grad()
def reach(terms: Sequence[LossTerm], prepared: Prepared) -> Tensor:
    """r of each pair for each term of :func:`hinges`, ``[pairs, terms]``; variants of a pair have the median of theirs."""
    objective = EditObjective(tuple(hinges(terms)))
    found = torch.zeros(len(prepared), len(objective.terms))
    for i in range(len(prepared)):
        embeddings = prepared.embeddings([i], objective.encoders)
        for name in objective.encoders:
            embeddings = embeddings.with_embedding("pred", prepared.encoders[name], embeddings.get("gt", name))
        for k, term in enumerate(objective.evaluate(embeddings, details=True).terms):
            found[i, k] = term.distances[f"d(gt, {term.term.negative})"].mean()
    of: dict[str, list[int]] = {}
    for i, pair in enumerate(prepared.pairs):
        of.setdefault(pair.original, []).append(i)
    medians = torch.stack([found[members].median(0).values for members in of.values()])
    ratios = medians / medians.median(0).values.clamp_min(1e-6)
    for row, members in zip(ratios, of.values()):
        found[members] = row
    return found


@torch.no_grad()
def margin_warnings(terms: Sequence[LossTerm], prepared: Prepared, most: int = 32) -> list[str]:
    """Which fixed margins are more than the after picture itself reaches, in the first ``most`` pairs: what a perfect output pays."""
    told = []
    fixed = [term for term in hinges(terms) if not isinstance(term.margin, str) and term.margin and term.weight]
    indices = [i for i, pair in enumerate(prepared.pairs) if pair.variant is None][:most]
    if not fixed or not indices:
        return []
    objective = EditObjective(tuple(fixed))
    paid: dict[str, list[float]] = {term.name: [] for term in fixed}
    for i in indices:
        embeddings = prepared.embeddings([i], objective.encoders)
        for name in objective.encoders:
            embeddings = embeddings.with_embedding("pred", prepared.encoders[name], embeddings.get("gt", name))
        for report in objective.evaluate(embeddings).terms:
            paid[report.term.name].append(report.per_sample.item())
    for term in fixed:
        costs = [cost for cost in paid[term.name] if cost > (0.1 if term.smooth else 1e-3)]
        if 2 * len(costs) >= len(indices):
            told.append(
                f"{term.name}: margin {term.margin:g} is more than the after picture itself reaches in {len(costs)} of "
                f"{len(indices)} pairs: a perfect output pays {sum(costs) / len(costs):.2g} there; margin auto never does that"
            )
    return told


def _teaches(ratios: Tensor) -> Tensor:
    """w of each pair ``[pairs]``, 0…1, before the division by a mean."""
    return ((ratios - NOTHING) / (ALL - NOTHING)).clamp(0, 1).amin(1)


def weights(ratios: Tensor) -> Tensor:
    """w of each pair ``[pairs]``; those above 0 have a mean of 1.

    Raises:
        ValueError: nothing is left.
    """
    found = _teaches(ratios)
    if not bool(found.any()):
        raise ValueError("pair_weights: no pair is left; expected a set of one target, in which right pairs are alike")
    return found / found[found > 0].mean()


def notes(ratios: Tensor, prepared: Prepared) -> list[str]:
    """Which pairs teach nothing, or less."""
    told, pairs = [], len({pair.original for pair in prepared.pairs})
    less = _teaches(ratios)
    for what, chosen in (("teach nothing", less <= 0), ("teach less than the others", (less > 0) & (less < 1))):
        names = list(dict.fromkeys(prepared.pairs[i].original for i in chosen.nonzero()[:, 0].tolist()))
        if names:
            listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            told.append(
                f"pair_weights: {len(names)} of {pairs} pairs {what}, being near to their own negatives: {listed}"
            )
    return told
