"""Does an objective lower the failure rates? Plain flow matching against it, at the demo's budget, judged without an encoder.

    python benchmarks/efficacy.py --comfyui PATH --seeds 3

Every configuration starts from the embedded model, sees the same pairs, noise and number of steps, and is judged in rooms
that none has seen, from what was drawn (editloss_core/demo/judge.py). "(edit region × 4)" is flow matching that weighs the
edit region more, which needs no objective: what an objective has to beat. Writes benchmarks/results/efficacy.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from in_comfyui import ROOT, start

PLAIN = "flow matching"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--comfyui", default="", help="ComfyUI's folder (default: COMFYUI_PATH)")
parser.add_argument(
    "--seeds", type=int, default=3, help="runs of each configuration, with other rooms and noise (default: 3)"
)
parser.add_argument("--rooms", type=int, default=64, help="held-out rooms per run (default: 64)")
parser.add_argument("--only", default="", help="comma-separated configurations")
parser.add_argument(
    "--set", action="append", default=[], metavar="NAME=VALUE", help="a training setting other than the demo's"
)
parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "efficacy.md")


def demo_settings(workflow: dict) -> tuple[dict, dict, dict]:
    """(Train Kontext LoRA's, Optimizer Options', Objective Options' widgets) of workflows/train_demo.json."""
    found = {n["type"]: n.get("widgets_values") for n in workflow["nodes"]}
    name, steps, rate, batch, rank, alpha, layers, *_ = found["EditLossTrainKontextLoRA"]
    optimizer, accumulation, warmup, schedule, clip, decay, ema = found["EditLossOptimizerOptions"]
    training = {
        "steps": steps, "learning_rate": rate, "batch_size": batch, "optimizer": optimizer, "accumulation": accumulation,
        "warmup": warmup, "schedule": schedule, "clip": clip, "weight_decay": decay, "ema": ema,
    }  # fmt: skip
    return (
        training,
        {"rank": rank, "alpha": alpha, "layers": layers},
        dict(zip(("count", "unedited", "overlaid"), found["EditLossDemoPairs"])),
    )


def against(plain: str, verdicts: dict[str, list], seconds: dict[str, list[float]]) -> list[str]:
    """Room by room: how often one of two runs alone is good, and by what chance so uneven a split would come (sign test)."""
    lines = [
        "",
        f"Against {plain}, in the same rooms and from the same noise; p is that of a two-sided sign test:",
        "",
        f"| configuration | good only here | good only with {plain} | p | progress | seconds |",
        "|---|---|---|---|---|---|",
    ]
    mean = {k: sum(v.progress for v in found) / len(found) for k, found in verdicts.items()}
    for label in seconds:
        pairs = [(a.verdict == "good", b.verdict == "good") for a, b in zip(verdicts[label], verdicts[plain])]
        here, there = pairs.count((True, False)), pairs.count((False, True))
        tail = sum(math.comb(here + there, k) for k in range(min(here, there) + 1)) / 2 ** (here + there)
        time = sum(seconds[label]) / sum(seconds[plain])
        lines.append(
            f"| {label} | {here} | {there} | {min(1.0, 2 * tail):.2g} | {mean[label] - mean[plain]:+.3f} | {time:.2f} × |"
        )
    return lines


def main() -> None:
    args = parser.parse_args()
    pack = start(args.comfyui)
    demo, denoisers, models = pack("nodes.demo"), pack("nodes.comfy.denoiser"), pack("nodes.comfy.encoders")
    scenes, judge = pack("editloss_core.demo.scenes"), pack("editloss_core.demo.judge")
    objectives, negatives = pack("editloss_core.objective"), pack("editloss_core.negatives")
    prepare = pack("editloss_core.training.prepare")
    lora = pack("editloss_core.lora.lora")
    settings, trainer = pack("editloss_core.training.settings"), pack("editloss_core.training.trainer")

    training, size, pairs = demo_settings(json.loads((ROOT / "workflows" / "train_demo.json").read_text("utf-8")))
    training.update({k: json.loads(v) for k, v in (item.split("=", 1) for item in args.set)})
    vae = demo.small_vae()
    clip = demo.SmallTextEncoder()
    encoder = models.vae_encoder(vae)
    name = encoder.info.name
    mix = objectives.recommended(name)

    def times(factor: float, *terms):
        return objectives.EditObjective(tuple(replace(t, weight=factor * t.weight) for t in terms))

    configurations = {
        PLAIN: (None, {}),
        "flow matching (edit region × 4)": (None, {"edit_weight": 4.0}),
        "recommended mix": (mix, {}),
        **{f"recommended mix × {k}": (times(k, *mix.terms), {}) for k in (4, 12)},
        **{f"only {t.name} × 12": (times(12, t), {}) for t in mix.terms},
    }
    if args.only:
        configurations = {k: v for k, v in configurations.items() if k in [o.strip() for o in args.only.split(",")]}
    verdicts = {"base": [], **{k: [] for k in configurations}}
    seconds = {k: [] for k in configurations}
    for seed in range(args.seeds):
        train = demo.pair_set(demo.training_pairs(**pairs, seed=seed))
        rooms = scenes.stool_pairs(args.rooms, 2 * demo.HELD_OUT_SEED + seed)
        conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(p.caption)) for p in train]
        patcher = demo.small_flux()
        verdicts["base"] += judge.judge(demo.edit(patcher, clip, vae, rooms, 10, seed), rooms)
        latents = models.vae_encoder(vae, 0, patcher.model.latent_format)
        overlay = negatives.OverlaySettings()
        prepared = prepare.prepare(train, latents, {name: encoder}, overlay=overlay)
        for label, (objective, other) in configurations.items():
            denoiser = denoisers.ComfyDenoiser(patcher, 1.0, False)
            made = lora.LoRA(denoiser.module, lora.LoRASettings(**size), seed)
            run = trainer.Trainer(
                denoiser, made, prepared, conditioning,
                settings.TrainingSettings(**{"seed": seed, "gradients_every": 0, "validate_every": 0, **training, **other}),
                objective=objective, encoders={name: encoder},
            )  # fmt: skip
            began = time.perf_counter()
            run.run()
            seconds[label].append(time.perf_counter() - began)
            made.attach()
            found = judge.judge(demo.edit(patcher, clip, vae, rooms, 10, seed), rooms)
            made.detach()
            verdicts[label] += found
            print(
                judge.table({f"{label}, seed {seed} ({seconds[label][-1]:.0f} s)": found}).splitlines()[-1], flush=True
            )
    lines = [
        "# Failure rates in held-out rooms",
        "",
        f"{args.seeds} runs of each configuration with {pairs['count']} right pairs, {pairs['unedited']} unedited and "
        f"{pairs['overlaid']} overlaid ones, {training['steps']} steps, batch "
        f"{training['batch_size']}, learning rate {training['learning_rate']:g}, rank {size['rank']}; {args.rooms} rooms a run. "
        f"Encoder of the losses: VAE latents. torch {torch.__version__}, CPU, {torch.get_num_threads()} threads.",
        "",
        judge.table(verdicts),
        *(against(PLAIN, verdicts, seconds) if PLAIN in verdicts else ()),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
