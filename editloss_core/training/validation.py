"""Held-out pairs, judged with the same noise every time: with the LoRA and without it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor

from .estimate import Decode, EstimateObjective
from .flow import Denoiser, add_noise, estimate, generator_for, sample, velocity_loss
from .gradients import Part, check_losses, parts_of
from .log import VELOCITY, ValidationLog
from .lora import LoRA
from .prepare import Prepared
from .settings import TrainingSettings

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class PreviewRow:
    """One held-out pair as pictures ``[H, W, 3]`` in 0…1 on the CPU."""

    pair: str
    before: Tensor
    base: Tensor
    lora: Tensor
    after: Tensor


class Validator:
    """Paired velocity loss, the objective's terms, and sampled pictures of held-out pairs.

    Everything without the LoRA is computed once.

    Args:
        denoiser, lora: as in the trainer.
        prepared: held-out pairs.
        conditioning: one object per pair.
        settings: of the run; the seed makes the noise.
        objective: of these pairs, or None.
        decode: for pictures; without it there are none.
        check: called between model calls; raises to stop.
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
    ):
        self.denoiser, self.lora, self.prepared, self.conditioning = denoiser, lora, prepared, conditioning
        self.settings, self.objective, self.decode, self.check = settings, objective, decode, check
        self._base_losses: Optional[tuple[dict[float, float], dict[str, float]]] = None
        self._base_pictures: dict[int, Tensor] = {}

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
        velocity: dict[float, list[float]] = {t: [] for t in NOISE_LEVELS}
        terms: dict[str, list[float]] = {}
        for index in range(len(self.prepared)):
            x0 = self._to(self.prepared.after([index]))
            references = [self._to(self.prepared.before([index]))]
            masks = self.prepared.latent_masks([index])
            for level in NOISE_LEVELS:
                self.check()
                noise = self._to(self._noise(index, x0, level))
                t = torch.full((1,), level, device=x0.device)
                x_t = add_noise(x0, noise, t)
                v = self.denoiser(x_t, t, references, [self.conditioning[index]])
                loss = velocity_loss(
                    v, noise - x0, None if masks is None else self._to(masks), self.settings.edit_weight
                )
                report = self.objective and self.objective(estimate(x_t, t, v), [index], t)
                parts = [Part(VELOCITY, loss, loss), *(parts_of(report) if report else ())]
                check_losses(parts, [self.prepared.pairs[index].name], t, where)
                velocity[level].append(loss.item())
                for term in report.terms if report else ():
                    terms.setdefault(term.term.name, []).append(term.value.item())
        return {t: _mean(values) for t, values in velocity.items()}, {n: _mean(v) for n, v in terms.items()}

    @torch.no_grad()
    def pictures(self) -> list[PreviewRow]:
        """Sampled pictures of the first held-out pairs, each from the same noise every time."""
        if self.decode is None or not self.settings.preview_steps:
            return []
        was_training = self.lora.training
        self.lora.eval()
        try:
            rows = []
            for index in range(min(self.settings.previews, len(self.prepared))):
                if index not in self._base_pictures:
                    self._base_pictures[index] = self._sample(index, with_lora=False)
                after = self._sample(index, with_lora=True)
                images = self.prepared.pairs.load(index)
                name = self.prepared.pairs[index].name
                rows.append(PreviewRow(name, images.before, self._base_pictures[index], after, images.after))
            return rows
        finally:
            self.lora.train(was_training)

    def _sample(self, index: int, with_lora: bool) -> Tensor:
        with nullcontext() if with_lora else self.lora.disabled():
            x0 = self.prepared.after([index])
            latents = sample(
                self.denoiser,
                self._to(self._noise(index, x0, "picture")),
                [self._to(self.prepared.before([index]))],
                [self.conditioning[index]],
                self.settings.preview_steps,
                lambda done, total: self.check(),
            )
        return self.decode(latents)[0].clamp(0, 1).float().cpu()

    def _noise(self, index: int, like: Tensor, what: object) -> Tensor:
        generator = generator_for(self.settings.seed, "validation", self.prepared.pairs[index].name, what)
        return torch.randn(like.shape, generator=generator)

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.denoiser.device)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
