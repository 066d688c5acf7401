"""Equal fingerprints, equal embeddings: across files and processes, and for no other reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import editloss_core
from editloss_core.encoders import OpenCLIPEncoder, TimmEncoder

ROOT = Path(editloss_core.__file__).resolve().parents[1]


def _one_weight_changed(file: Path, name: str, target: Path) -> Path:
    state = load_file(file)
    value = state[name]
    value.view(-1)[3] = torch.nextafter(value.view(-1)[3], torch.tensor(10.0))
    save_file(state, target)
    return target


def test_openclip(clips, tmp_path):
    file = clips["tiny-vit"].file
    changed = _one_weight_changed(file, "visual.proj", tmp_path / "changed.safetensors")
    prints = [
        OpenCLIPEncoder("tiny-vit", f, output, **options).info.fingerprint
        for f, output, options in (
            (file, "global", {}),
            (changed, "global", {}),
            (file, "tokens", {}),
            (file, "grid", {}),
            (file, "global", {"crop": True}),
            (file, "global", {"normalize": True}),
        )
    ]
    assert len(set(prints)) == len(prints)
    text = _one_weight_changed(file, "token_embedding.weight", tmp_path / "text.safetensors")
    assert OpenCLIPEncoder("tiny-vit", text).info.fingerprint == prints[0]


def test_timm(timms, tmp_path):
    file = timms["test_resnet"].file
    changed = _one_weight_changed(file, "layer1.0.bn1.running_mean", tmp_path / "changed.safetensors")
    prints = [
        TimmEncoder("test_resnet", f, **options).info.fingerprint
        for f, options in (
            (file, {}),
            (changed, {}),
            (file, {"output": "tokens"}),
            (file, {"output": "global"}),
            (file, {"layer": 2}),
            (file, {"image_size": 96}),
            (file, {"crop": True}),
        )
    ]
    assert len(set(prints)) == len(prints)
    head = _one_weight_changed(file, "fc.weight", tmp_path / "head.safetensors")
    assert TimmEncoder("test_resnet", head).info.fingerprint == prints[0]
    assert TimmEncoder("test_resnet", file, layer=4).info.fingerprint == prints[0]  # the last of five


@pytest.mark.slow
def test_another_process_agrees(clips, timms, tmp_path):
    here = [
        OpenCLIPEncoder("tiny-vit", clips["tiny-vit"].file).info.fingerprint,
        TimmEncoder("test_resnet", timms["test_resnet"].file).info.fingerprint,
    ]
    code = (
        "import sys, pathlib; from small_networks import register_clips; "
        "from editloss_core.encoders import OpenCLIPEncoder, TimmEncoder; "
        "register_clips(pathlib.Path(sys.argv[3])); "
        "print(OpenCLIPEncoder('tiny-vit', sys.argv[1]).info.fingerprint, "
        "TimmEncoder('test_resnet', sys.argv[2]).info.fingerprint)"
    )
    files = [str(clips["tiny-vit"].file), str(timms["test_resnet"].file), str(tmp_path)]
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", code, *files],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == here


def test_arguments_make_an_equal_encoder(clips, timms):
    for kind, encoder in (
        (OpenCLIPEncoder, OpenCLIPEncoder("tiny-vit", clips["tiny-vit"].file, "grid", crop=True)),
        (
            TimmEncoder,
            TimmEncoder("test_resnet", timms["test_resnet"].file, "tokens", layer=-2, image_size=96, crop=True),
        ),
    ):
        again = kind(**encoder.arguments)
        assert again.info == encoder.info and again.arguments == encoder.arguments
    assert TimmEncoder("test_resnet", random_seed=0).arguments is None
    assert OpenCLIPEncoder("tiny-vit", clips["tiny-vit"].file, normalize=True).arguments is None
