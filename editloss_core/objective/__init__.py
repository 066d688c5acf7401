"""Objectives: named, weighted terms over roles and encoders, and what they say about a batch."""

from .evaluation import TermReport
from .objective import (
    NO_FAILURE,
    NOT_A_NUMBER,
    PRESETS,
    EditObjective,
    ObjectiveReport,
    gradient_where,
    on_rollouts,
    recommended,
)
from .terms import TERMS, TOKEN_WEIGHTS, LossTerm

__all__ = [
    "NOT_A_NUMBER",
    "NO_FAILURE",
    "PRESETS",
    "TERMS",
    "TOKEN_WEIGHTS",
    "EditObjective",
    "LossTerm",
    "ObjectiveReport",
    "TermReport",
    "gradient_where",
    "on_rollouts",
    "recommended",
]
