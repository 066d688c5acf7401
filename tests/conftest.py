"""How the tests share two cores when they run in two processes (pytest -n 2)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads for all cores in each process would mostly wait for the other's. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# small.py and small_kontext.py, which several rooms' tests train and load, and profiles.py, which several read.
sys.path[:0] = [str(Path(__file__).parent / room) for room in ("training", "pairs")]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors are small here: more threads only wait for each other. Tests that are about threads set their own."""
    torch = sys.modules.get("torch")  # what is collected has imported it, if anything does
    if torch is not None:
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file stays in one process, for its fixtures; tests/comfyui, whose few tests take longest, comes first."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # it would start with the files of most tests
    return LoadFileScheduling(config, log)
