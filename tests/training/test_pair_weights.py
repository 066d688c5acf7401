"""What a pair teaches, from the distance between its own after picture and its negatives."""

from dataclasses import replace

import pytest
import torch
from small import ALL, GEOMETRY, LATENTS, encoders, parts, pictures, trainer, weights

from editloss_core.negatives import OverlaySettings
from editloss_core.objective import EditObjective
from editloss_core.pairs import PairSet, VariantSettings, with_variants
from editloss_core.training import pair_weights
from editloss_core.training.prepare import prepare

NO_EDIT = EditObjective(ALL.terms[:1])


def flawed():
    """Six pairs; in the last one hardly anything was edited."""
    before, after, mask = pictures(6)
    after[5] = before[5] + 0.02 * (after[5] - before[5])
    pairs = PairSet.from_images(before, after, mask, "make it a square", min_size=16)
    return prepare(pairs, parts()[1], encoders(), overlay=OverlaySettings(kinds=("blend",)))


def test_the_reach_is_the_distance_to_the_negatives_over_its_median():
    prepared = flawed()
    found = pair_weights.reach(NO_EDIT.terms, prepared)
    made = prepared.embeddings(range(6), [LATENTS])
    gt, src = (made.get(role, LATENTS) for role in ("gt", "src"))
    mask = torch.stack(list(prepared.masks))[:, ::8, ::8]
    distance = ((1 - torch.cosine_similarity(gt, src, dim=-1)) * mask).sum((1, 2)) / mask.sum((1, 2))
    assert found[:, 0].tolist() == pytest.approx((distance / distance.median()).tolist(), rel=1e-4)


def test_weights_are_nothing_all_or_between_and_have_a_mean_of_one():
    found = pair_weights.weights(torch.tensor([[1.0, 1.2], [0.0, 1.0], [0.675, 0.9], [1.0, 0.6]]))
    assert (found / found[0]).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0])
    assert found[found > 0].mean().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="no pair is left"):
        pair_weights.weights(torch.zeros(3, 1))


def test_a_pair_without_an_edit_teaches_nothing():
    prepared = flawed()
    run = trainer(prepared=prepared, objective=NO_EDIT, pair_weights="reach", steps=12, batch_size=3)
    assert any("pair_weights: 1 of 6 pairs teach nothing" in note and "pair 6" in note for note in run.notes)
    log = run.run().log
    assert {s.pair for step in log.steps for s in step.samples} == {f"pair {i}" for i in range(1, 6)}


def test_variants_share_what_their_pair_can_teach():
    before, after, mask = pictures(6)
    after[5] = before[5] + 0.02 * (after[5] - before[5])
    pairs = PairSet.from_images(before, after, mask, "make it a square", min_size=16)
    varied = with_variants(pairs, VariantSettings(3, shift=0.0, zoom=1.0, turn=0.0, tone=0.0))
    prepared = prepare(varied, parts()[1], encoders(), overlay=OverlaySettings(kinds=("blend",)))
    found = pair_weights.reach(NO_EDIT.terms, prepared)
    assert all(len(set(found[3 * i : 3 * i + 3, 0].tolist())) == 1 for i in range(6))
    run = trainer(prepared=prepared, objective=NO_EDIT, pair_weights="reach", steps=2, batch_size=3)
    assert any("pair_weights: 1 of 6 pairs teach nothing" in note and note.endswith("pair 6") for note in run.notes)


def test_pairs_that_are_alike_train_as_without():
    before, after, mask = pictures(1)
    pairs = PairSet.from_images(*(torch.cat([x] * 3) for x in (before, after, mask)), "make it a square", min_size=16)
    prepared = prepare(pairs, parts()[1], encoders(), overlay=OverlaySettings(kinds=("blend",)))
    ends = []
    for chosen in ("alike", "reach"):
        run = trainer(prepared=prepared, objective=NO_EDIT, pair_weights=chosen)
        run.run()
        ends.append(weights(run.lora))
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in ends[0])


def test_it_needs_a_loss_that_has_a_reach():
    with pytest.raises(ValueError, match="pair_weights: reach needs a loss between gt and src or overlay"):
        trainer(objective=EditObjective((GEOMETRY,)), pair_weights="reach")
    watching = EditObjective((replace(ALL.terms[0], weight=0.0),))
    assert trainer(objective=watching, pair_weights="reach")._pair_weights is not None
