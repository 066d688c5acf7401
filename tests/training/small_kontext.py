"""A tiny FLUX.1 Kontext with random weights in diffusers' layout on disk: every part is of the real class."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# 32 channels wide, one block of each kind; 4 latent channels, 8 pixels per latent as in the real one.
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
VAE = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def randomised(module: torch.nn.Module, seed: int, scale: float = 0.2) -> torch.nn.Module:
    """Every weight takes part, the same for a seed: modulations and norms are not at 0 or 1, and pictures are not all grey."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            spread = p[0].numel() ** -0.5 if p.ndim > 1 else scale
            p.copy_(torch.randn(p.shape, generator=g) * spread + float(p.ndim == 1 and name.endswith("weight")))
    return module.eval()


def transformer(seed: int = 0, **changes):
    from diffusers import FluxTransformer2DModel

    return randomised(FluxTransformer2DModel(**{**TRANSFORMER, **changes}), seed)


def write_kontext(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder that ``FluxKontextPipeline.from_pretrained`` loads."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    write_tokenizers(folder)
    clip = CLIPTextConfig(
        vocab_size=600, hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=598, eos_token_id=599, pad_token_id=599, hidden_act="quick_gelu",
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=300, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0,
            base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=randomised(AutoencoderKL(**VAE), 1, 0.05),
        text_encoder=randomised(CLIPTextModel(clip), 2),
        text_encoder_2=randomised(T5EncoderModel(t5), 3),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=transformer(4),
    )  # fmt: skip
    pipeline.to(dtype).save_pretrained(folder)
    return folder


def write_tokenizers(folder: Path) -> None:
    """CLIP's byte pairs without a merge, and T5's pieces of one letter."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {s: i for i, s in enumerate([*signs, *(f"{s}</w>" for s in signs)])}
    vocabulary |= {"<|startoftext|>": 598, "<|endoftext|>": 599}
    clip = folder / "tokenizer"
    clip.mkdir(parents=True)
    (clip / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (clip / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
              "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}  # fmt: skip
    (clip / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    letters = [*map(chr, range(33, 127)), "▁", "’", "“", "”"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((letter, -3.0) for letter in letters)]
    t5 = Tokenizer(models.Unigram(pieces, unk_id=2))
    t5.normalizer = normalizers.NFKC()
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.decoder = decoders.Metaspace()
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer_2").mkdir(parents=True)
    t5.save(str(folder / "tokenizer_2" / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "pad_token": "<pad>", "eos_token": "</s>",
              "unk_token": "<unk>", "extra_ids": 0}  # fmt: skip
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
