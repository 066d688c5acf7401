"""Where the time and the memory of a training step go: model, decoder, encoders, losses, optimiser.

    python benchmarks/training_step.py --comfyui PATH                                  # the demo model, on a CPU
    python benchmarks/training_step.py --comfyui PATH --size kontext --device cuda     # 12 billion parameters, 1024²

The steps are those of :class:`Trainer` itself on ComfyUI's Flux, with no objective, with the recommended mix on VAE latents
(three task losses), on features of the VAE's decoder, and with those on latents and an image encoder on a decoded crop. kontext has random weights, which cost what real
ones do: FLUX.1's transformer and autoencoder, and DINOv2-L. They take turns, several runs each, and each run's first
two steps are not counted. What a decoder or an encoder computes again in its backward pass (a large decoder its blocks) counts there.
Writes benchmarks/results/training_step_SIZE.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace

import torch
from in_comfyui import ROOT, start
from load import add_switch, busy, told
from step_tools import MIB, machine, memory
from tqdm import tqdm

KONTEXT = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
AUTOENCODER = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
WARM_UP = 2
PLAIN, LATENTS, PICTURES = "no objective", "three losses on latents", "those on latents and an encoder on a crop"
DEPTHS = {"three losses on decoder features, depth 1": (1,), "three losses on decoder features, depths 1 and 2": (1, 2)}
# Column → what it adds up: stages of a step, and within the objective the decoder's and the encoder's share.
COLUMNS = {
    "data": ("loading",),
    "model forward": ("model",),
    "backward": ("backward",),
    "decoder": ("decoder forward", "decoder backward"),
    "encoder": ("encoder forward", "encoder backward"),
    "losses": ("losses",),
    "optimiser": ("optimiser",),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--comfyui", default="", help="ComfyUI's folder (default: COMFYUI_PATH)")
parser.add_argument("--size", choices=("demo", "kontext"), default="demo")
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
parser.add_argument(
    "--dtypes", default="bf16,fp8", help="of kontext's weights: comma-separated fp32, bf16, fp8 (default: both)"
)
parser.add_argument("--pixels", type=int, default=1024, help="side of kontext's pictures (default: 1024)")
parser.add_argument("--crop", type=int, default=512, help="side of kontext's decoded crop (default: 512)")
parser.add_argument("--blocks", default="19,38", help="kontext's double and single blocks; fewer to try the script")
parser.add_argument(
    "--encoder", default="", help="a timm name (default: tf_efficientnet_lite0, vit_large_patch14_dinov2)"
)
parser.add_argument(
    "--batch", type=int, default=0, help="pairs per step (default: 6 for demo as in its workflow, 1 for kontext)"
)
parser.add_argument("--steps", type=int, default=6, help="counted steps of a run (default: 6)")
parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: 1)")
add_switch(parser)


class Mark(torch.autograd.Function):
    """Its input, and a call when the backward pass comes by."""

    @staticmethod
    def forward(ctx, x, passed):
        ctx.passed = passed
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.passed()
        return gradient, None


class Times:
    """Seconds of a step by stage, and within the objective those of functions, forward and backward."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)
        self._stage, self._since, self._backward = "", 0.0, ""

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(self, stage: str) -> None:
        now = self.now()
        self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now

    def of(self, name: str, function):
        """``function`` of one tensor, its time counted under "NAME forward" and, recomputation included, "NAME backward"."""
        began = 0.0

        def backward_begins():
            nonlocal began
            self._backward, began = name, self.now()

        def backward_ends():
            self.seconds[f"{name} backward"] += self.now() - began
            self._backward = ""

        def run(x):
            if self._backward or not torch.is_grad_enabled():  # computed again in the backward pass
                return function(Mark.apply(x, backward_ends)) if x.requires_grad else function(x)
            start = self.now()
            answer = Mark.apply(function(Mark.apply(x, backward_ends)), backward_begins)
            self.seconds[f"{name} forward"] += self.now() - start
            return answer

        return run


class Case:
    """One of them, run by run."""

    def __init__(self, make_trainer, pack, device):
        self.make_trainer, self.device, self.pack = make_trainer, device, pack
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.peak = None

    def run(self, steps: int, with_memory: bool) -> None:
        """Time ``steps`` steps; or count the memory of one."""
        case, base, marks = self, self.pack("editloss_core.training.memory").StepMemory, Times(self.device)

        class Stages(base):
            def enter(self, stage):
                super().enter(stage)
                (case.peak or marks).enter(stage)

        class Watch(self.pack("editloss_core.training.host").Host):
            def before_step(self):
                self.stack = ExitStack()
                self.counting = with_memory and self.trainer.step == WARM_UP
                if self.counting:
                    self.trainer.optimizer.zero_grad()
                    case.peak = self.stack.enter_context(memory(case.device))
                marks.seconds.clear()
                self.began = marks.now()
                marks._stage, marks._since = "loading", self.began

            def on_step(self, log, total):
                marks.enter("")
                seconds = marks._since - self.began
                self.stack.close()
                if not with_memory and log.step > WARM_UP:
                    case.seconds.append(seconds)
                    own = dict(marks.seconds)
                    inside = sum(s for name, s in own.items() if name.startswith(("decoder", "encoder")))
                    own["losses"] = own.pop("objective", 0.0) - inside
                    case.parts.append(own)

        self.peak = None
        host = Watch()
        trainer = host.trainer = self.make_trainer(host, marks, WARM_UP + (1 if with_memory else steps))
        trainer._memory = Stages(self.device)
        trainer.run()


def flux(config: dict, dtype: torch.dtype, device: torch.device):
    """A ModelPatcher of ComfyUI's Flux with random weights, made on the device."""
    import comfy.model_patcher
    import comfy.supported_models

    made = comfy.supported_models.Flux(dict(config))
    made.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.bfloat16)
    base = made.get_model({}, device=device)
    torch.manual_seed(0)
    for name, p in base.diffusion_model.named_parameters():
        noise = 0.02 * torch.randn(p.shape, device=device)
        p.data.copy_((1.0 + noise if name.endswith("scale") else noise).to(p.dtype))
    return comfy.model_patcher.ModelPatcher(base, device, torch.device("cpu"))


def autoencoder():
    """ComfyUI's VAE in FLUX.1's layout with random weights."""
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

    torch.manual_seed(0)
    sd = {}
    for kind, part in (("encoder", Encoder(**AUTOENCODER)), ("decoder", Decoder(**AUTOENCODER))):
        for name, p in part.state_dict().items():  # ComfyUI's layers start with whatever was in memory
            wide = p.ndim > 1
            plain = torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)
            sd[f"{kind}.{name}"] = torch.randn(p.shape) / p[0].numel() ** 0.5 if wide else plain
    return comfy.sd.VAE(sd=sd)


def noise_pairs(pack, pixels: int):
    """Two pairs of soft noise, a quarter of each edited."""
    g = torch.Generator().manual_seed(0)
    soft = torch.nn.functional.interpolate(torch.rand(4, 3, 16, 16, generator=g), size=pixels, mode="bilinear").movedim(
        1, -1
    )
    mask = torch.zeros(2, pixels, pixels)
    mask[:, pixels // 4 : 3 * pixels // 4, pixels // 4 : 3 * pixels // 4] = 1.0
    before = soft[:2]
    after = torch.where(mask[..., None] > 0, soft[2:], before)
    return pack("editloss_core.pairs").PairSet.from_images(before, after, mask, "edit", resolution=pixels)


def cases(args, pack, device, dtype: str) -> dict[str, Case]:
    """What is measured, by name: trainers on one model and one preparation."""

    demo, denoisers, models = pack("nodes.demo"), pack("nodes.comfy.denoiser"), pack("nodes.comfy.encoders")
    objectives, negatives = pack("editloss_core.objective"), pack("editloss_core.negatives")
    lora, prepare = pack("editloss_core.lora.lora"), pack("editloss_core.training.prepare")
    decoders = pack("nodes.comfy.decoder")
    settings, trainers = pack("editloss_core.training.settings"), pack("editloss_core.training.trainer")
    timm_net = pack("editloss_core.encoders.timm_net")
    large = args.size == "kontext"
    if large:
        double, single = (int(v) for v in args.blocks.split(","))
        config = {**KONTEXT, "depth": double, "depth_single_blocks": single}
        patcher, vae, pairs, crop = (
            flux(config, DTYPES[dtype], device),
            autoencoder(),
            noise_pairs(pack, args.pixels),
            args.crop,
        )
        encoder = timm_net.TimmEncoder(
            args.encoder or "vit_large_patch14_dinov2", image_size=518, random_seed=0, device=device
        )
        words = [
            [torch.randn(1, 512, config["context_in_dim"]), {"pooled_output": torch.randn(1, config["vec_in_dim"])}]
        ]
        conditioning = [words] * len(pairs)
    else:
        patcher, vae, clip = demo.small_flux(), demo.small_vae(), demo.SmallTextEncoder()
        pairs, crop = demo.pair_set(demo.training_pairs(12, 0, 0, seed=0)), 128
        encoder = timm_net.TimmEncoder(args.encoder or "tf_efficientnet_lite0", layer=2, image_size=-1, random_seed=0)
        conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(p.caption)) for p in pairs]
    latents, reader = models.vae_encoder(vae, 0, patcher.model.latent_format), models.vae_encoder(vae)
    of_latents, of_pictures = reader.info.name, encoder.info.name
    decoding = {name: models.ManagedVAEDecoder(vae, depths) for name, depths in DEPTHS.items()}
    encoders = {of_latents: reader, **{e.info.name: e for e in decoding.values()}, of_pictures: encoder}
    prepared = prepare.prepare(pairs, latents, encoders, crop=crop, overlay=negatives.OverlaySettings())
    mix = objectives.recommended(of_latents)
    chosen = {
        PLAIN: None,
        LATENTS: mix,
        **{name: objectives.recommended(e.info.name) for name, e in decoding.items()},
        PICTURES: objectives.EditObjective(
            (
                *mix.terms,
                *(replace(t, name=f"{t.name}, pictures") for t in objectives.recommended(of_pictures).terms),
            )
        ),
    }

    def case(objective) -> Case:
        def make_trainer(host, marks, steps):
            denoiser = denoisers.ComfyDenoiser(patcher, 1.0, checkpointing=large)
            decode = marks.of("decoder", decoders.VAEDecoder(vae, denoiser.from_model))
            watched = TimedEncoder(pack, encoder, marks)
            host.before_step = bring(denoiser, host.before_step)
            return trainers.Trainer(
                denoiser, lora.LoRA(denoiser.module, lora.LoRASettings(16, 16.0)), prepared, conditioning,
                settings.TrainingSettings(steps=steps, batch_size=args.batch or (1 if large else 6), gradients_every=0, validate_every=0),
                objective=objective, encoders={**encoders, of_pictures: watched}, decode=decode, host=host,
            )  # fmt: skip

        return Case(make_trainer, pack, device)

    def bring(denoiser, then):
        def before_step():
            denoiser.load([vae.patcher], 0 if device.type == "cuda" else None)
            then()

        return before_step

    return {name: case(objective) for name, objective in chosen.items()}


def TimedEncoder(pack, encoder, marks):
    """The encoder, its time counted."""

    class Timed(pack("editloss_core.encoders.base").Encoder):
        info, device, grid, region = encoder.info, encoder.device, encoder.grid, encoder.region
        forward = staticmethod(marks.of("encoder", encoder.forward))

        def __call__(self, images):
            return self.forward(images.to(self.device))

    return Timed()


def rows(found: dict[str, Case]) -> list[str]:
    plain, lines = found[PLAIN], []
    base = statistics.median(plain.seconds)
    for name, case in found.items():
        shares = []
        for stages in COLUMNS.values():
            seconds = statistics.median(sum(parts.get(stage, 0.0) for stage in stages) for parts in case.parts)
            shares.append(f"{seconds / base:.1%}")
        stage = max(case.peak.stages, key=case.peak.stages.get)
        time_ratio, memory_ratio = statistics.median(case.seconds) / base, case.peak.most / plain.peak.most
        lines.append(
            f"| {name} | {time_ratio:.3f} × | {' | '.join(shares)} | {memory_ratio:.2f} × | {case.peak.most / MIB:.0f} MiB "
            f"({stage}) |"
        )
    return lines


def main() -> None:
    args = parser.parse_args()
    device = torch.device(args.device)
    pack = start(args.comfyui, ("--cpu",) if args.device == "cpu" else ("--gpu-only",))
    torch.set_num_threads(args.threads)
    head = f"| | step | {' | '.join(COLUMNS)} | peak memory | beside the weights |"
    lines = []
    with busy(args.load):
        for dtype in args.dtypes.split(",") if args.size == "kontext" else ("fp32",):
            found = cases(args, pack, device, dtype)
            for _ in tqdm(range(args.rounds), disable=None):
                for case in found.values():
                    case.run(args.steps, with_memory=False)
            for case in found.values():
                case.run(args.steps, with_memory=True)
            seconds = statistics.median(found[PLAIN].seconds)
            lines += [
                "",
                f"Weights in {dtype}; a plain step takes {seconds:.3f} s.",
                "",
                head,
                "|" + "---|" * (len(COLUMNS) + 4),
            ]
            lines += rows(found)
            print("\n".join(lines[-6:]), flush=True)
            del found
        load = told(args.load)
    shape = (
        "pictures of 128², decoded whole" if args.size == "demo" else f"pictures of {args.pixels}², crop {args.crop}²"
    )
    title = [
        f"# A training step, {args.size} size",
        "",
        f"{machine(device)}, {load}, batch {args.batch or (6 if args.size == 'demo' else 1)}, rank 16, {shape}. Shares are of the plain "
        f"step's time, medians of {args.rounds} runs of {args.steps} steps that take turns. `backward` is the model's; those of "
        "decoder and encoder are in their own columns, with what they compute again.",
    ]
    out = ROOT / "benchmarks" / "results" / f"training_step_{args.size}.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(title + lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
