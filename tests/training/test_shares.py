"""Weights as shares of the gradient: each term gets its share, whatever the scale of its loss."""

import math
from dataclasses import replace

import pytest
from small import ALL, LATENTS, trainer

from editloss_core.objective import EditObjective, LossTerm
from editloss_core.runs.log import VELOCITY
from editloss_core.training.shares import Shares

FOUR = (0.1, 0.3, 0.2)


def objective(*weights, scale=1.0):
    return EditObjective(tuple(replace(t, weight=scale * w) for t, w in zip(ALL.terms, weights)))


def test_norms_are_to_one_another_as_the_shares():
    shares = Shares(objective(*FOUR).terms, VELOCITY)
    assert not shares.complete and shares.factor("no edit") == 0.0
    shares.measured(VELOCITY, [2.0, 2.0])
    for name, share, norm in (("no edit", 0.1, 0.5), ("geometry", 0.3, 30.0), ("overlay", 0.2, 1e-3)):
        shares.measured(name, [share * norm, 0.0, share * norm])  # a hinge that is closed does not count
    assert shares.complete
    norms = {name: share * shares.factor(name) * norm for name, share, norm in
             (("no edit", 0.1, 0.5), ("geometry", 0.3, 30.0), ("overlay", 0.2, 1e-3))}  # fmt: skip
    total = sum(norms.values()) + 2.0
    assert [norms[t.name] / total for t in ALL.terms] == pytest.approx(FOUR)


def test_means_run_in_logarithms_and_keep_through_silence():
    shares = Shares(objective(0.5, 0.0, 0.0).terms, VELOCITY)
    shares.measured("no edit", [0.5])
    shares.measured("no edit", [0.0])
    assert shares.means["no edit"] == pytest.approx(0.0)
    shares.measured("no edit", [0.5 * 2.718281828459045])
    assert shares.means["no edit"] == pytest.approx(0.1)
    assert "geometry" not in shares.shares and shares.factor("geometry") == 0.0


@pytest.mark.parametrize("estimate", ({}, {"estimate": "rollout", "objective_every": 2}))
def test_a_run_gives_each_term_its_share(estimate):
    run = trainer(objective=objective(*FOUR), steps=60, weights="shares", gradients_every=1, learning_rate=1e-5,
                  batch_size=4, **estimate)  # fmt: skip
    log = run.run().log
    late = [s for step in log.steps[20:] for s in step.samples]

    def norm(name):
        found = [s.terms[name].gradient for s in late if name in s.terms and s.terms[name].gradient]
        return sum(found) / len(found)

    norms = {name: norm(name) for name in (VELOCITY, "no edit", "geometry", "overlay")}
    total = sum(norms.values())
    for term in run.shares.shares:
        assert norms[term] / total == pytest.approx(run.shares.shares[term], rel=0.25)


def test_the_encoders_scale_does_not_matter():
    def end(dist):
        term = LossTerm("geometry_match", LATENTS, weight=0.3, dist=dist, name="geometry")
        run = trainer(objective=EditObjective((term,)), steps=30, weights="shares", gradients_every=1, batch_size=4)
        log = run.run().log
        found = [
            math.log(s.terms["geometry"].gradient / s.terms[VELOCITY].gradient)
            for step in log.steps[10:]
            for s in step.samples
        ]
        return math.exp(sum(found) / len(found))

    assert end("cos") == pytest.approx(0.3 / 0.7, rel=0.3) and end("l2") == pytest.approx(0.3 / 0.7, rel=0.3)


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"expected a sum below 1, got 1.2 \(no edit 0.5, geometry 0.4, overlay 0.3\)"):
        trainer(objective=objective(0.5, 0.4, 0.3), weights="shares")
