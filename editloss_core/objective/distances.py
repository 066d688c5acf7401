"""The distances that terms are made of, each computed once."""

from __future__ import annotations

from typing import Iterable, Optional, Sequence

import torch
from torch import Tensor

from .. import losses
from ..embeddings import NEGATIVE_ROLES, ROLES, EmbeddingSet
from .terms import LossTerm

Key = tuple[str, str, str, str]  # encoder, distance, and two roles in the order of ROLES


def _key(encoder: str, dist: str, a: str, b: str) -> Key:
    first, second = sorted((a, b), key=ROLES.index)
    return encoder, dist, first, second


class DistanceTable:
    """The token distances of one evaluation, keyed by encoder, distance and the two roles in the order of ROLES."""

    def __init__(self, terms: Sequence[LossTerm], embeddings: EmbeddingSet, details: bool):
        self.embeddings, self.details = embeddings, details
        self.batch = 1
        self.tokens: dict[Key, list[Tensor]] = {}
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
        own: dict[Key, None] = {}
        constant: dict[Key, None] = {}
        for term in terms:
            settings = term.settings
            needed = settings.constants(False)
            if term.token_weights == "difference" and term.encoder in self.embeddings.grids:
                needed.append(("cos", "gt", "src"))
            if self.details:  # but a picture must not make a role necessary
                there = {role for role, encoder in self.embeddings.tensors if encoder == term.encoder}
                needed += [pair for pair in settings.constants(True) if there.issuperset(pair[1:])]
            for pairs, group in ((settings.pairs(), own), (needed, constant)):
                for dist, a, b in pairs:
                    for role in (a, b):
                        self.embeddings.get(role, term.encoder)
                    group[_key(term.encoder, dist, a, b)] = None
        # The outputs make the batch, whether or not a term reads them; a role that no term reads does not.
        used = {(role, encoder) for encoder, _, a, b in (*own, *constant) for role in ("pred", a, b)}
        self.batch = max(len(t) for key, t in self.embeddings.tensors.items() if key in used)
        self._compute(own)
        with torch.no_grad():
            self._compute(key for key in constant if key not in own)

    def _compute(self, keys: Iterable[Key]) -> None:
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for encoder, dist, anchor, reference in keys:
            grouped.setdefault((encoder, dist, anchor), []).append(reference)
        for (encoder, dist, anchor), references in grouped.items():
            lists = [self.roles(role, encoder) for role in references]
            flat = [tensor for items in lists for tensor in items]
            results = iter(losses.token_distances(self.roles(anchor, encoder)[0], flat, dist))
            for role, items in zip(references, lists):
                self.tokens[encoder, dist, anchor, role] = [next(results) for _ in items]

    def per_token(self, encoder: str, dist: str, a: str, b: str) -> list[Tensor]:
        """One ``[B, ...]`` for each of K negatives, one for other roles; none if nobody asked for it."""
        return self.tokens.get(_key(encoder, dist, a, b), [])

    def per_sample(self, term: LossTerm, dist: str, a: str, b: str) -> Tensor:
        """Aggregated as the term does it: ``[B]``, or ``[B, K]`` for a role of several negatives."""
        weights = self.weights(term)
        parts = [losses.aggregate_tokens(d, term.agg, weights) for d in self.per_token(term.encoder, dist, a, b)]
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
            return self.per_token(term.encoder, "cos", "gt", "src")[0].detach()
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
        device = self.embeddings.get(term.settings.anchor, term.encoder).device
        return weights.to(device).expand(self.batch, *weights.shape[1:])

    def map(self, term: LossTerm, values: Optional[Tensor]) -> Optional[Tensor]:
        """Values per token as ``[B, h, w]``."""
        if not self.details or values is None or term.encoder not in self.embeddings.grids:
            return None
        return values.detach().reshape(len(values), *self.embeddings.grids[term.encoder])
