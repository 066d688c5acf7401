"""Every refusal is a ValueError that names the argument, says what came and what was expected."""

import re

import pytest
import torch

import editloss_core
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

Z = torch.ones(2, 3, 4)
D = torch.ones(2)
NAN, INF = float("nan"), float("inf")

# function → its embedding arguments, all of which want [B, ..., D] of one shape
EMBEDDINGS = {
    pair_distance: ("a", "b"),
    feature_match_loss: ("pred", "target"),
    contrastive_pair_loss: ("z1", "z2"),
    triplet_margin_loss: ("anchor", "positive", "negative"),
    multi_negative_ranking_loss: ("z_anchor", "z_positive", "z_negs"),
    info_nce_loss: ("anchor", "positive"),
    loss_no_edit_identity: ("z_pred", "z_gt", "z_src"),
    loss_geometry_match: ("z_pred", "z_gt"),
    loss_overlay_avoidance: ("z_pred", "z_gt", "z_overlay"),
    margin_ranking_on_distances: (),
}
RANKING = [triplet_margin_loss, multi_negative_ranking_loss, loss_no_edit_identity, loss_overlay_avoidance]


def test_every_public_loss_is_tried():
    assert {function.__name__ for function in EMBEDDINGS} == set(editloss_core.__all__)


def name_of(x):
    return getattr(x, "__name__", None)


def good(function):
    if function is margin_ranking_on_distances:
        return {"d_pos": D, "d_neg": D}
    return dict({name: Z for name in EMBEDDINGS[function]}, **({"y": 1} if function is contrastive_pair_loss else {}))


def refuses(function, named, *words, **changes):
    """ValueError "<named>: expected … got …" with all the words in it."""
    with pytest.raises(ValueError) as caught:
        function(**{**good(function), **changes})
    message = str(caught.value)
    assert re.match(rf"{re.escape(named)}(\[\d+\])?: ", message), message
    for word in ("expected", "got", *words):
        assert word in message, message


BAD_EMBEDDINGS = {
    "a vector": (torch.ones(4), "[4]"),
    "a scalar": (torch.tensor(1.0), "[]"),
    "integers": (torch.ones(2, 3, 4, dtype=torch.int64), "torch.int64"),
    "bytes": (torch.ones(2, 3, 4, dtype=torch.uint8), "torch.uint8"),
    "bools": (torch.ones(2, 3, 4, dtype=torch.bool), "torch.bool"),
    "complex": (torch.ones(2, 3, 4, dtype=torch.complex64), "torch.complex64"),
    "a list": ([[1.0, 2.0]], "list"),
    "a number": (1.0, "float"),
    "None": (None, "NoneType"),
}
EVERY_EMBEDDING = [
    pytest.param(f, name, id=f"{f.__name__}-{name}") for f, names in EMBEDDINGS.items() for name in names
]


@pytest.mark.parametrize("function", EMBEDDINGS, ids=name_of)
def test_good_arguments_pass(function):
    """The ground that every other test here changes one thing of."""
    assert function(**good(function)).isfinite().all()


@pytest.mark.parametrize("bad", BAD_EMBEDDINGS)
@pytest.mark.parametrize("function, name", EVERY_EMBEDDING)
def test_not_an_embedding(function, name, bad):
    value, found = BAD_EMBEDDINGS[bad]
    if name in ("z_negs", "z_overlay") and bad == "a list":
        value, found = [[1.0, 2.0]], "list"  # a list whose element is not a tensor
    refuses(function, name, found, **{name: value})


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["batch", "tokens", "features"])
@pytest.mark.parametrize("function", [f for f in EMBEDDINGS if EMBEDDINGS[f]], ids=name_of)
def test_empty(function, shape):
    empty = torch.ones(shape)
    refuses(function, EMBEDDINGS[function][0], str(list(shape)), **{name: empty for name in EMBEDDINGS[function]})


@pytest.mark.parametrize("shape", [(3, 3, 4), (1, 3, 4), (2, 2, 4), (2, 1, 4), (2, 3, 5), (2, 3, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("function, name", EVERY_EMBEDDING)
def test_shape_mismatch(function, name, shape):
    """Also where broadcasting would have made something of it."""
    if name == EMBEDDINGS[function][0]:
        with pytest.raises(ValueError, match=r"\[2, 3, 4\]"):
            function(**{**good(function), name: torch.ones(shape)})
    else:
        refuses(function, name, "[2, 3, 4]", str(list(shape)), **{name: torch.ones(shape)})


@pytest.mark.parametrize("function, name", EVERY_EMBEDDING)
def test_other_device(function, name):
    elsewhere = torch.ones(2, 3, 4, device="meta")
    if name == EMBEDDINGS[function][0]:
        with pytest.raises(ValueError, match="meta"):
            function(**{**good(function), name: elsewhere})
    else:
        refuses(function, name, "cpu", "meta", **{name: elsewhere})


OPTIONS = {
    "dist": (["cos", "l2"], [f for f in EMBEDDINGS if f in RANKING or f in (pair_distance, contrastive_pair_loss)]),
    "kind": (["l2", "l1", "cos"], [feature_match_loss, loss_geometry_match]),
    "agg": (["mean", "max", "sum"], [f for f in EMBEDDINGS if f is not margin_ranking_on_distances]),
    "reduction": (["mean", "sum", "none"], [f for f in EMBEDDINGS if f is not pair_distance]),
    "neg_agg": (
        ["mean", "max", "sum"],
        [multi_negative_ranking_loss, loss_overlay_avoidance, margin_ranking_on_distances],
    ),
}


@pytest.mark.parametrize("value", ["median", "", "MEAN", None, 2, ["mean"]], ids=repr)
@pytest.mark.parametrize(
    "function, option",
    [pytest.param(f, o, id=f"{f.__name__}-{o}") for o, (_, functions) in OPTIONS.items() for f in functions],
)
def test_unknown_option(function, option, value):
    refuses(function, option, repr(value), *map(repr, OPTIONS[option][0]), **{option: value})


@pytest.mark.parametrize("function", [pair_distance, contrastive_pair_loss, *RANKING], ids=name_of)
@pytest.mark.parametrize("dist", ["l1", "euclidean"])
def test_distances_of_the_primitive_are_not_options_of_the_losses(function, dist):
    refuses(function, "dist", repr(dist), dist=dist)


WORDS = [
    "automatic",
    "0.2",
    "",
    "auto:",
    "auto:0",
    "auto:-0.5",
    "auto:1.5",
    "auto:nan",
    "auto:inf",
    "auto:half",
    "auto0.5",
]


@pytest.mark.parametrize("margin", [-0.1, NAN, INF, -INF, True, None, [0.2], 1j, *WORDS], ids=repr)
@pytest.mark.parametrize("function", [*RANKING, margin_ranking_on_distances, contrastive_pair_loss], ids=name_of)
def test_bad_margin(function, margin):
    refuses(function, "margin", repr(margin), margin=margin)


@pytest.mark.parametrize("margin", ["auto", "auto:0.8"])
@pytest.mark.parametrize("function", [margin_ranking_on_distances, contrastive_pair_loss], ids=name_of)
def test_auto_margin_where_there_is_no_target(function, margin):
    refuses(function, "margin", repr(margin), margin=margin)


@pytest.mark.parametrize(
    "margin, found",
    [
        (torch.tensor([0.1, -0.5]), "-0.5"),
        (torch.tensor([1, 2]), "int64"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(3), "[3]"),
        (torch.ones(2, 3), "[2, 3]"),
        (torch.ones(2, device="meta"), "meta"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("function", [*RANKING, margin_ranking_on_distances], ids=name_of)
def test_bad_margin_tensor(function, margin, found):
    refuses(function, "margin", found, margin=margin)


@pytest.mark.parametrize("smooth", [-0.1, NAN, INF, True, "0.1", None], ids=repr)
@pytest.mark.parametrize("function", [*RANKING, margin_ranking_on_distances], ids=name_of)
def test_bad_smooth(function, smooth):
    refuses(function, "smooth", repr(smooth), smooth=smooth)


@pytest.mark.parametrize("temperature", [0, 0.0, -0.07, NAN, INF, True, "0.07", None], ids=repr)
def test_bad_temperature(temperature):
    refuses(info_nce_loss, "temperature", repr(temperature), temperature=temperature)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 4), (2, 3, 1), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize("function", EMBEDDINGS, ids=name_of)
def test_weights_of_a_wrong_shape(function, shape):
    refuses(function, "weights", "[2]", str(list(shape)), weights=torch.ones(shape))


@pytest.mark.parametrize(
    "weights, found",
    [
        (torch.tensor([1.0, -1.0]), "-1"),
        (torch.tensor([[1.0, 1.0, -0.5]] * 2), "-0.5"),
        ([1.0, 1.0], "list"),
        (1.0, "float"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("function", EMBEDDINGS, ids=name_of)
def test_bad_weights(function, weights, found):
    if function is margin_ranking_on_distances and getattr(weights, "ndim", 1) == 2:
        found = "[2, 3]"  # distances have no tokens
    refuses(function, "weights", found, weights=weights)


@pytest.mark.parametrize(
    "y, found",
    [
        (2, "2"),
        (-1, "-1"),
        (1.5, "1.5"),
        (torch.tensor([1, -1]), "-1"),
        (torch.tensor([0.5, 1.25]), "1.25"),
        (torch.ones(3), "[3]"),
        (torch.ones(1), "[1]"),
        (torch.ones(2, 3), "[2, 3]"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, device="meta"), "meta"),
        ("same", "'same'"),
        (None, "None"),
    ],
    ids=repr,
)
def test_bad_labels(y, found):
    refuses(contrastive_pair_loss, "y", found, y=y)


NEGATIVES = [
    (multi_negative_ranking_loss, "z_negs"),
    (loss_overlay_avoidance, "z_overlay"),
    (info_nce_loss, "negatives"),
]


@pytest.mark.parametrize("function, name", NEGATIVES, ids=name_of)
def test_bad_negatives(function, name):
    for empty in ([], ()):
        refuses(function, name, "empty", **{name: empty})
    refuses(function, f"{name}[1]", "[2, 3, 4]", "[2, 3, 5]", **{name: [Z, torch.ones(2, 3, 5)]})
    refuses(function, f"{name}[1]", "int64", **{name: [Z, Z.long()]})
    refuses(function, f"{name}[0]", "meta", **{name: [torch.ones(2, 3, 4, device="meta"), Z]})
    refuses(function, f"{name}[2]", "str", **{name: [Z, Z, "negative"]})
    refuses(function, name, "dict", **{name: {"overlay": Z}})
    for shape in [(2, 0, 3, 4), (2, 5, 3, 5), (3, 5, 3, 4), (2, 5, 2, 4), (1, 5, 3, 4), (2, 5, 5, 3, 4)]:
        refuses(function, name, str(list(shape)), **{name: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(7, 5), (7, 1), (0, 4), (7, 2, 4), (7, 3, 5), (0, 3, 4), (4,), ()], ids=str)
def test_bad_bank(shape):
    refuses(info_nce_loss, "negatives", str(list(shape)), negatives=torch.ones(shape))


def test_bank_of_integers_or_elsewhere():
    refuses(info_nce_loss, "negatives", "int64", negatives=torch.ones(7, 4, dtype=torch.int64))
    refuses(info_nce_loss, "negatives", "cpu", "meta", negatives=torch.ones(7, 4, device="meta"))


@pytest.mark.parametrize("name", ["d_pos", "d_neg"])
def test_bad_distances(name):
    def refuse(*words, **changes):
        refuses(margin_ranking_on_distances, name, *words, **changes)

    refuse("[2, 2, 2]", **{name: torch.ones(2, 2, 2)})
    refuse("[]", **{name: torch.tensor(1.0)})
    refuse("[0]", **{name: torch.ones(0)})
    refuse("int64", **{name: torch.ones(2, dtype=torch.int64)})
    refuse("complex64", **{name: torch.ones(2, dtype=torch.complex64)})
    refuse("list", **{name: [0.1, 0.2]})


def test_distances_that_do_not_fit():
    refuses(margin_ranking_on_distances, "d_pos", "[2, 2]", d_pos=torch.ones(2, 2))
    for shape in [(3,), (1,), (3, 2), (2, 0)]:
        refuses(margin_ranking_on_distances, "d_neg", str(list(shape)), d_neg=torch.ones(shape))
    refuses(margin_ranking_on_distances, "d_neg", "cpu", "meta", d_neg=torch.ones(2, device="meta"))


@pytest.mark.parametrize(
    "part, arguments, message",
    [
        (losses.token_distances, (Z, []), "references: .*expected"),
        (losses.token_distances, (Z, [Z, torch.ones(2, 3, 5)]), r"references\[1\]: .*\[2, 3, 5\]"),
        (losses.token_distances, (Z, Z), "references: .*expected"),
        (losses.token_distances, (Z, [Z], "manhattan"), "dist: .*expected"),
        (losses.aggregate_tokens, (torch.ones(2, 3), "median"), "agg: .*expected"),
        (losses.aggregate_tokens, (torch.ones(2, 3), "mean", torch.ones(2)), r"weights: .*\[2, 3\].*\[2\]"),
        (losses.aggregate_tokens, (torch.ones(()),), "distances: .*expected"),
        (losses.aggregate_tokens, (torch.ones(2, 0),), "distances: .*expected"),
        (losses.aggregate_tokens, ([1.0],), "distances: .*expected"),
        (losses.contrastive_on_distances, (torch.ones(2, 3), 1), "distance: .*expected"),
        (losses.contrastive_on_distances, (D, 2), "y: .*expected"),
    ],
    ids=lambda x: getattr(x, "__name__", None) or (x if isinstance(x, str) else ""),
)
def test_parts_for_callers_with_distances_of_their_own(part, arguments, message):
    """The other names in losses.__all__ refuse as clearly."""
    with pytest.raises(ValueError, match=message):
        part(*arguments)


def wrong(function, **changes):
    return pytest.param(function, changes, id="-".join((function.__name__, *changes)))


@pytest.mark.parametrize(
    "function, changes",
    [
        *(wrong(triplet_margin_loss, **{o: "no"}) for o in ("agg", "dist", "reduction", "margin", "smooth", "weights")),
        wrong(triplet_margin_loss, margin=torch.ones(3)),
        *(wrong(loss_overlay_avoidance, **{o: "no"}) for o in ("neg_agg", "z_overlay")),
        *(wrong(contrastive_pair_loss, **{o: "no"}) for o in ("reduction", "margin", "dist", "weights")),
        wrong(contrastive_pair_loss, y=torch.ones(3)),
        *(wrong(info_nce_loss, **{o: "no"}) for o in ("reduction", "temperature", "agg", "negatives")),
        *(wrong(loss_geometry_match, **{o: "no"}) for o in ("reduction", "kind", "agg", "weights")),
    ],
)
def test_a_refusal_comes_before_any_work(function, changes):
    """On real embeddings a wrong option must not cost a pass over them."""
    with torch.autograd.profiler.profile() as work, pytest.raises(ValueError):
        function(**{**good(function), **changes})
    assert not [event.name for event in work.function_events if "TokenDistances" in event.name]
