"""Flawed pairs: found by what a set has in common, not where it has nothing in common, and what is done with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from editloss_core.demo.scenes import Example, draw, edit_region, flawed, stool_pairs, write_folder
from editloss_core.pair_audit.audit import audit
from editloss_core.pair_audit.flawed import find_flawed, flaws, handle, look
from editloss_core.pairs import PairSet
from editloss_core.training.config import ModelSection, PairsSection, RunSection, TrainingConfig, ValidationSection
from editloss_core.training.config_reader import parse_config
from editloss_core.training.run import load_pairs

PARTS = Path(__file__).parents[1] / "pictures" / "parts"
CANNOT = "whether an after picture still shows the old object cannot be told: "


def pairs_of(examples: Sequence[Example], masks: bool = False, captions: str = "") -> PairSet:
    before, after = (torch.stack([getattr(e, part) for e in examples]) for part in ("before", "after"))
    mask = torch.stack([edit_region(e) for e in examples]) if masks else None
    texts = [captions or e.prompt for e in examples]
    return PairSet.from_images(before, after, mask, texts, names=[str(e.seed) for e in examples], resolution=128)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Six right pairs, one of them a lamp's, then an unedited and an overlaid one."""
    *right, one, two = stool_pairs(8, 700)
    return [*right, flawed(one, "unedited"), flawed(two, "overlaid")]


def names(examples: Sequence[Example]) -> list[str]:
    return [str(e.seed) for e in examples]


@pytest.mark.slow
@pytest.mark.parametrize("masks", [True, False])
def test_both_kinds_are_found_and_no_right_pair(examples: list[Example], masks: bool) -> None:
    steps: list[tuple[int, int]] = []
    found = find_flawed(pairs_of(examples, masks), lambda done, total: steps.append((done, total)))
    assert [(f.name, f.kind) for f in found.found] == list(zip(names(examples)[6:], ("unedited", "overlaid")))
    assert found.notes == () and steps == [(i + 1, 8) for i in range(8)]
    assert re.fullmatch(r"0\.0% of the picture changes, in the others 1\d%", found.found[0].detail)
    assert re.fullmatch(r"of what changed [0-9]% shows the room behind, in the others [3-6]\d%", found.found[1].detail)


@pytest.fixture(scope="module")
def rendered() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of six rendered rooms: before, after, and the stool painted over the chair."""

    def read(part: str, name: str) -> Tensor:
        mode = "RGBA" if part in ("old", "new") else "L" if "shadow" in part else "RGB"
        return torch.from_numpy(np.array(Image.open(PARTS / part / f"{name}.webp").convert(mode))).float() / 255

    def over(picture: Tensor, layer: Tensor) -> Tensor:
        return picture * (1 - layer[..., 3:]) + layer[..., :3] * layer[..., 3:]

    found = []
    for path in sorted((PARTS / "plate").glob("*.webp")):
        plate, old, new, dark, darker = (
            read(part, path.stem) for part in ("plate", "old", "new", "old_shadow", "new_shadow")
        )
        before = over(plate * (1 - dark[..., None]), old)
        shade = 1 - darker[..., None]
        found.append((before, over(plate * shade, new), over(before * shade, new)))
    return found


@pytest.mark.slow
def test_rendered_chairs_that_still_stand_behind_the_stool(rendered: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Each in turn is the flawed one of six; rooms, chairs and light differ, and the stool has the colours of wood and floors. In so
    few pairs not each is told, but none is taken for another."""
    right, overlaid = ([look(pair[0], pair[side]) for pair in rendered] for side in (1, 2))
    names = ["armchair", "bar_stool", "cushion_chair", "oak_chair", "osaka_chair", "thonet"]
    captions = dict.fromkeys(names, "replace the chair with the stool")
    assert flaws(dict(zip(names, right)), captions).found == ()
    told = {}
    for i, name in enumerate(names):
        found = flaws(dict(zip(names, [*right[:i], overlaid[i], *right[i + 1 :]])), captions).found
        told[name] = [(f.name, f.kind) for f in found]
    assert told["armchair"] == [("armchair", "overlaid")]
    assert all(found in ([], [(name, "overlaid")]) for name, found in told.items())


@pytest.mark.slow
def test_pictures_are_read_at_their_own_size(examples: list[Example]) -> None:
    """However small they are trained."""
    before, after = (torch.stack([getattr(e, part) for e in examples]) for part in ("before", "after"))
    small = PairSet.from_images(before, after, None, "edit it", names=names(examples), resolution=64)
    assert [f.name for f in find_flawed(small).found] == names(examples)[6:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edits", "why"),
    [
        ([draw(1_000_900 + i, "recolour", target="red") for i in range(6)], "in most of the pairs next to nothing is taken away"),
        ([draw(1_000_920 + i, "recolour") for i in range(6)], "the pairs do not put one and the same thing in"),
        ([draw(1_000_940 + i) for i in range(8)], "the pairs do not put one and the same thing in"),
        (stool_pairs(3, 701), "it takes 4 pairs with an edit, there are 3"),
    ],
)  # fmt: skip
def test_a_set_without_a_common_new_object_says_so_and_nobody_is_accused(edits: list[Example], why: str) -> None:
    assert find_flawed(pairs_of(edits, captions="edit it")) == ((), (CANNOT + why,))


@pytest.mark.slow
def test_an_addition_among_replacements_is_right_where_its_caption_says_so(examples: list[Example]) -> None:
    added = stool_pairs(1, 702)[0]
    images = [(e.before, e.after) for e in examples[:6]] + [(added.background, added.after)]
    for caption, accused in (("add my stool", []), ("replace the chair with my stool", ["pair 7"])):
        captions = ["replace the chair with my stool"] * 6 + [caption]
        captions = [f"{c} number {i}" for i, c in enumerate(captions)]  # one group, by look alone
        before, after = (torch.stack(side) for side in zip(*images))
        pairs = PairSet.from_images(before, after, None, captions, resolution=128)
        assert [f.name for f in find_flawed(pairs).found] == accused


@pytest.mark.slow
def test_what_is_done_with_them(examples: list[Example]) -> None:
    pairs = pairs_of(examples)
    out = handle(pairs, "leave out")
    assert [p.name for p in out.pairs] == names(examples)[:6] and list(out.left_out) == names(examples)[6:]
    (note,) = out.pairs.notes
    assert note.startswith(f"2 of 8 pairs are flawed, and left out. {examples[6].seed}: nothing was edited (0.0% of")
    assert f"{examples[7].seed}: the old object is still there (of what changed" in note
    assert out.pairs.flawed == "leave out"

    kept = handle(pairs, "keep")
    assert kept.pairs.pairs == pairs.pairs and kept.left_out == () and kept.found == out.found
    assert kept.pairs.notes[0].startswith("2 of 8 pairs are flawed, and kept as asked. ")

    with pytest.raises(
        ValueError, match=rf"^pairs: 2 of 8 pairs are flawed; nothing was started.*{examples[7].seed}: the"
    ):
        handle(pairs, "stop")
    with pytest.raises(ValueError, match="flawed: expected one of 'leave out', 'keep', 'stop', got 'drop'"):
        handle(pairs, "drop")


@pytest.mark.slow
def test_more_than_a_third_are_never_left_out(examples: list[Example]) -> None:
    many = pairs_of([*examples[:4], flawed(examples[4], "unedited"), *examples[6:]])
    out = handle(many, "leave out")
    assert len(out.found) == 3 and out.left_out == () and len(out.pairs) == 7
    assert "3 of 7 pairs are flawed, more than a third, so that it may be a set of different edits; all are kept" in out.pairs.notes[0]  # fmt: skip


@pytest.mark.slow
def test_a_clean_set_is_as_it_was(examples: list[Example]) -> None:
    pairs = pairs_of(examples[:6])
    out = handle(pairs, "stop")
    assert out.pairs.pairs == pairs.pairs and out.pairs.notes == () and out[1:] == ((), (), ())


@pytest.mark.slow
def test_the_audit_names_them(examples: list[Example]) -> None:
    found = audit(pairs_of(examples))
    assert [(f.kind, f.severity, f.pairs[0]) for f in found.findings if f.kind in ("no edit", "overlaid")] == [
        ("no edit", "error", str(examples[6].seed)),
        ("overlaid", "warning", str(examples[7].seed)),
    ]
    assert "it teaches overlays" in next(f.advice for f in found.findings if f.kind == "overlaid")


@pytest.mark.slow
def test_a_config_leaves_them_out_before_it_holds_pairs_out(examples: list[Example], tmp_path: Path) -> None:
    write_folder(examples, tmp_path / "pairs")
    section = PairsSection("pairs", resolution=128)
    config = TrainingConfig(ModelSection("m"), section, RunSection("r"), validation=ValidationSection(hold_out=2))
    train, watched = load_pairs(config, tmp_path)
    assert watched is not None
    left = {int(p.name.removeprefix("scene_")) for p in (*train, *watched)}
    assert left == {e.seed for e in examples[:6]} and len(watched) == 2
    with pytest.raises(ValueError, match="pairs.flawed: expected one of 'leave out', 'keep', 'stop', got 'drop'"):
        parse_config('[model]\npath = "m"\n[pairs]\nfolder = "p"\nflawed = "drop"\n[run]\nfolder = "r"\n', files=False)


@pytest.mark.parametrize("seed", range(5))
def test_the_sets_of_the_experiment_become_the_right_pairs(seed):
    """benchmarks/efficacy and the README call them "left out" and train on the right ones."""
    pairs = stool_pairs(16, seed)
    flaws = [None] * 12 + ["unedited"] * 2 + ["overlaid"] * 2
    made = [flawed(e, f) if f else e for e, f in zip(pairs, flaws)]
    before, after = (torch.stack([getattr(e, part) for e in made]) for part in ("before", "after"))
    names = [str(i) for i in range(16)]
    found = handle(PairSet.from_images(before, after, None, [e.prompt for e in made], names=names), "leave out")
    assert sorted(map(int, found.left_out)) == [12, 13, 14, 15]
