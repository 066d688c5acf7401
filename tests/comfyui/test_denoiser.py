"""ComfyUI's MODEL as a denoiser and its VAE as a decoder: the stock sampler's numbers, gradients that are right, over
every make of base layer, and LoRA files that the stock loader takes.

The checks run in one process of their own, inside ComfyUI (see driver_denoiser.py); here each is one test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_server import locate, pack_root
from driver_denoiser import CHECKS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check → traceback, empty where it passed."""
    driver = Path(__file__).with_name("driver_denoiser.py")
    command = [sys.executable, str(driver), str(pack_root().resolve()), str(tmp_path_factory.mktemp("driver"))]
    done = subprocess.run(command, check=False, cwd=locate(), capture_output=True, text=True, timeout=600)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    if done.returncode:
        pytest.fail(f"the driver stopped after {len(said)} checks:\n{done.stderr[-3000:]}")
    return {check["name"]: check["error"] for check in said}


@pytest.mark.parametrize("name", CHECKS)
def test_in_comfyui(name: str, results: dict[str, str]) -> None:
    assert name in results, "the driver did not run it"
    assert not results[name], results[name]
