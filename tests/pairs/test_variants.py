"""Variants of pairs: what a transform does to each picture, what it leaves out, and how it is drawn."""

import math
from dataclasses import astuple, replace

import pytest
import torch
from PIL import Image

from editloss_core.masks import estimate_mask
from editloss_core.pairs import PairImages, PairSet, Variant, VariantSettings, find_pairs, sided, with_variants
from editloss_core.pairs.variants import METHOD, Tone, content_of, draw

OFF = {"flip": False, "shift": 0.0, "zoom": 1.0, "turn": 0.0, "tone": 0.0}  # of VariantSettings


def images(height=48, width=64, box=(16, 24, 32, 40), seed=0):
    """A pair of random pictures that differ in a box (top, left, bottom, right), and the box as a mask."""
    g = torch.Generator().manual_seed(seed)
    before = torch.rand(height, width, 3, generator=g)
    after, mask = before.clone(), torch.zeros(height, width)
    top, left, bottom, right = box
    after[top:bottom, left:right] = 1.0 - before[top:bottom, left:right]
    mask[top:bottom, left:right] = 1.0
    return PairImages(before, after, mask)


def pair_set(count=3, captions="make it a square", size=(64, 64), **options):
    """Pairs in which one square of a smooth ground changes its colour."""
    g = torch.Generator().manual_seed(1)
    ground = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=g), size=size, mode="bilinear")
    before = ground.movedim(1, -1)
    after, mask = before.clone(), torch.zeros(count, *size)
    for i in range(count):
        rows, columns = slice(24, 44), slice(8 + 4 * i, 28 + 4 * i)
        after[i, rows, columns] = torch.tensor([0.9, 0.1, 0.2])
        mask[i, rows, columns] = 1.0
    return PairSet.from_images(before, after, mask, captions, **options)


# --- one transform for all pictures ----------------------------------------------------------------------------------


def test_a_flip_is_exact_in_before_after_and_mask():
    given = images()
    made = Variant("pair", 1, flip=True).apply(given)
    for part in ("before", "after", "mask"):
        assert torch.equal(getattr(made, part), torch.flip(getattr(given, part), (1,))), part
    assert made.valid is None


@pytest.mark.parametrize("right, down", [(5, 0), (-7, 3), (0, -4)])
def test_a_shift_moves_whole_pixels_and_repeats_the_border(right, down):
    given = images()
    height, width = given.mask.shape
    made = Variant("pair", 1, shift=(down / height, right / width)).apply(given)
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    for part in ("before", "after"):
        assert torch.allclose(getattr(made, part), getattr(given, part)[rows][:, columns], atol=1e-4), part
    there = torch.zeros(height, width)
    there[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = 1.0
    assert torch.equal(made.valid, there)
    assert torch.allclose(made.mask, there * torch.roll(given.mask, (down, right), (0, 1)), atol=1e-4)


def test_a_zoom_and_a_turn_put_a_point_where_arithmetic_does():
    """A blob, found again by its centre of mass."""
    height, width, zoom, turn = 96, 128, 1.1, 10.0
    y, x = torch.meshgrid(torch.arange(height) - 60.0, torch.arange(width) - 80.0, indexing="ij")
    blob = torch.exp(-(x**2 + y**2) / 18.0)
    given = PairImages(blob[..., None].expand(-1, -1, 3), blob[..., None].expand(-1, -1, 3) / 2, (blob > 0.5).float())
    made = Variant("pair", 1, turn=turn, zoom=zoom).apply(given)
    a = math.radians(turn)
    dx, dy = 80 - 63.5, 60 - 47.5
    expected = (
        63.5 + zoom * (math.cos(a) * dx - math.sin(a) * dy),
        47.5 + zoom * (math.sin(a) * dx + math.cos(a) * dy),
    )
    for picture in (made.before[..., 0], made.after[..., 0], made.mask):
        weights = picture / picture.sum()
        centre = (weights.sum(0) @ torch.arange(128.0)).item(), (weights.sum(1) @ torch.arange(96.0)).item()
        assert centre == pytest.approx(expected, abs=0.1)
    assert made.before.sum().item() == pytest.approx(zoom**2 * given.before.sum().item(), rel=1e-3)


def test_what_is_valid_is_what_lies_in_the_picture():
    given = images(40, 60)
    made = Variant("pair", 1, turn=3.0, zoom=0.9, shift=(0.05, -0.1)).apply(given)
    a = math.radians(3.0)
    for row in range(40):
        for column in range(60):
            x, y = column - 29.5 - round(-0.1 * 60), row - 19.5 - round(0.05 * 40)
            source = (
                (math.cos(a) * x + math.sin(a) * y) / 0.9 + 29.5,
                (math.cos(a) * y - math.sin(a) * x) / 0.9 + 19.5,
            )
            inside = -0.5 <= source[0] <= 59.5 and -0.5 <= source[1] <= 39.5
            assert made.valid[row, column] == inside, (row, column)
    assert not (made.mask * (1 - made.valid)).any()


def test_tone_is_alike_before_and_after_and_moves_nothing():
    given = images()
    made = Variant("pair", 1, tone=Tone(0.1, -0.05, 0.02, 0.0, -0.02)).apply(given)
    factors = torch.tensor([0.97, 0.95, 0.93])
    for part in ("before", "after"):
        assert torch.allclose(getattr(made, part), (((getattr(given, part) - 0.5) * 1.1 + 0.5) * factors).clamp(0, 1))
    assert torch.equal(made.mask, given.mask) and made.valid is None


@pytest.mark.parametrize("box", [(0, 0, 12, 10), (30, 50, 48, 64), (2, 20, 46, 30)])
def test_a_shift_keeps_the_edit_in_view(box):
    given = images(box=box)
    for shift in ((0.5, 0.5), (-0.5, -0.5), (0.5, -0.5), (0.02, 0.0)):
        made = Variant("pair", 1, shift=shift, flip=shift[0] > 0).apply(given)
        assert made.mask.sum().item() == pytest.approx(given.mask.sum().item(), rel=1e-4), shift


def test_an_edit_of_the_whole_picture_is_not_shifted_out_of_it():
    given = images(box=(0, 0, 48, 64))
    still = Variant("pair", 1, shift=(0.3, 0.3)).apply(given)
    assert torch.equal(still.after, given.after) and still.valid is None
    assert Variant("pair", 1, shift=(0.5, -0.5), zoom=1.2).apply(given).valid is None


def test_a_pair_without_a_mask_gets_the_estimated_one():
    made = pair_set()
    plain = made.load(0)
    given = PairImages(plain.before, plain.after, None)
    estimated = estimate_mask(given.before[None], given.after[None])[0]
    shifted = Variant("pair", 1, shift=(0.0, 0.5)).apply(given)
    assert estimated.sum() > 300 and shifted.mask.sum().item() == pytest.approx(estimated.sum().item(), rel=1e-4)


def test_nothing_of_what_is_given_is_changed():
    given = images()
    kept = [t.clone() for t in given[:3]]
    Variant("pair", 1, True, 2.0, 1.1, (0.1, 0.1), Tone(0.1)).apply(given)
    assert all(torch.equal(a, b) for a, b in zip(kept, given[:3]))


# --- sets ------------------------------------------------------------------------------------------------------------


def test_every_pair_is_followed_by_its_variants():
    pairs = pair_set(captions=["one", "two", "three"], names=["a", "b", "c"])
    made = with_variants(pairs, VariantSettings(count=3))
    assert [p.name for p in made] == ["a", "a ~1", "a ~2", "b", "b ~1", "b ~2", "c", "c ~1", "c ~2"]
    assert [p.original for p in made] == [*"aaabbbccc"]
    assert [p.caption for p in made] == ["one"] * 3 + ["two"] * 3 + ["three"] * 3
    assert made.targets == tuple(t for t in pairs.targets for _ in range(3))
    assert made.variants == VariantSettings(count=3) and len(set(made.contents)) == 9
    for index in range(3):
        same, own = made.load(3 * index), pairs.load(index)
        assert made.fingerprint(3 * index) == pairs.fingerprint(index) and same.valid is None
        assert all(torch.equal(a, b) for a, b in zip(same[:3], own[:3]))
        assert not torch.equal(made.load(3 * index + 1).after, own.after)
    assert (made.digest, made.captions_digest) == (pairs.digest, pairs.captions_digest)


def test_variants_load_as_their_transform_says():
    made = with_variants(pair_set(), VariantSettings(count=4))
    for index, pair in enumerate(made):
        loaded, plain = made.load(index), made.load(4 * (index // 4))
        expected = pair.variant.apply(plain) if pair.variant else plain
        for part, value in zip(loaded._fields, loaded):
            wanted = getattr(expected, part)
            if part == "references":
                assert value == wanted == ()
                continue
            assert (value is None and wanted is None) or torch.equal(value, wanted), (index, part)


def test_they_do_not_depend_on_the_place_the_name_or_the_company():
    pairs = pair_set(4)
    whole = with_variants(pairs, VariantSettings(count=5, seed=7))
    turned = with_variants(pairs.subset([3, 1]), VariantSettings(count=5, seed=7))
    assert turned.contents == (*whole.contents[15:], *whole.contents[5:10])
    assert [p.variant for p in turned] == [p.variant for p in (*whole.pairs[15:], *whole.pairs[5:10])]
    named = with_variants(pair_set(4, names=[*"wxyz"]), VariantSettings(count=5, seed=7))
    assert named.contents == whole.contents
    other = with_variants(pairs, VariantSettings(count=5, seed=8))
    assert not {*other.contents} & {*whole.contents} - {*pairs.contents}


def test_more_variants_leave_the_first_as_they_were():
    few, many = (with_variants(pair_set(1), VariantSettings(count=n)) for n in (3, 6))
    assert many.contents[:3] == few.contents


def test_what_is_drawn_lies_within_the_settings_and_each_changes_its_own():
    settings = VariantSettings(count=400, shift=0.2, zoom=1.25, turn=4.0, tone=0.1)
    drawn = [draw("a", "", "content", n, settings) for n in range(1, 401)]
    down, right = (torch.tensor([v.shift[axis] for v in drawn]) for axis in (0, 1))
    zoom, turn = torch.tensor([v.zoom for v in drawn]), torch.tensor([v.turn for v in drawn])
    tones = torch.tensor([v.tone for v in drawn])
    for values, low, high in (
        (right, -0.2, 0.2), (down, -0.05, 0.05), (zoom.log(), -math.log(1.25), math.log(1.25)), (turn, -4.0, 4.0),
        (tones[:, 0], -0.1, 0.1), (tones[:, 1], -0.1, 0.1), (tones[:, 2:].flatten(), -0.05, 0.05),
    ):  # fmt: skip
        assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high
        assert abs(values.mean()) < 0.06 * (high - low)
    assert [v.flip for v in drawn] == [True, False] * 200
    still = [draw("a", "", "content", n, replace(settings, turn=0.0)) for n in range(1, 401)]
    assert still == [replace(v, turn=0.0) for v in drawn]
    off = [draw("a", "", "content", n, VariantSettings(**OFF)) for n in (1, 2)]
    assert off == [Variant("a", 1), Variant("a", 2)]


def test_the_content_is_that_of_the_transform():
    variant = draw("a", "", "content", 1, VariantSettings())
    assert content_of("content", variant) == content_of("content", replace(variant, of="b", number=5))
    others = [replace(variant, zoom=1.01), replace(variant, flip=False), replace(variant, tone=Tone())]
    assert len({content_of("content", v) for v in (variant, *others)} | {content_of("else", variant)}) == 5
    assert METHOD == "variants 1" and len(astuple(variant)) == 7


@pytest.mark.parametrize("settings", [None, VariantSettings(count=1)])
def test_none_changes_nothing(settings):
    pairs = pair_set()
    made = with_variants(pairs, settings)
    assert made.pairs == pairs.pairs and made.contents == pairs.contents and made.variants == settings


def test_variants_of_variants_and_taken_names_are_refused():
    pairs = pair_set(2, names=["a", "a ~1"])
    with pytest.raises(ValueError, match="a ~1: variants would have these names"):
        with_variants(pairs, VariantSettings(count=2))
    made = with_variants(pair_set(), VariantSettings(count=2))
    with pytest.raises(ValueError, match="got variants already"):
        with_variants(made, VariantSettings(count=2))


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("count", 0, "count: expected a whole number >= 1, got 0"),
        ("count", 2.0, "count: expected a whole number >= 1, got 2.0"),
        ("flip", 1, "flip: expected true or false, got 1"),
        ("shift", 0.6, "shift: expected a number >= 0 and <= 0.5, got 0.6"),
        ("zoom", 0.9, "zoom: expected a number >= 1 and <= 2, got 0.9"),
        ("turn", -1.0, "turn: expected a number >= 0 and <= 45, got -1.0"),
        ("tone", float("nan"), "tone: expected a number >= 0 and <= 0.5, got nan"),
        ("seed", "a", "seed: expected a whole number, got 'a'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value, said):
    with pytest.raises(ValueError) as caught:
        VariantSettings(**{name: value})
    assert str(caught.value) == said


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption",
    ["move the lamp to the left", "the rightmost chair", "turn it clockwise", "rotate counterclockwise", "Mirror the room",
     "replace the sign", "write HELLO on the wall", 'make it say "OPEN"', "change the logo", "remove the text", "the Left-hand cup",
     "把左边的椅子换成凳子", "删除右侧的灯", "把墙上的字去掉", "顺时针旋转", "stell den linken Stuhl nach rechts", "a word on it"],
)  # fmt: skip
def test_a_caption_that_speaks_of_sides_or_writing_is_not_mirrored(caption):
    assert sided(caption)
    made = with_variants(pair_set(2, [caption, "make it a stool"]), VariantSettings(count=4))
    assert [p.variant.flip for p in made if p.variant] == [False] * 3 + [True, False, True]


@pytest.mark.parametrize(
    "caption",
    ["replace the chair with a stool", "a bright, upright lamp", "copyright", "assign a sword", "leftover food", "把椅子换成凳子",
     "design a fright mask", "it's a cat's bed", "replace the chair in the middle"],
)  # fmt: skip
def test_others_are(caption):
    assert not sided(caption)


# --- held-out pairs and batches --------------------------------------------------------------------------------------


def test_held_out_pairs_ask_for_no_variants_and_variants_are_not_split():
    pairs = replace(pair_set(6), variants=VariantSettings(count=3))
    training, held = pairs.split(2, seed=3)
    assert training.variants == VariantSettings(count=3) and held.variants is None
    made = with_variants(training, training.variants)
    assert len(made) == 12 and not {p.original for p in made} & {p.name for p in held}
    with pytest.raises(ValueError, match="hold_out: expected pairs without variants; split first"):
        made.split(2)


@pytest.mark.parametrize("count, batch_size", [(6, 4), (5, 5), (7, 3), (4, 1)])
def test_an_epoch_is_all_variants_and_no_batch_has_two_of_a_pair(count, batch_size):
    made = with_variants(pair_set(count), VariantSettings(count=8))
    for epoch in range(5):
        batches = made.batches(batch_size, 0, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(8 * count))
        for batch in batches:
            names = [made[i].original for i in batch]
            assert len(set(names)) == len(names)
    assert made.batches(batch_size, 0, 1) != made.batches(batch_size, 0, 2)


def test_with_fewer_pairs_than_a_batch_holds_they_come_evenly():
    made = with_variants(pair_set(2), VariantSettings(count=6))
    for batch in made.batches(4, 0, 0):
        assert sorted(made[i].original for i in batch) == ["pair 1", "pair 1", "pair 2", "pair 2"]


def test_files_are_transformed_as_tensors_are(tmp_path):
    pairs = pair_set(2)
    for index, pair in enumerate(pairs):
        loaded = pairs.load(index)
        for part, pixels in zip(("before", "after", "mask"), loaded):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray((pixels * 255).round().byte().numpy()).save(tmp_path / part / f"{pair.name}.png")
    found = with_variants(find_pairs(tmp_path, default_caption="edit"), VariantSettings(count=2))
    assert [p.name for p in found] == ["pair 1", "pair 1 ~1", "pair 2", "pair 2 ~1"]
    assert found[1].after == found[0].after == tmp_path / "after" / "pair 1.png"
    assert found.called(3, "before") == "before/pair 2.png"
    expected = found[1].variant.apply(found.load(0))
    assert torch.equal(found.load(1).after, expected.after) and torch.equal(found.load(1).mask, expected.mask)
