"""What is neither a right edit nor one of the four failures of an object, edits of the whole picture, and pictures of other sizes."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from editloss_core.demo.scenes import draw
from editloss_core.verdict.judge import FAILURES, judge

SCENES = (0, 1)


def pair(seed):
    example = draw(seed, "replace", "chair", "stool")
    return example, torch.maximum(example.old_mask, example.new_mask)


def jpeg(picture, quality):
    buffer = io.BytesIO()
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).float() / 255


def sized(picture, height, width):
    planes = picture.permute(2, 0, 1)[None] if picture.ndim == 3 else picture[None, None]
    planes = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return planes[0].permute(1, 2, 0) if picture.ndim == 3 else planes[0, 0]


def noise(seed, cells):
    """Noise of so many cells on a side: what a network gives whose weights are random, or whose latents were not denoised."""
    values = torch.randn(1, 3, cells, cells, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.25 * F.interpolate(values, size=(128, 128))[0].permute(1, 2, 0)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Unusable, and what only looks like it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SCENES)
@pytest.mark.parametrize("cells", [128, 32, 16])
def test_noise_is_unusable_and_shows_no_old_object(seed, cells):
    example, mask = pair(seed)
    found = judge(example.before, noise(seed, cells), example.after, mask)
    assert found.verdict == "unusable" and found.measures["room seen"] < 0.3, found.measures
    assert float(found.maps["old object"].max()) == 0 and found.scores["overlay"] == found.scores["no edit"] == 0
    assert judge(example.before, noise(seed, cells), None, mask).verdict == "unusable"


@pytest.mark.parametrize("seed", SCENES)
def test_another_scene_and_a_place_with_neither_object_are_unusable(seed):
    example, mask = pair(seed)
    for output in (draw(seed + 10, "replace", "chair", "table").before, example.background):
        found = judge(example.before, output, example.after, mask)
        assert found.verdict == "unusable", found.measures
        assert float(found.maps["old object"].max()) == 0
    assert found.measures["room seen"] > 0.8 and max(found.measures["old seen"], found.measures["new seen"]) < 0.3


@pytest.mark.parametrize("seed", SCENES)
@pytest.mark.parametrize("colour", [(1.6, 0.5, 0.5), (0.3, 0.3, 0.3)], ids=["red", "dark"])
def test_the_old_object_repainted_is_no_edit(seed, colour):
    example, mask = pair(seed)
    layer = example.old_mask[..., None]
    output = example.before * (1 - layer) + (example.before * torch.tensor(colour)).clamp(0, 1) * layer
    found = judge(example.before, output, example.after, mask)
    assert found.verdict == "no edit", found.measures
    where = F.interpolate(example.old_mask[None, None], size=found.maps["old object"].shape, mode="area")[0, 0] > 0.9
    assert float(found.maps["old object"][where].mean()) > 0.4


def test_old_and_new_side_by_side_are_an_overlay():
    example, mask = pair(1)
    beside = torch.roll(example.new_mask, -45, 1)[..., None]
    output = example.before * (1 - beside) + torch.roll(example.after, -45, 1) * beside
    found = judge(example.before, output, example.after, mask)
    assert found.verdict == "overlay" and found.scores["no edit"] < 0.5, found.measures


# ---------------------------------------------------------------------------------------------------------------------
# Edits of the whole picture
# ---------------------------------------------------------------------------------------------------------------------

WHOLE = {
    "gamma": lambda x: x**0.7,
    "brighter": lambda x: (x + 0.25).clamp(0, 1),
    "a little brighter": lambda x: (x + 0.1).clamp(0, 1),
    "night": lambda x: x * 0.4,
    "warmer": lambda x: (x * torch.tensor([1.12, 1.0, 0.85])).clamp(0, 1),
    "grey": lambda x: x.mean(-1, keepdim=True).expand(-1, -1, 3),
    "negative": lambda x: 1 - x,
}


@pytest.mark.parametrize("edit", WHOLE)
def test_an_edit_of_the_whole_picture_is_judged_as_far_as_it_can_be(edit):
    before = draw(0, "replace", "chair", "stool").before
    after = WHOLE[edit](before)
    white = torch.ones(before.shape[:2])
    for mask in (None, white):
        assert judge(before, after, after, mask).verdict == "good"
    assert judge(before, jpeg(after, 85), after).verdict == "good"
    assert judge(before, before, after).verdict == "no edit"
    between = judge(before, 0.6 * before + 0.4 * after, after)
    assert between.verdict == "undecided" and between.scores["overlay"] is None, "some of a relighting is no overlay"
    assert any(text.startswith("overlay, distorted") for text in between.unanswered)
    assert judge(before, noise(0, 32), after).verdict == "unusable"


@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_taking_noise_away_is_an_edit(sigma):
    after = draw(1, "replace", "chair", "stool").before
    before = (after + sigma * torch.randn(after.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert judge(before, after, after).verdict == judge(before, jpeg(after, 85), after).verdict == "good"
    assert judge(before, before, after).verdict == "no edit"


@pytest.mark.parametrize("step", [0.0, 1 / 255])
def test_a_pair_that_hardly_differs_cannot_be_judged_and_is_no_failure(step):
    before = draw(2, "replace", "chair", "stool").before
    after = (before + step).clamp(0, 1)
    for mask in (None, torch.ones(before.shape[:2])):
        for output in (before, after):
            found = judge(before, output, after, mask)
            assert found.verdict == "undecided" and "no visible difference" in found.unanswered[0]
    assert judge(before, noise(0, 32), after).verdict == "unusable"


@pytest.mark.parametrize("task", ["replace", "remove"])
def test_the_after_picture_is_good_with_a_white_mask_and_all_is_answered(task):
    example = draw(1, task, "chair", "stool" if task == "replace" else None)
    found = judge(example.before, example.after, example.after, torch.ones(example.before.shape[:2]))
    assert found.verdict == "good" and set(found.scores.values()) == {0.0} and not found.unanswered
    assert found.notes == ("The mask leaves no surroundings; where the edit belongs was estimated.",)
    assert judge(example.before, example.before, example.after, torch.ones(128, 128)).verdict == "no edit"


# ---------------------------------------------------------------------------------------------------------------------
# Other sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (127, 128), (130, 128), (128, 126)])
def test_an_output_of_another_size_is_judged(size):
    example, mask = pair(0)
    good = judge(example.before, sized(example.after, *size), example.after, mask)
    assert good.verdict == "good", good.measures
    assert good.notes == (f"The output picture was resized from {size[1]} x {size[0]} to 128 x 128 pixels.",)
    assert judge(example.before, sized(example.before, *size), example.after, mask).verdict == "no edit"
    half = sized(0.5 * example.before + 0.5 * example.after, *size)
    assert judge(example.before, half, example.after, mask).verdict == "overlay"


@pytest.mark.parametrize(
    "cut", [(slice(1, -1), slice(None)), (slice(None), slice(0, 126)), (slice(2, None), slice(None))]
)
def test_an_output_that_was_cropped_is_laid_on_the_before_picture(cut):
    """As a model does that takes multiples of 16 pixels; resized alone it would be a picture that moved."""
    example, mask = pair(1)
    found = judge(example.before, example.after[cut], example.after, mask)
    assert found.verdict == "good" and found.measures["background"] < 0.03, found.measures


def test_masks_and_after_pictures_of_another_size():
    example, mask = pair(0)
    found = judge(example.before, example.after, sized(example.after, 256, 256), sized(mask, 64, 64))
    assert found.verdict == "good" and found.mask.shape == (128, 128)
    assert [note.split(" was")[0] for note in found.notes] == ["The after picture", "The mask"]


KONTEXT = [
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
]  # fmt: skip


@pytest.mark.parametrize("size", [(1024, 768), (1536, 1024), (1000, 1000), (750, 1000)])
def test_the_size_that_kontext_takes_fits_common_photographs(size):
    from editloss_core.verdict.sizes import check_proportions

    nearest = min(KONTEXT, key=lambda s: abs(s[0] / s[1] - size[0] / size[1]))
    check_proportions("output", nearest, size)


@pytest.mark.parametrize(
    "size, wanted",
    [((100, 128), (128, 128)), ((512, 512), (512, 524)), ((40, 20), (20, 40)), ((752, 1392), (1080, 1920))],
)
def test_other_proportions_are_named_with_both_sizes(size, wanted):
    from editloss_core.verdict.sizes import check_proportions

    with pytest.raises(ValueError, match=f"{wanted[1]} x {wanted[0]} pixels or the like, got {size[1]} x {size[0]}"):
        check_proportions("output", size, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Which verdict wins
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "over, measures, wins",
    [
        ((), {}, "good"),
        (("overlay", "distorted"), {"old edges": 0.16, "shape": 0.9}, "overlay"),  # 2 lines, twice; 2.25 lines
        (("overlay", "distorted"), {"old edges": 0.09, "shape": 1.2}, "distorted"),
        (("distorted", "collateral change"), {"shape": 0.6, "background": 0.3}, "collateral change"),
        (("distorted", "collateral change"), {"shape": 1.0, "background": 0.1}, "distorted"),
        # what looks like a ghost is the distortion's; what changed around it, too, if nothing has farther off
        (("overlay", "distorted"), {"old edges": 0.9, "shape": 0.5, "like old": 0.29}, "distorted"),
        (("overlay", "distorted"), {"old edges": 0.09, "shape": 1.2, "like old": 0.31}, "overlay"),
        (("distorted", "collateral change"), {"shape": 0.6, "background": 0.05, "tint": 0.1}, "collateral change"),
        (("overlay",), {"old edges": 0.09, "like old": 0.1}, "overlay"),
        (("distorted", "collateral change"), {"shape": 0.6, "background": 0.3, "away": 0.03}, "distorted"),
        (("distorted", "collateral change"), {"shape": 0.6, "background": 0.3, "away": 0.04}, "collateral change"),
        (("no edit", "overlay", "collateral change"), {"old edges": 1.0, "background": 0.4}, "no edit"),
        (("unusable", "no edit", "overlay"), {"old edges": 1.0}, "unusable"),
    ],
)
def test_the_failure_that_is_furthest_over_its_line_wins(over, measures, wins):
    from editloss_core.verdict.judge import MEASURES
    from editloss_core.verdict.scores import decide

    scores = {failure: 0.9 if failure in over else 0.1 for failure in FAILURES}
    known = {**dict.fromkeys(MEASURES), **measures}
    assert decide(scores, known) == wins
    assert (
        decide({**scores, "distorted": None}, known) == ("undecided" if wins == "good" else wins) or "distorted" in over
    )


# ---------------------------------------------------------------------------------------------------------------------
# Colours: a tint is a change, a palette is a codec
# ---------------------------------------------------------------------------------------------------------------------


def in_colours(picture, colours, dithered):
    image = Image.fromarray((picture.numpy() * 255).round().astype("uint8"))
    few = image.quantize(colours)
    few = image.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG) if dithered else few
    return torch.from_numpy(np.array(few.convert("RGB"))).float() / 255


@pytest.mark.parametrize("dithered", [False, True], ids=["plain", "dithered"])
@pytest.mark.parametrize("colours", [32, 64, 128])
def test_few_colours_are_a_codecs_doing(colours, dithered):
    example, mask = pair(SCENES[0])
    grain = 0.02 * torch.randn(*example.before.shape, generator=torch.Generator().manual_seed(0))
    before, after = ((t + grain).clamp(0, 1) for t in (example.before, example.after))  # as a photograph has it
    good, unedited = (judge(before, in_colours(t, colours, dithered), after, mask) for t in (after, before))
    assert (good.verdict, unedited.verdict) == ("good", "no edit")
    (note,) = good.notes
    assert re.fullmatch(r"The output has \d+ colours; before and after were brought to these.", note)
    both = judge(before, in_colours((before + after) / 2, colours, dithered), after, mask)
    assert both.verdict == "overlay"


@pytest.mark.parametrize(
    "tint", [(0.8, 1.0, 1.15), (1.15, 1.0, 0.8), (1.0, 0.85, 1.0)], ids=["cold", "warm", "magenta"]
)
def test_a_region_in_other_light_is_a_collateral_change(tint):
    example, mask = pair(SCENES[0])
    output = example.after.clone()
    output[:50, :50] = (output[:50, :50] * torch.tensor(tint)).clamp(0, 1)
    output = torch.where(mask[..., None] > 0.5, example.after, output)
    found = judge(example.before, output, example.after, mask)
    assert found.verdict == "collateral change" and found.measures["tint"] > 0.02
    assert judge(example.before, example.after, example.after, mask).measures["tint"] < 0.005
