"""FLUX.1 Kontext: ComfyUI's Flux with five blocks, its T5 and its CLIP with one layer each."""

from __future__ import annotations

from typing import Any

import torch
from driver_model_encoders import FLUX, TEXT, randomised, small_flux
from torch import Tensor

SINCE = "0.3.43"
build = small_flux


def prompt(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, FLUX["vec_in_dim"], generator=generator)
    return [[torch.randn(1, TEXT, FLUX["context_in_dim"], generator=generator), {"pooled_output": pooled}]]


def latents(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(1, FLUX["in_channels"], height, width, generator=torch.Generator().manual_seed(seed))


def clip() -> Any:
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.flux as flux

    options = {
        "t5xxl_model_config": {
            "d_model": FLUX["context_in_dim"], "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1,
        },
        "clip_l_model_config": {
            "hidden_size": FLUX["vec_in_dim"], "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
        },
    }  # fmt: skip
    target = comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip(dtype_t5=torch.float32))
    made = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **options})
    randomised(made.cond_stage_model)
    return made
