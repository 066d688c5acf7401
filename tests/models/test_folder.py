"""A folder in diffusers' layout: looked at before any work, loaded in every dtype and quantisation that is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("diffusers")

import torch
from safetensors.torch import save_file
from small_kontext import VAE, write_kontext

from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.autoencoder import VAEDecoder
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.folder import ModelFolder
from editloss_core.models.kontext import KONTEXT, Caption
from editloss_core.models.registry import titles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_kontext(tmp_path_factory.mktemp("kontext"))


@pytest.fixture
def folder(whole, tmp_path):
    """One that may be broken."""
    return shutil.copytree(whole, tmp_path / "kontext")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_nothing_is_wrong_with_a_whole_folder(whole):
    assert ModelFolder(whole).faults() == []


def test_every_missing_part_is_named_at_once(folder):
    for part in ("vae", "tokenizer_2", "text_encoder"):
        shutil.rmtree(folder / part)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    said = ModelFolder(folder, dtype="bf61", quantization="nf5").faults()
    for part, what in (
        ("vae", "there is no config.json"),
        ("tokenizer_2", "there is no tokenizer"),
        ("text_encoder", "there is no config.json"),
        ("transformer", "there are no weights (.safetensors)"),
    ):
        assert sum(line.startswith(f"path: {part}: {what}") for line in said) == 1
    assert "dtype: expected one of bf16, fp16, fp32, got 'bf61'" in said
    assert any(line.startswith("quantization: expected one of none, nf4") for line in said) and len(said) == 6


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, f"expected an edit model that is known ({titles()}), got a folder of FluxPipeline"),
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "transformer: expected a FluxTransformer2DModel, got a SD3"),
        ("transformer/config.json", {"in_channels": 96}, "expected in_channels 16 (2×2 latents of 4 channels), got 96: that is not Kontext"),
        ("transformer/config.json", {"out_channels": 8}, "transformer: expected out_channels 16, got 8"),
        ("text_encoder/config.json", {"hidden_size": 768}, "text_encoder: expected hidden_size 20, which the transformer takes, got 768"),
        ("text_encoder_2/config.json", {"d_model": 4096}, "text_encoder_2: expected d_model 24"),
        ("text_encoder_2/config.json", {"architectures": ["T5Model"]}, "text_encoder_2: expected a T5EncoderModel, got a T5Model"),
    ],
)  # fmt: skip
def test_what_is_not_kontext_is_told_by_its_config(folder, file, values, expected):
    change(folder / file, **values)
    said = ModelFolder(folder).faults()
    assert len(said) == 1 and expected in said[0]


def test_no_folder_and_no_diffusers_folder(tmp_path):
    assert ModelFolder(tmp_path / "none").faults() == [f"path: there is no folder {tmp_path / 'none'}"]
    (said,) = ModelFolder(tmp_path).faults()
    assert "in diffusers' layout" in said and "there is no model_index.json" in said
    (tmp_path / "model_index.json").write_text("{")
    assert "is not JSON" in ModelFolder(tmp_path).faults()[0]


def test_a_single_file_is_looked_at(whole, tmp_path):
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, tmp_path / "diffusers.safetensors")
    save_file(
        {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, tmp_path / "fine.safetensors"
    )
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    for name, expected in (
        ("none.safetensors", "there is no file"),
        ("a.ckpt", "expected a .safetensors file, got a.ckpt"),
        ("broken.safetensors", "not a whole safetensors file"),
        ("diffusers.safetensors", "has no double_blocks.0.img_attn.qkv.weight among its 1 tensors"),
    ):
        (said,) = ModelFolder(whole, transformer=tmp_path / name).faults()
        assert said.startswith("transformer: ") and expected in said
    folder = shutil.copytree(whole, tmp_path / "without")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert ModelFolder(folder, transformer=tmp_path / "fine.safetensors").faults() == []


def test_a_decoder_is_looked_at_and_decodes(whole, tmp_path):
    from diffusers import AutoencoderKL, AutoencoderTiny

    tiny = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4, "latent_channels": 4,
            "num_encoder_blocks": [1] * 4, "num_decoder_blocks": [1] * 4}  # fmt: skip
    AutoencoderTiny(**tiny).save_pretrained(tmp_path / "tiny")
    AutoencoderTiny(**{**tiny, "latent_channels": 16}).save_pretrained(tmp_path / "wide")
    AutoencoderKL(**VAE).save_pretrained(tmp_path / "large")
    for name, expected in (
        ("none", "decoder: there is no config.json"),
        ("wide", "decoder: expected one for latents of 4 channels, got 16"),
    ):
        (said,) = ModelFolder(whole, decoder=tmp_path / name).faults()
        assert said.startswith(expected)
    (said,) = ModelFolder(whole, decoder=whole / "text_encoder").faults()
    assert "expected a folder of a AutoencoderKL or a AutoencoderTiny" in said
    for name in ("tiny", "large"):
        files = ModelFolder(whole, decoder=tmp_path / name)
        assert files.faults() == []
        decode = VAEDecoder(files.load_decoder(CPU))
        z = torch.randn(1, 4, 4, 4).requires_grad_()
        pictures = decode(z)
        assert pictures.shape == (1, 32, 32, 3) and 0 <= pictures.min() and pictures.max() <= 1
        assert torch.autograd.grad(pictures.sum(), z)[0].abs().max() > 0
        assert decode.checkpointing == (name == "large")
    assert ModelFolder(whole).load_decoder(CPU) is None


def learns(transformer, dtype):
    """One step down the gradient of a LoRA on it makes the loss smaller."""
    denoiser = DiffusersDenoiser(KONTEXT, transformer, checkpointing=True)
    lora = LoRA(denoiser.module, LoRASettings(rank=2, alpha=2.0)).attach()
    g = torch.Generator().manual_seed(0)
    caption = Caption(torch.randn(8, 24, generator=g), torch.randn(20, generator=g))
    x, reference, target = torch.randn(3, 1, 4, 4, 4, generator=g)
    lora.to(denoiser.device)
    losses = []
    optimizer = torch.optim.AdamW(lora.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        loss = (denoiser(x, torch.tensor([0.5]), [reference], [caption]).cpu() - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad.isfinite().all() for p in lora.parameters())
        optimizer.step()
    assert denoiser.dtype == dtype
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_dtypes(whole, name):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    made = ModelFolder(whole, dtype=name).load_transformer(CPU)
    assert {p.dtype for p in made.parameters()} == {dtype} and not any(p.requires_grad for p in made.parameters())
    learns(made, dtype)


@pytest.mark.parametrize(
    ("name", "package"),
    [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("torchao_int8", "torchao")],
)
def test_quantised_loading(whole, name, package):
    files = ModelFolder(whole, quantization=name)
    if importlib.util.find_spec(package) is None:
        (said,) = files.faults()
        assert said.startswith(f"quantization: {name} needs a package; pip install {package}")
        return
    assert files.faults() == []
    if files.faults_on(CPU):
        assert (
            package == "bitsandbytes"
            and f"by bitsandbytes ({name}) on a GPU only, this is cpu" in files.faults_on(CPU)[0]
        )
        if not torch.cuda.is_available():
            return
        device = torch.device("cuda")
    else:
        device = CPU
    made = files.load_transformer(device)
    plain = replace(files, quantization="none").load_transformer(device)
    layer, own = (m.get_submodule("transformer_blocks.0.attn.to_q") for m in (made, plain))
    assert type(layer.weight) is not type(own.weight) and (layer.in_features, layer.out_features) == (32, 32)
    x = torch.randn(3, 32, dtype=torch.bfloat16, device=device)
    apart = (layer(x) - own(x)).float().abs().max()
    assert 0 < apart < 0.3
    learns(made, torch.bfloat16)
