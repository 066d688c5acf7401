"""What importing costs: packages that only some work needs are imported by that work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import editloss_core

ROOT = Path(editloss_core.__file__).parent
LATER = [
    "matplotlib",
    "timm",
    "open_clip",
    "jinja2",
    "scipy",
    "transformers",
    "diffusers",
    "torchvision",
    "tqdm",
    "pandas",
    "accelerate",
]
# Programs of their own, that nothing imports.
PROGRAMS = {"__main__", "diagnostics.__main__", "verdict.__main__", "embeddings.__main__"}


def imported(code):
    """Top-level packages that code adds to what torch brings."""
    script = f"""
import json, sys
import torch
before = {{m.partition('.')[0] for m in sys.modules}}
{code}
print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}} - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_core_brings_nothing_but_torch():
    assert not {"numpy", "PIL", "safetensors", *LATER} & set(imported("import editloss_core"))


@pytest.mark.slow
def test_no_module_imports_what_only_some_of_its_work_needs():
    names = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in sorted(ROOT.rglob("*.py"))]
    names = [n.removesuffix(".__init__") for n in names if n not in PROGRAMS and n != "__init__"]
    assert "training.trainer" in names and "objective_report" in names
    code = "import importlib\n" + "\n".join(f"importlib.import_module('editloss_core.{n}')" for n in names)
    assert not set(LATER) & set(imported(code))
