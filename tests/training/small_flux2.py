"""A tiny FLUX.2, dev or klein, with random weights in diffusers' layout on disk: every part is of the real class."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from small_kontext import randomised

# 32 channels wide, one block of each kind; 4 channels of the autoencoder's, 8 pixels each, which go to the network 2×2 in one.
TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": [4, 4, 4, 4],
}
VAE = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TEXT = {
    "vocab_size": 300, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 8, "pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip


def transformer(seed: int = 0, guidance: bool = False, **changes):
    from diffusers import Flux2Transformer2DModel

    return randomised(Flux2Transformer2DModel(**{**TRANSFORMER, "guidance_embeds": guidance, **changes}), seed)


def vae(seed: int = 1):
    from diffusers import AutoencoderKLFlux2

    made = randomised(AutoencoderKLFlux2(**VAE), seed, 0.05)
    g = torch.Generator().manual_seed(seed)
    made.bn.running_mean.copy_(0.3 * torch.randn(made.bn.running_mean.shape, generator=g))
    made.bn.running_var.copy_(0.5 + torch.rand(made.bn.running_var.shape, generator=g))
    return made


def write_flux2(folder: Path, dev: bool = False, distilled: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A folder that ``Flux2Pipeline.from_pretrained`` or ``Flux2KleinPipeline.from_pretrained`` loads."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralProcessor,
        Qwen2TokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )  # fmt: skip

    write_tokenizer(folder / "tokenizer", dev)
    if dev:
        vision = {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 14,
            "image_size": 28, "head_dim": 8,
        }  # fmt: skip
        config = Mistral3Config(
            text_config={"model_type": "mistral", **TEXT, "num_hidden_layers": 31},
            vision_config={"model_type": "pixtral", **vision}, image_token_index=260,
        )  # fmt: skip
        text, tokenizer = (
            Mistral3ForConditionalGeneration(config),
            PixtralProcessor.from_pretrained(folder / "tokenizer"),
        )
    else:
        text = Qwen3ForCausalLM(Qwen3Config(**TEXT, num_hidden_layers=28))
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer")
    kind, options = (Flux2Pipeline, {}) if dev else (Flux2KleinPipeline, {"is_distilled": distilled})
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(), text_encoder=randomised(text, 3), tokenizer=tokenizer, transformer=transformer(4, dev), **options,
    )  # fmt: skip
    pipeline.to(dtype).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, dev: bool) -> None:
    """Bytes without a merge, and a short template of a chat."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(t) for t in ("<end>", "<pad>", "<a>", "<b>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")]
    )
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    parts = "{{ m.content }}" if not dev else "{% for c in m.content %}{{ c.text }}{% endfor %}"
    template = "{% for m in messages %}<a>{{ m.role }} " + parts + "<b>{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast" if dev else "Qwen2Tokenizer", "model_max_length": 2048,
              "eos_token": "<end>", "pad_token": "<pad>", "padding_side": "left" if dev else "right",
              "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if dev:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        processor = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
        (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
        image = {"image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 14, "width": 14}}
        (folder / "preprocessor_config.json").write_text(json.dumps(image), encoding="utf-8")
