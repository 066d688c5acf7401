"""OmniGen2: ComfyUI's class with five blocks, and its Qwen2.5-VL 3B with one layer."""

from __future__ import annotations

from typing import Any

import torch
from driver_model_encoders import randomised, small_vae
from torch import Tensor

SINCE, SCHEDULER = "0.3.42", "simple"
vae = small_vae
TEXT_WIDTH, TOKENS = 32, 5
CPU = torch.device("cpu")


def build() -> Any:
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Omnigen2(
        {
            "image_model": "omnigen2", "axes_dim_rope": [8, 4, 4], "axes_lens": [64, 64, 64], "hidden_size": 48,
            "in_channels": 16, "multiple_of": 16, "num_attention_heads": 3, "num_kv_heads": 1, "num_layers": 2,
            "num_refiner_layers": 1, "patch_size": 2, "text_feat_dim": TEXT_WIDTH, "timestep_scale": 1000.0,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device=CPU)
    randomised(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def prompt(seed: int) -> list[Any]:
    text = torch.randn(1, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
    return [[text, {"pooled_output": None, "attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}]]


def latents(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(seed))


def clip() -> Any:
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.omnigen2 as omnigen2

    options = {
        "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # fmt: skip
    target = comfy.supported_models_base.ClipTarget(omnigen2.Omnigen2Tokenizer, omnigen2.te(dtype_llama=torch.float32))
    made = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "qwen25_3b_model_config": options})
    randomised(made.cond_stage_model)
    return made


def guider(model: Any, positive: list[Any], negative: list[Any], bare: list[Any], cfg: float) -> Any:
    import comfy_extras.nodes_custom_sampler as stock

    return stock.DualCFGGuider.execute(model, positive, negative, bare, cfg, 2.0, "regular")[0]
