"""Edits of the whole picture (light, colour, noise, blur, style) train without a mask, and the audit says the same of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F

from editloss_core.encoders.vae import VAEEncoder
from editloss_core.negatives import OverlaySettings
from editloss_core.pair_audit.audit import audit
from editloss_core.pair_audit.flawed import handle
from editloss_core.pairs import PairProblems, VariantSettings, find_pairs, with_variants
from editloss_core.training.prepare import prepare

HEIGHT, WIDTH = 160, 208


def picture(seed):
    """A smooth ground with shapes on it, floats."""
    random = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH, 3))
    for cells in (3, 9, 25):
        coarse = Image.fromarray(random.integers(0, 255, (cells, cells, 3), np.uint8))
        total += np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), float) / 255
    return 0.2 + 0.6 * total / 3


def noisy(sigma):
    return lambda x: x + np.random.default_rng(7).normal(0, sigma, x.shape)


def eight_bits(x):
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def blurred(x, radius=2.0):
    return np.asarray(Image.fromarray(eight_bits(x)).filter(ImageFilter.GaussianBlur(radius))) / 255


def saved(quality):
    def again(x):
        file = io.BytesIO()
        Image.fromarray(eight_bits(x)).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file)) / 255

    return again


def same(x):
    return x


def lit(x):
    """From one side."""
    return x * np.linspace(0.6, 1.2, x.shape[1])[None, :, None]


EDITS = {  # name: (to the before picture, to the after picture)
    "brighter by 0.05": (same, lambda x: x + 0.05),
    "brighter by 0.10": (same, lambda x: x + 0.10),
    "darker": (same, lambda x: 0.7 * x),
    "warmer": (same, lambda x: x * [1.12, 1.0, 0.85]),
    "tungsten to daylight": (lambda x: x * [1.0, 0.9, 0.7], same),
    "denoised 0.04": (noisy(0.04), same),
    "denoised 0.05": (noisy(0.05), same),
    "denoised 0.10": (noisy(0.10), same),
    "grain": (same, noisy(0.05)),
    "relit": (same, lit),
    "grey": (same, lambda x: x.mean(-1, keepdims=True).repeat(3, -1)),
    "sketch": (same, lambda x: 1 - 4 * np.abs(x - blurred(x)).mean(-1, keepdims=True).repeat(3, -1)),
}
UNEDITED = {"the same": same, **{f"JPEG {q}": saved(q) for q in (95, 80, 50)}, "a grey level": lambda x: x + 1 / 255}


def write(folder, before, after, count=2):
    for part, change in (("before", before), ("after", after)):
        (folder / part).mkdir(parents=True)
        for seed in range(count):
            Image.fromarray(eight_bits(change(picture(seed)))).save(folder / part / f"p{seed}.png")
    return folder


def vae():
    return VAEEncoder(lambda x: F.avg_pool2d(x, 8), "vae/pool", "pool", 8)


def prepared(pairs, **options):
    codec = vae()
    return prepare(pairs, codec, {codec.info.name: codec}, **options)


@pytest.mark.parametrize("name", EDITS)
def test_prepare_and_audit_take_them(tmp_path, name):
    pairs = find_pairs(write(tmp_path, *EDITS[name]), default_caption="enhance the photo")
    alone = prepare(pairs, vae(), estimate_missing_masks=False)  # flow matching alone
    assert alone.masks == (None, None) and alone.notes == ()
    made = prepared(pairs)
    without = [pair.name for pair, mask in zip(pairs, made.masks) if mask is None]
    count = "1 pair" if len(without) == 1 else f"{len(without)} pairs"
    expected = f"in {count} no region stands out ({', '.join(without)}): the whole picture is"
    assert [note.startswith(expected) for note in made.notes] == ([True] if without else [])
    weights = made.embeddings([0]).token_weights("vae/pool/grid")
    assert made.masks[0] is not None or weights is None or bool((weights == 1).all())
    found = audit(tmp_path, default_caption="enhance the photo")
    assert found.ok, found.text()


def test_what_everything_else_makes_of_them(tmp_path):
    """Overlays, crops, variants and a cache, in which the note is found again."""
    pairs = find_pairs(write(tmp_path / "pairs", *EDITS["brighter by 0.10"]), default_caption="enhance the photo")
    options = {"overlay": OverlaySettings(kinds=("blend",)), "crop": 96, "cache_folder": tmp_path / "cache"}
    made, again = prepared(pairs, **options), prepared(pairs, **options)
    assert made.notes == again.notes and len(made.notes) == 1
    for one in (made, again):
        assert one.masks == (None, None)
        overlay = one.embeddings([0]).get("overlay", "vae/pool/grid")[0, 0]
        before, after = (one.embeddings([0]).get(role, "vae/pool/grid")[0] for role in ("src", "gt"))
        share = (overlay - before) / (after - before)
        assert 0.3 < share.min() and share.max() < 0.7, "a blend everywhere"
    variants = with_variants(pairs, VariantSettings(count=4))
    shown = prepared(variants)
    assert len(shown) == 8 and shown.masks == (None,) * 8
    assert shown.notes[0].startswith("in 2 pairs no region stands out (p0, p1)")


@pytest.mark.parametrize("name", UNEDITED)
@pytest.mark.parametrize("estimating", [True, False])
def test_copies_are_refused_by_both(tmp_path, name, estimating):
    write(tmp_path, same, UNEDITED[name])
    found = audit(tmp_path, default_caption="enhance the photo")
    assert {(f.kind, f.severity) for f in found.findings} == {("no edit", "error")}
    with pytest.raises(PairProblems) as caught:
        prepare(find_pairs(tmp_path, default_caption="x"), vae(), estimate_missing_masks=estimating)
    assert [f.kind for f in caught.value.findings] == ["no edit", "no edit"]


@pytest.mark.parametrize("name", ["relit", "denoised 0.05", "warmer"])
def test_none_is_left_out_beside_pairs_with_objects(tmp_path, name):
    """A set of several kinds of edits: what changes no region is not unedited; a copy is."""
    before, after = EDITS[name]
    write(tmp_path, before, after, 5)
    for seed in range(5, 10):
        x = picture(seed)
        y = x.copy()
        y[40:100, 60:130] = np.random.default_rng(seed).uniform(size=3)
        for part, pixels in (("before", x), ("after", x if seed == 9 else y)):
            Image.fromarray(eight_bits(saved(90)(pixels) if part == "after" else pixels)).save(
                tmp_path / part / f"p{seed}.png"
            )
        (tmp_path / "after" / f"p{seed}.txt").write_text("paint a box")
    pairs = find_pairs(tmp_path, default_caption="enhance the photo")
    found = handle(pairs)
    assert [(flaw.name, flaw.kind) for flaw in found.found] == [("p9", "unedited")] and found.left_out == ("p9",)


def test_a_white_mask_is_the_other_way_out(tmp_path):
    write(tmp_path, same, saved(80))
    (tmp_path / "mask").mkdir()
    for seed in range(2):
        Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "mask" / f"p{seed}.png")
    made = prepared(find_pairs(tmp_path, default_caption="x"))
    assert all(bool((mask == 1).all()) for mask in made.masks) and made.notes == ()


def test_a_small_edit_needs_no_mask_where_nothing_reads_one(tmp_path):
    """Too small for a region to be estimated: 2 × 3 of 160 × 208 pixels."""

    def spot(x):
        x = x.copy()
        x[40:42, 60:63] = 1
        return x

    pairs = find_pairs(write(tmp_path, same, spot), default_caption="add a dot")
    assert len(prepare(pairs, vae(), estimate_missing_masks=False)) == 2
    (note,) = prepared(pairs).notes
    assert note.startswith("in 2 pairs no region stands out (p0, p1)")
    assert [f.kind for f in audit(tmp_path, default_caption="add a dot").findings] == ["tiny edit", "tiny edit"]


def test_an_object_is_still_a_region(tmp_path):
    """Also where the rest was made again by a model, with other noise and a little brighter."""

    def with_box(x):
        x = noisy(0.02)(x) + 0.012
        x[40:100, 60:130] = (0.9, 0.2, 0.1)
        return x

    pairs = find_pairs(write(tmp_path, same, with_box), default_caption="add a red box")
    box = torch.zeros(HEIGHT, WIDTH)
    box[40:100, 60:130] = 1
    for mask in prepared(pairs).masks:
        assert (mask * box).sum() / box.sum() > 0.95 and mask.mean() < 1.3 * box.mean()
