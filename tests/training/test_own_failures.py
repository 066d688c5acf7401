"""Own failures: outputs that the judge fails are the role hard_negative of their pair, and stay so when a run goes on."""

import shutil
from dataclasses import replace

import pytest
import torch
from small import (
    ALL,
    GEOMETRY,
    LATENTS,
    NO_EDIT,
    PATCHES,
    SmallDenoiser,
    StopAfter,
    conditioning,
    encoders,
    indices_of,
    parts,
    prepared_pairs,
    trainer,
)
from test_trainer import everything, same_end, saved

from editloss_core.hard_negatives import HardNegativeBuffer, dequantize_image, image_key
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.losses import multi_negative_ranking_loss
from editloss_core.objective import EditObjective, LossTerm
from editloss_core.runs.log import OWN_FAILURES
from editloss_core.training.gradients import NonFinite
from editloss_core.training.own_failures import FOLDER
from editloss_core.training.settings import TrainingSettings
from editloss_core.training.trainer import Trainer

FROM_PICTURES = LossTerm("multi_negative", PATCHES, name="failed", dist="l2", margin=5.0)
FROM_LATENTS = LossTerm("multi_negative", LATENTS, name="failed latents", dist="l2", margin=5.0)
FAILED = EditObjective((FROM_PICTURES, FROM_LATENTS))
LOOKS = {"own_failures_every": 2, "rollout_steps": 2, "own_failures_kept": 2}


class Chooses(SmallDenoiser):
    """Its velocity leads from any state straight to a picture of the pair: the after picture of those in ``good``, the before
    picture of the others. The LoRA has no effect."""

    def __init__(self, run_on, good=()):
        super().__init__()
        self.prepared, self.good, self.asked = run_on, good, []

    def __call__(self, x_t, t, references, conditioning):
        own = indices_of(self, conditioning)
        x0 = torch.cat([(self.prepared.after if i in self.good else self.prepared.before)([i]) for i in own])
        self.asked.append((own, torch.is_grad_enabled()))
        v = (x_t - x0) / t.reshape(-1, 1, 1, 1)
        return v + 0 * super().__call__(x_t, t, references, conditioning)


def choosing(good, folder=None, prepared=None, **changes):
    prepared = prepared or prepared_pairs()
    denoiser = Chooses(prepared, good)
    run = trainer(
        folder, prepared=prepared, denoiser=denoiser, **{"objective": FAILED, "batch_size": 4, **LOOKS, **changes}
    )
    denoiser.conditioning = run.conditioning
    return run


def embedded(run, name, index, pictures):
    """As preparation does it, written anew: whole for latents, the crop for pictures."""
    _, vae, patches = parts()
    if name == LATENTS:
        return vae.embed(pictures)
    top, left, height, width = run.prepared.crops[index][:4]
    return patches.embed(pictures[:, top : top + height, left : left + width])


def expected(run, name, batch, x0_hat, negatives):
    """The term's value per pair of a batch; ``negatives``: pair → pictures ``[K, H, W, 3]``."""
    found = []
    for x, i in zip(x0_hat, batch):
        images = run.prepared.pairs.load(i)
        pred = parts()[0].decode(run.prepared.vae.unscaled(x[None]))
        if name == LATENTS:
            pred = x[None].movedim(1, -1)
        else:
            top, left, height, width = run.prepared.crops[i][:4]
            pred = parts()[2](pred[:, top : top + height, left : left + width])
        z = [embedded(run, name, i, p) for p in (images.after[None], negatives.get(i, images.before[None]))]
        single = run.prepared.embeddings([i], [name])
        found.append(
            multi_negative_ranking_loss(
                pred, z[0], list(z[1][:, None]), 5.0, "l2", weights=single.token_weights(name)
            ).item()
        )
    return found


def test_failures_become_the_negatives_of_their_pair_and_before_pictures_stand_in(tmp_path):
    prepared = prepared_pairs(crop=16)
    run = choosing((1, 2), tmp_path, prepared, steps=3)
    run.run()
    looked = [own for own, gradients in run.denoiser.asked if not gradients]
    assert sorted(map(tuple, looked)) == sorted(
        2 * [(i,) for i in range(4)]
    )  # two passes for each of the batch, at one step
    stored = HardNegativeBuffer(tmp_path / FOLDER)
    entries = stored.entries()
    keys = [image_key(prepared.pairs.load(i).before) for i in (0, 3)]
    assert sorted(e.key for e in entries) == sorted(keys)
    assert {(e.step, e.note) for e in entries} == {(3, f"no edit of {prepared.pairs[i].name}") for i in (0, 3)}
    assert all(e.score >= 0.5 and e.dtype == "uint8" for e in entries)
    pictures = {i: dequantize_image(stored.draw(key)) for i, key in zip((0, 3), keys)}
    for i, picture in pictures.items():
        assert (picture[0] - prepared.pairs.load(i).before).abs().max() < 0.03

    batch = [3, 0, 1, 2]
    x0_hat = prepared.after(batch) + 0.1 * torch.randn(4, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    report = run.objective(x0_hat, batch, torch.full((4,), 0.5))
    for term, name in zip(report.terms, (PATCHES, LATENTS)):
        assert term.per_sample.tolist() == pytest.approx(expected(run, name, batch, x0_hat, pictures), rel=1e-4)


def test_the_newest_are_kept_in_order_and_again_where_they_are_fewer():
    run = trainer(objective=FAILED, **LOOKS)
    pictures = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    src = run.prepared.embeddings([0, 1], [LATENTS]).get("src", LATENTS)

    def negatives():
        return run.failures.embeddings([0, 1], LATENTS, src)

    def of(k):
        return embedded(run, LATENTS, 0, dequantize_image(pictures[k : k + 1]))[0]

    for step, (k, first, second) in enumerate(((0, 0, 0), (1, 1, 0), (1, 1, 0), (2, 2, 1))):
        run.failures.hold(0, judged_as(pictures[k]), step)
        found = negatives()
        assert found.shape == (2, 2, *src.shape[1:])
        assert torch.equal(found[1], src[1].expand_as(found[1]))
        assert torch.allclose(found[0, 0], of(first), atol=1e-6) and torch.allclose(found[0, 1], of(second), atol=1e-6)


def judged_as(picture):
    from editloss_core.training.own_failures import Judged

    return Judged("overlay", picture, 0.7)


def test_where_all_is_good_nothing_is_kept(tmp_path):
    run = choosing(range(4), tmp_path, steps=5, batch_size=1)
    run.run()
    assert not (tmp_path / FOLDER).exists()
    looks = [e for e in run.log.events if e.event == OWN_FAILURES]
    assert [(e.step, e.notes, e.info["failed"]) for e in looks] == [(s, ("0 of 1 outputs failed",), {}) for s in (3, 5)]
    assert "own failures: 0 of 2 outputs failed" in run.notes


def test_the_log_and_the_notes_say_what_failed_and_what_it_costs(tmp_path):
    run = choosing((1,), tmp_path, steps=4, own_failures_every=3)
    assert any(
        "own failures at every 3. step: 2 passes without gradients each time, on average 0.67 a step" in note
        and "up to 4 pictures, 0.0123 MB" in note
        for note in run.notes
    )
    run.run()
    assert "own failures: 3 of 4 outputs failed: no edit 3" in run.notes
    assert not run.lora.attached


def test_nothing_is_written_without_a_folder_and_the_end_is_the_same(tmp_path):
    runs = [trainer(folder, objective=FAILED, steps=3, batch_size=1, **LOOKS) for folder in (None, tmp_path)]
    for run in runs:
        run.run()
    assert (tmp_path / FOLDER).is_dir() and runs[0].log.steps and runs[0].failures.folder is None
    assert [s.loss for s in runs[0].log.steps] == [s.loss for s in runs[1].log.steps]


def mixed():
    return EditObjective((*ALL.terms, replace(FROM_PICTURES, weight=0.5), FROM_LATENTS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a run that was not stopped, its options)."""
    options = everything(objective=mixed(), accumulation=1, batch_size=2, **{**LOOKS, "own_failures_kept": 1})
    run = trainer(tmp_path_factory.mktemp("whole"), **options)
    run.run()
    return run, options


def test_a_run_that_was_stopped_within_a_look_ends_as_one_that_was_not(whole, tmp_path):
    run, options = whole
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, host=StopAfter(4, checks=4), **options).run()
    again = trainer(tmp_path, **options)
    again.resume(saved(tmp_path)[-1])
    assert again.step == 4
    again.run()
    same_end(run, again)
    same_failures(run, again)


def test_from_an_older_checkpoint_later_failures_are_not_known(whole, tmp_path):
    run, options = whole
    shutil.copytree(run.folder, tmp_path / "again")
    first, *later = saved(tmp_path / "again")
    for path in later:
        path.unlink()
    again = trainer(tmp_path / "again", **options)
    again.resume(first)
    assert again.step == 3
    again.run()
    same_end(run, again)
    same_failures(run, again)


def same_failures(a, b):
    left, right = (
        [(e.key, e.content, e.step, e.note) for e in HardNegativeBuffer(t.folder / FOLDER).entries()] for t in (a, b)
    )
    assert left == right and len({step for _, _, step, _ in left}) > 1


def test_what_lies_beyond_a_variant_s_pictures_is_not_judged():
    prepared = prepared_pairs()
    valid = torch.ones(32, 32)
    valid[:, 28:] = 0
    where = next(i for i in range(4) if not prepared.masks[i][:, 28:].any())
    load = prepared.pairs.load

    class Beyond:
        def __getattr__(self, name):
            return getattr(prepared.pairs, name)

        def __getitem__(self, index):
            return prepared.pairs[index]

        def load(self, index):
            return load(index)._replace(valid=valid)

    from editloss_core.training.own_failures import judged

    output = load(where).after.clone()
    output[:, 28:] = 1 - output[:, 28:].round()
    assert judged(prepared, where, output, "").picture is not None
    assert judged(replace(prepared, pairs=Beyond()), where, output, "").said == "good"


def test_an_output_that_is_not_finite_stops_the_run():
    run = trainer(objective=FAILED, decode=lambda z: parts()[0].decode(z) * (float("nan") if len(z) == 1 and not z.requires_grad else 1), **LOOKS)  # fmt: skip
    with pytest.raises(NonFinite, match="own failures at step 3: the output for the pair 'pair .' has NaN"):
        run.run()


def test_validation_leaves_the_terms_out_and_says_so():
    held_out = prepared_pairs(1, seed=9, names="held out")
    run = trainer(objective=mixed(), steps=3, validate_every=3, validation=held_out, **LOOKS)
    assert any(note.startswith("failed, failed latents: left out of validation") for note in run.notes)
    run.run()
    assert set(run.log.validations[-1].terms) == {"no edit", "geometry", "overlay"}
    assert set(run.log.steps[-1].samples[0].terms) >= {"failed", "failed latents"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="'failed' reads hard_negative.*set own_failures_every above 0"):
        trainer(objective=FAILED)
    with pytest.raises(ValueError, match="^own_failures_every: 2 samples outputs that no loss reads"):
        trainer(objective=EditObjective((NO_EDIT, GEOMETRY)), **LOOKS)
    with pytest.raises(ValueError, match="^own_failures_every: expected less than the 6 steps of the run, got 6"):
        trainer(objective=FAILED, own_failures_every=6)
    with pytest.raises(ValueError, match="^own_failures_kept: expected a whole number >= 1"):
        TrainingSettings(own_failures_kept=0)
    denoiser = SmallDenoiser()
    made = LoRA(denoiser.module, LoRASettings(4, 4.0, layers="all"))
    with pytest.raises(ValueError, match="^own_failures_every: 2 needs pictures of outputs; give a decoder"):
        Trainer(
            denoiser, made, prepared_pairs(), conditioning(4), TrainingSettings(steps=6, own_failures_every=2),
            objective=EditObjective((FROM_LATENTS,)), encoders=encoders(),
        )  # fmt: skip
