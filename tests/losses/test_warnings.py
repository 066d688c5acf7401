"""What teaches nothing, or something else than was meant, is said once."""

from __future__ import annotations

import warnings

import pytest
import torch

from editloss_core import losses
from editloss_core.losses import info_nce_loss, loss_geometry_match, loss_no_edit_identity, loss_overlay_avoidance


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(losses, "_warned", set())


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return [str(warning.message) for warning in caught]


def z(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def task(*shape, weights=None):
    return lambda: loss_no_edit_identity(z(*shape), z(*shape) + 1, z(*shape) - 1, weights=weights)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: info_nce_loss(z(1, 8), z(1, 8)), "a batch of one has no other samples as negatives, and the loss is 0"),
        (task(2, 4, 8, weights=torch.zeros(2, 4)), "all tokens of a sample have weight 0"),
        (task(2, 4, 8, weights=torch.tensor([[1.0] * 4, [0.0] * 4])), "all tokens of a sample have weight 0"),
        (task(1, 16, 32, 32), r"[1, 16, 32, 32] is taken for [B, H, W, D], tokens of 32 features; are the channels last?"),
        (task(2, 16, 96, 64), "are the channels last?"),
        (task(1, 4, 64, 64), "are the channels last?"),
        (task(256, 16), "a batch of 256 samples with a vector each; tokens of one picture are [1, P, D]"),
        (lambda: loss_geometry_match(z(64, 8), z(64, 8)), "a batch of 64 samples"),
        (lambda: loss_overlay_avoidance(z(64, 8), z(64, 8), z(64, 8) + 1), "a batch of 64 samples"),
    ],
)  # fmt: skip
def test_it_is_said_once(call, expected):
    (warning,) = said(call)
    assert expected in warning


@pytest.mark.parametrize(
    "call",
    [
        lambda: info_nce_loss(z(2, 8), z(2, 8)),
        lambda: info_nce_loss(z(1, 8), z(1, 8), z(1, 3, 8)),
        lambda: info_nce_loss(z(256, 8), z(256, 8)),
        task(2, 4, 8, weights=torch.tensor([[1.0, 0, 0, 0]] * 2)),
        task(2, 4, 8, weights=torch.tensor([1.0, 0.0])),  # a sample that is left out
        task(1, 32, 32, 16),
        task(1, 64, 64, 4),
        task(2, 16, 16, 768),
        task(2, 37, 37, 384),
        task(2, 256, 768),
        task(8, 768),
    ],
)  # fmt: skip
def test_what_is_right_is_not_warned_of(call):
    assert said(call) == []


def test_the_hint_stands_in_the_error_as_well():
    with pytest.raises(
        ValueError, match="got .1, 24, 32.; are the channels of the embeddings last, and is the batch first"
    ):
        task(1, 16, 24, 32, weights=torch.ones(1, 24, 32))()
