"""ComfyUI's Flux2 with three blocks, as dev and the two kleins, and their text encoders, 28 and 30 layers of width 8."""

from __future__ import annotations

import base64
import json
from typing import Any
from unittest import SkipTest

import torch
from driver_model_encoders import TEXT, flux_config, randomised
from torch import Tensor

WIDTH = 8  # of a text encoder
FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 3 * WIDTH,
    "hidden_size": 32,
    "mlp_ratio": 3.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [4, 4, 4, 4],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
CLIP = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}


def build(guidance: bool, file: str = "", **changed: Any) -> Any:
    """As the stock loader leaves it: newer ones remember the file."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Flux2(flux_config(**{**FLUX2, **changed}, guidance_embed=guidance))
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device=torch.device("cpu"))
    randomised(base.diffusion_model)
    patcher = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    patcher.cached_patcher_init = (build, (file,))
    return patcher


def prompt(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, TEXT, FLUX2["context_in_dim"], generator=generator)
    return [[context, {"pooled_output": None}]]


def latents(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(1, 128, height, width, generator=torch.Generator().manual_seed(seed))


def mistral() -> Any:
    import comfy.text_encoders.flux as flux

    if not hasattr(flux, "from_tekken_json"):
        raise SkipTest("this ComfyUI reads Mistral's tokens by a class that transformers 5 has made otherwise")
    target = (flux.Flux2Tokenizer, flux.flux2_te(dtype_llama=torch.float32, pruned=True))
    return _clip(*target, "mistral3_24b", {**CLIP, "vocab_size": 300}, {"tekken_model": _letters()})


def qwen3() -> Any:
    import comfy.text_encoders.flux as flux

    if not hasattr(flux, "KleinTokenizer"):
        raise SkipTest("this ComfyUI has no text encoder of klein, which came with 0.9.2")
    target = (flux.KleinTokenizer, flux.klein_te(dtype_llama=torch.float32, model_type="qwen3_4b"))
    return _clip(*target, "qwen3_4b", {**CLIP, "num_hidden_layers": 28}, {})


def vae() -> Any:
    """Of the real class with its batch norm, narrow; its loader knows the real widths only."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {
        "double_z": True, "z_channels": 32, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "batch_norm_latent": True,
    }  # fmt: skip
    params = {"ddconfig": config, "embed_dim": 32}
    net = randomised(AutoencoderKL(**params), scale=0.05)
    net.bn.running_mean.fill_(0.1)
    net.bn.running_var.fill_(0.5)
    made = comfy.sd.VAE(sd=net.state_dict(), config={"params": params})
    made.latent_channels, made.downscale_ratio, made.upscale_ratio = 128, 16, 16  # as its loader has them
    return made


def _clip(tokenizer: Any, model: Any, name: str, config: dict[str, Any], data: dict[str, Any]) -> Any:
    import comfy.sd
    import comfy.supported_models_base

    made = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(tokenizer, model),
        model_options={"dtype": torch.float32, f"{name}_model_config": config}, tokenizer_data=data,
    )  # fmt: skip
    randomised(made.cond_stage_model)
    return made


def _letters() -> Tensor:
    """Mistral's file of tokens with single bytes alone."""
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        *map("<{}>".format, range(5)),
    ]
    vocabulary = {
        "config": {"default_vocab_size": 256 + len(special), "default_num_special_tokens": len(special), "pattern": "\\S+|\\s+"},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)],
        "special_tokens": [{"rank": i, "token_str": token} for i, token in enumerate(special)],
    }  # fmt: skip
    return torch.frombuffer(bytearray(json.dumps(vocabulary).encode()), dtype=torch.uint8)
