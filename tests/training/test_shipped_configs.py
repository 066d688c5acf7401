"""The configurations in configs/ and the page about them: they can be read, and say what the program knows."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import MISSING
from pathlib import Path

import pytest

from editloss_core.objective import TERMS
from editloss_core.training.config import ENCODER_KEYS, SECTIONS, TERM_KEYS
from editloss_core.training.config_reader import ConfigError, read_config, tomllib

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PAGE = (ROOT / "docs" / "training_config.md").read_text(encoding="utf-8")


def test_there_is_one_for_each_size_of_machine():
    own = {"flux2_24gb", "flux2_80gb", "qwen_24gb", "qwen_80gb"}
    assert {p.stem for p in CONFIGS} == {"one_24gb", "one_80gb", "eight_gpus_fsdp", "two_nodes", *own}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_nothing_is_wrong_with_it_but_files_that_are_not_here(path, monkeypatch):
    from editloss_core.training import settings

    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: object())  # bitsandbytes is for GPUs
    config = read_config(path, files=False)
    assert {t.kind for t in config.objective.terms} >= {"no_edit_identity", "geometry_match", "overlay_avoidance"}
    assert config.run.folder == f"runs/{path.stem}"
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    said = caught.value.problems
    assert said and all(re.search(r"there is no (folder|file)", line) for line in said)


# What the config.json of a published model says, of what tells its size.
KLEIN_4B = {
    "model_index": {"_class_name": "Flux2KleinPipeline", "is_distilled": False},
    "transformer": {
        "_class_name": "Flux2Transformer2DModel", "in_channels": 128, "num_layers": 5, "num_single_layers": 20,
        "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 7680, "guidance_embeds": False,
    },
    "vae": {"_class_name": "AutoencoderKLFlux2", "latent_channels": 32, "patch_size": [2, 2]},
    "text_encoder": {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 2560},
}  # fmt: skip
DEV = {
    **KLEIN_4B,
    "model_index": {"_class_name": "Flux2Pipeline"},
    "transformer": {
        **KLEIN_4B["transformer"], "num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48,
        "joint_attention_dim": 15360, "guidance_embeds": True,
    },
    "text_encoder": {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"hidden_size": 5120}},
}  # fmt: skip
QWEN_2511 = {
    "model_index": {"_class_name": "QwenImageEditPlusPipeline"},
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel", "in_channels": 64, "out_channels": 16, "patch_size": 2, "num_layers": 60,
        "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584, "zero_cond_t": True,
    },
    "vae": {"_class_name": "AutoencoderKLQwenImage", "z_dim": 16},
    "text_encoder": {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 3584},
}  # fmt: skip
# Configuration → layout, thousand millions of parameters, tokens of a sample at 1024², GiB by arithmetic.
LAYOUTS = {
    "flux2_24gb": (KLEIN_4B, 3.875, 8704, (8, 24)),
    "flux2_80gb": (DEV, 32.2, 8704, (32, 80)),
    "qwen_24gb": (QWEN_2511, 20.43, 8448, (14, 20)),
    "qwen_80gb": (QWEN_2511, 20.43, 8448, (44, 60)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_the_published_layout_passes_the_check(name, tmp_path, monkeypatch, capsys):
    """Of that size, with files in place of weights: nothing is loaded for the check."""
    pytest.importorskip("diffusers")
    from PIL import Image

    from editloss_core.models import registry
    from editloss_core.models.folder import ModelFolder
    from editloss_core.training.__main__ import main

    own = importlib.util.find_spec  # as on a machine with a GPU, for which bitsandbytes is
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *at: object() if name == "bitsandbytes" else own(name, *at)
    )
    monkeypatch.setattr(ModelFolder, "faults_on", lambda files, device: [])
    layout, billions, tokens, (least, most) = LAYOUTS[name]
    config = (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    path = tmp_path / f"{name}.toml"
    path.write_text(config, encoding="utf-8")
    folder = tmp_path / tomllib.loads(config)["model"]["path"]
    for part, content in layout.items():
        where = folder / part if part != "model_index" else folder
        where.mkdir(parents=True, exist_ok=True)
        file = "config.json" if where != folder else "model_index.json"
        (where / file).write_text(json.dumps(content), encoding="utf-8")
        (where / "model.safetensors").touch()
    parts = registry.of_pipeline(layout["model_index"], layout["transformer"]).parts
    for part in parts.tokenizers:
        (folder / part).mkdir()
        (folder / part / "tokenizer.json").touch()
    for part in parts.processors:
        (folder / part / "preprocessor_config.json").touch()
    for side, colour in (("before", 90), ("after", 180)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (1024, 1024), (colour, 10 * i, 0)).save(tmp_path / "pairs" / side / f"{i}.png")
            (tmp_path / "pairs" / side / f"{i}.txt").write_text("Make it brighter.", encoding="utf-8")
    assert main([str(path), "--check"]) == 0
    said = capsys.readouterr().out
    parameters = int(re.search(r"([\d,]+) parameters in", said)[1].replace(",", ""))
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    memory = float(re.search(rf"about ([\d.]+) GiB with all weights at {tokens} tokens", said)[1])
    assert least < memory < most


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerates_files_can_be_read_and_fit(path):
    pytest.importorskip("accelerate")
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    run = read_config(path.with_name(path.name.replace(".accelerate.yaml", ".toml")), files=False)
    assert run.training.batch_size % config.num_processes == 0 and config.mixed_precision == "no"
    assert config.num_processes == 8 * config.num_machines
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
        names = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        assert all(name in flux.FluxTransformer2DModel._no_split_modules for name in names) and len(names) == 2


def test_the_page_has_every_key_with_its_default():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", PAGE, re.M))
    keys = {f"{section}.{key}": about.default for section, known in SECTIONS.items() for key, about in known.items()}
    keys |= {f"{kind}.{key}": about.default for kind, known in ENCODER_KEYS.items() for key, about in known.items()}
    assert set(rows) - {f"objective.{key}" for key in TERM_KEYS} == set(keys)
    for name, default in keys.items():
        said = rows[name].strip("`")
        if default is MISSING:
            assert said == "required", name
        else:
            value = tomllib.loads(f"value = {said}")["value"]
            assert value == (list(default) if isinstance(default, tuple) else default), name
            assert isinstance(value, bool) == isinstance(default, bool), name


def test_the_page_has_every_kind_of_loss_with_its_settings():
    rows = dict(re.findall(r"^\| (\w+) \| (anchor = .*) \|$", PAGE, re.M))
    assert set(rows) == set(TERMS)
    for kind, row in rows.items():
        said = {
            name: tomllib.loads(f"value = {value}")["value"]
            for name, value in re.findall(r'(\w+) = ("\w+"|[\d.]+)', row.partition(";")[0])
        }
        assert said == TERMS[kind].defaults, kind
