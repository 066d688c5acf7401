"""What the demo's base model can do in rooms that it has not seen: ``python benchmarks/demo_model/measure.py --comfyui PATH``.

One process, one thread, some four minutes; writes benchmarks/results/demo_model.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch
from train_small_kontext import build, held_out, judged

from editloss_core.demo.judge import Verdict, table
from editloss_core.demo.model import AUTOENCODER, DIFFUSION, Autoencoder, load_autoencoder, load_diffusion
from editloss_core.demo.scenes import TASKS, stool_pairs

RESULTS = Path(__file__).resolve().parents[1] / "results" / "demo_model.md"
ROOMS_OF_SEED = 999  # of stool pairs: neither training nor the demo takes them


def sharpness(answers: list[Verdict], trips: list[Verdict]) -> float:
    """Mean detail of answers beside that of round trips: 1 where they are as sharp."""
    return fmean(v.detail for v in answers) / fmean(v.detail for v in trips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI, for its Flux class")
    parser.add_argument("--diffusion", type=Path, default=DIFFUSION, help="weights to measure")
    parser.add_argument("--count", type=int, default=100, help="rooms per task")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = build(options.comfyui)
    own = {name.removesuffix("norm.weight"): name for name in network.state_dict() if name.endswith("norm.weight")}
    weights = load_diffusion(options.diffusion)
    network.load_state_dict({own.get(name.removesuffix("norm.scale"), name): value for name, value in weights.items()})
    autoencoder = Autoencoder(whole=True)
    autoencoder.load_state_dict(load_autoencoder())
    rows, sharp = {}, {}
    for task in (*TASKS, "seat"):
        answers, trips = judged(network, autoencoder, held_out(task, options.count))
        rows[task], rows[f"{task}: round trip of the target"] = answers, trips
        sharp[task] = sharpness(answers, trips)
        print(table({task: answers}), f"sharpness {sharp[task]:.2f}", sep="\n", flush=True)
    rows["my stool, before any training"], _ = judged(network, autoencoder, stool_pairs(options.count, ROOMS_OF_SEED))
    megabytes = sum(path.stat().st_size for path in (options.diffusion, AUTOENCODER)) / 1e6
    text = "\n".join([
        "# The demo's base model", "",
        f"Written by `benchmarks/demo_model/measure.py`: {options.count} rooms a task that training did not see, 10 steps of "
        f"Euler. Both files together: {megabytes:.1f} MB.", "",
        table(rows), "",
        "Sharpness (`detail` of the answers divided by that of the targets' round trips; 1: as sharp): "
        + ", ".join(f"{task} {value:.2f}" for task, value in sharp.items()) + ".", "",
    ])  # fmt: skip
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
