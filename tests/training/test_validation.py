"""Validation on held-out pairs: the same questions every time, and nothing about them that training could change."""

import math

import pytest
import torch
from small import (
    ALL,
    GEOMETRY,
    LATENTS,
    PATCHES,
    Recording,
    SmallDenoiser,
    StopAfter,
    equal,
    parts,
    prepared_pairs,
    trainer,
    weights,
)

from editloss_core.models.kontext import KONTEXT
from editloss_core.objective import EditObjective, LossTerm
from editloss_core.training.flow import generator_for
from editloss_core.training.host import Host
from editloss_core.training.validation import NOISE_LEVELS


def held_out(count=2):
    return prepared_pairs(count, seed=9, names="held out")


class Keep(Host):
    def __init__(self):
        self.logs, self.rows, self.state = [], [], []

    def on_validation(self, log, pictures):
        self.logs.append(log)
        self.rows.append(pictures)
        self.state.append(weights(self.made.lora))


def validated(**options):
    """(host, trainer) of a run with validations."""
    host = Keep()
    made = host.made = trainer(
        host=host, **{"validation": held_out(), "validate_every": 2, "preview_steps": 3, **options}
    )
    made.run()
    return host, made


def test_the_loss_equals_one_computed_by_hand():
    """Paired: one noise per pair and level, with and without the LoRA."""
    denoiser = Recording()
    host, made = validated(denoiser=denoiser, steps=2, preview_steps=0, edit_weight=2.0)
    calls = [c for c in denoiser.calls_made if len(c[0]) == 1]
    count = len(NOISE_LEVELS) * 2
    assert len(calls) == 2 * count
    base, trained = calls[:count], calls[count:]
    pairs, means = held_out(), []
    for group in (base, trained):
        values = {level: [] for level in NOISE_LEVELS}
        for n, (x_t, t, references, _, v) in enumerate(group):
            index, level = divmod(n, len(NOISE_LEVELS))
            x0, mask = pairs.after([index]), pairs.latent_masks([index])[:, None]
            assert t.item() == pytest.approx(NOISE_LEVELS[level]) and torch.equal(references[0], pairs.before([index]))
            weight = 1 + mask
            error = weight * (v - ((x_t - (1 - t) * x0) / t - x0)) ** 2
            values[NOISE_LEVELS[level]].append((error.sum() / (weight.sum() * v.shape[1])).item())
        means.append({level: sum(v) / len(v) for level, v in values.items()})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(base, trained))
    log = host.logs[0]
    for level in NOISE_LEVELS:
        assert log.noise_levels[f"{level:g}"] == pytest.approx((means[1][level], means[0][level]), rel=1e-4)
    assert log.velocity == pytest.approx(sum(means[1].values()) / 5, rel=1e-4)
    assert log.velocity_base == pytest.approx(sum(means[0].values()) / 5, rel=1e-4)


def test_the_noise_of_levels_and_pairs_is_independent():
    denoiser = Recording()
    validated(denoiser=denoiser, steps=2, preview_steps=0, objective=None)
    pairs, noises = held_out(), []
    for n, (x_t, t, *_) in enumerate([c for c in denoiser.calls_made if len(c[0]) == 1][:10]):
        noises.append(((x_t - (1 - t) * pairs.after([n // 5])) / t).flatten())
    correlation = torch.corrcoef(torch.stack(noises)) - torch.eye(10)
    assert correlation.abs().max() < 0.35  # 4.8 standard deviations of 192 numbers


def test_an_untrained_lora_is_the_base():
    made = trainer(validation=held_out(), validate_every=2)
    made.lora.attach()
    log = made.validator.losses(0)
    assert log.velocity == log.velocity_base and log.terms == log.terms_base
    assert all(a == b for a, b in log.noise_levels.values())
    assert set(log.terms) == {term.name for term in ALL.terms}


def test_base_numbers_and_pictures_do_not_change_while_the_lora_does():
    denoiser = Recording()
    host, _ = validated(denoiser=denoiser, steps=6)
    alone = sum(len(call[0]) == 1 for call in denoiser.calls_made)
    assert alone == (1 + 3) * 2 * (len(NOISE_LEVELS) + 3)  # the base is asked once, for the losses and the pictures
    assert [log.step for log in host.logs] == [2, 4, 6]
    for log, rows in zip(host.logs, host.rows):
        assert log.velocity_base == host.logs[0].velocity_base and log.terms_base == host.logs[0].terms_base
        for row, first in zip(rows, host.rows[0]):
            assert torch.equal(row.base, first.base) and torch.equal(row.before, first.before)
    assert len({log.velocity for log in host.logs}) == 3
    assert not torch.equal(host.rows[0][0].lora, host.rows[2][0].lora)


def test_training_randomness_does_not_reach_validation():
    """Equal weights give equal answers, whatever was drawn before and however the training pairs come."""
    logs = []
    for options in (
        {},
        {"batch_size": 3, "accumulation": 2, "lora": {"dropout": 0.5}},
        {"prepared": prepared_pairs(2)},
    ):
        made = trainer(**{"validation": held_out(), "validate_every": 2, "steps": 2, **options})
        made.run()
        with torch.no_grad():
            for i, p in enumerate(made.lora.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        made.lora.attach().train()
        logs.append(made.validator.losses(7))
        assert made.lora.training
    assert logs[0] == logs[1] == logs[2]


def test_validating_does_not_touch_training():
    ends = []
    for changes in ({}, {"validation": held_out(), "validate_every": 1, "preview_steps": 2}):
        made = trainer(lora={"dropout": 0.3}, ema=0.8, **changes)
        made.run()
        ends.append(weights(made.lora))
    assert equal(*ends)


def test_the_moving_average_is_what_is_validated_and_returned():
    host, made = validated(ema=0.9, steps=4, preview_steps=0)
    average = made.average.values
    assert equal(weights(made.lora), average) and not equal(host.state[-1], average)
    made.lora.attach()
    assert made.validator.losses(4) == host.logs[-1]  # with the average in place
    with torch.no_grad():
        for name, p in made.lora.named_parameters():
            p.copy_(host.state[-1][name])
    assert made.validator.losses(4) != host.logs[-1]  # with the last weights


def test_a_validation_that_is_stopped_leaves_the_weights_and_not_the_average(tmp_path):
    made = trainer(tmp_path, validation=held_out(), validate_every=2, ema=0.9, host=StopAfter(2, 3))
    raw = {}
    update = made.average.update

    def remember(named, step):
        raw.update(weights(made.lora))
        update(named, step)

    made.average.update = remember
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert equal(raw, weights(made.lora)) and not equal(raw, made.average.values)


def test_rhythm_and_end():
    for every, steps, expected in ((2, 5, [2, 4, 5]), (3, 3, [3]), (10, 4, [4]), (0, 3, [])):
        host, made = validated(validate_every=every, steps=steps, preview_steps=0, objective=None)
        assert [log.step for log in host.logs] == expected == [log.step for log in made.log.validations]


def test_pictures_are_what_the_sampler_and_the_decoder_make():
    host, made = validated(steps=2, previews=1)
    (row,) = host.rows[0]
    images = held_out().pairs.load(0)
    assert row.pair == "held out 0" and torch.equal(row.before, images.before) and torch.equal(row.after, images.after)
    x0 = held_out().after([0])
    noise = torch.randn(x0.shape, generator=generator_for(made.settings.seed, "validation", "held out 0", "picture"))
    for picture, attached in ((row.base, False), (row.lora, True)):
        assert picture.shape == (32, 32, 3) and 0 <= picture.min() and picture.max() <= 1
        if attached:
            made.lora.attach()
        z = KONTEXT.sample(made.denoiser, noise, [held_out().before([0])], [made.validator.conditioning[0]], 3)
        torch.testing.assert_close(picture, parts()[0].decode(z)[0].clamp(0, 1))


def test_the_number_of_pictures():
    for options, expected in (
        ({"previews": 1}, 1),
        ({"previews": 9}, 2),
        ({"previews": 0}, 0),
        ({"preview_steps": 0}, 0),
    ):
        host, made = validated(steps=2, objective=None, **options)
        assert [len(rows) for rows in host.rows] == [expected]
        assert made.log.validations


def test_gates_hold_in_validation():
    """A term counts at the levels inside its gate, and is left out where there is none."""
    objective = EditObjective(
        (LossTerm("geometry_match", PATCHES, name="high", t_min=0.8), LossTerm("geometry_match", PATCHES, name="all"),
         LossTerm("geometry_match", LATENTS, name="never", t_min=0.35, t_max=0.45))
    )  # fmt: skip
    host, _ = validated(objective=objective, steps=2)
    log = host.logs[0]
    assert set(log.terms) == set(log.terms_base) == {"high", "all"}
    assert log.terms["high"] > log.terms["all"]  # one-step estimates are worse at high noise
    assert all(math.isfinite(v) for v in log.terms.values())


def test_terms_that_compare_within_a_batch_are_left_out_and_that_is_said():
    """One pair at a time, their loss is 0 whatever was learnt."""
    within = LossTerm("info_nce", LATENTS, name="within")
    host, made = validated(objective=EditObjective((GEOMETRY, within)), steps=2, preview_steps=0)
    assert set(host.logs[0].terms) == {"geometry"} and made.log.steps[0].term("within") > 0
    assert made.notes == [
        "within: left out of validation, where pairs come one at a time and there is no batch to compare"
    ]
    host, made = validated(objective=EditObjective((within,)), steps=2, preview_steps=0)
    assert host.logs[0].terms == {} and math.isfinite(host.logs[0].velocity)
    against = LossTerm("info_nce", LATENTS, negative="src")
    host, made = validated(objective=EditObjective((against,)), steps=2, preview_steps=0)
    assert host.logs[0].terms and not made.notes


def test_a_comparison_within_batches_of_one_is_said_to_be_0():
    made = trainer(objective=EditObjective((GEOMETRY, LossTerm("info_nce", LATENTS, name="within"))), batch_size=1)
    assert made.notes == ["within: compares the pairs of a batch, and is always 0 with batch_size 1"]


def test_validation_pairs_of_several_sizes():
    host, _ = validated(validation=prepared_pairs(1, ((32, 32), (48, 32)), seed=9, names="held out"), steps=2)
    assert [row.lora.shape for row in host.rows[0]] == [(32, 32, 3), (48, 32, 3)]


def test_no_graph_is_kept():
    class NoGraph(SmallDenoiser):
        def __call__(self, x_t, *args):
            v = super().__call__(x_t, *args)
            assert v.requires_grad == (len(x_t) == 2)
            return v

    validated(denoiser=NoGraph(), steps=2, objective=EditObjective((GEOMETRY,)))
