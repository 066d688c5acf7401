"""A tiny Qwen-Image-Edit and a tiny LongCat-Image-Edit with random weights in diffusers' layout on disk: every part is of the
real class, a Qwen2.5-VL with its tokenizer and processor among them."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_kontext import VAE as KL
from small_kontext import randomised

# 32 channels wide, two blocks; 4 latent channels, 8 pixels per latent as in the real one.
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [-0.7571, 0.9653, 0.1075, -0.1745],
    "latents_std": [2.8184, 1.4541, 2.3275, 0.6558],
}
# Its pipeline has 16 latent channels written into it.
LONGCAT = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 24,
    "axes_dims_rope": [4, 6, 6],
}
SIGNS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def transformer(seed: int = 4, **changes):
    from diffusers import QwenImageTransformer2DModel

    return randomised(QwenImageTransformer2DModel(**{**TRANSFORMER, **changes}), seed)


def longcat_transformer(seed: int = 4):
    from diffusers import LongCatImageTransformer2DModel

    return randomised(LongCatImageTransformer2DModel(**LONGCAT), seed)


def tokenizer_and_processor():
    """Qwen's byte pairs without a merge, and pictures as the real processor takes them."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    vocabulary = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=list(SIGNS[1:]))
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056})
    return tokenizer, Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template="-")


def text_encoder(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {sign: tokenizer.convert_tokens_to_ids(sign) for sign in SIGNS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return randomised(Qwen2_5_VLForConditionalGeneration(config), 2)


def write_qwen(folder: Path, plus: bool = True, **changes) -> Path:
    """A folder that ``QwenImageEditPlusPipeline.from_pretrained`` loads, or with ``plus=False`` the first Edit's pipeline."""
    import diffusers

    tokenizer, processor = tokenizer_and_processor()
    pipeline = getattr(diffusers, "QwenImageEditPlusPipeline" if plus else "QwenImageEditPipeline")(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift=1.0, shift_terminal=0.02,
            base_image_seq_len=256, max_image_seq_len=8192,
        ),
        vae=randomised(diffusers.AutoencoderKLQwenImage(**VAE), 1, 0.05),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=processor,
        transformer=transformer(**changes),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def write_longcat(folder: Path) -> Path:
    """A folder that ``LongCatImageEditPipeline.from_pretrained`` loads."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImageEditPipeline

    tokenizer, processor = tokenizer_and_processor()
    pipeline = LongCatImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0,
            base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=randomised(AutoencoderKL(**{**KL, "latent_channels": 16}), 1, 0.05),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_processor=processor,
        transformer=longcat_transformer(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_picture(height, width):
    return Image.fromarray((np.random.RandomState(0).rand(height, width, 3) * 255).astype("uint8"))


def as_tensor(picture):
    return torch.from_numpy(np.asarray(picture).copy()).float() / 255


@contextmanager
def smaller(pipeline, width=80, height=48):
    """The pipeline's pictures of about 1024² pixels have this size, and those of 384² a quarter of its sides: nothing else of it
    would be slow."""
    module = sys.modules[type(pipeline).__module__]
    own = module.calculate_dimensions

    def sides(area, ratio):
        made = (width, height) if area == 1024 * 1024 else (width // 4, height // 4)
        return (*made, None)[: len(own(area, ratio))]

    module.calculate_dimensions = sides
    try:
        yield
    finally:
        module.calculate_dimensions = own


def called(pipeline, picture, prompt, steps=3, **options):
    """(what the pipeline gave its transformer at every step, and what came back; the latents that it made)"""
    seen = []
    hook = pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        made = pipeline(
            image=picture, prompt=prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(3),
            output_type="latent", **options,
        ).images  # fmt: skip
    finally:
        hook.remove()
    return seen, made
