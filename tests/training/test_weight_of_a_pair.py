"""A pair of a size that few have counts for as much as the others; what a perfect output pays is told."""

from __future__ import annotations

import pytest
import torch
from small import LATENTS, encoders, parts, prepared_pairs, trainer

from editloss_core.negatives import OverlaySettings
from editloss_core.objective import EditObjective, LossTerm
from editloss_core.training.prepare import prepare


def first_gradient(made):
    """(pairs of the first batch, the gradient of its step) of every LoRA weight, as the optimiser gets it."""
    found = []
    made.optimizer.step = lambda: found.append([p.grad.clone() for p in made.lora.parameters()])
    made.run()
    return len(made._batch(0)), torch.cat([g.flatten() for g in found[0]])


@pytest.mark.parametrize("objective", [None, "losses"])
def test_the_gradient_of_a_batch_that_is_cut_short_counts_for_its_share(objective):
    """Four pairs of one size and one of another, in batches of 4: the one alone is a batch of its own."""
    pairs = prepared_pairs(4, sizes=((32, 32), (48, 32))).pairs.subset(range(5))
    both = prepare(pairs, parts()[1], encoders(), overlay=OverlaySettings(kinds=("blend",)))
    assert sorted(len(members) for members in both.pairs.buckets.values()) == [1, 4]
    options = {"steps": 1, "batch_size": 4, "clip": 0.0} | ({"objective": None} if objective is None else {})
    seed = next(s for s in range(50) if len(both.pairs.batches(4, s, 0)[0]) == 1)
    count, gradient = first_gradient(trainer(prepared=both, seed=seed, **options))
    alone = trainer(prepared=both, seed=seed, **options)
    alone._full = 1  # as if it were a set of its own
    assert count == 1
    torch.testing.assert_close(gradient, first_gradient(alone)[1] / 4)


def test_sets_that_are_smaller_than_a_batch_lose_nothing():
    made = trainer(prepared=prepared_pairs(3), steps=1, batch_size=8, objective=None)
    assert made._full == 3


@pytest.mark.parametrize(("margin", "told"), [(1.9, True), (0.0, False), ("auto", False)])
def test_a_margin_that_a_perfect_output_pays_is_told(margin, told):
    term = LossTerm("no_edit_identity", LATENTS, name="no edit", margin=margin)
    notes = [
        n
        for n in trainer(objective=EditObjective((term,))).warnings
        if n.startswith("no edit: margin 1.9 is more than")
    ]
    assert len(notes) == told and all("a perfect output pays 0.92 there" in n and "in 4 of 4 pairs" in n for n in notes)
