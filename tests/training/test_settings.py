"""Settings: everything wrong is said before any work; learning rates and optimisers are what they are called."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from editloss_core.objective import EditObjective, LossTerm
from editloss_core.training.flow import Timesteps
from editloss_core.training.settings import (
    OPTIMIZERS,
    MovingAverage,
    TrainingSettings,
    check_objective,
    every,
    gated,
    warnings,
)

WHOLE = ["steps", "batch_size", "accumulation", "objective_every", "rollout_steps", "keep"]
WHOLE_OR_NONE = [
    "warmup", "objective_warmup", "seed", "gradients_every", "validate_every", "preview_steps", "previews",
    "checkpoint_every",
]  # fmt: skip
NUMBERS = {"learning_rate": True, "weight_decay": False, "clip": False, "velocity_weight": False, "edit_weight": True,
           "estimate_cap": True, "ema": False}  # name → whether 0 is refused  # fmt: skip


@pytest.mark.parametrize("name", WHOLE + WHOLE_OR_NONE)
def test_whole_numbers(name):
    for bad in (-1, 1.5, 2.0, True, "3", None, math.nan) + ((0,) if name in WHOLE else ()):
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number >= {int(name in WHOLE)}, got"):
            TrainingSettings(**{name: bad})
    TrainingSettings(**{name: int(name in WHOLE)})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    for bad in (-0.1, math.nan, math.inf, "1", None, True) + ((0.0,) if NUMBERS[name] else ()):
        with pytest.raises(ValueError, match=f"^{name}: expected a number {'>' if NUMBERS[name] else '>='} 0, got"):
            TrainingSettings(**{name: bad})
    TrainingSettings(**{name: 0.5})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "sgd"}, "^optimizer: expected one of 'adamw', 'adamw8bit', 'prodigy', got 'sgd'"),
        ({"schedule": "linear"}, "^schedule: expected one of 'constant', 'cosine', got 'linear'"),
        ({"estimate_weighting": "snr"}, "^estimate_weighting: expected one of"),
        ({"ema": 1.0}, "^ema: expected a decay below 1, got 1"),
        ({"steps": 10, "warmup": 11}, "^warmup: expected at most the 10 steps of the run, got 11"),
    ],
)
def test_other_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**changes)


def test_gates_outside_all_noise_levels_leave_nothing_to_train_on():
    settings = TrainingSettings(velocity_weight=0.0, timesteps=Timesteps("uniform", minimum=0.3, maximum=0.8))
    outside = LossTerm("geometry_match", "e", t_max=0.2), LossTerm("geometry_match", "e", name="high", t_min=0.9)
    watching = LossTerm("geometry_match", "e", name="watching", weight=0.0)
    with pytest.raises(ValueError, match=r"^velocity_weight: 0 leaves nothing .* are drawn, 0.3 to 0.8"):
        check_objective(EditObjective((*outside, watching)), settings)
    check_objective(EditObjective((*outside, LossTerm("geometry_match", "e", name="at the end", t_min=0.8))), settings)
    check_objective(EditObjective(outside), TrainingSettings(timesteps=settings.timesteps))


def test_settings_are_plain_values():
    chosen = TrainingSettings(timesteps=Timesteps("shifted", maximum=0.9))
    assert json.loads(json.dumps(chosen.as_dict())) == chosen.as_dict()
    assert chosen.as_dict()["timesteps"]["maximum"] == 0.9


def test_rates():
    constant = TrainingSettings(steps=10, warmup=4)
    assert [constant.rate(i) for i in range(10)] == [0.25, 0.5, 0.75] + [1.0] * 7
    cosine = TrainingSettings(steps=10, warmup=2, schedule="cosine")
    rates = [cosine.rate(i) for i in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[10] == pytest.approx(0.0)
    assert all(a > b for a, b in zip(rates[2:], rates[3:]))
    assert 0.0 < rates[9] < 0.05  # the last step still learns
    assert cosine.rate(12) == pytest.approx(0.0)  # not the way up again


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rates_of_the_shortest_runs(schedule):
    assert TrainingSettings(steps=1, schedule=schedule).rate(0) == 1.0
    assert TrainingSettings(steps=3, warmup=3, schedule=schedule).rate(2) == 1.0


def test_every():
    assert [i for i in range(10) if every(4, i)] == [0, 4, 8] and not any(every(0, i) for i in range(10))


# --- optimisers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_minimise(name):
    if OPTIMIZERS[name]:
        pytest.importorskip(OPTIMIZERS[name])
    chosen = TrainingSettings(optimizer=name, learning_rate=1.0 if name == "prodigy" else 0.05, weight_decay=0.0)
    p = nn.Parameter(torch.ones(64, 128))  # large enough for 8 bits
    optimiser = chosen.make_optimizer(iter([p]))
    assert optimiser.param_groups[0]["lr"] == chosen.learning_rate
    for _ in range(250 if name == "prodigy" else 40):  # it has to find its rate first
        optimiser.zero_grad()
        p.square().sum().backward()
        optimiser.step()
    assert p.detach().abs().max() < 0.5


def test_adamw_is_adamw():
    """Against the formula, decay included."""
    chosen = TrainingSettings(learning_rate=0.1, weight_decay=0.2)
    p = nn.Parameter(torch.tensor([2.0]))
    optimiser, m, v, x = chosen.make_optimizer([p]), 0.0, 0.0, 2.0
    for n, g in enumerate([1.0, -3.0, 0.5], 1):
        p.grad = torch.tensor([g])
        optimiser.step()
        m, v, x = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, x - 0.1 * 0.2 * x
        x -= 0.1 * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.999**n)) + 1e-8)
        assert p.item() == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("name, package", [(n, p) for n, p in OPTIMIZERS.items() if p])
def test_a_missing_package_is_named_before_any_work(name, package, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else real(n, *a))
    with pytest.raises(ValueError, match=f"optimizer: {name} needs a package; pip install {package}, or choose adamw"):
        TrainingSettings(optimizer=name)


# --- moving average ---------------------------------------------------------------------------------------------------


def test_the_moving_average_equals_its_recursion():
    p = nn.Parameter(torch.tensor([0.0]))
    average, expected = MovingAverage(0.7, [("p", p)]), 0.0
    for n in range(30):
        with torch.no_grad():
            p.copy_(torch.tensor([math.sin(n)]))
        average.update([("p", p)], n)
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * math.sin(n)
        assert average.values["p"].item() == pytest.approx(expected, abs=1e-6)
    assert not average.values["p"].requires_grad and average.values["p"].data_ptr() != p.data_ptr()


# --- where losses that push away count --------------------------------------------------------------------------------


def pushing(**changes):
    return EditObjective(
        (LossTerm("overlay_avoidance", "e", name="overlay", **changes), LossTerm("geometry_match", "e"))
    )


def test_pushes_on_one_step_estimates_count_up_to_the_gate_and_matches_everywhere():
    made = gated(pushing(), TrainingSettings())
    assert [(t.t_min, t.t_max) for t in made.terms] == [(0.0, 0.5), (0.0, 1.0)]
    assert [t.t_max for t in gated(pushing(t_max=0.3), TrainingSettings()).terms] == [0.3, 1.0]
    closed = gated(pushing(t_min=0.6), TrainingSettings()).terms[0]
    assert (closed.t_min, closed.t_max) == (0.5, 0.5), "a gate that begins above it is closed, not moved down"
    assert gated(pushing(), TrainingSettings(estimate="rollout")) == pushing()


@pytest.mark.parametrize(
    "kind, pushes",
    (("no_edit_identity", True), ("triplet", True), ("multi_negative", True), ("margin_ranking", False),
     ("geometry_match", False), ("feature_match", False), ("contrastive", False), ("info_nce", False)),
)  # fmt: skip
def test_which_kinds_push(kind, pushes):
    chosen = {"negative": "in_batch"} if kind == "info_nce" else {}
    assert LossTerm(kind, "e", **chosen).pushes == pushes


def test_a_contrastive_term_pushes_where_its_label_says_so():
    assert LossTerm("contrastive", "e", label=0, margin=0.5).pushes


def test_what_was_measured_to_do_harm_is_said():
    (harm,) = warnings(pushing(), TrainingSettings(pushes_t_max=0.9))
    assert harm.startswith("pushes_t_max 0.9: above t = 0.5") and "(overlay)" in harm
    (idle,) = warnings(pushing(), TrainingSettings())
    assert idle.startswith("overlay: on the one-step estimate they count up to t = 0.5") and "Rollout Options" in idle
    assert warnings(pushing(), TrainingSettings(estimate="rollout", pushes_t_max=0.9)) == []
    assert warnings(pushing(weight=0.0), TrainingSettings(pushes_t_max=0.9)) == []
    assert warnings(EditObjective((LossTerm("geometry_match", "e"),)), TrainingSettings()) == []
