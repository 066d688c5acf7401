import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for loop_reference, under --import-mode=importlib


@pytest.fixture(params=[1, 5, 12, 24, 25, 47, 1 << 20])
def block_elements(request, monkeypatch, dots):
    """Blocks so small that a few numbers cross their boundaries: parts of a token, of a sample, several samples."""
    from editloss_core import losses

    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", request.param)
    return request.param


@pytest.fixture(params=["in one pass", "in two"])
def dots(request, monkeypatch):
    """Both ways to Σ x·y on a CPU, whatever the size."""
    from editloss_core import losses

    monkeypatch.setattr(losses, "ONE_PASS_ELEMENTS", 0 if request.param == "in one pass" else 1 << 62)
