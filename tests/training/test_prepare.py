"""What is computed once: against a few plain lines that do the same, from a cache that is right or not used, and cropped."""

import io
import json
import logging
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from editloss_core.cache import TensorCache
from editloss_core.demo.scenes import stool_pairs, write_folder
from editloss_core.encoders.base import EncoderInfo, PixelEncoder, Preprocess
from editloss_core.encoders.vae import VAEEncoder
from editloss_core.hashing import hash_tensors
from editloss_core.masks import estimate_mask
from editloss_core.negatives import OverlaySettings
from editloss_core.objective import recommended
from editloss_core.pairs import PairProblems, PairSet, find_pairs
from editloss_core.pairs.geometry import Crop, find_crop
from editloss_core.training.memory import OutOfMemory
from editloss_core.training.prepare import prepare

RAW, VAE = "raw/grid", "vae/conv/grid"
OVERLAY = OverlaySettings(kinds=("blend", "old_over_new"))


def vae(seed=0, **options):
    conv = torch.nn.Conv2d(3, 4, 8, 8).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for p in conv.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) / 8)
    return VAEEncoder(conv, "vae/conv", f"conv {seed}", 8, **{"shift": 0.1, "scale": 1.5, **options})


class Raw(PixelEncoder):
    """Pixels as they are, or their mean: what went into an encoder can be read off what came out."""

    def __init__(self, output="grid", preprocess=None, version=""):
        preprocess = preprocess or Preprocess(0, 0, (0.0,) * 3, (1.0,) * 3)
        fingerprint = hash_tensors([], "raw", preprocess.describe(), output, version)
        super().__init__(
            EncoderInfo(f"raw/{output}", preprocess.describe(), fingerprint, output), preprocess, torch.device("cpu")
        )

    def features(self, pixels):
        return pixels.mean((2, 3)) if self.info.output == "global" else pixels


def broken(encoder):
    """The same encoder to look at, but one that must not be run."""

    def fail(*_):
        raise AssertionError("this encoder must not be run")

    encoder.features = encoder.encode = encoder.forward = encoder.from_latents = fail
    return encoder


def named(*encoders):
    return {e.info.name: e for e in encoders}


def scene(count=3, size=(96, 128), masks=True, seed=0):
    """Squares that change their colour on a smooth ground."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.nn.functional.interpolate(
        torch.rand(count, 3, 3, 4, generator=generator), size=size, mode="bilinear"
    ).movedim(1, -1)
    ground = (255 * ground).round() / 255  # else its last bits depend on how many threads torch has just now
    region = torch.zeros(count, *size)
    for i in range(count):
        region[i, 20 + 8 * i : 52 + 8 * i, 30 + 16 * i : 62 + 16 * i] = 1
    before = torch.where(region[..., None] > 0, torch.tensor([0.9, 0.1, 0.1]), 0.3 + 0.4 * ground)
    after = torch.where(region[..., None] > 0, torch.tensor([0.1, 0.2, 0.9]), 0.3 + 0.4 * ground)
    return PairSet.from_images(
        before, after, region if masks else None, "turn it blue",
        names=[f"p{seed}{i}" for i in range(count)], resolution=1024,
    )  # fmt: skip


def equal(a, b):
    assert a.crops == b.crops and a.encoders.keys() == b.encoders.keys()
    everything = [range(len(a))] if len(a.pairs.buckets) == 1 else a.pairs.buckets.values()
    for indices in everything:
        assert torch.equal(a.after(indices), b.after(indices)) and torch.equal(a.before(indices), b.before(indices))
        one, two = a.embeddings(indices), b.embeddings(indices)
        assert one.tensors.keys() == two.tensors.keys() and all(
            torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors
        )
        assert (one.grids, one.regions) == (two.grids, two.regions)
        assert (one.mask is None) == (two.mask is None) and (one.mask is None or torch.equal(one.mask, two.mask))


# --- what is computed ------------------------------------------------------------------------------------------------


def test_latents_masks_and_embeddings_by_hand():
    pairs, codec, raw = scene(), vae(), Raw()
    made = prepare(pairs, codec, named(raw, codec), crop=48, overlay=OVERLAY, batch_size=2)
    assert made.downscale == 8 and made.vae is codec and len(made) == 3
    assert made.after([0, 2]).shape == (2, 4, 12, 16) and made.after([0]).dtype == torch.float32
    for i in range(3):
        images, crop = pairs.load(i), made.crops[i]
        torch.testing.assert_close(made.after([i]), codec.latents(images.after[None]))
        torch.testing.assert_close(made.before([i]), codec.latents(images.before[None]))
        assert torch.equal(made.masks[i], images.mask)
        by_hand = images.mask.reshape(12, 8, 16, 8).mean((1, 3))
        torch.testing.assert_close(made.latent_masks([i])[0], by_hand)
        rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)
        embeddings = made.embeddings([i])
        assert torch.equal(embeddings.get("gt", RAW)[0], images.after[rows, columns])
        assert torch.equal(embeddings.get("src", RAW)[0], images.before[rows, columns])
        assert embeddings.get("overlay", RAW).shape == (1, 2, 48, 48, 3)
        torch.testing.assert_close(embeddings.get("gt", VAE), codec(images.after[None]))
        torch.testing.assert_close(embeddings.get("src", VAE), codec(images.before[None]))
        assert embeddings.get("overlay", VAE).shape == (1, 2, 12, 16, 4)
    assert made.reads_latents(VAE) and not made.reads_latents(RAW)
    assert {k: v.shape[0] for k, v in made.embeddings([0, 2]).tensors.items()} == dict.fromkeys(
        made.embeddings([0]).tensors, 2
    )


def test_overlays_show_both_objects_and_nothing_new_elsewhere():
    pairs = scene()
    made = prepare(pairs, vae(), named(Raw()), overlay=OverlaySettings(kinds=("blend",)))
    for i in range(3):
        images, overlay = pairs.load(i), made.embeddings([i]).get("overlay", RAW)[0, 0]
        inside = images.mask > 0
        far = torch.nn.functional.max_pool2d(images.mask[None, None], 9, 1, 4)[0, 0] == 0
        torch.testing.assert_close(overlay[far], images.before[far])
        share = (overlay - images.before)[inside].norm() / (images.after - images.before)[inside].norm()
        assert 0.3 < share < 0.7, "a cross-dissolve of 0.35 to 0.65"


def test_overlays_belong_to_the_pair_not_to_its_place():
    pairs, seeds = scene(), [replace(OVERLAY, seed=s) for s in (0, 1)]
    made = prepare(pairs, vae(), named(Raw()), overlay=OVERLAY)
    alone = prepare(pairs.subset([2, 0]), vae(), named(Raw()), overlay=OVERLAY)
    first, second = made.embeddings([2, 0]).get("overlay", RAW), alone.embeddings([0, 1]).get("overlay", RAW)
    assert torch.equal(first, second)
    drawn = [prepare(pairs, vae(), named(Raw()), overlay=s).embeddings([0]).get("overlay", RAW) for s in seeds]
    assert not torch.equal(*drawn)


def test_without_overlay_there_is_no_such_role():
    made = prepare(scene(), vae(), named(Raw(), vae()))
    assert {role for role, _ in made.embeddings([0]).tensors} == {"gt", "src"}


def test_encoders_that_do_not_read_these_latents_get_pictures():
    pairs = scene()
    fixed, other = vae(image_size=(64, 64)), vae(seed=1)
    for encoder in (fixed, other):
        made = prepare(pairs, vae(), named(encoder), crop=48)
        crop = made.crops[0]
        seen = pairs.load(0).after[None, crop.top : crop.top + 48, crop.left : crop.left + 48]
        assert not made.reads_latents(VAE)
        torch.testing.assert_close(made.embeddings([0]).get("gt", VAE), encoder(seen))
    scaled = vae(scale=2.0)  # reads the same autoencoder's latents, and scales them in its own way
    made = prepare(pairs, vae(), named(scaled), crop=48)
    assert made.reads_latents(VAE)
    torch.testing.assert_close(made.embeddings([0]).get("gt", VAE), scaled(pairs.load(0).after[None]))
    square = scene(size=(64, 64), count=1)
    assert prepare(square, vae(), named(fixed)).reads_latents(VAE), "at the encoder's own size nothing is resized"


def test_missing_masks_are_estimated_or_left_out():
    pairs = scene(masks=False)
    made = prepare(pairs, vae(), named(Raw(), vae()), crop=48)
    images = pairs.load(1)
    assert torch.equal(made.masks[1], estimate_mask(images.before[None], images.after[None])[0])
    without = prepare(pairs, vae(), named(Raw()), crop=48, estimate_missing_masks=False)
    assert without.masks == (None,) * 3 and without.latent_masks([0, 1]) is None
    assert without.crops == (Crop(16, 32, 48, 48),) * 3 and without.embeddings([0]).token_weights(RAW) is None


def test_a_pair_without_a_mask_counts_everywhere_beside_one_that_has_one():
    with_mask, bare = scene(1), scene(1, masks=False, seed=1)
    both = replace(with_mask, pairs=with_mask.pairs + bare.pairs, sizes=with_mask.sizes * 2,
                   contents=with_mask.contents + bare.contents)  # fmt: skip
    made = prepare(both, vae(), named(Raw()), estimate_missing_masks=False)
    masks = made.latent_masks([0, 1])
    assert masks[1].eq(1).all() and not masks[0].eq(1).all() and made.latent_masks([1]) is None


def test_every_encoder_has_the_mask_of_what_it_saw():
    pairs, centre = scene(), Raw("tokens", Preprocess(24, 24, crop=True))
    made = prepare(pairs, vae(), named(Raw(), centre, vae(), Raw("global")), crop=48)
    embeddings = made.embeddings([0, 1, 2])
    for i in range(3):
        crop, whole = made.crops[i], pairs.load(i).mask
        torch.testing.assert_close(embeddings.token_weights(RAW)[i], crop(whole))
        torch.testing.assert_close(embeddings.token_weights(VAE)[i], whole.reshape(12, 8, 16, 8).mean((1, 3)))
        small = crop(whole).reshape(24, 2, 24, 2).mean((1, 3))
        torch.testing.assert_close(embeddings.token_weights("raw/tokens")[i], small.flatten())
    assert embeddings.token_weights("raw/global") is None
    wide = prepare(pairs, vae(), named(centre)).embeddings([0])
    assert wide.regions["raw/tokens"] == (0.0, 0.125, 1.0, 0.875), "the whole picture, of which it sees the middle"


def test_an_objective_runs_on_a_batch():
    pairs, codec, raw = scene(), vae(), Raw()
    made = prepare(pairs, codec, named(codec, raw), crop=48, overlay=OVERLAY)
    for name, encoder in named(codec, raw).items():
        embeddings = made.embeddings([0, 2], [name])
        assert {e for _, e in embeddings.tensors} == {name}
        pred = embeddings.get("src", name).clone().requires_grad_()
        report = recommended(name).evaluate(embeddings.with_embedding("pred", encoder.info, pred))
        report.total.backward()
        assert report.total > 0 and pred.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="^encoder: expected one of those prepared, .* got 'x'"):
        made.embeddings([0], ["x"])


def test_buckets_are_prepared_side_by_side():
    wide, tall = scene(2), scene(2, size=(128, 80), seed=1)
    both = replace(
        wide, pairs=wide.pairs + tall.pairs, sizes=wide.sizes + tall.sizes, contents=wide.contents + tall.contents
    )
    made = prepare(both, vae(), named(Raw(), vae()), crop=96)
    assert made.embeddings([0, 1]).grids == {RAW: (96, 96), VAE: (12, 16)}
    assert made.embeddings([2, 3]).grids == {RAW: (96, 80), VAE: (16, 10)}
    assert made.after([2, 3]).shape == (2, 4, 16, 10)


def test_in_inference_mode_everything_comes_out_ordinary(tmp_path):
    codec = vae()
    codec.encode.requires_grad_(True)  # as where someone forgot to freeze it
    for _ in range(2):  # computed, then read
        with torch.inference_mode():
            made = prepare(scene(), codec, named(Raw(), vae()), tmp_path, crop=48, overlay=OVERLAY)
            embeddings, latents, masks = made.embeddings([0, 1]), made.after([0, 1]), made.masks
        assert not any(m.is_inference() or m.requires_grad for m in masks)
        tensors = [*made.embeddings([0, 1]).tensors.values(), made.after([0]), made.before([0])]
        assert not any(t.is_inference() or t.requires_grad for t in tensors)
        assert embeddings.tensors.keys() and latents.shape == (2, 4, 12, 16)


def test_memory_is_counted():
    made = prepare(scene(), vae(), named(Raw()), crop=48)
    assert made.nbytes == 4 * 3 * (2 * 4 * 12 * 16 + 96 * 128 + 2 * 48 * 48 * 3)


# --- crops -----------------------------------------------------------------------------------------------------------


def boxes(*found, size=(96, 160)):
    mask = torch.zeros(size)
    for top, left, bottom, right in found:
        mask[top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(
    "mask, crop, expected",
    [
        (boxes((40, 60, 60, 90)), 0, (0, 0, 96, 160, 1.0)),
        (boxes((40, 60, 60, 90)), 512, (0, 0, 96, 160, 1.0)),
        (boxes((42, 72, 60, 92)), 48, (32, 64, 48, 48, 1.0)),  # centre (51, 82): 27 and 58 would be ideal
        (boxes((0, 0, 10, 10)), 48, (0, 0, 48, 48, 1.0)),
        (boxes((90, 150, 96, 160)), 48, (48, 112, 48, 48, 1.0)),
        (boxes((10, 20, 40, 52)), 32, (16, 16, 32, 32, 24 * 28 / (30 * 32))),
        (
            boxes((10, 4, 42, 16), (10, 140, 42, 160)),
            48,
            (0, 112, 48, 48, 20 / 32),
        ),  # two objects far apart: one of them
        (boxes((0, 0, 96, 160)), 64, (16, 48, 64, 64, 64 * 64 / (96 * 160))),
        (None, 64, (16, 48, 64, 64, 1.0)),
        (None, 128, (0, 16, 96, 128, 1.0)),
    ],
)
def test_crops_by_hand(mask, crop, expected):
    got = find_crop(mask, (96, 160), crop)
    assert got[:4] == expected[:4]
    assert got.coverage == pytest.approx(expected[4])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 7), st.integers(0, 6), st.floats(0.05, 1.0))
def test_no_other_window_holds_more(seed, rows, columns, crop, share):
    """Against every window there is, on masks of random blocks with soft values."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(16 * rows, 16 * columns, generator=generator)
    mask = mask * (torch.rand(mask.shape, generator=generator) < share)
    mask[0, 0] = 1.0
    got = find_crop(mask, mask.shape, 16 * crop)
    h, w = (min(16 * crop, side) if crop else side for side in mask.shape)
    assert (got.height, got.width) == (h, w) and got.top % 16 == got.left % 16 == 0
    assert 0 <= got.top <= mask.shape[0] - h and 0 <= got.left <= mask.shape[1] - w
    best = max(
        mask[y : y + h, x : x + w].sum().item()
        for y in range(0, mask.shape[0] - h + 1, 16)
        for x in range(0, mask.shape[1] - w + 1, 16)
    )
    assert got(mask).sum().item() == pytest.approx(best, rel=1e-4)
    assert got.coverage == pytest.approx(best / mask.sum().item(), rel=1e-4)


def test_an_edit_that_does_not_fit_gets_a_note():
    made = prepare(scene(), vae(), named(Raw()), crop=16)
    assert len(made.notes) == 3 and made.notes[0].startswith(
        "p00: the crop of 16×16 px holds 25% of the edit; a crop of 48 px"
    )
    assert prepare(scene(), vae(), named(Raw()), crop=48).notes == ()


# --- the cache -------------------------------------------------------------------------------------------------------


def run(folder, pairs=None, codec=None, encoders=None, **options):
    encoders = named(Raw(), vae(), Raw("global")) if encoders is None else encoders
    return prepare(pairs or scene(), codec or vae(), encoders, folder, **{"crop": 48, "overlay": OVERLAY, **options})


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def content(data):
    """(metadata, tensors) of a file: safetensors writes metadata in another order every time."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def contents(folder):
    return {name: content(data) for name, data in files(folder).items()}


def test_a_second_run_touches_no_model_and_no_picture(tmp_path, monkeypatch):
    first = run(tmp_path)
    before = files(tmp_path)
    assert len(before) == 3 * (1 + 1 + 3) and all(name.endswith(".safetensors") for name in before)
    monkeypatch.setattr(PairSet, "load", lambda *_: pytest.fail("no picture needs to be loaded"))
    encoders = named(*map(broken, (Raw(), vae(), Raw("global"))))
    progress = []
    second = run(tmp_path, codec=broken(vae()), encoders=encoders, progress=lambda *a: progress.append(a))
    equal(first, second)
    assert progress == [] and files(tmp_path) == before
    assert second.embeddings([0]).grids == {RAW: (48, 48), VAE: (12, 16)}


def test_in_memory_it_is_the_same_and_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    equal(run(tmp_path / "cache"), run(None))
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_progress_counts_what_is_left_to_do(tmp_path):
    seen = []
    run(tmp_path, progress=lambda *a: seen.append(a))
    total = 3 * (1 + 2 + 3 * 4)
    assert (
        seen[-1] == (total, total)
        and [d for d, _ in seen] == sorted({d for d, _ in seen})
        and {t for _, t in seen} == {total}
    )
    seen.clear()
    run(tmp_path, encoders=named(Raw(), Raw("tokens")), progress=lambda *a: seen.append(a))
    assert seen[-1] == (12, 12)


CHANGES = {
    "overlay settings": (dict(overlay=replace(OVERLAY, seed=1)), {"embeddings": 9}),
    "no overlay": (dict(overlay=None), {"embeddings": 9}),
    "crop": (dict(crop=64), {"embeddings": 6}),  # whole latents stay what they are
    "other weights of an encoder": (
        dict(encoders=named(Raw(version="2"), vae(), Raw("global"))), {"embeddings": 3}
    ),
    "other preprocessing": (
        dict(encoders=named(Raw(preprocess=Preprocess(0, 0)), vae(), Raw("global"))), {"embeddings": 3}
    ),
    "another VAE": (dict(codec=vae(seed=1)), {"latents": 3, "embeddings": 3}),
    "another scale of the VAE": (dict(codec=vae(scale=3.0)), {"latents": 3, "embeddings": 3}),
    "other pictures": (dict(pairs=scene(seed=1)), {"masks": 3, "latents": 3, "embeddings": 9}),
    "another pair more": (dict(pairs=scene(4)), {}),
    "another resolution": (dict(pairs=replace(scene(), resolution=64)), {"masks": 3, "latents": 3, "embeddings": 9}),
    "another caption": (
        dict(pairs=replace(scene(), pairs=tuple(replace(p, caption="other", name=f"n{p.name}") for p in scene()))), {}
    ),
    "another batch size": (dict(batch_size=1), {}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_stale_is_made_again_and_nothing_else(tmp_path, change):
    options, expected = CHANGES[change]
    run(tmp_path)
    before = files(tmp_path)
    made = run(tmp_path, **options)
    after = files(tmp_path)
    assert {n: after[n] for n in before} == before, "what was there stays as it was"
    new = [name.split("/")[0] for name in after.keys() - before.keys()]
    if (
        change == "another pair more"
    ):  # the ground of the others is drawn anew as well, so count only one thing: all four
        assert sorted(set(new)) == ["embeddings", "latents", "masks"]
    else:
        assert {kind: new.count(kind) for kind in set(new)} == expected
    equal(made, run(None, **options))


def test_adding_a_pair_costs_that_pair_alone(tmp_path):
    pairs = scene(4)
    run(tmp_path, pairs=pairs.subset([0, 1, 3]))
    before = files(tmp_path)
    made = run(tmp_path, pairs=pairs)
    assert len(files(tmp_path).keys() - before.keys()) == 5
    equal(made, run(None, pairs=pairs))


def damaged(data, how):
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "empty": b"", "text": b"not a tensor", "cut off": data[:-7], "longer": data + b"x",
        "a bit": data[: start + 1] + bytes([data[start + 1] ^ 4]) + data[start + 2 :],
        "metadata": data.replace(b"about", b"abouT", 1), "format": data.replace(b"editloss-prepared-1", b"editloss-prepared-0"),
    }[how]  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "text", "cut off", "longer", "a bit", "metadata", "format"])
def test_damaged_files_are_made_again(tmp_path, how):
    first = run(tmp_path)
    before = contents(tmp_path)
    for name, data in files(tmp_path).items():
        (tmp_path / name).write_bytes(damaged(data, how))
    second = run(tmp_path)
    equal(first, second)
    assert contents(tmp_path) == before and second.notes[0].startswith("cache: made 15 damaged files again: ")
    assert run(tmp_path, codec=broken(vae())).notes == ()


def test_another_entry_under_a_files_name_is_not_taken_for_it(tmp_path):
    first = run(tmp_path)
    before = contents(tmp_path)
    latents = sorted((tmp_path / "latents").iterdir())
    latents[0].write_bytes(latents[1].read_bytes())
    equal(first, run(tmp_path))
    assert contents(tmp_path) == before


def test_a_file_of_other_numbers_with_a_hash_of_its_own_is_only_as_good_as_its_key(tmp_path):
    """The content hash guards against damage: the metadata say for what the numbers stand."""
    cache = TensorCache(tmp_path)
    cache.put("latents", "k", {"gt": torch.ones(2)}, {"grid": [1, 2]})
    with safe_open(tmp_path / "latents" / "k.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["about"]) == {"grid": [1, 2]} and len(metadata["content"]) == 64
    assert cache.get("latents", "k").tensors["gt"].eq(1).all() and cache.get("latents", "j") is None
    safetensors.torch.save_file({"gt": torch.zeros(2)}, tmp_path / "latents" / "k.safetensors", metadata=metadata)
    assert cache.get("latents", "k") is None and cache.refused == ["latents/k.safetensors"]


class Stopped(BaseException):
    """As a cancel button raises."""


@pytest.mark.parametrize("after", [1, 4, 8, 20, 40])
def test_what_was_done_before_a_cancel_is_kept(tmp_path, after):
    def stop(done, total):
        if done >= after:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path, progress=stop)
    kept = files(tmp_path)
    assert all(name.endswith(".safetensors") for name in kept)
    left = []
    equal(run(tmp_path, progress=lambda done, total: left.append(total)), run(None))
    assert left[0] < 45 or after == 1
    assert {n: d for n, d in files(tmp_path).items() if n in kept} == kept


def test_a_file_that_is_gone_is_named_and_what_came_before_it_is_kept(tmp_path):
    """The third pair's file is gone when it is read: what came before it is kept, and nothing goes on."""
    write_folder(stool_pairs(6, 0), tmp_path / "pairs")
    pairs = find_pairs(tmp_path / "pairs", resolution=64)
    codec, encoder = vae(), Raw("global")
    prepare(pairs, codec, {}, tmp_path / "cache", crop=48)
    pairs[2].after.unlink()
    with pytest.raises(ValueError, match=f"after/{pairs[2].after.name}"):
        prepare(pairs, codec, named(encoder), tmp_path / "cache", crop=48)
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("editloss-ahead")]


def test_the_next_pictures_are_loaded_before_the_encoder_is_done(tmp_path, monkeypatch):
    pairs, loaded, seen = scene(6), [], []
    load = type(pairs).load

    def watched(self, index):
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(type(pairs), "load", watched)

    class Slow(Raw):
        """Waits for the reader: it would wait in vain if pictures were loaded by turns with encoding."""

        def features(self, pixels):
            deadline = time.monotonic() + 30
            while (
                len(loaded) < 6 + 6 + 2 and time.monotonic() < deadline
            ):  # for masks and latents, and now of two pairs
                time.sleep(0.001)
            seen.append(len(loaded))
            return super().features(pixels)

    run(None, pairs, encoders=named(Slow("global")), overlay=None)
    assert seen[0] >= 14


# --- files that change ---


def folder_of(tmp_path, count=4):
    write_folder(stool_pairs(count, 0), tmp_path / "pairs")
    return find_pairs(tmp_path / "pairs", resolution=64)


def exchanged(path, data):
    """Put other bytes in a file's place, and return what was there."""
    old = path.read_bytes()
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)
    return old


def test_a_picture_that_changed_since_the_check_is_kept_under_its_own_key(tmp_path):
    """The folder is checked, a picture is repaired while a model loads, and put back later."""
    pairs, codec, cache = folder_of(tmp_path), vae(), tmp_path / "cache"
    target = pairs[1].after
    first = prepare(pairs, codec).after([1])
    inverted = io.BytesIO()
    Image.fromarray(255 - np.asarray(Image.open(target))).save(inverted, "PNG")
    old = exchanged(target, inverted.getvalue())
    during = prepare(pairs, codec, cache_folder=cache)
    repaired = find_pairs(tmp_path / "pairs", resolution=64)
    assert torch.equal(during.after([1]), prepare(repaired, codec).after([1]))
    assert during.pairs.digest == repaired.digest == during.about()["pictures"] != pairs.digest
    assert during.notes == ("changed since the folder was checked, and read as they are now: " + pairs[1].name,)
    exchanged(target, old)
    later = prepare(find_pairs(tmp_path / "pairs", resolution=64), codec, cache_folder=cache)
    assert torch.equal(later.after([1]), first) and later.notes == () and later.pairs.digest == pairs.digest
    assert len(list((cache / "latents").iterdir())) == 5, "of four pictures as they are, and of one as it was"


@pytest.mark.parametrize("part", ["before", "after", "mask"])
def test_a_picture_that_changes_while_it_is_prepared_ends_it_and_is_not_kept(tmp_path, monkeypatch, part):
    pairs, codec = folder_of(tmp_path), vae()
    target, load = getattr(pairs[2], part), PairSet.load

    def changing(self, index):
        if index == 2:
            exchanged(target, target.read_bytes())  # even if only its time is another
        return load(self, index)

    monkeypatch.setattr(PairSet, "load", changing)
    with pytest.raises(ValueError, match=f"{part}/{target.name}.* has changed since they were checked; start again"):
        prepare(pairs, codec, cache_folder=tmp_path / "cache")
    assert not (tmp_path / "cache" / "latents").exists()


# --- pruning ---------------------------------------------------------------------------------------------------------

DAY = 24 * 3600.0


def filled(folder, count=6, numbers=1000):
    """Entries of all kinds; the first one was of no use for the longest time: ``count`` + 1 days, then a day less each."""
    cache, paths = TensorCache(folder), []
    for i in range(count):
        kind, key = ("masks", "latents", "embeddings")[i % 3], hash_tensors([], str(i))
        cache.put(kind, key, {"x": torch.full((numbers,), float(i))})
        paths.append(folder / kind / f"{key}.safetensors")
        aged(paths[-1], count + 1 - i)
    return paths


def aged(path, days):
    os.utime(path, (time.time() - days * DAY,) * 2)


def size(paths):
    return sum(p.stat().st_size for p in paths)


def test_the_longest_unused_go_until_the_limit_is_kept(tmp_path, caplog):
    paths = filled(tmp_path)
    TensorCache(tmp_path).prune(size(paths))
    assert all(p.exists() for p in paths) and not caplog.records
    with caplog.at_level(logging.INFO):
        TensorCache(tmp_path).prune(size(paths) - size(paths[:2]) + 1)
    assert [p.exists() for p in paths] == [False, False, True, True, True, True]
    assert "removed 2 files" in caplog.text and str(tmp_path) in caplog.text
    TensorCache(tmp_path).prune(0)
    assert not any(p.exists() for p in paths)
    TensorCache(tmp_path / "nowhere").prune(0)
    TensorCache(None).prune(0)


def test_use_counts_not_age(tmp_path):
    paths = filled(tmp_path)
    before = paths[0].read_bytes()
    assert TensorCache(tmp_path).get(paths[0].parent.name, paths[0].stem) is not None
    assert paths[0].read_bytes() == before
    TensorCache(tmp_path).prune(0)
    assert [p.exists() for p in paths] == [True] + [False] * 5


def test_files_of_this_run_stay_even_if_they_are_too_much(tmp_path):
    paths = filled(tmp_path)
    cache = TensorCache(tmp_path)
    cache.get(paths[0].parent.name, paths[0].stem)
    cache.put("latents", "0" * 64, {"x": torch.ones(5)})
    new = tmp_path / "latents" / f"{'0' * 64}.safetensors"
    for path in (paths[0], new):
        aged(path, 9)  # a run of nine days
    cache.prune(0)
    assert paths[0].exists() and new.exists() and not any(p.exists() for p in paths[1:])


def test_what_is_not_ours_is_never_removed(tmp_path):
    (mine,) = filled(tmp_path, 1)
    other, key = mine.parent, mine.stem
    foreign = {
        other / "model.safetensors": mine.read_bytes(),  # a copy under a name of someone's own
        other / f"{'1' * 64}.safetensors": mine.read_bytes(),  # under another key
        tmp_path / "latents" / f"{key}.safetensors": mine.read_bytes(),  # in another kind
        other / f"{'2' * 64}.safetensors": b"notes",
        other / f"{key}.safetensors.bak": b"x",
        other / f"{key.upper()}.txt": b"x",
        tmp_path / f"{key}.safetensors": mine.read_bytes(),
        tmp_path / "photos" / f"{key}.safetensors": mine.read_bytes(),
        other / "below" / f"{key}.safetensors": mine.read_bytes(),
    }
    header = {"format": "somebody-else-1", "kind": other.name, "key": "3" * 64}
    safetensors.torch.save_file({"x": torch.ones(9)}, tmp_path / "theirs", metadata=header)
    foreign[other / f"{'3' * 64}.safetensors"] = (tmp_path / "theirs").read_bytes()
    for path, data in foreign.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        aged(path, 100)
    outside = tmp_path / "outside"
    outside.write_bytes(mine.read_bytes())
    (other / f"{'4' * 64}.safetensors").symlink_to(outside)
    (other / f"{'5' * 64}.safetensors").mkdir()
    TensorCache(tmp_path).prune(0)
    assert not mine.exists()
    assert all(p.read_bytes() == data for p, data in foreign.items())
    assert outside.exists() and (other / f"{'4' * 64}.safetensors").is_symlink()


def test_files_of_an_earlier_format_are_ours(tmp_path):
    (path,) = filled(tmp_path, 1)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "format": "editloss-prepared-0"}
    safetensors.torch.save_file({"x": torch.ones(9)}, path, metadata=metadata)
    aged(path, 9)
    TensorCache(tmp_path).prune(0)
    assert not path.exists()


def test_many_may_prune_and_write_at_once(tmp_path, caplog):
    """Nobody stumbles over a file that another one removed, no file is counted twice, and entries are whole or absent."""
    paths, errors = filled(tmp_path, 60, numbers=10), []

    def work(prune):
        try:
            for i, path in enumerate(paths):
                cache = TensorCache(tmp_path)
                if prune:
                    cache.prune(0)
                else:
                    entry = cache.get(path.parent.name, path.stem)
                    assert entry is None or entry.tensors["x"].eq(i).all()
                    assert not cache.refused
        except BaseException as error:
            errors.append(error)

    with caplog.at_level(logging.INFO):
        threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    kept = sum(p.exists() for p in paths)
    assert sum(int(record.args[0]) for record in caplog.records) == 60 - kept


def test_a_file_that_cannot_be_removed_stops_nobody(tmp_path, monkeypatch, caplog):
    """As on Windows, where another process has it open."""
    paths, unlink = filled(tmp_path, 3), type(tmp_path).unlink

    def refuse(path, *args, **options):
        if path == paths[0]:
            raise PermissionError(13, "in use", str(path))
        unlink(path, *args, **options)

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with caplog.at_level(logging.INFO):
        TensorCache(tmp_path).prune(0)
    assert [p.exists() for p in paths] == [True, False, False] and "removed 2 files" in caplog.text


def test_preparing_prunes_what_others_left(tmp_path, monkeypatch):
    paths = filled(tmp_path)
    run(tmp_path)
    assert all(p.exists() for p in paths), "far below the limit"
    mine = files(tmp_path).keys() - {p.relative_to(tmp_path).as_posix() for p in paths}
    monkeypatch.setattr(TensorCache.prune, "__defaults__", (0,))
    again = run(tmp_path)
    assert files(tmp_path).keys() == mine and again.notes == ()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_pairs_without_an_edit_are_named_before_any_model_runs(tmp_path):
    pairs = scene(4)
    tensors = [replace(p) for p in pairs]
    tensors[1] = replace(tensors[1], after=tensors[1].before + 0.002)
    speck = torch.zeros(2000, 2000)
    speck[5, 5] = 1
    tensors[2] = replace(tensors[2], mask=speck)
    bare = replace(pairs, pairs=tuple([*tensors[:3], replace(tensors[3], mask=None, after=tensors[3].before + 0.002)]))
    with pytest.raises(PairProblems) as caught:
        run(tmp_path, pairs=bare, codec=broken(vae()), encoders=named(broken(Raw())))
    assert {(f.kind, f.files) for f in caught.value.findings} == {
        ("no edit", ("p01 before", "p01 after")), ("mask empty", ("p02 mask",)), ("no edit", ("p03 before", "p03 after")),
    }  # fmt: skip
    assert "nothing is left of it at 128×96 px" in str(caught.value) and "at most 0.5 of 255" in str(caught.value)


def test_pairs_of_a_folder_are_named_by_their_files(tmp_path):
    write_folder(stool_pairs(2), tmp_path)
    small = Image.new("L", (1280, 1280))
    small.putpixel((3, 3), 255)
    masks = sorted((tmp_path / "mask").iterdir())
    small.save(masks[0])
    after = sorted((tmp_path / "after").glob("*.png"))[1]
    pixels = np.asarray(Image.open(tmp_path / "before" / after.name)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(after)
    with pytest.raises(PairProblems) as caught:
        prepare(find_pairs(tmp_path, resolution=128), broken(vae()))
    assert {(f.kind, f.files) for f in caught.value.findings} == {
        ("mask empty", (f"mask/{masks[0].name}",)), ("no edit", (f"before/{after.name}", f"after/{after.name}")),
    }  # fmt: skip
    assert str(caught.value).startswith(f"pairs: 2 problems in {tmp_path} (folders before/ and after/)")


def test_latents_and_embeddings_that_are_not_finite_are_refused_and_not_kept(tmp_path):
    codec, encoder = vae(), Raw()
    codec.encode = lambda x: torch.full((len(x), 4, 12, 16), float("nan"))
    with pytest.raises(
        ValueError, match="^latents of 'vae/conv/grid': expected finite .* pair 'p00'; run it in float32"
    ):
        run(tmp_path, codec=codec)
    assert not (tmp_path / "latents").exists()
    encoder.features = lambda x: x / 0
    with pytest.raises(ValueError, match="^embeddings by 'raw/grid': expected finite numbers, .* pair 'p00'"):
        run(tmp_path, encoders=named(encoder))
    assert not (tmp_path / "embeddings").exists()


def full_above(most, run):
    """``run``, with memory for ``most`` pictures."""

    def limited(x):
        if len(x) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(x)

    return limited


def test_where_memory_is_short_pictures_go_one_at_a_time():
    codec, encoder, done = vae(), Raw(), []
    codec.encode, encoder.features = full_above(1, codec.encode), full_above(1, encoder.features)
    made = run(None, codec=codec, encoders=named(encoder, codec), progress=lambda *at: done.append(at), batch_size=4)
    equal(made, run(None, encoders=named(Raw(), vae()), batch_size=1))
    assert done[-1][0] == done[-1][1] and [d for d, _ in done] == sorted(d for d, _ in done)


@pytest.mark.parametrize(
    "place, words",
    [
        ("latents", r"latents of 'vae/conv/grid' for the pair 'p00', with one picture of 128×96 px at a time. What would "
                    r"help: a resolution of the pairs below 1024, or a smaller VAE; or more of the device left free"),
        ("pictures", r"embeddings by 'raw/grid' for the pair 'p00', with one picture of 48×48 px at a time. What would "
                     r"help: a crop below 48, a resolution .*, or a smaller encoder"),
        ("embeddings of latents", r"embeddings by 'vae/conv/grid' for the pair 'p00', with one picture of 128×96 px"),
    ],
)  # fmt: skip
def test_no_memory_for_one_picture_names_pair_model_and_size(place, words, tmp_path):
    codec, encoder = vae(), Raw()
    if place == "latents":
        codec.encode = full_above(0, codec.encode)
    elif place == "pictures":
        encoder.features = full_above(0, encoder.features)
    else:
        codec.from_latents = full_above(0, codec.from_latents)
    with pytest.raises(OutOfMemory, match=f"^Out of memory while preparing {words}") as error:
        run(tmp_path, codec=codec, encoders=named(encoder, codec), crop=48)
    assert isinstance(error.value.__cause__, torch.cuda.OutOfMemoryError)
    assert (tmp_path / "masks").exists() and (tmp_path / "latents").exists() == (place != "latents")


def test_it_says_what_was_prepared():
    made = prepare(scene(), vae(), named(Raw()), crop=48, overlay=OVERLAY)
    about = made.about()
    assert json.loads(json.dumps(about))["overlay"]["feather"] == OVERLAY.feather
    assert {k: about[k] for k in ("pictures", "captions", "resolution", "crop", "vae", "encoders")} == {
        "pictures": scene().digest, "captions": scene().captions_digest, "resolution": 1024, "crop": 48,
        "vae": vae().info.fingerprint, "encoders": {"raw/grid": Raw().info.fingerprint},
    }  # fmt: skip
    assert prepare(scene(), vae()).about()["overlay"] is None


def test_overlays_that_cannot_be_made_name_the_pair():
    wide = replace(OVERLAY, feather=200.0)
    with pytest.raises(ValueError, match="^overlay: of the pair 'p00': feather: expected less than"):
        run(None, overlay=wide)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(crop=40), "^crop: expected a multiple of 16 pixels, or 0 for the whole picture, got 40"),
        (dict(crop=-16), "^crop: "),
        (dict(crop=16.0), "^crop: "),
        (dict(batch_size=0), "^batch_size: expected a whole number >= 1, got 0"),
        (dict(codec=vae(image_size=64)), "^vae: expected one that keeps the size .* takes 128×96 to 64×64"),
        (dict(encoders={"x": Raw()}), "^encoders: expected 'raw/grid' under its own name, got it as 'x'"),
        (dict(pairs=scene(1).subset([])), "^pairs: expected at least one, got none"),
    ],
)
def test_bad_arguments(options, words):
    options = {"pairs": scene(1), **options}
    if not len(options["pairs"]):
        with pytest.raises(ValueError, match=words):
            prepare(options["pairs"], vae())
        return
    with pytest.raises(ValueError, match=words):
        run(None, **options)


def test_whether_masks_are_estimated_is_part_of_what_is_cached(tmp_path):
    pairs = scene(masks=False)
    options = dict(pairs=pairs, encoders=named(Raw()), overlay=None)
    run(tmp_path, **options)
    equal(run(tmp_path, **options, estimate_missing_masks=False), run(None, **options, estimate_missing_masks=False))
