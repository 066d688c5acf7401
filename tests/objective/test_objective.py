"""An objective says exactly what the public losses say, computes each distance once, and explains itself."""

import inspect
import itertools
import json
import math
from dataclasses import fields, replace

import pytest
import torch

import editloss_core
from editloss_core import losses
from editloss_core.embeddings import NEGATIVE_ROLES, ROLES, EmbeddingSet
from editloss_core.encoders.base import EncoderInfo
from editloss_core.objective import PRESETS, TERMS, EditObjective, LossTerm, recommended

B, K, H, D = 3, 2, 2, 5  # outputs, overlays per pair, hard negatives per pair, features
GRID = (2, 3)
LAYOUTS = {"global": (), "tokens": (6,), "grid": GRID}
CLOSE = dict(rtol=1e-10, atol=1e-12)
WRONG = (AssertionError, pytest.fail.Exception)  # what a known defect may fail with: not a slip in the test itself


def make(layout="grid", pairs=B, outputs=B, seed=0, name="e", mask=True, dtype=torch.float64, without=()):
    """Random embeddings of every role with a common part (cosines are then neither all 0 nor all 1); pred is a leaf."""
    g = torch.Generator().manual_seed(seed)
    shape = LAYOUTS[layout]
    common = torch.randn(*shape, D, generator=g, dtype=torch.float64)
    count = {
        "pred": (outputs,),
        "gt": (pairs,),
        "src": (pairs,),
        "overlay": (pairs, K),
        "hard_negative": (pairs, H + 1),
    }
    tensors = {
        (role, name): (0.5 * common + torch.randn(*count[role], *shape, D, generator=g, dtype=torch.float64)).to(dtype)
        for role in ROLES
        if role not in without
    }
    if "pred" not in without:
        tensors["pred", name].requires_grad_()
    made = EmbeddingSet(
        tensors, {name: EncoderInfo(name, "none", "0" * 64, layout)}, {} if layout == "global" else {name: GRID}
    )
    if not mask:
        return made
    pixels = (torch.rand(pairs, 8, 12, generator=g) * 2 - 0.7).clamp(0, 1).mul(8).round() / 8  # areas exact in float32
    pixels[:, :4, :4] = 0  # the first token does not count
    return made.with_mask(pixels)


def merged(*sets):
    tensors, encoders, grids = (
        {k: v for s in sets for k, v in getattr(s, f).items()} for f in ("tensors", "encoders", "grids")
    )
    return EmbeddingSet(tensors, encoders, grids, {}, sets[0].mask)


# --- the slow way: the public loss of a term, called directly --------------------------------------------------------


class Direct:
    """Roles as tensors of the batch's size (negatives as lists) and token weights, made without the objective's code."""

    def __init__(self, embeddings, term):
        self.term = term
        batch = max(len(t) for (_, name), t in embeddings.tensors.items() if name == term.encoder)
        self.z = {}
        for (role, name), tensor in embeddings.tensors.items():
            if name == term.encoder:
                tensor = torch.cat([tensor] * batch) if len(tensor) == 1 and batch > 1 else tensor
                self.z[role] = [tensor[:, k] for k in range(tensor.shape[1])] if role in NEGATIVE_ROLES else tensor
        self.weights = None
        layout = embeddings.encoders[term.encoder].output
        if layout != "global" and term.token_weights == "difference":
            self.weights = losses.token_distances(self.z["gt"], [self.z["src"]], "cos")[0].detach()
        elif layout != "global" and term.token_weights == "mask" and embeddings.mask is not None:
            mask = embeddings.mask
            weights = mask.reshape(len(mask), GRID[0], 4, GRID[1], 4).mean((2, 4))  # tokens of 4×4 pixels
            weights = weights.reshape(len(mask), *LAYOUTS[layout])
            self.weights = torch.cat([weights] * batch) if len(weights) == 1 else weights

    def distance(self, a, b):
        """[B], or [B, K] for a list, by pair_distance; Euclidean for the contrastive loss, as its docstring says."""
        if isinstance(self.z[b], list):
            return torch.stack([self._distance(self.z[a], n) for n in self.z[b]], 1)
        return self._distance(self.z[a], self.z[b])

    def _distance(self, a, b):
        t = self.term
        if t.kind == "contrastive" and t.dist == "l2":
            return losses.aggregate_tokens((a - b).square().sum(-1).sqrt(), t.agg, self.weights)
        if t.dist == "l1":
            return losses.aggregate_tokens((a - b).abs().sum(-1), t.agg, self.weights)
        return losses.pair_distance(a, b, t.dist or "cos", t.agg, self.weights)

    def loss(self, reduction):
        t, z = self.term, self.z
        common = dict(agg=t.agg, reduction=reduction, weights=self.weights)
        negative = z.get(t.negative)
        a, p = z[t.anchor], z[t.positive]
        hinge = dict(margin=t.margin, dist=t.dist, smooth=t.smooth, **common)
        if t.kind == "no_edit_identity":
            return losses.loss_no_edit_identity(a, p, negative, **hinge)
        if t.kind == "triplet":
            return losses.triplet_margin_loss(a, p, negative, **hinge)
        if t.kind == "overlay_avoidance":
            return losses.loss_overlay_avoidance(a, p, negative, neg_agg=t.neg_agg, **hinge)
        if t.kind == "multi_negative":
            negative = negative if isinstance(negative, list) else [negative]
            return losses.multi_negative_ranking_loss(a, p, negative, neg_agg=t.neg_agg, **hinge)
        if t.kind == "margin_ranking":
            return losses.margin_ranking_on_distances(
                self.distance(t.anchor, t.positive),
                self.distance(t.reference, t.negative),
                t.margin,
                reduction,
                smooth=t.smooth,
            )
        if t.kind == "geometry_match":
            return losses.loss_geometry_match(a, p, t.dist, **common)
        if t.kind == "feature_match":
            return losses.feature_match_loss(a, p, t.dist, **common)
        if t.kind == "pair_distance":
            d = losses.pair_distance(a, p, t.dist, t.agg, self.weights)
            return d if reduction == "none" else d.mean()
        if t.kind == "contrastive":
            return losses.contrastive_pair_loss(a, p, torch.full((len(a),), t.label), t.margin, t.dist, **common)
        if t.kind == "info_nce":
            own = None if t.negative == "in_batch" else negative if isinstance(negative, list) else [negative]
            return losses.info_nce_loss(a, p, own, t.temperature, **common)
        raise AssertionError(f"no public loss for {t.kind}: add it here")

    def distances(self):
        """The distances that a report must name at the least."""
        t = self.term
        named = {f"d({t.anchor}, {t.positive})": self.distance(t.anchor, t.positive)}
        if t.negative and t.negative != "in_batch":
            anchor = t.reference or t.anchor
            named[f"d({anchor}, {t.negative})"] = self.distance(anchor, t.negative)
        return named

    def active(self):
        """Counted sample by sample; None without a hinge."""
        t = self.term
        if t.margin is None:
            return None
        d = self.distance(t.anchor, t.positive)
        if t.kind == "contrastive":
            return sum((x > 0) if t.label else (x < t.margin) for x in d.tolist()) / len(d)
        d = d.tolist()
        columns = self.distance(t.reference or t.anchor, t.negative).reshape(len(d), -1).tolist()
        fraction = losses.margin_fraction(t.margin)
        reach = None if fraction is None else fraction * self.distance(t.positive, t.negative).reshape(len(d), -1)
        count = 0
        for i in range(len(d)):
            margins = [t.margin] * len(columns[i]) if reach is None else reach[i].tolist()
            count += any(d[i] - far + margin > 0 for far, margin in zip(columns[i], margins))
        return count / len(d)


# every kind, with each of its settings away from its default at least once
SETTINGS = {
    "no_edit_identity": [{}, dict(margin="auto"), dict(margin="auto:0.8", smooth=0.1, dist="l2"), dict(margin=0.0, agg="max")],
    "triplet": [{}, dict(margin="auto", agg="sum"), dict(positive="src", negative="gt"), dict(smooth=0.3, agg="max")],
    "overlay_avoidance": [
        {}, dict(margin="auto"), dict(neg_agg="max", margin="auto:0.3"), dict(neg_agg="sum", dist="l2", smooth=0.5),
        dict(negative="hard_negative", agg="max"),
    ],
    "multi_negative": [
        {}, dict(neg_agg="max", margin="auto"), dict(neg_agg="sum", agg="max"), dict(negative="overlay", smooth=0.2),
        dict(negative="src", dist="l2", agg="sum"),
    ],
    "margin_ranking": [
        {}, dict(dist="l2", margin=0.0), dict(reference="pred", negative="src", agg="max"), dict(negative="overlay", smooth=0.1),
        dict(agg="sum"),
    ],
    "geometry_match": [{}, dict(dist="cos"), dict(dist="l1", agg="max"), dict(agg="sum"), dict(positive="src")],
    "feature_match": [{}, dict(dist="cos", agg="sum"), dict(dist="l1"), dict(agg="max"), dict(anchor="src")],
    "pair_distance": [{}, dict(dist="l2"), dict(agg="max"), dict(agg="sum", positive="src")],
    "contrastive": [
        {}, dict(label=0, margin=4.0), dict(dist="cos", agg="max"), dict(label=0, dist="cos"),
        dict(label=0, margin=9.0, agg="sum", positive="src"),
    ],
    "info_nce": [
        {}, dict(temperature=0.5, agg="max"), dict(negative="overlay"), dict(negative="hard_negative", agg="max"),
        dict(negative="src", temperature=1.0, agg="sum"), dict(agg="sum", positive="src"),
    ],
}  # fmt: skip
PLACES = [("global", "mask"), *itertools.product(("tokens", "grid"), ("mask", "difference", "none"))]
CASES = [(kind, s) for kind, settings in SETTINGS.items() for s in settings]


def case_id(value):
    return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else str(value)


def test_every_kind_is_tried():
    assert SETTINGS.keys() == TERMS.keys()


def agree(embeddings, term):
    """A report of the term alone against the public loss: value, per sample, distances, activity, gradient."""
    pred = embeddings.tensors["pred", term.encoder]
    report = EditObjective().with_term(term).evaluate(embeddings)
    (t,) = report.terms
    direct = Direct(embeddings, term)
    torch.testing.assert_close(t.value, direct.loss("mean"), **CLOSE)
    torch.testing.assert_close(t.per_sample, direct.loss("none"), **CLOSE)
    torch.testing.assert_close(t.weighted, term.weight * direct.loss("mean"), **CLOSE)
    torch.testing.assert_close(report.total, t.weighted, **CLOSE)
    for name, expected in direct.distances().items():
        torch.testing.assert_close(t.distances[name], expected, **CLOSE)
    assert t.active == (None if direct.active() is None else pytest.approx(direct.active()))
    if direct.loss("mean").requires_grad:
        (got,) = torch.autograd.grad(report.total, pred)
        (expected,) = torch.autograd.grad(term.weight * direct.loss("mean"), pred)
        torch.testing.assert_close(got, expected, **CLOSE)
        assert not torch.isnan(got).any()
    else:
        assert not report.total.requires_grad
    return t


@pytest.mark.slow
@pytest.mark.parametrize("layout, token_weights", PLACES)
@pytest.mark.parametrize("kind, settings", CASES, ids=case_id)
def test_a_term_is_its_public_loss(kind, settings, layout, token_weights):
    agree(make(layout), LossTerm(kind, "e", weight=0.7, token_weights=token_weights, **settings))


@pytest.mark.parametrize("layout, token_weights", [("tokens", "difference"), ("grid", "mask")])
@pytest.mark.parametrize("kind, settings", CASES, ids=case_id)
def test_one_pair_stands_for_every_output(kind, settings, layout, token_weights):
    agree(make(layout, pairs=1, seed=1), LossTerm(kind, "e", weight=2, token_weights=token_weights, **settings))


@pytest.mark.parametrize("kind", TERMS)
def test_a_batch_of_one_without_a_mask(kind):
    agree(make(pairs=1, outputs=1, mask=False), LossTerm(kind, "e"))


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(kind, dtype):
    made = make("tokens", dtype=dtype, mask=False)
    report = EditObjective().with_term(LossTerm(kind, "e")).evaluate(made, details=True)
    direct = Direct(made, report.terms[0].term)
    assert report.total.dtype == torch.float32
    torch.testing.assert_close(report.total, direct.loss("mean"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_open_hinges_are_counted(layout):
    """Of four samples at known distances, one, two, three are open."""
    made = make(layout, outputs=4, pairs=4, mask=False)
    gt, src = made.tensors["gt", "e"], made.tensors["src", "e"]
    pred = torch.cat([src[:2], gt[2:]])
    made = replace(made, tensors={**made.tensors, ("pred", "e"): pred})
    for margin, share in (("auto", 0.5), (0.0, 0.5), (100.0, 1.0)):
        (t,) = EditObjective().with_term(LossTerm("triplet", "e", margin=margin)).evaluate(made).terms
        assert t.active == share
    overlay = torch.stack([gt, src], 1)  # one of the two constructions is met by every output
    made = replace(made, tensors={**made.tensors, ("overlay", "e"): overlay})
    (t,) = EditObjective().with_term(LossTerm("overlay_avoidance", "e", margin=0.1)).evaluate(made).terms
    assert t.active == 1.0 and t.per_sample.gt(0).all()


# --- the whole objective ---------------------------------------------------------------------------------------------


def everything(encoder="e", **common):
    terms = [LossTerm(kind, encoder, weight=0.1 * (i + 1), **s, **common) for i, (kind, s) in enumerate(CASES)]
    objective = EditObjective()
    for term in terms:
        objective = objective.with_term(term)
    return objective


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("details", [False, True])
def test_total_and_gradient_are_the_weighted_sum_of_public_losses(layout, details):
    made, objective = make(layout), everything()
    report = objective.evaluate(made, details)
    expected = sum(t.weight * Direct(made, t).loss("mean") for t in objective.terms)
    torch.testing.assert_close(report.total, expected, **CLOSE)
    pred = made.tensors["pred", "e"]
    torch.testing.assert_close(
        torch.autograd.grad(report.total, pred)[0], torch.autograd.grad(expected, pred)[0], rtol=1e-9, atol=1e-11
    )


def test_details_change_no_number():
    made, objective = make(), everything()
    for plain, detailed in zip(objective.evaluate(made).terms, objective.evaluate(made, details=True).terms):
        assert plain.value.equal(detailed.value) and plain.per_sample.equal(detailed.per_sample)
        assert plain.active == detailed.active
        for name, d in plain.distances.items():
            assert d.equal(detailed.distances[name])
        assert plain.toward_failure is None and plain.token_map is None and plain.token_weights is None


@pytest.mark.parametrize("pairs", [1, B])
def test_two_encoders(pairs):
    made = merged(make("grid", pairs, name="dino", seed=1), make("global", pairs, name="clip", seed=2))
    objective = recommended("clip", "dino")
    assert objective.encoders == ("clip", "dino")
    assert [t.encoder for t in objective.terms] == ["clip", "dino", "clip"]
    report = objective.evaluate(made, details=True)
    expected = sum(t.weight * Direct(made, t).loss("mean") for t in objective.terms)
    torch.testing.assert_close(report.total, expected, **CLOSE)
    leaves = [made.tensors["pred", name] for name in ("clip", "dino")]
    for got, wanted in zip(torch.autograd.grad(report.total, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(got, wanted, **CLOSE)
    assert [t.token_map is None for t in report.terms] == [True, False, True]
    assert [t.toward_failure is None for t in report.terms] == [False, False, False]


def test_weight_0_watches():
    made = make()
    base = EditObjective().with_term(LossTerm("no_edit_identity", "e"))
    watched = base.with_term(LossTerm("overlay_avoidance", "e", weight=0, margin=0.9))
    plain, report = base.evaluate(made), watched.evaluate(made)
    assert report.total.equal(plain.total) and report.terms[1].weighted.item() == 0
    assert report.terms[1].value > 0 and report.terms[1].active > 0
    pred = made.tensors["pred", "e"]
    assert torch.autograd.grad(report.total, pred)[0].equal(torch.autograd.grad(plain.total, pred)[0])


def test_other_roles_get_gradients_when_they_ask_for_them():
    """Roles other than pred may be learned too (an encoder that is being tuned)."""
    made = make("tokens", mask=False)
    gt = made.tensors["gt", "e"].clone().requires_grad_()
    made = replace(made, tensors={**made.tensors, ("gt", "e"): gt})
    term = LossTerm("no_edit_identity", "e", margin=0.5)
    total = EditObjective().with_term(term).evaluate(made, details=True).total
    torch.testing.assert_close(
        torch.autograd.grad(total, gt)[0], torch.autograd.grad(Direct(made, term).loss("mean"), gt)[0], **CLOSE
    )


# --- each distance once ----------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """Every pass of the primitive: (dist, address of the anchor, addresses of the references, with a graph)."""
    seen, original = [], losses.token_distances

    def spy(anchor, references, dist="cos"):
        needs = torch.is_grad_enabled() and any(t.requires_grad for t in (anchor, *references))
        seen.append((dist, anchor.data_ptr(), [r.data_ptr() for r in references], needs))
        return original(anchor, references, dist)

    monkeypatch.setattr(losses, "token_distances", spy)
    return seen


def names_of(embeddings):
    """Address → (role, k, encoder)."""
    found = {}
    for (role, name), tensor in embeddings.tensors.items():
        for k, item in enumerate(tensor.unbind(1) if role in NEGATIVE_ROLES else [tensor]):
            found[item.data_ptr()] = (role, k, name)
    return found


def touched(passes, embeddings):
    """(dist, {role, role}) with how often it was computed; a distance is the same in both directions."""
    names, count = names_of(embeddings), {}
    for dist, anchor, references, _ in passes:
        for reference in references:
            key = (dist, frozenset((names[anchor], names[reference])))
            count[key] = count.get(key, 0) + 1
    return count


def pair(dist, a, b, k=0, name="e"):
    return dist, frozenset(((a, 0, name), (b, k, name)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", [1, B])
def test_the_recommended_mix_is_one_pass_over_each_pair(passes, layout, pairs):
    made = make(layout, pairs)
    recommended("e").evaluate(made)
    assert len(passes) == 1, "the three terms share the anchor, so one pass over it"
    assert touched(passes, made) == {
        pair("cos", "pred", "gt"): 1,
        pair("cos", "pred", "src"): 1,
        **{pair("cos", "pred", "overlay", k): 1 for k in range(K)},
    }


def test_terms_that_share_everything_cost_one(passes):
    made = make()
    objective = EditObjective()
    for settings in (dict(margin=0.1), dict(margin=0.3, agg="max"), dict(smooth=0.1, token_weights="none")):
        objective = objective.with_term(LossTerm("triplet", "e", **settings))
    objective = objective.with_term(LossTerm("info_nce", "e", negative="src"))
    report = objective.evaluate(made)
    assert touched(passes, made) == {pair("cos", "pred", "gt"): 1, pair("cos", "pred", "src"): 1}
    assert all(t.value.requires_grad for t in report.terms)


def test_automatic_margins_are_shared_and_constant(passes):
    made = make()
    made.tensors["src", "e"].requires_grad_()  # a margin is a constant even then
    objective = EditObjective()
    for kind in ("no_edit_identity", "triplet"):
        for margin in ("auto", "auto:0.9"):
            objective = objective.with_term(LossTerm(kind, "e", margin=margin))
    objective.evaluate(made)
    assert touched(passes, made) == {
        pair("cos", "pred", "gt"): 1, pair("cos", "pred", "src"): 1, pair("cos", "gt", "src"): 1
    }  # fmt: skip
    assert [needs for *_, needs in passes] == [True, False]


def test_encoders_and_dists_are_kept_apart(passes):
    made = merged(make(name="a"), make("tokens", name="b", seed=1))
    objective = recommended("a", "b", geometry_dist="l2").with_term(LossTerm("contrastive", "a", dist="l2"))
    objective.evaluate(made)
    assert touched(passes, made) == {
        pair("cos", "pred", "gt", name="a"): 1,
        pair("cos", "pred", "src", name="a"): 1,
        **{pair("cos", "pred", "overlay", k, name="a"): 1 for k in range(K)},
        pair("l2", "pred", "gt", name="b"): 1,
        pair("euclidean", "pred", "gt", name="a"): 1,
    }


def test_everything_together_computes_nothing_twice(passes):
    made = make()
    everything(token_weights="none").evaluate(made)
    repeated = {key: n for key, n in touched(passes, made).items() if n > 1}
    assert not repeated


def test_details_compute_nothing_twice(passes):
    made = make()
    recommended("e").evaluate(made, details=True)
    counted = touched(passes, made)
    assert {key: n for key, n in counted.items() if n > 1} == {}
    assert set(counted) == {
        pair("cos", "pred", "gt"), pair("cos", "pred", "src"), pair("cos", "gt", "src"),
        *(pair("cos", a, "overlay", k) for a in ("pred", "gt") for k in range(K)),
    }  # fmt: skip


@pytest.mark.parametrize("details", [False, True])
def test_difference_weights_are_computed_once(passes, details):
    made = make()
    objective = EditObjective()
    for kind in ("no_edit_identity", "geometry_match", "overlay_avoidance"):
        objective = objective.with_term(LossTerm(kind, "e", dist="cos", token_weights="difference"))
    objective.evaluate(made, details)
    assert touched(passes, made)[pair("cos", "gt", "src")] == 1


@pytest.mark.parametrize("details", [False, True])
def test_mask_weights_are_computed_once(monkeypatch, details):
    calls, original = [], EmbeddingSet.token_weights
    monkeypatch.setattr(EmbeddingSet, "token_weights", lambda self, e: calls.append(e) or original(self, e))
    recommended("e").evaluate(make(), details)
    assert calls == ["e"]


def test_no_gradient_work_for_constants(monkeypatch):
    """One backward pass for the one anchor that has a graph, and none of its gradients is for a constant."""
    asked, original = [], losses._TokenDistances.backward

    def spy(ctx, *grads):
        asked.append(ctx.needs_input_grad)
        return original(ctx, *grads)

    monkeypatch.setattr(losses._TokenDistances, "backward", staticmethod(spy))
    made = make()
    objective = (
        recommended("e").with_term(LossTerm("margin_ranking", "e")).with_term(LossTerm("triplet", "e", margin="auto"))
    )
    report = objective.evaluate(made, details=True)
    report.total.backward()
    assert [needs[2] for needs in asked] == [True] and not any(asked[0][3:])
    for t in report.terms:
        for name, d in t.distances.items():
            assert d.requires_grad == ("pred" in name), name
        for extra in (t.toward_failure, t.token_map, t.token_weights):
            assert extra is None or not extra.requires_grad
    assert all(t.grad is None for (role, _), t in made.tensors.items() if role != "pred")


def test_without_a_graph_nothing_is_kept():
    made = make()
    pred = made.tensors["pred", "e"].detach()
    report = everything().evaluate(replace(made, tensors={**made.tensors, ("pred", "e"): pred}), details=True)
    assert not report.total.requires_grad


# --- names, chaining -------------------------------------------------------------------------------------------------


def test_names_are_made_unique_by_numbers():
    objective = EditObjective()
    for name in ("", "", "mine", "mine", "triplet #2", ""):
        objective = objective.with_term(LossTerm("triplet", "e", name=name))
    names = [t.name for t in objective.terms]
    assert names[:4] == ["triplet", "triplet #2", "mine", "mine #2"] and len(set(names)) == 6
    assert set(objective.evaluate(make()).as_dict()["terms"]) == set(names)


def test_default_names_are_readable():
    assert [LossTerm(kind, "e").name for kind in TERMS] == [kind.replace("_", " ") for kind in TERMS]


def test_with_term_changes_nothing_but_its_result():
    first = EditObjective()
    term = LossTerm("triplet", "e")
    second = first.with_term(term)
    third, fourth = second.with_term(term), second.with_term(LossTerm("info_nce", "f"))
    assert (len(first.terms), len(second.terms), len(third.terms), len(fourth.terms)) == (0, 1, 2, 2)
    assert term.name == "triplet" and third.terms[0] == second.terms[0] == term
    assert fourth.encoders == ("e", "f") and second.encoders == ("e",)
    with pytest.raises(AttributeError):
        term.weight = 2.0


# --- the table and the preset ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TERMS)
def test_every_row_has_a_public_loss(kind):
    loss = TERMS[kind].loss
    assert loss.__name__ in editloss_core.__all__ and getattr(editloss_core, loss.__name__) is loss


def test_every_public_loss_has_a_row():
    assert {row.loss.__name__ for row in TERMS.values()} == set(editloss_core.__all__)


SETTING_OF = {"dist": "dist", "kind": "dist", "margin": "margin", "smooth": "smooth", "neg_agg": "neg_agg",
              "temperature": "temperature", "y": "label"}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    TERMS,
)
def test_every_row_has_a_complete_set_of_defaults(kind):
    """Each setting of the public loss is one of the term, with the same default; anchor and positive are always there."""
    defaults = TERMS[kind].defaults
    optional = {f.name for f in fields(LossTerm) if f.default is None}
    assert set(defaults) <= optional and None not in defaults.values()
    assert defaults["anchor"] == "pred" and defaults["positive"] == "gt"
    term = LossTerm(kind, "e")
    assert all(getattr(term, name) == defaults.get(name) for name in optional)
    for parameter in inspect.signature(TERMS[kind].loss).parameters.values():
        if parameter.name in SETTING_OF:
            name = SETTING_OF[parameter.name]
            assert name in defaults, f"{kind} has no {name}"
            if parameter.default is not inspect.Parameter.empty:
                assert defaults[name] == parameter.default, name
    assert ("margin" in defaults) == ("margin" in inspect.signature(TERMS[kind].loss).parameters)


def test_the_three_failures_have_their_losses():
    failures = {kind: row.failure for kind, row in TERMS.items() if row.failure}
    assert failures == {"no_edit_identity": "no edit", "geometry_match": "distorted", "overlay_avoidance": "overlay"}


def test_recommended_preset():
    assert PRESETS["recommended"] is recommended
    rows = [(t.kind, t.weight, t.margin, t.dist, t.encoder) for t in recommended("e").terms]
    assert rows == [
        ("no_edit_identity", 1.0, 0.25, "cos", "e"),
        ("geometry_match", 0.5, None, "cos", "e"),
        ("overlay_avoidance", 0.7, 0.25, "cos", "e"),
    ]
    assert recommended("e", "f", "l2").terms[1] == LossTerm("geometry_match", "f", 0.5, "geometry match", dist="l2")
    report = recommended("e").evaluate(make())
    values = [t.value for t in report.terms]
    torch.testing.assert_close(report.total, 1.0 * values[0] + 0.5 * values[1] + 0.7 * values[2], **CLOSE)


# --- details ---------------------------------------------------------------------------------------------------------


def axis(*values):
    """Unit vectors [len(values), D] in float64: 0 → e0, 1 → e1, …; a pair (i, j) lies halfway between."""
    eye = torch.eye(D, dtype=torch.float64)
    return torch.stack([eye[v] if isinstance(v, int) else (eye[v[0]] + eye[v[1]]) / math.sqrt(2) for v in values])


GT, SRC, OVERLAY, OVERLAY2, FAR = range(5)


def synthetic(*outputs, overlays=(OVERLAY, OVERLAY2), mask=None):
    """Grid embeddings of one pair: all tokens of gt, src, the overlays at their own axis; each output a list of 6 tokens."""
    tokens = {"gt": [GT] * 6, "src": [SRC] * 6}
    tensors = {(role, "e"): axis(*t).view(1, *GRID, D) for role, t in tokens.items()}
    tensors["overlay", "e"] = torch.stack([axis(*[o] * 6).view(*GRID, D) for o in overlays]).unsqueeze(0)
    tensors["pred", "e"] = torch.stack([axis(*(o if isinstance(o, list) else [o] * 6)).view(*GRID, D) for o in outputs])
    made = EmbeddingSet(tensors, {"e": EncoderInfo("e", "none", "0" * 64, "grid")}, {"e": GRID})
    return made if mask is None else made.with_mask(mask)


def test_signal_names_the_failure():
    report = recommended("e").evaluate(synthetic(GT, SRC, OVERLAY, OVERLAY2, FAR, (GT, SRC)), details=True)
    assert report.signal() == [None, "no edit", "overlay", "overlay", "distorted", "no edit"]
    identity, geometry, overlay = (t.toward_failure.tolist() for t in report.terms)
    halfway = math.sqrt(0.5)  # the cosine with either end
    assert identity == pytest.approx([0, 1, 0, 0, 0, halfway], abs=1e-12)
    assert geometry == pytest.approx([0, 1, 1, 1, 1, 1 - halfway], abs=1e-12)
    assert overlay == pytest.approx([0, 0, 1, 1, 0, 0], abs=1e-12)


def test_a_named_negative_comes_before_distorted():
    """Beside src, on the side away from gt: further from gt than src is, and still an output without an edit."""
    made = synthetic(GT)
    z = {role: made.tensors[role, "e"] for role in ("gt", "src")}
    made = replace(made, tensors={**made.tensors, ("pred", "e"): z["src"] - 0.5 * z["gt"]})
    report = recommended("e").evaluate(made, details=True)
    assert report.terms[1].toward_failure > 1 > report.terms[0].toward_failure > 0.5
    assert report.signal() == ["no edit"]


@pytest.mark.parametrize("dist", ["cos", "l2"])
@pytest.mark.parametrize("pairs", [1, B])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_toward_failure_is_0_at_the_target_and_1_at_the_negative(dist, pairs, layout):
    made = make(layout, pairs=pairs, seed=3)
    objective = EditObjective()
    for kind in ("no_edit_identity", "overlay_avoidance", "geometry_match"):
        objective = objective.with_term(LossTerm(kind, "e", dist=dist))
    gt, src = (made.tensors[role, "e"] for role in ("gt", "src"))
    overlay = made.tensors["overlay", "e"]

    def toward(pred):
        at = replace(made, tensors={**made.tensors, ("pred", "e"): pred})
        return [t.toward_failure for t in objective.evaluate(at, details=True).terms]

    ones, zeros = torch.ones(pairs, dtype=torch.float64), torch.zeros(pairs, dtype=torch.float64)
    for got in toward(gt):
        torch.testing.assert_close(got, zeros, rtol=0, atol=1e-12)
    no_edit, _, distorted = toward(src)
    torch.testing.assert_close(no_edit, ones)
    torch.testing.assert_close(distorted, ones)
    for k in range(K):
        torch.testing.assert_close(toward(overlay[:, k])[1], ones)


def test_halfway_is_halfway():
    """In squared L2 a quarter of the way back is (¼)² of the distance left."""
    made = make("tokens", mask=False)
    gt, src = (made.tensors[role, "e"] for role in ("gt", "src"))
    made = replace(made, tensors={**made.tensors, ("pred", "e"): gt + 0.25 * (src - gt)})
    objective = EditObjective()
    for kind in ("no_edit_identity", "geometry_match"):
        objective = objective.with_term(LossTerm(kind, "e", dist="l2"))
    hinge, match = objective.evaluate(made, details=True).terms
    torch.testing.assert_close(hinge.toward_failure, torch.full((B,), 1 - 0.75**2, dtype=torch.float64))
    torch.testing.assert_close(match.toward_failure, torch.full((B,), 0.25**2, dtype=torch.float64))
    torch.testing.assert_close(match.distances["d(src, gt)"], Direct(made, match.term).distance("src", "gt"))


@pytest.mark.parametrize("layout", ["tokens", "grid"])
@pytest.mark.parametrize("pairs", [1, B])
def test_token_maps_are_token_distances(layout, pairs):
    made = make(layout, pairs)
    report = everything().evaluate(made, details=True)
    for t in report.terms:
        direct = Direct(made, t.term)
        assert t.token_map.shape == (B, *GRID), t.term
        assert (t.token_weights is None) == (direct.weights is None)
        if direct.weights is not None:
            torch.testing.assert_close(t.token_weights, direct.weights.reshape(B, *GRID))
    for kind, dist in (("geometry_match", "l2"), ("pair_distance", "cos"), ("contrastive", "euclidean")):
        t = next(t for t in report.terms if t.term.kind == kind)
        (expected,) = losses.token_distances(direct.z["pred"], [direct.z["gt"]], dist)
        torch.testing.assert_close(t.token_map, expected.detach().reshape(B, *GRID), **CLOSE)


def test_hinge_maps_are_above_0_where_the_output_is_nearer_to_the_negative():
    outputs = [[GT, SRC, GT, FAR, SRC, (GT, SRC)], [OVERLAY, GT, OVERLAY2, FAR, OVERLAY, OVERLAY]]
    identity, geometry, overlay = recommended("e").evaluate(synthetic(*outputs), details=True).terms
    expected = torch.tensor([[-1, 1, -1, 0, 1, 0]], dtype=torch.float64).view(1, *GRID)
    torch.testing.assert_close(identity.token_map[:1], expected, rtol=0, atol=1e-12)
    # The second output is nearest to the first overlay as a whole, so that the map is against that one.
    expected = torch.tensor([[1, -1, 0, 0, 1, 1]], dtype=torch.float64).view(1, *GRID)
    torch.testing.assert_close(overlay.token_map[1:], expected, rtol=0, atol=1e-12)
    assert geometry.token_map[0].flatten().tolist() == pytest.approx([0, 1, 0, 1, 1, 1 - math.sqrt(0.5)], abs=1e-12)


def test_each_output_has_the_map_of_its_own_nearest_negative():
    outputs = [[OVERLAY, OVERLAY, GT, GT, GT, GT], [OVERLAY2, OVERLAY2, GT, GT, GT, GT]]
    t = recommended("e").evaluate(synthetic(*outputs), details=True).terms[2]
    assert (t.token_map > 0.5).tolist() == [[[True, True, False], [False] * 3]] * 2


def test_the_mask_decides_what_counts():
    """The output differs outside of the mask alone."""
    mask = torch.zeros(8, 12)
    mask[:4, :4] = 1  # the first token
    report = recommended("e").evaluate(synthetic([GT] + [SRC] * 5, [SRC] + [GT] * 5, mask=mask), details=True)
    assert report.signal() == [None, "no edit"]
    assert report.terms[0].token_weights[0].flatten().tolist() == [1, 0, 0, 0, 0, 0]


def test_global_embeddings_have_no_maps_but_everything_else():
    report = recommended("e").evaluate(make("global"), details=True)
    for t in report.terms:
        assert t.token_map is None and t.token_weights is None and t.toward_failure.shape == (B,)
    assert len(report.signal()) == B


def test_a_target_that_equals_the_negative_gives_finite_numbers():
    """A pair without an edit, or a mask beside it: no division by 0."""
    made = synthetic(GT, SRC)
    made = replace(made, tensors={**made.tensors, ("src", "e"): made.tensors["gt", "e"]})
    report = recommended("e").evaluate(made, details=True)
    assert all(torch.isfinite(t.toward_failure).all() for t in report.terms)
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("details", [False, True])
def test_as_dict_is_plain_json(layout, details):
    report = everything().evaluate(make(layout), details)
    back = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert back["total"] == pytest.approx(report.total.item()) and list(back["terms"]) == [
        t.term.name for t in report.terms
    ]
    for t in report.terms:
        entry = back["terms"][t.term.name]
        assert (entry["kind"], entry["encoder"], entry["weight"]) == (t.term.kind, "e", t.term.weight)
        assert entry["value"] == pytest.approx(t.value.item()) and entry["weighted"] == pytest.approx(t.weighted.item())
        assert entry["per_sample"] == pytest.approx(t.per_sample.tolist()) and entry["active"] == t.active
        assert entry["distances"].keys() == t.distances.keys()
        assert (entry["toward_failure"] is None) == (t.toward_failure is None)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("tripplet", {}, "^kind: expected one of no_edit_identity, .*, got 'tripplet'"),
        ("geometry_match", dict(margin=0.2), "^margin: a geometry_match term has no such setting; it has anchor, positive, dist"),
        ("no_edit_identity", dict(neg_agg="max"), "^neg_agg: a no_edit_identity term has no such setting"),
        ("info_nce", dict(dist="cos"), "^dist: a info_nce term has no such setting|^dist: an info_nce"),
        ("triplet", dict(reference="src"), "^reference: a triplet term has no such setting"),
        ("pair_distance", dict(negative="src"), "^negative: a pair_distance term has no such setting"),
        ("triplet", dict(weight=-1.0), "^weight: expected a number >= 0, got -1.0"),
        ("triplet", dict(weight=float("nan")), "^weight: .*got nan"),
        ("triplet", dict(weight=float("inf")), "^weight: .*got inf"),
        ("triplet", dict(weight="1"), "^weight: .*got '1'"),
        ("triplet", dict(agg="median"), "^agg: expected one of 'mean', 'max', 'sum', got 'median'"),
        ("triplet", dict(token_weights="edges"), "^token_weights: expected one of 'mask', 'difference', 'none', got 'edges'"),
        ("triplet", dict(dist="l1"), "^dist: expected one of 'cos', 'l2', got 'l1'"),
        ("contrastive", dict(dist="l1"), "^dist: expected one of 'cos', 'l2', got 'l1'"),
        ("geometry_match", dict(dist="l3"), "^dist: expected one of 'l2', 'l1', 'cos', got 'l3'"),
        ("triplet", dict(margin=-0.1), "^margin: expected a number >= 0, got -0.1"),
        ("triplet", dict(margin="auto:2"), "^margin: expected .* got 'auto:2'"),
        ("triplet", dict(margin="half"), "^margin: expected .* got 'half'"),
        ("margin_ranking", dict(margin="auto"), "^margin: a margin_ranking term needs a number, got 'auto'"),
        ("contrastive", dict(margin="auto:0.2"), "^margin: a contrastive term needs a number, got 'auto:0.2'"),
        ("margin_ranking", dict(reference="overlay"), "^reference: expected one of 'pred', 'gt', 'src', got 'overlay'"),
        ("triplet", dict(negative="in_batch"), "^negative: expected one of 'pred', .*, got 'in_batch'"),
        ("triplet", dict(anchor="output"), "expected .*got 'output'"),
    ],
)  # fmt: skip
def test_wrong_terms_are_refused_when_they_are_made(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        LossTerm(kind, "e", **settings)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("triplet", dict(anchor="output"), "^anchor: expected .*got 'output'"),
        ("triplet", dict(negative="before"), "^negative: expected .*got 'before'"),
        ("triplet", dict(anchor="overlay"), "^anchor: expected .*got 'overlay'"),
        ("triplet", dict(smooth=-1.0), "^smooth: expected a number >= 0, got -1"),
        ("overlay_avoidance", dict(neg_agg="median"), "^neg_agg: expected one of .*got 'median'"),
        ("info_nce", dict(temperature=0.0), "^temperature: expected a number > 0, got 0"),
        ("contrastive", dict(label=2), "^label: expected .*got 2"),
        ("pair_distance", dict(dist="l1"), "^dist: expected one of 'cos', 'l2', got 'l1'"),
        ("info_nce", dict(positive="in_batch"), "^positive: expected .*got 'in_batch'"),
    ],
)
def test_wrong_settings_are_refused_by_their_own_name_before_any_work(kind, settings, message):
    """The public loss would refuse them too, but later, and under the names of its arguments."""
    with pytest.raises(ValueError, match=message):
        LossTerm(kind, "e", **settings)


def evaluating(embeddings, message, *terms):
    objective = EditObjective()
    for term in terms:
        objective = objective.with_term(term)
    with pytest.raises(ValueError, match=message):
        objective.evaluate(embeddings, details=True)


def test_an_objective_needs_a_term():
    evaluating(make(), "^objective: expected at least one term, got none")


def test_missing_roles_and_encoders_are_named():
    made = make(without=("overlay",))
    evaluating(made, "^overlay: no embedding by 'e'; it has pred, gt, src, hard_negative", *recommended("e").terms)
    evaluating(make(without=("pred",)), "^pred: no embedding by 'e'; it has gt, src", LossTerm("triplet", "e"))
    evaluating(made, r"^encoder: 'f' is not in the embeddings; they have \['e'\]", *recommended("e", "f").terms)
    evaluating(
        make(without=("src",)), "^src: no embedding by 'e'", LossTerm("geometry_match", "e", token_weights="difference")
    )


@pytest.mark.parametrize("role", ["pred", "gt", "src", "overlay"])
def test_wrong_batches_are_refused(role):
    made = make()
    made = replace(made, tensors={**made.tensors, (role, "e"): made.tensors[role, "e"][:2]})
    evaluating(made, f"^{role}: expected 1 or 3 samples like the largest role, got 2", *recommended("e").terms)


def test_a_mask_of_another_batch_is_refused():
    made = make().with_mask(torch.ones(2, 8, 12))
    evaluating(made, "^mask: expected 1 or 3 masks like the pictures, got 2", LossTerm("triplet", "e"))


def test_encoders_of_different_batches_are_refused():
    """Per-sample numbers of one report must speak about the same outputs."""
    made = merged(make(name="a", mask=False), make(name="b", pairs=2, outputs=2, mask=False))
    evaluating(made, "(pred|gt|b).*expected .*3.*got 2", *recommended("a", "b").terms)


def test_different_grids_are_refused():
    made = make(mask=False)
    wide = torch.cat([made.tensors["src", "e"]] * 2, 1)
    made = replace(made, tensors={**made.tensors, ("src", "e"): wide})
    evaluating(made, r"expected shape \[3, 2, 3, 5\].*got \[3, 4, 3, 5\]", LossTerm("triplet", "e"))


def test_unique_names_are_kept_however_the_objective_is_made():
    """as_dict would lose a term otherwise."""
    with pytest.raises(ValueError, match="^name: .*'triplet'"):
        EditObjective((LossTerm("triplet", "e"), LossTerm("triplet", "e", margin=0.5)))


def test_in_batch_negatives_of_a_batch_of_one_give_0():
    report = EditObjective().with_term(LossTerm("info_nce", "e")).evaluate(make(pairs=1, outputs=1), details=True)
    assert report.total.item() == 0
    report.total.backward()


def test_a_term_that_only_watches_does_not_touch_the_total():
    """Not even with a value that is no number."""
    made = make()
    made.tensors["src", "e"][0] = torch.nan
    objective = (
        EditObjective().with_term(LossTerm("geometry_match", "e")).with_term(LossTerm("triplet", "e", weight=0.0))
    )
    report = objective.evaluate(made)
    assert report.terms[1].value.isnan() and report.total.equal(report.terms[0].value)
    report.total.backward()
    assert made.tensors["pred", "e"].grad.isfinite().all()


def test_a_pair_without_an_edit_gives_no_signal():
    made = make(mask=False)
    same = {key: made.tensors["gt", "e"].detach() for key in (("pred", "e"), ("gt", "e"), ("src", "e"))}
    objective = EditObjective((LossTerm("no_edit_identity", "e"), LossTerm("geometry_match", "e")))
    assert set(objective.evaluate(replace(made, tensors=same), details=True).signal()) == {None}


def test_a_role_that_no_term_reads_does_not_matter():
    made = make()
    odd = replace(made, tensors={**made.tensors, ("hard_negative", "e"): torch.randn(5, 1, 2, 3, 5)})
    assert recommended("e").evaluate(odd).total.equal(recommended("e").evaluate(made).total)


@pytest.mark.parametrize("role", ["pred", "gt", "src", "overlay"])
def test_nan_is_not_hidden(role):
    """Neither in the signal, nor in the share of open hinges, nor by JSON that nobody can read."""
    made = make(mask=False)
    made.tensors[role, "e"].data[1] = torch.nan
    report = recommended("e").evaluate(made, details=True)
    assert report.signal()[1] == "not a number" and "not a number" not in (report.signal()[0], report.signal()[2])
    assert any(t.active is not None and t.active.isnan() for t in report.terms)
    json.dumps(report.as_dict(), allow_nan=False)
    assert None in report.as_dict()["terms"]["overlay avoidance"]["per_sample"] or role == "src"


def test_training_does_not_wait_for_the_device():
    """No number is read from a tensor while an objective is evaluated for training."""
    from torch.profiler import profile

    made, objective = make(mask=False), recommended("e")
    with profile() as work:
        objective.evaluate(made)
    assert not [e.key for e in work.key_averages() if e.key == "aten::_local_scalar_dense"]


# --- gates and weights of samples -------------------------------------------------------------------------------------

LEVELS = torch.tensor([0.1, 0.5, 0.9])  # of the three samples


def by_loop(objective, made, t, sample_weights):
    """Total of an objective whose terms count where their gates are open, sample by sample, from plain reports."""
    plain, total = objective.evaluate(made), 0.0
    for report in plain.terms:
        for i in range(B):
            inside = t is None or report.term.t_min <= t[i] <= report.term.t_max
            factor = 1.0 if sample_weights is None else sample_weights[i]
            total = total + (report.term.weight * factor * report.per_sample[i] / B if inside else 0.0)
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("t", [None, LEVELS])
def test_gates_and_sample_weights_equal_a_loop(weighted, t):
    objective = EditObjective(
        (LossTerm("no_edit_identity", "e", weight=1.5, t_min=0.5), LossTerm("geometry_match", "e", t_max=0.5),
         LossTerm("overlay_avoidance", "e", weight=0.7), LossTerm("triplet", "e", t_min=0.2, t_max=0.3))
    )  # fmt: skip
    weights = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64) if weighted else None
    made = make()
    report = objective.evaluate(made, t=t, sample_weights=weights)
    expected = by_loop(objective, made, t, weights)
    torch.testing.assert_close(report.total, expected, **CLOSE)
    torch.testing.assert_close(sum(r.weighted_per_sample.mean() for r in report.terms), expected, **CLOSE)
    (mine,) = torch.autograd.grad(report.total, made.tensors["pred", "e"])
    (theirs,) = torch.autograd.grad(expected, made.tensors["pred", "e"])
    torch.testing.assert_close(mine, theirs, **CLOSE)


def test_the_value_of_a_gated_term_is_the_mean_over_the_samples_inside():
    made = make(seed=3)
    term = LossTerm("overlay_avoidance", "e", weight=2.0, margin=0.5, t_min=0.5)
    plain = EditObjective((term,)).evaluate(made).terms[0]
    gated = EditObjective((term,)).evaluate(made, t=LEVELS).terms[0]
    torch.testing.assert_close(gated.value, plain.per_sample[1:].mean(), **CLOSE)
    torch.testing.assert_close(gated.weighted, 2.0 * plain.per_sample[1:].sum() / B, **CLOSE)
    assert torch.equal(gated.per_sample, plain.per_sample)
    assert gated.active.item() == plain.open[1:].mean().item() and plain.active.item() == plain.open.mean().item()


def test_both_ends_of_a_gate_are_inside():
    term = LossTerm("triplet", "e", t_min=0.25, t_max=0.75)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert term.gate(t).tolist() == [False, True, True, True, False]
    assert LossTerm("triplet", "e").gate(t).all()


def test_a_sample_outside_adds_nothing_not_even_nan():
    made = make(mask=False)
    made.tensors["gt", "e"][0] = torch.nan  # the sample at t = 0.1
    objective = EditObjective((LossTerm("geometry_match", "e", t_min=0.3),))
    report = objective.evaluate(made, t=LEVELS)
    report.total.backward()
    assert report.total.isfinite() and report.terms[0].value.isfinite()
    assert (made.tensors["pred", "e"].grad[1:] != 0).any()
    assert objective.evaluate(make(mask=False)).total != report.total


@pytest.mark.parametrize("role", ["pred", "gt"])
@pytest.mark.parametrize("how", ["gate", "weight"])
def test_the_gradient_of_a_sample_outside_is_0_not_nan(how, role):
    gate, t, weights = (0.3, LEVELS, None) if how == "gate" else (0.0, None, torch.tensor([0.0, 1.0, 1.0]))
    objective, grads = EditObjective((LossTerm("geometry_match", "e", t_min=gate),)), []
    for broken in (False, True):
        made = make(mask=False)
        if broken:
            made.tensors[role, "e"].data[0] = torch.nan
        objective.evaluate(made, t=t, sample_weights=weights).total.backward()
        grads.append(made.tensors["pred", "e"].grad)
    assert torch.equal(*grads) and not grads[0][0].any() and (grads[0][1:] != 0).all()


def test_nan_of_one_term_stays_out_of_another_whose_gate_is_open():
    """Both read d(pred, gt); the overlay that is not a number belongs to the one with the gate."""
    gated = LossTerm("overlay_avoidance", "e", margin=2.0, t_min=0.3)
    always = LossTerm("no_edit_identity", "e", margin="auto")
    found = []
    for terms, broken in (((gated, always), True), ((gated, always), False)):
        made = make(mask=False)
        if broken:
            made.tensors["overlay", "e"].data[0] = torch.nan
        report = EditObjective(terms).evaluate(made, t=LEVELS)
        report.total.backward()
        found.append((report.total.detach(), made.tensors["pred", "e"].grad))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert found[0][1][0].any()


def test_a_term_that_counts_nowhere():
    made = make()
    report = EditObjective((LossTerm("overlay_avoidance", "e", t_min=0.95),)).evaluate(made, t=LEVELS)
    assert report.total.item() == 0 and report.terms[0].value.item() == 0
    report.total.backward()
    assert not made.tensors["pred", "e"].grad.any()


def test_at_keeps_the_terms_of_some_noise_levels():
    low, high, always = (
        LossTerm("triplet", "e", name="low", t_max=0.3),
        LossTerm("triplet", "e", name="high", t_min=0.8),
        LossTerm("triplet", "e", name="always"),
    )
    objective = EditObjective((low, high, always))
    for t, expected in (([0.1], "low always"), ([0.5, 0.6], "always"), ([0.3, 0.8], "low high always")):
        assert [term.name for term in objective.at(torch.tensor(t)).terms] == expected.split()
    assert EditObjective((low,)).at(torch.tensor([0.5])).terms == ()


@pytest.mark.parametrize(
    "gate, message",
    [
        ({"t_min": -0.1}, "t_min: expected a number >= 0"),
        ({"t_max": math.nan}, "t_max: expected a number"),
        ({"t_min": 0.6, "t_max": 0.5}, "t_min ≤ t_max ≤ 1, got t_min 0.6, t_max 0.5"),
        ({"t_max": 1.5}, "t_max ≤ 1, got t_min 0, t_max 1.5"),
        ({"t_min": "0"}, "t_min: expected a number"),
    ],
)
def test_bad_gates(gate, message):
    with pytest.raises(ValueError, match=message):
        LossTerm("triplet", "e", **gate)


def test_a_weight_of_0_adds_nothing_with_gates_either():
    made = make()
    made.tensors["src", "e"][0] = torch.nan
    report = EditObjective((LossTerm("triplet", "e", weight=0.0),)).evaluate(made, t=LEVELS)
    assert report.terms[0].weighted.item() == 0 and not report.terms[0].weighted_per_sample.any()
    assert report.terms[0].value.isnan()
