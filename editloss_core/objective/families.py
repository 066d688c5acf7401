"""The four families of terms: their settings with types, what is wrong with them, and the distances that they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

from .. import losses
from ..checks import check_number, check_option
from ..embeddings import NEGATIVE_ROLES, ROLES

PICTURES = tuple(role for role in ROLES if role not in NEGATIVE_ROLES)
IN_BATCH = "in_batch"  # the other samples of a batch, in the place of a role
Pairs = list[tuple[str, str, str]]  # (distance, role, role)


@dataclass(frozen=True)
class Match:
    """d(anchor, positive)."""

    anchor: str
    positive: str
    dist: str

    def check(self) -> None:
        """ValueError for what the public losses would refuse, under the term's own names."""
        _check_pictures(anchor=self.anchor, positive=self.positive)

    def pairs(self) -> Pairs:
        """The distances that the loss is made of."""
        return [(self.dist, self.anchor, self.positive)]

    def constants(self, details: bool) -> Pairs:
        """Those that are constants for its gradient; with details, also those that only pictures need."""
        return [(self.dist, "gt", "src")] if details and (self.anchor, self.positive) == ("pred", "gt") else []


@dataclass(frozen=True)
class Ranking:
    """[margin + d(anchor, positive) − d(reference or anchor, negative)]₊"""

    anchor: str
    positive: str
    negative: str
    dist: str
    margin: Union[float, str]
    smooth: float
    neg_agg: str = "mean"
    reference: Optional[str] = None

    @property
    def compared(self) -> str:
        """The role whose distance to the negative the margin compares with."""
        return self.reference or self.anchor

    @property
    def fraction(self) -> Optional[float]:
        """Of an automatic margin; None for a number."""
        return losses.margin_fraction(self.margin)

    def check(self) -> None:
        """As in :class:`Match`."""
        fixed = self.fraction is None
        if not fixed and self.reference is not None:
            raise ValueError(f"margin: a margin_ranking term needs a number, got {self.margin!r}")
        check_number("smooth", self.smooth, 0.0)
        check_option("neg_agg", self.neg_agg, losses.AGGREGATIONS)
        _check_pictures(anchor=self.anchor, positive=self.positive, reference=self.compared)
        check_option("negative", self.negative, ROLES)

    def pairs(self) -> Pairs:
        return [(self.dist, self.anchor, self.positive), (self.dist, self.compared, self.negative)]

    def constants(self, details: bool) -> Pairs:
        if self.fraction is not None or (details and self.compared == self.anchor):
            return [(self.dist, self.positive, self.negative)]
        return []


@dataclass(frozen=True)
class Contrastive:
    """label · d² + (1 − label) · [margin − d]₊², d = d(anchor, positive)."""

    anchor: str
    positive: str
    dist: str
    margin: Union[float, str]
    label: int

    @property
    def measured(self) -> str:
        """The distance as it is taken: not squared, where the pair losses know only squares."""
        return "euclidean" if self.dist == "l2" else "cos"

    @property
    def width(self) -> float:
        """The margin; :meth:`check` has seen that it is a number."""
        return float(self.margin)

    def check(self) -> None:
        """As in :class:`Match`."""
        if losses.margin_fraction(self.margin):
            raise ValueError(f"margin: a contrastive term needs a number, got {self.margin!r}")
        if self.label not in (0, 1):
            raise ValueError(f"label: expected 1 (same) or 0 (different), got {self.label!r}")
        _check_pictures(anchor=self.anchor, positive=self.positive)

    def pairs(self) -> Pairs:
        return [(self.measured, self.anchor, self.positive)]

    def constants(self, details: bool) -> Pairs:
        return []


@dataclass(frozen=True)
class InfoNCE:
    """−log of the positive's share among positive and negatives, by cosine."""

    anchor: str
    positive: str
    negative: str
    temperature: float

    @property
    def in_batch(self) -> bool:
        return self.negative == IN_BATCH

    def check(self) -> None:
        """As in :class:`Match`."""
        check_number("temperature", self.temperature, 0.0, open_low=True)
        _check_pictures(anchor=self.anchor, positive=self.positive)
        check_option("negative", self.negative, (*ROLES, IN_BATCH))

    def pairs(self) -> Pairs:
        references = [self.positive] + ([] if self.in_batch else [self.negative])
        return [("cos", self.anchor, reference) for reference in references]

    def constants(self, details: bool) -> Pairs:
        return []


Family = Union[Match, Ranking, Contrastive, InfoNCE]


def _check_pictures(**roles: str) -> None:
    for name, role in roles.items():
        check_option(name, role, PICTURES)
