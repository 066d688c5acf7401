"""Run by a launcher, in two processes: a run beside a base that DeepSpeed's ZeRO-3 shares out ends as in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch

torch.set_num_threads(1)

from processes_checks import EVERYTHING, RUN, alone, pairs, same_run
from small import SmallDenoiser, conditioning, encoders, parts, prepared_pairs, settings

from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.processes import leave, place
from editloss_core.training.trainer import Trainer


def main() -> None:
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    import deepspeed
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, which takes minutes
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), mixed_precision="no")
    expected = alone()[1]
    denoiser = SmallDenoiser(checkpointing=True)
    lora = LoRA(denoiser.module, LoRASettings(rank=4, alpha=4.0, layers="all"), seed=0)
    denoiser.module = place(denoiser.module, accelerator)
    assert not any(p.numel() for p in denoiser.module.parameters()), "the weights are elsewhere between their uses"
    held_out = prepared_pairs(3, seed=9, names="held out")
    made = Trainer(
        denoiser, lora, pairs(), conditioning(7), settings(**{k: v for k, v in RUN.items() if k != "objective"}),
        objective=EVERYTHING, encoders=encoders(), decode=parts()[0].decode, validation=held_out,
        validation_conditioning=conditioning(3), accelerator=accelerator,
    )  # fmt: skip
    same_run(made.run(), expected)


if __name__ == "__main__":
    main()
    leave(0)
