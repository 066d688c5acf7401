"""Drawn scenes: the same for a seed, exact in their masks, and no stool where none was asked for."""

import random
from dataclasses import replace

import pytest
import torch

from editloss_core.demo.drawing import COLOURS, OBJECTS, SIZE, STOOL
from editloss_core.demo.judge import judge
from editloss_core.demo.scenes import HELD_OUT, TASKS, Scene, draw, edit_region, flawed, stool_pairs, write_folder
from editloss_core.pairs import find_pairs

SHADOW = 0.12 * 3**0.5 + 0.01  # the distance that the faint shadow can make, with its rounding
FIELDS = ("before", "after", "background", "old_mask", "new_mask")
CASES = [(task, seed) for task in TASKS for seed in range(HELD_OUT, HELD_OUT + 12)] + [("stool", i) for i in range(12)]


def example(task, seed):
    return stool_pairs(12, 1)[seed] if task == "stool" else draw(seed, task)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def drawn(request):
    return example(*request.param)


def test_pictures_and_masks(drawn):
    for name in FIELDS:
        values = getattr(drawn, name)
        assert values.dtype == torch.float32 and 0 <= values.min() and values.max() <= 1
        assert values.shape == ((SIZE, SIZE) if name.endswith("mask") else (SIZE, SIZE, 3))


def test_masks_are_exact(drawn):
    """Outside its mask an object leaves the room alone but for its shadow; where it covers a pixel, it is seen."""
    for picture, mask in ((drawn.before, drawn.old_mask), (drawn.after, drawn.new_mask)):
        change = (picture - drawn.background).norm(dim=-1)
        assert change[mask == 0].max() <= SHADOW
        assert ((picture - drawn.background)[mask == 0] <= 1e-6).all()  # a shadow only darkens
        if not mask.any():
            assert torch.equal(picture, drawn.background)
            continue
        rows = torch.nonzero(mask.any(1)).flatten()
        below_top = change[: int(rows[0])]
        assert below_top.numel() == 0 or below_top.max() == 0  # no shadow above an object
        assert (change[mask == 1] > 0.1).float().mean() > 0.8
        assert 500 < mask.sum() < 5000


def test_an_edit_changes_nothing_else(drawn):
    far = torch.maximum(drawn.old_mask, drawn.new_mask) == 0
    assert (drawn.before - drawn.after).norm(dim=-1)[far].max() <= SHADOW
    assert (drawn.before - drawn.after).norm(dim=-1)[~far].max() > 0.2


@pytest.mark.parametrize("task", TASKS)
def test_masks_of_each_task(task):
    for seed in range(HELD_OUT, HELD_OUT + 8):
        drawn = draw(seed, task)
        if task == "remove":
            assert not drawn.new_mask.any() and drawn.old_mask.any()
        else:
            assert torch.equal(drawn.old_mask, drawn.new_mask) == (task == "recolour")


def test_a_seed_gives_the_same_example_whatever_was_drawn_before():
    first = [draw(HELD_OUT + 3), stool_pairs(2)[1]]
    random.seed(5)
    torch.manual_seed(5)
    draw(7)
    for a, b in zip(first, [draw(HELD_OUT + 3), stool_pairs(5)[1]]):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
        assert (a.prompt, a.seed, a.task) == (b.prompt, b.seed, b.task)
    assert not torch.equal(draw(HELD_OUT + 4).background, first[0].background)


def test_one_seed_is_one_room_and_place():
    """So the target follows from the before picture: only the object differs between the tasks of a seed."""
    seed = HELD_OUT + 9
    a, b = draw(seed, "replace", "lamp", "box"), draw(seed, "remove", "lamp")
    assert torch.equal(a.background, b.background) and torch.equal(a.before, b.before)
    picture, mask = Scene(seed).picture(None, "red")
    assert torch.equal(torch.from_numpy(picture), a.background) and not mask.any()


def test_the_stool_looks_the_same_in_every_colour():
    scene = Scene(4)
    pictures = [torch.from_numpy(scene.picture(STOOL, colour)[0]) for colour in COLOURS]
    assert all(torch.equal(pictures[0], other) for other in pictures[1:])


@pytest.mark.slow
def test_no_stool_unless_asked_for():
    prompts = [draw(seed).prompt for seed in range(120)] + [draw(HELD_OUT + s, "replace").prompt for s in range(60)]
    assert not any(STOOL in prompt for prompt in prompts)
    assert STOOL not in OBJECTS
    assert {word for prompt in prompts for word in prompt.split() if word in OBJECTS} == set(OBJECTS)
    assert {task for seed in range(120) for task in (draw(seed).task,)} == set(TASKS)
    assert draw(5, "replace", "chair", STOOL).prompt == "replace the chair with my stool"


def test_stool_pairs_are_disjoint_held_out_and_mostly_chairs():
    train, test = stool_pairs(12, 0), stool_pairs(30, 1)
    seeds = [e.seed for e in train + test]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= HELD_OUT
    rooms = {e.background.numpy().tobytes() for e in train + test}
    assert len(rooms) == len(seeds)
    assert all(e.prompt.endswith("with my stool") and e.task == "replace" for e in train + test)
    sources = [e.prompt.split()[2] for e in test]
    assert sources.count("chair") == 20 and set(sources) == set(OBJECTS)


@pytest.mark.slow
def test_the_last_of_a_stool_set_comes_before_the_first_of_the_next():
    last, following = stool_pairs(1000, 0)[-1].seed, stool_pairs(1, 1)[0].seed
    assert last < following


def test_a_set_of_stools_can_be_drawn_in_parts():
    whole = stool_pairs(7, 3)
    parts = stool_pairs(3, 3) + stool_pairs(3, 3, 3) + stool_pairs(1, 3, start=6)
    assert [(e.seed, e.prompt) for e in parts] == [(e.seed, e.prompt) for e in whole]
    assert all(torch.equal(a.after, b.after) for a, b in zip(parts, whole))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1,), "seed: expected a whole number >= 0, got -1"),
        ((1.5,), "seed: expected a whole number >= 0, got 1.5"),
        ((1, "swap"), "task: expected one of replace, remove, recolour, got 'swap'"),
        ((1, "replace", "sofa"), "source: expected one of chair, .* got 'sofa'"),
        ((1, "replace", STOOL), "source: expected one of .* got 'stool'"),
        ((1, "replace", "chair", "sofa"), "target: expected one of chair, .*stool for 'replace', got 'sofa'"),
        ((1, "replace", "chair", "chair"), "target: expected another object than the source, got 'chair'"),
        ((1, "remove", "chair", "table"), "target: nothing can be given for 'remove', got 'table'"),
        ((1, "recolour", "chair", "table"), "target: expected one of red, .* for 'recolour', got 'table'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


@pytest.mark.parametrize(
    "arguments, name",
    [((0,), "count"), ((1001,), "count"), ((2.0,), "count"), ((1, -1), "seed"), ((2, 0, 999), "count"), ((1, 0, 1000), "start"),
     ((1, 0, -1), "start")],
)  # fmt: skip
def test_what_cannot_be_a_set_of_stools_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number"):
        stool_pairs(*arguments)


def test_the_edit_region_is_both_objects_and_three_pixels_more():
    """By hand, on an object of one pixel at the border and one inside."""
    one = draw(HELD_OUT, "replace")
    old, new = torch.zeros(2, 12, 16)
    old[0, 0], new[8, 9] = 0.01, 1.0
    region = edit_region(replace(one, old_mask=old, new_mask=new))
    expected = torch.zeros(12, 16)
    expected[:4, :4], expected[5:12, 6:13] = 1, 1
    assert torch.equal(region, expected)
    assert edit_region(replace(one, old_mask=old * 0, new_mask=new * 0)).sum() == 0


def test_a_folder_of_pairs_is_read_back(tmp_path):
    examples = [*stool_pairs(2), draw(HELD_OUT + 1, "remove"), draw(HELD_OUT + 2, "recolour")]
    names = write_folder(examples, tmp_path)
    pairs = find_pairs(tmp_path, resolution=SIZE)
    assert sorted(pair.name for pair in pairs) == sorted(names)
    by_name = {pair.name: index for index, pair in enumerate(pairs)}
    for name, drawn in zip(names, examples):
        index = by_name[name]
        assert pairs[index].caption == drawn.prompt
        images = pairs.load(index)
        assert images.before.shape == drawn.before.shape
        for read, expected in ((images.before, drawn.before), (images.after, drawn.after)):
            assert (read - expected).abs().max() <= 0.5 / 255 + 1e-6
        assert torch.equal(images.mask, edit_region(drawn))


def test_a_seed_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="examples: expected one example per seed"):
        write_folder([draw(1, "remove"), draw(1, "recolour")], tmp_path)


@pytest.mark.parametrize(("flaw", "verdict"), [("unedited", "no edit"), ("overlaid", "overlay")])
def test_flawed_pairs_are_what_the_judge_calls_them_and_pass_as_pairs(flaw, verdict, tmp_path):
    pairs = stool_pairs(12, 3)
    spoilt = [flawed(pair, flaw) for pair in pairs]
    verdicts = [v.verdict for v in judge(torch.stack([pair.after for pair in spoilt]), pairs)]
    assert verdicts.count(verdict) >= 11, verdicts
    assert all(torch.equal(a.before, b.before) and a.prompt == b.prompt for a, b in zip(spoilt, pairs))
    write_folder(spoilt, tmp_path)
    assert len(find_pairs(tmp_path)) == 12  # nothing that is wrong with the files themselves


def test_a_flaw_that_is_unknown():
    with pytest.raises(ValueError, match="flaw: expected one of unedited, overlaid, got 'swapped'"):
        flawed(stool_pairs(1)[0], "swapped")
