"""``python -m editloss_core.training`` with models beside FLUX.1 Kontext: from a config to LoRA files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

for name in ("diffusers", "accelerate", "peft"):
    pytest.importorskip(name)

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_flux2 import write_flux2
from small_qwen import draw, write_longcat, write_qwen

from editloss_core.lora.lora import MODEL_METADATA, LoRA, LoRASettings
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.folder import ModelFolder
from editloss_core.objective import recommended
from editloss_core.training.__main__ import main
from editloss_core.training.config import (
    ModelSection,
    PairsSection,
    RunSection,
    TrainingConfig,
    VAEDecoderSection,
    ValidationSection,
    to_toml,
)
from editloss_core.training.settings import TrainingSettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "editloss_core" / "demo" / "pictures"
WRITERS = {
    "qwen_2511": lambda folder: write_qwen(folder, zero_cond_t=True),
    "longcat": write_longcat,
    "flux2_klein": write_flux2,
}
EXPECTED = {
    "qwen_2511": (24, 2, "transformer_"),
    "longcat": (22, 3, ""),
    "flux2_klein": (14, 2, ""),
}  # layers, blocks, names


@pytest.fixture(scope="module", params=WRITERS)
def base(request, tmp_path_factory):
    """A folder with a model and four pairs."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder / "model")
    for part in ("before", "after", "mask"):
        (folder / "pairs" / part).mkdir(parents=True)
        for path in sorted((PAIRS / part).iterdir())[:4]:
            shutil.copy(path, folder / "pairs" / part)
    return folder


def config(name, steps=4, resume=""):
    return TrainingConfig(
        model=ModelSection("model", dtype="fp32"),
        pairs=PairsSection("pairs", resolution=64, default_caption="Replace the chair."),
        run=RunSection(f"runs/{name}", resume, checkpoint_every=2, lora_dtype="fp32"),
        encoders={"decoder": VAEDecoderSection((1, 2))},
        objective=recommended("decoder"),
        training=TrainingSettings(
            steps=steps, batch_size=2, learning_rate=0.03, gradients_every=2, validate_every=2, preview_steps=2, previews=1,
            checkpoint_every=2, caption_dropout=0.5,
        ),
        lora=LoRASettings(2, 3.0),
        validation=ValidationSection(validate_every=2, previews=1, preview_steps=2),
    )  # fmt: skip


def write(base, made):
    path = base / f"{made.run.folder.replace('/', '_')}.toml"
    path.write_text(to_toml(made), encoding="utf-8")
    return str(path)


def test_a_run_from_its_check_to_its_files_and_one_that_was_stopped(base, capsys, monkeypatch):
    loads, load_text = [], ModelFolder.load_text
    monkeypatch.setattr(ModelFolder, "load_text", lambda *a: loads.append(1) or load_text(*a))
    made, longcat = config("a"), base.name.startswith("longcat")
    layers, blocks, names = next(about for name, about in EXPECTED.items() if base.name.startswith(name))
    assert main([write(base, made), "--check"]) == 0
    said = capsys.readouterr().out
    assert f"LoRA        attention + MLP, rank 2: {layers} layers" in said
    # 64×64 pixels and as many of the reference are 2 · 16 tokens, beside those of the caption.
    tokens = ModelFolder(base / "model").edit_model.text_tokens + 32
    assert f"{blocks} blocks" in said and f"GiB with all weights at {tokens} tokens a sample" in said
    assert not (base / "runs").exists()
    assert main([write(base, made)]) == 0
    assert "self-check passed (diffusers" in capsys.readouterr().out
    folder = base / "runs" / "a"
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "validation"] == [2, 4]
    assert any((folder / "pictures").iterdir())
    assert main([write(base, config("b", steps=2))]) == 0
    assert main([write(base, config("b", resume="last"))]) == 0
    files = [(base / "runs" / name / "lora.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert loads == [1], "captions of the pairs are encoded once, for every run"
    # diffusers has no loader of LoRA for LongCat: what nothing reads is not written
    assert {p.name for p in folder.glob("*.safetensors")} == {
        "lora.safetensors", *([] if longcat else ["lora_diffusers.safetensors"])
    }  # fmt: skip
    with safe_open(folder / "lora.safetensors", framework="pt") as file:
        assert file.metadata()[MODEL_METADATA] == ModelFolder(base / "model").edit_model.id
        assert all(key.startswith(f"diffusion_model.{names}") for key in file.keys())


def test_its_lora_loads_in_the_pipeline_with_the_effect_that_training_had(base):
    if base.name.startswith("longcat"):
        pytest.skip("diffusers has no loader of LoRA for LongCat")
    if base.name.startswith("flux2"):
        pytest.skip("its file for ComfyUI has other names: tests/comfyui/test_dialects.py")
    folder, files = base / "runs" / "a", ModelFolder(base / "model", dtype="fp32")
    model, pipeline = files.edit_model, files.load_text(torch.device("cpu"))
    transformer = files.load_transformer(torch.device("cpu"))
    pipeline.register_modules(transformer=transformer)
    caption = model.caption({"tokens": draw(9, 24)})
    x, reference, t = draw(1, 4, 4, 4, seed=1), draw(1, 4, 4, 4, seed=2), torch.tensor([0.6])
    denoiser = DiffusersDenoiser(model, transformer, checkpointing=False)

    def velocity():
        with torch.no_grad():
            return denoiser(x, t, [reference], [caption])

    base_alone = velocity()
    lora = LoRA(transformer, LoRASettings(2, 3.0), model=model)
    lora.load_tensors(load_file(folder / "lora.safetensors"))
    lora.attach()
    trained = velocity()
    lora.detach()
    assert (trained - base_alone).abs().max() > 1e-2
    # The one for ComfyUI has the same names, and loads too.
    for name in ("lora_diffusers.safetensors", "lora.safetensors"):
        pipeline.load_lora_weights(folder, weight_name=name)
        assert torch.allclose(velocity(), trained, atol=1e-5)
        pipeline.unload_lora_weights()
        assert torch.allclose(velocity(), base_alone, atol=1e-6)
