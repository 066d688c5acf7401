"""What Qwen-Image-Edit's three have in common, and LongCat's text encoder with them: ComfyUI's classes at a small size."""

from __future__ import annotations

from typing import Any

import torch
from driver_model_encoders import randomised, small_vae
from torch import Tensor

WIDTH = 24  # of the text encoder
CPU = torch.device("cpu")
NETWORK = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip

UNUSED = tuple(
    f"transformer_blocks.1.{name}"
    for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
)


def network(**config: Any) -> Any:
    import comfy.model_patcher
    import comfy.supported_models

    settings = comfy.supported_models.QwenImage({**NETWORK, **config})
    settings.set_inference_dtype(torch.float32, None)
    base = settings.get_model({}, device=CPU)
    randomised(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def prompt(seed: int) -> list[Any]:
    length = 5 + seed % 3  # which is the picture's and the words'
    context = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))
    return [[context, {"pooled_output": None}]]


def latents(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(seed))


def text_encoder(tokenizer: Any, model: Any) -> Any:
    """Qwen2.5-VL with one layer of words and one of pictures; the real tokenizer."""
    import comfy.sd
    import comfy.supported_models_base
    from comfy.text_encoders import qwen_vl

    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_layers": 1}
    whole = qwen_vl.Qwen2VLVisionTransformer  # whose width nothing but code says
    qwen_vl.Qwen2VLVisionTransformer = lambda **options: whole(**{**options, **vision})
    try:
        target = comfy.supported_models_base.ClipTarget(tokenizer, model)
        options = {"dtype": torch.float32, "qwen25_7b_model_config": sizes}
        made = comfy.sd.CLIP(target, model_options=options)
    finally:
        qwen_vl.Qwen2VLVisionTransformer = whole
    randomised(made.cond_stage_model)
    return made


def clip() -> Any:
    from comfy.text_encoders import qwen_image

    return text_encoder(qwen_image.QwenImageTokenizer, qwen_image.te(dtype_llama=torch.float32))


def vae() -> Any:
    return small_vae(16, "wan")


def plus(clip: Any, caption: str, before: Tensor, *further: Tensor) -> list[Any]:
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus

    pictures = {f"image{number}": picture for number, picture in enumerate((before, *further), 1)}
    return TextEncodeQwenImageEditPlus.execute(clip, caption, **pictures)[0]


def edit(clip: Any, caption: str, before: Tensor) -> list[Any]:
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit

    return TextEncodeQwenImageEdit.execute(clip, caption, image=before)[0]


def sampled(model: Any) -> Any:
    """With the pipeline's rescale of classifier-free guidance: each token of 2 × 2 latents stays as long as the caption's own.

    The stock node for it, CFG Norm, rescales single latents of x̂0 and never makes them longer.
    """

    def rescaled(args: dict[str, Any]) -> Tensor:
        cond, uncond = args["cond"], args["uncond"]
        made = uncond + args["cond_scale"] * (cond - uncond)

        def length(v: Tensor) -> Tensor:
            cells = v.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [B, C, 1, rows, 2, columns, 2]
            return cells.square().sum((1, 4, 6)).sqrt()[:, None].repeat_interleave(2, -2).repeat_interleave(2, -1)

        return made * (length(cond) / length(made))

    patched = model.clone()
    patched.set_model_sampler_cfg_function(rescaled)
    return patched
