"""Augmented assignments alone become new tensors, and gradients go through what saved the old ones."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from editloss_core.training.out_of_place import OutOfPlace


@pytest.mark.parametrize("with_graph", [False, True])
def test_augmented_assignments_alone_are_out_of_place(with_graph):
    x = kept = torch.zeros(2, requires_grad=with_graph) * 1
    with OutOfPlace():
        x += 3
        x *= 2
        assert x.tolist() == [6, 6] and kept.tolist() == [0, 0]
        y = x
        x.mul_(2)
        x.add_(1)
        assert x is y and x.tolist() == [13, 13]
        for _ in range(2):
            x[:1] += 1
        assert x.tolist() == [15, 13]


def test_backward_goes_through_a_tensor_that_is_added_to_after_it_was_saved():
    start = torch.tensor([0.5, -2.0], dtype=torch.float64)

    def block(x):
        x = x * 1
        x += x.square()
        return x

    x = start.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(x).sum().backward()
    x = start.clone().requires_grad_()
    with OutOfPlace():
        loss = block(x).sum()
    loss.backward()
    assert torch.equal(x.grad, 1 + 2 * start)


def test_modes_can_be_nested():
    x = kept = torch.zeros(2)
    with OutOfPlace(), OutOfPlace():
        x += 1
        y = x
        y.add_(1)
    assert kept.tolist() == [0, 0] and x.tolist() == [2, 2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_slice_that_is_changed_keeps_what_its_product_needs(checkpointing):
    """Without a copy plain autograd raises, and checkpointing computes another gradient without a word."""
    x = torch.tensor([[0.5, -2.0, 3.0]], dtype=torch.float64)
    scale = torch.tensor([1.5, 0.25], dtype=torch.float64)

    def block(x, scale):
        with OutOfPlace():
            x = x * 1
            x[:, :2] *= scale
            x[:, :2] += scale
            return x.square()

    def run(x, scale):
        return checkpoint(block, x, scale, use_reentrant=False) if checkpointing else block(x, scale)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), scale.requires_grad_()))


def test_a_kernel_without_a_derivative_is_answered_where_gradients_are_on():
    calls = []

    def plain(x):
        calls.append("plain")
        return x * x

    torch.library.custom_op("editloss_test::square", lambda x: x * x, mutates_args=(), schema="(Tensor x) -> Tensor")
    operator = torch.ops.editloss_test.square
    x = torch.tensor([3.0], requires_grad=True)
    with OutOfPlace({operator: plain}):
        (gradient,) = torch.autograd.grad(operator(x).sum(), x)
        with torch.no_grad():
            assert operator(x).item() == 9.0
    assert gradient.item() == 6.0 and calls == ["plain"]
