"""The self-check lets right gradients through, whatever it does leaves no trace, and each wrong one is stopped by name."""

import json
from dataclasses import replace

import pytest
import torch
from small import (
    ALL,
    PATCHES,
    Recording,
    SmallDenoiser,
    encoders,
    equal,
    parts,
    trainer,
    weights,
)
from torch.utils.checkpoint import checkpoint

from editloss_core.objective import EditObjective
from editloss_core.runs.log import RunLog
from editloss_core.training import self_check
from editloss_core.training.memory import OutOfMemory
from editloss_core.training.self_check import Line, SelfCheckFailed, slope
from editloss_core.training.trainer import UNCHECKED

SEEDS = range(3)


def errors(check):
    return {part.part: part.error for part in check.parts}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_right_gradients_agree_in_every_part(checkpointing, seed):
    check = trainer(checkpointing=checkpointing, denoiser=SmallDenoiser(seed=seed), seed=seed).self_check()
    assert check.wrong == [] and [part.part for part in check.parts] == [
        "LoRA", "reference", "decoder", "encoder vae/blocks/grid", "encoder patches/grid",
    ]  # fmt: skip
    found = errors(check)
    assert all(found[name] < 1e-3 for name in found if name != "reference"), found


def test_the_model_is_called_three_times_in_the_size_of_a_step_and_nothing_stays_changed():
    made = trainer(denoiser=Recording(), batch_size=2)
    before, state = weights(made.lora), torch.random.get_rng_state()
    made.self_check()
    assert [tuple(call[0].shape) for call in made.denoiser.calls_made] == [(2, 12, 4, 4)] * 3
    assert equal(weights(made.lora), before) and torch.equal(torch.random.get_rng_state(), state)
    assert not made.lora.attached and not any(m._forward_hooks for m in made.denoiser.module.modules())
    assert all(p.grad is None for p in made.lora.parameters())


def test_a_run_learns_the_same_with_and_without_it_and_says_which(tmp_path):
    runs = {on: trainer(tmp_path / str(on), self_check=on) for on in (True, False)}
    results = {on: made.run() for on, made in runs.items()}
    assert equal(weights(results[True].lora), weights(results[False].lora))
    assert results[True].self_check.startswith("self-check passed (torch ") and results[False].self_check == UNCHECKED
    for on, event in ((True, "checked"), (False, "unchecked")):
        events = RunLog.read(tmp_path / str(on)).events
        assert [e.event for e in events] == ["started", event, "ended"]
        assert events[1].notes == (results[on].self_check,)
    parts = RunLog.read(tmp_path / "True").events[1].info["parts"]
    assert [part["part"] for part in parts][:2] == ["LoRA", "reference"]


class Broken(SmallDenoiser):
    """Right velocity, and one thing wrong with it."""

    def __init__(self, fault, **options):
        super().__init__(**options)
        self.fault = fault

    def __call__(self, x_t, t, references, conditioning):
        if self.fault == "deaf":
            references = [torch.zeros_like(references[0])]
        v = super().__call__(x_t, t, references, conditioning)
        if self.fault == "detached":
            return v.detach()
        if self.fault == "cut":  # a part of the output reaches no layer
            return torch.cat([v[:, :4].detach(), v[:, 4:]], 1)
        if self.fault == "in place":
            return checkpoint(scaled_in_place, v, use_reentrant=False)
        return v


def scaled_in_place(v):
    """Plain autograd raises here; checkpointing multiplies by what stands in the slice after it was changed."""
    v, scale = v * 1, torch.sigmoid(v)
    v[:, 2:] = v[:, 2:] * scale[:, 2:]
    return torch.sinh(v)


@pytest.mark.parametrize(
    "fault, part", [("deaf", "reference"), ("detached", "LoRA"), ("cut", "LoRA"), ("in place", "LoRA")]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_with_a_fault_is_stopped_by_name_before_it_learns(fault, part, seed, tmp_path):
    made = trainer(tmp_path / "run", denoiser=Broken(fault, seed=seed), cache=tmp_path, self_check=True, seed=seed)
    before = weights(made.lora)
    with pytest.raises(SelfCheckFailed) as caught:
        made.run()
    assert f"- {part}: " in str(caught.value) and f"torch {torch.__version__}" in str(caught.value)
    assert equal(weights(made.lora), before) and made.log.steps == [] and not made.lora.attached
    assert [e.event for e in made.log.events] == ["started", "checked", "stopped"]
    assert not list(tmp_path.glob(f"{self_check.FOLDER}/*")), "a fault was remembered"


def test_a_decoder_whose_gradient_is_half_is_named():
    decode = parts()[0].decode

    def in_place(z):
        pictures = decode(z)
        return 0.5 * pictures + 0.5 * pictures.detach()

    check = trainer(decode=in_place).self_check()
    (wrong,) = check.wrong
    assert wrong.part == "decoder" and wrong.found == pytest.approx(0.5 * wrong.expected, rel=1e-3)
    assert check.faults() == [
        f"decoder: the backward pass says {wrong.found:.4g} along a direction, finite differences {wrong.expected:.4g}: "
        f"50 % apart, {100 * wrong.allowed:.2g} % is allowed"
    ]


def test_an_encoder_without_a_gradient_is_named(monkeypatch):
    patches = encoders()[PATCHES]
    features = type(patches).features
    monkeypatch.setattr(type(patches), "features", lambda self, x: features(self, (255 * x).round() / 255))
    (wrong,) = trainer().self_check().wrong
    assert wrong.part == f"encoder {PATCHES}" and wrong.found == 0


def test_the_velocity_is_compared_with_the_programs_own():
    class Stock(SmallDenoiser):
        factor = 1.0

        def stock_velocity(self, x, t, reference, conditioning):
            return self.factor * self(x, t, [reference], [conditioning] * len(x))

    denoiser = Stock()
    assert errors(trainer(denoiser=denoiser).self_check())["velocity"] == 0
    denoiser.factor = 1.01
    (wrong,) = trainer(denoiser=denoiser).self_check().wrong
    assert wrong.part == "velocity" and wrong.error == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_a_sampling_path_that_has_changed_is_said_and_stops_nothing():
    class Other(SmallDenoiser):
        def stock_velocity(self, x, t, reference, conditioning):
            raise TypeError("takes 3 positional arguments but 4 were given")

    check = trainer(denoiser=Other()).self_check()
    assert (
        check.wrong == [] and "velocity: cannot be told, the sampling path could not be run (TypeError" in check.line()
    )


def test_an_encoder_that_only_watches_may_have_no_gradient(monkeypatch):
    patches = encoders()[PATCHES]
    features = type(patches).features
    monkeypatch.setattr(type(patches), "features", lambda self, x: features(self, (255 * x).round() / 255))
    watching = EditObjective((ALL.terms[0], *(replace(term, weight=0.0) for term in ALL.terms[1:])))
    check = trainer(objective=watching).self_check()
    assert check.wrong == [] and [part.part for part in check.parts][2:] == ["encoder vae/blocks/grid"]


def test_a_model_may_read_its_reference_without_a_gradient():
    class Frozen(SmallDenoiser):
        def __call__(self, x_t, t, references, conditioning):
            return super().__call__(x_t.detach(), t, [references[0].detach()], conditioning)

    made = trainer(denoiser=Frozen())
    (part,) = (part for part in made.self_check().parts if part.part == "reference")
    assert not part.wrong and part.found > 0.01


@pytest.mark.parametrize("layers", ["blocks.1", "out"])
def test_a_lora_on_one_layer_only_is_let_through(layers):
    assert trainer(lora={"layers": layers}).self_check().wrong == []


@pytest.mark.parametrize("seed", SEEDS)
def test_autocast_keeps_no_weights_from_before(seed):
    made = trainer(objective=None, seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        check = made.self_check()
    assert check.wrong == [] and errors(check)["LoRA"] is not None, check.line()


def test_an_answer_that_is_not_finite_is_no_fault_of_the_reference():
    class Broken(SmallDenoiser):
        def __call__(self, *args):
            return super().__call__(*args) * torch.nan

    check = trainer(denoiser=Broken()).self_check()
    assert check.wrong == [] and "reference: cannot be told, the model's answer is not finite" in check.line()


def test_what_stops_without_gradients_too_is_no_matter_of_gradients():
    class Wrong(SmallDenoiser):
        def __call__(self, *args):
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied"):
        trainer(denoiser=Wrong()).self_check()


def test_random_numbers_that_a_model_draws_are_drawn_anew():
    class Drawing(SmallDenoiser):
        def __call__(self, *args):
            return super().__call__(*args) + 1e-9 * torch.randn(())

    made = trainer(denoiser=Drawing())
    state = torch.random.get_rng_state()
    made.self_check()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_another_model_or_decoder_is_looked_at_anew(tmp_path):
    class Detached(SmallDenoiser):
        def __call__(self, *args):
            return super().__call__(*args).detach()

    def half(z):
        return 0.5 * parts()[0].decode(z) + 0.5 * parts()[0].decode(z).detach()

    assert not trainer(cache=tmp_path).self_check().wrong
    assert trainer(cache=tmp_path, denoiser=Detached()).self_check().wrong[0].part == "LoRA"
    assert trainer(cache=tmp_path, decode=half).self_check().wrong[0].part == "decoder"


def test_what_cannot_be_told_is_said_and_stops_nothing(monkeypatch):
    patches = encoders()[PATCHES]
    monkeypatch.setattr(type(patches), "features", lambda self, x: torch.zeros(len(x), 4, 4, 16))
    check = trainer().self_check()
    assert check.wrong == [] and "encoder patches/grid: cannot be told" in check.line()


def test_a_gradient_that_cannot_be_computed_is_named():
    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no autograd formula was registered")

    class Opaque(SmallDenoiser):
        def __call__(self, *args):
            return Operator.apply(super().__call__(*args))

    (wrong,) = trainer(denoiser=Opaque()).self_check().wrong
    assert wrong.part == "LoRA" and "no autograd formula was registered" in wrong.said


def test_no_memory_in_the_check_is_no_fault_of_gradients():
    class Full(SmallDenoiser):
        def __call__(self, *args):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(OutOfMemory, match="Out of memory"):
        trainer(denoiser=Full()).self_check()


def test_the_same_run_is_checked_once_and_another_one_anew(tmp_path):
    def calls(**changes):
        made = trainer(denoiser=Recording(), cache=tmp_path, **changes)
        line = made.self_check(anew=changes.pop("anew", False)).line()
        return len(made.denoiser.calls_made), line

    first, line = calls()
    again, remembered = calls()
    assert (first, again) == (3, 0) and "remembered" not in line and ", remembered from 20" in remembered
    assert remembered.split(": ", 1)[1] == line.split(": ", 1)[1]
    others = ({"batch_size": 1}, {"checkpointing": True}, {"lora": {"rank": 2}}, {"objective": None})
    assert [calls(**other)[0] for other in others] == [3] * 4
    made = trainer(denoiser=Recording(), cache=tmp_path)
    made.self_check(anew=True)
    assert len(made.denoiser.calls_made) == 3
    (path,) = [p for p in (tmp_path / self_check.FOLDER).iterdir() if json.loads(p.read_text())["parts"]][:1]
    path.write_text("{")  # cut off: not remembered, and no failure
    assert self_check.recall(tmp_path, path.stem) is None


def test_a_slope_is_the_derivative_times_twice_the_direction():
    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    d = torch.tensor([1e-3, 2e-3, -1e-3], dtype=torch.float64)
    found = slope(lambda: x**3, Line([x], [d]))
    exact = (2 * 3 * x.detach() ** 2 * d).norm().item()
    assert found.found == pytest.approx(exact, rel=1e-5) and found.expected == pytest.approx(exact, rel=1e-3)
    assert found.blur < 0.01 and x.tolist() == [0.3, -1.2, 2.0]
