"""Embeddings by role and encoder: the one thing that losses read, and their files on disk."""

from .sets import FORMAT, NEGATIVE_ROLES, ROLES, EmbeddingSet, StaleEmbeddings, check_role, hash_images
from .shards import INDEX, encode_pairs, load_shards

__all__ = [
    "FORMAT",
    "INDEX",
    "NEGATIVE_ROLES",
    "ROLES",
    "EmbeddingSet",
    "StaleEmbeddings",
    "check_role",
    "encode_pairs",
    "hash_images",
    "load_shards",
]
