"""A plain LoRA step (no objective) against diffusers + peft, on one and the same FluxTransformer2DModel with random weights.

    pip install diffusers peft accelerate
    python benchmarks/lora_step.py                                     # a small one, on a CPU
    python benchmarks/lora_step.py --size flux --device cuda           # 12 billion parameters, 1024²

Ours is :class:`editloss_core.training.trainer.Trainer` with its bypass; theirs is peft's ``LoraConfig`` on the same layers
in the loop of diffusers' train_dreambooth_lora_flux_kontext.py. Both have the same weights, pairs, noise, noise levels,
rank, alpha, AdamW, clipping and checkpointing, start from the same non-zero LoRA, and take turns step by step. The script
stops if losses or gradients part. Memory is the most that a step holds beside the frozen weights, the LoRA and its optimiser included.
Writes benchmarks/results/lora_step_SIZE.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Sequence

import torch
from load import add_switch, busy, told
from step_tools import MIB, Clock, machine, memory, ratio
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from editloss_core.encoders.vae import VAEEncoder
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.kontext import KONTEXT
from editloss_core.pairs import PairSet
from editloss_core.training.flow import add_noise, generator_for
from editloss_core.training.host import Host
from editloss_core.training.prepare import Prepared, prepare
from editloss_core.training.settings import TrainingSettings
from editloss_core.training.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results"
SMALL = {
    "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 6, "joint_attention_dim": 256,
    "pooled_projection_dim": 64, "axes_dims_rope": (16, 24, 24), "guidance_embeds": True,
}  # fmt: skip
FLUX = {"guidance_embeds": True}  # diffusers' own defaults are FLUX.1's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How far the two may part, relatively: every loss, and the gradient of the first step. Sums in another order come to that,
# and in bf16 products and LoRA weights that are rounded in other places.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 5e-2)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--size", choices=("small", "flux"), default="small")
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
parser.add_argument("--dtypes", default="", help="comma-separated fp32, bf16 (default: both for small, bf16 for flux)")
parser.add_argument(
    "--pixels", type=int, default=0, help="side of the pictures (default: 256 for small, 1024 for flux)"
)
parser.add_argument("--batch", type=int, default=1, help="pairs per step (default: 1)")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--alpha", type=float, default=24.0)
parser.add_argument("--steps", type=int, default=7, help="steps that are timed, after two that are not (default: 7)")
parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: 1)")
add_switch(parser)


class BareDenoiser:
    """FluxTransformer2DModel as a Denoiser of the core; peft's is called through the same code."""

    edit_model = KONTEXT

    def __init__(self, module: nn.Module, device: torch.device, words: Tensor, pooled: Tensor):
        self.module, self.device = module, device
        self.dtype = next(p for p in module.parameters() if not p.requires_grad).dtype
        self.words, self.pooled = words.to(device, self.dtype), pooled.to(device, self.dtype)

    def __call__(self, x_t: Tensor, t: Tensor, references: Sequence[Tensor], conditioning: Sequence[Any]) -> Tensor:
        batch, _, height, width = x_t.shape
        parts = [x_t, *references]
        ids = []
        for index, part in enumerate(parts):
            rows, columns = (torch.arange(side // 2, device=self.device) for side in part.shape[2:])
            ids.append(
                torch.stack(torch.meshgrid(torch.tensor(index, device=self.device), rows, columns, indexing="ij"), -1)
            )
        answer = self.module(
            hidden_states=torch.cat([_packed(part) for part in parts], 1).to(self.dtype),
            encoder_hidden_states=self.words.expand(batch, -1, -1),
            pooled_projections=self.pooled.expand(batch, -1),
            timestep=t.to(self.dtype),
            guidance=torch.ones(batch, device=self.device, dtype=self.dtype),
            img_ids=torch.cat([i.reshape(-1, 3) for i in ids]).to(self.dtype),
            txt_ids=torch.zeros(self.words.shape[1], 3, device=self.device, dtype=self.dtype),
            return_dict=False,
        )[0]
        answer = answer[:, : height * width // 4].unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
        return answer.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width).float()


def _packed(z: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` → tokens of 2×2 latents ``[B, h·w/4, 4·C]``."""
    return z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def random_pairs(count: int, pixels: int) -> Prepared:
    """Pairs of noise, in the latents of a fixed projection to FLUX's 16 channels."""
    g = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, count, pixels, pixels, 3, generator=g)
    mixing = torch.randn(16, 3 * 64, generator=g) / 8

    def encode(x: Tensor) -> Tensor:
        patches = F.unfold(x, 8, stride=8)
        return (mixing @ patches).unflatten(2, (x.shape[2] // 8, x.shape[3] // 8))

    pairs = PairSet.from_images(before, after, captions="edit", resolution=pixels, upscale=True)
    return prepare(pairs, VAEEncoder(encode, "projection", "0", 8), estimate_missing_masks=False)


class Theirs:
    """peft's LoRA on a copy of the network, and the step of diffusers' training script.

    Args:
        adapters: dtype of the LoRA's weights: fp32 as ``get_peft_model`` makes them, or the network's as ``add_adapter``
            of diffusers does.
    """

    def __init__(self, ours: LoRA, network: nn.Module, denoiser: BareDenoiser, prepared: Prepared, settings, adapters):
        from peft import LoraConfig

        self.prepared, self.settings = prepared, settings
        module = copy.deepcopy(network)
        size = ours.settings
        module.add_adapter(
            LoraConfig(
                r=size.rank, lora_alpha=size.alpha, target_modules=list(ours.targets), init_lora_weights="gaussian"
            )
        )
        self.layers = {}
        with torch.no_grad():
            for name, layer in zip(ours.targets, ours.layers):
                part = module.get_submodule(name)
                down, up = part.lora_A["default"].weight, part.lora_B["default"].weight
                down.data, up.data = (
                    w.detach().to(device=denoiser.device, dtype=adapters, copy=True) for w in (layer.down, layer.up)
                )
                self.layers[name] = down, up
        module.train()
        if any(isinstance(m, nn.Module) and getattr(m, "gradient_checkpointing", False) for m in network.modules()):
            module.enable_gradient_checkpointing()
        self.denoiser = BareDenoiser(module, denoiser.device, denoiser.words, denoiser.pooled)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def step(self, number: int, indices: Sequence[int]) -> float:
        """The optimiser step ``number`` on the pairs, noise and noise levels of our trainer's."""
        device = self.denoiser.device
        self.optimizer.zero_grad()
        generator = generator_for(self.settings.seed, "training", number)
        x0, reference = (z.to(device) for z in (self.prepared.after(indices), self.prepared.before(indices)))
        t = self.settings.timesteps.draw(len(indices), KONTEXT.mu(KONTEXT.tokens(x0)), generator).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        predicted = self.denoiser(add_noise(x0, noise, t), t, [reference], [None] * len(indices))
        target = noise - x0
        loss = torch.mean(((predicted.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        return loss.detach().item()


@dataclass
class Comparison(Host):
    """Runs a step of theirs after each of ours, on a clock or under the memory counter."""

    theirs: Theirs
    warm_up: int
    timed: int

    def __post_init__(self):
        device = self.theirs.denoiser.device
        self.clocks, self.peaks = (Clock(device), Clock(device)), (0, 0)
        self.losses: list[tuple[float, float]] = []
        self.trainer: Trainer
        self._counter = None

    @property
    def counts_memory(self) -> bool:
        return self.trainer.step >= self.warm_up + self.timed

    def before_step(self) -> None:
        if self.counts_memory:
            self.trainer.optimizer.zero_grad()  # or what was there before would count as nothing
            self.theirs.optimizer.zero_grad()
            self._counter = memory(self.theirs.denoiser.device)
            self._mine = self._counter.__enter__()
        self.clocks[0].start()

    def on_step(self, log, total) -> None:
        self.clocks[0].stop()
        number = log.step - 1
        indices = [next(i for i, p in enumerate(self.theirs.prepared.pairs) if p.name == s.pair) for s in log.samples]
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            with memory(self.theirs.denoiser.device) as theirs:
                loss = self.theirs.step(number, indices)
            self.peaks = tuple(
                peak.most + sum(t.nbytes for t in tensors_of(optimizer))
                for peak, optimizer in ((self._mine, self.trainer.optimizer), (theirs, self.theirs.optimizer))
            )
        else:
            self.clocks[1].start()
            loss = self.theirs.step(number, indices)
            self.clocks[1].stop()
            for clock in self.clocks if number < self.warm_up else ():
                clock.wall.clear()
                clock.cpu.clear()
        self.losses.append((log.loss, loss))
        if not number:
            self.gradients = part_by((a.grad, b.grad) for a, b in self.weights())

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Ours and theirs, matrix by matrix."""
        lora = self.trainer.lora
        return [
            pair
            for name, layer in zip(lora.targets, lora.layers)
            for pair in zip((layer.down, layer.up), self.theirs.layers[name])
        ]


@torch.no_grad()
def part_by(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|ours − theirs| / |ours| over all tensors together."""
    parted = [((ours - theirs.float()).square().sum().item(), ours.square().sum().item()) for ours, theirs in pairs]
    return math.sqrt(sum(a for a, _ in parted) / sum(b for _, b in parted))


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What is trained, and what the optimiser keeps about it."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return trained + [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def compare(args, config: dict, dtype: str, adapters: torch.dtype, checkpointing: bool) -> Comparison:
    """Both runs, step by step in turns; AssertionError if they part."""
    from diffusers import FluxTransformer2DModel

    device = torch.device(args.device)
    torch.manual_seed(0)
    with torch.device(device):
        network = FluxTransformer2DModel(**config).to(DTYPES[dtype]).requires_grad_(False)
    if checkpointing:
        network.enable_gradient_checkpointing()
    network.train()  # diffusers checkpoints in training mode only
    g = torch.Generator().manual_seed(1)
    words = torch.randn(1, 512 if args.size == "flux" else 64, network.config.joint_attention_dim, generator=g)
    denoiser = BareDenoiser(network, device, words, torch.randn(1, network.config.pooled_projection_dim, generator=g))
    lora = LoRA(network, LoRASettings(args.rank, args.alpha, layers="attention + MLP"))
    with torch.no_grad():
        for layer in lora.layers:
            layer.up.copy_(torch.randn(layer.up.shape, generator=g) * 0.02)
    lora.to(device)
    prepared = random_pairs(2 * args.batch, args.pixels)
    settings = TrainingSettings(
        steps=2 + args.steps + 1, batch_size=args.batch, gradients_every=0, validate_every=0, checkpoint_every=0
    )
    host = Comparison(Theirs(lora, network, denoiser, prepared, settings, adapters), 2, args.steps)
    trainer = host.trainer = Trainer(denoiser, lora, prepared, [None] * len(prepared), settings, host=host)
    began = [p.detach().clone() for p in lora.parameters()]
    trainer.run()
    moved = [(ours - start, theirs.float() - start) for start, (ours, theirs) in zip(began, host.weights())]
    host.drift = part_by(moved)
    of_loss, of_gradient = TOLERANCES[dtype]
    for ours, theirs in host.losses:
        assert abs(ours - theirs) <= of_loss * abs(theirs), f"the losses part: {ours} and {theirs}"
    assert host.gradients <= of_gradient, f"the gradients part, by {host.gradients:.2g}"
    return host


def main() -> None:
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    large, device = args.size == "flux", torch.device(args.device)
    args.pixels = args.pixels or (1024 if large else 256)
    torch.set_num_threads(args.threads)
    rows = [
        "| weights | their adapters | checkpointing | time, ours / theirs | processor time | peak, ours / theirs | ours | "
        "losses part by | gradients | updates |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases = [
        (dtype, adapters, checkpointing)
        for dtype in (args.dtypes or ("bf16" if large else "fp32,bf16")).split(",")
        for adapters in dict.fromkeys(("fp32", dtype))
        for checkpointing in ((True,) if large else (False, True))
    ]
    with busy(args.load):
        for dtype, adapters, checkpointing in tqdm(cases, disable=None):
            found = compare(args, FLUX if large else SMALL, dtype, DTYPES[adapters], checkpointing)
            ours, theirs = found.clocks
            cpu = "–" if device.type == "cuda" else f"{ratio(ours.cpu, theirs.cpu):.2f} ×"
            parted = max(abs(a - b) / abs(b) for a, b in found.losses)
            rows.append(
                f"| {dtype} | {adapters} | {'yes' if checkpointing else 'no'} | {ratio(ours.wall, theirs.wall):.2f} × | {cpu} | "
                f"{found.peaks[0] / found.peaks[1]:.2f} × | {statistics.median(ours.wall):.2f} s, "
                f"{found.peaks[0] / MIB:.0f} MiB | {parted:.1g} | {found.gradients:.1g} | {found.drift:.1g} |"
            )
            tqdm.write(rows[-1])
        load = told(args.load)
    import diffusers
    import peft

    lines = [
        f"# A plain LoRA step beside diffusers and peft, {args.size} size",
        "",
        f"{machine(device)}, {load}, diffusers {diffusers.__version__}, peft {peft.__version__}. FluxTransformer2DModel, pictures of "
        f"{args.pixels}² with their reference, batch {args.batch}, rank {args.rank}, attention and MLP layers, AdamW. Medians "
        f"of {args.steps} steps each that take turns. Below 1 is faster, or smaller, than theirs. Peak: what a step holds beside "
        f"the frozen weights. Our LoRA and its optimiser are fp32 always; bf16 ones (add_adapter's) are half as large, and round "
        f"their updates: the last column is how far the two LoRAs' {3 + args.steps} updates part, as a share of ours.",
        "",
        *rows,
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"lora_step_{args.size}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
