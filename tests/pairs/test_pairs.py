"""Pairs: every layout, every bad folder, one geometry for three pictures, buckets and batches."""

import io
import math
import os
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import profiles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from editloss_core.pairs import (
    MULTIPLE,
    Pair,
    PairProblems,
    PairSet,
    VariantSettings,
    bucket_size,
    files,
    find_pairs,
    folder_state,
    load,
    pictures,
    with_variants,
)
from editloss_core.pairs.files import KINDS
from editloss_core.pairs.geometry import Box, cover, same_proportions

NAMES = ("chair", "Lamp", "sofa_2")


def picture(path, size=(96, 128), seed=0, **options):
    """A smooth random picture of (height, width), so that JPEG keeps it."""
    coarse = np.random.default_rng([seed, *os.fsencode("/".join(path.parts[-4:]))]).integers(
        0, 255, (4, 5, 3), np.uint8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path, **options)
    return path


def mask(path, size=(96, 128), box=(30, 40, 60, 80), value=255):
    pixels = np.zeros(size, np.uint8)
    pixels[box[0] : box[2], box[1] : box[3]] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def three(root, masks=True):
    """Layout with folders: three good pairs."""
    for name in NAMES:
        for part in ("before", "after"):
            picture(root / part / f"{name}.png")
        write(root / "after" / f"{name}.txt", f"replace the {name}\n")
        if masks:
            mask(root / "mask" / f"{name}.png")
    return root


def problems(root, *args, **options):
    with pytest.raises(PairProblems) as caught:
        find_pairs(root, *args, **options)
    return caught.value


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_before_and_after_folders(tmp_path):
    found = find_pairs(three(tmp_path), resolution=128)
    assert found.layout == "folders before/ and after/" and [p.name for p in found] == ["chair", "Lamp", "sofa_2"]
    for pair in found:
        assert pair.before == tmp_path / "before" / f"{pair.name}.png"
        assert pair.after == tmp_path / "after" / f"{pair.name}.png"
        assert pair.mask == tmp_path / "mask" / f"{pair.name}.png"
        assert pair.caption == f"replace the {pair.name}"


def test_one_folder_with_suffixes(tmp_path):
    for name in NAMES:
        picture(tmp_path / f"{name}_before.jpg")
        picture(tmp_path / f"{name}_AFTER.png")
    mask(tmp_path / "chair_mask.png")
    write(tmp_path / "chair.txt", "first")
    write(tmp_path / "chair_after.txt", "second")
    write(tmp_path / "Lamp_after.txt", "of the lamp")
    write(tmp_path / "captions" / "sofa_2.txt", "of the sofa")
    found = find_pairs(tmp_path, resolution=128)
    assert found.layout == "one folder with _before and _after"
    assert [(p.name, p.caption) for p in found] == [
        ("chair", "first"),
        ("Lamp", "of the lamp"),
        ("sofa_2", "of the sofa"),
    ]
    assert [p.mask and p.mask.name for p in found] == ["chair_mask.png", None, None]


def test_target_and_control_folder(tmp_path):
    for name in NAMES:
        picture(tmp_path / "target" / f"{name}.png")
        picture(tmp_path / "elsewhere" / "control" / f"{name}.webp", lossless=True)
        write(tmp_path / "target" / f"{name}.txt", name)
    found = find_pairs(tmp_path / "target", tmp_path / "elsewhere" / "control", resolution=128)
    assert found.layout == "after pictures in the folder, before pictures in the control folder"
    assert [(p.before.parent.name, p.after.parent.name, p.caption) for p in found] == [
        ("control", "target", name) for name in NAMES
    ]


@pytest.mark.parametrize("place", ["after", "before", "captions", "."])
def test_captions_are_found_wherever_people_put_them(tmp_path, place):
    three(tmp_path)
    for name in NAMES:
        (tmp_path / "after" / f"{name}.txt").unlink()
        write(tmp_path / place / f"{name}.txt", "\ufeffmake it\n  a stool ")
    assert {p.caption for p in find_pairs(tmp_path)} == {"make it a stool"}


def test_the_caption_beside_the_after_picture_wins(tmp_path):
    three(tmp_path)
    write(tmp_path / "before" / "chair.txt", "other")
    write(tmp_path / "chair.txt", "another")
    assert find_pairs(tmp_path)[0].caption == "replace the chair"


def test_of_two_captions_in_one_place_the_txt_is_read(tmp_path):
    three(tmp_path)
    write(tmp_path / "after" / "chair.caption", "a chair")
    found = find_pairs(tmp_path)
    assert found[0].caption == "replace the chair"
    assert [note for note in found.notes if "chair.caption" in note] == [
        "passed over (the pair has another caption): after/chair.caption"
    ]


def test_a_default_caption_stands_in(tmp_path):
    three(tmp_path)
    (tmp_path / "after" / "chair.txt").unlink()
    write(tmp_path / "after" / "Lamp.txt", " \n")
    found = find_pairs(tmp_path, default_caption=" put a stool there ")
    assert [p.caption for p in found] == ["put a stool there", "put a stool there", "replace the sofa_2"]


def test_a_set_of_a_folder_knows_how_to_be_found_again(tmp_path):
    three(tmp_path)
    folder, control = tmp_path / "after", tmp_path / "before"
    found = find_pairs(folder, control, default_caption=" put a stool there ", resolution=128, upscale=True)
    for part in (found, *found.split(1)):
        again = find_pairs(
            part.folder, part.control_folder, default_caption=part.default_caption, resolution=part.resolution,
            upscale=part.upscale,
        )  # fmt: skip
        assert again.digest == found.digest and again.captions_digest == found.captions_digest
        assert (part.folder, part.control_folder, part.default_caption) == (folder, control, "put a stool there")
    assert find_pairs(tmp_path).control_folder is None


def test_stems_are_matched_whatever_their_case_and_ending(tmp_path):
    three(tmp_path)
    (tmp_path / "before" / "chair.png").unlink()
    picture(tmp_path / "before" / "CHAIR.JPEG")
    assert find_pairs(tmp_path)[0].before.name == "CHAIR.JPEG"


def test_hidden_and_unrelated_files_are_passed_over(tmp_path):
    three(tmp_path)
    for name in (
        "before/._chair.png",
        "after/.DS_Store",
        "after/Thumbs.db",
        "after/notes.md",
        "mask/.hidden.png",
        "README.txt",
    ):
        write(tmp_path / name, "nothing")
    write(tmp_path / "after" / "readme.txt", "nothing")
    picture(tmp_path / "stray.png")
    (tmp_path / "before" / "folder.png").mkdir()
    assert len(find_pairs(tmp_path)) == 3


@pytest.mark.parametrize("make", [lambda r: None, lambda r: picture(r / "a.png"), lambda r: (r / "before").mkdir()])
def test_a_folder_without_pairs_says_what_was_expected(tmp_path, make):
    make(tmp_path)
    there = ", ".join(p.name + "/" * p.is_dir() for p in tmp_path.iterdir()) or "an empty folder"
    with pytest.raises(
        ValueError, match=f"^pairs: no pairs in .*before/ and after/.*_after.*control_folder.*got {there}$"
    ):
        find_pairs(tmp_path)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        find_pairs(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^control_folder: expected another folder"):
        find_pairs(tmp_path, tmp_path / "." / "")


# --- odd but legal ---------------------------------------------------------------------------------------------------

LAYOUTS = {  # layout → (what find_pairs gets, the paths of a pair's parts by its name)
    "folders": (("",), dict(before="before/{}", after="after/{}", mask="mask/{}", text="after/{}")),
    "suffixes": (("",), dict(before="{}_before", after="{}_after", mask="{}_mask", text="{}")),
    "control": (("target", "control"), dict(before="control/{}", after="target/{}", mask="target/mask/{}", text="target/{}")),
}  # fmt: skip
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def found_in(root, layout, **options):
    return find_pairs(*(root / place for place in LAYOUTS[layout][0]), resolution=128, **options)


def lay(root, layout, name, *, texts=("say it",), endings=(".png", ".png", ".png", ".txt"), make=picture):
    """One pair in a layout: ``make`` writes the before and the after picture; returns the paths of its parts."""
    places = LAYOUTS[layout][1]
    paths = {part: root / (places[part].format(name) + ending) for part, ending in zip(places, endings)}
    for part in ("before", "after"):
        make(paths[part])
    mask(paths["mask"])
    for text in texts:
        paths["text"].parent.mkdir(parents=True, exist_ok=True)
        paths["text"].write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


@in_every_layout
@pytest.mark.parametrize(
    "endings",
    [
        (".PNG", ".Jpeg", ".BMP", ".TXT"),
        (".jpeg", ".webp", ".tif", ".txt"),
        (".TIFF", ".WEBP", ".JPG", ".Txt"),
        (".png", ".png", ".png", ".caption"),
    ],
)
def test_every_ending_in_every_case(tmp_path, layout, endings):
    paths = lay(tmp_path, layout, "chair", endings=endings)
    (pair,) = found_in(tmp_path, layout)
    assert (pair.before, pair.after, pair.mask) == (paths["before"], paths["after"], paths["mask"])
    assert pair.caption == "say it"


NAMED = [
    "mein roter Stuhl", "椅子 (2)", "v1.2 final", "a..b", "x.png", "chair.", "readme", "100%", "#1 & co", "before", "after_mask",
    "Ünï",
]  # fmt: skip


@in_every_layout
def test_odd_names(tmp_path, layout):
    for name in NAMED:
        lay(tmp_path, layout, name, texts=(name,))
    found = found_in(tmp_path, layout)
    assert sorted(p.name for p in found) == sorted(NAMED) and all(p.caption == p.name and p.mask for p in found)


@in_every_layout
def test_accents_of_macos_and_of_other_systems_are_the_same(tmp_path, layout):
    """A zip file of a Mac has é in two characters."""
    one, two = (unicodedata.normalize(form, "étagère") for form in ("NFC", "NFD"))
    assert one != two
    paths = lay(tmp_path, layout, one)
    for part in ("before", "mask"):
        if paths[part].exists():
            paths[part].rename(paths[part].with_name(paths[part].name.replace(one, two)))
    (pair,) = found_in(tmp_path, layout)
    assert pair.name == one and two in pair.before.name and pair.mask is not None


@in_every_layout
@pytest.mark.parametrize(
    "written",
    [
        "say it",
        "\ufeffsay it",
        " say\r\n it \r\n",
        "say it".encode("utf-16"),
        b"\xfe\xff" + "say it".encode("utf-16-be"),
    ],
)
def test_captions_as_editors_write_them(tmp_path, layout, written):
    lay(tmp_path, layout, "chair", texts=(written,))
    assert found_in(tmp_path, layout)[0].caption == "say it"


@in_every_layout
@pytest.mark.parametrize("written", [None, "", "\ufeff", " \n\t\n", "\ufeff\n"])
def test_captions_that_say_nothing(tmp_path, layout, written):
    paths = lay(tmp_path, layout, "chair", texts=() if written is None else (written,))
    assert found_in(tmp_path, layout, default_caption="say it")[0].caption == "say it"
    error = problems(*(tmp_path / place for place in LAYOUTS[layout][0]))
    wrong = paths["after" if written is None else "text"]
    assert [(f.kind, f.files) for f in error.findings] == [
        ("no caption", (wrong.relative_to(tmp_path / LAYOUTS[layout][0][0]).as_posix(),))
    ]


@in_every_layout
def test_subfolders_are_searched_and_pairs_stay_in_theirs(tmp_path, layout):
    """The same stem in two subfolders is two pairs, and the parts of one lie in the same subfolder everywhere."""
    names = ["chair", "kitchen/chair", "kitchen/old one/lamp.2"]
    for name in names:
        lay(tmp_path, layout, name, texts=(name,))
    found = found_in(tmp_path, layout)
    assert [(p.name, p.caption) for p in found] == [(name, name) for name in names]
    assert all(p.mask is not None for p in found)
    paths = lay(tmp_path, layout, "hall/sofa")
    paths["before"].unlink()
    error = problems(*(tmp_path / place for place in LAYOUTS[layout][0]))
    assert {f.kind for f in error.findings} == {"no before"} and "hall/sofa" in str(error)


def test_a_control_folder_inside_the_target_folder_and_around_it(tmp_path):
    for target, control in (("a", "a/control"), ("b/target", "b")):
        for name in NAMES:
            picture(tmp_path / target / f"{name}.png")
            picture(tmp_path / control / f"{name}.png")
            write(tmp_path / target / f"{name}.txt", name)
        found = find_pairs(tmp_path / target, tmp_path / control, resolution=128)
        assert [p.name for p in found] == list(NAMES)
        assert all(p.before.parent == tmp_path / control and p.after.parent == tmp_path / target for p in found)


@in_every_layout
def test_what_systems_and_other_trainers_leave_behind(tmp_path, layout):
    lay(tmp_path, layout, "chair")
    for folder in {p.parent for p in tmp_path.rglob("*.png")}:
        for name in (
            ".DS_Store", "Thumbs.db", "desktop.ini", "._chair.png", "._chair_after.png", "._chair.txt", "chair.xmp",
            ".hidden/chair.png", "__MACOSX/lamp_after.png", "_controls/lamp.png", "_latent_cache/chair.safetensors",
            "@eaDir/chair.png/THUMB_M_after.jpg",
        ):  # fmt: skip
            write(folder / name, "nothing")
    assert [p.name for p in found_in(tmp_path, layout)] == ["chair"]


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    for name in ("before", "after"):
        picture(tmp_path / "elsewhere" / name / "chair.png")
        (tmp_path / "pairs" / name).mkdir(parents=True)
        (tmp_path / "pairs" / name / "kitchen").symlink_to(tmp_path / "elsewhere" / name, target_is_directory=True)
        (tmp_path / "elsewhere" / name / "round").symlink_to(tmp_path / "pairs" / name, target_is_directory=True)
    assert [p.name for p in find_pairs(tmp_path / "pairs", default_caption="x")] == ["kitchen/chair"]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    three(tmp_path)
    os.mkfifo(tmp_path / "before" / "pipe.png")
    assert len(find_pairs(tmp_path)) == 3


def turned(path, orientation=6):
    """A photo as a phone stores it: on its side, with a note."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(path, (128, 96), exif=exif)


def converted(mode):
    def make(path):
        pixels = np.array(Image.open(picture(path)).convert({"I;16": "L", "LA": "LA"}.get(mode, mode)))
        Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels).save(path)
        return path

    return make


@in_every_layout
@pytest.mark.parametrize("kind", ["turned", "L", "LA", "RGBA", "I;16"])
def test_odd_pictures(tmp_path, layout, kind):
    """Before and after of one kind, and an ordinary after picture to such a before picture."""
    make = turned if kind == "turned" else converted(kind)
    endings = (".jpeg", ".jpeg", ".png", ".txt") if kind == "turned" else (".png", ".png", ".png", ".txt")
    lay(tmp_path, layout, "both", endings=endings, make=make)
    one = lay(tmp_path, layout, "one", endings=endings, make=make)
    one["after"].unlink()
    picture(one["after"].with_suffix(".png"))
    found = found_in(tmp_path, layout)
    assert found.sizes == ((96, 128),) * 2
    for index in range(2):
        images = found.load(index)
        assert images.before.shape == images.after.shape == (*found.targets[index], 3)
        assert images.before.std() > 0.05 and images.after.std() > 0.05
    if kind == "I;16":
        grey = found.load(0).before
        assert torch.equal(grey[..., 0], grey[..., 1]) and 0.1 < grey.mean() < 0.9, "neither black nor cut off"


# --- bad folders -----------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "no after": (lambda r: (r / "after" / "chair.png").unlink(), ["before/chair.png"]),
    "no before": (lambda r: (r / "before" / "Lamp.png").unlink(), ["after/Lamp.png"]),
    "mask alone": (lambda r: mask(r / "mask" / "stool.png"), ["mask/stool.png"]),
    "caption alone": (lambda r: write(r / "after" / "chiar.txt", "a typo"), ["after/chiar.txt"]),
    "no caption": (lambda r: (r / "after" / "chair.txt").unlink(), ["after/chair.png"]),
    "no caption (empty)": (lambda r: write(r / "after" / "chair.txt", " \n"), ["after/chair.txt", "is empty"]),
    "unreadable (cut off)": (lambda r: truncate(r / "before" / "chair.png"), ["before/chair.png", "truncated"]),
    "unreadable (cut-off JPEG)": (
        lambda r: ((r / "after" / "chair.png").unlink(), truncate(picture(r / "after" / "chair.jpg"))),
        ["after/chair.jpg", "truncated"],
    ),
    "unreadable (no picture)": (lambda r: write(r / "after" / "Lamp.png", "text"), ["after/Lamp.png: its content is not PNG"]),
    "unreadable (empty file)": (lambda r: (r / "mask" / "Lamp.png").write_bytes(b""), ["mask/Lamp.png: it is empty"]),
    "unreadable (caption)": (
        lambda r: (r / "after" / "chair.txt").write_bytes("café".encode("latin-1")), ["after/chair.txt", "UTF-8"]
    ),
    "unreadable (half a UTF-16 caption)": (
        lambda r: (r / "after" / "chair.txt").write_bytes(b"\xff\xfe\x00caf\xe9"), ["after/chair.txt", "UTF-8"]
    ),
    "unreadable (link to nowhere)": (
        lambda r: ((r / "mask" / "chair.png").unlink(), (r / "mask" / "chair.png").symlink_to(r / "gone.png")),
        ["mask/chair.png: No such file or directory"],
    ),
    "unreadable (caption to nowhere)": (
        lambda r: ((r / "after" / "chair.txt").unlink(), (r / "after" / "chair.txt").symlink_to(r / "gone.txt")),
        ["after/chair.txt: No such file or directory"],
    ),
    "proportions": (
        lambda r: picture(r / "before" / "chair.png", (96, 124)), ["before/chair.png + after/chair.png", "124×96 and 128×96"]
    ),
    "proportions (turned)": (lambda r: picture(r / "after" / "chair.png", (128, 96)), ["128×96 and 96×128"]),
    "mask proportions": (lambda r: mask(r / "mask" / "chair.png", (96, 96)), ["mask/chair.png", "96×96 for 128×96"]),
    "mask empty": (lambda r: mask(r / "mask" / "Lamp.png", value=0), ["mask/Lamp.png", "brightest value is 0 of 255"]),
    "mask empty (0 and 1)": (lambda r: mask(r / "mask" / "Lamp.png", value=1), ["mask/Lamp.png", "is 1 of 255"]),
    "duplicate": (lambda r: picture(r / "before" / "chair.jpg"), ["before/chair.jpg + before/chair.png"]),
    "duplicate (case)": (lambda r: picture(r / "after" / "lamp.webp"), ["after/Lamp.png + after/lamp.webp"]),
    "duplicate (mask)": (lambda r: mask(r / "mask" / "Chair.bmp"), ["mask/Chair.bmp + mask/chair.png"]),
    "too small": (
        lambda r: [picture(r / p / "chair.png", (48, 64)) for p in ("before", "after")],
        ["before/chair.png: 64×48", "after/chair.png: 64×48", "at least 64 px"],
    ),
    "no edit": (
        lambda r: shutil.copy(r / "after" / "chair.png", r / "before" / "chair.png"), ["before/chair.png + after/chair.png"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_every_bad_folder_is_reported_with_its_files(tmp_path, case):
    harm, expected = BAD[case]
    harm(three(tmp_path))
    error = problems(tmp_path)
    kind = case.split(" (")[0]
    assert {f.kind for f in error.findings} == {kind}
    assert str(error).startswith("pairs: ") and "nothing was started" in str(error) and KINDS[kind] in str(error)
    for words in expected:
        assert words in str(error), str(error)
    assert str(error).count(str(tmp_path)) == 1, "the folder is named once, the files below it"
    good = [n for n in NAMES if not any(n in words for words in expected) and "×" not in expected[0]]
    assert not any(f"/{n}." in str(error) for n in good), "nothing else is accused"


def test_one_report_names_everything_at_once(tmp_path):
    three(tmp_path)
    harmed = ["no after", "mask alone", "mask empty", "caption alone"]
    for kind in harmed:
        BAD[kind][0](tmp_path)
    truncate(tmp_path / "before" / "sofa_2.png")
    truncate(tmp_path / "before" / "chair.png")  # has lost its partner as well
    error = problems(tmp_path)
    assert sorted(f.kind for f in error.findings) == sorted([*harmed, "unreadable", "unreadable"])
    for name in ("before/chair.png", "mask/stool.png", "mask/Lamp.png", "after/chiar.txt", "before/sofa_2.png"):
        assert name in str(error)
    assert str(error).startswith("pairs: 6 problems in")


def test_a_long_report_names_every_file(tmp_path):
    three(tmp_path)
    for i in range(40):
        picture(tmp_path / "before" / f"extra{i:02}.png", (16, 16))
    error = problems(tmp_path)
    assert [f.files for f in error.findings] == [(f"before/extra{i:02}.png",) for i in range(40)]
    assert "(40):" in str(error) and all(f"    before/extra{i:02}.png\n" in f"{error}\n" for i in range(40))


def test_bad_suffixed_and_control_folders(tmp_path):
    picture(tmp_path / "one" / "chair_before.png")
    mask(tmp_path / "one" / "lamp_mask.png")
    error = problems(tmp_path / "one")
    assert {(f.kind, f.files) for f in error.findings} == {
        ("no after", ("chair_before.png",)),
        ("mask alone", ("lamp_mask.png",)),
    }
    picture(tmp_path / "t" / "chair.png")
    picture(tmp_path / "c" / "chairs.png")
    error = problems(tmp_path / "t", tmp_path / "c")
    assert {(f.kind, f.files) for f in error.findings} == {
        ("no before", ("chair.png",)),
        ("no after", ("../c/chairs.png",)),
    }
    assert str(error).count(str(tmp_path)) == 1


def test_a_program_that_tolerates_cut_off_files_changes_nothing(tmp_path, monkeypatch):
    truncate(three(tmp_path) / "before" / "chair.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert problems(tmp_path).findings[0].files == ("before/chair.png",)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_cut_off_file_is_one_also_while_other_threads_read(tmp_path, monkeypatch):
    """Pillow's flag is the process': a reader that is done must not take it back under one that is not."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pictures._whole_files_only():
        with ThreadPoolExecutor(1) as pool, pictures._whole_files_only():
            assert pool.submit(lambda: ImageFile.LOAD_TRUNCATED_IMAGES).result(30) is False

            def another():
                with pictures._whole_files_only():
                    pass

            pool.submit(another).result(30)  # would wait for ever if only one could read
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_progress_counts_pairs_and_may_stop_the_check(tmp_path):
    three(tmp_path)
    seen = []
    find_pairs(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(KeyboardInterrupt):
        find_pairs(tmp_path, progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.mark.parametrize("options", [{"resolution": 8}, {"resolution": 512.0}, {"min_size": 0}, {"resolution": True}])
def test_settings_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected a whole number >= "):
        find_pairs(three(tmp_path), **options)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Every orientation of a picture with a red, a green and a blue corner comes out upright."""
    upright = np.full((96, 128, 3), 30, np.uint8)
    upright[:24, :24], upright[:24, -24:], upright[-24:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = Image.fromarray(upright)
    stored = stored.transpose(undo[orientation]) if orientation in undo else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    three(tmp_path)
    stored.save(tmp_path / "after" / "chair.png", exif=exif)
    found = find_pairs(tmp_path, resolution=128)
    assert found.sizes[0] == (96, 128)
    torch.testing.assert_close(load(found[0], (96, 128)).after, torch.from_numpy(upright) / 255)


def read(tmp_path, image, name="x.png"):
    image.save(tmp_path / name)
    made = load(Pair("x", tmp_path / name, tmp_path / name), (image.height, image.width))
    return made.before


def test_modes_become_rgb(tmp_path):
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    grey = torch.from_numpy(np.round(ramp) / 255).float()[..., None].expand(-1, -1, 3)
    eight = Image.fromarray(np.round(ramp).astype(np.uint8))
    torch.testing.assert_close(read(tmp_path, eight), grey)
    torch.testing.assert_close(read(tmp_path, eight.convert("P")), grey)
    sixteen = Image.fromarray(np.round(ramp * 257).astype(np.uint16))
    exact = torch.from_numpy(np.round(ramp * 257) / 65535).float()[..., None].expand(-1, -1, 3)
    torch.testing.assert_close(read(tmp_path, sixteen), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(read(tmp_path, sixteen, "x.tif"), exact, atol=1e-6, rtol=0)
    bilevel = eight.point(lambda v: 255 * (v > 99)).convert("1")
    assert set(read(tmp_path, bilevel).unique().tolist()) == {0.0, 1.0}
    colour = Image.merge("RGB", [eight, eight.transpose(Image.Transpose.ROTATE_90), eight.point(lambda v: 255 - v)])
    for mode, name in (("CMYK", "x.tif"), ("RGB", "x.bmp")):
        expected = torch.from_numpy(np.array(colour.convert(mode).convert("RGB"))) / 255
        torch.testing.assert_close(read(tmp_path, colour.convert(mode), name), expected)


def test_transparency_is_laid_on_white_and_said(tmp_path):
    pixels = np.zeros((96, 128, 4), np.uint8)
    pixels[..., 0], pixels[:48, :, 3] = 200, 255
    pixels[48:72, :, 3] = 51
    three(tmp_path)
    Image.fromarray(pixels).save(tmp_path / "before" / "chair.png")
    found = find_pairs(tmp_path)
    assert found.notes == ("transparency was laid on white in 1 pairs: chair",)
    before = load(found[0], (96, 128)).before * 255
    for row, colour in ((0, (200, 0, 0)), (60, (244, 204, 204)), (95, (255, 255, 255))):
        torch.testing.assert_close(before[row, 0], torch.tensor(colour).float(), atol=1, rtol=0)
    opaque = Image.fromarray(pixels[..., :3]).convert("RGBA")
    opaque.save(tmp_path / "before" / "chair.png")
    assert find_pairs(tmp_path).notes == ()


def test_a_transparent_mask_is_black_where_nothing_is(tmp_path):
    pixels = np.full((96, 128, 4), 255, np.uint8)
    pixels[:, :64, 3] = 0
    three(tmp_path)
    Image.fromarray(pixels).save(tmp_path / "mask" / "chair.png")
    made = load(find_pairs(tmp_path)[0], (96, 128)).mask
    assert made[:, :64].eq(0).all() and made[:, 64:].eq(1).all()


# --- what is passed over, and names ------------------------------------------------------------------------------------


@profiles.without_heic
def test_whatever_is_passed_over_is_named_with_the_reason(tmp_path):
    three(tmp_path)
    for name in (
        "before/IMG_1.HEIC",
        "after/IMG_1.HEIC",
        "after/chair.npz",
        "notes.md",
        "after/.draft.png",
        "Thumbs.db",
    ):
        write(tmp_path / name, "x")
    write(tmp_path / "after" / "._chair.png", "what a Mac leaves")
    write(tmp_path / "captions" / "chair.txt", "another")
    write(tmp_path / "chairs.txt", "of no pair")
    picture(tmp_path / "stray.png")
    picture(tmp_path / "old" / "deep" / "one.png")
    write(tmp_path / "_cache" / "x.bin", "x")
    assert set(find_pairs(tmp_path).notes) == {
        "passed over (HEIC needs the package pillow-heif; or save it as PNG): after/IMG_1.HEIC, before/IMG_1.HEIC",
        "passed over (neither pictures nor captions): notes.md, after/chair.npz",
        "passed over (hidden): after/.draft.png",
        "passed over (the pair has another caption): captions/chair.txt",
        "passed over (texts of no pair): chairs.txt",
        "passed over (pictures outside before/, after/ and mask/): stray.png",
        "passed over (folders that are no part of the pairs): old/",
        "passed over (folders that begin with ., _ or @): _cache/",
    }


def test_in_one_folder_and_in_two_as_well(tmp_path):
    lay(tmp_path / "one", "suffixes", "chair")
    picture(tmp_path / "one" / "chair.png")
    write(tmp_path / "one" / "chair.json", "{}")
    assert set(find_pairs(tmp_path / "one", resolution=128).notes) == {
        "passed over (pictures whose names end in none of _before, _after and _mask): chair.png",
        "passed over (neither pictures nor captions): chair.json",
    }
    lay(tmp_path, "control", "chair")
    write(tmp_path / "control" / "chair.txt", "another")
    write(tmp_path / "control" / "lamp.jxl", "x")
    notes = found_in(tmp_path, "control").notes
    assert "passed over (the pair has another caption): ../control/chair.txt" in notes
    assert any("JXL needs the package pillow-jxl-plugin" in note and "../control/lamp.jxl" in note for note in notes)


def test_pictures_that_no_plugin_reads_are_called_pictures(tmp_path):
    three(tmp_path)
    for name in ("IMG_1.CR2", "logo.svg"):
        write(tmp_path / "before" / name, "x")
    assert set(find_pairs(tmp_path).notes) == {
        "passed over (CR2 needs a raw converter; or save it as PNG): before/IMG_1.CR2",
        "passed over (SVG needs to be drawn in pixels; or save it as PNG): before/logo.svg",
    }


def test_many_that_are_passed_over_are_counted(tmp_path):
    three(tmp_path)
    for i in range(30):
        write(tmp_path / "after" / f"x{i:02}.npz", "x")
    (note,) = find_pairs(tmp_path).notes
    assert note.endswith("after/x11.npz and 18 more")


@profiles.without_heic
def test_a_picture_whose_other_half_cannot_be_read_says_so(tmp_path):
    three(tmp_path)
    picture(tmp_path / "before" / "vase.png")
    write(tmp_path / "after" / "vase.heic", "x")
    error = problems(tmp_path)
    assert [(f.kind, f.files, f.detail) for f in error.findings] == [
        ("no after", ("before/vase.png",), "after/vase.heic needs the package pillow-heif")
    ]
    assert len(error.notes) == 1 and error.notes[0] in str(error)


@pytest.mark.parametrize("ending", [".gif", ".jfif", ".jpe", ".jp2", ".apng", ".ppm"])
def test_other_kinds_of_pictures_are_pairs_too(tmp_path, ending):
    three(tmp_path)
    formats = {".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG"}
    for part in ("before", "after"):
        picture(tmp_path / part / f"vase{ending}", format=formats.get(ending))
    found = find_pairs(tmp_path, default_caption="x")
    assert [p.name for p in found] == ["chair", "Lamp", "sofa_2", "vase"] and found.notes == ()


@pytest.mark.parametrize("name", ["masks", "Masks", "MASK"])
def test_the_folder_of_masks_by_its_other_name(tmp_path, name):
    three(tmp_path)
    (tmp_path / "mask").rename(tmp_path / name)
    found = find_pairs(tmp_path)
    assert all(p.mask == tmp_path / name / f"{p.name}.png" for p in found) and found.notes == ()


def test_two_folders_of_masks_are_not_mixed(tmp_path):
    three(tmp_path)
    mask(tmp_path / "masks" / "chair.png")
    found = find_pairs(tmp_path)
    assert all(p.mask.parent.name == "mask" for p in found)
    assert found.notes == ("passed over (pictures outside before/, after/ and mask/): masks/chair.png",)


def test_the_folder_of_captions_by_its_other_name(tmp_path):
    three(tmp_path)
    for name in NAMES:
        (tmp_path / "after" / f"{name}.txt").unlink()
        write(tmp_path / "caption" / f"{name}.txt", f"of {name}")
    assert [p.caption for p in find_pairs(tmp_path, default_caption="none")] == [f"of {name}" for name in NAMES]


@pytest.mark.parametrize("folder", ["mask", "masks"])
@pytest.mark.parametrize("ending", ["", "_mask"])
def test_a_folder_of_masks_beside_files_with_suffixes(tmp_path, folder, ending):
    for name in ("chair", "kitchen/lamp"):
        paths = lay(tmp_path, "suffixes", name)
        place = tmp_path / folder / f"{name}{ending}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        paths["mask"].rename(place)
    found = found_in(tmp_path, "suffixes")
    assert [(p.name, p.mask) for p in found] == [
        (name, tmp_path / folder / f"{name}{ending}.png") for name in ("chair", "kitchen/lamp")
    ]


def test_pairs_in_a_subfolder_that_is_called_mask_are_pairs(tmp_path):
    """Of people who wear one."""
    lay(tmp_path, "suffixes", "mask/face")
    (pair,) = found_in(tmp_path, "suffixes")
    assert pair.name == "mask/face"


def test_two_spellings_of_a_folder_are_one(tmp_path):
    three(tmp_path)
    for part in ("Before", "AFTER"):
        picture(tmp_path / part / "vase.png")
    if sorted(p.name for p in tmp_path.iterdir()) == ["after", "before", "mask"]:
        pytest.skip("this file system knows one spelling")
    assert [p.name for p in find_pairs(tmp_path, default_caption="x")] == ["chair", "Lamp", "sofa_2", "vase"]
    picture(tmp_path / "Before" / "chair.png")
    (finding,) = problems(tmp_path, default_caption="x").findings
    assert finding.kind == "duplicate" and set(finding.files) == {"Before/chair.png", "before/chair.png"}


ODD = {"椅子".encode("gbk"): r"\xd2\xce\xd7\xd3", "ソファ".encode("shift-jis"): r"\x83\\x83t\x83@", b"a\nb": r"a\x0ab"}


@in_every_layout
@pytest.mark.parametrize("raw", ODD)
def test_names_that_are_no_text_are_carried_through(tmp_path, layout, raw):
    lay(tmp_path, layout, "chair")
    try:
        lay(tmp_path, layout, os.fsdecode(raw), texts=("say that",))
    except OSError:
        pytest.skip("this file system takes no such name")
    found = found_in(tmp_path, layout)
    odd = next(p for p in found if p.name != "chair")
    assert odd.name == ODD[raw] and odd.caption == "say that" and odd.mask is not None
    assert (len(found.digest), [len(part) for part in found.split(1)]) == (64, [1, 1])
    assert folder_state(*(tmp_path / place for place in LAYOUTS[layout][0]))
    (note,) = found.notes
    assert "are written with \\x" in note and ODD[raw] in note and note.encode()
    odd.before.unlink()
    odd.before.write_bytes(b"")
    error = problems(*(tmp_path / place for place in LAYOUTS[layout][0]))
    assert ODD[raw] in str(error) and str(error).encode()


def test_a_folder_whose_own_name_is_no_text(tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        three(root)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert len(find_pairs(root)) == 3
    (root / "before" / "chair.png").unlink()
    assert rf"{tmp_path}/caf\xe9 (folders" in str(problems(root))
    with pytest.raises(FileNotFoundError, match=r"caf\\xe9/nowhere"):
        find_pairs(root / "nowhere")


# --- captions in other encodings -----------------------------------------------------------------------------------------

TEXTS = [
    "replace the chair with my stool",
    "把椅子换成我的凳子，谢谢",
    "замени стул на табурет",
    "a",
    "remplace la théière",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-32", "utf-16", "utf-8-sig", "utf-32-be", "utf-32-le"])
def test_captions_of_every_unicode_encoding(tmp_path, text, encoding):
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    assert files.read_caption(tmp_path / "x.txt") == text


@pytest.mark.parametrize("text", [*TEXTS[:1], TEXTS[3], TEXTS[4], "把椅子换成 stool\n谢谢"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_told_by_its_zeros(tmp_path, text, encoding):
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    assert files.read_caption(tmp_path / "x.txt") == " ".join(text.split())


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\0" * 40, "got nothing but zeros"),
        (b"\0", "got nothing but zeros"),
        (b"replace the chair\0\0\0\0\0", "got zeros"),
        (b"replace \x07 it", "got control characters"),
        ("把椅子换成凳子".encode("utf-16-le"), "UTF-8"),
        ("把椅子换成凳子".encode("gbk"), "UTF-8"),
        (b"\xff\xfe\0\0\x01", "UTF-8"),
    ],
)
def test_what_is_no_text_is_named_and_never_a_caption(tmp_path, data, words):
    three(tmp_path)
    (tmp_path / "after" / "chair.txt").write_bytes(data)
    (finding,) = problems(tmp_path, default_caption="x").findings
    assert (finding.kind, finding.files) == ("unreadable", ("after/chair.txt",)) and words in finding.detail


def test_new_letters_and_signs_are_text(tmp_path):
    """An emoji that this Python's tables do not have yet, and one of a company's own."""
    (tmp_path / "x.txt").write_text("add a \U0001faff \ue000\tnow", encoding="utf-8")
    assert files.read_caption(tmp_path / "x.txt") == "add a \U0001faff \ue000 now"


def test_captions_in_other_scripts_are_noted(tmp_path):
    three(tmp_path)
    assert find_pairs(tmp_path).notes == ()
    for name, text in zip(NAMES, ("把椅子换成凳子", "zastąp krzesło stołkiem", "replace 椅子 with a stool")):
        write(tmp_path / "after" / f"{name}.txt", text)
    (note,) = find_pairs(tmp_path).notes
    assert note.startswith("captions in other scripts than Latin, in 1 pairs (chair):")


# --- sets of pictures that are not plain ---------------------------------------------------------------------------------


def test_a_set_that_mixes_profiles_says_so_and_is_all_srgb(tmp_path):
    three(tmp_path)
    plain = find_pairs(tmp_path)
    wide = profiles.rgb()
    opened = ImageCms.ImageCmsProfile(io.BytesIO(wide))
    path = tmp_path / "before" / "Lamp.png"
    shown = plain.load(1).before
    to_wide = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), opened, "RGB", "RGB")
    ImageCms.applyTransform(Image.open(path), to_wide).save(path, icc_profile=wide)
    found = find_pairs(tmp_path)
    assert found.notes == (
        "colours were converted to sRGB in 1 pairs: Lamp (before: from Display P3)",
        "the set mixes colour profiles (sRGB or none: 5, Display P3: 1 pictures); all are read as sRGB",
    )
    assert ((found.load(1).before - shown).abs() * 255).mean() < 1
    assert found.contents[0] == plain.contents[0] and found.contents[1] != plain.contents[1]


def test_masks_of_another_size_are_noted_and_two_per_cent_forgiven(tmp_path):
    three(tmp_path, masks=False)
    mask(tmp_path / "mask" / "chair.png", (48, 64), (15, 20, 30, 40))
    mask(tmp_path / "mask" / "Lamp.png", (200, 271))  # 1.6 % wider
    mask(tmp_path / "mask" / "sofa_2.png")
    found = find_pairs(tmp_path)
    assert found.notes == (
        "masks of another size than their pictures are resized to them: chair (64×48 for 128×96), Lamp (271×200 for 128×96)",
    )
    made = found.load(0).mask
    assert made.shape == (96, 128) and made[34:56, 44:76].min() == 1 and made[:26].max() == 0
    mask(tmp_path / "mask" / "Lamp.png", (200, 280))
    assert [f.kind for f in problems(tmp_path).findings] == ["mask proportions"]


def test_a_cut_out_is_a_mask_with_a_note(tmp_path):
    three(tmp_path)
    cut = Image.open(tmp_path / "after" / "chair.png").convert("RGBA")
    region = np.zeros((96, 128), np.uint8)
    region[30:60, 40:80] = 255
    cut.putalpha(Image.fromarray(region))
    cut.save(tmp_path / "mask" / "chair.png")
    found = find_pairs(tmp_path)
    assert found.notes == ("a cut-out's transparency was read as the mask in 1 pairs: chair",)
    assert torch.equal(found.load(0).mask, torch.from_numpy(region) / 255)


# --- files that change ---------------------------------------------------------------------------------------------------


def repaint(path, seed=9):
    """Other pixels under the same name, as a program saves them that somebody works with."""
    size = Image.open(path).size[::-1]
    picture(path.with_name(f"new {path.name}"), size, seed)
    os.replace(path.with_name(f"new {path.name}"), path)


def test_a_set_as_its_files_are_now(tmp_path):
    three(tmp_path)
    found = find_pairs(tmp_path, resolution=128)
    assert found.as_they_are() is found
    repaint(found[1].after)
    now = found.as_they_are()
    assert now.contents == find_pairs(tmp_path, resolution=128).contents and now.digest != found.digest
    assert now.notes == (*found.notes, "changed since the folder was checked, and read as they are now: Lamp")
    assert [a == b for a, b in zip(now.contents, found.contents)] == [True, False, True]
    assert now.as_they_are() is now
    with pytest.raises(ValueError, match="one of before/Lamp.png, after/Lamp.png, mask/Lamp.png has changed"):
        found.load_checked(1)
    assert torch.equal(now.load_checked(1).after, now.load(1).after)
    found[1].after.touch()
    assert now.as_they_are().notes == found.notes + now.notes, "touched, not changed"


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no time of the file itself")
def test_a_change_is_seen_behind_the_same_size_and_time(tmp_path):
    """As by tools that keep times: a caption of the same length, a picture of the same size."""
    three(tmp_path)
    found, state = find_pairs(tmp_path, resolution=128), folder_state(tmp_path)
    path = tmp_path / "after" / "chair.txt"
    times = path.stat()
    path.write_text(path.read_text(encoding="utf-8").upper(), encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder_state(tmp_path) != state
    data = found[0].before.read_bytes()
    times = found[0].before.stat()
    found[0].before.write_bytes(data)
    os.utime(found[0].before, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="start again"):
        found.load_checked(0)
    assert found.as_they_are().load_checked(0) is not None


def test_a_set_whose_files_have_come_to_be_wrong(tmp_path):
    three(tmp_path)
    found = find_pairs(tmp_path, resolution=128)
    picture(found[0].after, (128, 96))
    found[2].before.unlink()
    with pytest.raises(PairProblems) as caught:
        found.as_they_are()
    assert [(f.kind, f.files[0]) for f in caught.value.findings] == [("proportions", "before/chair.png")]


def test_variants_of_a_changed_pair_are_drawn_anew(tmp_path):
    three(tmp_path)
    settings = VariantSettings(count=3)
    made = with_variants(find_pairs(tmp_path, resolution=128), settings)
    repaint(made[3].before)
    now, again = made.as_they_are(), with_variants(find_pairs(tmp_path, resolution=128), settings)
    assert now.contents == again.contents and [p.variant for p in now] == [p.variant for p in again]
    assert now.states == again.states and now.digest == again.digest != made.digest


# --- one geometry ----------------------------------------------------------------------------------------------------


def blob(height, width, y, x, radius):
    """A soft disc at fractions (y, x) of a picture, radius as a fraction of its height."""
    rows = (torch.arange(height) + 0.5)[:, None] / height - y
    columns = ((torch.arange(width) + 0.5)[None] / width - x) * width / height
    return (1 - ((rows.square() + columns.square()).sqrt() / radius)).clamp(0, 1)


def centroid(values):
    rows, columns = (torch.arange(n) + 0.5 for n in values.shape)
    return torch.stack([(values.sum(1) * rows).sum(), (values.sum(0) * columns).sum()]) / values.sum()


@pytest.mark.parametrize("target", [(96, 96), (64, 128), (128, 64), (80, 112), (208, 304)])
@pytest.mark.parametrize("y, x", [(0.5, 0.5), (0.2, 0.85), (0.8, 0.2)])
def test_a_marker_in_all_three_stays_in_place(target, y, x):
    """Pictures of different sizes, one of them a pixel off in proportions: the marker is where the mask says, within a
    fifth of a pixel."""
    sizes = {"before": (200, 301), "after": (400, 600), "mask": (160, 240)}
    made = {part: blob(*size, y, x, 0.12) for part, size in sizes.items()}
    pair = Pair("m", *(made[p][..., None].expand(-1, -1, 3) for p in ("before", "after")), "", made["mask"])
    got = load(pair, target)
    assert got.before.shape == got.after.shape == (*target, 3) and got.mask.shape == target
    places = [centroid(v) for v in (got.before[..., 1], got.after[..., 1], got.mask)]
    for place in places[1:]:
        assert (place - places[0]).abs().max() < 0.2
    assert got.mask.max() > 0.7, "the marker is inside the crop"


def test_the_crop_moves_for_the_mask_and_no_farther_than_it_must():
    whole = (100, 400)
    assert cover(whole, (100, 100)) == Box(0.0, 0.375, 1.0, 0.625)
    assert cover(whole, (100, 100), Box(0.4, 0.4, 0.6, 0.6)) == Box(0.0, 0.375, 1.0, 0.625)
    assert cover(whole, (100, 100), Box(0.4, 0.5, 0.6, 0.7)) == pytest.approx((0.0, 0.45, 1.0, 0.7))
    assert cover(whole, (100, 100), Box(0.4, 0.9, 0.6, 1.0)) == pytest.approx((0.0, 0.75, 1.0, 1.0))
    assert cover(whole, (100, 100), Box(0.4, 0.1, 0.6, 0.6)) == pytest.approx((0.0, 0.225, 1.0, 0.475))


def test_a_picture_of_the_size_itself_is_not_touched():
    before, after = torch.rand(2, 64, 96, 3)
    got = load(Pair("x", before, after, "", torch.ones(64, 96)), (64, 96))
    assert torch.equal(got.before, before) and torch.equal(got.after, after)


@settings(max_examples=150, deadline=None)
@given(st.integers(16, 3000), st.floats(1 / 16, 16), st.sampled_from([128, 256, 512, 1024]), st.booleans())
def test_bucket_sizes(height, aspect, resolution, upscale):
    """Multiples of 16; at most about the area; never enlarged unasked; proportions as near as steps of 16 allow."""
    size = height, max(MULTIPLE, round(height * aspect))
    h, w = bucket_size(size, resolution, upscale)
    assert h % MULTIPLE == w % MULTIPLE == 0 and h > 0 and w > 0 and h * w <= 1.02 * resolution**2
    if not upscale:
        assert h <= size[0] and w <= size[1]
    area = resolution**2 if upscale else min(resolution**2, size[0] * size[1])
    assert h * w >= area * (h / (h + MULTIPLE)) * (w / (w + MULTIPLE))
    error = abs(math.log(w / h * size[0] / size[1]))
    assert error <= math.log((h + MULTIPLE) / h) + math.log((w + MULTIPLE) / w)


@pytest.mark.parametrize(
    "size, resolution, expected",
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((3000, 2000), 1024, (1248, 832)),
        ((1080, 1920), 1024, (768, 1360)),
        ((600, 600), 1024, (592, 592)),
        ((640, 640), 128, (128, 128)),
    ],
)
def test_familiar_buckets(size, resolution, expected):
    assert bucket_size(size, resolution) == expected


def test_proportions_forgive_one_percent_and_one_pixel():
    assert same_proportions((1000, 1500), (500, 750)) and same_proportions((1000, 1500), (1000, 1510))
    assert same_proportions((67, 100), (33, 50)) and same_proportions((1365, 2048), (85, 128))
    assert not same_proportions((1000, 1500), (1000, 1525)) and not same_proportions((67, 100), (33, 52))


# --- sets ------------------------------------------------------------------------------------------------------------


def mixed(count=14, resolution=64):
    """Pairs of three proportions."""
    shapes = [(64, 64), (64, 128), (128, 64)]
    pairs = tuple(
        Pair(f"p{i}", torch.rand(*shapes[i % 3], 3), torch.rand(*shapes[i % 3], 3), "x") for i in range(count)
    )
    return PairSet(pairs, tuple(shapes[i % 3] for i in range(count)), tuple(str(i) for i in range(count)), resolution)


def test_buckets_hold_every_pair_once_at_one_size():
    made = mixed()
    assert sorted(i for members in made.buckets.values() for i in members) == list(range(14))
    assert [len(v) for v in made.buckets.values()] == [5, 5, 4]
    for size, members in made.buckets.items():
        assert all(made.load(i).after.shape == (*size, 3) for i in members)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_batches_cover_an_epoch_and_stay_in_their_bucket(batch_size):
    made = mixed()
    for epoch in range(3):
        batches = made.batches(batch_size, 7, epoch)
        assert sorted(i for b in batches for i in b) == list(range(14))
        assert all(len({made.targets[i] for i in b}) == 1 and 1 <= len(b) <= batch_size for b in batches)
        assert len(batches) == sum(math.ceil(len(v) / batch_size) for v in made.buckets.values())


def test_batches_depend_on_their_arguments_alone():
    made = mixed()
    state = torch.random.get_rng_state()
    first = made.batches(2, 1, 3)
    torch.rand(5)
    assert made.batches(2, 1, 3) == first == mixed().batches(2, 1, 3)
    assert len({str(made.batches(2, s, e)) for s in range(3) for e in range(3)}) == 9
    torch.random.set_rng_state(state)
    made.batches(2, 1, 4)
    assert torch.equal(torch.random.get_rng_state(), state), "the global state is left alone"


@pytest.mark.parametrize("args", [(0, 0, 0), (1, 0, -1), (1.5, 0, 0), (1, "a", 0), (True, 0, 0)])
def test_bad_batches(args):
    with pytest.raises(ValueError, match="^(batch_size|seed|epoch): expected a whole number"):
        mixed().batches(*args)


def test_split_goes_by_name_and_leaves_something_to_train_on():
    made = mixed()
    train, held = made.split(4, seed=3)
    names = [{p.name for p in part} for part in (train, held)]
    assert (len(train), len(held)) == (10, 4) and not names[0] & names[1]
    back = made.subset(list(reversed(range(14)))).split(4, seed=3)
    assert {p.name for p in back[1]} == names[1], "the order does not matter"
    fewer = made.subset([i for i in range(14) if made[i].name in names[0] | {sorted(names[1])[0]}])
    assert sorted(names[1])[0] in {p.name for p in fewer.split(1, seed=3)[1]}, "who is held out stays held out"
    assert {p.name for p in made.split(4, seed=4)[1]} != names[1]
    assert [len(part) for part in made.split(0)] == [14, 0]
    for bad in (14, 15, -1, 1.0):
        with pytest.raises(ValueError, match="^hold_out: expected 0 to 13, so that one of the 14 pairs"):
            made.split(bad)


def test_from_images():
    before, after = torch.rand(2, 3, 64, 96, 3)
    made = PairSet.from_images(before, after, torch.ones(1, 32, 48), ["a", "b", " c "], resolution=64, min_size=32)
    assert [p.name for p in made] == ["pair 1", "pair 2", "pair 3"] and [p.caption for p in made] == ["a", "b", "c"]
    assert made.targets == (bucket_size((64, 96), 64),) * 3
    got = made.load(1)
    assert got.mask.eq(1).all() and got.before.shape == (*made.targets[1], 3)
    before.zero_()
    assert made[0].before.max() > 0.5, "a copy"


def test_from_images_in_inference_mode_makes_ordinary_tensors():
    with torch.inference_mode():
        made = PairSet.from_images(torch.rand(1, 64, 64, 3), torch.rand(1, 64, 64, 3), captions="x", resolution=64)
        got = made.load(0)
    assert not made[0].before.is_inference() and not got.after.is_inference()


def test_from_images_reports_like_a_folder():
    before, after = torch.rand(2, 4, 64, 96, 3)
    masks = torch.ones(4, 64, 96)
    masks[1] = 0
    before[2, 0, 0, 0] = float("nan")
    before[3] = after[3]
    with pytest.raises(PairProblems) as caught:
        PairSet.from_images(before, after, masks, ["", "b", "c", "d"])
    assert {(f.kind, f.files) for f in caught.value.findings} == {
        ("no caption", ("pair 1",)), ("mask empty", ("pair 2 mask",)), ("unreadable", ("pair 3 before",)),
        ("no edit", ("pair 4 before", "pair 4 after")),
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, words",
    [
        ({"after": torch.rand(3, 64, 64, 3)}, "^after: expected 2 like before, got 3"),
        ({"before": torch.rand(2, 64, 64, 4)}, r"^before: expected pictures \[B, H, W, 3\] in 0…1, got .*64, 4"),
        ({"after": torch.zeros(2, 64, 64, 3, dtype=torch.uint8)}, "^after: expected .* got torch.uint8"),
        ({"mask": torch.ones(3, 64, 64)}, "^mask: expected 2 like before, got 3"),
        ({"mask": torch.ones(2, 64, 64, 1)}, r"^mask: expected \[B, H, W\]"),
        ({"captions": ["a"]}, "^captions: expected 2 texts, one per pair, got 1"),
        ({"names": ["a", "a"]}, "^names: expected each name once"),
        ({"after": torch.rand(2, 64, 96, 3)}, "before and after of different proportions"),
    ],
)
def test_from_images_refuses(options, words):
    given = {"before": torch.rand(2, 64, 64, 3), "after": torch.rand(2, 64, 64, 3), "captions": "x", **options}
    with pytest.raises(ValueError, match=words):
        PairSet.from_images(**given)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_content_and_geometry_alone(tmp_path):
    three(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, same = find_pairs(tmp_path / "a", resolution=64), find_pairs(tmp_path / "b", resolution=64)
    prints = [first.fingerprint(i) for i in range(3)]
    assert len(set(prints)) == 3 and [same.fingerprint(i) for i in range(3)] == prints and same.digest == first.digest
    assert first.subset([2, 0]).fingerprint(0) == prints[2], "nor on the place in the set"
    assert find_pairs(tmp_path / "a", resolution=80).fingerprint(0) != prints[0]
    write(tmp_path / "b" / "after" / "chair.txt", "other words")
    other = find_pairs(tmp_path / "b", resolution=64)
    assert other.fingerprint(0) == prints[0] and other.captions_digest != first.captions_digest == same.captions_digest
    for part, make in (("before", picture), ("after", picture), ("mask", mask)):
        options = {"box": (10, 10, 50, 50)} if part == "mask" else {"seed": 1}
        make(tmp_path / "b" / part / "chair.png", **options)
        changed = find_pairs(tmp_path / "b", resolution=64)
        assert changed.fingerprint(0) not in prints and changed.fingerprint(1) == prints[1], part
        prints.append(changed.fingerprint(0))
    (tmp_path / "b" / "mask" / "chair.png").unlink()
    assert find_pairs(tmp_path / "b", resolution=64).fingerprint(0) not in prints


def test_the_digest_follows_names_and_pictures_alone(tmp_path):
    """Captions and sizes have entries of their own beside it, so that a run that goes on can say which of them changed."""
    three(tmp_path)
    digests = {find_pairs(tmp_path, resolution=size).digest for size in (64, 80)}
    write(tmp_path / "after" / "chair.txt", "other words")
    digests.add(find_pairs(tmp_path, resolution=64).digest)
    assert len(digests) == 1
    assert find_pairs(tmp_path, resolution=64).subset([1, 0, 2]).digest not in digests
    picture(tmp_path / "after" / "chair.png", seed=1)
    assert find_pairs(tmp_path, resolution=64).digest not in digests


def test_pairs_of_unequal_sizes_are_named_with_both(tmp_path):
    """They are fine to train on, but whoever did not mean it should know."""
    before, after = torch.rand(3, 64, 96, 3), torch.rand(3, 128, 192, 3)
    made = PairSet.from_images(before, after, captions="x", names=["a", "b", "c"], resolution=64)
    assert made.notes == (
        "before and after differ in size in 3 pairs, and are resized to one (before, after): a (96×64, 192×128), "
        "b (96×64, 192×128), c (96×64, 192×128)",
    )
    assert made.sizes == ((64, 96),) * 3
    assert PairSet.from_images(before, 1 - before, captions="x", resolution=64).notes == ()


def test_the_state_of_a_folder_follows_its_files(tmp_path):
    three(tmp_path)
    seen = [folder_state(tmp_path)]
    assert folder_state(tmp_path) == seen[0]
    for change in (
        lambda: write(tmp_path / "after" / "chair.txt", "longer than before, by far"),
        lambda: picture(tmp_path / "before" / "chair.png", seed=5),
        lambda: (tmp_path / "mask" / "chair.png").unlink(),
    ):
        change()
        seen.append(folder_state(tmp_path))
    assert len(set(seen)) == 4
