"""ComfyUI's MODEL as a denoiser and its VAE as a decoder: the stock sampler's numbers, gradients that are right, over
every make of base layer, and LoRA files that the stock loader takes.

The checks run in one process of their own, inside ComfyUI (see driver_denoiser.py); here each is one test.
"""

from __future__ import annotations

import pytest
from driver_denoiser import CHECKS
from helpers import check_passed, run_driver


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check → traceback, empty where it passed."""
    return run_driver("driver_denoiser.py", tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_comfyui(name: str, results: dict[str, str]) -> None:
    check_passed(name, results)


def test_what_only_some_comfyui_have(results: dict[str, str]) -> None:
    """Base layers and memory management that the driver found in this one."""
    found = results.keys() - CHECKS.keys()
    assert len(found) >= 30, sorted(found)
    failed = {name: results[name] for name in sorted(found) if results[name]}
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
