"""Gradients: gradcheck, plain autograd formulas, what is and is not computed, compile and autocast."""

import itertools

import pytest
import torch
from loop_reference import embeddings, some_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from editloss_core import losses
from editloss_core.losses import (
    contrastive_pair_loss,
    feature_match_loss,
    info_nce_loss,
    loss_geometry_match,
    loss_no_edit_identity,
    loss_overlay_avoidance,
    margin_ranking_on_distances,
    multi_negative_ranking_loss,
    pair_distance,
    triplet_margin_loss,
)

SHAPE = (2, 2, 3)  # B, P, D


# --- plain PyTorch formulas; valid away from norm 0 ------------------------------------------------------------------


def plain_tokens(a, b, dist):
    if dist == "cos":
        return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return {"l2": (a - b).pow(2).sum(-1), "l1": (a - b).abs().sum(-1), "euclidean": (a - b).norm(dim=-1)}[dist]


def plain_distance(a, b, dist="cos", agg="mean", weights=None):
    """[B] from [B, P, D], or [B, K] from [B, K, P, D] with weights [B, 1, P]."""
    d = plain_tokens(a, b, dist)
    w = torch.ones_like(d) if weights is None else weights
    return {"mean": (w * d).sum(-1) / w.sum(-1), "sum": (w * d).sum(-1), "max": (w * d).amax(-1)}[agg]


def plain_ranking(a, p, n, margin=0.2, dist="cos", agg="mean", weights=None, smooth=0.0, neg_agg="mean"):
    n = torch.stack(n, 1) if isinstance(n, list) else n
    w = None if weights is None else weights.unsqueeze(1)
    d_neg = plain_distance(a.unsqueeze(1), n, dist, agg, w)
    if margin == "auto":
        margin = 0.5 * plain_distance(p.unsqueeze(1), n, dist, agg, w).detach()
    x = plain_distance(a, p, dist, agg, weights).unsqueeze(1) - d_neg + margin
    x = smooth * torch.log1p(torch.exp(x / smooth)) if smooth else x.clamp_min(0)
    return {"mean": x.mean(1), "sum": x.sum(1), "max": x.amax(1)}[neg_agg].mean()


def plain_contrastive(a, b, y, margin=1.0, dist="l2", weights=None):
    d = plain_distance(a, b, "euclidean" if dist == "l2" else dist, weights=weights)
    return (0.5 * y * d**2 + 0.5 * (1 - y) * (margin - d).clamp_min(0) ** 2).mean()


def plain_info_nce(a, p, n=None, temperature=0.07, agg="mean", weights=None):
    w = None if weights is None else weights.unsqueeze(1)
    if n is None or isinstance(n, torch.Tensor) and n.ndim <= a.ndim:
        bank = p if n is None else n if n.ndim == a.ndim else n.unsqueeze(1)
        d = plain_distance(a.unsqueeze(1), bank.unsqueeze(0), agg=agg, weights=w)
    else:
        d = plain_distance(a.unsqueeze(1), torch.stack(n, 1) if isinstance(n, list) else n, agg=agg, weights=w)
    if n is None:
        return torch.nn.functional.cross_entropy(-d / temperature, torch.arange(len(a)))
    d = torch.cat([plain_distance(a, p, agg=agg, weights=weights).unsqueeze(1), d], 1)
    return (torch.logsumexp(-d / temperature, 1) + d[:, 0] / temperature).mean()


# --- every loss as a function of its differentiable inputs -----------------------------------------------------------

A, P, N, M = embeddings(SHAPE, 4)
W = some_weights("token", SHAPE) + 0.2
Y = torch.tensor([0.9, 0.3], dtype=torch.float64)
MARGIN = torch.tensor([2.5, 2.7], dtype=torch.float64)  # above d_neg − d_pos: no hinge sleeps
BANK = embeddings((5, 3), 1, seed=3)[0]
CASES = {}  # name → (loss, plain formula, inputs)


def case(name, loss, plain, *inputs):
    CASES[name] = (loss, plain, inputs)


for dist, agg in itertools.product(("cos", "l2"), ("mean", "max", "sum")):
    case(
        f"pair_distance-{dist}-{agg}",
        lambda a, b, w, dist=dist, agg=agg: pair_distance(a, b, dist, agg, w).sum(),
        lambda a, b, w, dist=dist, agg=agg: plain_distance(a, b, dist, agg, w).sum(),
        *(A, P, W),
    )
    case(
        f"triplet-{dist}-{agg}",
        lambda a, p, n, m, w, o={"dist": dist, "agg": agg}: triplet_margin_loss(a, p, n, m * 9, weights=w, **o),
        lambda a, p, n, m, w, o={"dist": dist, "agg": agg}: plain_ranking(
            a, p, [n], (m * 9).unsqueeze(1), weights=w, **o
        ),
        *(A, P, N, MARGIN, W),
    )
for kind in ("l2", "l1", "cos"):
    for name, loss in {"feature_match": feature_match_loss, "geometry_match": loss_geometry_match}.items():
        case(
            f"{name}-{kind}",
            lambda a, b, w, loss=loss, kind=kind: loss(a, b, kind, weights=w),
            lambda a, b, w, kind=kind: plain_distance(a, b, kind, weights=w).mean(),
            *(A, P, W),
        )
for dist in ("l2", "cos"):
    case(
        f"contrastive-{dist}",
        lambda a, b, y, w, dist=dist: contrastive_pair_loss(a, b, y, 3.0, dist, weights=w),
        lambda a, b, y, w, dist=dist: plain_contrastive(a, b, y, 3.0, dist, w),
        *(A, P, Y, W),
    )
case(
    "margin_ranking",
    lambda p, n, m: margin_ranking_on_distances(p, n, m),
    lambda p, n, m: (p - n + m).clamp_min(0).mean(),
    *(torch.tensor([0.5, 0.4]).double(), torch.tensor([0.1, 0.8]).double(), MARGIN),
)
case(
    "margin_ranking-K",
    lambda p, n, m: margin_ranking_on_distances(p, n, m, smooth=0.2, neg_agg="max"),
    lambda p, n, m: (0.2 * torch.log1p(torch.exp((p.unsqueeze(1) - n + m) / 0.2))).amax(1).mean(),
    *(torch.tensor([0.5, 0.4]).double(), torch.tensor([[0.1, 0.3], [0.8, 0.25]]).double(), MARGIN.view(2, 1) + Y),
)
case(
    "no_edit",
    lambda a, p, n, w: loss_no_edit_identity(a, p, n, margin=3.0, weights=w),
    lambda a, p, n, w: plain_ranking(a, p, [n], 3.0, weights=w),
    *(A, P, N, W),
)
for neg_agg in ("mean", "max", "sum"):
    for name, loss in {"multi_negative": multi_negative_ranking_loss, "overlay": loss_overlay_avoidance}.items():
        o = {"margin": 3.0, "smooth": 0.5, "neg_agg": neg_agg}
        case(
            f"{name}-list-{neg_agg}",
            lambda a, p, n, m, w, loss=loss, o=o: loss(a, p, [n, m], weights=w, **o),
            lambda a, p, n, m, w, o=o: plain_ranking(a, p, [n, m], weights=w, **o),
            *(A, P, N, M, W),
        )
        case(
            f"{name}-stacked-{neg_agg}",
            lambda a, p, n, loss=loss, o=o: loss(a, p, n, dist="l2", **o),
            lambda a, p, n, o=o: plain_ranking(a, p, n, dist="l2", **o),
            *(A, P, torch.stack([N, M], 1)),
        )
for agg in ("mean", "max", "sum"):
    o = {"temperature": 0.5, "agg": agg}
    case(
        f"info_nce-in batch-{agg}",
        lambda a, p, w, o=o: info_nce_loss(a, p, weights=w, **o),
        lambda a, p, w, o=o: plain_info_nce(a, p, weights=w, **o),
        *(A, P, W),
    )
    for name, negatives in {"own": torch.stack([N, M], 1), "bank": BANK, "token bank": N}.items():
        case(
            f"info_nce-{name}-{agg}",
            lambda a, p, n, w, o=o: info_nce_loss(a, p, n, weights=w, **o),
            lambda a, p, n, w, o=o: plain_info_nce(a, p, n, weights=w, **o),
            *(A, P, negatives, W),
        )


def leaves(inputs, needs=None):
    return [x.detach().clone().requires_grad_(need) for x, need in zip(inputs, needs or itertools.repeat(True))]


@pytest.fixture(params=CASES)
def named_case(request):
    return CASES[request.param]


@pytest.mark.slow
def test_gradcheck(named_case):
    loss, _, inputs = named_case
    assert torch.autograd.gradcheck(loss, leaves(inputs))


def test_equal_to_autograd_through_the_plain_formula(named_case, pieces):
    """Value and gradients, with all inputs, one of them, or all but one asking for one; the others get none."""
    loss, plain, inputs = named_case
    count = range(len(inputs))
    assert not loss(*leaves(inputs, [False] * len(inputs))).requires_grad
    for needs in {(True,) * len(inputs), *(tuple(i == j for j in count) for i in count),
                  *(tuple(i != j for j in count) for i in count)}:  # fmt: skip
        found, expected = leaves(inputs, needs), leaves(inputs, needs)
        value, plain_value = loss(*found), plain(*expected)
        value.backward()
        plain_value.backward()
        torch.testing.assert_close(value, plain_value)
        for x, y, need in zip(found, expected, needs):
            assert (x.grad is not None) == need
            if need:
                torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("neg_agg", ["mean", "max"])
@pytest.mark.parametrize("dist", ["cos", "l2"])
def test_auto_margin_is_a_constant_for_the_gradient(dist, neg_agg):
    o = {"margin": "auto", "dist": dist, "neg_agg": neg_agg, "weights": W, "smooth": 1.0}
    found, expected = leaves((A, P, N, M)), leaves((A, P, N, M))
    loss_overlay_avoidance(found[0], found[1], found[2:], **o).backward()
    plain_ranking(expected[0], expected[1], expected[2:], **o).backward()
    assert all(x.grad.abs().max() > 0 for x in expected[:2])
    for x, y in zip(found, expected):
        torch.testing.assert_close(x.grad, y.grad)


def test_l2_and_l1_have_gradient_zero_at_a_match():
    for kind in ("l2", "l1", "cos"):
        a, b = leaves((A, A))
        feature_match_loss(a, b, kind).backward()
        torch.testing.assert_close(a.grad, torch.zeros_like(A))
        torch.testing.assert_close(b.grad, torch.zeros_like(A))
    a, b = leaves((A, A))
    contrastive_pair_loss(a, b, 0).backward()  # the Euclidean distance has no direction at 0
    assert torch.equal(a.grad, torch.zeros_like(A)) and torch.equal(b.grad, torch.zeros_like(A))


SAME_TENSOR_TWICE = {
    "pair_distance": (lambda x, y: pair_distance(x, x).sum(), lambda x, y: plain_distance(x, x).sum()),
    "pair_distance-l2": (lambda x, y: pair_distance(x, x, "l2").sum(), lambda x, y: 0 * x.sum()),
    "anchor is negative": (lambda x, y: triplet_margin_loss(x, y, x), lambda x, y: plain_ranking(x, y, [x])),
    "anchor is positive": (
        lambda x, y: triplet_margin_loss(x, x, y, 3.0),
        lambda x, y: plain_ranking(x, x, [y], 3.0),
    ),
    "positive is negative": (
        lambda x, y: multi_negative_ranking_loss(y, x, [x, x, y], dist="l2"),
        lambda x, y: plain_ranking(y, x, [x, x, y], dist="l2"),
    ),
    "info_nce in batch": (lambda x, y: info_nce_loss(x, x), lambda x, y: plain_info_nce(x, x)),
    "info_nce bank": (lambda x, y: info_nce_loss(x, y, x), lambda x, y: plain_info_nce(x, y, x)),
    "info_nce own": (lambda x, y: info_nce_loss(x, y, [x, y]), lambda x, y: plain_info_nce(x, y, [x, y])),
}


@pytest.mark.parametrize("name", SAME_TENSOR_TWICE)
def test_same_tensor_twice(name):
    loss, plain = SAME_TENSOR_TWICE[name]
    found, expected = leaves((A, P)), leaves((A, P))
    loss(*found).backward()
    plain(*expected).backward()
    for x, y in zip(found, expected):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dist", ["cos", "l2"])
def test_blocks(block_elements, dist):
    inputs = embeddings((5, 2, 3, 4), 4)
    found, expected = leaves(inputs), leaves(inputs)
    o = {"dist": dist, "neg_agg": "max", "margin": "auto"}
    loss_overlay_avoidance(found[0], found[1], found[2:], **o).backward()
    flat = [x.flatten(1, 2) for x in expected]
    plain_ranking(flat[0], flat[1], flat[2:], **o).backward()
    for x, y in zip(found, expected):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dist", ["cos", "l2"])
def test_strided_inputs_and_gradients_in_strided_leaves(dist, pieces):
    inputs = [x.movedim(-1, 1).contiguous().movedim(1, -1) for x in embeddings((2, 3, 2, 4), 3)]
    found = [x.detach().requires_grad_() for x in inputs]
    expected = leaves(x.contiguous() for x in inputs)
    for x, y, z in (found, expected):
        triplet_margin_loss(x, y, z[:, :1].expand_as(z), 9.0, dist).backward()
    for x, y in zip(found, expected):
        torch.testing.assert_close(x.grad, y.grad)


def test_unused_outputs_and_partial_gradients(pieces):
    """token_distances with one of two outputs used: the other's reference has gradient 0 or none, not garbage."""
    a, b, c = leaves((A, P, N))
    first, _ = losses.token_distances(a, [b, c])
    first.sum().backward()
    assert c.grad is None or torch.equal(c.grad, torch.zeros_like(N))
    x, y = leaves((A, P))
    plain_tokens(x, y, "cos").sum().backward()
    torch.testing.assert_close(a.grad, x.grad)
    torch.testing.assert_close(b.grad, y.grad)


@pytest.mark.parametrize("dist", ["cos", "l2"])
def test_of_stacked_references_one_is_used(pieces, dist):
    """The others' gradient is 0, and their NaN reaches nobody."""
    a, stacked = leaves((A, torch.stack([P * torch.nan, N], 1)))
    losses._distances(a, [stacked], dist)[1].sum().backward()
    x, y = leaves((A, N))
    plain_tokens(x, y, dist).sum().backward()
    torch.testing.assert_close(a.grad, x.grad)
    torch.testing.assert_close(stacked.grad, torch.stack([torch.zeros_like(N), y.grad], 1))


# --- second order ----------------------------------------------------------------------------------------------------

SECOND_ORDER = {
    "pair_distance": lambda a, b: pair_distance(a, b).sum(),
    "pair_distance-l2": lambda a, b: pair_distance(a, b, "l2").sum(),
    "feature_match": lambda a, b: feature_match_loss(a, b),
    "geometry": lambda a, b: loss_geometry_match(a, b, "cos"),
    "contrastive": lambda a, b: contrastive_pair_loss(a, b, 1),
    "triplet": lambda a, b: triplet_margin_loss(a, b, N, margin=3.0),
    "multi_negative": lambda a, b: multi_negative_ranking_loss(a, b, [N, M], margin=3.0, smooth=0.1),
    "no_edit": lambda a, b: loss_no_edit_identity(a, b, N, margin=3.0),
    "overlay": lambda a, b: loss_overlay_avoidance(a, b, N, margin=3.0),
    "info_nce-in batch": lambda a, b: info_nce_loss(a, b),
    "info_nce-bank": lambda a, b: info_nce_loss(a, b, BANK),
    "info_nce-own": lambda a, b: info_nce_loss(a, b, [N]),
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_double_backward_is_refused(name):
    """A gradient penalty beside the loss must not lose its gradient in silence."""
    a, b = leaves((A, P))
    loss = SECOND_ORDER[name](a, b)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable|second order"):
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        (SECOND_ORDER[name](a, b) + gradient.square().sum()).backward()


# --- what is allocated and kept --------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Collects every new tensor of at least ``size`` numbers (views and in-place results are not new)."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                size = x.untyped_storage().nbytes() // x.element_size()
                if size >= self.size:
                    self.made.append(f"{function}: {size} numbers")
        return result


@pytest.mark.parametrize("dist", ["cos", "l2"])
def test_gradients_are_allocated_only_for_inputs_that_need_them(monkeypatch, dist):
    monkeypatch.setattr(losses, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", 512)
    inputs = embeddings((4, 16, 32), 5, torch.float32)
    for needs in ((True,) + (False,) * 4, (False,) + (True,) * 4, (True, True, False, False, True)):
        x = leaves(inputs, needs)
        with Allocations(inputs[0].numel()) as forward:
            loss = loss_overlay_avoidance(x[0], x[1], x[2:], margin=9.0, dist=dist)
        assert forward.made == []
        with Allocations(inputs[0].numel()) as backward:
            loss.backward()
        assert len(backward.made) == sum(needs), backward.made
        assert [v.grad is not None for v in x] == list(needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_inputs_themselves_are_kept_for_backward(dtype):
    inputs = leaves(embeddings((4, 16, 32), 4, dtype), (True, False, False, False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss_overlay_avoidance(inputs[0], inputs[1], inputs[2:], margin=9.0)
    large = {x.data_ptr() for x in kept if x.numel() >= inputs[0].numel()}
    assert large == {x.data_ptr() for x in inputs}
    assert sum(x.numel() for x in kept if x.data_ptr() not in large) <= 16 * inputs[0].shape[:-1].numel()


# --- compile and autocast --------------------------------------------------------------------------------------------

TASK_LOSSES = {
    "no_edit": lambda a, p, n, w: loss_no_edit_identity(a, p, n, margin="auto", weights=w, smooth=0.1),
    "geometry": lambda a, p, n, w: loss_geometry_match(a, p, weights=w) + loss_geometry_match(a, n, "cos"),
    "overlay": lambda a, p, n, w: loss_overlay_avoidance(a, p, [n, p.flip(0)], margin=0.7, neg_agg="max", weights=w),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASK_LOSSES)
def test_compile(name):
    loss = TASK_LOSSES[name]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=False)
    for seed in (0, 1):
        inputs = embeddings(SHAPE, 3, torch.float32, seed)
        found, expected = leaves(inputs), leaves(inputs)
        value, plain_value = compiled(*found, W.float()), loss(*expected, W.float())
        assert plain_value > 0
        torch.testing.assert_close(value, plain_value)
        value.backward()
        plain_value.backward()
        for x, y in zip(found, expected):
            torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(named_case, dtype):
    loss, _, inputs = named_case
    inputs = [x.to(dtype) for x in inputs]
    outside, inside = leaves(inputs), leaves(inputs)
    expected = loss(*outside)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*inside)
    expected.backward()
    found.backward()
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    for x, y in zip(inside, outside):
        assert torch.equal(x.grad, y.grad)


# --- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: loss_no_edit_identity(a, b, c, margin=2.0),
        lambda a, b, c: triplet_margin_loss(a, b, c, margin=50.0, dist="l2"),
        lambda a, b, c: feature_match_loss(a, b, "l1"),
        lambda a, b, c: contrastive_pair_loss(a, b, torch.tensor([1.0, 0.0]), margin=9.0),
        lambda a, b, c: info_nce_loss(a, b),
        lambda a, b, c: info_nce_loss(a, b, [c]),
    ],
    ids=["cos", "l2", "l1", "euclidean", "in batch", "explicit"],
)
def test_losses_inside_a_checkpoint(function, use_reentrant):
    """A trainer may checkpoint decoder, encoder and loss together; saved tensors can then be unpacked once only."""
    from torch.utils.checkpoint import checkpoint

    a, b, c = (torch.randn(SHAPE, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(function(a, b, c), (a, b), allow_unused=True)
    checkpoint(function, a, b, c, use_reentrant=use_reentrant).backward()
    for x, e in zip((a, b), expected):
        torch.testing.assert_close(x.grad, e)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)], ids=["vectors", "tokens"])
def test_soft_labels_have_the_gradient_of_the_formula(shape):
    """½ (d² − max(0, margin − d)²), for a label per sample and for one that all share."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    for y in (torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)):
        y.requires_grad_()
        contrastive_pair_loss(a, b, y, margin=1.2, reduction="sum").backward()
        d = (a - b).norm(dim=-1).reshape(3, -1).mean(1)
        expected = (0.5 * (d.square() - (1.2 - d).relu().square())).sum_to_size(y.shape)
        torch.testing.assert_close(y.grad, expected)
