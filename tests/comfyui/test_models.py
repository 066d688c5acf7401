"""Every edit model behind ComfyUI's MODEL: the stock sampler's numbers, gradients that are right, files that load.

The checks run in one process of their own, inside ComfyUI (see driver_models.py); here each is one test.
"""

from __future__ import annotations

import pytest
from driver_models import CHECKS
from helpers import check_passed, run_driver


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check → traceback, or the reason of a skip; empty where it passed."""
    return run_driver("driver_models.py", tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_comfyui(name: str, results: dict[str, str]) -> None:
    check_passed(name, results)
