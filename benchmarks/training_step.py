"""Seconds and memory of a training step of a Flux with random weights, with and without the objective.

    python benchmarks/training_step.py --comfyui PATH --size kontext --device cuda     # 12 billion parameters
    python benchmarks/training_step.py --comfyui PATH                                  # the demo's size, on a CPU

Random weights cost what real ones do. The objective is the recommended mix on VAE latents. A step is one pair with its
reference, forward, backward and optimiser; the first two are not counted. Writes benchmarks/results/training_step_SIZE.md.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from in_comfyui import ROOT, start

KONTEXT = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--comfyui", default="", help="ComfyUI's folder (default: COMFYUI_PATH)")
parser.add_argument("--size", choices=("demo", "kontext"), default="demo")
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
parser.add_argument(
    "--dtypes", default="", help="comma-separated fp32, bf16, fp8 (default: fp32 for demo, bf16,fp8 for kontext)"
)
parser.add_argument("--pixels", default="", help="sides of the picture (default: 128 for demo, 512,1024 for kontext)")
parser.add_argument("--steps", type=int, default=6, help="steps that are counted (default: 6)")


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


def main() -> None:
    args = parser.parse_args()
    pack = start(args.comfyui, ("--cpu",) if args.device == "cpu" else ("--gpu-only",))
    denoisers, flow = pack("nodes.comfy_denoiser"), pack("editloss_core.training.flow")
    lora, objectives = pack("editloss_core.training.lora"), pack("editloss_core.objective")
    embeddings, base = pack("editloss_core.embeddings"), pack("editloss_core.encoders.base")
    large, device = args.size == "kontext", torch.device(args.device)
    config = KONTEXT if large else pack("editloss_core.demo.model").FLUX
    dtypes = (args.dtypes or ("bf16,fp8" if large else "fp32")).split(",")
    sides = [int(v) for v in (args.pixels or ("512,1024" if large else "128")).split(",")]
    info = base.EncoderInfo("vae latents", "", "", "grid")
    mix = objectives.recommended(info.name)
    lines = [
        "| weights | picture | tokens | step | with the objective | peak GiB | with the objective |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in dtypes:
        patcher = flux(config, DTYPES[dtype], device)
        denoiser = denoisers.ComfyDenoiser(patcher, 1.0, checkpointing=large)
        made = lora.LoRA(denoiser.module, lora.LoRASettings(16, 16.0)).to(device).attach()
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
        words = 512 if large else 2
        cond = [
            [torch.randn(1, words, config["context_in_dim"]), {"pooled_output": torch.randn(1, config["vec_in_dim"])}]
        ]
        for side in sides:
            shape = (1, 16, side // 8, side // 8)
            x0, reference, noise = (torch.randn(shape, device=device) for _ in range(3))
            t = torch.full((1,), 0.6, device=device)
            x_t = flow.add_noise(x0, noise, t)
            constant = embeddings.EmbeddingSet()
            for role, z in (("gt", x0), ("src", reference), ("overlay", (x0 + reference)[:, None] / 2)):
                constant = constant.with_embedding(role, info, z.movedim(-3, -1))
            found = []
            for wanted in (None, mix):
                seconds = []
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                for step in range(2 + args.steps):
                    began = time.perf_counter()
                    v = denoiser(x_t, t, [reference], [cond])
                    loss = flow.velocity_loss(v, noise - x0).mean()
                    if wanted is not None:
                        estimate = flow.estimate(x_t, t, v).movedim(1, -1)
                        loss = loss + wanted.evaluate(constant.with_embedding("pred", info, estimate)).total
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if step >= 2:
                        seconds.append(time.perf_counter() - began)
                peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
                found.append((statistics.median(seconds), peak))
            (plain, low), (full, high) = found
            peaks = f"{low:.1f} | {high / low:.2f} ×" if device.type == "cuda" else "– | –"
            tokens = 2 * flow.token_count(x0) + words
            lines.append(f"| {dtype} | {side}² | {tokens} | {plain:.3f} s | {full / plain:.2f} × | {peaks} |")
            print(lines[-1], flush=True)
        made.detach()
        del patcher, denoiser, made, optimizer
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"# A training step, {args.size} size\n\n{where}, torch {torch.__version__}, batch 1, rank 16, median of {args.steps}.\n"
    out = ROOT / "benchmarks" / "results" / f"training_step_{args.size}.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(title + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
