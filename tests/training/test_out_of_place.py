"""Augmented assignments alone become new tensors, and gradients go through what saved the old ones."""

import pytest
import torch

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
