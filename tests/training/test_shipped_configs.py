"""The configurations in configs/ and the page about them: they can be read, and say what the program knows."""

from __future__ import annotations

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
    assert {p.stem for p in CONFIGS} == {"one_24gb", "one_80gb", "eight_gpus_fsdp", "two_nodes"}


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
        said = {name: json.loads(value) for name, value in re.findall(r'(\w+) = ("\w+"|[\d.]+)', row.partition(";")[0])}
        assert said == TERMS[kind].defaults, kind
