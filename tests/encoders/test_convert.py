"""Pickles of tensors become safetensors; pickles of anything else are refused and not run."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from editloss_core.encoders import convert_to_safetensors
from editloss_core.encoders.convert import main


def test_containers_prefixes_ties_and_views(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {"module.a": shared, "module.b": shared, "module.c": shared.T}
    torch.save({"epoch": 3, "model": {**state, "module.note": "not a tensor"}}, tmp_path / "in.pth")
    assert convert_to_safetensors(tmp_path / "in.pth", tmp_path / "out.safetensors") == 3
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"a", "b", "c"} and torch.equal(found["c"], shared.T)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


def sd(value, prefix=""):
    return {f"{prefix}0.weight": torch.full((2, 3), float(value)), f"{prefix}0.bias": torch.full((2,), float(value))}


NETWORKS = [
    # (what a training script saves, where its weights are, what is in them)
    ({"state_dict": sd(1), "best_acc1": torch.tensor(76.1), "epoch": 3}, "state_dict", 1),
    ({"epoch": torch.tensor(5), "rng_state": torch.arange(9, dtype=torch.uint8), "model": sd(1)}, "model", 1),
    ({"optimizer": {"state": {0: sd(3)}, "param_groups": [{"lr": 1.0}]}, "model": {"state_dict": sd(1)}}, "model.state_dict", 1),
    ({"model": sd(0), "model_ema": sd(1)}, "model_ema", 1),
    ({"model": sd(0), "ema": {"decay": torch.tensor(0.99), "module": sd(1, "module.")}}, "ema.module", 1),
    ({"model": sd(1), "ema": {"decay": torch.tensor(0.99), "shadow_params": [torch.ones(2)]}}, "model", 1),
    ({"student": sd(0), "teacher": sd(1, "module._orig_mod.")}, "teacher", 1),
    ({"params": sd(0), "params_ema": sd(1)}, "params_ema", 1),
    ({"generator": sd(1), "discriminator": sd(0)}, "generator", 1),
    (sd(1, "_orig_mod.module."), "", 1),
    ({**sd(1), "logit_scale": torch.tensor(4.6)}, "", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "where", "value"), NETWORKS, ids=lambda v: "-".join(v) if isinstance(v, dict) else None
)
def test_weights_are_found_beside_whatever_else_is_kept(tmp_path, capsys, saved, where, value):
    torch.save(saved, tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 0
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() - {"logit_scale"} == {"0.weight", "0.bias"}
    assert torch.equal(found["0.weight"], torch.full((2, 3), float(value)))
    says = f"{len(found)} tensors{f' of {where}' if where else ''} written to "
    assert capsys.readouterr().out.startswith(says)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (lambda: {"model": {**sd(1), "a": torch.eye(3).to_sparse()}}, "in.pth has a sparse tensor .torch.sparse_coo. as a"),
        (lambda: {"a": torch.eye(3).to_sparse_csr()}, "a sparse tensor .torch.sparse_csr. as a"),
        (lambda: {"a": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)}, "a quantised tensor .torch.qint8. as a"),
        (lambda: {"a": torch.empty(2, device="meta")}, "a tensor without data .on the device meta. as a"),
        (lambda: {"a": torch.zeros(2, dtype=torch.complex128)}, "a tensor of torch.complex128 as a"),
        (lambda: {"best_acc1": torch.tensor(76.1)}, "holds no named tensors .found dict, with best_acc1"),
        (lambda: [torch.ones(2)], "holds no named tensors .found list"),
    ],
)  # fmt: skip
def test_what_safetensors_does_not_hold_is_refused_in_words(tmp_path, saved, expected):
    torch.save(saved(), tmp_path / "in.pth")
    with pytest.raises(ValueError, match=expected):
        convert_to_safetensors(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth"]


class _Code:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


def test_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "x": _Code()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is not a plain file of tensors"):
        convert_to_safetensors("evil.pt", "out.safetensors")
    assert not (tmp_path / "was_run").exists() and not (tmp_path / "out.safetensors").exists()


def test_errors(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "in.pth")
    torch.save({"steps": 3}, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    target = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="target: expected a name ending in .safetensors"):
        convert_to_safetensors(tmp_path / "in.pth", tmp_path / "out.bin")
    with pytest.raises(FileNotFoundError, match="source: no such file"):
        convert_to_safetensors(tmp_path / "gone.pth", target)
    with pytest.raises(ValueError, match="holds no named tensors .found dict, with steps"):
        convert_to_safetensors(tmp_path / "none.pth", target)
    with pytest.raises(ValueError, match="not a plain file of tensors"):
        convert_to_safetensors(tmp_path / "text.pth", target)
    with pytest.raises(FileNotFoundError, match="target: there is no folder .*gone"):
        convert_to_safetensors(tmp_path / "in.pth", tmp_path / "gone" / "out.safetensors")
    with pytest.raises(IsADirectoryError, match="source: expected a file, .* is a folder"):
        convert_to_safetensors(tmp_path, target)
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_safetensors(tmp_path / "in.pth", target)
    assert target.read_bytes() == b"mine"
    assert convert_to_safetensors(tmp_path / "in.pth", target, overwrite=True) == 1


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit does not support this Python")
@pytest.mark.filterwarnings("ignore")
def test_torchscript_programs_are_refused(tmp_path):
    """OpenAI's original CLIP files are such programs."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "jit.pt"))
    with pytest.raises(ValueError, match="not a plain file of tensors.*TorchScript"):
        convert_to_safetensors(tmp_path / "jit.pt", tmp_path / "out.safetensors")


def test_command(tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 0
    assert "1 tensors written to" in capsys.readouterr().out
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert "exists already" in capsys.readouterr().err
