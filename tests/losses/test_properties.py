"""Laws that hold for all embeddings, looked for counter-examples by hypothesis."""

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis", reason='pip install -e ".[test]"')

import itertools

from hypothesis import given
from hypothesis import strategies as st

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

close = torch.testing.assert_close
settings = hypothesis.settings(max_examples=20, deadline=None, database=None)
aggs = st.sampled_from(["mean", "max", "sum"])
dists = st.sampled_from(["cos", "l2"])
shapes = st.tuples(st.integers(1, 4), *(st.integers(1, 3),) * 2, st.integers(1, 6)) | st.tuples(
    st.integers(1, 4), st.integers(1, 6)
)
token_shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
margins = st.floats(0.0, 3.0) | st.sampled_from(["auto", "auto:0.8", "auto:1"])


@st.composite
def embeddings(draw, count, shapes=shapes, dtype=torch.float64):
    """``count`` tensors of one shape, of every size of norm, now and then zero, equal or opposite."""
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = []
    for _ in range(count):
        x = torch.randn(shape, generator=generator, dtype=dtype) * 10.0 ** draw(st.integers(-3, 3))
        special = draw(st.sampled_from(["random"] * 6 + ["zero", "equal", "opposite"]))
        if special == "zero":
            x = x * (torch.rand(shape[:-1], generator=generator) < 0.5).unsqueeze(-1)
        elif special != "random" and tensors:
            x = tensors[0].clone() if special == "equal" else -2 * tensors[0]
        tensors.append(x)
    return tensors


def all_losses(a, b, c, dist, agg, weights=None):
    """Every loss that has a reduction, as (name, function of a reduction)."""
    o = {"agg": agg, "weights": weights}
    y = torch.linspace(0, 1, len(a))
    return {
        "feature_match": lambda r: feature_match_loss(a, b, dist, reduction=r, **o),
        "geometry": lambda r: loss_geometry_match(a, b, "l1", reduction=r, **o),
        "contrastive": lambda r: contrastive_pair_loss(a, b, y, 1.0, dist, reduction=r, **o),
        "triplet": lambda r: triplet_margin_loss(a, b, c, 0.5, dist, reduction=r, **o),
        "no_edit": lambda r: loss_no_edit_identity(a, b, c, "auto", dist, reduction=r, **o),
        "multi_negative": lambda r: multi_negative_ranking_loss(a, b, [c, a], 0.5, dist, reduction=r, **o),
        "overlay": lambda r: loss_overlay_avoidance(a, b, c, 0.5, dist, reduction=r, neg_agg="sum", **o),
        "info_nce": lambda r: info_nce_loss(a, b, [c], reduction=r, **o),
        "info_nce bank": lambda r: info_nce_loss(a, b, c, reduction=r, **o),
    }


# --- distances -------------------------------------------------------------------------------------------------------


@settings
@given(embeddings(2), aggs, dists)
def test_symmetry(inputs, agg, dist):
    a, b = inputs
    close(pair_distance(a, b, dist, agg), pair_distance(b, a, dist, agg))
    close(contrastive_pair_loss(a, b, 0.5, dist=dist, agg=agg), contrastive_pair_loss(b, a, 0.5, dist=dist, agg=agg))
    for kind in ("l2", "l1", "cos"):
        close(feature_match_loss(a, b, kind, agg), feature_match_loss(b, a, kind, agg))


@settings
@given(embeddings(2, dtype=torch.float64) | embeddings(2, dtype=torch.float32))
def test_bounds(inputs):
    for agg in ("mean", "max"):
        d = pair_distance(*inputs, "cos", agg)
        assert d.min() >= 0 and d.max() <= 2
    assert pair_distance(*inputs, "l2").min() >= 0
    if len(inputs[0].shape) == 2:  # one token: parallel vectors reach both ends
        a = inputs[0] + 1
        assert (pair_distance(a, a) == 0).all() and (pair_distance(a, -a) == 2).all()


@settings
@given(embeddings(3), st.floats(1e-2, 1e3), aggs)
def test_the_cosine_ignores_scale(inputs, scale, agg):
    a, b, c = (x + 0.5 for x in inputs)  # away from the origin, where norms are clamped
    clear = min(x.norm(dim=-1).min() for x in (a, b, c)) * min(scale, 1) > 1e-4
    hypothesis.assume(clear)
    close(pair_distance(a * scale, b, agg=agg), pair_distance(a, b, agg=agg))
    close(triplet_margin_loss(a, b * scale, c, agg=agg), triplet_margin_loss(a, b, c * scale, agg=agg))
    close(info_nce_loss(a * scale, b, c, agg=agg), info_nce_loss(a, b, c * scale, agg=agg))


# --- batches, reductions, weights ------------------------------------------------------------------------------------


@settings
@given(embeddings(3), aggs, dists, st.randoms(use_true_random=False))
def test_a_permuted_batch_permutes_the_losses(inputs, agg, dist, random):
    order = list(range(len(inputs[0])))
    random.shuffle(order)
    straight = all_losses(*inputs, dist, agg)
    shuffled = all_losses(*(x[order] for x in inputs), dist, agg)
    for name, loss in straight.items():
        if name != "contrastive":  # its labels stay where they are
            close(shuffled[name]("none"), loss("none")[order])
    a, b, _ = inputs
    close(info_nce_loss(a[order], b[order], reduction="none"), info_nce_loss(a, b, reduction="none")[order])


@settings
@given(embeddings(3), aggs, dists)
def test_reductions_agree(inputs, agg, dist):
    for loss in all_losses(*inputs, dist, agg).values():
        none = loss("none")
        assert none.shape == inputs[0].shape[:1]
        close(loss("mean"), none.mean())
        close(loss("sum"), none.sum())


@pytest.mark.slow
@settings
@given(embeddings(3), aggs, dists)
def test_weights_of_one_are_no_weights(inputs, agg, dist):
    plain = all_losses(*inputs, dist, agg)
    for shape in (inputs[0].shape[:1], inputs[0].shape[:-1]):
        for weights in (torch.ones(shape), torch.ones(shape, dtype=torch.bool)):
            for name, loss in all_losses(*inputs, dist, agg, weights).items():
                close(loss("none"), plain[name]("none"))


@settings
@given(embeddings(3), aggs, dists, st.floats(0.0, 10.0))
def test_sample_weights_multiply_the_losses(inputs, agg, dist, factor):
    weights = torch.linspace(0, factor, len(inputs[0]), dtype=torch.float64)
    plain = all_losses(*inputs, dist, agg)
    for name, loss in all_losses(*inputs, dist, agg, weights).items():
        close(loss("none"), weights * plain[name]("none"))


@settings
@given(embeddings(3, token_shapes), aggs, dists, st.data())
def test_a_mask_is_the_loss_on_the_masked_tokens_alone(inputs, agg, dist, data):
    tokens = inputs[0].shape[1]
    kept = sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1)))
    mask = torch.zeros(inputs[0].shape[:-1])
    mask[:, kept] = 1
    alone = all_losses(*(x[:, kept] for x in inputs), dist, agg)
    for name, loss in all_losses(*inputs, dist, agg, mask).items():
        close(loss("none"), alone[name]("none"))


@settings
@given(embeddings(3, token_shapes), dists, st.floats(1e-3, 1e3))
def test_the_weighted_mean_ignores_the_scale_of_the_weights(inputs, dist, scale):
    weights = torch.rand(inputs[0].shape[:-1], dtype=torch.float64) + 0.1
    once = all_losses(*inputs, dist, "mean", weights)
    for name, loss in all_losses(*inputs, dist, "mean", weights * scale).items():
        close(loss("none"), once[name]("none"))


# --- what a perfect prediction pays ----------------------------------------------------------------------------------


@settings
@given(embeddings(2) | embeddings(2, dtype=torch.float32), aggs, st.sampled_from(["auto", "auto:0.1", "auto:1", 0]))
def test_a_perfect_prediction_costs_nothing(inputs, agg, margin):
    gt = inputs[0] + 0.5
    hypothesis.assume(gt.norm(dim=-1).min() > 1e-4)  # a token below that has a distance to itself
    other, pred = inputs[1], gt.clone()
    for dist in ("cos", "l2"):
        assert pair_distance(pred, gt, dist, agg).eq(0).all()
        assert loss_geometry_match(pred, gt, dist, agg) == 0
        assert contrastive_pair_loss(pred, gt, 1, dist=dist, agg=agg) == 0
        o = {"margin": margin, "dist": dist, "agg": agg}
        assert triplet_margin_loss(pred, gt, other, **o) == 0
        assert loss_no_edit_identity(pred, gt, other, **o) == 0
        assert loss_overlay_avoidance(pred, gt, [other, -other], **o) == 0
        assert multi_negative_ranking_loss(pred, gt, torch.stack([other, -other], 1), **o, neg_agg="max") == 0


@settings
@given(embeddings(2), dists, st.floats(0.01, 1.0))
def test_an_auto_margin_is_a_fraction_of_the_reach_of_the_target(inputs, dist, fraction):
    """No edit at all costs d(gt, src) + F · d(gt, src)."""
    gt, src = inputs[0] + 0.5, inputs[1] + 0.5
    hypothesis.assume(min(gt.norm(dim=-1).min(), src.norm(dim=-1).min()) > 1e-4)
    reach = pair_distance(gt, src, dist)
    found = loss_no_edit_identity(src, gt, src, f"auto:{fraction}", dist, reduction="none")
    close(found, reach * (1 + fraction))


@settings
@given(embeddings(2), st.floats(0.01, 5.0))
def test_info_nce_is_bounded_below_by_zero_and_is_log_of_the_count_when_all_are_equal(inputs, temperature):
    a, b = inputs
    assert info_nce_loss(a, b, temperature=temperature, reduction="none").min() >= 0
    same = [b, b, b]
    close(info_nce_loss(a, b, same, temperature), torch.tensor(4.0, dtype=a.dtype).log())
    assert info_nce_loss(a[:1], b[:1], temperature=temperature) == 0  # a batch of one has no negatives


# --- the losses agree with one another -------------------------------------------------------------------------------


@settings
@given(embeddings(3), margins, aggs, dists, st.sampled_from([0.0, 0.2]))
def test_the_ranking_losses_agree(inputs, margin, agg, dist, smooth):
    a, p, n = inputs
    o = {"margin": margin, "dist": dist, "agg": agg, "reduction": "none", "smooth": smooth}
    triplet = triplet_margin_loss(a, p, n, **o)
    close(loss_no_edit_identity(a, p, n, **o), triplet)
    for negatives in (n, [n], n.unsqueeze(1)):
        for neg_agg in ("mean", "max", "sum"):
            close(multi_negative_ranking_loss(a, p, negatives, **o, neg_agg=neg_agg), triplet)
            close(loss_overlay_avoidance(a, p, negatives, **o, neg_agg=neg_agg), triplet)
    if isinstance(margin, str):
        fraction = float(margin[5:] or 0.5)
        margin = fraction * pair_distance(p, n, dist, agg)
    d_pos, d_neg = pair_distance(a, p, dist, agg), pair_distance(a, n, dist, agg)
    ranking = margin_ranking_on_distances(d_pos, d_neg, margin, "none", smooth=smooth)
    close(ranking, triplet)
    close(margin_ranking_on_distances(d_pos, d_neg.unsqueeze(1), margin, "none", smooth=smooth), triplet)


@settings
@given(embeddings(4), margins, dists)
def test_negatives_aggregate_the_triplets(inputs, margin, dist):
    a, p, *negatives = inputs
    o = {"margin": margin, "dist": dist, "reduction": "none"}
    triplets = torch.stack([triplet_margin_loss(a, p, n, **o) for n in negatives], 1)
    for neg_agg, expected in {"mean": triplets.mean(1), "max": triplets.amax(1), "sum": triplets.sum(1)}.items():
        close(multi_negative_ranking_loss(a, p, negatives, neg_agg=neg_agg, **o), expected)
        close(loss_overlay_avoidance(a, p, negatives[::-1], neg_agg=neg_agg, **o), expected)


@settings
@given(embeddings(2), aggs)
def test_match_and_contrast_are_made_of_the_pair_distance(inputs, agg):
    a, b = inputs
    for kind in ("cos", "l2"):
        close(feature_match_loss(a, b, kind, agg, "none"), pair_distance(a, b, kind, agg))
        close(loss_geometry_match(a, b, kind, agg, "none"), pair_distance(a, b, kind, agg))
    close(contrastive_pair_loss(a, b, 1, dist="cos", agg=agg), 0.5 * pair_distance(a, b, agg=agg).square().mean())
    if a.ndim == 2:  # one token: the square of the Euclidean distance is the squared one
        close(contrastive_pair_loss(a, b, 1), 0.5 * pair_distance(a, b, "l2").mean())


@settings
@given(embeddings(2), aggs)
def test_info_nce_in_batch_is_a_token_bank_without_oneself(inputs, agg):
    a, b = inputs
    in_batch = info_nce_loss(a, b, agg=agg, reduction="none")
    for i in range(len(a)):
        others = torch.cat([b[:i], b[i + 1 :]])
        if len(others):
            close(info_nce_loss(a[i : i + 1], b[i : i + 1], others, agg=agg), in_batch[i])
            close(info_nce_loss(a[i : i + 1], b[i : i + 1], others.unsqueeze(0), agg=agg), in_batch[i])


# --- margins and smoothing -------------------------------------------------------------------------------------------


@settings
@given(embeddings(3), dists, st.lists(st.floats(0.0, 5.0), min_size=2, max_size=4), st.sampled_from([0.0, 0.3]))
def test_a_larger_margin_never_costs_less(inputs, dist, values, smooth):
    for margins in (sorted(values), [f"auto:{max(v / 5, 0.01)}" for v in sorted(values)]):
        per_sample = [triplet_margin_loss(*inputs, m, dist, reduction="none", smooth=smooth) for m in margins]
        for smaller, larger in itertools.pairwise(per_sample):
            assert (larger >= smaller - 1e-9 * (1 + smaller)).all()
    pushed = [contrastive_pair_loss(*inputs[:2], 0, m, dist, reduction="none") for m in sorted(values)]
    for smaller, larger in itertools.pairwise(pushed):
        assert (larger >= smaller).all()


@settings
@given(embeddings(3), dists, margins, st.floats(1e-6, 2.0))
def test_smooth_is_above_the_hinge_by_at_most_s_log_2(inputs, dist, margin, smooth):
    o = {"margin": margin, "dist": dist, "reduction": "none"}
    hinge = triplet_margin_loss(*inputs, **o)
    soft = triplet_margin_loss(*inputs, smooth=smooth, **o)
    rounding = 1e-8 * smooth + 1e-12 * hinge
    assert (soft >= hinge - rounding).all()
    assert (soft <= hinge + smooth * 0.6931471805599453 + rounding).all()
    close(triplet_margin_loss(*inputs, smooth=1e-9, **o), hinge, rtol=1e-7, atol=1e-8)
