"""Training: the same seed gives the same bytes, an interrupted run ends as an uninterrupted one, losses go down."""

import copy
import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import (
    ALL,
    GEOMETRY,
    LATENTS,
    NO_EDIT,
    OVERLAY,
    PATCHES,
    Recording,
    SmallDenoiser,
    StopAfter,
    encoders,
    equal,
    indices_of,
    parts,
    prepared_pairs,
    trainer,
    weights,
    without_times,
)

from editloss_core.objective import EditObjective, LossTerm
from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, SET_ASIDE, Checkpoint, checkpoints
from editloss_core.runs.log import RunLog
from editloss_core.training.flow import Timesteps
from editloss_core.training.host import Host
from editloss_core.training.settings import OPTIMIZERS
from editloss_core.training.trainer import metadata

EVERYTHING = {"ema": 0.9, "accumulation": 2, "warmup": 2, "schedule": "cosine", "steps": 7, "batch_size": 3,
              "lora": {"dropout": 0.3, "rank": 4}, "validate_every": 3, "checkpoint_every": 3,
              "estimate_weighting": "inverse_square", "edit_weight": 2.0, "objective_every": 2}  # fmt: skip
BUCKETS = ((32, 32), (32, 48))


def everything(optimizer="adamw", **changes):
    """Options of a run with all features on, over two sizes of pictures, with held-out pairs."""
    options = {"prepared": prepared_pairs(4, BUCKETS), "validation": prepared_pairs(1, seed=9, names="held out")}
    if optimizer == "prodigy":
        options["learning_rate"] = 1.0
    if optimizer == "adamw8bit":  # matrices of 4096 values and more are kept in 8 bits
        options.update(width=256, lora={"dropout": 0.3, "rank": 16})
    return {**EVERYTHING, **options, "optimizer": optimizer, **changes}


def saved(folder):
    return checkpoints(folder / CHECKPOINT_FOLDER)


def same_end(a, b):
    """Whether two trainers that ran are in one state, bit for bit, and so are their logs in memory and on disk."""
    assert equal(weights(a.lora), weights(b.lora))
    assert equal(a.optimizer.state_dict(), b.optimizer.state_dict())
    assert a.average is None or equal(a.average.values, b.average.values)
    assert without_times(a.log) == without_times(b.log)
    assert without_times(RunLog.read(a.folder)) == without_times(RunLog.read(b.folder))
    left, right = (Checkpoint.load(saved(t.folder)[-1]) for t in (a, b))
    assert left.step == right.step and all(
        equal(getattr(left, part), getattr(right, part)) for part in ("lora", "optimizer", "average", "info")
    )


# --- the same again ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_file_and_another_one_another(tmp_path):
    files, ends = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(len(files))  # what happened before does not matter
        torch.rand(len(files) + 1)
        made = trainer(**everything(seed=seed))
        path = tmp_path / f"{len(files)}.safetensors"
        made.run().lora.save(path, metadata(made))
        files.append(path.read_bytes())
        ends.append(weights(made.lora))
    assert files[0] == files[1] and not any(torch.equal(p, ends[2][name]) for name, p in ends[0].items())


def test_global_randomness_is_neither_used_nor_left_changed():
    made = trainer(**everything())
    state = torch.random.get_rng_state()
    made.run()
    assert torch.equal(state, torch.random.get_rng_state())


def test_checkpointing_a_model_with_dropout_changes_nothing():
    """Blocks that are computed again see the same dropout."""
    ends = []
    for checkpointing in (False, True):
        made = trainer(**everything(checkpointing=checkpointing))
        made.run()
        ends.append(weights(made.lora))
    assert equal(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "step, checks", [(4, 0), (3, 0), (4, 2), (3, 2), (7, 2)],
    ids=["between checkpoints", "at a checkpoint", "within a step", "within a validation", "within the last validation"],
)  # fmt: skip
def test_an_interrupted_run_ends_as_an_uninterrupted_one(optimizer, step, checks, tmp_path):
    if OPTIMIZERS[optimizer]:
        pytest.importorskip(OPTIMIZERS[optimizer])
    options = everything(optimizer)
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "halves", host=StopAfter(step, checks), **options).run()
    assert Checkpoint.load(saved(tmp_path / "halves")[-1]).step == step  # what was learnt is kept
    again = trainer(tmp_path / "halves", **options)
    again.resume(saved(tmp_path / "halves")[-1])
    again.run()
    same_end(whole, again)


def test_an_older_checkpoint_leads_to_the_same_end(tmp_path):
    options = everything()
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    trainer(tmp_path / "again", **options).run()
    for path in saved(tmp_path / "again")[1:]:
        path.unlink()
    again = trainer(tmp_path / "again", **options)
    again.resume(saved(tmp_path / "again")[0])
    assert again.step == 3 and [s.step for s in again.log.steps] == [1, 2, 3]
    again.run()
    same_end(whole, again)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(tmp_path):
    """SIGKILL, several times over one run: nothing before the last checkpoint is lost, and the end is the same."""
    import killed_run

    script = Path(killed_run.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "0"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(rows) >= 3, done.stdout  # it was really killed, more than once
    reached = [int(row[1].rsplit(maxsplit=1)[1]) for row in rows]
    every = killed_run.RUN["checkpoint_every"]
    for before, row in zip(reached, rows[1:]):  # the next child begins at most checkpoint_every steps before
        began = row[1].split("step_")[1][:6] if "step_" in row[1] else "0"
        assert before - int(began) <= every, done.stdout
    whole, result = killed_run.run(None)
    last = Checkpoint.load(saved(tmp_path)[-1])
    assert last.step == result.steps
    assert equal(last.average, weights(result.lora)) and equal(last.optimizer, whole.optimizer.state_dict())
    assert without_times(RunLog.read(tmp_path)) == without_times(result.log)


# --- going on, but not as before ---------------------------------------------------------------------------------------


def resumed(folder, step=4, **options):
    """A trainer that stands at a checkpoint of a run of six steps with one every two."""
    if not saved(folder):
        trainer(folder).run()
    again = trainer(folder, **options)
    again.resume(folder / CHECKPOINT_FOLDER / f"step_{step:06d}.safetensors")
    return again


def recaptioned(prepared):
    pairs = tuple(replace(pair, caption="other words") for pair in prepared.pairs)
    return replace(prepared, pairs=replace(prepared.pairs, pairs=pairs))


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradients_every": 1, "validate_every": 3, "preview_steps": 7, "previews": 1, "checkpoint_every": 5, "keep": 9,
          "steps": 60}],
    ids=["nothing", "what only watches"],
)  # fmt: skip
def test_going_on_as_before_leaves_no_notes(changes, tmp_path):
    assert resumed(tmp_path, **changes).notes == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"learning_rate": 0.5}, "learning_rate 0.01 → 0.5"),
        ({"weight_decay": 0.5, "seed": 3}, "seed 0 → 3, weight_decay 0.01 → 0.5"),
        ({"timesteps": Timesteps("shifted")}, "timesteps"),
        ({"objective": EditObjective((NO_EDIT, GEOMETRY))}, "objective"),
        ({"schedule": "cosine", "steps": 9}, 'schedule "constant" → "cosine", steps 6 → 9'),
        ({"prepared": prepared_pairs(crop=16)}, "crop 0 → 16"),
        ({"prepared": prepared_pairs(seed=5)}, "pictures"),
        ({"prepared": recaptioned(prepared_pairs())}, "captions"),
        ({"prepared": replace(prepared_pairs(), encoders={}), "objective": None}, "encoders, objective"),
    ],
)
def test_what_is_not_as_before_is_named(changes, said, tmp_path):
    assert resumed(tmp_path, **changes).notes == [f"resumed with other settings or pairs than before: {said}"]


def test_weight_decay_is_that_of_the_run_that_goes_on(tmp_path):
    ends = []
    for decay in (0.01, 10.0):
        again = resumed(tmp_path / str(decay), weight_decay=decay)
        assert [group["weight_decay"] for group in again.optimizer.param_groups] == [decay]
        again.run()
        kept = Checkpoint.load(saved(again.folder)[-1])
        assert kept.optimizer["param_groups"][0]["weight_decay"] == decay == kept.info["settings"]["weight_decay"]
        ends.append(sum(p.square().sum() for p in weights(again.lora).values()))
    assert ends[1] < 0.9 * ends[0]


def test_going_back_sets_the_later_checkpoints_aside(tmp_path):
    """They are of a branch that was given up: the next one to go on must not do so from there."""
    again = resumed(tmp_path, 2, learning_rate=0.5, host=StopAfter(3), checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert [p.stem for p in saved(tmp_path)] == ["step_000002", "step_000003"]
    aside = tmp_path / CHECKPOINT_FOLDER / SET_ASIDE
    assert sorted(p.stem for p in aside.iterdir()) == ["step_000004", "step_000006"]
    assert Checkpoint.load(aside / "step_000006.safetensors").info["settings"]["learning_rate"] == 0.01


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    again = resumed(tmp_path)
    half = tmp_path / CHECKPOINT_FOLDER / f".{uuid.uuid4().hex}.tmp"
    half.write_bytes(b"half")
    again.run()
    assert not half.exists()


def test_a_lora_says_how_many_steps_were_done(tmp_path):
    again = resumed(tmp_path, 6, steps=2)
    again.run()
    assert again.notes == ["nothing was left to train: step_000006.safetensors is of step 6, steps is 2"]
    said = {name: json.loads(text) for name, text in metadata(again).items()}
    assert said["editloss_settings"]["steps"] == 6
    pairs = again.prepared.pairs
    assert (said["editloss_pictures"], said["editloss_captions"]) == (pairs.digest, pairs.captions_digest)
    assert said["editloss_encoders"] == {n: i.fingerprint for n, i in again.prepared.encoders.items()}


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", [NO_EDIT, GEOMETRY, OVERLAY], ids=lambda term: term.name)
def test_overfitting_one_pair_drives_a_term_down_alone(term):
    one = prepared_pairs(1)
    made = trainer(prepared=one, validation=one, objective=EditObjective((term,)), velocity_weight=0.0, steps=60,
                   validate_every=60, gradients_every=0)  # fmt: skip
    end = made.run().log.validations[-1]
    assert end.terms_base[term.name] > 0.005 and end.terms[term.name] < 0.5 * end.terms_base[term.name]


def test_overfitting_one_pair_drives_all_terms_down_together():
    one = prepared_pairs(1)
    made = trainer(prepared=one, validation=one, steps=80, validate_every=80, gradients_every=0, lora={"rank": 8})
    end = made.run().log.validations[-1]
    assert end.velocity < 0.7 * end.velocity_base
    for name, value in end.terms.items():
        assert value < 0.7 * end.terms_base[name], name


def test_only_the_lora_is_trained():
    denoiser = SmallDenoiser()
    kept = {name: p.clone() for name, p in denoiser.module.state_dict().items()}
    made = trainer(denoiser=denoiser)
    start, result = weights(made.lora), made.run()
    assert equal(kept, dict(denoiser.module.state_dict())) and not made.lora.attached
    assert all(not torch.equal(start[name], p) for name, p in weights(result.lora).items())
    assert all(p.grad is None for p in (*made.lora.parameters(), *denoiser.module.parameters()))


def test_a_dropped_caption_is_the_pairs_own_empty_one():
    prepared, empty = prepared_pairs(), [torch.full((2,), float(i)) for i in range(4)]

    def told(**changes):
        denoiser = Recording()
        made = trainer(denoiser=denoiser, prepared=prepared, objective=None, steps=40, checkpoint_every=0, **changes)
        made.run()
        batches = [made._batch(number) for number in range(40)]
        return [(i, c) for batch, call in zip(batches, denoiser.calls_made) for i, c in zip(batch, call[3])]

    for i, c in told(caption_dropout=1.0, dropped=empty):
        assert c is empty[i]
    own, mixed = told(), told(caption_dropout=0.25, dropped=empty)
    gone = [c is empty[i] for i, c in mixed]
    assert all(g or torch.equal(c, kept) for g, (_, c), (_, kept) in zip(gone, mixed, own)), "the rest is as it was"
    assert 10 <= sum(gone) <= 30 and len(gone) == 80, "a quarter of 80, three standard deviations either way"
    with pytest.raises(ValueError, match="dropped: expected one for each of 4 pairs, got 0"):
        trainer(caption_dropout=0.1)
    with pytest.raises(ValueError, match="dropped: expected one for each of 0 pairs, got 4"):
        trainer(dropped=empty)


# --- a step, by hand --------------------------------------------------------------------------------------------------

GATED = EditObjective(
    (NO_EDIT, LossTerm("geometry_match", PATCHES, name="high", weight=0.5, dist="l2", t_min=0.5),
     LossTerm("overlay_avoidance", LATENTS, name="low", weight=0.7, margin=0.25, t_max=0.5),
     LossTerm("geometry_match", PATCHES, name="watch", weight=0.0, dist="cos"))
)  # fmt: skip


def by_hand(made, call, v, edit_weight):
    """name → (raw, weighted) per sample, with nothing of the trainer: x̂0 is encoded whole, without checkpoints."""
    x_t, t, _, conditioning, _ = call
    indices, level = indices_of(made, conditioning), t[:, None, None, None]
    x0 = made.prepared.after(indices)
    noise = (x_t - (1 - level) * x0) / level
    mask = made.prepared.latent_masks(indices)
    weight = 1 + (edit_weight - 1) * mask[:, None]
    velocity = (weight * (v - (noise - x0)) ** 2).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * v.shape[1])
    found = {"velocity": (velocity, velocity)}
    estimates = x_t - level * v
    ae, vae, patches = parts()
    embeddings = made.prepared.embeddings(indices)
    embeddings = embeddings.with_embedding("pred", vae.info, estimates.movedim(1, -1))
    embeddings = embeddings.with_embedding("pred", patches.info, patches(ae.decode(estimates)))
    for report in GATED.evaluate(embeddings).terms:
        term = report.term
        gate = ((t >= term.t_min) & (t <= term.t_max)).float() / t.clamp_min(0.1) ** 2
        found[term.name] = report.per_sample, term.weight * gate * report.per_sample
    return found


def test_losses_gradients_and_shares_equal_autograd_by_hand():
    """Gates, noise-level weights, the mask, accumulation and the gradient in two stages, all at once."""
    denoiser, got = Recording(), {}
    made = trainer(
        denoiser=denoiser, objective=GATED, steps=1, accumulation=3, gradients_every=1, edit_weight=2.5, clip=0.0,
        estimate_weighting="inverse_square", timesteps=Timesteps("uniform", minimum=0.3, maximum=0.8),
    )  # fmt: skip
    for i, layer in enumerate(made.lora.layers):  # B = 0 at the start would hide A's gradient
        layer.up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    hooks = [
        p.register_hook(lambda g, name=name: got.update({name: got.get(name, 0) + g}))
        for name, p in made.lora.named_parameters()
    ]
    start = weights(made.lora)
    log = made.run().log.steps[0]
    for hook in hooks:
        hook.remove()

    with torch.no_grad():
        for name, p in made.lora.named_parameters():
            p.copy_(start[name])
    made.lora.attach()
    total, rows = 0.0, []
    calls = denoiser.calls_made[:]
    for call in calls:
        v = denoiser(*call[:4])
        assert torch.equal(v, call[4])
        found = by_hand(made, call, v, 2.5)
        total = total + sum(weighted.mean() for _, weighted in found.values()) / 3
        for b in range(len(v)):
            norms = {}
            for name, (_, weighted) in found.items():
                g = torch.autograd.grad(weighted.sum(), v, retain_graph=True, allow_unused=True)[0]
                norms[name] = 0.0 if g is None else g[b].norm().item()
            rows.append((found, b, call[1][b].item(), norms))
    gradients = dict(zip(start, torch.autograd.grad(total, list(made.lora.parameters()))))
    made.lora.detach()

    assert log.loss == pytest.approx(total.item(), rel=1e-5)
    for name, g in gradients.items():
        torch.testing.assert_close(got[name], g, rtol=2e-4, atol=1e-6)
    assert log.gradient_norm == pytest.approx(
        torch.cat([g.flatten() for g in gradients.values()]).norm().item(), rel=1e-4
    )
    assert len(log.samples) == len(rows) == 6 and len({s.pair for s in log.samples}) > 2
    for sample, (found, b, t, norms) in zip(log.samples, rows):
        assert sample.t == pytest.approx(t)
        assert set(sample.terms) >= {name for name, (_, weighted) in found.items() if weighted[b] != 0}
        for name, said in sample.terms.items():
            assert said.raw == pytest.approx(found[name][0][b].item(), rel=1e-4, abs=1e-6)
            assert said.weighted == pytest.approx(found[name][1][b].item(), rel=1e-4, abs=1e-6)
            assert said.gradient == pytest.approx(norms[name], rel=1e-3, abs=1e-6)
    assert {s.t < 0.5 for s in log.samples} == {True, False}
    shares = [t["share"] for t in RunLog(None, [log]).by_noise_level(1)[0]["terms"].values()]
    assert sum(shares) == pytest.approx(1.0)


def test_a_sample_outside_a_gate_says_nothing_about_the_term():
    """Else means and active shares would count noise levels at which nothing was learnt."""
    made = trainer(objective=GATED, steps=8, timesteps=Timesteps("uniform", minimum=0.3, maximum=0.8))
    samples = [s for entry in made.run().log.steps for s in entry.samples]
    assert len(samples) == 16
    for sample in samples:
        assert ("high" in sample.terms, "low" in sample.terms) == (sample.t >= 0.5, sample.t <= 0.5)
        assert {"velocity", "no edit", "watch"} <= set(sample.terms)


# --- gates and rhythms ------------------------------------------------------------------------------------------------


def counting_decoder():
    decode, calls = parts()[0].decode, []
    return lambda z: calls.append(len(z)) or decode(z), calls


def test_a_term_outside_its_gate_costs_and_changes_nothing():
    closed = EditObjective(
        (LossTerm("geometry_match", PATCHES, t_max=0.01), LossTerm("no_edit_identity", LATENTS, t_max=0.01))
    )
    ends = []
    for objective in (closed, None):
        decode, calls = counting_decoder()
        own = encoders()
        before = own[PATCHES].calls
        made = trainer(objective=objective, decode=decode, with_encoders=own)
        made.run()
        assert not calls and own[PATCHES].calls == before
        ends.append(weights(made.lora))
    assert equal(*ends)


def test_a_term_of_latents_decodes_nothing():
    decode, calls = counting_decoder()
    trainer(objective=EditObjective((NO_EDIT,)), decode=decode).run()
    assert not calls


def test_two_terms_share_one_decoding():
    decode, calls = counting_decoder()
    trainer(objective=ALL, decode=decode, steps=1, gradients_every=0, batch_size=2).run()
    assert calls == [1, 1]  # each of two samples, which keeps what its way back needs


def test_the_objective_at_every_nth_step():
    made = trainer(steps=7, objective_every=3)
    with_terms = [entry.step for entry in made.run().log.steps if "geometry" in entry.samples[0].terms]
    assert with_terms == [1, 4, 7]
    assert all("velocity" in s.terms for entry in made.log.steps for s in entry.samples)


def test_gradients_are_measured_at_every_nth_step_and_measuring_changes_nothing():
    ends = []
    for interval, expected in ((3, [1, 4]), (0, [])):
        made = trainer(steps=6, gradients_every=interval)
        result = made.run()
        assert [s.step for s in result.log.steps if s.samples[0].terms["velocity"].gradient is not None] == expected
        ends.append(weights(made.lora))
    assert equal(*ends)


def without_a_loss(made, steps):
    """Which of the steps had noise levels outside 0.6…1 only."""
    return [s.step for s in made.log.steps[:steps] if all(sample.t < 0.6 for sample in s.samples)]


def test_a_step_without_any_loss_moves_nothing_and_is_counted():
    """Momentum and weight decay would move the weights without one."""
    gated = EditObjective((replace(NO_EDIT, t_min=0.6), replace(GEOMETRY, weight=0.0)))
    states = []

    class Watch(Host):
        def on_step(self, log, total):
            states.append((weights(made.lora), copy.deepcopy(made.average.values)))

    made = trainer(objective=gated, velocity_weight=0.0, steps=12, host=Watch(), ema=0.9, weight_decay=0.5)
    result = made.run()
    idle = without_a_loss(made, 12)
    assert 0 < len(idle) < 12 and any(step > 1 for step in idle)
    assert [n + 2 for n in range(11) if equal(states[n][0], states[n + 1][0])] == [step for step in idle if step > 1]
    assert [n + 2 for n in range(11) if equal(states[n][1], states[n + 1][1])] == [step for step in idle if step > 1]
    assert [note for note in made.notes if "changed nothing" in note] == [
        f"{len(idle)} of 12 steps changed nothing: velocity_weight is 0, and the noise levels drawn were outside every "
        "term's t_min to t_max"
    ]
    assert result.steps == 12
    plain = trainer(objective=gated, steps=12)
    plain.run()
    assert not plain.notes


def test_every_pair_is_seen_once_per_epoch_in_batches_of_one_size():
    denoiser = Recording()
    made = trainer(denoiser=denoiser, prepared=prepared_pairs(4, BUCKETS), batch_size=3, steps=8, objective=None)
    made.run()
    seen = [indices_of(made, call[3]) for call in denoiser.calls_made]
    for epoch in (seen[:4], seen[4:]):
        assert sorted(sum(epoch, [])) == list(range(8))
    assert seen[:4] != seen[4:]
    for call, indices in zip(denoiser.calls_made, seen):
        assert torch.equal(call[2][0], made.prepared.before(indices)) and len(call[0]) == len(indices)


def test_the_learning_rate_of_each_step_is_logged_and_used():
    made = trainer(steps=6, warmup=2, schedule="cosine", learning_rate=0.1)
    assert [s.learning_rate for s in made.run().log.steps] == pytest.approx(
        [0.1 * made.settings.rate(i) for i in range(6)]
    )


def test_clipping_bounds_the_gradient_and_the_log_says_what_it_was():
    norms = []

    class Watch(Host):
        def on_step(self, log, total):
            norms.append(
                (log.gradient_norm, torch.cat([p.grad.flatten() for p in made.lora.parameters()]).norm().item())
            )

    made = trainer(host=Watch(), clip=0.01)
    made.run()
    assert all(before > 0.01 and after == pytest.approx(0.01, rel=1e-3) for before, after in norms)


# --- the program around -----------------------------------------------------------------------------------------------


def test_the_host_is_told_everything_in_order():
    told = []

    class Ear(Host):
        def check(self):
            told.append("check")

        def before_step(self):
            told.append("before step")

        def on_step(self, log, total):
            told.append(f"step {log.step}/{total}")

        def on_validation(self, log, pictures):
            told.append(f"validation {log.step}: {len(pictures)}")

    held_out = prepared_pairs(1, seed=9, names="held out")
    trainer(host=Ear(), steps=2, validation=held_out, validate_every=2, preview_steps=2).run()
    assert [x for x in told if x != "check"] == [
        "before step", "step 1/2", "before step", "step 2/2", "before step", "validation 2: 1"
    ]  # fmt: skip
    for what in ("step 1/2", "step 2/2", "validation 2: 1"):
        assert "check" in told[told.index(what) - 2 : told.index(what) + 3]


def test_a_host_that_raises_keeps_what_was_learnt(tmp_path):
    """Whatever it raises comes through, the network is as it was, and the checkpoint is that of the last step."""

    class Stopped(Exception):
        pass

    class Stop(Host):
        def on_step(self, log, total):
            if log.step == 3:
                raise Stopped("cancelled")

    denoiser = SmallDenoiser()
    made = trainer(tmp_path, denoiser=denoiser, host=Stop(), checkpoint_every=0)
    with pytest.raises(Stopped, match="^cancelled$"):
        made.run()
    assert not made.lora.attached and not any(m._forward_hooks for m in denoiser.module.modules())
    kept = Checkpoint.load(saved(tmp_path)[-1])
    assert kept.step == 3 and equal(kept.lora, weights(made.lora))
    assert [s.step for s in RunLog.read(tmp_path).steps] == [1, 2, 3]


def test_checkpoints_have_their_rhythm_and_the_end_is_always_kept(tmp_path):
    for every, keep, expected in ((2, 2, [4, 5]), (0, 2, [5]), (5, 9, [5]), (1, 9, [1, 2, 3, 4, 5])):
        folder = tmp_path / f"{every} {keep}"
        result = trainer(folder, steps=5, checkpoint_every=every, keep=keep, objective=None).run()
        assert [Checkpoint.load(p).step for p in saved(folder)] == expected and result.checkpoint == saved(folder)[-1]
        assert not list(folder.rglob("*.tmp"))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = trainer(validation=prepared_pairs(1, seed=9), validate_every=2).run()
    assert result.checkpoint is None and not list(tmp_path.iterdir()) and len(result.log.steps) == result.steps == 6
