"""What stops a run: said in words that help, with nothing updated and the last good state kept."""

import copy
import re
import runpy
from dataclasses import replace

import pytest
import torch
from small import (
    ALL,
    GEOMETRY,
    LATENTS,
    NO_EDIT,
    PATCHES,
    Patches,
    Recording,
    SmallDenoiser,
    encoders,
    equal,
    indices_of,
    parts,
    prepared_pairs,
    settings,
    trainer,
    weights,
)

from editloss_core import device_memory
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.objective import EditObjective, LossTerm
from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, Checkpoint, CheckpointError, checkpoints
from editloss_core.runs.log import RunLog
from editloss_core.training.host import Host
from editloss_core.training.memory import OutOfMemory, StepMemory, advice
from editloss_core.training.resume import resumable
from editloss_core.training.trainer import NonFinite

BAD_STEP = 3  # the step that fails


class Watch(Host):
    """Remembers the state after every step; ``made`` is set once the trainer stands."""

    def on_step(self, log, total):
        self.state = weights(self.made.lora), copy.deepcopy(self.made.optimizer.state_dict()), log.step
        self.average = copy.deepcopy(self.made.average)


class At:
    """Once armed, lets ``sample`` samples pass and spoils all others, whether they come in one call or in several."""

    def __init__(self, sample, kind="value"):
        self.left, self.kind, self.armed = sample, kind, False

    def __call__(self, x):
        """NaN, or a gradient that is NaN under a value that is what it was."""
        if not self.armed:
            return x
        spoilt = slice(self.left, None)
        self.left = max(0, self.left - len(x))
        y = x.clone()
        y[spoilt] = torch.nan if self.kind == "value" else x[spoilt] + (x[spoilt] - x[spoilt].detach()).abs().sqrt()
        return y


class SpoiltEncoder(Patches):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def features(self, pixels):
        return self.fault(super().features(pixels))


class SpoiltDenoiser(Recording):
    """Arms the faults at the ``BAD_STEP``-th call, and has one of its own."""

    def __init__(self, faults, own=None, **options):
        super().__init__(**options)
        self.faults, self.own = faults, own

    def __call__(self, x_t, t, references, conditioning):
        v = super().__call__(x_t, t, references, conditioning)
        for fault in self.faults:
            fault.armed = len(self.calls_made) >= BAD_STEP
        return self.own(v) if self.own else v


def stopped(tmp_path, place, kind, **options):
    """(message, name of the spoilt pair, its t) of a run with one fault; checks that nothing was updated with it."""
    fault = At(1, kind)
    own_encoders, decode = encoders(), parts()[0].decode
    if place == "encoder":
        own_encoders[PATCHES] = SpoiltEncoder(fault)
    if place == "decoder":
        plain = decode

        def decode(z):
            return fault(plain(z))

    denoiser = SpoiltDenoiser([fault], fault if place == "denoiser" else None)
    watch = Watch()
    made = watch.made = trainer(
        tmp_path, denoiser=denoiser, with_encoders=own_encoders, decode=decode, host=watch, checkpoint_every=0, ema=0.9,
        **{"gradients_every": 0, **options},
    )  # fmt: skip
    with pytest.raises(NonFinite) as error:
        made.run()
    kept, optimiser, step = watch.state
    assert step == BAD_STEP - 1 == made.step
    assert equal(kept, weights(made.lora)) and equal(optimiser, made.optimizer.state_dict())
    assert equal(watch.average.values, made.average.values) and not made.lora.attached
    saved = Checkpoint.load(checkpoints(tmp_path / CHECKPOINT_FOLDER)[-1])
    assert saved.step == step and equal(saved.lora, kept) and equal(saved.optimizer, optimiser)
    assert [s.step for s in RunLog.read(tmp_path).steps] == [1, 2]
    message = str(error.value)
    assert f"step {BAD_STEP}:" in message and "Nothing was updated with it" in message
    assert "checkpoints/step_000002.safetensors" in message
    _, t, _, conditioning, _ = denoiser.calls_made[BAD_STEP - 1]
    return message, made.prepared.pairs[indices_of(made, conditioning)[1]].name, t[1].item()


def names(message, term, pair, t):
    assert term in message and f"pair {pair!r} at t = {t:.3f}" in message, message


@pytest.mark.parametrize("measured", [0, 1], ids=["plain step", "measured step"])
@pytest.mark.parametrize("place, term", [("encoder", "geometry"), ("decoder", "geometry"), ("denoiser", "velocity")])
def test_a_loss_that_is_nan_names_term_pair_and_t(place, term, measured, tmp_path):
    message, pair, t = stopped(tmp_path, place, "value", gradients_every=measured)
    names(message, f"the loss of {term!r} is nan", pair, t)


@pytest.mark.parametrize("measured", [0, 1], ids=["plain step", "measured step"])
@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_a_gradient_that_is_nan_under_finite_losses_names_term_pair_and_t(place, measured, tmp_path):
    only = EditObjective((NO_EDIT, GEOMETRY))
    message, pair, t = stopped(tmp_path, place, "gradient", objective=only, gradients_every=measured)
    names(message, "the gradient of 'geometry' is not finite", pair, t)


def test_a_gradient_that_is_nan_inside_the_model_names_layers_and_the_largest_loss(tmp_path):
    message, _, _ = stopped(tmp_path, "denoiser", "gradient")
    assert re.search(r"the gradient of \d+ layers \(embed", message) and "largest loss is 'velocity'" in message
    assert "for pair 'pair " in message


def test_a_term_that_only_watches_stops_nothing():
    """Weight 0: not in the total, NaN or not (as for the objective itself)."""
    fault = At(1)
    own = encoders()
    own[PATCHES] = SpoiltEncoder(fault)
    watching = EditObjective((NO_EDIT, LossTerm("geometry_match", PATCHES, weight=0.0)))
    ends = []
    for objective in (watching, EditObjective((NO_EDIT,))):
        made = trainer(denoiser=SpoiltDenoiser([fault]), with_encoders=own, objective=objective)
        assert made.run().steps == 6
        ends.append(weights(made.lora))
    assert equal(*ends)


def test_nan_outside_a_gate_stops_nothing():
    fault = At(1)
    own = encoders()
    own[PATCHES] = SpoiltEncoder(fault)
    gated = EditObjective((NO_EDIT, LossTerm("geometry_match", PATCHES, t_max=0.01)))
    assert trainer(denoiser=SpoiltDenoiser([fault]), with_encoders=own, objective=gated).run().steps == 6


def test_a_failure_in_the_second_pass_of_a_step_updates_nothing(tmp_path):
    fault = At(0)
    denoiser = SpoiltDenoiser([fault], fault)  # the third call is the first pass of the second step
    watch = Watch()
    watch.made = trainer(tmp_path, denoiser=denoiser, accumulation=2, host=watch, checkpoint_every=0)
    with pytest.raises(NonFinite, match="step 2:"):
        watch.made.run()
    assert equal(watch.state[0], weights(watch.made.lora)) and watch.state[2] == 1


def test_without_a_folder_the_message_promises_no_file():
    fault = At(0)
    with pytest.raises(NonFinite) as error:
        trainer(denoiser=SpoiltDenoiser([fault], fault)).run()
    assert "checkpoint" not in str(error.value)


class SpoiltFrom(SmallDenoiser):
    """NaN from the ``first``-th call on of those with a graph (training), or of those without one (validation)."""

    def __init__(self, first, training):
        super().__init__()
        self.first, self.training, self.asked = first, training, 0

    def __call__(self, *args):
        v = super().__call__(*args)
        if torch.is_grad_enabled() != self.training:
            return v
        self.asked += 1
        return v * torch.nan if self.asked >= self.first else v


def test_what_ends_in_nan_is_saved_without_pushing_an_earlier_checkpoint_out(tmp_path):
    """The last one may be where it began."""
    with pytest.raises(NonFinite, match="step 4"):
        trainer(tmp_path, denoiser=SpoiltFrom(4, training=True), checkpoint_every=2, keep=1).run()
    assert [p.stem for p in checkpoints(tmp_path / CHECKPOINT_FOLDER)] == ["step_000002", "step_000003"]


@pytest.mark.parametrize("first, where, t", [(3, ", without the LoRA", 0.5), (9, "", 0.7)], ids=["base", "LoRA"])
def test_a_validation_that_is_not_finite_names_term_pair_and_t(first, where, t, tmp_path):
    held_out = prepared_pairs(1, seed=9, names="held out")
    made = trainer(
        tmp_path, denoiser=SpoiltFrom(first, training=False), validation=held_out, validate_every=2, checkpoint_every=0
    )
    with pytest.raises(NonFinite) as error:
        made.run()
    message = str(error.value)
    assert f"Stopped at the validation after step 2{where}: the loss of 'velocity' is nan" in message
    assert f"for pair 'held out 0' at t = {t:.3f}" in message and "checkpoints/step_000002.safetensors" in message
    assert not made.log.validations and not RunLog.read(tmp_path).validations
    assert Checkpoint.load(checkpoints(tmp_path / CHECKPOINT_FOLDER)[-1]).step == 2


def test_a_term_that_is_not_finite_in_validation_is_named_unless_it_only_watches():
    held_out = prepared_pairs(1, seed=9, names="held out")

    class NaNInValidation(Patches):
        def features(self, pixels):
            return super().features(pixels) * (1.0 if torch.is_grad_enabled() else torch.nan)

    own = {**encoders(), PATCHES: NaNInValidation()}
    options = {"validation": held_out, "validate_every": 2, "steps": 2, "with_encoders": own}
    with pytest.raises(NonFinite, match="the loss of 'geometry' is nan, for pair 'held out 0' at t = 0.100"):
        trainer(objective=EditObjective((NO_EDIT, GEOMETRY)), **options).run()
    made = trainer(objective=EditObjective((NO_EDIT, replace(GEOMETRY, weight=0.0))), **options)
    assert len(made.run().log.validations) == 1


# --- memory -----------------------------------------------------------------------------------------------------------


def full(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class FullModel(SmallDenoiser):
    def __call__(self, *args):
        full()


class FullBackward(SmallDenoiser):
    def __call__(self, *args):
        v = super().__call__(*args)
        if v.requires_grad:
            v.register_hook(full)
        return v


def out_of_memory(tmp_path, **options):
    made = trainer(tmp_path, **options)
    start = weights(made.lora)
    with pytest.raises(OutOfMemory) as error:
        made.run()
    assert equal(start, weights(made.lora)) and isinstance(error.value.__cause__, torch.cuda.OutOfMemoryError)
    return str(error.value)


def test_no_memory_in_the_model(tmp_path):
    """Two tokens of 2×2 latents per side of 32 pixels, the same again for the reference; two blocks."""
    message = out_of_memory(tmp_path, denoiser=FullModel(), batch_size=2, resolution=1024)
    assert message.startswith("Out of memory in the model, at 8 tokens a sample and batch size 2.")
    lines = [line for line in message.splitlines() if line.startswith("- ")]
    assert "batch size 2 → 1 with accumulation 2" in lines[0] and "about 50%" in lines[0]
    assert "gradient checkpointing on" in lines[1] and f"about {(1 + 2 / 17) / 2:.0%}" in lines[1]
    assert "resolution 1024 → 768" in lines[2] and "about 56%" in lines[2]
    assert len(lines) == 3


def test_advice_is_for_the_stage_that_failed():
    """What was decoded is gone while the model goes back, and what the model kept while the optimiser steps."""
    words = {
        "gradient checkpointing": {"model", "objective", "backward"}, "batch size 2 →": {"model", "objective", "backward"},
        "crop 512×512": {"objective"}, "small decoder": {"objective"}, "no preview": {"validation"},
        "resolution 1024": {"model", "objective", "backward", "validation"}, "rank 16": {"optimiser"},
        "adamw8bit": {"optimiser"},
    }  # fmt: skip
    found = {word: set() for word in words}
    for stage in ("loading", "model", "objective", "backward", "optimiser", "validation"):
        text = advice(StepMemory(torch.device("cpu"), current=stage), tokens=8, batch_size=2, checkpointing=False, crop=(512, 512), blocks=57,
                      settings={"resolution": 1024, "rank": 16, "optimizer": "adamw"})  # fmt: skip
        for word in words:
            if word in text:
                found[word].add(stage)
        shares = [int(share) for share in re.findall(r"to (?:about )?(\d+)%", text)]
        assert shares == sorted(shares) and "saves time" not in text
    assert found == words


def driver_says(message: str, number: int | None = None) -> RuntimeError:
    """What newer torch raises for an error of the driver."""
    error = torch.AcceleratorError(message)
    if number is not None:
        error.error_code = number
    return error


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no class for the driver's errors")
def test_what_the_driver_says_of_memory_gets_advice_and_what_else_it_says_comes_through():
    class Failing(SmallDenoiser):
        def __call__(self, *args):
            raise errors.pop()

    errors = [driver_says("CUDA error: out of memory"), driver_says("CUDA error: 2", 2)]
    while errors:
        with pytest.raises(OutOfMemory, match="^Out of memory in the model"):
            trainer(denoiser=Failing()).run()
    for error in (
        driver_says("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("out of memory"),
    ):
        errors = [error]
        with pytest.raises(type(error), match=str(error)) as raised:
            trainer(denoiser=Failing()).run()
        assert raised.value is error


def test_before_torch_2_5_the_error_has_its_older_name(monkeypatch):
    monkeypatch.delattr(torch, "OutOfMemoryError", raising=False)
    assert runpy.run_path(device_memory.__file__)["DeviceOutOfMemory"] is torch.cuda.OutOfMemoryError
    with pytest.raises(OutOfMemory):
        trainer(denoiser=FullModel()).run()


def test_no_memory_on_the_way_back(tmp_path):
    message = out_of_memory(tmp_path, denoiser=FullBackward(), batch_size=1, checkpointing=True)
    assert message.startswith("Out of memory during backward, at 8 tokens a sample and batch size 1.")
    assert "gradient checkpointing on" not in message and "batch size 1 →" not in message


def test_no_memory_in_the_decoder(tmp_path):
    pairs = prepared_pairs(2, ((128, 128),), crop=96)
    message = out_of_memory(tmp_path, prepared=pairs, decode=full, batch_size=2, checkpointing=True)
    assert message.startswith("Out of memory in the objective (decoder, encoders, losses), at 128 tokens a sample")
    assert "crop 96×96 → 64: decoding and encoders fall to about 44%" in message
    assert "connect a small decoder" in message


def test_the_largest_pair_is_what_counts(tmp_path):
    pairs = prepared_pairs(1, ((32, 32), (128, 64)))
    assert "at 64 tokens a sample" in out_of_memory(tmp_path, prepared=pairs, denoiser=FullModel())


def test_when_nothing_is_left_to_turn_on(tmp_path):
    message = out_of_memory(tmp_path, denoiser=FullModel(), batch_size=1, checkpointing=True, objective=None)
    assert "Everything that saves activations is on" in message


def test_no_memory_in_the_optimiser_saves_no_half_update(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    monkeypatch.setattr(made.optimizer, "step", full)
    with pytest.raises(OutOfMemory, match="during optimiser"):
        made.run()
    assert not checkpoints(tmp_path / CHECKPOINT_FOLDER)


@pytest.mark.parametrize("stage", ["losses", "pictures"])
def test_no_memory_in_a_validation_ends_in_advice_as_well(stage, tmp_path):
    """The whole picture is decoded there, not a crop of it: it is where memory runs out first."""
    held_out = prepared_pairs(1, seed=9, names="held out")
    plain = parts()[0].decode
    made = trainer(tmp_path, validation=held_out, validate_every=2, preview_steps=2, ema=0.9,
                   objective=None if stage == "pictures" else ALL,
                   decode=lambda z: plain(z) if stage == "losses" and z.requires_grad else full())  # fmt: skip
    with pytest.raises(OutOfMemory, match="Out of memory during validation") as error:
        made.run()
    kept = Checkpoint.load(checkpoints(tmp_path / CHECKPOINT_FOLDER)[-1])
    assert kept.step == 2 and equal(kept.lora, weights(made.lora)) and "step_000002" in str(error.value)


# --- before any work --------------------------------------------------------------------------------------------------


class Untouched(SmallDenoiser):
    def __call__(self, *args):
        raise AssertionError("the model was called")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": None, "velocity_weight": 0.0}, "velocity_weight: 0 without an objective"),
        ({"objective": EditObjective(), "velocity_weight": 0.0}, "velocity_weight: 0 without an objective"),
        (
            {"objective": EditObjective((replace(NO_EDIT, weight=0.0),)), "velocity_weight": 0.0},
            "velocity_weight: 0 without",
        ),
        (
            {"objective": EditObjective((LossTerm("multi_negative", PATCHES),))},
            "reads hard_negative, which training makes of the LoRA's own",
        ),
        ({"with_encoders": {}}, "objective: its terms read 'vae/blocks/grid', which is not among the encoders"),
        ({"objective": EditObjective((LossTerm("geometry_match", PATCHES, anchor="src"),))}, "does not read pred"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(denoiser=Untouched(), **options)


def test_conditioning_of_another_number_is_refused():
    from editloss_core.training.settings import TrainingSettings
    from editloss_core.training.trainer import Trainer

    denoiser, pairs = Untouched(), prepared_pairs()
    made = LoRA(denoiser.module, LoRASettings(4, 4.0, layers="all"))
    with pytest.raises(ValueError, match="^conditioning: expected one for each of 4 pairs, got 3"):
        Trainer(denoiser, made, pairs, [None] * 3, TrainingSettings())
    for validation, given in ((pairs, [None] * 5), (pairs, ()), (None, [None])):
        with pytest.raises(ValueError, match="^validation_conditioning: expected one for each of"):
            Trainer(denoiser, made, pairs, [None] * 4, TrainingSettings(), validation=validation,
                    validation_conditioning=given)  # fmt: skip


def test_an_encoder_of_pictures_needs_a_decoder():
    from editloss_core.training.estimate import EstimateObjective

    with pytest.raises(ValueError, match="objective: 'patches/grid' reads pictures; connect a VAE"):
        EstimateObjective(ALL, encoders(), prepared_pairs(), None)
    EstimateObjective(EditObjective((NO_EDIT,)), encoders(), prepared_pairs(), None)


def test_an_encoder_that_the_pairs_were_not_prepared_for_is_named():
    from editloss_core.training.prepare import prepare

    _, vae, _ = parts()
    bare = prepare(prepared_pairs().pairs, vae, {LATENTS: vae})
    with pytest.raises(ValueError, match="expected one of those prepared.*'patches/grid'"):
        trainer(prepared=bare, objective=EditObjective((GEOMETRY,)), denoiser=Untouched())


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_whether_a_run_can_go_on_is_known_without_a_trainer(tmp_path):
    """And so before pictures and captions are encoded."""
    trainer(tmp_path).run()
    path = checkpoints(tmp_path / CHECKPOINT_FOLDER)[-1]
    module = Untouched().module
    lora = LoRASettings(4, 4.0, layers="all")
    assert resumable(path, LoRA(module, lora), settings()).step == 6
    with pytest.raises(CheckpointError, match="its lora is"):
        resumable(path, LoRA(module, replace(lora, rank=8)), settings())
    with pytest.raises(CheckpointError, match="moving average"):
        resumable(path, LoRA(module, lora), settings(ema=0.9))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        resumable(path, LoRA(module, lora), settings())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora": {"rank": 8}}, "its lora is"),
        ({"lora": {"alpha": 8.0}}, "its lora is"),
        ({"optimizer": "prodigy"}, "its optimizer is adamw, this run's is prodigy"),
        ({"ema": 0.9}, "moving average"),
        ({"width": 48}, "made for another model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(changes, message, tmp_path):
    if "prodigy" in changes.values():
        pytest.importorskip("prodigyopt")
    trainer(tmp_path).run()
    other = trainer(tmp_path / "other", **changes)
    start = weights(other.lora)
    with pytest.raises(CheckpointError, match=f"step_000006.safetensors: .*{message}"):
        other.resume(checkpoints(tmp_path / CHECKPOINT_FOLDER)[-1])
    assert equal(start, weights(other.lora)) and other.step == 0


def test_a_folder_with_another_run_is_not_written_over(tmp_path):
    trainer(tmp_path).run()
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="holds checkpoints of another run; resume it or choose another name"):
        trainer(tmp_path, denoiser=Untouched(), seed=1).run()
    assert files == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, NonFinite])
def test_a_run_that_ends_before_its_first_step_can_be_started_again(error, tmp_path):
    """Nothing was learnt, so nothing is kept that would stand in the way."""

    class Stop(Host):
        def check(self):
            raise error("no")

    with pytest.raises(error):
        trainer(tmp_path, host=Stop()).run()
    assert not checkpoints(tmp_path / CHECKPOINT_FOLDER)
    assert trainer(tmp_path).run().steps == 6


def test_a_finished_run_can_be_made_longer(tmp_path):
    trainer(tmp_path, steps=4).run()
    longer = trainer(tmp_path, steps=6)
    longer.resume(checkpoints(tmp_path / CHECKPOINT_FOLDER)[-1])
    longer.run()
    whole = trainer(steps=6)
    whole.run()
    assert equal(weights(longer.lora), weights(whole.lora)) and len(longer.log.steps) == 6
