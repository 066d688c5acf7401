"""One process and two on this machine: time of a training step, bytes that a step exchanges, pictures encoded per second.

    python benchmarks/processes.py

The step is that of :class:`Trainer` on a small transformer with random weights (reference tokens beside those of x_t, as Kontext
has them), with the recommended mix and InfoNCE against the batch on latents. One and two processes (torchrun, gloo on loopback) take
turns on the same batches of --batch pairs, one thread each; the losses they log must agree to rounding. Processor time is that of
all threads of all processes together, which other work on the machine hardly changes; wall time it does. Bytes are counted where they
are handed to the process group. Embeddings are made by ``python -m editloss_core.embeddings`` on generated pictures. Needs the extra
"train". Writes benchmarks/results/processes.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from load import add_switch, busy, told
from PIL import Image
from step_tools import machine
from torch import nn

from editloss_core.embeddings import INDEX
from editloss_core.encoders.base import freeze
from editloss_core.encoders.vae import VAEEncoder
from editloss_core.hashing import hash_module
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.kontext import KONTEXT
from editloss_core.negatives import OverlaySettings
from editloss_core.objective import LossTerm, recommended
from editloss_core.pairs import PairSet
from editloss_core.processes import Processes, leave
from editloss_core.training.host import Host
from editloss_core.training.prepare import prepare
from editloss_core.training.settings import TrainingSettings
from editloss_core.training.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results"
ENCODER = "timm:tf_efficientnet_lite0,random_seed=0,output=grid,image_size=224"
WARM_UP = 2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch", type=int, default=8, help="pairs of a step, all processes together (default: 8)")
parser.add_argument("--steps", type=int, default=10, help="counted steps of a run (default: 10)")
parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
parser.add_argument("--width", type=int, default=192, help="of the transformer (default: 192)")
parser.add_argument("--blocks", type=int, default=4, help="of the transformer (default: 4)")
parser.add_argument("--rank", type=int, default=16, help="of the LoRA (default: 16)")
parser.add_argument("--pixels", type=int, default=96, help="side of the pictures (default: 96)")
parser.add_argument("--pairs", type=int, default=128, help="that are encoded (default: 128)")
add_switch(parser)
parser.add_argument("--worker", default="", help=argparse.SUPPRESS)


class Transformer(nn.Module):
    """Tokens of x_t and of the reference, and one for t → velocity at the first ones."""

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()
        self.embed, self.time, self.out = nn.Linear(channels, width), nn.Linear(1, width), nn.Linear(width, channels)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )

    def forward(self, x, reference, t):
        tokens = torch.cat([self.embed(x), self.embed(reference), self.time(t[:, None, None])], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens[:, : x.shape[1]])


class Small:
    """:class:`Transformer` as a Denoiser."""

    edit_model = KONTEXT  # whose schedule it is sampled on

    def __init__(self, channels: int, width: int, blocks: int):
        torch.manual_seed(0)
        self.module, self.device = (
            freeze(Transformer(channels, width, blocks), torch.device("cpu")),
            torch.device("cpu"),
        )

    def __call__(self, x_t, t, references, conditioning):
        tokens = [z.flatten(2).transpose(1, 2) for z in (x_t, references[0])]
        return self.module(*tokens, t).transpose(1, 2).reshape(x_t.shape)


class Counting(Processes):
    """Counts what each process hands over."""

    def __init__(self, accelerator):
        super().__init__(accelerator)
        self.sent: dict[str, int] = {}

    def _count(self, what: str, tensors) -> None:
        self.sent[what] = self.sent.get(what, 0) + sum(t.nbytes for t in tensors)

    def whole_of_each(self, own, total):
        self._count("embeddings" if own[0].ndim > 2 else "losses", own)
        return super().whole_of_each(own, total)

    def add_up(self, tensors):
        self._count("gradients", tensors)
        return super().add_up(tensors)


class Clock(Host):
    """Processor time at the end of each step."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step(self, log, total):
        self.ends.append(time.process_time())


def generated(count: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before, after and mask: noise of 8-pixel cells, in the after picture another one in a square."""
    g = torch.Generator().manual_seed(0)
    cells = torch.rand(2, count, pixels // 8, pixels // 8, 3, generator=g)
    before, other = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    mask = torch.zeros(count, pixels, pixels)
    mask[:, pixels // 4 : pixels // 2, pixels // 4 : pixels // 2] = 1.0
    return before, torch.where(mask[..., None] > 0, other, before), mask


def work(options: argparse.Namespace) -> None:
    """A run of one of the processes; process 0 writes what it found to ``options.worker``."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    before, after, mask = generated(4 * options.batch, options.pixels)
    pairs = PairSet.from_images(before, after, mask, "replace the square")
    torch.manual_seed(0)
    encode = freeze(nn.Conv2d(3, 16, 8, stride=8), torch.device("cpu"))
    vae = VAEEncoder(encode, "vae/random", hash_module(encode), 8)
    prepared = prepare(pairs, vae, {vae.info.name: vae}, overlay=OverlaySettings(kinds=("blend",)))
    objective = recommended(vae.info.name).with_term(LossTerm("info_nce", vae.info.name, weight=0.1))
    denoiser = Small(16, options.width, options.blocks)
    # torch's own attention has no linear layer to hook but its output: those of the MLP, and embedders and last layer
    lora = LoRA(denoiser.module, LoRASettings(rank=options.rank, layers="all, -*self_attn*"), seed=0)
    settings = TrainingSettings(
        steps=WARM_UP + options.steps, batch_size=options.batch, validate_every=0, checkpoint_every=0, gradients_every=0
    )
    clock = Clock()
    made = Trainer(
        denoiser, lora, prepared, [None] * len(prepared), settings, objective=objective, encoders={vae.info.name: vae},
        accelerator=accelerator, host=clock,
    )  # fmt: skip
    made.processes = made.objective.processes = counting = Counting(accelerator)
    result = made.run()
    processor = sum(counting.gather([clock.ends[-1] - clock.ends[WARM_UP - 1]])) / options.steps
    if accelerator.is_main_process:
        found = {
            "seconds": [step.seconds for step in result.log.steps[WARM_UP:]],
            "processor": processor,
            "losses": [step.loss for step in result.log.steps],
            "sent": {what: size / settings.steps for what, size in counting.sent.items()},
            "parameters": sum(p.numel() for p in denoiser.module.parameters()),
            "lora": sum(p.numel() for p in lora.parameters()),
            "tokens": 2 * (options.pixels // 8) ** 2 + 1,
        }
        Path(options.worker).write_text(json.dumps(found))


def launch(processes: int, *arguments: str) -> tuple[str, float]:
    """What a program in so many processes says, and the processor seconds that it takes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def steps(options: argparse.Namespace, folder: Path) -> dict[int, list[dict]]:
    found: dict[int, list[dict]] = {1: [], 2: []}
    own = [f"--{name}={getattr(options, name)}" for name in ("batch", "steps", "width", "blocks", "rank", "pixels")]
    for _ in range(options.rounds):
        for processes, runs in found.items():
            launch(processes, __file__, *own, f"--worker={folder / 'found.json'}")
            runs.append(json.loads((folder / "found.json").read_text()))
            if not all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-3), runs[-1]["losses"], found[1][0]["losses"])):
                raise SystemExit(f"{processes} processes log other losses: {runs[-1]['losses']}")
    return found


def throughput(options: argparse.Namespace, folder: Path) -> dict[int, list[tuple[float, float]]]:
    """Pictures per second and per second of processor time, by number of processes."""
    before, after, _ = generated(options.pairs, 256)
    for part, pictures in (("before", before), ("after", after)):
        (folder / "pairs" / part).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray((picture * 255).byte().numpy()).save(folder / "pairs" / part / f"{i}.jpg", quality=90)
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: [], 3: []}
    for k in range(options.rounds):
        for processes, rates in found.items():
            out = folder / f"{processes}_{k}"
            command = ["-m", "editloss_core.embeddings", str(folder / "pairs"), "--encoder", ENCODER, "--out", str(out)]
            command += ["--shard-pairs", "16", "--resolution", "256"]
            said, whole = launch(processes, *command)
            _, start_up = launch(processes, *command)  # all is there: what is left is start-up and reading the folder
            rate = float(re.search(r"([\d.]+) pictures/s[ ;]", said.rpartition("pictures in")[2])[1])
            rates.append((rate, 2 * options.pairs / (whole - start_up)))
            assert (out / INDEX).is_file()
    return found


def spread(values: list[float], unit: str = "", digits: int = 3) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def beside(one: list[float], two: list[float]) -> str:
    return spread([b / a for a, b in zip(one, two)], " ×", 2)


def main() -> None:
    options = parser.parse_args()
    if options.worker:
        work(options)
        leave(0)
    torch.set_num_threads(1)
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name, busy(options.load):
        folder = Path(name)
        found = steps(options, folder)
        load.append(os.getloadavg()[0])
        rates = throughput(options, folder)
        others = told(options.load)
    load.append(os.getloadavg()[0])
    one, two = ([statistics.median(run["seconds"]) for run in found[n]] for n in (1, 2))
    processor = {n: [run["processor"] for run in found[n]] for n in (1, 2)}
    first, sent = found[1][0], found[2][0]["sent"]
    lines = [
        "# Several processes",
        "",
        f"{machine(torch.device('cpu'))} per process; gloo on loopback; `{' '.join(['python benchmarks/processes.py', *sys.argv[1:]])}`; {others}. Load "
        f"average before, between and after the two parts: {', '.join(f'{v:.1f}' for v in load)}. Where it is above the number of "
        "processes that were started, other work ran, and more processes get more of the machine: then the columns of processor time "
        "tell, and those of wall time do not.",
        "",
        "## Measured",
        "",
        f"A step on {options.batch} pairs, {first['tokens']} tokens each, a transformer of {first['parameters'] / 1e6:.1f} M "
        f"parameters in fp32, a LoRA of {first['lora'] / 1e6:.2f} M; median of {options.rounds} runs of {options.steps} steps that "
        "take turns (lowest to highest run). Losses of all runs agree to rounding.",
        "",
        "| processes | pairs in each | seconds a step | beside one process | processor seconds of all | beside one process |",
        "|---|---|---|---|---|---|",
        f"| 1 | {options.batch} | {spread(one)} | 1 | {spread(processor[1])} | 1 |",
        f"| 2 | {-(-options.batch // 2)} | {spread(two)} | {beside(one, two)} | {spread(processor[2])} | {beside(*processor.values())} |",
        "",
        "Bytes that each of two processes hands over in a step:",
        "",
        "| what | bytes | how often |",
        "|---|---|---|",
        f"| gradients of the LoRA, summed | {sent['gradients']:,.0f} | once a step |",
        f"| embeddings of terms that look across the batch, gathered | {sent.get('embeddings', 0):,.0f} | each pass |",
        f"| losses and flags of one's own samples, gathered | {sent['losses']:,.0f} | each pass |",
        "",
        f"Embeddings of {2 * options.pairs} pictures of 256² (JPEG) by tf_efficientnet_lite0 at 224², one thread a process, in shards "
        "of 16 pairs; start-up not counted. Reading has a thread of its own in each process.",
        "",
        "| processes | pictures a second | pictures a second of processor time |",
        "|---|---|---|",
        *(
            f"| {n} | {spread([v for v, _ in values], digits=1)} | {spread([v for _, v in values], digits=1)} |"
            for n, values in rates.items()
        ),
        "",
    ]
    (RESULTS / "processes.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
