"""Every socket type of the pack, once, and the value that travels on the objective's wire."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Mapping, Optional

from comfy_api.latest import io

from ..editloss_core.embeddings import EmbeddingSet
from ..editloss_core.encoders.base import Encoder
from ..editloss_core.negatives import OverlaySettings
from ..editloss_core.objective import EditObjective, LossTerm, ObjectiveReport
from ..editloss_core.training.trainer import TrainingResult

EncoderSocket = io.Custom("EDITLOSS_ENCODER")
EmbeddingsSocket = io.Custom("EDITLOSS_EMBEDDINGS")
ObjectiveSocket = io.Custom("EDITLOSS_OBJECTIVE")
PairsSocket = io.Custom("EDITLOSS_PAIRS")
OptionsSocket = io.Custom("EDITLOSS_TRAINING_OPTIONS")
ResumeSocket = io.Custom("EDITLOSS_RESUME")
RunSocket = io.Custom("EDITLOSS_RUN")
# ComfyUI's own training sockets: the stock Load LoRA Model, Save LoRA Weights and Plot Loss Graph take them.
LoRAModelSocket = io.Custom("LORA_MODEL")
LossMapSocket = io.Custom("LOSS_MAP")


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

    def evaluate(self, embeddings: EmbeddingSet) -> ObjectiveReport:
        """What the objective says about embeddings, with maps and distances.

        Raises:
            ValueError: embeddings of another encoder than the one of that name that is wired to the terms, or what
                :meth:`EditObjective.evaluate` refuses.
        """
        for name, encoder in self.encoders.items():
            encoded = embeddings.encoders.get(name)
            if encoded is not None and encoded.fingerprint != encoder.info.fingerprint:
                raise ValueError(
                    f"encoder: the losses are wired to a {name!r} with other weights or another size than Encode by Role used; "
                    "wire the same encoder to both, or give one of them a name"
                )
        return self.objective.evaluate(embeddings, details=True)


@dataclass(frozen=True)
class TrainingOptions:
    """What the options nodes add to a training run. Every node of a chain changes its own fields and keeps the others.

    Attributes:
        training: fields of :class:`~…training.settings.TrainingSettings`.
        timesteps: fields of :class:`~…training.flow.Timesteps`.
        lora: fields of :class:`~…training.lora.LoRASettings`.
        crop: side of the window around the edit that is decoded for encoders of pictures, in pixels; 0 = all of it.
        overlay: how overlay negatives are made.
        guidance, preview_guidance: what a guidance-distilled model is told in training and for pictures; 0 for these = the
            model's own.
        preview_cfg: scale of classifier-free guidance for pictures; 0 = the model's own.
        edit_model: title of the model, where several share a class; empty = by the MODEL's config and file.
        checkpointing: compute blocks again in the backward pass.
        reserve: GiB of the device to leave free for a step; 0 = as much as it takes by an estimate.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    timesteps: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    crop: int = 512
    overlay: OverlaySettings = OverlaySettings()
    guidance: float = 1.0
    preview_guidance: float = 0.0
    preview_cfg: float = 0.0
    edit_model: str = ""
    checkpointing: bool = True
    reserve: float = 0.0


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from, and the folder of its run."""

    run: str
    checkpoint: Path


@dataclass(frozen=True)
class TrainingRun:
    """What Train Edit LoRA gives to the nodes behind it.

    Attributes:
        name: of the run.
        result: of the core's trainer.
        metadata: texts for the header of a LoRA file.
        folder: where log and checkpoints are.
    """

    name: str
    result: TrainingResult
    metadata: Mapping[str, str]
    folder: Optional[Path] = None
