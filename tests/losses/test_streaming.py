"""What the losses do not make: full logits, copies of negatives, graph breaks; and that nothing changes for it."""

import itertools

import pytest
import torch
from loop_reference import embeddings, some_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from editloss_core import losses
from editloss_core.losses import info_nce_loss, loss_geometry_match, loss_no_edit_identity, multi_negative_ranking_loss


class Made(TorchDispatchMode):
    """The sizes, in numbers, of all new memory (views and in-place results are not new)."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.sizes.append(x.untyped_storage().nbytes() // x.element_size())
        return result


def full_logits(a, p, negatives=None, temperature=0.07, agg="mean", weights=None):
    """InfoNCE per sample as the formula stands: [B, N] of distances, every pair of them."""
    bank = p if negatives is None else negatives
    bank = bank if bank.ndim == a.ndim else bank.unsqueeze(1).expand(-1, a.shape[1], -1)
    w = torch.ones(a.shape[:-1], dtype=a.dtype) if weights is None else weights

    def distance(x, y):
        d = w.unsqueeze(1) * (1 - torch.nn.functional.cosine_similarity(x, y, dim=-1))
        return d.amax(-1) if agg == "max" else d.sum(-1) / (w.sum(-1, keepdim=True) if agg == "mean" else 1)

    d = distance(a.unsqueeze(1), bank.unsqueeze(0))
    if negatives is None:
        return torch.nn.functional.cross_entropy(-d / temperature, torch.arange(len(a)), reduction="none")
    d = torch.cat([distance(a.unsqueeze(1), p.unsqueeze(1)), d], 1)
    return torch.logsumexp(-d / temperature, 1) + d[:, 0] / temperature


@pytest.fixture(params=[(1, 1), (7, 2), (30, 3), (1 << 22, 256)])
def tiles(request, monkeypatch):
    """One anchor at a time, some that do not divide the batch, all at once."""
    monkeypatch.setattr(losses, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(losses, "TILE_ELEMENTS", request.param[0])
    monkeypatch.setattr(losses, "BANK_ROWS", request.param[1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
@pytest.mark.parametrize("negatives", ["batch", "bank", "token bank"])
def test_streamed_info_nce_is_that_of_the_full_logits(tiles, negatives, agg, reduction, weighted):
    shape = (8, 3, 5)
    a, p, n = embeddings(shape, 3)
    given = {"batch": [], "bank": [n.flatten(0, 1)], "token bank": [n[:6]]}[negatives]
    weights = [some_weights("token", shape) + 0.2] if weighted else []
    upstream = torch.linspace(0.5, 2, 8, dtype=a.dtype)
    results = []
    for streamed in (True, False):
        leaves = [x.detach().clone().requires_grad_() for x in (a, p, *given, *weights)]
        w = leaves[-1] if weighted else None
        o = {"temperature": 0.3, "agg": agg, "weights": w}
        bank = leaves[2] if given else None
        if streamed:
            loss = info_nce_loss(leaves[0], leaves[1], bank, reduction=reduction, **o)
        else:
            loss = full_logits(leaves[0], leaves[1], bank, **o)
            loss = loss if reduction == "none" else getattr(loss, reduction)()
        loss.backward(upstream if reduction == "none" else torch.tensor(3.0, dtype=a.dtype))
        results.append([loss, *(x.grad for x in leaves)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_factors_per_sample_and_their_gradient(tiles):
    a, p = embeddings((6, 4), 2)
    results = []
    for loss in (lambda w: info_nce_loss(a, p, weights=w), lambda w: (w * full_logits(a[:, None], p[:, None])).mean()):
        w = torch.linspace(0, 2, 6, dtype=a.dtype).requires_grad_()
        value = loss(w)
        value.backward()
        results.append((value, w.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_few_vectors_are_as_many(monkeypatch, dtype, bank, temperature):
    """In fewer calls, with the gradients of whichever inputs need one, also below the norm where they fade."""
    vectors = [x.to(dtype) for x in embeddings((6, 8), 3)]
    vectors[0][1], vectors[1][2], vectors[0][3] = 0.0, 0.0, vectors[0][3] * 1e-6
    vectors = [*vectors[:2], vectors[2][:5]] if bank else vectors[:2]
    for needs in itertools.product((False, True), repeat=len(vectors)):
        if not any(needs):
            continue
        results = []
        for small in (losses.SMALL_ELEMENTS, 0):
            with monkeypatch.context() as patched:
                patched.setattr(losses, "SMALL_ELEMENTS", small)
                leaves = [x.clone().requires_grad_(need) for x, need in zip(vectors, needs)]
                loss = info_nce_loss(*leaves, temperature=temperature, weights=torch.linspace(0, 2, 6))
                loss.backward()
                results.append([loss, *(x.grad for x in leaves if x.requires_grad)])
        for found, expected in zip(*results):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(
                found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4 * expected.abs().max().item()
            )


def test_backward_twice_through_a_kept_graph():
    a, p = (x.requires_grad_() for x in embeddings((6, 4), 2))
    loss = info_nce_loss(a, p)
    first = torch.autograd.grad(loss, (a, p), retain_graph=True)
    second = torch.autograd.grad(loss, (a, p), torch.tensor(2.0, dtype=a.dtype))
    torch.testing.assert_close(second, tuple(2 * g for g in first), rtol=0, atol=0)


def test_without_a_graph_no_gradient_is_made(monkeypatch):
    monkeypatch.setattr(losses, "SMALL_ELEMENTS", 0)
    asked, original = [], losses._bank_info_nce
    monkeypatch.setattr(losses, "_bank_info_nce", lambda *args: asked.append(any(args[-1])) or original(*args))
    a, p = (x.requires_grad_() for x in embeddings((6, 4), 2))
    info_nce_loss(a, p)
    with torch.no_grad():
        assert not info_nce_loss(a, p).requires_grad
    info_nce_loss(a.detach(), p.detach())
    assert asked == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(16,), (4, 8)], ids=["vectors", "tokens"])
@pytest.mark.parametrize("agg", ["mean", "max"])
def test_memory_of_info_nce_grows_linearly(monkeypatch, shape, agg, reduction):
    monkeypatch.setattr(losses, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(losses, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(losses, "BANK_ROWS", 2)
    peaks = []
    for batch in (64, 128, 256):
        a, p = (x.requires_grad_() for x in embeddings((batch, *shape), 2, torch.float32))
        with Made() as made:
            info_nce_loss(a, p, agg=agg, reduction=reduction).sum().backward()
        peaks.append(max(made.sizes))
    assert peaks[2] <= 2 * peaks[1] <= 4 * peaks[0]


def test_a_well_separated_positive_keeps_its_small_loss():
    """log(1 + e^−x), not log Σ − s: far below the rounding of either."""
    a = torch.tensor([[1.0, 0.0]])
    loss = info_nce_loss(a, a, -a, temperature=0.07)
    assert loss.item() == pytest.approx(3.9e-13, rel=0.01)


# --- negatives of one tensor -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("dist", ["cos", "l2"])
def test_sixty_four_negatives_without_a_copy(dist, needs):
    a, p = embeddings((2, 4, 128), 2, torch.float32)
    n = embeddings((2, 64, 4, 128), 1, torch.float32)[0].requires_grad_(needs)
    a.requires_grad_()
    with Made() as made:
        multi_negative_ranking_loss(a, p, n, margin=3.0, dist=dist).backward()
    # The distances of a sample to 64 negatives are fewer numbers than an anchor; nothing else is as large as one.
    assert [size for size in made.sizes if size > a.numel()] == ([n.numel()] if needs else [])
    assert (n.grad is not None) == needs


def test_stacked_and_listed_negatives_are_the_same():
    a, p = embeddings((3, 2, 2, 5), 2)
    n = embeddings((3, 4, 2, 2, 5), 1, seed=4)[0]
    stacked, listed = n.clone().requires_grad_(), [x.clone().requires_grad_() for x in n.unbind(1)]
    for dist, neg_agg in itertools.product(("cos", "l2"), ("mean", "max")):
        o = {"margin": "auto", "smooth": 0.2, "dist": dist, "neg_agg": neg_agg}
        found = multi_negative_ranking_loss(a, p, stacked, **o)
        expected = multi_negative_ranking_loss(a, p, listed, **o)
        assert torch.equal(found, expected)
        (g,) = torch.autograd.grad(found, stacked)
        torch.testing.assert_close(g, torch.stack(torch.autograd.grad(expected, listed), 1), rtol=0, atol=0)


# --- torch.compile ---------------------------------------------------------------------------------------------------

COMPILED = {
    "no_edit": lambda a, p, n: loss_no_edit_identity(a, p, n, margin=3.0),
    "l2": lambda a, p, n: loss_geometry_match(a, p, "l2"),
    "l1": lambda a, p, n: loss_geometry_match(a, p, "l1"),
    "stacked": lambda a, p, n: multi_negative_ranking_loss(a, p, torch.stack([n, p], 1), margin="auto", smooth=0.1),
    "in batch": lambda a, p, n: info_nce_loss(a, p),
    "in batch, max": lambda a, p, n: info_nce_loss(a, p, agg="max"),
    "bank": lambda a, p, n: info_nce_loss(a, p, n.flatten(0, 1), reduction="none").sum(),
    "own": lambda a, p, n: info_nce_loss(a, p, [n]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(name):
    """Without a graph break, and equal, also for vectors that are zero, tiny or the same."""
    usual = embeddings((4, 3, 8), 3, torch.float32)
    degenerate = [x.clone() for x in usual]
    degenerate[0][0], degenerate[1][1] = 0.0, 0.0
    degenerate[0][2, 1] *= 1e-6
    degenerate[2][3] = degenerate[0][3]
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], backend="aot_eager", fullgraph=True)
    for inputs in (usual, degenerate):
        results = []
        for function in (compiled, COMPILED[name]):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            loss = function(*leaves)
            loss.backward()
            results.append([loss, *(x.grad for x in leaves)])
        for found, expected in zip(*results):
            assert (found is None) == (expected is None)
            if found is not None:
                assert found.isfinite().all()
                torch.testing.assert_close(found, expected)


def test_blocks_are_equal(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", 100)
    sizes = [t.stop - t.start for _, t in losses._blocks(1, 32, 4)]
    assert sizes == [16, 16]
