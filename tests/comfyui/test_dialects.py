"""The same model and the same LoRA in ComfyUI and in diffusers: equal velocities, and files that work in both homes.

The checks run in one process of their own, inside ComfyUI (see driver_dialects.py); here each is one test.
"""

from __future__ import annotations

import pytest
from driver_dialects import CHECKS
from helpers import check_passed, run_driver

pytest.importorskip("peft")  # diffusers loads LoRA files with it
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check → traceback, or the reason of a skip; empty where it passed."""
    return run_driver("driver_dialects.py", tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_comfyui(name: str, results: dict[str, str]) -> None:
    check_passed(name, results)
