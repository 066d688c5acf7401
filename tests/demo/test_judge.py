"""The judge of drawn edits: constructed failures of every kind get their name, and good outputs theirs."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from editloss_core.demo.drawing import COLOURS, OBJECTS
from editloss_core.demo.judge import VERDICTS, Verdict, copy_source, judge, table
from editloss_core.demo.model import Autoencoder, load_autoencoder
from editloss_core.demo.scenes import HELD_OUT, TASKS, Scene, draw, stool_pairs

SCENES = 6  # of each kind: 4 kinds × 6 scenes × more than 20 outputs


@pytest.fixture(scope="module")
def scenes():
    """Others than those on which the thresholds were chosen."""
    drawn = {task: [draw(HELD_OUT + 5000 + i, task) for i in range(SCENES)] for task in TASKS}
    return {**drawn, "stool": stool_pairs(SCENES, 40)}


# --- outputs --------------------------------------------------------------------------------------------------------


def over(below, picture, mask):
    return below + (picture - below) * mask[..., None]


def blur(picture, sigma):
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    planes = picture.movedim(-1, 0)[:, None]
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return planes[:, 0].movedim(0, -1)


def warped(example, width=1.0, height=1.0, shear=0.0, down=0, right=0):
    """The new object scaled about its middle, sheared and moved, in the same room."""
    rows, columns = torch.nonzero(example.new_mask > 0.5, as_tuple=True)
    y0, x0 = rows.float().mean(), columns.float().mean()
    high, wide = example.new_mask.shape
    y, x = torch.meshgrid(torch.arange(high) - y0 - down, torch.arange(wide) - x0 - right, indexing="ij")
    grid = torch.stack([(x / width + shear * y + x0) / (wide - 1), (y / height + y0) / (high - 1)], -1) * 2 - 1
    layers = torch.cat([example.after, example.new_mask[..., None]], -1).movedim(-1, 0)
    moved = F.grid_sample(layers[None], grid[None], align_corners=True)[0].movedim(0, -1)
    return over(example.background, moved[..., :3], moved[..., 3])


def without_a_leg(example):
    """The lower third of the object's right half is missing."""
    mask = example.new_mask.clone()
    rows, columns = torch.nonzero(mask > 0.5, as_tuple=True)
    mask[rows.max() - (rows.max() - rows.min()) // 3 :, (columns.min() + columns.max()) // 2 :] = 0
    return over(example.background, example.after, mask)


def blurred_inside(example):
    return over(example.after, blur(example.after, 4.0), (example.new_mask > 0).float())


def first_colour(example):
    source = example.prompt.split()[2]
    pictures = {colour: Scene(example.seed).picture(source, colour)[0] for colour in COLOURS}
    return next(colour for colour, p in pictures.items() if torch.equal(torch.from_numpy(p), example.before))


def another_object(example):
    words = example.prompt.split()
    names = [name for name in OBJECTS if name not in words]
    colour = words[-1] if example.task == "recolour" else first_colour(example)
    return torch.from_numpy(Scene(example.seed).picture(names[example.seed % len(names)], colour)[0])


def another_colour(example):
    words, first = example.prompt.split(), first_colour(example)
    name = words[2] if example.task == "recolour" else words[-1]
    colours = [colour for colour in COLOURS if colour not in (first, words[-1])]
    return torch.from_numpy(Scene(example.seed).picture(name, colours[example.seed % len(colours)])[0])


def noisy(example):
    return example.after + 2 / 255 * torch.randn(example.after.shape, generator=torch.Generator().manual_seed(3))


def room(example, *factors):
    return over(example.background * torch.tensor(factors), example.after, example.new_mask)


def mix(share):
    return lambda e: share * e.before + (1 - share) * e.after


EVERY, NEW, REPLACED = (*TASKS, "stool"), ("replace", "recolour", "stool"), ("replace", "stool")
OUTPUTS = {
    "copy of the source": ("no edit", EVERY, lambda e: e.before),
    "soft copy": ("no edit", EVERY, lambda e: blur(e.before, 0.7)),
    **{f"mix {a}": ("overlay", EVERY, mix(a)) for a in (0.3, 0.5, 0.7)},
    "pasted over": ("overlay", REPLACED, lambda e: over(e.before, e.after, e.new_mask)),
    "pasted over, translucent": ("overlay", NEW, lambda e: over(e.before, e.after, 0.6 * e.new_mask)),
    "ghost": ("overlay", EVERY, lambda e: over(e.after, e.before, 0.4 * e.old_mask)),
    "wider": ("distorted", NEW, lambda e: warped(e, width=1.25)),
    "higher": ("distorted", NEW, lambda e: warped(e, height=1.25)),
    "sheared": ("distorted", NEW, lambda e: warped(e, shear=0.3)),
    "misplaced to the right": ("distorted", NEW, lambda e: warped(e, right=6)),
    "misplaced upwards": ("distorted", NEW, lambda e: warped(e, down=-6)),
    "without a leg": ("distorted", NEW, without_a_leg),
    "blurred inside": ("distorted", NEW, blurred_inside),
    "another object": ("distorted", EVERY, another_object),
    "another colour": ("distorted", ("replace", "recolour"), another_colour),
    "removed instead": ("distorted", NEW, lambda e: e.background),
    "target": ("good", EVERY, lambda e: e.after),
    "soft target": ("good", EVERY, lambda e: blur(e.after, 0.7)),
    "noisy target": ("good", EVERY, noisy),
    "a pixel to the right": ("good", NEW, lambda e: warped(e, right=1)),
    "a pixel up": ("good", NEW, lambda e: warped(e, down=-1)),
    "darker room": ("collateral", EVERY, lambda e: room(e, 0.85, 0.85, 0.85)),
    "room in another colour": ("collateral", EVERY, lambda e: room(e, 0.8, 1.0, 1.0)),
}
CASES = [(name, kind) for name, (_, kinds, _) in OUTPUTS.items() for kind in kinds]


def outputs(name, examples):
    return torch.stack([OUTPUTS[name][2](example) for example in examples])


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", CASES, ids=lambda value: value.replace(" ", "-"))
def test_constructed_outputs_get_their_name(name, kind, scenes):
    verdicts = judge(outputs(name, scenes[kind]), scenes[kind])
    wrong = [(e.seed, e.prompt, v) for e, v in zip(scenes[kind], verdicts) if v.verdict != OUTPUTS[name][0]]
    assert not wrong, wrong


def test_every_verdict_is_among_the_cases():
    assert {verdict for verdict, _, _ in OUTPUTS.values()} == set(VERDICTS)
    assert len(CASES) * SCENES >= 200


@pytest.mark.parametrize("kind", EVERY)
def test_scores_follow_a_mix(kind, scenes):
    """x = α·s + (1 − α)·g has progress 1 − α, and the more of s it has, the more of the old object is left."""
    shares = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    found = [judge(outputs_of_mix, scenes[kind]) for outputs_of_mix in
             (torch.stack([mix(a)(e) for e in scenes[kind]]) for a in shares)]  # fmt: skip
    for row in zip(*found):
        for share, verdict in zip(shares, row):
            assert verdict.progress == pytest.approx(1 - share, abs=2e-3)
            assert verdict.residual < 0.02
        left, there = [v.old_left for v in row], [v.new_there for v in row]
        assert all(a < b for a, b in zip(left, left[1:])) and left[-1] == pytest.approx(1, abs=1e-3)
        assert left[2] == pytest.approx(0.4, abs=0.1)
        if kind == "remove":
            assert not any(there)
        else:
            assert all(a > b for a, b in zip(there, there[1:])) and there[0] == pytest.approx(1, abs=1e-3)


def test_scores_of_the_target_and_the_copy(scenes):
    for examples in scenes.values():
        for v in judge(torch.stack([e.after for e in examples]), examples):
            assert (v.progress, v.silhouette, v.detail) == pytest.approx((1, 1, 1), abs=5e-3)
            assert v.residual < 0.01 and v.background < 1e-4
        for v in judge(copy_source(examples), examples):
            assert v.progress == pytest.approx(0, abs=1e-3) and v.old_left == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_far_from_the_edit_is_collateral(task, scenes):
    """A strip of the picture at the side that is farther from the objects is painted red."""
    examples = scenes[task]
    pictures = torch.stack([e.after for e in examples])
    for picture, example in zip(pictures, examples):
        columns = torch.nonzero((torch.maximum(example.old_mask, example.new_mask) > 0).any(0)).flatten()
        left, right = int(columns[0]), 127 - int(columns[-1])
        assert max(left, right) >= 16
        picture[:, slice(0, 12) if left > right else slice(116, 128)] = torch.tensor([0.9, 0.1, 0.1])
    assert [v.verdict for v in judge(pictures, examples)] == ["collateral"] * SCENES


def test_a_room_in_another_colour_does_not_hide_what_became_of_the_object(scenes):
    examples = scenes["replace"]
    for kind, picture in (
        ("no edit", lambda e: (e.before, e.old_mask)),
        ("overlay", lambda e: (over(e.before, e.after, e.new_mask), torch.maximum(e.old_mask, e.new_mask))),
    ):
        dark = torch.stack([over(e.background * 0.85, *picture(e)) for e in examples])
        assert {v.verdict for v in judge(dark, examples)} == {kind}


def test_verdicts_depend_on_nothing_but_their_own_picture(scenes):
    examples = [*scenes["replace"][:2], *scenes["remove"][:2], *scenes["recolour"][:2]]
    pictures = torch.stack([mix(0.4)(e) for e in examples])
    together = judge(pictures, examples)
    assert together == [judge(pictures[i : i + 1], examples[i : i + 1])[0] for i in range(6)]
    assert together == judge(pictures.double(), examples)
    assert judge(pictures * 3 - 1, examples) == judge((pictures * 3 - 1).clamp(0, 1), examples)


@pytest.mark.slow
def test_the_autoencoder_changes_no_verdict():
    """Round trips of the target, the source and a mix."""
    network = Autoencoder()
    network.load_state_dict(load_autoencoder(), strict=False)  # it leaves blocks of zeros out
    examples = [draw(HELD_OUT + 7000 + i) for i in range(12)] + stool_pairs(4, 41)
    for expected, pictures in (("good", lambda e: e.after), ("no edit", lambda e: e.before), ("overlay", mix(0.5))):
        with torch.no_grad():
            tripped = network.decode(network.encode(torch.stack([pictures(e) for e in examples])))
        counts = Counter(v.verdict for v in judge(tripped, examples))
        assert counts[expected] >= 15, (expected, counts)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_judged_is_refused(scenes):
    examples = scenes["replace"][:2]
    pictures = copy_source(examples)
    broken = pictures.clone()
    broken[1, 3, 4, 0] = float("nan")
    for given, message in (
        (pictures[:1], r"outputs: expected \[2, 128, 128, 3\], a picture for each example, got \[1, 128, 128, 3\]"),
        (pictures[:, :64], r"outputs: expected \[2, 128, 128, 3\].*got \[2, 64, 128, 3\]"),
        (pictures.movedim(-1, 1), r"got \[2, 3, 128, 128\]"),
        ((pictures * 255).to(torch.uint8), r"outputs: expected pictures \[B, H, W, 3\] in 0…1, got torch.uint8"),
        (list(pictures), "outputs: expected pictures .* got list"),
        (broken, "outputs: expected finite values, got NaN or infinity in 1"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(given, examples)
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        judge(pictures, [])
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        copy_source([])


# --- table ----------------------------------------------------------------------------------------------------------


def verdict(name, progress=1.0, old_left=0.0):
    return Verdict(name, progress, old_left, 1.0, 1.0, 0.1, 0.9, 0.01)


def test_table_by_hand():
    """Wilson for 5 of 10: centre (5 + 1.92) / 13.84 = 0.5, half width 1.96 / 13.84 · √(2.5 + 0.96) = 0.263."""
    mixed = [verdict("good")] * 5 + [verdict("no edit", 0.0, 1.0)] * 2 + [verdict("overlay", 0.5, 0.5)] * 2
    mixed += [verdict("collateral")]
    text = table(
        {"base": mixed, "source | copied": [verdict("no edit", 0.0, 1.0)] * 4, "flawed": [verdict("distorted")]}
    )
    lines = text.split("\n")
    assert lines[0] == "| outputs | n | good | no edit | overlay | distorted | collateral | progress | old left |"
    assert lines[1] == "|---" * 9 + "|"
    assert lines[2] == "| base | 10 | 50 % (5), 24–76 % | 20 % (2) | 20 % (2) | 0 % (0) | 10 % (1) | 0.70 | 0.30 |"
    # 0 of 4: the upper end is z² / (n + z²) = 3.84 / 7.84
    assert (
        lines[3] == "| source / copied | 4 | 0 % (0), 0–49 % | 100 % (4) | 0 % (0) | 0 % (0) | 0 % (0) | 0.00 | 1.00 |"
    )
    assert lines[4].startswith("| flawed | 1 | 0 % (0), 0–79 % | 0 % (0) | 0 % (0) | 100 % (1) | ")
    assert len({line.count("|") for line in lines}) == 1


def test_a_row_without_verdicts_is_refused():
    with pytest.raises(ValueError, match="rows: expected verdicts under 'base', got none"):
        table({"base": []})
