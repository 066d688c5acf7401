"""Variants of pairs in training: prepared regions, the loss, the cache, the split, and a run."""

from dataclasses import replace

import pytest
import torch
from small import Recording, encoders, parts, pictures, trainer
from test_config import FULL
from test_prepare import Raw, broken, named, scene, vae

from editloss_core.negatives import OverlaySettings
from editloss_core.pairs import PairSet, VariantSettings, find_pairs, with_variants
from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER
from editloss_core.training.config import PairsSection, ValidationSection
from editloss_core.training.flow import velocity_loss
from editloss_core.training.prepare import describe_variants, expected_bytes, prepare
from editloss_core.training.run import load_pairs

SETTINGS = VariantSettings(count=4, seed=1)
OVERLAY = OverlaySettings(kinds=("blend",))


def small_pairs(count=3, caption="make it a square"):
    before, after, mask = pictures(count, 64, 64)
    return PairSet.from_images(before, after, mask, caption, min_size=16)


def prepared(settings=SETTINGS, **options):
    made = with_variants(small_pairs(), settings)
    return prepare(made, parts()[1], encoders(), overlay=OVERLAY, **options)


# --- what is prepared ------------------------------------------------------------------------------------------------


def test_prepared_pictures_regions_and_overlays_are_those_of_the_variants():
    pairs = with_variants(scene(), SETTINGS)
    codec, raw = vae(), Raw()
    made = prepare(pairs, codec, named(raw), overlay=OVERLAY)
    for i in range(len(pairs)):
        images = pairs.load(i)
        torch.testing.assert_close(made.after([i]), codec.latents(images.after[None]))
        torch.testing.assert_close(made.before([i]), codec.latents(images.before[None]))
        assert torch.equal(made.masks[i], (images.mask * 255).round() / 255)
        assert (made.valid[i] is None) == (images.valid is None)
        overlay = made.embeddings([i]).get("overlay", raw.info.name)[0, 0]
        far = torch.nn.functional.max_pool2d(images.mask[None, None], 11, 1, 5)[0, 0] == 0
        torch.testing.assert_close(overlay[far], images.before[far])
        inside = images.mask > 0.99
        share = (overlay - images.before)[inside].norm() / (images.after - images.before)[inside].norm()
        assert 0.3 < share < 0.7, "a cross-dissolve of this variant's own pictures"
    assert sum(v is not None for v in made.valid) >= 6


def test_a_latent_counts_when_it_and_its_neighbours_are_of_pictures_alone():
    made = prepare(with_variants(scene(), SETTINGS), vae())
    indices = range(len(made))
    found = made.latent_valid(indices)
    assert found.shape == (12, 12, 16) and 0 < found.mean() < 1
    for i in indices:
        valid = torch.ones(96, 128) if made.valid[i] is None else made.valid[i]
        for row in range(12):
            for column in range(16):
                around = valid[max(0, 8 * row - 8) : 8 * row + 16, max(0, 8 * column - 8) : 8 * column + 16]
                assert found[i, row, column] == bool((around > 0).all()), (i, row, column)
    assert made.latent_valid([0, 4, 8]) is None


def test_where_there_is_no_picture_no_mask_counts():
    made = prepare(with_variants(scene(masks=False), SETTINGS), vae(), estimate_missing_masks=False)
    assert made.masks == (None,) * 12
    masks = made.pixel_masks(range(12))
    for i in range(12):
        assert torch.equal(masks[i], torch.ones(96, 128) if made.valid[i] is None else made.valid[i].float())
    estimated = prepare(with_variants(scene(masks=False), SETTINGS), vae())
    for i in range(12):
        assert estimated.masks[i].sum() > 500
        if estimated.valid[i] is not None:
            assert not (estimated.masks[i] * (1 - estimated.valid[i].float())).any()


def test_the_second_time_nothing_is_encoded(tmp_path):
    pairs = with_variants(scene(), SETTINGS)
    done = []
    first = prepare(pairs, vae(), named(Raw()), tmp_path, overlay=OVERLAY, progress=lambda *now: done.append(now))
    assert done[-1] == (12 * 6, 12 * 6)  # a mask, two latents and three embeddings each
    done.clear()
    pairs = with_variants(scene().subset([2, 0]), SETTINGS)
    again = prepare(
        pairs, broken(vae()), named(broken(Raw())), tmp_path, overlay=OVERLAY, progress=lambda *now: done.append(now)
    )
    assert done == [] and torch.equal(again.after(range(4)), first.after(range(8, 12)))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(again.valid, first.valid[8:]))
    prepare(scene(), broken(vae()), named(broken(Raw())), tmp_path, overlay=OVERLAY)  # the pairs themselves


def test_a_pair_without_an_edit_is_reported_once():
    pairs = scene(masks=False)
    same = replace(pairs.pairs[1], after=pairs.pairs[1].before + 1e-4)
    pairs = replace(pairs, pairs=(pairs.pairs[0], same, pairs.pairs[2]))
    with pytest.raises(ValueError) as caught:
        prepare(with_variants(pairs, SETTINGS), vae())
    assert [f.files for f in caught.value.findings] == [("p01 before", "p01 after")]


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_velocity_loss_is_the_mean_over_what_counts_and_has_no_gradient_elsewhere():
    g = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(3, 4, 5, 6, generator=g) for _ in range(2))
    predicted.requires_grad_(True)
    valid = (torch.rand(3, 5, 6, generator=g) > 0.4).float()
    mask = torch.rand(3, 5, 6, generator=g)
    valid[2] = 0.0
    for weight in (1.0, 2.5):
        loss = velocity_loss(predicted, target, mask, weight, valid)
        for i in range(2):
            errors = weights = 0.0
            for row in range(5):
                for column in range(6):
                    w = valid[i, row, column] * (1 + (weight - 1) * mask[i, row, column])
                    errors += w * (predicted - target)[i, :, row, column].square().mean()
                    weights += w
            torch.testing.assert_close(loss[i], errors / weights)
        assert loss[2] == 0.0
        (gradient,) = torch.autograd.grad(loss.sum(), predicted)
        assert torch.equal((gradient != 0).all(1), valid > 0) and torch.equal((gradient != 0).any(1), valid > 0)
    torch.testing.assert_close(
        velocity_loss(predicted, target, valid=torch.ones(3, 5, 6)), velocity_loss(predicted, target)
    )
    with pytest.raises(ValueError, match=r"valid: expected \[3, 5, 6\] like the latents, got \[3, 4, 6\]"):
        velocity_loss(predicted, target, valid=torch.ones(3, 4, 6))


# --- training --------------------------------------------------------------------------------------------------------


def test_a_run_sees_every_variant_and_learns_from_pictures_alone():
    pairs = prepared()
    denoiser = Recording()
    made = trainer(denoiser=denoiser, prepared=pairs, steps=6, batch_size=2, gradients_every=0)
    result = made.run()
    steps = result.log.steps
    names = [sample.pair for step in steps for sample in step.samples]
    assert sorted(names) == sorted(pair.name for pair in pairs.pairs)
    numbers = {pair.name: i for i, pair in enumerate(pairs.pairs)}
    for step, (x_t, t, _, _, v) in zip(steps, denoiser.calls_made):
        indices = [numbers[sample.pair] for sample in step.samples]
        assert len({pairs.pairs[i].original for i in indices}) == 2
        level = t[:, None, None, None]
        noise = (x_t - (1 - level) * pairs.after(indices)) / level
        error = (v - (noise - pairs.after(indices))).square().mean(1)
        valid = pairs.latent_valid(indices)
        valid = torch.ones_like(error) if valid is None else valid
        expected = (valid * error).sum((1, 2)) / valid.sum((1, 2))
        logged = torch.tensor([sample.terms["velocity"].raw for sample in step.samples])
        torch.testing.assert_close(logged, expected.detach(), rtol=1e-3, atol=1e-5)
    assert any(p.abs().max() > 0 for layer in made.lora.layers for p in [layer.up])


def test_a_run_that_goes_on_says_that_its_variants_are_others(tmp_path):
    trainer(tmp_path, prepared=prepared(), steps=2, checkpoint_every=1).run()
    for settings, said in (
        (SETTINGS, []),
        (replace(SETTINGS, turn=3.0), ["resumed with other settings or pairs than before: variants"]),
        (None, ["resumed with other settings or pairs than before: variants"]),
    ):
        again = trainer(tmp_path, prepared=prepared(settings), steps=2)
        again.resume(tmp_path / CHECKPOINT_FOLDER / "step_000001.safetensors")
        assert again.notes == said


def test_a_run_without_variants_that_goes_on_with_them_says_so(tmp_path):
    first = trainer(tmp_path, prepared=prepared(None), steps=2, checkpoint_every=1)
    del first.info["variants"]  # as checkpoints were before there were any
    first.run()
    again = trainer(tmp_path, prepared=prepared(), steps=2)
    again.resume(tmp_path / CHECKPOINT_FOLDER / "step_000001.safetensors")
    assert again.notes == ["resumed with other settings or pairs than before: variants"]


def test_held_out_pairs_of_a_config_have_no_variants(tmp_path):
    from editloss_core.demo.scenes import stool_pairs, write_folder

    write_folder(stool_pairs(4, seed=0), tmp_path / "pairs")
    config = replace(
        FULL, pairs=PairsSection("pairs", resolution=64), variants=SETTINGS, validation=ValidationSection(hold_out=1)
    )
    train, watched = load_pairs(config, tmp_path)
    assert len(train) == 12 and len(watched) == 1 and watched.variants is None
    assert watched[0].variant is None and watched[0].name not in {pair.original for pair in train}
    config = replace(config, validation=ValidationSection(hold_out=0, folder="pairs"))
    train, watched = load_pairs(config, tmp_path)
    assert (len(train), len(watched)) == (16, 4) and all(pair.variant is None for pair in watched)
    assert len(find_pairs(tmp_path / "pairs")) == 4


# --- told beforehand -------------------------------------------------------------------------------------------------


def test_memory_and_disk_are_told_as_they_are(tmp_path):
    pairs = with_variants(scene(), replace(SETTINGS, shift=0.4))
    made = prepare(pairs, vae(), None, tmp_path)
    memory, disk = expected_bytes(pairs, channels=4)
    assert memory == pytest.approx(made.nbytes, rel=0.1)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert disk == pytest.approx(written, rel=0.25)


def test_the_description_counts_pairs_and_names_those_that_are_not_mirrored():
    pairs = small_pairs(3, ["left", "make it red", "write A"])
    memory, disk = 7 * 64 * 64 * 24 / 1e6, 4 * 64 * 64 * 24 / 1e6
    assert describe_variants(with_variants(pairs, VariantSettings())) == (
        f"3 pairs × 8 = 24; latents and masks take about {memory:.0f} MB of memory and {disk:.0f} MB of the cache's disk; "
        "2 not mirrored, as their captions speak of sides or writing: pair 1, pair 3"
    )
    assert "mirrored" not in describe_variants(with_variants(pairs, VariantSettings(flip=False)))
