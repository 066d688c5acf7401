"""What torchrun starts for test_run.py: the command in two processes, and the tiny Kontext with its weights shared out.

torchrun --nproc_per_node 2 kontext_processes.py KONTEXT_FOLDER CONFIG.toml
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.folder import ModelFolder
from editloss_core.models.kontext import KONTEXT, Caption
from editloss_core.processes import leave, place
from editloss_core.training.__main__ import main

BLOCKS = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]


def gradients(folder: Path, accelerator: Accelerator, shared_out: bool) -> list[torch.Tensor]:
    """Of this process' own sample."""
    transformer = ModelFolder(folder, dtype="fp32").load_transformer(torch.device("cpu"))
    denoiser = DiffusersDenoiser(KONTEXT, transformer, device=accelerator.device)
    lora = LoRA(transformer, LoRASettings(2, 3.0, layers="all"))
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.1 * torch.randn(layer.up.shape, generator=torch.Generator().manual_seed(i)))
    if shared_out:
        denoiser.module = place(transformer, accelerator)
        first = next(denoiser.module.transformer_blocks[0].parameters())
        assert type(first).__name__ == "DTensor" and first.to_local().numel() < first.numel()
    g = torch.Generator().manual_seed(accelerator.process_index)
    x, reference, target = torch.randn(3, 1, 4, 4, 4, generator=g)
    caption = Caption(torch.randn(8, 24, generator=g), torch.randn(20, generator=g))
    lora.attach()
    (denoiser(x, torch.tensor([0.4]), [reference], [caption]) - target).square().mean().backward()
    lora.detach()
    return [p.grad for p in lora.parameters()]


if __name__ == "__main__":
    folder, config = sys.argv[1:]
    status = main([config])
    accelerator = Accelerator()
    whole = gradients(Path(folder), accelerator, False)
    # accelerate knows FSDP on GPUs only; its function that shares weights out works on CPUs as well.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=BLOCKS,
        reshard_after_forward=True, cpu_ram_efficient_loading=False,
    )  # fmt: skip
    shared = gradients(Path(folder), accelerator, True)
    apart = max((a - b).abs().max().item() for a, b in zip(whole, shared))
    print(f"process {accelerator.process_index}: status {status}, gradients {apart:.1e} apart", flush=True)
    leave(status or int(apart > 1e-6 or not max(g.abs().max() for g in whole) > 1e-3))
