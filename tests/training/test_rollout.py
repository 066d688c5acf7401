"""Rollouts: the state is the sampler's, the losses are those of that state, and what they cost is what is said."""

from dataclasses import replace

import pytest
import torch
from small import ALL, Recording, encoders, equal, parts, prepared_pairs, trainer, weights
from test_trainer import everything, same_end, saved

from editloss_core.models.kontext import KONTEXT
from editloss_core.objective import EditObjective
from editloss_core.runs.log import VELOCITY
from editloss_core.training import rollout
from editloss_core.training.estimate import EstimateObjective
from editloss_core.training.flow import generator_for
from editloss_core.training.host import Host
from editloss_core.training.rollout import REGRESSION

ROLLS = {"estimate": "rollout", "rollout_steps": 4, "rollout_regression": 0.5}


@pytest.mark.parametrize("gone", (0, 1, 3))
def test_a_state_is_that_of_the_sampler_after_so_many_steps(gone):
    denoiser, prepared = Recording(), prepared_pairs()
    noise, references = torch.randn(2, 12, 4, 4), [prepared.before([0, 1])]
    conditioning = [torch.ones(2), torch.zeros(2)]
    asked = []
    level, x = rollout.state(denoiser, noise, references, conditioning, 4, gone, lambda: asked.append(1))
    assert len(denoiser.calls_made) == len(asked) == gone and not x.requires_grad
    KONTEXT.sample(denoiser, noise, references, conditioning, 4)
    whole = denoiser.calls_made[gone:]
    assert torch.equal(whole[gone][0], x) and whole[gone][1].tolist() == pytest.approx([level, level])


def test_every_step_before_the_last_is_drawn_alike():
    g = torch.Generator().manual_seed(0)
    drawn = [rollout.draw_step(4, g) for _ in range(4000)]
    assert all(abs(drawn.count(k) - 1000) < 120 for k in range(4)) and set(drawn) == {0, 1, 2, 3}


def test_the_cost_is_as_told():
    run = trainer(denoiser=Recording(), steps=40, objective_every=2, batch_size=4, **ROLLS)
    run.run()
    calls = run.denoiser.calls_made
    graded = [call for call in calls if call[-1].requires_grad]
    without, with_gradients = rollout.passes(4, 2)
    assert (without, with_gradients) == (0.75, 1.5)
    assert len(graded) == 60 and abs((len(calls) - 60) / 40 - without) < 0.25
    assert any("0.75 passes" in note and "1.5 with" in note for note in run.notes)


def test_losses_and_regression_are_those_of_the_state_that_was_reached():
    run = trainer(denoiser=Recording(), steps=1, gradients_every=1, velocity_weight=0.0, **ROLLS)
    batch = run._batch(0)
    made = run.run()
    (x_t, t, *_, v), level = run.denoiser.calls_made[-1], run.log.steps[0].samples[-1].t
    assert level == pytest.approx(t[0].item()) and v.requires_grad
    x0_hat, x0 = (x_t - t.reshape(-1, 1, 1, 1) * v).detach(), run.prepared.after(batch)
    expected = (x0_hat - x0).square().flatten(1).mean(1) / max(level, 0.1) ** 2
    samples = made.log.steps[0].samples
    assert [set(s.terms) for s in samples] == 2 * [{VELOCITY}] + 2 * [{REGRESSION, "no edit", "geometry", "overlay"}]
    for sample, value in zip(samples[2:], expected.tolist()):
        assert sample.terms[REGRESSION].raw == pytest.approx(value, rel=1e-5)
        assert sample.terms[REGRESSION].weighted == pytest.approx(0.5 * value, rel=1e-5)
    objective = EstimateObjective(ALL, encoders(), run.prepared, parts()[0].decode)
    report = objective(x0_hat, batch, torch.full((2,), level))
    for term in report.terms:
        found = [s.terms[term.term.name].raw for s in samples[2:]]
        assert found == pytest.approx(term.per_sample.tolist(), rel=1e-5)


def test_the_gradient_is_that_of_the_last_call_alone():
    def loss_of(run):
        run.lora.attach().train()
        _, samples = run._rollout(0)
        run.lora.detach()
        return sum(x.weighted for s in samples for x in s.terms.values()) / len(samples)

    run = trainer(steps=4, velocity_weight=0.0, objective=None, **ROLLS)
    seed = next(
        n for n in range(50) if rollout.draw_step(4, generator(run, n)) == 0
    )  # all of the path is the last call
    run._batch = lambda number: [0, 1]
    parameter = next(p for name, p in run.lora.named_parameters() if name.endswith("down"))
    with torch.no_grad():
        for p in run.lora.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    run._rollout = lambda number, f=run._rollout: f(seed)
    run.optimizer.zero_grad()
    loss_of(run)
    direction = torch.randn_like(parameter)
    slope = (parameter.grad * direction).sum().item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(direction, alpha=sign * 1e-3)
        values.append(loss_of(run))
        with torch.no_grad():
            parameter.add_(direction, alpha=-sign * 1e-3)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=2e-2)


def generator(run, number):
    return generator_for(run.settings.seed, "rollout", number)


@pytest.mark.parametrize("way", ("current", "average", "frozen"))
def test_the_way_goes_with_the_weights_that_are_asked_for(way):
    run = trainer(denoiser=Recording(), steps=12, rollout_weights=way, ema=0.5, batch_size=4, **ROLLS)
    run.run()
    assert not run.lora.attached
    for x_t, t, references, conditioning, v in [c for c in run.denoiser.calls_made if not c[-1].requires_grad][:1]:
        plain = super(Recording, run.denoiser).__call__(x_t, t, references, conditioning)
        assert torch.equal(plain, v) == (way == "frozen" or torch.equal(plain, v))
    ends = [trainer(steps=12, rollout_weights=w, ema=0.5, batch_size=4, **ROLLS) for w in ("current", way)]
    for end in ends:
        end.run()
    assert equal(weights(ends[0].lora), weights(ends[1].lora)) == (way == "current")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    options = {**everything(), **ROLLS, "rollout_weights": "average", "weights": "shares", "pair_weights": "reach",
               "objective_warmup": 3, "objective": shares()}  # fmt: skip
    whole, parted = trainer(tmp_path / "whole", **options), trainer(tmp_path / "parted", **{**options, "host": Stops()})
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        parted.run()
    again = trainer(tmp_path / "parted", **options)
    again.resume(saved(tmp_path / "parted")[-1])
    again.run()
    same_end(whole, again)
    assert whole.shares.means == again.shares.means


class Stops(Host):
    def on_step(self, log, total):
        if log.step == 4:
            raise KeyboardInterrupt


def shares():
    return EditObjective(tuple(replace(term, weight=0.2) for term in ALL.terms))


def test_validation_looks_at_whole_rollouts():
    held_out = prepared_pairs(1, seed=9, names="held out")
    run = trainer(denoiser=Recording(), steps=2, validate_every=2, validation=held_out, **ROLLS)
    run.run()
    found = run.log.validations[-1]
    assert set(found.terms) == {REGRESSION, "no edit", "geometry", "overlay"} and found.velocity > 0
    assert found.terms[REGRESSION] > 0 and found.terms_base[REGRESSION] > 0


def test_an_objective_is_not_needed():
    run = trainer(steps=3, objective=None, velocity_weight=0.0, **ROLLS)
    before = weights(run.lora)
    run.run()
    assert not equal(before, weights(run.lora))


@pytest.mark.parametrize(
    "wrong, message",
    (
        ({"rollout_regression": 1.0}, "rollout_regression: 1 needs estimate rollout, got 'one_step'"),
        ({"rollout_weights": "average"}, "rollout_weights: average needs the moving average"),
        ({"estimate": "two_step"}, "estimate: expected one of 'one_step', 'rollout', got 'two_step'"),
        ({"rollout_steps": 0}, "rollout_steps: expected a whole number"),
        ({"objective_warmup": 7}, "objective_warmup: expected at most the 6 steps of the run, got 7"),
    ),
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        trainer(**wrong)
    assert message.split(":")[0] in str(error.value)
    assert message[:30] in str(error.value)
