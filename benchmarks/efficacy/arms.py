"""What is compared: each arm is a way to train on the same pairs, from the same seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Mapping, Optional

import torch
from torch import Tensor

PLAIN = "flow matching"
LONGER = "flow matching at equal time"
RECIPE = "recipe"


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        about: one line for the report.
        training: settings other than the experiment's.
        terms: encoder's name → the objective's terms, or None for none.
        trainer: the core's trainer class → the class that trains.
        longer: name of the arm whose time this one gets: its steps grow by that arm's cost.
        decoder_features: whether the objective reads the VAE decoder's features in place of the latents.
    """

    about: str
    training: Mapping[str, Any] = field(default_factory=dict)
    terms: Optional[Callable[..., tuple]] = None
    trainer: Callable[[type], type] = lambda base: base
    longer: str = ""
    decoder_features: bool = False


def contrastive(base: type) -> type:
    """Contrastive flow matching (Stoica et al. 2025, https://arxiv.org/abs/2506.05350): ‖v̂ − v‖² − 0.05 · ‖v̂ − v⁻‖², v⁻ the
    target of another sample of the batch."""

    class Contrastive(base):
        def _flow_matching(self, output, target, masks, valid):
            own = super()._flow_matching(output, target, masks, valid)
            return own - 0.05 * super()._flow_matching(output, target.roll(1, 0), masks, valid)

    return Contrastive


def preference(base: type) -> type:
    """Flow matching and Flow-DPO (Liu et al. 2025, https://arxiv.org/abs/2501.13918) with an overlay as the loser:
    −log σ(−β/2 · [(e_w − e_w,ref) − (e_l − e_l,ref)]), e = ‖v̂ − v‖² at one noise and noise level, β = 10; the reference is the
    model without the LoRA."""

    class Preference(base):
        beta = 10.0

        def _pass(self, number):
            from_core = self.core
            settings, batch = self.settings, self._batch(number)
            generator = from_core.generator_for(settings.seed, "training", number)
            winner, before = self.prepared.after(batch), self.prepared.before(batch)
            (name,) = self.prepared.encoders
            overlays = self.prepared.embeddings(batch).get("overlay", name)
            pick = torch.randint(overlays.shape[1], (len(batch),), generator=generator)
            raw = overlays[torch.arange(len(batch)), pick].movedim(-1, 1)
            loser = self.prepared.vae.scaled(raw)
            t = settings.timesteps.draw(len(batch), 0.0, generator)
            noise = torch.randn(winner.shape, generator=generator)
            both, twice, levels = torch.cat([winner, loser]), torch.cat([noise, noise]), torch.cat([t, t])
            x_t, references = from_core.add_noise(both, twice, levels), [torch.cat([before, before])]
            conditioning = 2 * [self.conditioning[i] for i in batch]
            predicted = self.denoiser(x_t, levels, references, conditioning)
            with torch.no_grad(), self.lora.disabled():
                reference = self.denoiser(x_t, levels, references, conditioning)
            masks, valid = self._regions(batch + batch)

            def losses(output: Tensor, *whole: object) -> list:
                error = self._flow_matching(output, twice - both, masks, valid)
                base = self._flow_matching(reference, twice - both, masks, valid)
                won, lost = (error - base).chunk(2)
                chosen = -torch.nn.functional.logsigmoid(-0.5 * self.beta * (won - lost))
                plain = error.chunk(2)[0]
                return [
                    from_core.Part(from_core.VELOCITY, plain, plain),
                    from_core.Part("preference", chosen, chosen),
                ]

            return self._learn(predicted, losses, batch, t, measured=False, acts=False)

    return Preference


ROLLOUTS = {"estimate": "rollout", "objective_every": 4, "rollout_steps": 8}
REGRESSION = {**ROLLOUTS, "rollout_regression": 2.0}
SHARES = {"weights": "shares", "gradients_every": 10}
RECIPE_TRAINING = {**REGRESSION, **SHARES, "pair_weights": "reach"}


def arms(objective: Any) -> dict[str, Arm]:
    """Every arm by its name; ``objective``: the core's package."""

    def three(encoder: str) -> tuple:
        return objective.on_rollouts(encoder).terms

    def one(k: int) -> Callable[[str], tuple]:
        return lambda encoder: (three(encoder)[k],)

    def mixed(encoder: str) -> tuple:
        return tuple(replace(t, weight=4 * t.weight) for t in objective.recommended(encoder).terms)

    def attract(encoder: str) -> tuple:
        return (objective.LossTerm("geometry_match", encoder, weight=0.3, dist="l2", token_weights="none"),)

    found = {
        PLAIN: Arm("the velocity loss alone"),
        LONGER: Arm("with as many more steps as the recipe takes more time", longer=RECIPE),
        "edit region × 4": Arm("the velocity loss counts the edit region four times", {"edit_weight": 4.0}),
        "attract-only features": Arm(
            "squared distance of the VAE decoder's features of the one-step estimate, all noise levels alike, as ai-toolkit's "
            "feature extractors do it; a share of 0.3",
            {**SHARES, "estimate_weighting": "inverse_square"},
            attract,
            decoder_features=True,
        ),
        "contrastive flow matching": Arm("ΔFM, λ = 0.05", trainer=contrastive),
        "Flow-DPO": Arm("flow matching and DPO with an overlay as the loser, β = 10", trainer=preference),
        "one-step losses × 4": Arm("the recommended mix of before on the one-step estimate, weights × 4, at all noise levels", {"pushes_t_max": 1.0}, mixed),
        "regression on rollouts": Arm("no losses: every 4th step, 8-step schedule, weight 2", REGRESSION),
        "losses on rollouts": Arm("the three task losses, 0.1 each, in place of the regression", {**ROLLOUTS, **SHARES}, three),
        "pair weights": Arm("flow matching with the losses as judges of the pairs alone", {"pair_weights": "reach"},
                            lambda encoder: tuple(replace(t, weight=0.0) for t in three(encoder))),
        RECIPE: Arm("regression and the three task losses on rollouts, shares of 0.1, pair weights", RECIPE_TRAINING, three),
        **{
            f"only {name}": Arm("one task loss on rollouts, no regression" + ("" if k == 1 else ", and its pair weights"),
                                {**ROLLOUTS, **SHARES, **({} if k == 1 else {"pair_weights": "reach"})}, one(k))
            for k, name in enumerate(("no-edit identity", "geometry match", "overlay avoidance"))
        },
    }  # fmt: skip
    return found
