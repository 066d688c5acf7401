"""More than one picture that a model looks at: before_2, before_3 … beside the before picture."""

import pytest
import torch
from PIL import Image

from editloss_core.models.captions import check_references, distinct_captions
from editloss_core.models.kontext import KONTEXT
from editloss_core.models.omnigen2 import OMNIGEN2
from editloss_core.models.qwen import QWEN_EDIT_PLUS
from editloss_core.pairs import PairProblems, PairSet, VariantSettings, find_pairs, folder_state, with_variants

SIZES = {"before": (96, 64), "after": (96, 64), "before_2": (64, 128), "control_3": (80, 80)}  # width, height


def write(folder, name, part, colour=0):
    path = folder / part / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", SIZES[part], (colour, 40, {"after": 200}.get(part, 20))).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """a has three pictures to look at, b two, c one."""
    for name, parts in {"a": SIZES, "b": ("before", "after", "before_2"), "c": ("before", "after")}.items():
        for part in parts:
            write(tmp_path, name, part, 60 * "abc".index(name))
        (tmp_path / "after" / f"{name}.txt").write_text("turn it blue", encoding="utf-8")
    return tmp_path


def test_a_folder_has_further_references_each_in_its_own_proportions(folder):
    pairs = find_pairs(folder, resolution=64)
    assert [len(pair.references) for pair in pairs] == [2, 1, 0]
    images = pairs.load(0)
    assert images.before.shape == images.after.shape == (48, 80, 3)
    assert [r.shape for r in images.references] == [(80, 48, 3), (64, 64, 3)] and pairs.load(2).references == ()
    assert pairs.reference_targets(0) == ((80, 48), (64, 64))
    assert not any("passed over" in note for note in pairs.notes), pairs.notes


def test_they_belong_to_what_a_pair_is(folder):
    pairs, state = find_pairs(folder, resolution=64), folder_state(folder)
    write(folder, "b", "before_2", 255)
    again = find_pairs(folder, resolution=64)
    assert folder_state(folder) != state and again.digest != pairs.digest
    assert [pairs.fingerprint(i) == again.fingerprint(i) for i in range(3)] == [True, False, True]
    with pytest.raises(ValueError, match="before_2/b.png has changed since"):
        pairs.load_checked(1)
    assert pairs.as_they_are().fingerprint(1) == again.fingerprint(1)


def test_what_a_pair_without_them_is_has_not_changed():
    """The keys of caches that were made before there were any."""
    before = (torch.arange(64 * 64 * 3) % 256).reshape(1, 64, 64, 3) / 255
    pairs = PairSet.from_images(before, 1 - before, None, "x", resolution=64)
    assert pairs.fingerprint(0) == "5a25eaa982525387280594781b5eddc247529254d40198533afbd71af4469008"


def test_those_of_one_batch_have_the_same_number_and_sizes(folder):
    for name in "def":
        for part in ("before", "after", "before_2"):
            write(folder, name, part, 10 * ord(name) % 255)
    pairs = find_pairs(folder, resolution=64, default_caption="turn it blue")
    assert list(pairs.buckets.values()) == [[0, 1, 2, 3, 4, 5]] and pairs.alike == ((0,), (1, 3, 4, 5), (2,))
    for epoch in range(3):
        batches = pairs.batches(4, 0, epoch)
        assert sorted(map(sorted, batches)) == [[0], [1, 3, 4, 5], [2]]


def test_variants_mirror_them_with_the_pair(folder):
    pairs = find_pairs(folder, resolution=64)
    made = with_variants(pairs, VariantSettings(count=8, flip=True, shift=0.0, zoom=1.0, turn=0.0, tone=0.0))
    assert all(made[i].references == made[0].references for i in range(8))
    mirrored = next(i for i in range(8) if made[i].variant and made[i].variant.flip)
    assert torch.equal(made.load(mirrored).references[0], made.load(0).references[0].flip(1))


def test_what_is_wrong_with_them_is_told_with_all_else(folder):
    (folder / "before_2" / "b.png").write_bytes(b"no picture")
    (folder / "before_2" / "a.png").unlink()
    Image.new("RGB", (8, 8)).save(folder / "before_2" / "c.png")
    write(folder, "lone", "before_2")
    with pytest.raises(PairProblems) as told:
        find_pairs(folder, resolution=64)
    kinds = {finding.kind: finding.files for finding in told.value.findings}
    assert kinds == {
        "unreadable": ("before_2/b.png",),
        "reference alone": ("before_2/lone.png",),
        "reference gap": ("control_3/a.png",),
        "too small": ("before_2/c.png",),
    }


def test_pictures_have_one_for_all_or_one_for_each():
    before, further = torch.rand(2, 64, 64, 3), torch.rand(2, 96, 64, 3)
    each = PairSet.from_images(before, 1 - before, None, "x", [further], resolution=64)
    one = PairSet.from_images(before, 1 - before, None, "x", [further[:1]], resolution=64)
    assert not torch.equal(each[0].references[0], each[1].references[0])
    assert torch.equal(one[0].references[0], one[1].references[0])
    with pytest.raises(ValueError, match="before_2: expected 2 like before, got 3"):
        PairSet.from_images(before, 1 - before, None, "x", [torch.rand(3, 64, 64, 3)])
    with pytest.raises(
        ValueError, match=r"before_2: expected pictures \[B, H, W, 3\] in 0…1, got torch.float32 \[64, 64, 3\]"
    ):
        PairSet.from_images(before, 1 - before, None, "x", [further[0, :64]])


def test_a_model_that_looks_at_less_refuses_them_by_name(folder):
    pairs = find_pairs(folder, resolution=64)
    with pytest.raises(
        ValueError,
        match=r"pairs: FLUX.1 Kontext looks at 1 picture for a sample at the most, 'a' has 3 \(before, before_2 …\)",
    ):
        check_references(KONTEXT, [pairs.subset([2]), pairs])
    check_references(KONTEXT, [pairs.subset([2])])
    check_references(OMNIGEN2, [pairs])


def test_captions_that_see_pictures_see_all(folder):
    pairs = find_pairs(folder, resolution=64)
    asked, shared = distinct_captions(QWEN_EDIT_PLUS, [pairs])
    assert [len(one.pictures()) for one in asked] == [3, 2, 1] and shared == [[0, 1, 2]]
    asked, shared = distinct_captions(OMNIGEN2, [pairs])
    assert [one.pictures() for one in asked] == [(None,)] and shared == [[0, 0, 0]]
