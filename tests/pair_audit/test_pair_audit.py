"""Pair audit: every kind of finding provoked, how exact the movement is, and what must not be told."""

import io
import json
import math
import shutil

import numpy as np
import profiles
import pytest
import torch
from PIL import Image, ImageDraw

from editloss_core.demo.scenes import draw, flawed, stool_pairs, write_folder
from editloss_core.encoders.base import Encoder, EncoderInfo
from editloss_core.pair_audit.audit import KINDS, audit
from editloss_core.pair_audit.between_pairs import group_of
from editloss_core.pair_audit.picture import audit_picture
from editloss_core.pair_audit.registration import register, turned
from editloss_core.pair_audit.result import PairAudit
from editloss_core.pair_audit.rules import of_caption, of_letters
from editloss_core.pairs import PairSet, find_pairs

SIZE = 256
CAPTION = "replace the thing with my stool"


# --- pictures --------------------------------------------------------------------------------------------------------


def room(seed, size=SIZE):
    """A surface with detail at several scales, uint8."""
    random = np.random.default_rng(seed)
    total = np.zeros((size, size, 3))
    for cells in (4, 12, 32, 80):
        coarse = Image.fromarray(random.integers(0, 255, (cells, cells, 3), np.uint8))
        total += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float)
    grain = random.normal(0, 5, (size, size, 1))
    return (60 + 0.5 * total / 4 + random.integers(0, 40, 3) + grain).clip(0, 255).astype(np.uint8)


def edit(seed, size=SIZE, old=None):
    """(before, after, mask): an ellipse of any colour becomes a blue box with yellow stripes."""
    random = np.random.default_rng([seed, 7])
    before, after = (Image.fromarray(room(seed, size)) for _ in range(2))
    mask = Image.new("L", (size, size))
    x, y = random.integers(size // 4, size // 2, 2)
    w = size // 4
    colour = tuple(int(c) for c in random.integers(0, 255, 3)) if old is None else old
    ImageDraw.Draw(before).ellipse((x, y, x + w, y + w * 5 // 4), fill=colour, outline=(20, 20, 20), width=2)
    box = ImageDraw.Draw(after)
    box.rectangle((x, y + w // 4, x + w, y + w * 5 // 4), fill=(30, 40, 160))
    for at in range(x + 6, x + w, 12):
        box.line((at, y + w // 4, at, y + w * 5 // 4), fill=(240, 210, 40), width=4)
    ImageDraw.Draw(mask).rectangle((x - 5, y - 5, x + w + 5, y + w * 5 // 4 + 5), fill=255)
    return tuple(map(np.asarray, (before, after, mask)))


def moved(picture, x=0.0, y=0.0, zoom=1.0, turn=0.0, wide=1.0):
    """The content moves right and down, grows about the centre, and turns clockwise."""
    height, width = picture.shape[:2]
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    inverse = np.linalg.inv(np.array([[c, -s], [s, c]]) * zoom @ np.diag([wide, 1.0]))
    middle = np.array([width / 2, height / 2])
    offset = middle - inverse @ (middle + [x, y])
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    return np.asarray(
        Image.fromarray(picture).transform((width, height), Image.Transform.AFFINE, matrix, Image.BICUBIC)
    )


def jpeg(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def save(root, name, before, after, mask=None, caption=CAPTION):
    for part, picture in (("before", before), ("after", after), ("mask", mask)):
        if picture is not None:
            (root / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / part / f"{name}.png")
    if caption is not None:
        (root / "after" / f"{name}.txt").write_text(caption, encoding="utf-8")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Six pairs that nothing is wrong with."""
    root = tmp_path_factory.mktemp("good")
    for seed in range(6):
        save(root, f"p{seed}", *edit(seed))
    return root


@pytest.fixture
def six(good, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(good, tmp_path / "pairs")


@pytest.fixture
def folder(six):
    """Fewer, where the others do not matter."""
    for path in [*six.glob("*/p3.*"), *six.glob("*/p4.*"), *six.glob("*/p5.*"), *six.glob("*/p0.*")]:
        path.unlink()
    return six


def spoil(folder, name="p2", part="after", by=None):
    path = folder / part / f"{name}.png"
    Image.fromarray(np.ascontiguousarray(by(np.asarray(Image.open(path))))).save(path)


def only(found: PairAudit, kind: str):
    """The finding of a kind, and nothing else."""
    assert [f.kind for f in found.findings] == [kind], found.text()
    assert found.findings[0].severity in ("error", "warning", "note")
    return found.findings[0]


# --- nothing to say --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clean_folder_has_no_findings(good):
    steps = []
    found = audit(good, progress=lambda done, total: steps.append((done, total)))
    assert found.findings == () and found.ok and found.headline() == "6 pairs: nothing found"
    assert set(found.per_pair) == {f"p{i}" for i in range(6)}
    assert steps == [(i + 1, 12) for i in range(12)]
    assert all(
        v.movement.registered and v.movement.moved < 0.1 and v.mask.uncovered < 0.05 for v in found.per_pair.values()
    )
    assert audit_picture(found, 800).shape[2:] == (800, 3)
    assert any("every pair is swapped" in note for note in found.notes)


@pytest.mark.slow
def test_set_of_files_and_of_pictures_give_the_same(good):
    pairs = find_pairs(good)
    assert audit(pairs).findings == ()
    loaded = [edit(seed) for seed in range(4)]
    before, after, mask = (torch.from_numpy(np.stack(part)).float() / 255 for part in zip(*loaded))
    made = audit(PairSet.from_images(before, after, mask, CAPTION, names=["a", "b", "c", "d"]))
    assert made.findings == () and made.where == ""
    names = ("shift_x", "changed_share", "uncovered", "tone")
    for one, two in zip("abcd", (f"p{i}" for i in range(4))):
        own, same = audit(pairs).per_pair[two].as_dict(), made.per_pair[one].as_dict()
        assert all(same[n] == pytest.approx(own[n], abs=1e-5) for n in names)


@pytest.mark.slow
def test_drawn_pairs_give_no_false_alarm(tmp_path):
    """128 pixels across, with flat walls, faint shadows and exact masks."""
    write_folder([*stool_pairs(24), *(draw(1_000_000 + i) for i in range(12))], tmp_path)
    found = audit(tmp_path)
    assert [f for f in found.findings if f.severity != "note"] == [], found.text()
    movements = [v.movement for v in found.per_pair.values()]
    assert max(m.moved for m in movements if m.registered and m.agreement > 0.3) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("quality", [90, 60, 30])
def test_jpeg_is_no_movement_and_no_change(six, quality):
    for i in range(6):
        spoil(six, f"p{i}", by=lambda picture: jpeg(picture, quality))
    found = audit(six)
    assert {f.kind for f in found.findings} <= {"softness", "compression", "tone"} and found.ok
    assert all(v.movement.moved < 0.3 and v.mask.uncovered < 0.05 for v in found.per_pair.values())


# --- movement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [None, 75])
@pytest.mark.parametrize("x, y", [(2.0, 0.0), (0.0, -2.0), (-0.7, 0.7), (11.0, 5.0), (-31.0, 12.0)])
def test_shift_is_measured(x, y, quality):
    errors = []
    for seed in range(3):
        before, after, mask = edit(seed)
        after = moved(after, x, y)
        found = register(*(planes(p if quality is None else jpeg(p, quality)) for p in (before, after)))
        assert found.trusted
        errors += [abs(float(found.shift[0]) * SIZE - x), abs(float(found.shift[1]) * SIZE - y)]
        assert abs(found.zoom - 1) < 0.001 and abs(found.rotation) < 0.05
    assert max(errors) < 0.1  # asked for: 0.3


@pytest.mark.parametrize("zoom", [0.98, 1.004, 1.02, 1.15])
def test_zoom_is_measured(zoom):
    before, after, _ = edit(1)
    found = register(planes(before), planes(moved(after, zoom=zoom)))
    assert found.trusted and abs(found.zoom - zoom) < 0.0005  # asked for: 0.003
    assert abs(found.stretch - 1) < 0.001 and float(found.shift.norm()) * SIZE < 0.1


def test_rotation_and_stretch_are_measured():
    before, after, _ = edit(2)
    turned_found = register(planes(before), planes(moved(after, turn=1.5)))
    wide = register(planes(before), planes(moved(after, wide=1.02)))
    assert turned_found.rotation == pytest.approx(1.5, abs=0.03)
    assert wide.stretch == pytest.approx(1.02, abs=0.001)


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("shift", {"x": 2.0}, "2.0 px right"),
        ("shift", {"x": -1.0, "y": 3.0}, "1.0 px left, 3.0 px down"),
        ("zoom", {"zoom": 1.02}, "2.0 % larger"),
        ("rotation", {"turn": -1.0}, "turned by 1.0° anticlockwise"),
        ("stretch", {"wide": 1.02}, "2.0 % wider"),
    ],
)
def test_movement_is_told_with_its_number(folder, kind, change, words):
    spoil(folder, by=lambda picture: moved(picture, **change))
    found = audit(folder)
    finding = only(found, kind)
    assert words in finding.detail and finding.files == ("after/p2.png",) and finding.severity == "warning"
    assert "after/p2.png" in found.text() and KINDS[kind].advice in found.text()
    assert found.per_pair["p2"].mask.uncovered < 0.05  # the mask is judged once the movement is taken out


def test_movement_by_a_latent_is_an_error(folder):
    spoil(folder, by=lambda picture: moved(picture, x=9.0))
    assert only(audit(folder), "shift").severity == "error"


@pytest.mark.slow
def test_movement_of_half_a_pixel_in_a_large_picture_is_nothing(tmp_path):
    before, after, mask = edit(3, 1536)
    save(tmp_path, "large", before, moved(after, x=0.6), mask)
    assert audit(tmp_path).findings == ()


def test_edit_that_moves_its_object_is_no_shift(tmp_path):
    before, _, _ = edit(4)
    base = room(4)
    after = base.copy()
    after[80:180, 130:210] = before[60:160, 80:160]
    save(tmp_path, "chair", before, after, caption="move the ball to the right")
    assert not {f.kind for f in audit(tmp_path).findings} & {"shift", "zoom", "rotation", "stretch"}


@pytest.mark.parametrize(
    "way, by",
    [
        ("mirrored", lambda p: p[:, ::-1]),
        ("upside down", lambda p: p[::-1]),
        ("turned by 180°", lambda p: p[::-1, ::-1]),
        ("turned by 90° clockwise", lambda p: np.rot90(p, -1)),
        ("turned by 90° anticlockwise", lambda p: np.rot90(p, 1)),
    ],
)
def test_mirrored_and_turned_pictures(folder, way, by):
    spoil(folder, by=by)
    assert way in only(audit(folder), "turned").detail


def test_nothing_is_turned_in_unrelated_pictures():
    assert {turned(planes(room(i)), planes(room(i + 50))) for i in range(20)} == {""}


def planes(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_width_and_height_swapped(folder):
    (folder / "mask" / "p2.png").unlink()
    spoil(folder, part="before", by=lambda p: np.asarray(Image.fromarray(p).resize((192, 256))))
    spoil(folder, part="after", by=lambda p: np.asarray(Image.fromarray(p).resize((256, 192))))
    found = audit(folder)
    kinds = {f.kind: f for f in found.findings}
    assert set(kinds) == {"proportions", "size swapped"}
    assert "192×256 and 256×192" in kinds["size swapped"].detail and "squeezed" in kinds["size swapped"].detail


@pytest.mark.parametrize(
    "by, words",
    [
        (lambda p: p[40:-40], "the after picture is cropped"),
        (lambda p: np.asarray(Image.fromarray(p).resize((256, 200))), "squeezed"),
    ],
)
def test_other_proportions_are_explained(folder, by, words):
    spoil(folder, by=by)
    assert words in only(audit(folder), "proportions").detail


def test_other_size_of_one_side_is_a_note(folder):
    spoil(folder, by=lambda p: np.asarray(Image.fromarray(p).resize((512, 512), Image.Resampling.BICUBIC)))
    found = audit(folder)
    assert "256×256 and 512×512" in only(found, "sizes").detail and found.ok
    assert found.per_pair["p2"].movement.moved < 0.2


# --- no edit, background ---------------------------------------------------------------------------------------------


def test_same_picture_and_nearly_the_same(folder):
    shutil.copy(folder / "before" / "p1.png", folder / "after" / "p1.png")
    before = np.asarray(Image.open(folder / "before" / "p2.png"))
    Image.fromarray(jpeg(before, 80)).save(folder / "after" / "p2.png")
    found = audit(folder)
    assert [(f.kind, f.pairs) for f in found.findings] == [("no edit", ("p1",)), ("no edit", ("p2",))]
    assert "they are the same" in found.findings[0].detail and "Oklab" in found.findings[1].detail


def test_unedited_drawn_scenes_are_found(tmp_path):
    """The before picture again with 6 % less contrast."""
    examples = [flawed(draw(1_000_000 + i, "replace"), "unedited") for i in range(8)]
    names = write_folder(examples, tmp_path)
    found = audit(tmp_path)
    assert {n for f in found.findings if f.kind == "no edit" for n in f.pairs} == set(names)


def test_a_relit_picture_is_no_missing_edit(tmp_path):
    save(tmp_path, "dusk", room(1), (room(1) * 0.8).astype(np.uint8), caption="make it dusk")
    assert "nothing else changes" in only(audit(tmp_path), "tone").detail


def test_tiny_edit(tmp_path):
    before = room(1)
    after = before.copy()
    after[100:104, 100:103] = (250, 20, 20)
    save(tmp_path, "dot", before, after, caption="add a dot")
    assert "% of the picture" in only(audit(tmp_path), "tiny edit").detail


def test_tone(folder):
    spoil(folder, by=lambda p: (p * 1.15).clip(0, 255).astype(np.uint8))
    found = audit(folder)
    assert "brighter" in only(found, "tone").detail and found.ok
    assert found.per_pair["p2"].mask.uncovered < 0.05  # a tone is no change of the picture


def test_softness_and_compression(folder):
    spoil(folder, "p1", by=lambda p: np.asarray(Image.fromarray(p).resize((128, 128)).resize((256, 256))))
    spoil(folder, "p2", by=lambda p: jpeg(p, 12))
    found = audit(folder)
    kinds = {(f.kind, f.pairs[0]) for f in found.findings}
    assert kinds == {("softness", "p1"), ("softness", "p2"), ("compression", "p2")} and found.ok


def test_repainted_background(tmp_path):
    save(tmp_path, "style", room(1), room(77), caption="make it a painting")
    assert only(audit(tmp_path), "background").severity == "note"


# --- masks -----------------------------------------------------------------------------------------------------------


def box(*place):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[place[0] : place[1], place[2] : place[3]] = 255
    return mask


@pytest.mark.parametrize(
    "kind, by",
    [
        ("mask inverted", lambda m: 255 - m),
        ("mask elsewhere", lambda m: box(2, 40, 2, 40)),
        ("mask short", lambda m: np.where(np.arange(SIZE) < np.nonzero(m.any(0))[0].mean(), m, 0)),
        ("mask tiny", lambda m: box(100, 101, 100, 101)),
        ("mask large", lambda m: np.full_like(m, 255)),
        ("mask empty", lambda m: np.zeros_like(m)),
        ("mask proportions", lambda m: m[: SIZE // 2]),
    ],
)
def test_masks(folder, kind, by):
    spoil(folder, part="mask", by=lambda m: by(m).astype(np.uint8))
    finding = only(audit(folder), kind)
    assert finding.files[0] == "mask/p2.png" and finding.detail


# --- between pairs ---------------------------------------------------------------------------------------------------


def swap(folder, *names):
    for name in names:
        before, after = (folder / part / f"{name}.png" for part in ("before", "after"))
        first = before.read_bytes()
        before.write_bytes(after.read_bytes())
        after.write_bytes(first)


def test_swapped_pair_is_found(six):
    swap(six, "p4")
    found = audit(six)
    finding = only(found, "swapped")
    assert finding.pairs == ("p4",) and "opposite way" in finding.detail and not found.ok
    assert found.per_pair["p4"].support < 0 < found.per_pair["p1"].support


def test_swapped_drawn_pairs_are_found(tmp_path):
    """Precision and recall over drawn scenes: an object of any kind and colour becomes the stool."""
    names = write_folder(stool_pairs(20, seed=3), tmp_path)
    swapped = set(names[::4])
    swap(tmp_path, *swapped)
    found = {f.pairs[0] for f in audit(tmp_path).findings if f.kind == "swapped"}
    assert found == swapped


def test_a_set_swapped_as_a_whole_is_only_a_note(six):
    swap(six, *(f"p{i}" for i in range(6)))
    found = audit(six)
    assert found.findings == ()
    assert any("all of them may be swapped" in note for note in found.notes)


def test_half_swapped_is_told_without_naming_a_side(six):
    swap(six, "p0", "p1", "p2")
    found = audit(six)
    assert [f for f in found.findings if f.kind == "swapped"] == []
    assert any("one of the two kinds is swapped" in note for note in found.notes)


def test_few_pairs_of_a_target_say_nothing(six):
    swap(six, "p4")
    for i in range(6):
        (six / "after" / f"p{i}.txt").write_text(f"replace the ball with thing {i // 3}")
    found = audit(six)
    assert found.findings == () and any("6 of the pairs" in note for note in found.notes)


@pytest.mark.slow
def test_captions_that_remove_and_add(tmp_path):
    for seed in range(2):
        base = np.full((SIZE, SIZE, 3), 128, np.uint8) // 2 + room(seed) // 4
        with_box = base.copy()
        with_box[80:160, 80:160:8] = 250
        save(tmp_path, f"good{seed}", with_box, base, caption="remove the fence")
        save(tmp_path, f"bad{seed}", base[::-1].copy(), with_box[::-1].copy(), caption="remove the fence")
        save(tmp_path, f"late{seed}", with_box[:, ::-1].copy(), base[:, ::-1].copy(), caption="add a fence")
    found = {f.pairs[0] for f in audit(tmp_path).findings if f.kind == "swapped"}
    assert found == {"bad0", "bad1", "late0", "late1"}


class Means(Encoder):
    """The mean colour of each quarter."""

    info = EncoderInfo("means", "none", "0", "grid")
    device = torch.device("cpu")

    def forward(self, images):
        self.calls = getattr(self, "calls", 0) + 1
        return torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    def grid(self, height, width):
        return 2, 2


def test_an_encoder_may_help(six):
    swap(six, "p4")
    encoder = Means()
    assert only(audit(six, encoder=encoder), "swapped").pairs == ("p4",) and encoder.calls


def test_groups_go_by_the_target():
    same = {group_of(c) for c in ("Replace the chair with my stool.", "replace the old table  with my STOOL")}
    assert len(same) == 1
    assert group_of("remove the lamp") == group_of("Remove the chair, please")
    assert group_of("make it red") != group_of("make it blue")


def test_wrong_partners(folder):
    after = [folder / "after" / f"p{i}.png" for i in (1, 2)]
    first = after[0].read_bytes()
    after[0].write_bytes(after[1].read_bytes())
    after[1].write_bytes(first)
    found = audit(folder)
    assert [(f.kind, f.pairs) for f in found.findings] == [("wrong partner", ("p1",)), ("wrong partner", ("p2",))]
    assert "after/p2.png" in found.findings[0].detail


@pytest.mark.slow
def test_copies(six):
    for part in ("before", "after", "mask"):
        shutil.copy(six / part / "p0.png", six / part / "again.png")
    shutil.copy(six / "after" / "p0.txt", six / "after" / "again.txt")
    assert set(only(audit(six), "duplicate pair").pairs) == {"p0", "again"}
    spoil(six, "again", "before", lambda p: jpeg(p, 85))
    spoil(six, "again", "after", lambda p: jpeg(p, 85))
    assert "to the eye" in only(audit(six), "duplicate pair").detail


@pytest.mark.slow
def test_same_before_and_same_after(six):
    before, after, mask = edit(0)
    other = after.copy()
    other[60:200, 60:200] = (200, 60, 60)
    save(six, "again", before, other, box(55, 205, 55, 205), caption=CAPTION)
    kinds = {f.kind: f for f in audit(six).findings}
    assert set(kinds["same before"].files) == {"before/again.png", "before/p0.png"}
    (six / "after" / "again.txt").write_text("replace the thing with a red wall")
    assert "same before" not in {f.kind for f in audit(six).findings}
    save(six, "again", other, after, box(55, 205, 55, 205))
    assert "same after" in {f.kind for f in audit(six).findings}


def test_the_same_pair_both_ways(six):
    before, after, mask = edit(0)
    save(six, "back", after, before, mask)
    kinds = {f.kind: f for f in audit(six).findings}
    assert kinds["reversed"].severity == "error" and set(kinds["reversed"].pairs) == {"back", "p0"}


def test_pictures_of_another_set(good, folder, tmp_path):
    others = tmp_path / "others"
    save(others, "theirs", *edit(2))
    save(others, "new", *edit(40))
    found = audit(folder, others=find_pairs(others))
    assert only(found, "leak").pairs == ("p2",) and "theirs" in found.findings[0].detail
    assert audit(good).findings == ()


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, caption",
    [
        ("caption long", "replace the chair " + "with a very nice stool " * 30),
        ("caption placeholder", "replace the chair with [trigger]"),
        ("caption no verb", "a wooden stool in a room"),
    ],
)
def test_captions(folder, kind, caption):
    (folder / "after" / "p2.txt").write_text(caption)
    finding = only(audit(folder), kind)
    assert finding.severity == "note" and finding.pairs == ("p2",)


@pytest.mark.parametrize(
    "caption",
    ["replace the chair with my stool", "Removing the lamp", "make it blue", "swap A for B", "椅子をスツールに", "Recolor the car", "turn day into night"],
)  # fmt: skip
def test_instructions_pass(caption):
    assert of_caption(caption) == []


def test_captions_that_a_text_encoder_cannot_read(folder):
    """T5, the text encoder of FLUX, knows English, German, French and Romanian; of other letters it makes one token each time."""
    (folder / "after" / "p2.txt").write_text("把椅子换成我的凳子", encoding="utf-8")
    found = audit(folder)
    finding = only(found, "caption unread")
    assert finding.severity == "warning" and finding.files == ("after/p2.png",) and not found.ok
    assert finding.detail == "the text encoder of FLUX.1 Kontext does not know 9 of its 9 letters"
    assert any(note.startswith("captions in other scripts than Latin") for note in found.notes)


@pytest.mark.parametrize(
    "caption, told",
    [
        ("replace the chair", False), ("Ersetze den Stuhl über der Straße", False), ("înlocuiește scaunul", False),
        ("zastąp krzesło stołkiem", False), ("", False), ("123 !?", False), ("replace 椅子 with a stool", False),
        ("замени стул на табурет", True), ("αντικατάστησε", True), ("의자를 바꾸다", True), ("椅子 stool に置き換える", True),
    ],
)  # fmt: skip
def test_letters_that_are_known(caption, told):
    assert [f.kind for f in of_letters(caption)] == ["caption unread"] * told


@profiles.without_heic
def test_what_was_passed_over_and_how_pictures_were_read_is_in_the_report(folder):
    (folder / "after" / "IMG.heic").write_bytes(b"x")
    path = folder / "before" / "p1.png"
    Image.open(path).save(path, icc_profile=b"broken")
    for spoilt in (False, True):
        if spoilt:
            (folder / "after" / "p3.png").write_bytes(b"no picture")
        text = audit(folder).text()
        assert "passed over (HEIC needs the package pillow-heif; or save it as PNG): after/IMG.heic" in text
        assert "a colour profile that cannot be used was left out in 1 pairs: p1 (before: " in text
        if not spoilt:
            assert audit(find_pairs(folder)).notes[:2] == audit(folder).notes[:2]


# --- broken folders --------------------------------------------------------------------------------------------------


def test_broken_folder_is_still_looked_at(six):
    (six / "after" / "p0.png").write_bytes(b"not a picture")
    (six / "before" / "p1.png").unlink()
    (six / "after" / "p2.txt").unlink()
    (six / "after" / "p3.txt").write_bytes(b"\xff\xfa\x00")
    spoil(six, "p4", by=lambda p: moved(p, x=2.0))
    (six / "mask" / "stray.png").write_bytes((six / "mask" / "p5.png").read_bytes())
    found = audit(six)
    told = {(f.kind, f.pairs) for f in found.findings}
    assert told == {
        ("unreadable", ("p0",)),
        ("no before", ("p1",)),
        ("no caption", ("p2",)),
        ("unreadable", ("p3",)),
        ("mask alone", ("stray",)),
        ("shift", ("p4",)),
    }
    assert set(found.per_pair) == {"p2", "p3", "p4", "p5"} and found.count == 6
    assert audit_picture(found, 900).shape[2] == 900


def test_alpha_black_and_tiny_pictures(six):
    rgba = Image.open(six / "after" / "p1.png").convert("RGBA")
    rgba.putalpha(255)
    rgba.save(six / "after" / "p1.png")
    spoil(six, "p2", by=np.zeros_like)
    for part in ("before", "after"):
        spoil(six, "p3", part, by=lambda p: p[:9, :12])
    found = audit(six)
    kinds = {(f.kind, f.pairs) for f in found.findings}
    assert ("flat", ("p2",)) in kinds and ("too small", ("p3",)) in kinds
    assert {f.pairs for f in found.findings} <= {("p2",), ("p3",)}


def test_file_that_goes_away_during_the_audit(good, tmp_path):
    root = shutil.copytree(good, tmp_path / "pairs")
    pairs = find_pairs(root)
    (root / "after" / "p3.png").unlink()
    found = audit(pairs)
    assert [(f.kind, f.files) for f in found.findings] == [("unreadable", ("after/p3.png",))]
    assert len(found.per_pair) == 5 and audit_picture(found, 700).shape[2] == 700


def test_all_without_partners(tmp_path):
    for i in range(3):
        save(tmp_path, f"a{i}", room(i), None, caption=None) if i else save(tmp_path, "b", None, room(9))
    found = audit(tmp_path)
    assert {f.kind for f in found.findings} == {"no after", "no before"} and found.count == 3
    assert audit_picture(found, 640).shape[2] == 640


@pytest.mark.parametrize(
    "given, words",
    [((7,), "pairs: expected a PairSet or a folder, got int"), (("nowhere",), "there is no folder")],
)
def test_bad_arguments(given, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        audit(*given)


def test_stops_when_asked(good):
    class Stop(Exception):
        pass

    def check():
        raise Stop

    with pytest.raises(Stop):
        audit(good, check=check)


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_in_words_numbers_and_a_picture(six):
    swap(six, "p4")
    spoil(six, "p1", by=lambda p: moved(p, zoom=1.02))
    spoil(six, "p2", part="mask", by=lambda m: 255 - m)
    found = audit(six)
    assert found.headline() == "6 pairs: 1 error, 2 warnings"
    text = found.text()
    assert text.index("## Errors") < text.index("## Warnings") < text.index("## To know") < text.index("## Measured")
    for finding in found.findings:
        assert finding.advice in text and all(file in text for file in finding.files)
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["ok"] is False and values["counts"] == {"error": 1, "warning": 2, "note": 0}
    assert set(values["per_pair"]["p1"]) <= set(values["measures"])
    assert values["per_pair"]["p1"]["zoom"] == pytest.approx(2.0, abs=0.1)
    assert [f["kind"] for f in values["findings"]] == [f.kind for f in found.findings]
    assert found.summary().splitlines()[0] == found.headline() and len(found.summary().splitlines()) == 4
    picture = audit_picture(found, 1000)
    assert picture.shape[0] == 1 and picture.shape[2:] == (1000, 3) and 0 <= picture.min() < picture.max() <= 1
    with pytest.raises(ValueError, match="width: expected a whole number"):
        audit_picture(found, 0)


def test_every_kind_says_what_to_do():
    assert all(kind.advice and kind.severity in ("error", "warning", "note") for kind in KINDS.values())
