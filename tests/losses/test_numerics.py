"""Dtypes × degenerate inputs: finite losses and gradients, bounded near the origin, exact away from it."""

import math

import pytest
import torch
from loop_reference import embeddings

import editloss_core
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
    token_distances,
    triplet_margin_loss,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
MIN_NORM = 1e-4


def ranking_on_distances(a, b, c, dist, **options):
    return margin_ranking_on_distances(pair_distance(a, b, dist), pair_distance(a, c, dist), **options)


LOSSES = {
    "pair_distance-cos": lambda a, b, c: pair_distance(a, b).sum(),
    "pair_distance-l2": lambda a, b, c: pair_distance(a, b, "l2", "max").sum(),
    "feature_match-l2": lambda a, b, c: feature_match_loss(a, b),
    "feature_match-l1": lambda a, b, c: feature_match_loss(a, b, "l1", "sum"),
    "feature_match-cos": lambda a, b, c: feature_match_loss(a, b, "cos", "max"),
    "contrastive-l2-same": lambda a, b, c: contrastive_pair_loss(a, b, 1),
    "contrastive-l2-different": lambda a, b, c: contrastive_pair_loss(a, b, 0, margin=2.0),
    "contrastive-cos": lambda a, b, c: contrastive_pair_loss(a, b, 0.5, dist="cos"),
    "triplet-cos": lambda a, b, c: triplet_margin_loss(a, b, c, 2.0),
    "triplet-l2": lambda a, b, c: triplet_margin_loss(a, b, c, 2.0, "l2"),
    "triplet-auto": lambda a, b, c: triplet_margin_loss(a, b, c, "auto", smooth=0.1),
    "margin_ranking-cos": lambda a, b, c: ranking_on_distances(a, b, c, "cos", margin=2.0),
    "margin_ranking-l2": lambda a, b, c: ranking_on_distances(a, b, c, "l2", smooth=0.1),
    "multi_negative": lambda a, b, c: multi_negative_ranking_loss(a, b, torch.stack([c, b], 1), 2.0, neg_agg="sum"),
    "multi_negative-l2": lambda a, b, c: multi_negative_ranking_loss(a, b, [c, b], 2.0, "l2", neg_agg="max"),
    "info_nce-in batch": lambda a, b, c: info_nce_loss(a, b),
    "info_nce-own": lambda a, b, c: info_nce_loss(a, b, [c]),
    "info_nce-token bank": lambda a, b, c: info_nce_loss(a, b, c),
    "info_nce-max": lambda a, b, c: info_nce_loss(a, b, c, agg="max"),
    "info_nce-bank": lambda a, b, c: info_nce_loss(a, b, c.flatten(0, -2)),
    "no_edit": lambda a, b, c: loss_no_edit_identity(a, b, c, 2.0),
    "geometry": lambda a, b, c: loss_geometry_match(a, b),
    "overlay": lambda a, b, c: loss_overlay_avoidance(a, b, [c, c], "auto:0.8", smooth=0.1),
}


def test_every_public_loss_is_tried():
    named = {name for loss in LOSSES.values() for name in loss.__code__.co_names}
    assert set(editloss_core.__all__) - named == {"margin_ranking_on_distances"}  # in ranking_on_distances


UNIT = [x / x.norm(dim=-1, keepdim=True) for x in embeddings((2, 3, 4), 3)]
ZERO = torch.zeros(2, 3, 4, dtype=torch.float64)
INPUTS = {
    "random": UNIT,
    "identical": [UNIT[0]] * 3,
    "opposite": [UNIT[0], -UNIT[0], UNIT[0]],
    "zero": [ZERO] * 3,
    "zero anchor": [ZERO, UNIT[1], UNIT[2]],
    "zero positive": [UNIT[0], ZERO, UNIT[2]],
    "zero negative": [UNIT[0], UNIT[1], ZERO],
    "one zero token": [x * torch.tensor([1, 0, 1]).view(3, 1) for x in UNIT],
    "norm 1e-20": [x * 1e-20 for x in UNIT],
    "norm 1e-20 anchor": [UNIT[0] * 1e-20, UNIT[1], UNIT[2]],
    "almost identical": [UNIT[0], UNIT[0] * (1 + 1e-3), UNIT[0] * (1 - 1e-3)],
    "huge": [x * 1e4 for x in UNIT],
    "huge and tiny": [UNIT[0] * 1e4, UNIT[1] * 1e-8, UNIT[2] * 1e-4],
    "batch of one": [x[:1] for x in UNIT],
    "one token": [x[:, :1] for x in UNIT],
    "no tokens": [x[:, 0] for x in UNIT],
    "D = 1": [x[..., :1] for x in UNIT],
    "one number": [x[:1, 0, :1] for x in UNIT],
    **{f"norm {n:g}": [x * n for x in UNIT] for n in (1e-8, 1e-7, 1e-6, 1e-5, 5e-5, 1e-4, 2e-4, 1e-3, 1e-2)},
}


def evaluate(loss, inputs, dtype):
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves if x.grad is not None], leaves


pytestmark = pytest.mark.usefixtures("ways")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_degenerate_inputs_are_finite(loss, dtype):
    for name, inputs in INPUTS.items():
        value, gradients, _ = evaluate(LOSSES[loss], inputs, dtype)
        assert value.isfinite() and value.dtype == dtype, name
        assert gradients and all(g.isfinite().all() and g.dtype == dtype for g in gradients), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_degenerate_halves_are_finite_and_computed_in_float32(loss, dtype):
    """The float32 loss of the same rounded values; its gradients in the half dtype, infinite only beyond its range."""
    ulp = torch.finfo(dtype).eps
    for name, inputs in INPUTS.items():
        value, gradients, leaves = evaluate(LOSSES[loss], inputs, dtype)
        value32, gradients32, _ = evaluate(LOSSES[loss], leaves, torch.float32)
        assert value.isfinite() and value.dtype == torch.float32, name
        torch.testing.assert_close(value, value32, rtol=1e-6, atol=0, msg=name)
        for g, g32 in zip(gradients, gradients32):
            fits = g32.abs() <= torch.finfo(dtype).max
            assert g.dtype == dtype and g[fits].isfinite().all(), name
            # A tensor that enters two losses here (margin_ranking) or two references gets two rounded parts whose
            # cancellation is the caller's: their size, not that of their sum, is what rounding is relative to.
            size = max(x[fits].abs().max() if fits.any() else 0 for x in gradients32 if x.shape == g.shape)
            limit = ulp * (size + torch.finfo(dtype).smallest_normal)
            assert "margin_ranking" in loss or (g[fits].float() - g32[fits]).abs().le(limit).all(), name


# The rest of LOSSES uses a tensor twice outside the loss, so that autograd adds two rounded parts.
USED_ONCE = [name for name in LOSSES if not name.startswith(("margin_ranking", "multi_negative", "overlay"))]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("loss", USED_ONCE)
def test_half_gradients_are_rounded_once(loss, dtype):
    """Number by number within half a unit in the last place of the float32 gradient."""
    _, gradients, leaves = evaluate(LOSSES[loss], UNIT, dtype)
    _, gradients32, _ = evaluate(LOSSES[loss], leaves, torch.float32)
    for g, g32 in zip(gradients, gradients32):
        torch.testing.assert_close(g.float(), g32, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-7)


# --- the origin ------------------------------------------------------------------------------------------------------

COSINE_TERMS = {
    "pair_distance": lambda a, p, n: pair_distance(a, p).sum(),
    "feature_match": lambda a, p, n: feature_match_loss(a, p, "cos", reduction="sum"),
    "contrastive": lambda a, p, n: contrastive_pair_loss(a, p, 1, dist="cos", reduction="sum"),
    "triplet": lambda a, p, n: triplet_margin_loss(a, p, n, 3.0, reduction="sum"),
    "no_edit": lambda a, p, n: loss_no_edit_identity(a, p, n, 3.0, reduction="sum"),
    "multi_negative": lambda a, p, n: multi_negative_ranking_loss(a, p, [n], 3.0, reduction="sum"),
    "overlay": lambda a, p, n: loss_overlay_avoidance(a, p, [n], 3.0, reduction="sum"),
    "info_nce-in batch": lambda a, p, n: info_nce_loss(a, p, temperature=1.0, reduction="sum"),
    "info_nce-own": lambda a, p, n: info_nce_loss(a, p, [n], temperature=1.0, reduction="sum"),
    "info_nce-bank": lambda a, p, n: info_nce_loss(a, p, n, temperature=1.0, reduction="sum"),
}
TWO_TERMS = ("triplet", "no_edit", "multi_negative", "overlay", "info_nce")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", COSINE_TERMS)
def test_the_gradient_of_a_cosine_is_bounded_by_1e4_per_token(loss, dtype):
    """Per cosine that the token takes part in: 1e4, fading linearly to 0 below a norm of 1e-4.

    (The contrastive loss of a cosine is ½ d², whose slope d in a distance is at most 2.)
    """
    inputs = [x[:, 0] for x in UNIT]
    in_batch = 2 if loss == "info_nce-in batch" else 1  # a positive is also the negative of the other sample
    for norm in (0.0, 1e-30, 1e-20, 1e-12, 1e-8, 1e-6, 1e-5, 5e-5, 9.9e-5, 1e-4):
        for i in range(3):
            scaled = [x * norm if j == i else x for j, x in enumerate(inputs)]
            _, gradients, _ = evaluate(COSINE_TERMS[loss], scaled, dtype)
            if i >= len(gradients):
                continue
            terms = 2 if loss == "contrastive" or (i == 0 and loss.startswith(TWO_TERMS)) else in_batch
            bound = 1e4 * terms * (min(1.0, norm / MIN_NORM) * (1 + 1e-6) + 1e-16)
            assert gradients[i].norm(dim=-1).max() <= bound, norm
            assert norm > 0 or (gradients[i] == 0).all()


def test_all_norms_tiny_at_once():
    for loss in COSINE_TERMS.values():
        for norm in (0.0, 1e-20, 1e-8, 1e-5, 1e-4):
            _, gradients, _ = evaluate(loss, [x[:, 0] * norm for x in UNIT], torch.float32)
            assert all(g.norm(dim=-1).max() <= 2e4 * (1 + 1e-6) for g in gradients)


@pytest.mark.parametrize("norm", [1e-8, 1e-6, 3e-5, 9.9e-5])
@pytest.mark.parametrize("loss", ["anchor", "reference", "info_nce anchor", "info_nce bank"])
def test_below_1e_4_the_clamped_cosine_is_differentiated_and_faded(loss, norm):
    """With the norm clamped, cos = x·r̂ / 1e-4 is linear in x: its gradient is r̂ / 1e-4, faded by ‖x‖ / 1e-4."""
    x, r = (UNIT[0][:, 0] * norm).requires_grad_(), UNIT[1][:, 0]
    if "info" in loss:  # two logits, −1 · (1 − cos) each: a bank of the positive's opposite
        a, b = (x, r) if "anchor" in loss else (r, x)
        (found,) = torch.autograd.grad(info_nce_loss(a, -r, b[:1], temperature=1.0, reduction="none")[0], x)
        other = r[0] / MIN_NORM
        if "anchor" in loss:  # d loss / d cos(x, ±r) = ∓ the probability of the bank's row
            chance = torch.sigmoid(2 * (x[0] * r[0]).sum() / MIN_NORM)
            expected = chance * 2 * other
        else:
            expected = torch.sigmoid((x[0] * r[0]).sum() / MIN_NORM + 1) * other
        found, expected = found[0], expected * norm / MIN_NORM
    else:
        (found,) = torch.autograd.grad(pair_distance(*((x, r) if loss == "anchor" else (r, x))).sum(), x)
        expected = -r / MIN_NORM * norm / MIN_NORM
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)


def analytic_cosine_distance(a, b):
    """1 − cos and its two gradients in float64: (cos · â − b̂) / ‖a‖, and the same with a and b exchanged."""
    na, nb = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    ua, ub = a / na, b / nb
    cosine = (ua * ub).sum(-1, keepdim=True)
    return 1 - cosine.squeeze(-1), (cosine * ua - ub) / na, (cosine * ub - ua) / nb


EXACT_NORMS = [(1.01e-4, 1.0), (1.0, 1.01e-4), (1.01e-4,) * 2, (1e-3, 1e3), (1e-2, 1e-4 * 2), (1, 1)]


@pytest.mark.parametrize(
    "norms, dtype",
    [
        (norms, dtype)
        for norms in EXACT_NORMS
        for dtype in DTYPES
        if dtype != torch.float16 or min(norms) >= 1e-3  # fp16 cannot hold a smaller vector with a direction
    ],
    ids=str,
)
def test_exact_above_a_norm_of_1e_4(norms, dtype):
    a, b = (x[:, 0].mul(n).to(dtype) for x, n in zip(UNIT, norms))
    expected = analytic_cosine_distance(a.double(), b.double())
    _, found, _ = evaluate(lambda a, b: pair_distance(a, b).sum(), [a, b], dtype)
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 4) if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(pair_distance(a, b).double(), expected[0], rtol=1e-6, atol=1e-6)
    for g, e in zip(found, expected[1:]):
        assert (g.double() - e).norm() <= precision * e.norm()


def test_info_nce_is_exact_above_a_norm_of_1e_4():
    a, p, n = (x[:, 0].float() for x in UNIT)
    a = (a * 1.5e-4).requires_grad_()
    for negatives in ([n], n, None):
        (found,) = torch.autograd.grad(info_nce_loss(a, p, negatives, temperature=0.5), a)
        b = a.detach().double().requires_grad_()
        cosine = torch.nn.functional.cosine_similarity
        positive = cosine(b, p.double(), dim=-1)
        if negatives is None:
            logits = cosine(b.unsqueeze(1), p.double().unsqueeze(0), dim=-1) / 0.5
            loss = -(logits.diagonal() - logits.logsumexp(1)).mean()
        else:
            others = n.double().unsqueeze(1) if isinstance(negatives, list) else n.double().unsqueeze(0)
            logits = torch.cat([positive.unsqueeze(1), cosine(b.unsqueeze(1), others, dim=-1)], 1) / 0.5
            loss = -(logits[:, 0] - logits.logsumexp(1)).mean()
        (expected,) = torch.autograd.grad(loss, b)
        assert (found.double() - expected).norm() <= 1e-6 * expected.norm()


# --- rounding --------------------------------------------------------------------------------------------------------


def close_pair(dtype):
    """Anchors whose positive is nearer than the negative by a cosine of about 0.0014, and that gap in float64."""
    generator = torch.Generator().manual_seed(0)
    anchor, noise = (torch.randn(64, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    a, p, n = (x.to(dtype) for x in (anchor, anchor + 0.3 * noise, anchor + 0.305 * noise))
    c = [torch.nn.functional.cosine_similarity(a.double(), x.double(), dim=-1) for x in (p, n)]
    return a, p, n, c[0] - c[1]


def test_gaps_of_a_bf16_rounding_survive():
    a, p, n, gap = close_pair(torch.bfloat16)
    assert 0.001 < gap.median() < 0.002 and gap.min() > 0
    naive = torch.nn.functional.cosine_similarity(a, p, dim=-1) - torch.nn.functional.cosine_similarity(a, n, dim=-1)
    assert (naive == 0).float().mean() > 0.3  # what this test is about
    margin = 0.01  # so that no hinge sleeps
    o = {"margin": margin, "reduction": "none"}
    for per_sample in (
        triplet_margin_loss(a, p, n, **o),
        multi_negative_ranking_loss(a, p, n.unsqueeze(1), **o),
        margin_ranking_on_distances(pair_distance(a, p), pair_distance(a, n), **o),
        loss_no_edit_identity(a, p, n, **o),
        loss_overlay_avoidance(a, p, n, **o),
        pair_distance(a, p) - pair_distance(a, n) + margin,
    ):
        torch.testing.assert_close(margin - per_sample.double(), gap, rtol=0, atol=1e-6)
    for bank in (False, True):
        a1, p1, n1 = (x[:1] for x in (a, p, n))
        found = info_nce_loss(a1, p1, n1 if bank else [n1], temperature=0.01).item()
        assert found == pytest.approx(math.log1p(math.exp(-gap[0].item() / 0.01)), rel=1e-4)


@pytest.mark.parametrize("loss", ["pair_distance", "feature_match", "geometry", "contrastive", "triplet"])
def test_l2_of_near_neighbours_does_not_cancel(loss):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 8, 64, generator=generator) + 100.0
    b = a + 1e-3 * torch.randn(4, 8, 64, generator=generator)
    squared = (a.double() - b.double()).square().sum(-1)
    found, expected = {
        "pair_distance": lambda: (pair_distance(a, b, "l2"), squared.mean(1)),
        "feature_match": lambda: (feature_match_loss(a, b), squared.mean()),
        "geometry": lambda: (loss_geometry_match(a, b), squared.mean()),
        "contrastive": lambda: (contrastive_pair_loss(a, b, 1), 0.5 * squared.sqrt().mean(1).square().mean()),
        "triplet": lambda: (triplet_margin_loss(a, b, a, 0, "l2"), squared.mean()),
    }[loss]()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 64, 768, 1031])
def test_identical_vectors_have_distance_zero_exactly(dim, dtype, layout):
    generator = torch.Generator().manual_seed(dim)
    a = torch.randn(2, 3, 4, dim, generator=generator).to(dtype)
    if layout == "expanded":
        a = a[:1].expand_as(a)
    b = a.movedim(-1, 1).contiguous().movedim(1, -1) if layout == "channels last" else a.clone()
    for dist in ("cos", "l2"):
        assert (pair_distance(a, b, dist) == 0).all()
        assert triplet_margin_loss(a, b, -a, "auto", dist).item() == 0


@pytest.mark.parametrize("dim", [3, 768, 2048, 2049, 1 << 16])
def test_a_cosine_distance_is_as_exact_as_the_module_says(dim):
    generator = torch.Generator().manual_seed(dim)
    common, one, other = torch.randn(3, 64, dim, generator=generator)
    for share in (0.0, 0.5, 0.99):  # of what two vectors have in common
        a, b = (share * common + (1 - share) * x for x in (one, other))
        errors = pair_distance(a, b).double() - analytic_cosine_distance(a.double(), b.double())[0]
        assert errors.square().mean().sqrt() < torch.finfo(torch.float32).eps


def test_nan_and_infinity_stay_in_their_tokens():
    a, b = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    broken = a.clone()
    broken[0, 1, 2], broken[2, 4, 0] = math.nan, math.inf
    expected = token_distances(a, [b])[0]
    expected[0, 1] = expected[2, 4] = math.nan
    torch.testing.assert_close(token_distances(broken, [b])[0], expected, equal_nan=True)


# --- NaN and mixed dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_in_nan_out(loss, which):
    inputs = [x.clone() for x in UNIT]
    inputs[which][1, 2, 3] = math.nan
    value, gradients, _ = evaluate(LOSSES[loss], inputs, torch.float32)
    if which < len(gradients):  # else the loss does not look at this input
        assert value.isnan()


@pytest.mark.parametrize("agg", ["mean", "max", "sum"])
def test_nan_in_weights_labels_and_distances(agg):
    nan = math.nan
    a, b, c = UNIT
    token, sample = torch.tensor([[1.0, nan, 1.0]] * 2), torch.tensor([1.0, nan])
    for weights in (token, sample):
        assert feature_match_loss(a, b, agg=agg, weights=weights).isnan()
        assert triplet_margin_loss(a, b, c, 3.0, agg=agg, weights=weights).isnan()
        assert info_nce_loss(a, b, [c], agg=agg, weights=weights).isnan()
        assert info_nce_loss(a, b, agg=agg, weights=weights).isnan()
    assert contrastive_pair_loss(a, b, torch.tensor([1.0, nan]), agg=agg).isnan()
    for d_pos, d_neg in (([nan], [[0.1, 0.2]]), ([0.3], [[nan, 0.2]])):
        assert margin_ranking_on_distances(torch.tensor(d_pos), torch.tensor(d_neg), neg_agg=agg).isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_mixed_dtypes_compute_in_the_widest_and_return_gradients_in_their_own(loss):
    for dtypes in ((torch.bfloat16, torch.float32, torch.float16), (torch.float16, torch.float64, torch.bfloat16)):
        if "multi" in loss:
            dtypes = (dtypes[0], dtypes[1], dtypes[1])  # torch.stack in the loss under test
        inputs = [x.clone().to(dtype).requires_grad_() for x, dtype in zip(UNIT, dtypes)]
        value = LOSSES[loss](*inputs)
        value.backward()
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        expected = LOSSES[loss](*(x.detach().to(wide) for x in inputs))
        assert value.dtype == wide
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        assert all(x.grad is None or x.grad.dtype == x.dtype for x in inputs)


@pytest.mark.parametrize("other", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_of_margin_weights_and_labels_does_not_change_the_dtype_of_the_loss(other):
    a, b, c = (x.float() for x in UNIT)
    ones = torch.ones(2, dtype=other)
    tokens = torch.ones(2, 3, dtype=other)
    for value in (
        triplet_margin_loss(a, b, c, margin=ones),
        multi_negative_ranking_loss(a, b, [c, a], margin=torch.ones(2, 2, dtype=other)),
        margin_ranking_on_distances(pair_distance(a, b), pair_distance(a, c), ones),
        loss_overlay_avoidance(a, b, c, weights=tokens),
        loss_no_edit_identity(a, b, c, weights=ones),
        feature_match_loss(a, b, weights=tokens),
        contrastive_pair_loss(a, b, ones, weights=tokens),
        info_nce_loss(a, b, weights=tokens),
        info_nce_loss(a, b, [c], weights=ones),
    ):
        assert value.dtype == torch.float32


@pytest.mark.parametrize("smooth", [1e-3, 1e-6, 1e-20, 1e-40])
def test_a_tiny_smooth_is_the_hinge(smooth):
    a, b, c = (x.float() for x in UNIT)
    expected = triplet_margin_loss(a, b, c, 2.0)
    torch.testing.assert_close(triplet_margin_loss(a, b, c, 2.0, smooth=smooth), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20])
def test_a_tiny_temperature_does_not_overflow(temperature):
    """No log(ratio + tiny): the hardest pairs keep their loss, (d_pos − d_neg) / τ, and their gradient."""
    a, p, n = (x[:1, 0].float() for x in UNIT)
    gap = (pair_distance(a, p) - pair_distance(a, n)).item()
    if gap < 0:
        p, n, gap = n, p, -gap
    anchor = a.clone().requires_grad_()
    loss = info_nce_loss(anchor, p, [n], temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(gap / temperature, rel=1e-5)
    assert anchor.grad.isfinite().all() and anchor.grad.norm() > 0
