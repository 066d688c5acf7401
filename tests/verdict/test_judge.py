"""Verdicts on demo scenes, whose exact masks and layers are known, and on the real pairs of ComfyUI's template package."""

import io
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from editloss_core.demo.scenes import draw, flawed
from editloss_core.masks import estimate_mask, oklab
from editloss_core.verdict.alignment import Alignment, align, warp
from editloss_core.verdict.judge import FAILURES, MEASURES, REMEDIES, VERDICTS, judge
from editloss_core.verdict.measures import Whole, fitting_pixels
from editloss_core.verdict.regions import find_regions

SCENES = range(4)


def pair(seed, task="replace", old="chair", new="stool"):
    example = draw(seed, task, old, new)
    return example, torch.maximum(example.old_mask, example.new_mask)


def jpeg(picture, quality):
    buffer = io.BytesIO()
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).float() / 255


def lab(picture):
    return F.interpolate(oklab(picture.permute(2, 0, 1)[None]), scale_factor=1.5, mode="bilinear")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SCENES)
def test_the_target_is_good_and_a_copy_is_no_edit(seed):
    example, mask = pair(seed)
    for given in (mask, None):
        assert judge(example.before, example.after, example.after, given).verdict == "good"
        assert judge(example.before, example.before, example.after, given).verdict == "no edit"


HARMLESS = {
    "jpeg": lambda x: jpeg(x, 60),
    "brighter": lambda x: (x + 0.05).clamp(0, 1),
    "warmer": lambda x: x * torch.tensor([1.04, 1.0, 0.96]),
    "a pixel aside": lambda x: torch.roll(x, (1, 1), (0, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SCENES)
@pytest.mark.parametrize("harmless", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_a_codec_or_a_camera_does_is_no_failure(seed, harmless):
    example, mask = pair(seed)
    found = judge(example.before, harmless(example.after), example.after, mask)
    assert found.verdict == "good", found.measures
    assert judge(example.before, harmless(example.before), example.after, mask).verdict == "no edit"


@pytest.mark.parametrize("seed", SCENES)
def test_both_objects_visible_is_an_overlay(seed):
    example, mask = pair(seed)
    for output in (flawed(example, "overlaid").after, 0.5 * example.before + 0.5 * example.after):
        found = judge(example.before, output, example.after, mask)
        assert found.verdict == "overlay", found.measures


def test_the_share_of_the_old_object_is_measured():
    example, mask = pair(1)
    for share in (0.2, 0.5, 0.7):
        output = share * example.before + (1 - share) * example.after
        measures = judge(example.before, output, example.after, mask).measures
        assert measures["old edges"] == pytest.approx(share, abs=0.05)
        assert measures["unchanged"] == pytest.approx(share, abs=0.02)
        assert measures["progress"] == pytest.approx(1 - share, abs=0.02)
        assert measures["residual"] < 0.05, "a mixture of before and after lies on the way from one to the other"


@pytest.mark.parametrize("sign", (1, -1))
def test_a_ghost_is_found_whether_it_lightens_or_darkens(sign):
    """Also where its edges run the other way: a dark chair that makes the wall lighter."""
    found = 0
    for seed in SCENES:
        example, mask = pair(seed)
        alone = example.old_mask * (1 - example.new_mask)
        output = (example.after + sign * 0.12 * alone[..., None]).clamp(0, 1)
        verdict = judge(example.before, output, example.after, mask)
        assert verdict.measures["old edges"] > 0.08, verdict.measures
        found += verdict.verdict == "overlay"
    assert found == len(SCENES)


def bent(example):
    """The new object in waves of a tenth of its height."""
    rows, columns = (example.new_mask > 0.5).nonzero().unbind(1)
    top, height = int(rows.min()), int(rows.max() - rows.min())
    output = example.after.clone()
    for row in range(top, top + height):
        by = round(0.1 * height * math.sin(2 * math.pi * (row - top) / height * 1.5))
        layer = torch.roll(example.new_mask[row], by, 0)[:, None]
        output[row] = example.background[row] * (1 - layer) + torch.roll(example.after[row], by, 0) * layer
    return output


def shifted(example, by):
    layer = torch.roll(example.new_mask, by, (0, 1))[..., None]
    return example.background * (1 - layer) + torch.roll(example.after, by, (0, 1)) * layer


@pytest.mark.slow
def test_a_bent_object_is_distorted_and_a_shifted_one_is_not():
    good = 0
    for seed in SCENES:
        example, mask = pair(seed)
        wrong = judge(example.before, bent(example), example.after, mask)
        assert wrong.verdict == "distorted", wrong.measures
        found = judge(example.before, shifted(example, (2, 5)), example.after, mask)
        assert found.scores["distorted"] < wrong.scores["distorted"] - 0.3
        assert found.measures["outline in place"] > found.measures["outline"] + 0.1
        assert wrong.measures["residual"] > 0.3
        size = float(example.new_mask.sum()) ** 0.5
        assert found.measures["displaced"] == pytest.approx(29**0.5 / size, rel=0.3)
        good += found.verdict == "good"
    assert good >= len(SCENES) - 2  # pictures of 128 pixels: two scenes lie on a line


@pytest.mark.parametrize("seed", SCENES)
def test_a_changed_room_is_collateral(seed):
    example, mask = pair(seed)
    away = F.max_pool2d(mask[None, None], 25, 1, 12)[0, 0] < 0.5
    output = example.after.clone()
    rows, columns = away.nonzero().unbind(1)
    middle = int(rows[len(rows) // 7]), int(columns[len(rows) // 7])
    y, x = torch.meshgrid(torch.arange(mask.shape[0]), torch.arange(mask.shape[1]), indexing="ij")
    blob = (((y - middle[0]) ** 2 + (x - middle[1]) ** 2) < 10**2) & away
    output[blob] = torch.tensor([0.9, 0.1, 0.6])
    found = judge(example.before, output, example.after, mask)
    assert found.verdict == "collateral change", found.measures
    worst = found.maps["background"]
    place = divmod(int(worst.argmax()), worst.shape[1])
    scale = worst.shape[0] / mask.shape[0]
    assert math.dist(place, [m * scale for m in middle]) < 12 * scale


def test_a_removal_needs_no_new_object():
    example, mask = pair(2, "remove", "chair", None)
    assert judge(example.before, example.after, example.after, mask).verdict == "good"
    assert judge(example.before, example.before, example.after, mask).verdict == "no edit"
    half = judge(example.before, 0.5 * (example.before + example.after), example.after, mask)
    assert half.verdict == "overlay" and half.measures["new there"] is None


def test_without_an_after_picture_what_can_be_is_answered():
    example, mask = pair(1)
    copy = judge(example.before, example.before, None, mask)
    assert copy.verdict == "no edit" and copy.scores["distorted"] is None
    found = judge(example.before, example.after, None, mask)
    assert found.verdict == "undecided" and found.scores["distorted"] is None, "what was not asked is not good"
    assert any("distorted" in sentence for sentence in found.unanswered)
    ghost = judge(example.before, 0.7 * example.before + 0.3 * example.after, None, mask)
    assert ghost.verdict == "overlay"
    other = example.after.clone()
    other[:20, :20] = 1 - other[:20, :20]
    assert judge(example.before, other, None, mask).scores["collateral change"] >= 0.5


def test_without_after_and_mask_only_no_edit_is_answered():
    example, _ = pair(1)
    copy = judge(example.before, example.before)
    assert copy.verdict == "no edit"
    found = judge(example.before, example.after)
    assert found.scores["no edit"] < 0.5
    assert found.verdict == "undecided" and len(found.unanswered) == 2
    assert [found.scores[f] for f in FAILURES[1:]] == [None, None, None, None]
    assert {text for text in found.unanswered} == set(REMEDIES), "for each there is something to add"


def test_numbers_maps_and_names():
    example, mask = pair(0)
    found = judge(example.before, example.after, example.after, mask)
    assert found.verdict in VERDICTS and set(found.scores) == set(FAILURES) and set(found.measures) == set(MEASURES)
    assert set(found.maps) == {"unchanged", "old object", "shape", "background"}
    for values in found.maps.values():
        assert values.ndim == 2 and values.isfinite().all() and 0 <= values.min() and values.max() <= 1
    assert found.mask.shape == mask.shape


def test_the_same_twice_and_in_half_precision():
    example, mask = pair(3)
    output = flawed(example, "overlaid").after
    first, second = (judge(example.before, output, example.after, mask) for _ in range(2))
    assert first.measures == second.measures
    half = judge(*(t.half() for t in (example.before, output, example.after, mask)))
    assert half.verdict == first.verdict


@pytest.mark.parametrize("size", [(16, 16), (40, 200), (300, 17), (700, 640)])
def test_any_size(size):
    example, mask = pair(0)

    def resized(t):
        t = t[..., None] if t.ndim == 2 else t
        return F.interpolate(t.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].permute(1, 2, 0)

    before, after = resized(example.before), resized(example.after)
    found = judge(before, after, after, resized(mask)[..., 0])
    assert found.verdict == "good"


BAD = {
    "sizes": (lambda s, x, g, m: (s, x[:100], g, m), "output: expected the before picture's proportions within 2%, 128 x 128 pixels or the like, got 128 x 100"),
    "alpha": (lambda s, x, g, m: (s, torch.cat([x, x[..., :1]], -1), g, m), r"output: expected a picture \[H, W, 3\]"),
    "whole numbers": (lambda s, x, g, m: (s, (x * 255).byte(), g, m), "output: expected .* got torch.uint8"),
    "NaN": (lambda s, x, g, m: (s, x * math.nan, g, m), "output: expected finite values"),
    "one pixel": (lambda s, x, g, m: (s, x, g, F.pad(torch.ones(1, 1), (9, 118, 9, 118))), "mask: expected at least 16 pixels"),
    "mask size": (lambda s, x, g, m: (s, x, g, m[:64]), "mask: expected the before picture's proportions within 2%, 128 x 128 pixels or the like, got 128 x 64"),
    "tiny": (lambda s, x, g, m: (s[:8], x[:8], g[:8], m[:8]), "before: expected at least 16 x 16 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    example, mask = pair(0)
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        judge(*change(example.before, example.after, example.after, mask))


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", SCENES)
def test_an_output_of_one_colour_shows_neither_object(seed, value):
    example, mask = pair(seed)
    output = torch.full_like(example.before, value)
    for given in ({"after": example.after, "mask": mask}, {"mask": mask}, {}):
        found = judge(example.before, output, **given)
        assert found.verdict == "unusable" and found.scores["no edit"] == 0 and not found.scores["overlay"]
        assert float(found.maps.get("old object", torch.zeros(1)).max()) == 0


@pytest.mark.parametrize("seed", SCENES)
def test_regions_find_both_objects(seed):
    example, mask = pair(seed)
    found = find_regions(lab(example.before), lab(example.after), lab(example.after)[:, :1] * 0 + F.interpolate(mask[None, None], scale_factor=1.5) > 0.5)  # fmt: skip
    for ours, true in ((found.old, example.old_mask), (found.new, example.new_mask)):
        true = F.interpolate(true[None, None], scale_factor=1.5) > 0.5
        ours = ours > 0.5
        assert float((ours & true).sum() / (ours | true).sum()) > 0.5


@pytest.mark.parametrize("shift,scale", [((7.0, -4.0), 1.06), ((-10.0, 3.0), 0.93), ((0.0, 0.0), 1.0)])
def test_alignment_finds_a_similarity(shift, scale):
    example, _ = pair(2)
    g = lab(example.after)
    weights = F.interpolate(example.new_mask[None, None], scale_factor=1.5)
    middle = torch.tensor([g.shape[-1] / 2, g.shape[-2] / 2])
    true = Alignment(middle, torch.eye(2) * scale, torch.tensor(shift), 50.0)
    found, affine = align(warp(g, true), g, weights)
    assert found.scale == pytest.approx(scale, abs=0.02)
    expected = middle + (found.centre - middle) * scale + true.shift - found.centre
    assert float((found.shift - expected).norm()) < 0.5
    assert affine.stretch == pytest.approx(1.0, abs=0.02)


def test_alignment_finds_a_stretch():
    example, _ = pair(2)
    g = lab(example.after)
    weights = F.interpolate(example.new_mask[None, None], scale_factor=1.5)
    centre = (weights[0, 0].nonzero().float().mean(0)).flip(0)
    true = Alignment(centre, torch.diag(torch.tensor([1.12, 1.0])), torch.zeros(2), 50.0)
    _, affine = align(warp(g, true), g, weights)
    assert affine.stretch == pytest.approx(1.12, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Real edits
# ---------------------------------------------------------------------------------------------------------------------


def template_pairs():
    package = pytest.importorskip("comfyui_workflow_templates_media_image")
    folder = Path(package.__file__).parent / "templates"
    for name in (
        "image_qwen_image_edit",
        "image_qwen_image_edit_2509",
        "flux_kontext_dev_basic",
        "image_omnigen2_image_edit",
    ):
        files = [folder / f"{name}-{i}.webp" for i in (2, 1)]
        if all(f.is_file() for f in files):
            yield name, *(torch.from_numpy(np.array(Image.open(f).convert("RGB"))).float() / 255 for f in files)


@pytest.mark.slow
def test_real_edits_get_no_nonsense():
    judged = 0
    for name, before, after in template_pairs():
        assert before.shape == after.shape
        assert judge(before, jpeg(after, 60), after).verdict == "good", name
        assert judge(before, jpeg(before, 60), after).verdict == "no edit", name
        mask = estimate_mask(before[None], after[None])[0]
        assert judge(before, after, None, mask).scores["no edit"] < 0.5, name
        judged += 1
    assert judged >= 3


def test_judging_takes_one_thread_and_gives_the_others_back(monkeypatch):
    from editloss_core.verdict import judge as module

    example, mask = pair(0)
    used, decide = [], module.decide
    monkeypatch.setattr(module, "decide", lambda *given: used.append(torch.get_num_threads()) or decide(*given))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        judge(example.before, example.after, example.after, mask)
        assert torch.get_num_threads() == 2 and set(used) == {1}
        with pytest.raises(ValueError, match="before"):
            judge(example.before[..., :1], example.after)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_judges_at_once_leave_torch_s_threads_as_they_were():
    """The second begins while the first is at work, and ends after it."""
    from editloss_core.verdict.judge import one_thread

    inside, leave, seen = threading.Event(), threading.Event(), []

    def second():
        with one_thread():
            inside.set()
            assert leave.wait(60)
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            other = threading.Thread(target=second)
            other.start()
            assert inside.wait(60)
        leave.set()
        other.join()
        fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert torch.get_num_threads() == 2 and seen == [2, 2]
    finally:
        torch.set_num_threads(before)


def test_a_codecs_doing_is_measured_on_the_picture_itself():
    """Noise is what JPEG cannot keep: there a change of the background has to be larger to be one."""
    example, mask = pair(0)
    noise = 1.6 * torch.rand(example.before.shape, generator=torch.Generator().manual_seed(0)) - 0.8
    noise *= (mask < 0.5)[..., None]
    planes = [t.permute(2, 0, 1)[None] for t in (example.before, example.after)]
    noisy = [(t + noise.permute(2, 0, 1)[None]).clamp(0, 1) for t in planes]
    of_calm, of_noise = (
        Whole.of(s, g, g, mask[None, None]).codec_change(mask[None, None] > 0.5) for s, g in (planes, noisy)
    )
    assert of_calm < 0.05 < of_noise
    calm = judge(example.before, example.after, example.after, mask)
    assert calm.measures["codec"] is None and calm.measures["background"] < 0.05
    stained = example.after.clone()
    stained[:24, :24] = 1 - stained[:24, :24]
    found = judge(example.before, stained, example.after, mask)
    assert found.verdict == "collateral change" and 0 < found.measures["codec"] < 0.05


def test_one_code_near_black_is_no_visible_distance():
    codes = torch.arange(256.0).view(1, 1, 1, 256).expand(1, 3, 1, 256) / 255
    steps = oklab(codes).diff(dim=-1).norm(dim=1)
    assert float(steps.max()) < 0.01 and float(steps.min()) > 0.001


@pytest.mark.parametrize(
    "size, side, enlarge, wanted",
    [
        ((512, 512), 256, False, (256, 256)),
        ((512, 1536), 256, False, (148, 443)),
        ((1536, 512), 256, False, (443, 148)),
        ((100, 120), 256, False, (100, 120)),
        ((50, 50), 192, True, (192, 192)),
    ],
)
def test_a_panorama_is_looked_at_with_as_many_pixels_as_a_square(size, side, enlarge, wanted):
    assert fitting_pixels(size, side, enlarge) == wanted


def test_dithering_and_grain_are_noted_and_no_failure():
    example, mask = pair(0)
    x = example.after
    bayer = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16 + 1 / 32
    dithered = (x * 5 + bayer.tile(x.shape[0] // 4, x.shape[1] // 4)[..., None]).floor() / 5
    found = judge(example.before, dithered, x, mask)
    assert found.verdict == "good" and any("grain" in note for note in found.notes), found
    assert not any("grain" in note for note in judge(example.before, jpeg(x, 50), x, mask).notes)
