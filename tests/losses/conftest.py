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


def set_dots(monkeypatch, one_pass):
    from editloss_core import losses

    monkeypatch.setattr(losses, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(losses, "ONE_PASS_ELEMENTS", 0 if one_pass else 1 << 62)


@pytest.fixture(params=["in one pass", "in two"])
def dots(request, monkeypatch):
    """Both ways of blocks to Σ x·y on a CPU, whatever the size."""
    set_dots(monkeypatch, request.param == "in one pass")


@pytest.fixture(params=["in one piece", "in blocks"])
def pieces(request, monkeypatch):
    """What is small is done in one piece; and as if it were not."""
    if request.param == "in blocks":
        set_dots(monkeypatch, one_pass=False)


@pytest.fixture(params=["in one piece", "in one pass", "in two"])
def ways(request, monkeypatch):
    """The pieces, with both ways of blocks."""
    if request.param != "in one piece":
        set_dots(monkeypatch, request.param == "in one pass")
