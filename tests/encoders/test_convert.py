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
