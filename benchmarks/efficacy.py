"""Does an objective lower the failure rates? Plain flow matching against it, at the demo's budget, judged without an encoder.

    python benchmarks/efficacy.py --comfyui PATH --seeds 3

Every configuration starts from the embedded model, sees the same pairs, noise and number of steps, and is judged in rooms
that none has seen, from what was drawn (editloss_core/demo/judge.py). Writes benchmarks/results/efficacy.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from in_comfyui import ROOT, start

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
    return training, {"rank": rank, "alpha": alpha, "layers": layers}, {"count": found["EditLossDemoPairs"][0]}


def main() -> None:
    args = parser.parse_args()
    pack = start(args.comfyui)
    demo, denoisers, models = pack("nodes.demo"), pack("nodes.comfy_denoiser"), pack("nodes.comfy_model")
    scenes, judge = pack("editloss_core.demo.scenes"), pack("editloss_core.demo.judge")
    objectives, negatives = pack("editloss_core.objective"), pack("editloss_core.negatives")
    flow, lora, prepare = (pack(f"editloss_core.training.{n}") for n in ("flow", "lora", "prepare"))
    settings, trainer = pack("editloss_core.training.settings"), pack("editloss_core.training.trainer")
    import comfy.sd

    training, size, pairs = demo_settings(json.loads((ROOT / "workflows" / "train_demo.json").read_text("utf-8")))
    training.update({k: json.loads(v) for k, v in (item.split("=", 1) for item in args.set)})
    vae = comfy.sd.VAE(sd=demo.model.load_autoencoder())
    clip = demo.SmallTextEncoder()
    encoder = models.vae_encoder(vae)
    name = encoder.info.name
    mix = objectives.recommended(name)
    kinds = {t.kind: t for t in mix.terms}
    configurations = {
        "flow matching": None,
        "recommended mix": mix,
        "recommended mix × 2": objectives.EditObjective(tuple(replace(t, weight=2 * t.weight) for t in mix.terms)),
        **{f"only {t.name}": objectives.EditObjective((t,)) for t in kinds.values()},
    }
    if args.only:
        configurations = {k: v for k, v in configurations.items() if k in [o.strip() for o in args.only.split(",")]}
    verdicts = {"base": [], **{k: [] for k in configurations}}
    seconds = {k: [] for k in configurations}
    for seed in range(args.seeds):
        train = demo.pair_set(scenes.stool_pairs(pairs["count"], seed))
        rooms = scenes.stool_pairs(args.rooms, 2 * demo.HELD_OUT_SEED + seed)
        conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(p.caption)) for p in train]
        patcher = demo.small_flux()
        verdicts["base"] += judge.judge(demo.edit(patcher, clip, vae, rooms, 10, seed), rooms)
        latents = models.vae_encoder(vae, 0, patcher.model.latent_format)
        overlay = negatives.OverlaySettings()
        prepared = prepare.prepare(train, latents, {name: encoder}, overlay=overlay)
        for label, objective in configurations.items():
            denoiser = denoisers.ComfyDenoiser(patcher, 1.0, False)
            made = lora.LoRA(denoiser.module, lora.LoRASettings(**size), seed)
            run = trainer.Trainer(
                denoiser, made, prepared, conditioning,
                settings.TrainingSettings(seed=seed, gradients_every=0, validate_every=0, **training),
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
        f"{args.seeds} runs of each configuration with {pairs['count']} pairs, {training['steps']} steps, batch "
        f"{training['batch_size']}, learning rate {training['learning_rate']:g}, rank {size['rank']}; {args.rooms} rooms a run. "
        f"Encoder of the losses: VAE latents. torch {torch.__version__}, CPU, {torch.get_num_threads()} threads.",
        "",
        judge.table(verdicts),
        "",
        "| configuration | seconds a run, against flow matching |",
        "|---|---|",
        *(f"| {k} | {sum(v) / len(v) / (sum(seconds['flow matching']) / len(seconds['flow matching'])):.2f} × |"
          for k, v in seconds.items() if seconds.get("flow matching")),
    ]  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
