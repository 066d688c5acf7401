"""Before/after pairs: found, checked once and completely, and loaded in one shared geometry."""

from .files import Finding, PairProblems
from .geometry import MULTIPLE, PairImages, bucket_size
from .pair_set import Pair, PairSet, find_pairs, folder_state, load, with_variants
from .variants import Variant, VariantSettings, sided

__all__ = [
    "MULTIPLE",
    "Finding",
    "Pair",
    "PairImages",
    "PairProblems",
    "PairSet",
    "Variant",
    "VariantSettings",
    "bucket_size",
    "find_pairs",
    "folder_state",
    "load",
    "sided",
    "with_variants",
]
