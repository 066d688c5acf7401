"""The self-check in a real ComfyUI: no base that training supports is stopped, every silent error is, by name.

The checks run in one process of their own, inside ComfyUI (see driver_self_check.py); here each is one test.
"""

from __future__ import annotations

import pytest
from driver_self_check import CHECKS
from helpers import check_passed, run_driver


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check → traceback, empty where it passed."""
    return run_driver("driver_self_check.py", tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("name", CHECKS)
def test_a_silent_error_is_stopped_by_name(name: str, results: dict[str, str]) -> None:
    check_passed(name, results)


def test_every_base_is_let_through(results: dict[str, str]) -> None:
    """Those that the driver found in this ComfyUI."""
    bases = {name: error for name, error in results.items() if name not in CHECKS}
    assert len(bases) >= 10, sorted(bases)
    failed = {name: error for name, error in bases.items() if error}
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
