"""Every socket type of the pack, once, and the value that travels on the objective's wire."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Mapping

from comfy_api.latest import io

from ..editloss_core.encoders.base import Encoder
from ..editloss_core.objective import EditObjective, LossTerm

EncoderSocket = io.Custom("EDITLOSS_ENCODER")
EmbeddingsSocket = io.Custom("EDITLOSS_EMBEDDINGS")
ObjectiveSocket = io.Custom("EDITLOSS_OBJECTIVE")


@dataclass(frozen=True)
class WiredObjective:
    """An objective together with the encoders that were wired to its terms, by name, so that a trainer needs no more."""

    objective: EditObjective = field(default_factory=EditObjective)
    encoders: Mapping[str, Encoder] = field(default_factory=dict)

    def with_term(self, term: LossTerm, encoder: Encoder) -> WiredObjective:
        return replace(self.with_encoder(encoder), objective=self.objective.with_term(term))

    def with_encoder(self, encoder: Encoder) -> WiredObjective:
        known = self.encoders.get(encoder.info.name, encoder)
        if known.info.fingerprint != encoder.info.fingerprint:
            raise ValueError(
                f"encoder: the objective already has another encoder called {encoder.info.name!r} "
                "(other weights or preprocessing); give one of the two another name"
            )
        return replace(self, encoders={**self.encoders, encoder.info.name: encoder})
