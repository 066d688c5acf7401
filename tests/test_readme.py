"""What the README says is true: its code runs, its files exist, its tables name real things."""

from __future__ import annotations

import re
from pathlib import Path

import editloss_core
from editloss_core import losses

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].ndim == 0 and names["z_pred"].grad.isfinite().all()


def test_the_two_commands_are_one_line_each():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2 and "workflows/run.py" in commands[0] and commands[1].endswith("-m pytest")


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if "://" not in target:
            assert (ROOT / target).is_file(), target


def test_every_public_loss_is_in_the_table():
    table = set(re.findall(r"^\| `(\w+)` \|", README, re.M))
    assert table - {"TimmEncoder", "OpenCLIPEncoder", "DiffusionFeatureEncoder"} == set(editloss_core.__all__)
    assert set(editloss_core.__all__) <= set(losses.__all__)
