"""Everything that a person sets about a training run, checked before any work."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Iterable, Optional

import torch
from torch import nn

from ..checks import check_number, check_option, check_whole
from ..objective import EditObjective
from .flow import ESTIMATE_WEIGHTINGS, Timesteps
from .pair_weights import PAIR_WEIGHTS, check_pair_weights
from .shares import check_shares

OPTIMIZERS = {"adamw": None, "adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}  # → package
SCHEDULES = ("constant", "cosine")
ESTIMATES = ("one_step", "rollout")
ROLLOUT_WEIGHTS = ("current", "average", "frozen")
WEIGHTS = ("factors", "shares")
TRAINABLE_ROLES = ("pred", "gt", "src", "overlay", "in_batch", "hard_negative")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a run; the LoRA's own are :class:`~editloss_core.lora.lora.LoRASettings`.

    Attributes:
        steps: optimiser steps.
        batch_size: pairs per forward pass.
        accumulation: passes per optimiser step.
        learning_rate: peak; Prodigy finds its own and wants 1.
        optimizer: ``"adamw"``, ``"adamw8bit"`` (bitsandbytes) or ``"prodigy"`` (prodigyopt, Mishchenko & Defazio 2023,
            https://arxiv.org/abs/2306.06101).
        weight_decay: decoupled (AdamW).
        warmup: steps over which the learning rate rises from 0.
        schedule: ``"constant"`` or ``"cosine"`` (towards 0, which it would reach one step after the last) after the warm-up.
        clip: largest norm of the gradient; 0 = off.
        ema: decay of the exponential moving average of the LoRA, which is then what is validated and saved; 0 = off.
        seed: of everything random. On a CPU the same seed gives the same file, byte for byte.
        timesteps: how noise levels are drawn.
        velocity_weight: of the velocity loss in the total; 0 trains on the objective alone.
        edit_weight: weight of the edit region in the velocity loss, 1 = like the rest.
        caption_dropout: chance in 0…1 with which a pair is trained with an empty caption in a pass on its noised after picture; a
            model whose captions see the before picture sees it still. Rollouts keep their captions.
        objective_every: the objective is evaluated at every N-th step. The others train on velocity alone.
        objective_warmup: steps over which the objective's part, and the regression on rollouts, rise from 0.
        estimate: what the objective acts on. ``"one_step"``: x̂0 of the noised after picture, at the noise level drawn.
            ``"rollout"``: x̂0 of a state that the model itself reaches from pure noise, see
            :mod:`~editloss_core.training.rollout`.
        pushes_t_max: in ``"one_step"``, the highest noise level at which terms that push away count, beside their own gates: above
            0.5 they were measured to take good outputs away.
        rollout_steps: of the schedule on which it gets there.
        rollout_regression: weight of ‖x̂0 − x0‖² / max(t, 0.1)² of that state, which needs no objective; 0 = off.
        rollout_weights: of the LoRA on the way there, which has no gradients: ``"current"``, ``"average"`` (those of
            ``ema``) or ``"frozen"`` (the model without a LoRA).
        weights: what a term's weight is. ``"factors"``: of its loss. ``"shares"``: of the gradient at the model's output,
            see :class:`~editloss_core.training.shares.Shares`.
        pair_weights: ``"alike"``, or ``"reach"``: a pair whose after picture is near its own negatives teaches less or nothing,
            see :mod:`~editloss_core.training.pair_weights`.
        own_failures_every: at every N-th step, but not the first, the LoRA samples the pairs of the batch in ``rollout_steps``
            steps, and outputs that the judge fails become the role hard_negative, see
            :mod:`~editloss_core.training.own_failures`; 0 = never.
        own_failures_kept: most of them per pair, the newest.
        estimate_weighting, estimate_cap: see :func:`~editloss_core.training.flow.estimate_weights`.
        gradients_every: the gradient norm of each term is measured at every N-th step; 0 = never.
        validate_every: validation at every N-th step and at the end; 0 = never.
        preview_steps: sampling steps of validation pictures; 0 = no pictures.
        previews: held-out pairs that are sampled.
        checkpoint_every: a checkpoint at every N-th step and at the end; 0 = only at the end.
        keep: checkpoints that stay.
        self_check: before the first step, see :mod:`~editloss_core.training.self_check`.
    """

    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    warmup: int = 0
    schedule: str = "constant"
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    timesteps: Timesteps = field(default_factory=Timesteps)
    velocity_weight: float = 1.0
    edit_weight: float = 1.0
    caption_dropout: float = 0.0
    objective_every: int = 1
    objective_warmup: int = 0
    estimate: str = "one_step"
    pushes_t_max: float = 0.5
    rollout_steps: int = 8
    rollout_regression: float = 0.0
    rollout_weights: str = "current"
    weights: str = "factors"
    pair_weights: str = "alike"
    own_failures_every: int = 0
    own_failures_kept: int = 4
    estimate_weighting: str = "none"
    estimate_cap: float = 100.0
    gradients_every: int = 10
    validate_every: int = 250
    preview_steps: int = 20
    previews: int = 4
    checkpoint_every: int = 250
    keep: int = 3
    self_check: bool = True

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "accumulation", "objective_every", "rollout_steps", "own_failures_kept", "keep",
        ):  # fmt: skip
            check_whole(name, getattr(self, name), 1)
        for name in (
            "warmup", "objective_warmup", "seed", "own_failures_every", "gradients_every", "validate_every",
            "preview_steps", "previews", "checkpoint_every",
        ):  # fmt: skip
            check_whole(name, getattr(self, name), 0)
        if not isinstance(self.self_check, bool):
            raise ValueError(f"self_check: expected true or false, got {self.self_check!r}")
        check_number("learning_rate", self.learning_rate, 0.0, open_low=True)
        for name in ("weight_decay", "clip", "velocity_weight", "rollout_regression"):
            check_number(name, getattr(self, name), 0.0)
        check_number("edit_weight", self.edit_weight, 0.0, open_low=True)
        for name in ("caption_dropout", "pushes_t_max"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_number("estimate_cap", self.estimate_cap, 0.0, open_low=True)
        check_option("optimizer", self.optimizer, tuple(OPTIMIZERS))
        check_option("schedule", self.schedule, SCHEDULES)
        check_option("estimate", self.estimate, ESTIMATES)
        check_option("rollout_weights", self.rollout_weights, ROLLOUT_WEIGHTS)
        check_option("weights", self.weights, WEIGHTS)
        check_option("pair_weights", self.pair_weights, PAIR_WEIGHTS)
        check_option("estimate_weighting", self.estimate_weighting, ESTIMATE_WEIGHTINGS)
        check_number("ema", self.ema, 0.0)
        if self.ema >= 1.0:
            raise ValueError(f"ema: expected a decay below 1, got {self.ema:g}")
        for name in ("warmup", "objective_warmup"):
            if getattr(self, name) > self.steps:
                raise ValueError(
                    f"{name}: expected at most the {self.steps} steps of the run, got {getattr(self, name)}"
                )
        if self.own_failures_every >= self.steps:
            raise ValueError(
                f"own_failures_every: expected less than the {self.steps} steps of the run, got {self.own_failures_every}"
            )
        if self.rollout_weights == "average" and not self.ema:
            raise ValueError("rollout_weights: average needs the moving average; set ema, or choose current")
        if self.rollout_regression and self.estimate != "rollout":
            raise ValueError(
                f"rollout_regression: {self.rollout_regression:g} needs estimate rollout, got {self.estimate!r}"
            )
        if not self.velocity_weight and self.objective_every > 1:
            raise ValueError(
                f"velocity_weight: 0 with objective_every {self.objective_every} leaves steps without any loss; raise the one "
                "or set the other to 1"
            )
        package = OPTIMIZERS[self.optimizer]
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"optimizer: {self.optimizer} needs a package; pip install {package}, or choose adamw")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for metadata and checkpoints."""
        return asdict(self)

    def ramp(self, step: int) -> float:
        """Factor on the objective's part at step 0, 1, …"""
        return min(1.0, (step + 1) / self.objective_warmup) if self.objective_warmup else 1.0

    def rate(self, step: int) -> float:
        """The factor on the learning rate at step 0, 1, …: warm-up, then constant or cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser, with its learning rate at the peak; :meth:`rate` is applied by the trainer."""
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, **options)
        if self.optimizer == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(parameters, **options, safeguard_warmup=True, use_bias_correction=True)
        return torch.optim.AdamW(parameters, **options)


def every(interval: int, step: int) -> bool:
    """Whether something that happens at every ``interval``-th step happens at step 0, 1, …; never for 0."""
    return interval > 0 and step % interval == 0


def check_objective(objective: Optional[EditObjective], settings: TrainingSettings) -> None:
    """ValueError for terms that training has no pictures for or cannot learn from, and for no loss at all."""
    terms = objective.terms if objective else ()
    for term in terms:
        for role in term.roles:
            if role not in TRAINABLE_ROLES:
                raise ValueError(
                    f"objective: {term.name!r} reads {role}, which training has no pictures for; it has pred, gt, src, "
                    "overlay and hard_negative"
                )
        if "hard_negative" in term.roles and not settings.own_failures_every:
            raise ValueError(
                f"objective: {term.name!r} reads hard_negative, which training makes of the LoRA's own failed outputs; set "
                "own_failures_every above 0, or another negative"
            )
        if term.anchor != "pred" and term.weight:
            raise ValueError(f"objective: {term.name!r} does not read pred, so that nothing can be learnt from it")
    if settings.own_failures_every and not any("hard_negative" in term.roles for term in terms):
        raise ValueError(
            f"own_failures_every: {settings.own_failures_every} samples outputs that no loss reads; set the negative of a loss to "
            "hard_negative, or own_failures_every to 0"
        )
    if settings.weights == "shares":
        check_shares(terms)
    if settings.pair_weights == "reach":
        check_pair_weights(terms)
    if settings.rollout_regression:
        return
    if not settings.velocity_weight and not any(term.weight for term in terms):
        raise ValueError(
            "velocity_weight: 0 without an objective of some weight leaves nothing to train on; connect losses or raise it"
        )
    drawn = settings.timesteps
    if settings.estimate == "rollout":  # its noise levels are the schedule's
        return
    if not settings.velocity_weight and not any(
        term.weight and term.t_min <= drawn.maximum and term.t_max >= drawn.minimum for term in terms
    ):
        raise ValueError(
            f"velocity_weight: 0 leaves nothing to train on, as no term's t_min to t_max meets the noise levels that are "
            f"drawn, {drawn.minimum:g} to {drawn.maximum:g}; raise it or move the gates"
        )


SAFE_T = 0.5  # above it, pushes on one-step estimates cost good outputs in the demo; below it they change little


def gated(objective: EditObjective, settings: TrainingSettings) -> EditObjective:
    """The objective with the gate of ``pushes_t_max`` where it holds; a term that is wholly above it is closed."""
    if settings.estimate != "one_step":
        return objective
    highest = settings.pushes_t_max
    terms = [
        replace(t, t_min=min(t.t_min, highest), t_max=min(t.t_max, highest)) if t.pushes else t for t in objective.terms
    ]
    return EditObjective(tuple(terms))


def warnings(objective: Optional[EditObjective], settings: TrainingSettings) -> list[str]:
    """What was measured of these settings and is not good."""
    terms = objective.terms if objective and settings.estimate == "one_step" else ()
    names = ", ".join(t.name for t in terms if t.weight and t.pushes)
    if not names:
        return []
    if settings.pushes_t_max > SAFE_T:
        return [
            f"pushes_t_max {settings.pushes_t_max:g}: above t = {SAFE_T:g} the one-step estimate is a mean over what could be "
            f"there, and in the demo losses that push away ({names}) took good outputs away; lower it, or use Rollout Options "
            "(estimate rollout)"
        ]
    return [
        f"{names}: on the one-step estimate they count up to t = {settings.pushes_t_max:g} (pushes_t_max), where in the demo they "
        "did next to nothing; Rollout Options (estimate rollout) lets them act where an edit is decided"
    ]


class MovingAverage:
    """Exponential moving average of parameters, which starts quickly: decay min(d, (1 + n) / (10 + n)) at step n.

    Attributes:
        values: the averages, by name.
    """

    def __init__(self, decay: float, named: Iterable[tuple[str, torch.Tensor]]):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in named}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in named:
            self.values[name].lerp_(p.detach(), 1.0 - decay)
