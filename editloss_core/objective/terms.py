"""Terms of an objective, and the table of their kinds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Callable, Mapping, Optional

from torch import Tensor

from .. import losses
from ..checks import check_number, check_option
from .families import IN_BATCH, Contrastive, Family, InfoNCE, Match, Ranking

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

    def __post_init__(self) -> None:
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
            check_option("dist", self.dist, TERMS[self.kind].dists)
        self.settings.check()

    @property
    def settings(self) -> Family:
        """What the term's kind uses, with types."""
        family = TERMS[self.kind].family
        given = {f.name: getattr(self, f.name) for f in fields(family)}
        return family(**{name: value for name, value in given.items() if value is not None})

    @property
    def roles(self) -> tuple[str, ...]:
        """What the term reads, ``"in_batch"`` among it."""
        return tuple(r for r in (self.anchor, self.positive, self.negative, self.reference) if r is not None)

    @property
    def across_batch(self) -> bool:
        """Whether a sample's loss depends on the other samples of the batch."""
        return self.negative == IN_BATCH

    @property
    def pushes(self) -> bool:
        """Whether the term keeps the output away from something of its own pair; a ranking with a reference only pulls."""
        return (self.negative not in (None, IN_BATCH) and self.reference is None) or self.label == 0

    def gate(self, t: Tensor) -> Tensor:
        """Which samples of noise levels ``t`` ``[B]`` the term counts, as booleans ``[B]``."""
        return (t >= self.t_min) & (t <= self.t_max)

    def describe(self) -> str:
        """The term in one line, with its margin or temperature and what differs from the defaults of its kind.

        >>> LossTerm("triplet", "dino", weight=0.5, negative="overlay", t_max=0.8).describe()
        '0.5 × triplet (negative overlay, margin 0.2, t 0…0.8)'
        """
        usual = {**{f.name: f.default for f in fields(self)[4:]}, **TERMS[self.kind].defaults}
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


# ---------------------------------------------------------------------------------------------------------------------
# The table of terms
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TermKind:
    """A row of the table: the public loss, its settings with defaults, and its family.

    Attributes:
        loss: the public function that the term equals.
        defaults: field of :class:`LossTerm` → default; other optional fields do not exist for this kind.
        family: its settings with types, and the distances that it is made of.
        failure: the failure of an edit model that it answers, if one.
        dists: that it knows.
    """

    loss: Callable[..., Tensor]
    defaults: Mapping[str, object]
    family: type[Family]
    failure: Optional[str] = None
    dists: tuple[str, ...] = losses.DISTANCES


_MATCH = {"anchor": "pred", "positive": "gt"}


def _hinge(negative: str, **roles: str) -> dict[str, object]:
    """Defaults of a hinge term, in the order in which a person fills them: roles first."""
    return {**_MATCH, **roles, "negative": negative, "dist": "cos", "margin": 0.2, "smooth": 0.0}


TERMS: dict[str, TermKind] = {
    "no_edit_identity": TermKind(losses.loss_no_edit_identity, _hinge("src"), Ranking, "no edit"),
    "geometry_match": TermKind(
        losses.loss_geometry_match, {**_MATCH, "dist": "l2"}, Match, "distorted", losses.MATCHES
    ),
    "overlay_avoidance": TermKind(
        losses.loss_overlay_avoidance, {**_hinge("overlay"), "neg_agg": "mean"}, Ranking, "overlay"
    ),
    "pair_distance": TermKind(losses.pair_distance, {**_MATCH, "dist": "cos"}, Match),
    "feature_match": TermKind(losses.feature_match_loss, {**_MATCH, "dist": "l2"}, Match, dists=losses.MATCHES),
    "contrastive": TermKind(
        losses.contrastive_pair_loss, {**_MATCH, "dist": "l2", "margin": 1.0, "label": 1}, Contrastive
    ),
    "triplet": TermKind(losses.triplet_margin_loss, _hinge("src"), Ranking),
    "margin_ranking": TermKind(
        losses.margin_ranking_on_distances, {**_hinge("gt", reference="src"), "neg_agg": "mean"}, Ranking
    ),
    "multi_negative": TermKind(
        losses.multi_negative_ranking_loss, {**_hinge("hard_negative"), "neg_agg": "mean"}, Ranking
    ),
    "info_nce": TermKind(losses.info_nce_loss, {**_MATCH, "negative": IN_BATCH, "temperature": 0.07}, InfoNCE),
}
