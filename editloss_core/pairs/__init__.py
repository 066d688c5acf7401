"""Before/after pairs: found, checked once and completely, and loaded in one shared geometry."""

from .files import Finding, PairProblems
from .geometry import MULTIPLE, bucket_size
from .pair_set import Pair, PairImages, PairSet, find_pairs, folder_state, load

__all__ = [
    "MULTIPLE",
    "Finding",
    "Pair",
    "PairImages",
    "PairProblems",
    "PairSet",
    "bucket_size",
    "find_pairs",
    "folder_state",
    "load",
]
