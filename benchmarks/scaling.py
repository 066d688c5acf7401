"""Arithmetic, no measurement: what FLUX.1 Kontext takes in memory, in time and between processes, by its shape alone; and the
weights and activations of the other models.

    python benchmarks/scaling.py [--out benchmarks/results/scaling_arithmetic.md]

Parameters are counted on diffusers' own class without weights (torch's meta device); the rest follows from them by
editloss_core/models/footprint.py, whose docstrings have the formulas.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Iterable, Iterator, Sequence

from editloss_core.lora.lora import LoRASettings, adapted_sizes, layer_features, select_layers
from editloss_core.models.base import PRESETS
from editloss_core.models.flux2 import FLUX2_DEV, FLUX2_KLEIN_BASE
from editloss_core.models.folder import empty_network
from editloss_core.models.footprint import Footprint
from editloss_core.models.kontext import KONTEXT
from editloss_core.models.longcat import LONGCAT
from editloss_core.models.qwen import QWEN_EDIT_PLUS
from editloss_core.training.config_reader import read_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {  # transformer/config.json of FLUX.1 Kontext dev
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
# The others' configs; what is not said is the default of diffusers' class, which is that of the published folder.
OTHERS = {
    "FLUX.2 dev": (FLUX2_DEV, {}),
    "FLUX.2 klein 9B": (
        FLUX2_KLEIN_BASE,
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "FLUX.2 klein 4B": (
        FLUX2_KLEIN_BASE,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "Qwen-Image-Edit 2509, 2511": (QWEN_EDIT_PLUS, {}),
    "LongCat-Image-Edit": (LONGCAT, {"num_layers": 10, "num_single_layers": 20}),
}
GIB, GB = 1 << 30, 1e9
# Assumed, and to be replaced by what a machine reaches: of an H100's 989 TFLOP/s in bf16 a training step may keep 40%.
TFLOPS, SHARE = 989.0, 0.4
LINKS = {"NVLink, 450 GB/s each way": 450.0, "PCIe 4 ×16, 25 GB/s": 25.0, "network, 50 GB/s (400 Gbit/s)": 50.0}
# (config, processes, machine's GPUs share the weights)
SHIPPED = (("one_24gb", 1, False), ("one_80gb", 1, False), ("eight_gpus_fsdp", 8, True), ("two_nodes", 16, False))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


def of(layers: str, rank: int) -> Footprint:
    return footprint(LoRASettings(rank=rank, alpha=float(rank), layers=layers))


def footprint(lora: LoRASettings) -> Footprint:
    return Footprint.of(KONTEXT, NETWORK, adapted_sizes(NETWORK, lora.layers, KONTEXT), lora.rank)


def fused_parameters(layers: str, rank: int) -> int:
    """Of the same LoRA in ComfyUI's keys, where q, k, v (and the MLP's input) of a block are one layer of a higher rank."""
    wholes: dict[str, list[tuple[int, int]]] = {}
    for name, part in select_layers(NETWORK, layers).items():
        wholes.setdefault(KONTEXT.names.comfyui(name)[0], []).append(layer_features(part))
    total = 0
    for whole, parts in wholes.items():
        width, count = parts[0][0], len(KONTEXT.names.diffusers(whole))
        rows = (
            sum(out for _, out in parts) if len(parts) == count else (3 + (count - 3) * KONTEXT.names.mlp_ratio) * width
        )
        total += len(parts) * rank * (width + rows)
    return total


def lora_sizes() -> Iterator[str]:
    yield "## The LoRA\n"
    yield "File sizes in bf16. ComfyUI's file has the zeros beside the diagonal of each block of ranks.\n"
    rows = []
    for layers in PRESETS:
        for rank in (8, 16, 32, 64):
            found = of(layers, rank)
            sizes = [size / GIB for size in found.lora_bytes().values()]
            rows.append(
                (
                    layers, rank, found.layers, f"{found.trainable / 1e6:.1f} M", f"{sum(sizes):.2f}",
                    f"{sum(found.lora_bytes('adamw8bit').values()) / GIB:.2f}", f"{2 * found.trainable / 1e6:.0f}",
                    f"{2 * fused_parameters(layers, rank) / 1e6:.0f}",
                )
            )  # fmt: skip
    head = ("layers", "rank", "adapted", "parameters", "with AdamW, GiB", "with 8-bit AdamW, GiB", "diffusers' file, MB", "ComfyUI's file, MB")  # fmt: skip
    yield from table(head, rows)


def weights() -> Iterator[str]:
    found = of("attention + MLP", 16)
    yield "## The frozen transformer\n"
    yield (
        f"{found.parameters:,} parameters, {found.linear:,} of them in linear layers; {found.blocks} blocks of width "
        f"{found.width}. GiB on each process:\n"
    )
    kinds = [("bf16", "none"), ("bf16", "int8"), ("bf16", "nf4")]
    rows = [
        (name if name != "none" else dtype, *(f"{found.weight_bytes(dtype, name, n) / GIB:.2f}" for n in (1, 2, 4, 8)))
        for dtype, name in kinds
    ]
    yield from table(("weights", "whole", "shared by 2", "by 4", "by 8"), rows)


def activations() -> Iterator[str]:
    found = of("attention + MLP", 16)
    yield "## Activations of the transformer, one pair\n"
    rows = []
    for side in (512, 768, 1024):
        tokens = KONTEXT.sample_tokens(side, side)
        flops = found.step_flops(tokens, 1)
        rows.append(
            (
                f"{side}×{side}", tokens, f"{found.activation_bytes(tokens, 1) / GIB:.2f}",
                f"{found.activation_bytes(tokens, 1, checkpointing=False) / GIB:.1f}", f"{flops / 1e12:.0f}",
                f"{found.step_flops(tokens, 1, checkpointing=False) / 1e12:.0f}", f"{flops / (TFLOPS * SHARE * 1e12):.2f}",
            )
        )  # fmt: skip
    head = ("picture", "tokens", "checkpointed, GiB", "not, GiB", "TFLOP a step", "without recomputing", f"seconds at {SHARE:.0%} of {TFLOPS:.0f} TFLOP/s")  # fmt: skip
    yield from table(head, rows)


def by_model() -> Iterator[str]:
    yield "## By model\n"
    yield "GiB of the frozen transformer, of a LoRA of rank 16 (attention + MLP) with AdamW, and of the activations of one pair.\n"
    rows = []
    for name, (model, config) in {"FLUX.1 Kontext": (KONTEXT, CONFIG), **OTHERS}.items():
        network = empty_network(model, config)
        found = Footprint.of(model, network, adapted_sizes(network, "attention + MLP", model), 16)
        parts = [found.weight_bytes(), found.weight_bytes(quantization="int8"), found.weight_bytes(quantization="nf4")]
        parts.append(sum(found.lora_bytes().values()))
        parts += [found.activation_bytes(model.sample_tokens(side, side), 1) for side in (512, 1024)]
        cells = [f"{size / GIB:.1f}" for size in parts]
        rows.append((name, f"{found.parameters / 1e9:.1f}", model.sample_tokens(1024, 1024), *cells))
    head = ("model", "parameters, 10⁹", "tokens at 1024²", "bf16", "int8 or fp8", "nf4", "LoRA", "512² checkpointed", "1024² checkpointed")  # fmt: skip
    yield from table(head, rows)


def shipped() -> Iterator[str]:
    yield "## The configurations that ship, at 1024×1024\n"
    yield "GiB on each process, without the VAE, the encoders of the objective, and what a framework keeps for itself.\n"
    rows = []
    for name, processes, sharded in SHIPPED:
        config = read_config(ROOT / "configs" / f"{name}.toml", files=False)
        found = footprint(config.lora)
        share = -(-config.training.batch_size // processes)
        parts = [found.weight_bytes(config.model.dtype, config.model.quantization, processes if sharded else 1)]
        parts.append(sum(found.lora_bytes(config.training.optimizer, bool(config.training.ema)).values()))
        parts.append(
            found.activation_bytes(
                KONTEXT.sample_tokens(1024, 1024), share, config.model.dtype, config.model.gradient_checkpointing
            )
        )
        pairs = config.training.batch_size * config.training.accumulation
        cells = [f"{size / GIB:.2f}" for size in (*parts, sum(parts))]
        rows.append((name, processes, pairs, share, config.lora.rank, *cells))
    yield from table(
        ("config", "processes", "pairs a step", "pairs a pass and process", "rank", "weights", "LoRA and optimiser", "activations", "sum"),
        rows,
    )  # fmt: skip


def exchanged() -> Iterator[str]:
    found, tokens = of("attention + MLP", 32), KONTEXT.sample_tokens(1024, 1024)
    seconds = found.step_flops(tokens, 2) / (TFLOPS * SHARE * 1e12)
    yield "## Between processes, in a step of two pairs each, rank 32\n"
    yield (
        f"Computing takes {seconds:.2f} s by the assumption above. Efficiency: computing / (computing + sending), as if nothing "
        "overlapped; FSDP fetches the next block while one computes, so that what it reaches lies between this and 100%.\n"
    )
    rows = []
    for processes, sharded in ((2, False), (8, False), (16, False), (8, True)):
        parts = found.exchanged_bytes(processes, sharded=sharded)
        size = sum(parts.values())
        cells = [f"{seconds / (seconds + size / (speed * GB)):.1%}" for speed in LINKS.values()]
        what = "weights shared (FSDP)" if sharded else "weights whole (DDP)"
        rows.append((processes, what, f"{size / GB:.2f}", *cells))
    yield from table(("processes", "", "GB received", *LINKS), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scaling_arithmetic.md")
    given = parser.parse_args()
    lines = [
        "# FLUX.1 Kontext by arithmetic",
        "",
        "Written by `benchmarks/scaling.py`: sums over shapes, nothing is measured.",
        "",
    ]
    for part in (weights, lora_sizes, activations, by_model, shipped, exchanged):
        lines += part()
    given.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    NETWORK = empty_network(KONTEXT, CONFIG)
    main()
