"""One run of the experiment: train an arm from a seed, and judge what it makes of rooms that it has not seen."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import arms
import torch

DATA = {  # name → (pairs as Demo Pairs gives them, what is done with flawed ones)
    "right": ({"count": 12, "unedited": 0, "overlaid": 0}, "keep"),
    "flawed kept": ({"count": 12, "unedited": 2, "overlaid": 2}, "keep"),
    "flawed left out": ({"count": 12, "unedited": 2, "overlaid": 2}, "leave out"),
}
SETTINGS = {
    "learning_rate": 0.008, "batch_size": 6, "warmup": 10, "schedule": "cosine", "clip": 1.0, "weight_decay": 0.01,
    "gradients_every": 0, "validate_every": 0, "self_check": False,
}  # fmt: skip
LORA = {"rank": 16, "alpha": 16.0, "layers": "all"}
POINTS = 4  # of the curves; all but the last with an eighth of the rooms
SAMPLING = 10  # steps


@dataclass(frozen=True)
class Job:
    """What makes a run; equal jobs give equal results on one machine."""

    arm: str
    data: str
    variants: int
    steps: int
    seed: int
    rooms: int

    @property
    def name(self) -> str:
        plain = "".join(c if c.isalnum() else "_" for c in self.arm)
        return f"{plain}-{self.data.replace(' ', '_')}-{self.variants}-{self.steps}-{self.seed}"


class Lab:
    """The pack in a ComfyUI, and the demo's model; made once per process.

    Args:
        pack: imports the pack's modules.
        cache: folder of latents and embeddings, which all arms share.
    """

    def __init__(self, pack: Callable[[str], Any], cache: Path):
        self.cache = cache
        self.demo, self.pairs = pack("nodes.demo"), pack("nodes.pairs")
        self.denoisers, self.encoders = pack("nodes.comfy.denoiser"), pack("nodes.comfy.encoders")
        self.scenes, self.judge = pack("editloss_core.demo.scenes"), pack("editloss_core.demo.judge")
        self.objective, self.negatives = pack("editloss_core.objective"), pack("editloss_core.negatives")
        self.core_pairs, self.prepare = pack("editloss_core.pairs"), pack("editloss_core.training.prepare")
        self.lora, self.settings = pack("editloss_core.lora.lora"), pack("editloss_core.training.settings")
        self.trainer, self.host = pack("editloss_core.training.trainer"), pack("editloss_core.training.host")
        flow, gradients, log = (pack(f"editloss_core.{m}") for m in ("training.flow", "training.gradients", "runs.log"))
        self.core = SimpleNamespace(
            generator_for=flow.generator_for, add_noise=flow.add_noise, Part=gradients.Part, VELOCITY=log.VELOCITY
        )
        self.arms = arms.arms(self.objective)

    def run(self, job: Job, cost: float = 1.0) -> dict[str, Any]:
        """The result as plain values.

        Args:
            cost: of a step of the arm whose time a ``longer`` arm gets, beside a plain one's.
        """
        arm = self.arms[job.arm]
        counts, flawed = DATA[job.data]
        vae, clip = self.demo.small_vae(), self.demo.SmallTextEncoder()
        patcher = self.demo.small_flux()
        rooms = self.scenes.stool_pairs(job.rooms, 2 * self.demo.HELD_OUT_SEED + job.seed)
        pairs = self.demo.pair_set(self.demo.training_pairs(**counts, seed=job.seed))
        pairs = self.pairs.without_flawed(pairs, flawed).pairs
        if job.variants:
            pairs = self.core_pairs.with_variants(pairs, self.core_pairs.VariantSettings(job.variants))
        conditioning = {c: clip.encode_from_tokens_scheduled(clip.tokenize(c)) for c in {p.caption for p in pairs}}
        encoder = self._encoder(arm, vae)
        name = encoder.info.name
        objective = self.objective.EditObjective(arm.terms(name)) if arm.terms else None
        reads = {name: encoder} if arm.terms or arm.trainer is not Arm.trainer else {}
        latents = self.encoders.vae_encoder(vae, 0, patcher.model.latent_format)
        prepared = self.prepare.prepare(
            pairs, latents, reads, self.cache, overlay=self.negatives.OverlaySettings() if reads else None
        )
        denoiser = self.denoisers.ComfyDenoiser(patcher, 1.0, False)
        made = self.lora.LoRA(denoiser.module, self.lora.LoRASettings(**LORA), job.seed)
        steps = round(cost * job.steps) if arm.longer else job.steps
        chosen = {**SETTINGS, "steps": steps, "seed": job.seed, **arm.training}
        curve, spent = [], Spent(self.host.Host)
        run = arm.trainer(self.trainer.Trainer)(
            denoiser, made, prepared, [conditioning[p.caption] for p in pairs], self.settings.TrainingSettings(**chosen),
            objective=objective, encoders=reads, host=spent.host,
        )  # fmt: skip
        run.core = self.core

        def look(examples: list) -> list:
            made.attach()
            return self.judge.judge(self.demo.edit(patcher, clip, vae, examples, SAMPLING, job.seed), examples)

        def point() -> None:
            if run.step < steps and run.step % max(1, steps // POINTS) == 0:
                found = look(rooms[: -(-job.rooms // 8)])
                good = sum(v.verdict == "good" for v in found) / len(found)
                curve.append([run.step, spent.seconds, good])

        spent.after = point
        spent.begin()
        run.run()
        found = look(rooms)
        made.detach()
        good = sum(v.verdict == "good" for v in found) / len(found)
        return {
            **asdict(job), "trained": steps, "seconds": spent.seconds, "curve": [*curve, [steps, spent.seconds, good]],
            "verdicts": [asdict(v) for v in found], "notes": run.notes,
        }  # fmt: skip

    def _encoder(self, arm: arms.Arm, vae: Any) -> Any:
        if arm.decoder_features:
            return self.encoders.ManagedVAEDecoder(vae)
        return self.encoders.vae_encoder(vae)

    def base(self, seed: int, rooms: int) -> list[dict[str, Any]]:
        """Verdicts of the model before any training."""
        examples = self.scenes.stool_pairs(rooms, 2 * self.demo.HELD_OUT_SEED + seed)
        parts = self.demo.small_flux(), self.demo.SmallTextEncoder(), self.demo.small_vae()
        return [asdict(v) for v in self.judge.judge(self.demo.edit(*parts, examples, SAMPLING, seed), examples)]


class Spent:
    """Processor seconds of the steps alone: of one thread, they do not depend on what else the machine does."""

    def __init__(self, host: type):
        self.seconds, self._last, self.after = 0.0, 0.0, lambda: None
        spent = self

        class Counting(host):
            def on_step(self, log, total):
                spent.seconds += time.process_time() - spent._last
                spent.after()
                spent.begin()

        self.host = Counting()

    def begin(self) -> None:
        self._last = time.process_time()


Arm = arms.Arm
torch.set_num_threads(1)
