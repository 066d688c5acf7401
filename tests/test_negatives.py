"""Overlays and the estimated edit mask, on scenes whose silhouettes are known exactly, and on pictures as they come."""

import io
import math

import pytest
import torch

from editloss_core.masks import estimate_mask, feather_mask
from editloss_core.negatives import OVERLAY_KINDS, OverlaySettings, make_overlays

SIZE = 64
RED, BLUE, GREY = (0.9, 0.1, 0.1), (0.1, 0.2, 0.9), (0.5, 0.55, 0.5)


STILL = dict(max_offset=0.0, scale=(1.0, 1.0))
PASTES = ("new_over_old", "old_over_new", "double")


def square(x, y, side, size=SIZE):
    mask = torch.zeros(size, size)
    mask[y : y + side, x : x + side] = 1
    return mask


def disc(x, y, radius, size=SIZE):
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((xs - x) ** 2 + (ys - y) ** 2 <= radius**2).float()


def paint(mask, colour, background=None, size=SIZE):
    background = torch.tensor(GREY).expand(size, size, 3) if background is None else background
    return torch.where(mask[..., None] > 0, torch.tensor(colour), background)


def texture(size=SIZE, seed=0):
    """A smooth coloured background with detail."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=g), size=(size, size), mode="bicubic")
    fine = torch.rand(1, 3, size, size, generator=g)
    return (0.25 + 0.45 * coarse + 0.08 * (fine - 0.5)).clamp(0, 1)[0].permute(1, 2, 0)


def scene(batch=2):
    """Old red squares become new blue discs: before, after, old silhouette, new silhouette."""
    old = torch.stack([square(16 + 3 * b, 18, 22) for b in range(batch)])
    new = torch.stack([disc(32 + 2 * b, 34, 13) for b in range(batch)])
    before = torch.stack([paint(m, RED) for m in old])
    after = torch.stack([paint(m, BLUE) for m in new])
    return before, after, old, new


def near(pixels, colour, tolerance=0.05):
    """Share of the pixels [N, 3] that have a colour."""
    return ((pixels - torch.tensor(colour)).abs().amax(-1) < tolerance).float().mean().item()


def towards(pixels, colour):
    """Mean progress of pixels [N, 3] from the grey ground to a colour: 0 ground, 1 the colour."""
    ground, target = torch.tensor(GREY), torch.tensor(colour)
    step = target - ground
    return (((pixels - ground) @ step) / (step @ step)).mean().item()


# --- what an overlay shows -------------------------------------------------------------------------------------------


def test_order_is_sample_major_and_named():
    before, after, old, new = scene(3)
    kinds = ("blend", "new_over_old")
    result = make_overlays(before, after, None, old, new, OverlaySettings(kinds=kinds))
    assert result.count == 2 and result.kinds == kinds and result.names == list(kinds) * 3
    assert result.images.shape == (6, SIZE, SIZE, 3) and result.masks.shape == (6, SIZE, SIZE)
    assert result.opacity.shape == (6,)
    for k, kind in enumerate(kinds):
        alone = make_overlays(before, after, None, old, new, OverlaySettings(kinds=(kind,)))
        assert torch.equal(result.split()[k], alone.images)
        for b in range(3):
            assert torch.equal(result.images[b * 2 + k], alone.images[b])


@pytest.mark.parametrize("kind", OVERLAY_KINDS)
@pytest.mark.parametrize("feather", [0.0, 1.0, 2.5, 6.0])
def test_outside_the_feathered_paste_the_base_is_untouched(kind, feather):
    before, after, old, new = scene()
    result = make_overlays(before, after, None, old, new, OverlaySettings(kinds=(kind,), feather=feather))
    base = after if kind == "old_over_new" else before
    outside = result.masks == 0
    assert 0.2 < outside.float().mean() < 0.95
    assert torch.equal(result.images[outside], base[outside])


@pytest.mark.parametrize("feather", [0.5, 1.0, 2.0, 3.3])
def test_feather_reaches_as_far_as_it_says(feather):
    mask = square(20, 24, 12)[None]
    soft = feather_mask(mask, feather)
    reach = math.ceil(feather)
    grown = torch.nn.functional.max_pool2d(mask[:, None], 2 * reach + 1, 1, reach)[:, 0]
    shrunk = 1 - torch.nn.functional.max_pool2d(1 - mask[:, None], 2 * reach + 1, 1, reach)[:, 0]
    assert torch.all(soft[grown == 0] == 0)
    assert torch.all(soft[shrunk == 1] > 1 - 1e-5)
    assert soft[0, 24 + 6, 19].item() + soft[0, 24 + 6, 20].item() == pytest.approx(1, abs=1e-5)  # half at the edge
    assert feather == 0.5 or soft[0, 30, 19] > 0.1
    assert torch.equal(feather_mask(mask, 0), mask)


def test_still_paste_is_the_formula():
    before, after, old, new = scene()
    settings = OverlaySettings(kinds=("new_over_old", "old_over_new", "blend"), feather=2.0, **STILL)
    result = make_overlays(before, after, None, old, new, settings)
    union = torch.maximum(old, new)
    for i, (base, source, mask) in enumerate([(before, after, new), (after, before, old), (before, after, union)]):
        for b in range(2):
            alpha = result.opacity[b * 3 + i]
            m = feather_mask(mask, 2.0)[b][..., None]
            expected = base[b] + alpha * m * (source[b] - base[b])
            torch.testing.assert_close(result.images[b * 3 + i], expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(result.masks[b * 3 + i], m[..., 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_both_objects_show_with_silhouettes(seed):
    before, after, old, new = scene()
    result = make_overlays(before, after, None, old, new, OverlaySettings(seed=seed))
    for i, name in enumerate(result.names):
        b, image, pasted = i // 4, result.images[i], result.masks[i]
        if name == "blend":
            assert towards(image[(old[b] > 0) & (new[b] == 0) & (pasted > 0.99)], RED) > 0.3
            assert towards(image[(new[b] > 0) & (old[b] == 0) & (pasted > 0.99)], BLUE) > 0.3
            continue
        stays, comes = (new, BLUE), (old, RED)
        if name != "old_over_new":
            stays, comes = (old, RED), (new, BLUE)
        only_old = (stays[0][b] > 0) & (pasted == 0)
        assert only_old.sum() >= 20, name
        assert near(image[only_old], stays[1]) == 1.0, name  # there, the covered object is untouched
        inside = (pasted > 0.99) & (stays[0][b] == 0)
        assert inside.sum() >= 5, name
        assert towards(image[inside], comes[1]) > 0.5, name  # and the pasted one is there, on bare ground
        covered = (pasted > 0.99) & (stays[0][b] > 0)
        if result.opacity[i] < 0.98 and covered.any():  # and the covered one shines through
            through = image[covered] - result.opacity[i] * torch.tensor(comes[1])
            torch.testing.assert_close(
                through.mean(0), (1 - result.opacity[i]) * torch.tensor(stays[1]), atol=0.02, rtol=0
            )


@pytest.mark.parametrize("jitter", [{}, STILL], ids=["moved", "still"])
@pytest.mark.parametrize("opacity", [(0.55, 1.0), (1.0, 1.0)])
def test_opaque_settings_never_hide_the_old_object_or_give_the_target(opacity, jitter):
    """Worst cases: a whole region pasted, and a new object that covers the old one completely."""
    before, after, old, new = scene()
    big = torch.stack([disc(30, 30, 24), disc(32, 30, 24)])
    covering = torch.stack([paint(m, BLUE) for m in big])
    union = torch.maximum(old, new)
    everything = torch.ones(1, SIZE, SIZE)
    cases = [
        (after, dict(mask=union)),
        (after, dict(mask=everything)),
        (after, dict()),
        (covering, dict(mask_before=old, mask_after=big)),
        (covering, dict(mask_after=big)),
        (covering, dict(mask=everything, mask_before=old)),
    ]
    for seed in range(2):
        settings = OverlaySettings(opacity=opacity, seed=seed, **jitter)
        for target, masks in cases:
            result = make_overlays(before, target, settings=settings, **masks)
            for i, name in enumerate(result.names):
                b, image = i // 4, result.images[i]
                for picture in (before[b], target[b]):
                    assert (image - picture).abs().max() > 0.1, (name, masks.keys())
                region = masks.get("mask_after" if name == "old_over_new" else "mask_before")
                region = masks.get("mask") if region is None else region
                if region is not None and name != "blend" and target is after:
                    region = region.expand(2, -1, -1)[b]
                    hidden = (region * result.masks[i]).sum() / region.sum() * result.opacity[i]
                    assert hidden <= 1 - settings.min_visible + 1e-4


def test_opacity_is_within_its_range_and_lowered_where_it_hides_too_much():
    before, after, old, new = scene(1)
    union = torch.maximum(old, new)
    free, whole = [], []
    for seed in range(40):
        settings = OverlaySettings(opacity=(0.4, 0.95), seed=seed)
        free.append(make_overlays(before, after, None, old, new, settings).opacity)
        whole.append(make_overlays(before, after, union, settings=OverlaySettings(("new_over_old",), (0.4, 0.95), **STILL, seed=seed)).opacity)  # fmt: skip  # noqa: E501
    free, whole = torch.stack(free), torch.cat(whole)
    pastes = free[:, [0, 1, 3]]
    assert pastes.min() >= 0.4 - 1e-6 and pastes.max() <= 0.95 + 1e-6 and pastes.std() > 0.05
    assert free[:, 2].min() >= 0.35 and free[:, 2].max() <= 0.65
    # feathering takes a little of the silhouette away, so slightly more than 1 − min_visible is allowed
    assert whole.min() >= 0.4 and whole.max() < 0.78 and whole.std() > 0.05


@pytest.mark.parametrize("kind", ["new_over_old", "old_over_new", "double"])
def test_jitter_stays_in_its_bounds(kind):
    before, after, old, new = scene(1)
    settings = dict(kinds=(kind,), max_offset=0.05, scale=(0.9, 1.1), feather=0.0, spread=(0.4, 0.6))
    mask = old if kind == "old_over_new" else new
    steps = torch.arange(SIZE).float()
    centre = torch.stack([(mask[0].sum(0) * steps).sum(), (mask[0].sum(1) * steps).sum()]) / mask.sum()
    shifts, areas = [], []
    for seed in range(30):
        pasted = make_overlays(before, after, None, old, new, OverlaySettings(seed=seed, **settings)).masks[0]
        shifts.append(torch.stack([(pasted.sum(0) * steps).sum(), (pasted.sum(1) * steps).sum()]) / pasted.sum() - centre)  # fmt: skip  # noqa: E501
        areas.append(pasted.sum() / mask.sum())
    shifts, areas = torch.stack(shifts), torch.stack(areas)
    if kind == "double":
        width = 27
        assert 0.4 * width - 0.5 <= shifts[:, 0].abs().min() and shifts[:, 0].abs().max() <= 0.6 * width + 0.5
        assert (shifts[:, 0] > 0).any() and (shifts[:, 0] < 0).any()
    else:
        assert shifts.abs().max() <= 0.05 * SIZE + 0.1 and shifts.std() > 1
    assert areas.min() > 0.8 and areas.max() < 1.23 and areas.std() > 0.05


def test_an_object_cut_by_the_border_is_not_pulled_away_from_it():
    old, new = square(0, 20, 20)[None], torch.maximum(square(0, 24, 24), square(0, 30, 30))[None]
    before, after = paint(old[0], RED)[None], paint(new[0], BLUE)[None]
    for seed in range(8):
        result = make_overlays(before, after, None, old, new, OverlaySettings(seed=seed, feather=0.0))
        for i, name in enumerate(result.names):
            rows = result.masks[i].amax(1) > 0.9
            assert torch.all(result.masks[i][rows][:, 0] > 0.9), name  # no ground between the object and the border


def test_double_moves_to_where_there_is_room():
    old, new = square(40, 20, 22)[None], square(41, 22, 22)[None]  # one pixel from the right border
    before, after = paint(old[0], RED)[None], paint(new[0], BLUE)[None]
    for seed in range(6):
        pasted = make_overlays(before, after, None, old, new, OverlaySettings(("double",), seed=seed)).masks[0]
        assert pasted.sum() > 0.85 * new.sum()
        assert (pasted.sum(0) * torch.arange(SIZE)).sum() / pasted.sum() < 51.5 - 0.3 * 22 + 1


# --- seeds and batches -----------------------------------------------------------------------------------------------


def test_same_seed_same_overlay_other_seed_other():
    pair = scene()
    first = make_overlays(*pair[:2], None, *pair[2:], OverlaySettings(seed=7))
    again = make_overlays(*pair[:2], None, *pair[2:], OverlaySettings(seed=7))
    other = make_overlays(*pair[:2], None, *pair[2:], OverlaySettings(seed=8))
    assert torch.equal(first.images, again.images) and torch.equal(first.masks, again.masks)
    for a, b in zip(first.images, other.images):
        assert not torch.equal(a, b)


def test_global_random_state_is_left_alone():
    pair = scene()
    state = torch.get_rng_state()
    make_overlays(*pair[:2], None, *pair[2:])
    assert torch.equal(state, torch.get_rng_state())


def test_a_sample_does_not_depend_on_its_batch_nor_a_kind_on_the_others():
    before, after, old, new = scene(4)
    whole = make_overlays(before, after, None, old, new, indices=[10, 11, 12, 13])
    alone = make_overlays(before[2:3], after[2:3], None, old[2:3], new[2:3], indices=[12])
    torch.testing.assert_close(alone.images, whole.images[8:12], atol=0, rtol=0)
    by_place = make_overlays(before[2:3], after[2:3], None, old[2:3], new[2:3])
    assert not torch.equal(by_place.images, alone.images)
    double = make_overlays(before, after, None, old, new, OverlaySettings(("double",)), indices=[10, 11, 12, 13])
    assert torch.equal(double.images, whole.split()[3])


def test_a_repeated_kind_is_drawn_anew():
    before, after, old, new = scene(1)
    result = make_overlays(before, after, None, old, new, OverlaySettings(kinds=("new_over_old",) * 3))
    assert len({round(a, 6) for a in result.opacity.tolist()}) == 3


def test_masks_of_a_batch_of_one_serve_every_sample():
    before, after, _, _ = scene()
    mask = torch.maximum(square(10, 10, 40), disc(34, 34, 14))[None]
    one = make_overlays(before, after, mask, mask, mask)
    two = make_overlays(before, after, mask.expand(2, -1, -1), mask.expand(2, -1, -1), mask.expand(2, -1, -1))
    assert torch.equal(one.images, two.images)


def test_no_gradient_dtype_and_inference_mode():
    before, after, old, new = scene(1)
    result = make_overlays(before.requires_grad_(), after, None, old, new)
    assert not result.images.requires_grad
    half = make_overlays(before.detach().half(), after.half(), None, old.half(), new)
    assert half.images.dtype == torch.float16 and half.images.isfinite().all()
    with torch.inference_mode():
        inferred = make_overlays(before.detach().clone(), after.clone(), None, old, new)
    assert torch.equal(inferred.images, result.images)
    assert result.images.min() >= 0 and result.images.max() <= 1


def test_inputs_are_left_alone():
    tensors = scene()
    copies = [t.clone() for t in tensors]
    make_overlays(tensors[0], tensors[1], None, tensors[2], tensors[3])
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies))


if torch.cuda.is_available():  # where there is none, there is nothing to compare

    def test_devices_agree():
        pair = scene()
        cpu = make_overlays(*pair[:2], None, *pair[2:])
        gpu = make_overlays(*(t.cuda() for t in pair[:2]), None, *(t.cuda() for t in pair[2:]))
        assert gpu.images.is_cuda and gpu.masks.is_cuda
        torch.testing.assert_close(gpu.opacity.cpu(), cpu.opacity, atol=1e-5, rtol=0)
        torch.testing.assert_close(gpu.images.cpu(), cpu.images, atol=1e-4, rtol=0)
        before, after, truth = edited(128)
        assert iou(estimate_mask(before.cuda(), after.cuda(), margin=0.0).cpu(), truth) >= 0.8


# --- the estimated mask ----------------------------------------------------------------------------------------------


def edited(size=192, seed=0):
    """On one textured ground an orange square becomes a blue disc; the truth is the union."""
    ground = texture(size, seed)
    old, new = square(size // 3, size // 3, size // 4, size), disc(size // 2, size // 2, size // 6, size)
    before, after = paint(old, (0.9, 0.5, 0.1), ground), paint(new, BLUE, ground)
    return before[None], after[None], torch.maximum(old, new)[None]


def iou(mask, truth):
    a, b = mask > 0.5, truth > 0.5
    return ((a & b).sum() / (a | b).sum()).item()


def jpeg(image, quality):
    image_module = pytest.importorskip("PIL.Image")
    array = (image[0] * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    image_module.fromarray(array).save(buffer, "JPEG", quality=quality)
    numpy = pytest.importorskip("numpy")
    return torch.from_numpy(numpy.asarray(image_module.open(buffer)).copy()).float()[None] / 255


def noisy(image, sigma, seed):
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + sigma * noise).clamp(0, 1)


DISTORTIONS = {
    "clean": lambda x, seed: x,
    "noise 0.02": lambda x, seed: noisy(x, 0.02, seed),
    "noise 0.05": lambda x, seed: noisy(x, 0.05, seed),
    "jpeg": lambda x, seed: jpeg(x, 90 if seed else 60),
    "tone": lambda x, seed: x * 0.97 + 0.02 if seed else x,
    "shift": lambda x, seed: torch.cat([x[:, :, 1:], x.flip(2)[:, :, :1]], dim=2) if seed else x,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTORTIONS)
@pytest.mark.parametrize("size", [96, 500])
def test_estimated_mask_covers_the_edit(name, size):
    before, after, truth = edited(size)
    before, after = DISTORTIONS[name](before, 0), DISTORTIONS[name](after, 1)
    mask = estimate_mask(before, after, margin=0.0)
    assert mask.shape == truth.shape and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert iou(mask, truth) >= 0.8
    wider = estimate_mask(before, after, margin=0.03)
    assert torch.all(wider >= mask) and wider.sum() > mask.sum()


@pytest.mark.parametrize("name", DISTORTIONS)
def test_without_an_edit_the_mask_is_empty(name):
    ground = texture(192)[None]
    mask = estimate_mask(DISTORTIONS[name](ground, 0), DISTORTIONS[name](ground, 1))
    assert mask.sum() == 0


@pytest.mark.parametrize("size", [(16, 2896), (64, 8192), (2896, 16), (32, 1440)])
def test_a_strip_has_its_mask_too(size):
    """Reduced to a few hundred pixels on its long side, it would be a line without an inside."""
    before, after = torch.full((2, 1, *size, 3), 0.5)
    long = max(size)
    place = (slice(2, -2), slice(int(0.4 * long), int(0.6 * long)))
    place = place if size[1] == long else place[::-1]
    after[(0, *place)] = torch.tensor([0.1, 0.2, 0.9])
    mask = estimate_mask(before, after)[0]
    assert mask[place].mean() > 0.95 and mask.mean() < 0.35
    assert not estimate_mask(before, before).any()


def test_small_and_large_edits_and_flat_pictures():
    ground = texture(256)
    small = disc(200, 60, 8, 256)
    found = estimate_mask(ground[None], paint(small, RED, ground)[None], margin=0.0)
    assert iou(found, small[None]) >= 0.7
    large = square(10, 10, 220, 256)  # three quarters of the picture
    assert iou(estimate_mask(ground[None], paint(large, RED, ground)[None]), large[None]) >= 0.9
    black, white = torch.zeros(1, 40, 50, 3), torch.ones(1, 40, 50, 3)
    assert estimate_mask(black, white).min() == 1  # everything changed
    assert estimate_mask(black, black).max() == 0


def test_thresholds_feather_and_batch():
    before, after, truth = edited()
    pair = torch.cat([before, before]), torch.cat([after, before])
    both = estimate_mask(*pair)
    assert torch.equal(both[:1], estimate_mask(before, after)) and both[1].sum() == 0
    assert iou(estimate_mask(before, after, threshold=0.05, margin=0.0), truth) >= 0.8
    assert estimate_mask(before, after, threshold=0.9).sum() == 0
    soft = estimate_mask(before, after, feather=4.0)
    assert ((soft > 0) & (soft < 1)).any() and soft.max() <= 1


def test_holes_and_thin_spirals_are_handled():
    """A ring is filled when its hole is small; a spiral one pixel wide is one piece."""
    from editloss_core.masks import components

    ground = torch.full((128, 128, 3), 0.5)
    ring = disc(64, 64, 14, 128) - disc(64, 64, 7, 128)
    mask = estimate_mask(ground[None], paint(ring, RED, ground)[None], margin=0.0)
    assert mask[0, 64, 64] == 1 and iou(mask, disc(64, 64, 14, 128)[None]) >= 0.8
    spiral = torch.zeros(1, 1, 41, 41, dtype=torch.bool)
    x, y, dx, dy = -1, 0, 1, 0
    for arm in (41, 40, 40, *(n for n in range(38, 0, -2) for _ in range(2))):
        for _ in range(arm):
            x, y = x + dx, y + dy
            spiral[0, 0, y, x] = True
        dx, dy = -dy, dx
    labels = components(spiral)
    assert 800 < spiral.sum() < 1000  # every other line
    assert len(labels[spiral].unique()) == 1 and torch.all(labels[~spiral] == 0)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_pair_without_an_edit_is_named():
    before, after, old, _ = scene()
    after = torch.stack([after[0], before[1]])
    with pytest.raises(ValueError, match="sample 1 has no visible edit"):
        make_overlays(before, after)
    with pytest.raises(ValueError, match="sample 1 has no visible edit"):
        make_overlays(before, after, mask=torch.ones(1, SIZE, SIZE))
    with pytest.raises(ValueError, match="sample 0 has no visible edit"):
        make_overlays(before[:1], scene()[1][:1], mask=square(0, 0, 4)[None])  # the mask is somewhere else
    with pytest.raises(ValueError, match="sample 0 has no visible edit"):
        make_overlays(before, before, mask_before=old)


def test_a_silhouette_over_unchanged_ground_is_refused():
    before, after, old, new = scene(1)
    with pytest.raises(ValueError, match="new_over_old: the overlay of sample 0 equals before"):
        make_overlays(before, after, None, old, square(0, 50, 8)[None], OverlaySettings(**STILL))


BEFORE, AFTER, OLD, NEW = scene()
ONES = torch.ones(2, SIZE, SIZE)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(before=BEFORE[0]), ["before", r"\[B, H, W, 3\]", r"\[64, 64, 3\]"]),
        (dict(before=BEFORE.permute(0, 3, 1, 2)), ["before", r"\[2, 3, 64, 64\]"]),
        (dict(before="x.png"), ["before", "Tensor", "str"]),
        (dict(before=(BEFORE * 255).to(torch.uint8)), ["before", "floating", "uint8"]),
        (dict(before=BEFORE * 255), ["before", "0…1", "229.5"]),
        (dict(after=AFTER * float("nan")), ["after", "0…1", "nan"]),
        (dict(after=AFTER[:, :60]), ["after", r"\[2, 64, 64, 3\]", r"\[2, 60, 64, 3\]"]),
        (dict(after=AFTER[:1]), ["after", r"\[2, 64, 64, 3\]", r"\[1, 64, 64, 3\]"]),
        (dict(mask=ONES[:, :60]), ["mask", "64 x 64", "60 x 64"]),
        (dict(mask=ONES[0]), ["mask", r"\[B, H, W\]", r"\[64, 64\]"]),
        (dict(mask_after=torch.ones(3, SIZE, SIZE)), ["mask_after", "batch of 2", "got 3"]),
        (dict(mask_before=ONES * 0), ["mask_before: is empty"]),
        (dict(mask=torch.zeros(1, 32, 32)), [r"mask: is empty \(all zero\), as Load Image's mask .*; leave it out"]),
        (dict(mask_after=ONES * 0.4), ["mask_after", "empty", "sample 0"]),
        (dict(mask=torch.stack([ONES[0], ONES[0] * 0])), ["mask", "empty", "sample 1"]),
        (dict(mask=ONES * 2), ["mask", "0…1", "2"]),
        (dict(mask=ONES > 0), ["mask", "floating", "bool"]),
        (dict(indices=[1]), ["indices", "expected 2", "got 1"]),
        (dict(indices=[1, 2.5]), [r"indices\[1\]", "whole number", "2.5"]),
        (dict(settings={"seed": 1}), ["settings", "OverlaySettings", "dict"]),
        (dict(settings=OverlaySettings(feather=64)), ["feather", "64 x 64", "64 pixels"]),
    ],
)
def test_errors_name_the_argument_what_came_and_what_was_expected(arguments, words):
    with pytest.raises(ValueError, match=".*".join(words[:1])) as error:
        make_overlays(**{"before": BEFORE, "after": AFTER, **arguments})
    for word in words:
        assert error.match(word)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(kinds=()), ["kinds", "at least one"]),
        (dict(kinds=("new_over_old", "sandwich")), ["kinds", "sandwich", "double"]),
        (dict(opacity=(0.5, 1.2)), ["opacity", "1.2", "0.3 <= low <= high <= 1"]),
        (dict(opacity=(0.1, 0.5)), ["opacity", "0.1", "0.3"]),
        (dict(opacity=(0.9, 0.6)), ["opacity", "0.9"]),
        (dict(opacity=0.5), ["opacity", "two numbers", "0.5"]),
        (dict(blend=(0.0, 0.5)), ["blend", "0.3"]),
        (dict(feather=-1), ["feather", ">= 0", "-1"]),
        (dict(max_offset=0.7), ["max_offset", "<= 0.5", "0.7"]),
        (dict(scale=(0.1, 1.0)), ["scale", "0.5"]),
        (dict(spread=(0.1, float("nan"))), ["spread", "nan"]),
        (dict(min_visible=0), ["min_visible", "> 0", "<= 0.5"]),
        (dict(seed=1.5), ["seed", "whole number", "1.5"]),
    ],
)
def test_settings_are_checked(arguments, words):
    with pytest.raises(ValueError) as error:
        OverlaySettings(**arguments)
    for word in words:
        assert error.match(rf"(?s).*{word}")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(threshold="high"), ["threshold", "'auto'", "'high'"]),
        (dict(threshold=0), ["threshold", "> 0"]),
        (dict(margin=0.5), ["margin", "<= 0.25", "0.5"]),
        (dict(min_area=-1), ["min_area", "-1"]),
        (dict(working_size=8), ["working_size", ">= 32", "8"]),
        (dict(feather=100), ["feather", "64 x 64", "100"]),
    ],
)
def test_estimate_mask_checks_its_options(arguments, words):
    with pytest.raises(ValueError) as error:
        estimate_mask(BEFORE, AFTER, **arguments)
    for word in words:
        assert error.match(rf"(?s).*{word}")


def test_settings_are_frozen_and_a_single_kind_may_be_a_string():
    settings = OverlaySettings(kinds="blend", scale=[1, 1])
    assert settings.kinds == ("blend",) and settings.scale == (1.0, 1.0)
    with pytest.raises(AttributeError):
        settings.seed = 3
    assert hash(settings) == hash(OverlaySettings(kinds=("blend",), scale=(1.0, 1.0)))
