"""Held-out pairs, judged with the same noise every time: with the LoRA and without it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor

from ..lora.lora import LoRA
from ..models.base import Denoiser, Preview
from ..objective import TERMS
from ..processes import Processes
from ..runs.log import VELOCITY, ValidationLog
from ..runs.pictures import PreviewRow
from .estimate import Decode, EstimateObjective
from .flow import add_noise, estimate, estimate_weights, generator_for, velocity_loss
from .gradients import NonFinite, Part, check_losses, parts_of
from .prepare import Prepared
from .rollout import REGRESSION
from .settings import TrainingSettings

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Validator:
    """Paired velocity loss, the objective's terms, and sampled pictures of held-out pairs.

    Everything without the LoRA is computed once. Several processes share out the pairs, and all have all results.

    Args:
        denoiser, lora: as in the trainer.
        prepared: held-out pairs.
        conditioning: one object per pair.
        settings: of the run; the seed makes the noise.
        objective: of these pairs, or None.
        decode: for pictures; without it there are none.
        check: called between model calls; raises to stop.
        processes: that validate together.
        preview: what the model is told while pictures are sampled, with a negative for each of the pairs where it wants
            them; None: what it is told in training.

    Raises:
        ValueError: a picture of a pair that is to be shown cannot be read.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        lora: LoRA,
        prepared: Prepared,
        conditioning: Sequence[Any],
        settings: TrainingSettings,
        objective: Optional[EstimateObjective] = None,
        decode: Optional[Decode] = None,
        check: Callable[[], None] = lambda: None,
        processes: Optional[Processes] = None,
        preview: Optional[Preview] = None,
    ):
        self.processes, self.preview = processes or Processes(), preview
        self.denoiser, self.lora, self.prepared, self.conditioning = denoiser, lora, prepared, conditioning
        self.settings, self.objective, self.decode, self.check = settings, objective, decode, check
        self._base_losses: Optional[tuple[dict[float, float], dict[str, float]]] = None
        self._base_pictures: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        # Read before the first step: files may go away while a run trains.
        shown = min(settings.previews, len(prepared)) if decode is not None and settings.preview_steps else 0
        self._pairs = [prepared.pairs.load(index) for index in range(shown)]

    @torch.no_grad()
    def losses(self, step: int) -> ValidationLog:
        """Mean losses over all held-out pairs and noise levels after ``step`` steps.

        Raises:
            NonFinite: a loss that counts is NaN or infinite; a mean without it would hide that.
        """
        where = f"the validation after step {step}"
        was_training = self.lora.training
        self.lora.eval()
        try:
            if self._base_losses is None:
                with self.lora.disabled():
                    self._base_losses = self._losses(f"{where}, without the LoRA")
            velocity, terms = self._losses(where)
        finally:
            self.lora.train(was_training)
        base_velocity, base_terms = self._base_losses
        return ValidationLog(
            step,
            _mean(velocity.values()),
            _mean(base_velocity.values()),
            terms,
            base_terms,
            {f"{t:g}": (velocity[t], base_velocity[t]) for t in NOISE_LEVELS},
        )

    def _losses(self, where: str) -> tuple[dict[float, float], dict[str, float]]:
        pairs = self.processes.each(len(self.prepared), lambda index: self._losses_of(index, where), (NonFinite,))
        terms: dict[str, list[float]] = {}
        for _, found in pairs:
            for name, values in found.items():
                terms.setdefault(name, []).extend(values)
        velocity = {t: _mean(of_pair[t] for of_pair, _ in pairs) for t in NOISE_LEVELS}
        return velocity, {name: _mean(values) for name, values in terms.items()}

    def _losses_of(self, index: int, where: str) -> tuple[dict[float, float], dict[str, list[float]]]:
        """One pair's velocity loss by noise level, and what each term says at those where it counts."""
        velocity: dict[float, float] = {}
        terms: dict[str, list[float]] = {}
        x0 = self._to(self.prepared.after([index]))
        references = [self._to(reference) for reference in self.prepared.references([index])]
        masks = self.prepared.latent_masks([index])
        masks = None if masks is None else self._to(masks)
        for level in NOISE_LEVELS:
            self.check()
            noise = self._to(self._noise(index, x0, level))
            t = torch.full((1,), level, device=x0.device)
            x_t = add_noise(x0, noise, t)
            v = self.denoiser(x_t, t, references, [self.conditioning[index]])
            loss = velocity_loss(v, noise - x0, masks, self.settings.edit_weight)
            parts = [Part(VELOCITY, loss, loss)]
            if self.settings.estimate == "one_step":
                parts += self._objective_parts(estimate(x_t, t, v), index, t)
            self._add(terms, parts, index, t, where)
            velocity[level] = loss.item()
        if self.settings.estimate == "rollout":
            noise = self._to(self._noise(index, x0, "rollout"))
            path = self.denoiser.edit_model.path(
                self.denoiser, noise, references, [self.conditioning[index]], self.settings.rollout_steps
            )
            level, x_t = next(path)
            for following, x in path:
                self.check()
                x0_hat = x_t - (x - x_t) * (level / (following - level))
                t = torch.full((1,), level, device=x0.device)
                parts = []
                if self.settings.rollout_regression:
                    error = velocity_loss(x0_hat, x0, masks, self.settings.edit_weight)
                    error = error * estimate_weights(t, "inverse_square")
                    parts = [Part(REGRESSION, error, error)]
                self._add(terms, parts + self._objective_parts(x0_hat, index, t), index, t, where)
                level, x_t = following, x
        terms.pop(VELOCITY)
        return velocity, terms

    def _objective_parts(self, x0_hat: Tensor, index: int, t: Tensor) -> list[Part]:
        report = None if self.objective is None else self.objective(x0_hat, [index], t)
        return [] if report is None else parts_of(report)

    def _add(self, terms: dict[str, list[float]], parts: Sequence[Part], index: int, t: Tensor, where: str) -> None:
        """The parts' losses to those of their names, where they count and are finite."""
        if parts:
            check_losses(parts, [self.prepared.pairs[index].name], t, where)
        for part in parts:
            if part.counts is None or bool(part.counts):
                terms.setdefault(part.name, []).append(part.raw.item())

    @torch.no_grad()
    def pictures(self) -> list[PreviewRow]:
        """Sampled pictures of the first held-out pairs, each from the same noise every time."""
        if not self._pairs:
            return []
        was_training = self.lora.training
        self.lora.eval()
        try:
            return self.processes.each(len(self._pairs), self._row)
        finally:
            self.lora.train(was_training)

    def _row(self, index: int) -> PreviewRow:
        if index not in self._base_pictures:
            self._base_pictures[index] = self._sample(index, with_lora=False)
        base, base_signal = self._base_pictures[index]
        lora, signal = self._sample(index, with_lora=True)
        images, pair = self._pairs[index], self.prepared.pairs[index]
        signals = {"base": base_signal, "lora": signal} if signal else {}
        return PreviewRow(pair.name, images.before, base, lora, images.after, images.mask, pair.caption, signals)

    def _sample(self, index: int, with_lora: bool) -> tuple[Tensor, dict[str, Any]]:
        """An output, and what the objective says about it."""
        with nullcontext() if with_lora else self.lora.disabled():
            x0 = self.prepared.after([index])
            model = self.denoiser.edit_model
            latents = model.sample(
                self.denoiser,
                self._to(self._noise(index, x0, "picture")),
                [self._to(reference) for reference in self.prepared.references([index])],
                [self.conditioning[index]],
                min(self.settings.preview_steps, model.preview_steps or self.settings.preview_steps),
                self.preview and self.preview.of(index),
                lambda done, total: self.check(),
            )
            signal = self._signal(latents, index)
        return self.decode(latents)[0].clamp(0, 1).float().cpu(), signal

    def _signal(self, latents: Tensor, index: int) -> dict[str, Any]:
        if self.objective is None:
            return {}
        clean = torch.zeros(1, device=latents.device)
        report = self.objective.without_gates()(latents, [index], clean, details=True)
        terms = {
            r.term.name: {
                "raw": r.per_sample.item(),
                "toward_failure": None if r.toward_failure is None else r.toward_failure.item(),
            }
            for r in report.terms
        }
        can_tell = any(r.toward_failure is not None and TERMS[r.term.kind].failure for r in report.terms)
        return {"says": report.signal()[0], "terms": terms} if can_tell else {"terms": terms}

    def _noise(self, index: int, like: Tensor, what: object) -> Tensor:
        generator = generator_for(self.settings.seed, "validation", self.prepared.pairs[index].name, what)
        return torch.randn(like.shape, generator=generator)

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.denoiser.device)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
