"""Every public loss against the loops of loop_reference.py, in float64."""

import ast
from pathlib import Path

import loop_reference as loops
import pytest
import torch
from loop_reference import LAYOUTS, embeddings, pairwise, some_weights, weight_kinds

import editloss_core
from editloss_core import losses

AGGS = ("mean", "max", "sum")
MARGINS = ("number", "zero", "tensor", "scalar tensor", "auto", "auto:0.8")


def check(name, *args, **kwargs):
    """The loss equals the loops, under every reduction that it has."""
    function, reference = getattr(losses, name), getattr(loops, name)
    if name == "pair_distance":
        assert_near(function(*args, **kwargs), reference(*args, **kwargs))
        return
    per_sample = reference(*args, reduction="none", **kwargs)
    assert_near(function(*args, reduction="none", **kwargs), per_sample)
    assert_near(function(*args, reduction="sum", **kwargs), sum(per_sample))
    assert_near(function(*args, **kwargs), sum(per_sample) / len(per_sample))  # the default


def assert_near(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def some_margin(which, batch, negatives=1):
    if which == "tensor":
        return torch.linspace(0.0, 0.9, batch, dtype=torch.float64)
    if which == "tensor [B, K]":
        return torch.linspace(0.0, 0.9, batch * negatives, dtype=torch.float64).view(batch, negatives)
    return {"number": 0.6, "zero": 0, "scalar tensor": torch.tensor(0.35)}.get(which, which)


def cases(**axes):
    """One test per combination; ``layout`` and ``weights`` are always among the axes."""
    rows = pairwise(layout=tuple(LAYOUTS), weights=(None, "sample", "token"), **axes)
    kept = [row for row in rows if row["weights"] in weight_kinds(LAYOUTS[row["layout"]])]
    return [pytest.param(row, id="-".join(map(str, row.values()))) for row in kept]


def test_every_public_loss_is_compared():
    constants = (
        node.value for node in ast.walk(ast.parse(Path(__file__).read_text("utf-8"))) if isinstance(node, ast.Constant)
    )
    assert set(editloss_core.__all__) <= {value for value in constants if isinstance(value, str)}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("dist", ["cos", "l2"])
def test_pair_distance(layout, dist, agg):
    a, b = embeddings(layout, 2)
    for weights in weight_kinds(layout):
        check("pair_distance", a, b, dist=dist, agg=agg, weights=some_weights(weights, layout))


@pytest.mark.parametrize("name", ["feature_match_loss", "loss_geometry_match"])
@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("kind", ["l2", "l1", "cos"])
def test_match(layout, kind, agg, name):
    pred, target = embeddings(layout, 2)
    for weights in weight_kinds(layout):
        check(name, pred, target, kind=kind, agg=agg, weights=some_weights(weights, layout))


@pytest.mark.slow
@pytest.mark.parametrize("labels", [[1, 0, 1], [True, False, False], [0.25, 1.0, 0.0], 1, 0, 0.5], ids=str)
@pytest.mark.parametrize("margin", [0, 1.0, 4.5])
@pytest.mark.parametrize("dist", ["l2", "cos"])
def test_contrastive(layout, dist, margin, labels):
    z1, z2 = embeddings(layout, 2)
    y = torch.tensor(labels[: layout[0]]) if isinstance(labels, list) else labels
    for agg in AGGS:
        for weights in weight_kinds(layout):
            weights = some_weights(weights, layout)
            check("contrastive_pair_loss", z1, z2, y, margin=margin, dist=dist, agg=agg, weights=weights)


def test_contrastive_is_on_the_euclidean_distance_of_each_token():
    """½ y d² + ½ (1 − y) max(0, m − d)² with d = ‖z1 − z2‖ (Hadsell 2006), written out for d = 0.5."""
    z1, z2 = torch.zeros(1, 2), torch.tensor([[0.3, 0.4]])
    assert losses.contrastive_pair_loss(z1, z2, torch.tensor([1])).item() == pytest.approx(0.125)
    assert losses.contrastive_pair_loss(z1, z2, torch.tensor([0]), margin=0.7).item() == pytest.approx(0.02)


@pytest.mark.parametrize("name", ["triplet_margin_loss", "loss_no_edit_identity"])
@pytest.mark.parametrize("case", cases(dist=("cos", "l2"), agg=AGGS, margin=MARGINS, smooth=(0.0, 0.3)))
def test_triplet(name, case):
    shape = LAYOUTS[case["layout"]]
    options = {key: case[key] for key in ("dist", "agg", "smooth")}
    options.update(margin=some_margin(case["margin"], shape[0]), weights=some_weights(case["weights"], shape))
    check(name, *embeddings(shape, 3), **options)


@pytest.mark.parametrize(
    "d_neg_shape, margin",
    [
        *((shape, kind) for shape in ((4,), (4, 1), (4, 3)) for kind in ("number", "zero", "tensor", "scalar tensor")),
        ((4, 1), "tensor [B, K]"),
        ((4, 3), "tensor [B, K]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("neg_agg", AGGS)
def test_margin_ranking(d_neg_shape, margin, smooth, neg_agg):
    d_pos, d_neg = torch.rand(4, dtype=torch.float64), torch.rand(d_neg_shape, dtype=torch.float64)
    margin = some_margin(margin, *d_neg_shape)
    for weights in (None, torch.tensor([0.0, 1.0, 2.0, 0.5])):
        options = {"margin": margin, "smooth": smooth, "neg_agg": neg_agg, "weights": weights}
        check("margin_ranking_on_distances", d_pos, d_neg, **options)


NEGATIVE_FORMS = {
    "stacked": lambda negatives: torch.stack(negatives, 1),
    "list": list,
    "tuple": tuple,
    "single": lambda negatives: negatives[0],
    "list of one": lambda negatives: negatives[:1],
}


@pytest.mark.parametrize("name", ["multi_negative_ranking_loss", "loss_overlay_avoidance"])
@pytest.mark.parametrize(
    "case",
    cases(
        form=tuple(NEGATIVE_FORMS),
        neg_agg=AGGS,
        margin=(*MARGINS, "tensor [B, K]"),
        dist=("cos", "l2"),
        agg=AGGS,
        smooth=(0.0, 0.3),
    ),
)
def test_multi_negative(name, case):
    shape = LAYOUTS[case["layout"]]
    anchor, positive, *negatives = embeddings(shape, 5)
    k = 1 if "single" in case["form"] or "one" in case["form"] else 3
    options = {key: case[key] for key in ("dist", "agg", "smooth", "neg_agg")}
    options.update(margin=some_margin(case["margin"], shape[0], k), weights=some_weights(case["weights"], shape))
    check(name, anchor, positive, NEGATIVE_FORMS[case["form"]](negatives), **options)


def info_nce_negatives(form, shape, negatives):
    if form == "in batch":
        return None
    if form == "bank [N, D]":
        return embeddings((7, shape[-1]), 1, seed=5)[0]
    if form == "bank [N, ..., D]":
        return embeddings((7, *shape[1:]), 1, seed=5)[0]
    return NEGATIVE_FORMS[form](negatives)


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize(
    "form", ["in batch", "stacked", "list", "list of one", "bank [N, D]", "bank [N, ..., D]"], ids=str
)
def test_info_nce(layout, form, agg):
    anchor, positive, *negatives = embeddings(layout, 5)
    negatives = info_nce_negatives(form, layout, negatives)
    for weights in weight_kinds(layout):
        for temperature in (0.07, 1):
            options = {"temperature": temperature, "agg": agg, "weights": some_weights(weights, layout)}
            check("info_nce_loss", anchor, positive, negatives, **options)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 0.0, 2.0])], ids=["plain", "weights"])
def test_on_distances_of_the_caller(weights):
    """The halves of the losses that start from distances equal the whole on the distances of one-number embeddings."""
    a, b = embeddings((3, 1), 2)
    y = torch.tensor([1.0, 0.0, 0.5])
    whole = losses.contrastive_pair_loss(a, b, y, 1.5, weights=weights)
    assert_near(losses.contrastive_on_distances((a - b).abs()[:, 0], y, 1.5, weights=weights), whole.item())

    anchor, positive, *negatives = embeddings((3, 4), 4)
    d_pos, *d_neg = (losses.pair_distance(anchor, x) for x in (positive, *negatives))
    expected = loops.info_nce_loss(anchor, positive, negatives, 0.2, weights=weights)
    assert_near(losses.info_nce_on_distances(d_pos, torch.stack(d_neg, 1), 0.2, weights=weights), expected)
    expected = loops.info_nce_loss(anchor, positive, negatives[:1], 0.2, weights=weights)
    assert_near(losses.info_nce_on_distances(d_pos, d_neg[0], 0.2, weights=weights), expected)


def test_a_sample_without_weight_costs_nothing():
    """Σwd / Σw is 0 where Σw = 0, also in the logits of info_nce (all equal: log of their number)."""
    anchor, positive, negative = embeddings((2, 3, 4), 3)
    weights = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    check("feature_match_loss", anchor, positive, weights=weights)
    check("triplet_margin_loss", anchor, positive, negative, weights=weights)
    for negatives in (None, negative, [negative], negative[0]):
        check("info_nce_loss", anchor, positive, negatives, weights=weights)


# --- memory layouts --------------------------------------------------------------------------------------------------

STRIDES = {
    "every second feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "channels last": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "tokens permuted": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "one sample expanded": lambda x: x[:1].expand_as(x),
    "one token expanded": lambda x: x[:, :1, :1].expand_as(x),
    "one feature expanded": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("operands", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides, operands):
    shape = (3, 2, 3, 4)
    inputs = [STRIDES[strides](x) if i in operands else x for i, x in enumerate(embeddings(shape, 3))]
    weights = STRIDES["one sample expanded"](some_weights("token", shape))
    a, b, c = inputs
    assert any(not x.is_contiguous() for x in inputs)
    for dist in ("cos", "l2"):
        check("pair_distance", a, b, dist=dist, weights=weights)
        check("triplet_margin_loss", a, b, c, dist=dist, weights=weights, margin="auto")
    check("feature_match_loss", a, b, kind="l1", agg="max", weights=weights)
    check("contrastive_pair_loss", a, b, torch.ones(1).expand(3), weights=weights)
    check("margin_ranking_on_distances", torch.rand(6).double()[::2], torch.rand(5, 3).double().T)
    check("multi_negative_ranking_loss", a, b, torch.stack([c, a], -1).movedim(-1, 1), neg_agg="max")
    for negatives in (None, [c], c, torch.stack([c, b], -1).movedim(-1, 1), c[:, 0, 0]):
        check("info_nce_loss", a, b, negatives, weights=weights)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks(block_elements):
    """6 tokens of 4 numbers: the sizes of the fixture split tokens, fit a sample exactly, and hold several samples."""
    shape = (5, 2, 3, 4)
    a, b, c, d = embeddings(shape, 4)
    weights = some_weights("token", shape)
    for dist in ("cos", "l2"):
        check("multi_negative_ranking_loss", a, b, [c, d], dist=dist, weights=weights, margin="auto")
    check("contrastive_pair_loss", a, b, torch.tensor([1, 0, 1, 0, 1]), weights=weights)
    check("feature_match_loss", a, b, kind="l1", weights=weights)
    check("info_nce_loss", a, b, [c, d], weights=weights)


@pytest.mark.parametrize("size", [1, 3, 4, 23, 24, 25, 49, 1000])
@pytest.mark.parametrize("batch, tokens, dim", [(5, 6, 4), (1, 1, 1), (2, 25, 1), (3, 1, 30)])
def test_blocks_cover_every_token_once(monkeypatch, size, batch, tokens, dim):
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", size)
    seen = torch.zeros(batch, tokens, dtype=torch.long)
    for block in losses._blocks(batch, tokens, dim):
        assert seen[block].numel() > 0
        assert seen[block].numel() * dim <= max(size, dim)
        seen[block] += 1
    assert (seen == 1).all()
