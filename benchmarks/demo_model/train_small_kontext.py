"""Makes the weights of the embedded default model: ``python benchmarks/demo_model/train_small_kontext.py --comfyui PATH --work FOLDER``.

Everything is seeded. It draws 5,000 groups of ten pictures (two minutes), works out the encoder, trains the decoder (2,000
steps, six minutes on one core) and then the Flux in five cycles of the learning rate (33,457 steps of 32 edits, 0.4 to 0.65 s
each on two CPU cores: five hours). The first two cycles know objects alone, the others seats drawn from parameters as well.
The files in the repository come from such runs; the learning rate of the first two followed the clock, in steps that is
the schedule below. Bit for bit the result depends on the machine and on the number of processes. The Flux goes on where its
last checkpoint in FOLDER ends. The stool is in none of the tasks, nor is any seat of its shape with two of its colours.

What was measured on the way, on two cores:

* On a machine shared with others, two processes of one thread that average their gradients take 0.4 to 1.1 s a step of 32,
  one process of two threads 1 to 2 s: at width 128 the operations are small, and threads wait for each other.
* torch.compile had not finished its first step after three minutes.
* Latents from principal components, halfway to equal variance, leave nothing to wait for: the Flux starts at once.
* Muon for the blocks' matrices (not compared with AdamW): after 500 steps the right object stands in the right place.
* Loss 0.56 at step 1,000, 0.36 at 3,500, 0.27 at 6,115, 0.34 after the restart, 0.21 at the end. Good outputs of 32
  held-out scenes a task after the first and after the second cycle: replace 56 and 94 %, remove 84 and 97 %, recolour 94
  and 100 %. What fell short between were soft outlines.
* Seats, which a word of the prompt describes part by part: 72, 91 and 97 % good after the third, fourth and fifth cycle, none
  before. Nearly all of the gain of a cycle comes where its learning rate falls. `measure.py` has all tasks in 100 rooms each.
* Round trip of held-out scenes: 29.2 dB after 700 steps of the decoder, 31.5 dB after 2,000.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Mapping, Optional, Sequence, Union

import numpy as np
import torch
import torch.distributed as dist
import train_autoencoder as codec
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from editloss_core.demo.drawing import COLOURS, OBJECTS, SIZE
from editloss_core.demo.judge import Verdict, judge, table
from editloss_core.demo.model import AUTOENCODER, DIFFUSION, Autoencoder, flux_config
from editloss_core.demo.prompts import encode
from editloss_core.demo.scenes import HELD_OUT, TASKS, Example, Scene, draw
from editloss_core.demo.seats import Seat, drawn_seat
from editloss_core.files import replacing
from editloss_core.training.out_of_place import OutOfPlace

LOG, LOG_FORMAT = logging.getLogger(__name__), "%(asctime)s %(message)s"
GROUPS, DECODER_STEPS, BATCH = 5_000, 2_000, 32
WARMUP = 100  # steps
IN_THE_MASK = 5.0  # weight of the velocity's error where before and after differ; 1 elsewhere

STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")  # of Muon and AdamW, by weight

# Pictures of a group: nothing, A, B and C in one colour, A and B in another, four seats. Any two of the first that share an
# object or a colour are an edit, and any object can become a seat: (before, after) by task.
OBJECT_PICTURES, SEATS = 6, 4
PICTURES = OBJECT_PICTURES + SEATS
PAIRS = {
    "replace": ((1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (4, 5), (5, 4)),
    "remove": ((1, 0), (2, 0), (3, 0), (4, 0), (5, 0)),
    "recolour": ((1, 4), (4, 1), (2, 5), (5, 2)),
    "keep": ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5)),
    "seat": tuple((i, j) for i in range(1, OBJECT_PICTURES) for j in range(OBJECT_PICTURES, PICTURES)),
}


@dataclass(frozen=True)
class Cycle:
    """Of the learning rate: constant for the first ``flat`` of the steps, then a cosine down to ``floor`` of it."""

    steps: int
    muon: float
    adam: float
    flat: float
    floor: float
    shares: tuple[float, ...]  # of the tasks, in the order of PAIRS

    def rate(self, step: int) -> float:
        late = max(0.0, (step / self.steps - self.flat) / (1 - self.flat))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * late))


CYCLES = (
    Cycle(6_115, 3e-3, 1e-3, 0.45, 0.02, (0.62, 0.16, 0.2, 0.02, 0.0)),
    Cycle(8_842, 2e-3, 8e-4, 0.3, 0.005, (0.74, 0.11, 0.13, 0.02, 0.0)),
    Cycle(7_000, 2e-3, 8e-4, 0.35, 0.005, (0.22, 0.08, 0.12, 0.02, 0.56)),
    Cycle(6_500, 2e-3, 8e-4, 0.2, 0.005, (0.22, 0.08, 0.1, 0.02, 0.58)),
    Cycle(5_000, 1.5e-3, 6e-4, 0.1, 0.005, (0.18, 0.07, 0.09, 0.02, 0.64)),
)


def group(seed: int) -> list[tuple[Union[str, Seat, None], str]]:
    """Object or seat, and colour of each picture of a scene's group."""
    rng = random.Random(f"group {seed}")
    a, b, c = rng.sample(OBJECTS, 3)
    one, other = rng.sample(list(COLOURS), 2)
    seats = [(drawn_seat(rng), one) for _ in range(SEATS)]
    return [(None, one), (a, one), (b, one), (c, one), (a, other), (b, other), *seats]


def prompt(task: str, before: tuple[str, str], after: tuple[Union[str, Seat, None], str]) -> str:
    return {
        "replace": f"replace the {before[0]} with a {after[0]}",
        "seat": f"replace the {before[0]} with a {after[0]}",
        "remove": f"remove the {before[0]}",
        "recolour": f"make the {before[0]} {after[1]}",
        "keep": f"keep the {before[0]}",
    }[task]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and latents
# ---------------------------------------------------------------------------------------------------------------------


def render(path: Path, groups: int) -> None:
    """Pictures of scenes 0…groups−1, uint8 ``[groups, PICTURES, H, W, 3]``."""
    with replacing(path) as temporary:
        pool = np.lib.format.open_memmap(temporary, "w+", np.uint8, (groups, PICTURES, SIZE, SIZE, 3))
        for seed in range(groups):
            scene = Scene(seed)
            for k, (name, colour) in enumerate(group(seed)):
                pool[seed, k] = (scene.picture(name, colour)[0] * 255).round().astype(np.uint8)
        pool.flush()


def write_latents(path: Path, pool: np.ndarray, model: Autoencoder) -> None:
    """Latents of all pictures in model space (fp16), and where each differs from its empty room, in latent cells."""
    latents = torch.empty(len(pool), PICTURES, 16, SIZE // 8, SIZE // 8, dtype=torch.float16)
    masks = torch.empty(len(pool), PICTURES, SIZE // 8, SIZE // 8, dtype=torch.uint8)
    for first in range(0, len(pool), 20):
        x = torch.from_numpy(np.ascontiguousarray(pool[first : first + 20])).float().div_(255)
        with torch.no_grad():
            latents[first : first + 20] = model.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).half()
        changed = (x - x[:, :1]).abs().amax(-1) > 0.04
        masks[first : first + 20] = changed.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).any(5).any(3)
    with replacing(path) as temporary:
        save_file({"latents": latents, "masks": masks}, temporary)


@dataclass
class Batch:
    before: Tensor  # latents [B, 16, h, w]
    after: Tensor
    mask: Tensor  # [B, 1, h, w], 1 where either object is
    context: Tensor
    pooled: Tensor


class Pool:
    """Latents and prompts of all edits."""

    def __init__(self, path: Path):
        stored = load_file(path)
        self.latents, self.masks = stored["latents"], stored["masks"]
        self.groups = [group(seed) for seed in range(len(self.latents))]

    def batch(self, rng: np.random.Generator, count: int, shares: Sequence[float]) -> Batch:
        rows = []
        for task in rng.choice(list(PAIRS), count, p=shares):
            g = int(rng.integers(len(self.groups) - codec.HELD_OUT_GROUPS))
            i, j = PAIRS[task][rng.integers(len(PAIRS[task]))]
            context, pooled = encode(prompt(task, self.groups[g][i], self.groups[g][j]))
            mask = (self.masks[g, i] | self.masks[g, j])[None].float()
            rows.append((self.latents[g, i].float(), self.latents[g, j].float(), mask, context[0], pooled[0]))
        return Batch(*(torch.stack(column) for column in zip(*rows)))


# ---------------------------------------------------------------------------------------------------------------------
# The Flux
# ---------------------------------------------------------------------------------------------------------------------


def build(comfyui: Path) -> nn.Module:
    """ComfyUI's Flux with fresh weights: modulations and output start at zero, so that every block starts as identity."""
    sys.path.insert(0, str(comfyui))
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]  # read when comfy is imported
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_base
    import comfy.model_management
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    comfy.model_management.in_training = True  # newer ones then run kernels that have a derivative
    config = comfy.supported_models.Flux(flux_config(FluxParams))
    config.set_inference_dtype(torch.float32, None)
    network = comfy.model_base.Flux(config).diffusion_model.float()
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if name.endswith(("_norm.scale", "_norm.weight")):  # older and newer name
            nn.init.ones_(p)
        elif p.ndim == 2 and not ("mod.lin" in name or "modulation" in name or name == "final_layer.linear.weight"):
            nn.init.xavier_uniform_(p)
        else:
            nn.init.zeros_(p)
    return network


@torch.no_grad()
def sample(
    network: nn.Module, before: Tensor, context: Tensor, pooled: Tensor, steps: int = 10, seed: int = 0
) -> Tensor:
    """Euler from noise to an edit, latents ``[B, 16, h, w]``."""
    x = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(1, 0, steps + 1)
    for t, end in zip(times[:-1], times[1:]):
        x = x + (end - t) * network(x, t.expand(len(x)), context, y=pooled, ref_latents=[before])
    return x


def edit(network: nn.Module, autoencoder: Autoencoder, examples: Sequence[Example], steps: int = 10) -> Tensor:
    """The network's answers to examples, ``[B, H, W, 3]``."""
    with torch.no_grad():
        before = autoencoder.encode(torch.stack([e.before for e in examples]))
        context, pooled = (torch.cat(parts) for parts in zip(*(encode(e.prompt) for e in examples)))
        return autoencoder.decode(sample(network, before, context, pooled, steps))


def held_out(task: str, count: int) -> list[Example]:
    """Scenes that were not trained on, with an edit of a task: one of ``TASKS``, or "seat"."""
    if task != "seat":
        return [draw(HELD_OUT + i, task) for i in range(count)]
    seats = random.Random("held-out seats")
    return [draw(HELD_OUT + i, "replace", target=drawn_seat(seats)) for i in range(count)]


def judged(
    network: nn.Module, autoencoder: Autoencoder, examples: Sequence[Example]
) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts of the network's answers, and of the round trips of what was asked for."""
    with torch.no_grad():
        trips = autoencoder.decode(autoencoder.encode(torch.stack([e.after for e in examples])))
    return judge(edit(network, autoencoder, examples), examples), judge(trips, examples)


def report(network: nn.Module, autoencoder: Autoencoder, count: int = 32) -> str:
    """The table of verdicts on held-out scenes, a row per task, between copies of the source and round trips of the target."""
    rows = {}
    for task in (*TASKS, "seat"):
        examples = held_out(task, count)
        rows[f"{task}: copy of the source"] = judge(torch.stack([e.before for e in examples]), examples)
        rows[f"{task}: model"], rows[f"{task}: round trip of the target"] = judged(network, autoencoder, examples)
    return table(rows)


def train_flux(rank: int, processes: int, comfyui: Path, folder: Path, cycles: Sequence[Cycle]) -> None:
    """Flow matching, v = ε − x0, t logit-normal (a quarter uniform), one cycle of the learning rate after the other."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)  # a process that was spawned knows nothing yet
    if processes > 1:
        meeting = f"file://{(folder / 'meeting').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    network, pool = build(comfyui), Pool(folder / "latents.safetensors")
    names = {name: p for name, p in network.named_parameters()}
    matrices = [p for name, p in names.items() if p.ndim == 2 and "_blocks." in name]
    known = {id(p) for p in matrices}
    muon = torch.optim.Muon(
        matrices, lr=cycles[0].muon, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    others = [p for p in names.values() if id(p) not in known]
    adam = torch.optim.AdamW(others, lr=cycles[0].adam, betas=(0.9, 0.98), weight_decay=0.0)
    average = {name: p.detach().clone() for name, p in names.items()}
    checkpoint = folder / "flux_checkpoint.safetensors"
    first = read_checkpoint(checkpoint, names, average, (muon, adam)) if checkpoint.is_file() else 0
    start, losses = time.monotonic(), []
    schedule = [(cycle, k) for cycle in cycles for k in range(cycle.steps)]
    for step, (cycle, k) in list(enumerate(schedule))[first:]:
        piece = step * processes + rank
        batch = pool.batch(np.random.default_rng(1000 + piece), BATCH // processes, cycle.shares)
        loss = flow_loss(network, batch, torch.Generator().manual_seed(piece))
        adam.zero_grad()
        muon.zero_grad()
        loss.backward()
        if processes > 1:
            average_gradients(list(names.values()), processes)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        rate = min(1, (step + 1) / WARMUP) * cycle.rate(k)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = cycle.muon * rate, cycle.adam * rate
        muon.step()
        adam.step()
        with torch.no_grad():
            for name, p in names.items():
                average[name].lerp_(p, 1 - min(0.999, (2 + step) / (11 + step)))
        losses.append(loss.item())
        if rank == 0 and ((step + 1) % 500 == 0 or step + 1 == len(schedule)):
            seconds = time.monotonic() - start
            LOG.info("flux: step %d, loss %.4f, %.0f s in this run", step + 1, np.mean(losses[-500:]), seconds)
            write_checkpoint(checkpoint, names, average, (muon, adam), step + 1)
            trained = {name: p.detach().clone() for name, p in names.items()}
            network.load_state_dict(average)
            model = Autoencoder()  # without the blocks of zeros, which would cost most of the report's time
            model.load_state_dict(load_file(folder / AUTOENCODER.name))
            LOG.info("flux: held-out scenes, averaged weights\n%s", report(network, model))
            network.load_state_dict(trained)
    if rank == 0:
        with replacing(folder / DIFFUSION.name) as temporary:
            named = {name.replace("_norm.weight", "_norm.scale"): value for name, value in average.items()}
            save_file({name: value.half().contiguous() for name, value in named.items()}, temporary)
    if processes > 1:
        dist.destroy_process_group()


def write_checkpoint(
    path: Path, names: Mapping[str, Tensor], average: Mapping[str, Tensor], optimisers, step: int
) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, p in names.items():
        tensors[f"weight/{name}"], tensors[f"average/{name}"] = p.detach(), average[name]
        for optimiser in optimisers:
            tensors |= {f"{key}/{name}": value for key, value in optimiser.state.get(p, {}).items()}
    with replacing(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)


def read_checkpoint(path: Path, names: Mapping[str, Tensor], average: dict[str, Tensor], optimisers) -> int:
    """Puts everything back in its place; the step to go on from."""
    tensors = load_file(path)
    for name, p in names.items():
        with torch.no_grad():
            p.copy_(tensors[f"weight/{name}"])
        average[name] = tensors[f"average/{name}"]
        state = {key: value for key in STATE if (value := tensors.get(f"{key}/{name}")) is not None}
        for optimiser in optimisers:
            if any(p is q for q in optimiser.param_groups[0]["params"]):
                optimiser.state[p] = state
    return int(tensors["step"])


def flow_loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    count = len(batch.after)
    t = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 0.25, uniform, t)
    noise = torch.randn(batch.after.shape, generator=generator)
    mix = t.view(-1, 1, 1, 1)
    with OutOfPlace(), torch.autocast("cpu", torch.bfloat16):
        x_t = (1 - mix) * batch.after + mix * noise
        v = network(x_t, t, batch.context, y=batch.pooled, ref_latents=[batch.before])
    weight = 1 + (IN_THE_MASK - 1) * batch.mask
    weight = weight / weight.mean((1, 2, 3), keepdim=True)
    return ((v.float() - (noise - batch.after)).square() * weight).mean()


def average_gradients(parameters: Sequence[Tensor], processes: int) -> None:
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= processes
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI, for its Flux class")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for pictures, checkpoints and the results (3 GB)"
    )
    parser.add_argument("--groups", type=int, default=GROUPS, help="scenes, of six pictures each")
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    parser.add_argument("--share", type=float, default=1.0, help="of the Flux's steps; 0.001 to try the script")
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4), help="each of one thread")
    options = parser.parse_args(arguments)
    folder = options.work
    folder.mkdir(parents=True, exist_ok=True)
    pictures, latents, stored = folder / "pictures.npy", folder / "latents.safetensors", folder / AUTOENCODER.name
    if not pictures.is_file():
        render(pictures, options.groups)
    pool = np.load(pictures, mmap_mode="r")
    if not stored.is_file():
        objects = pool[:, :OBJECT_PICTURES]
        few = torch.from_numpy(np.ascontiguousarray(objects[:800].reshape(-1, SIZE, SIZE, 3)[::3])).float().div_(255)
        model, components = Autoencoder(), codec.principal_components(few)
        codec.set_encoder(model, *components)
        codec.train_decoder(model, *components, objects, options.decoder_steps)
        LOG.info("autoencoder: round trip of held-out scenes %.2f dB", codec.round_trip(model, objects))
        codec.save(model, stored)
    if not latents.is_file():
        model = Autoencoder()
        model.load_state_dict(load_file(stored))
        write_latents(latents, pool, model)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / "meeting")
    cycles = [replace(cycle, steps=math.ceil(options.share * cycle.steps)) for cycle in CYCLES]
    job = (options.processes, options.comfyui, folder, cycles)
    if options.processes == 1:
        train_flux(0, *job)
    else:
        torch.multiprocessing.spawn(train_flux, job, nprocs=options.processes)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    main()
