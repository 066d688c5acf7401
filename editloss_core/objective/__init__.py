"""Objectives: named, weighted terms over roles and encoders, and what they say about a batch."""

from .objective import PRESETS, EditObjective, ObjectiveReport, gradient_where, recommended
from .terms import NO_FAILURE, NOT_A_NUMBER, TERMS, TOKEN_WEIGHTS, LossTerm, TermReport

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
    "recommended",
]
