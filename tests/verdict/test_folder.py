"""Judging a folder from the command line: which files belong together, what is written, and the exit status."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import profiles
import pytest
import torch
from PIL import Image, ImageCms
from torch.nn import functional as F

from editloss_core.demo.scenes import draw
from editloss_core.drawing.statistics import Share, wilson
from editloss_core.verdict import __main__ as command
from editloss_core.verdict import folder as folders
from editloss_core.verdict import items as verdict_items
from editloss_core.verdict import picture as verdict_sheet
from editloss_core.verdict.folder import Entry, judge_entry, judge_folder, save, scan
from editloss_core.verdict.judge import FAILURES, MEASURES, WITHOUT_AFTER, Verdict

ROOT = Path(__file__).parents[2]
PAIR = draw(3, "replace", "chair", "table")


@pytest.fixture
def by_grey(monkeypatch):
    """A judge that takes no time: dark outputs are not edited, medium ones overlays."""

    def judge(before, output, after=None, mask=None):
        if before.shape != output.shape:
            raise ValueError(f"output: expected {list(before.shape)}, got {list(output.shape)}")
        level = float(output.mean())
        found = "no edit" if level < 0.3 else "overlay" if level < 0.7 else "good"
        scores = {f: (0.9 if f == found else 0.1) for f in FAILURES}
        scores["distorted"] = None if after is None else 0.1
        maps = {"unchanged": torch.full((8, 8), 0.5)}
        return Verdict(found, scores, dict.fromkeys(MEASURES, 0.25), (), maps, torch.ones(before.shape[:2]))

    monkeypatch.setattr(verdict_items, "judge", judge)


def grey(path, level, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (round(255 * level),) * 3).save(path)


def sized(picture, height, width):
    planes = picture.permute(2, 0, 1)[None]
    return F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def rows_of(out):
    with open(out / "verdicts.csv", encoding="utf-8", newline="") as file:
        return {row["stem"]: row for row in csv.DictReader(file)}


def run(folder, out, *options):
    return command.main([str(folder), "--out", str(out), "--workers", "1", "--width", "800", *options])


# ---------------------------------------------------------------------------------------------------------------------
# What lies where
# ---------------------------------------------------------------------------------------------------------------------


def test_files_are_matched_by_stem_without_case_in_natural_order(tmp_path):
    for name in ("Chair 10.png", "chair 2.PNG", "sub/x.png", unicodedata.normalize("NFD", "é.png")):
        grey(tmp_path / "Before" / name, 0.1)
    for name in ("chair 10.jpg", "Chair 2.webp", "sub/x.bmp", unicodedata.normalize("NFC", "é.png"), ".hidden.png"):
        grey(tmp_path / "output" / name, 0.1)
    (tmp_path / "output" / "notes.txt").write_text("no picture")
    found = scan(tmp_path)
    assert [e.name for e in found.entries] == ["Chair 2", "chair 10", "sub/x", "é"]
    assert all(not e.problem and set(e.files) == {"before", "output"} for e in found.entries)


@profiles.without_heic
def test_what_is_passed_over_is_named_and_odd_names_are_written(tmp_path, by_grey, capsys):
    odd = os.fsdecode("椅子".encode("gbk"))
    for name in ("a", odd):
        for part in ("before", "output"):
            try:
                grey(tmp_path / part / f"{name}.png", 0.9)
            except OSError:
                pytest.skip("this file system takes no such name")
    for name in ("output/b.heic", "before/b.heic", "output/log.json", "output/a.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = scan(tmp_path)
    assert [e.name for e in found.entries] == [r"\xd2\xce\xd7\xd3", "a"]
    assert set(found.notes) == {
        "passed over (HEIC needs the package pillow-heif; or save it as PNG): before/b.heic, output/b.heic",
        "passed over (neither pictures nor captions): output/log.json",
        r"names that are not UTF-8, or have control characters, are written with \x: before/\xd2\xce\xd7\xd3.png, "
        r"output/\xd2\xce\xd7\xd3.png",
    }
    assert run(tmp_path, tmp_path / "out") == 0
    assert set(rows_of(tmp_path / "out")) == {"a", r"\xd2\xce\xd7\xd3"}
    said = capsys.readouterr().out
    assert all(f"note: {note}\n" in said for note in found.notes)
    (tmp_path / "output" / f"{odd}.png").write_bytes(b"x")
    item = next(judge_entry(e) for e in scan(tmp_path).entries if e.name != "a")
    assert item.message.startswith(r"output: \xd2\xce\xd7\xd3.png cannot be read: its content is not PNG")


@pytest.mark.parametrize("name", ["masks", "Mask"])
def test_masks_by_the_other_name_and_two_spellings_of_a_folder(tmp_path, name):
    for place in ("before/a", "output/a", f"{name}/a", "Before/b", "output/b"):
        grey(tmp_path / f"{place}.png", 0.9)
    found = scan(tmp_path)
    assert [(e.name, sorted(e.files), e.problem) for e in found.entries] == [
        ("a", ["before", "mask", "output"], ""), ("b", ["before", "output"], ""),
    ]  # fmt: skip


def test_outputs_are_judged_as_they_look_whatever_their_profile(tmp_path):
    """One and the same look in sRGB and in Display P3: nothing is between them, and the note says what was done."""
    wide = profiles.rgb()
    to_wide = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(wide)), "RGB", "RGB"
    )
    shown = {part: Image.fromarray((values * 255).round().byte().numpy()) for part, values in (("before", PAIR.before), ("after", PAIR.after))}  # fmt: skip
    shown["output"] = ImageCms.applyTransform(shown["after"], to_wide)
    for part, image in shown.items():
        image.save(tmp_path / f"{part}.png", icc_profile=wide if part == "output" else None)
    item = judge_entry(Entry("a", {part: tmp_path / f"{part}.png" for part in ("before", "output", "after")}))
    assert item.verdict.verdict == "good"
    assert item.notes == ("The output picture: colours were converted to sRGB (from Display P3).",)
    stored = torch.from_numpy(np.array(shown["output"])).int()
    output, after = item.pictures["output"].int(), item.pictures["after"].int()
    assert (stored - after).abs().max() > 10 and (output - after).abs().max() <= 2


def test_pictures_without_their_counterpart_are_named(tmp_path):
    grey(tmp_path / "before/a.png", 0.1)
    grey(tmp_path / "before/both.png", 0.1)
    grey(tmp_path / "output/b.png", 0.1)
    grey(tmp_path / "output/both.png", 0.1)
    grey(tmp_path / "output/both.jpg", 0.1)
    grey(tmp_path / "after/c.png", 0.1)
    found = scan(tmp_path)
    problems = {e.name: e.problem for e in found.entries}
    assert problems["a"].startswith("output:") and "before/a.png" in problems["a"]
    assert problems["b"].startswith("before:") and "output/b.png" in problems["b"]
    assert "both.jpg" in problems["both"] and "both.png" in problems["both"]
    assert found.unused == ("after/c.png",)


def test_folders_that_are_not_there_are_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no folder"):
        scan(tmp_path / "nowhere")
    grey(tmp_path / "pictures/a.png", 0.1)
    with pytest.raises(ValueError, match=r"no before/ and no output/; there is: pictures/"):
        scan(tmp_path)
    assert run(tmp_path, tmp_path / "out") == 2
    assert "no before/" in capsys.readouterr().err
    for part in ("before", "output"):
        (tmp_path / part).mkdir()
    assert run(tmp_path, tmp_path / "out") == 2
    grey(tmp_path / "output/a.png", 0.1)
    assert run(tmp_path, tmp_path / "output") == 2
    assert "would be judged the next time" in capsys.readouterr().err


def test_alpha_and_a_missing_after_are_notes(tmp_path):
    grey(tmp_path / "a.png", 0.9)
    Image.new("RGBA", (16, 16), (255, 0, 0, 128)).save(tmp_path / "o.png")
    item = judge_entry(
        Entry(
            "a", {"before": tmp_path / "a.png", "output": tmp_path / "o.png"}, notes=("No after picture of this name.",)
        )
    )
    assert "laid on white" in " ".join(item.notes) and "No after" in item.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """One of each kind of trouble among good and bad outputs."""
    folder = tmp_path_factory.mktemp("folder")
    outputs = {
        "2 copy": PAIR.before,
        "10 after": PAIR.after,
        "3 no after": PAIR.after,
        "4 black": torch.zeros_like(PAIR.after),
    }
    outputs |= {"5 small": PAIR.after[:100], "6 corrupt": PAIR.after, "7 mask": PAIR.after}
    for name, output in outputs.items():
        save(PAIR.before, folder / f"before/{name}.png")
        save(output, folder / f"output/{name}.png")
        if name != "3 no after":
            save(PAIR.after, folder / f"after/{name}.png")
    corrupt = folder / "output/6 corrupt.png"
    corrupt.write_bytes(corrupt.read_bytes()[:500])
    dot = Image.new("L", (128, 128))
    dot.putpixel((40, 40), 255)
    (folder / "mask").mkdir()
    dot.save(folder / "mask/7 mask.png")
    return folder


@pytest.mark.slow
def test_command_writes_rows_sheet_and_maps_and_exits_3(hard, tmp_path):
    command_line = [
        sys.executable,
        "-m",
        "editloss_core.verdict",
        str(hard),
        "--out",
        str(tmp_path / "new/out"),
        "--maps",
        "--workers",
        "1",
    ]
    ended = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 3, ended.stderr
    assert "7/7" in ended.stderr and "not judged: 3" in ended.stdout
    rows = rows_of(tmp_path / "new/out")
    assert list(rows) == ["2 copy", "3 no after", "4 black", "5 small", "6 corrupt", "7 mask", "10 after"]
    assert rows["2 copy"]["verdict"] == "no edit" and rows["10 after"]["verdict"] == "good"
    assert float(rows["2 copy"]["no edit"]) > 0.9 and float(rows["10 after"]["no edit"]) < 0.1
    assert rows["3 no after"]["distorted"] == "" and "distorted" in rows["3 no after"]["unanswered"]
    assert rows["3 no after"]["verdict"] == "undecided" and rows["4 black"]["verdict"] == "unusable"
    assert "all black" in rows["4 black"]["notes"]
    assert "128 x 100" in rows["5 small"]["message"] and "128 x 128" in rows["5 small"]["message"]
    assert "6 corrupt.png cannot be read" in rows["6 corrupt"]["message"]
    assert rows["7 mask"]["message"].startswith("mask:") and rows["7 mask"]["verdict"] == rows["7 mask"]["shape"] == ""
    assert {*FAILURES, *MEASURES} <= rows["2 copy"].keys()
    maps = sorted(p.name for p in (tmp_path / "new/out/maps").iterdir())
    assert "2 copy.old_object.png" in maps and not any("6 corrupt" in name for name in maps)
    with (
        Image.open(tmp_path / "new/out/maps/2 copy.unchanged.png") as laid,
        Image.open(tmp_path / "new/out/sheet.png") as page,
    ):
        assert laid.size == (128, 128) and page.width == 1600
    assert not list((tmp_path / "new/out").glob(".*"))


@pytest.mark.slow
def test_one_corrupt_file_of_500_costs_one_row(tmp_path, by_grey, capsys):
    for i in range(500):
        grey(tmp_path / f"before/{i}.png", 0.2)
        grey(tmp_path / f"output/{i}.png", 0.1 if i % 10 == 0 else 0.9)
    (tmp_path / "output/123.png").write_bytes(b"not a picture")
    assert run(tmp_path, tmp_path / "out", "--fail-above", "no-edit=0.2") == 3
    assert run(tmp_path, tmp_path / "out", "--fail-above", "no-edit=0.2", "--allow-errors") == 0
    rows = rows_of(tmp_path / "out")
    assert list(rows) == [str(i) for i in range(500)]
    assert [stem for stem, row in rows.items() if row["message"]] == ["123"]
    assert sum(row["verdict"] == "no edit" for row in rows.values()) == 50
    low, high = wilson(50, 499)
    said = capsys.readouterr().out
    assert "50 of 499" in said and f"{100 * low:.0f} % to {100 * high:.0f} %" in said and "20%: kept" in said
    with Image.open(tmp_path / "out/sheet.png") as page:
        assert page.height <= verdict_sheet.HIGHEST


@pytest.mark.slow
def test_exit_status_by_threshold(tmp_path, by_grey, capsys):
    for i, level in enumerate((0.1, 0.5, 0.9, 0.9)):
        grey(tmp_path / f"before/{i}.png", 0.2)
        grey(tmp_path / f"output/{i}.png", level)
    out = tmp_path / "out"
    assert run(tmp_path, out) == 0
    assert run(tmp_path, out, "--fail-above", "overlay=0.25", "--fail-above", "any=0.5") == 0, (
        "a rate at its limit is kept"
    )
    assert run(tmp_path, out, "--fail-above", "overlay=0.24") == 1
    assert run(tmp_path, out, "--fail-above", "no_edit=0.9", "--fail-above", "any=0.4") == 1
    assert run(tmp_path, out, "--fail-above", "no-edit=0.9", "any=0.4") == 1, "several limits behind one option"
    assert "40%: EXCEEDED" in capsys.readouterr().out
    assert run(tmp_path, out, "--fail-above", "distorted=0.1") == 3, "without after pictures nobody can tell"
    grey(tmp_path / "output/9.png", 0.9)
    assert run(tmp_path, out) == 3 and run(tmp_path, out, "--allow-errors") == 0
    assert run(tmp_path, out, "--fail-above", "overlay=0.1") == 1, "a rate above its limit counts more than an error"
    shutil.rmtree(tmp_path / "before")
    (tmp_path / "before").mkdir()
    assert run(tmp_path, out, "--allow-errors") == 3, "nothing was judged"


def test_a_picture_that_could_not_be_asked_is_not_a_picture_that_passed():
    asked = Verdict("distorted", dict.fromkeys(FAILURES, 0.9), {})
    unasked = Verdict("undecided", {**dict.fromkeys(FAILURES, 0.1), "distorted": None}, {}, (WITHOUT_AFTER,))
    items = [verdict_items.Item("a", asked), *(verdict_items.Item(str(i), unasked) for i in range(9))]
    assert command.rate(items, "distorted") == Share(1, 1) and command.rate(items, "good") == Share(0, 10)
    failing = verdict_items.Failing.of(items)
    assert (failing.least, failing.most) == (Share(1, 10), Share(10, 10))
    assert command.status(items, {"distorted": 0.5}) == 1 and command.status(items, {}) == 0
    # One failure of ten is known, and nine more are possible.
    assert {limit: command.status(items, {"any": limit}) for limit in (0.05, 0.1, 0.5, 1.0)} == {
        0.05: 1,
        0.1: 3,
        0.5: 3,
        1.0: 0,
    }
    lines = command.report(items, {"any": 0.3}).splitlines()
    assert (
        " ".join(lines[-4].split()) == "any failure 1 to 10 of 10 10 % to 100 % 2 % to 100 % 30%: could not be answered"
    )
    assert lines[-2].startswith("undecided: 9;") and f"9 of 9: {WITHOUT_AFTER}. Add after/" in lines[-1]


def test_before_and_output_alone_call_nothing_good(tmp_path, capsys):
    save(PAIR.before, tmp_path / "before/edited.png")
    save(PAIR.after, tmp_path / "output/edited.png")
    save(PAIR.before, tmp_path / "before/copy.png")
    save(PAIR.before, tmp_path / "output/copy.png")
    assert run(tmp_path, tmp_path / "out", "--fail-above", "any=0.6") == 3
    said = " ".join(capsys.readouterr().out.split())
    rows = rows_of(tmp_path / "out")
    assert {stem: row["verdict"] for stem, row in rows.items()} == {"edited": "undecided", "copy": "no edit"}
    assert [rows["edited"][f] for f in FAILURES[1:]] == ["", "", "", ""]
    assert "good 0 of 2 0 %" in said and "any failure 1 to 2 of 2" in said
    assert "60%: could not be answered" in said and "Add after/, or mask/ (white where the edit belongs)" in said
    assert run(tmp_path, tmp_path / "out", "--fail-above", "any=0.4") == 1 and run(tmp_path, tmp_path / "out") == 0
    assert run(tmp_path, tmp_path / "out", "--fail-above", "overlay=0.5") == 3


def test_a_long_name_is_cut_in_the_names_of_its_maps(tmp_path, by_grey):
    """255 bytes are what file systems allow; some characters take four of them."""
    names = [
        "a" * 251,
        "b" * 240 + "1",
        "b" * 240 + "2",
        "椅" * 83,
        "🪑" * 62 + "a",
        "é" * 125,
        "sub/" + "c" * 250,
        "short",
    ]
    for name in names:
        grey(tmp_path / f"before/{name}.png", 0.2)
        grey(tmp_path / f"output/{name}.png", 0.1)
    assert run(tmp_path, tmp_path / "out", "--maps") == 0
    maps = [path for path in (tmp_path / "out/maps").rglob("*") if path.is_file()]
    assert len(maps) == len(names) and all(len(os.fsencode(path.name)) <= 255 for path in maps)
    assert "short.unchanged.png" in {path.name for path in maps}, "a name that fits stays whole"
    assert sum(path.name.startswith("b" * 200) for path in maps) == 2, "two long names stay two"
    assert set(rows_of(tmp_path / "out")) == set(names), "the table has them whole"


def test_an_output_of_another_size_is_judged_beside_those_that_cannot_be(tmp_path):
    outputs = {
        "same": PAIR.after,
        "half": sized(PAIR.after, 64, 64),
        "pixel": sized(PAIR.after, 127, 128),
        "wide": PAIR.after[:100],
    }
    for name, output in outputs.items():
        save(PAIR.before, tmp_path / f"before/{name}.png")
        save(output, tmp_path / f"output/{name}.png")
        save(PAIR.after, tmp_path / f"after/{name}.png")
    assert run(tmp_path, tmp_path / "out", "--maps") == 3
    rows = rows_of(tmp_path / "out")
    assert {stem: row["verdict"] for stem, row in rows.items()} == {
        "same": "good",
        "half": "good",
        "pixel": "good",
        "wide": "",
    }
    assert (
        rows["half"]["notes"] == "The output picture was resized from 64 x 64 to 128 x 128 pixels."
        and not rows["same"]["notes"]
    )
    assert "128 x 128" in rows["wide"]["message"] and "128 x 100" in rows["wide"]["message"]
    with Image.open(tmp_path / "out/maps/half.unchanged.png") as laid:
        assert laid.size == (64, 64)


def test_the_columns_are_those_that_the_docs_explain(tmp_path, by_grey):
    grey(tmp_path / "before/a.png", 0.2)
    grey(tmp_path / "output/a.png", 0.1)
    run(tmp_path, tmp_path / "out")
    with open(tmp_path / "out/verdicts.csv", encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file))
    text = (ROOT / "docs/verdicts.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)` \|", text.split("## Columns of verdicts.csv")[1].split("\n## ")[0], re.M)
    assert explained == columns


@pytest.mark.parametrize("limit", ["overlays=0.1", "overlay", "overlay=2", "overlay=nan", "overlay=-0.1"])
def test_wrong_limits_are_usage_errors(limit, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, tmp_path / "out", "--fail-above", limit)
    assert ended.value.code == 2 and "--fail-above" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_judged(tmp_path, by_grey, monkeypatch, capsys):
    for i in range(6):
        grey(tmp_path / f"before/{i}.png", 0.2)
        grey(tmp_path / f"output/{i}.png", 0.1)
    judged = folders.judge_entry

    def interrupted(entry, maps=None):
        if entry.name == "3":
            raise KeyboardInterrupt
        return judged(entry, maps)

    monkeypatch.setattr(folders, "judge_entry", interrupted)
    assert run(tmp_path, tmp_path / "out") == 130
    assert list(rows_of(tmp_path / "out")) == ["0", "1", "2"] and (tmp_path / "out/sheet.png").is_file()
    assert "interrupted after 3 of 6" in capsys.readouterr().err


def test_memory_holds_the_pictures_of_one_sheet_only(tmp_path, by_grey):
    for i in range(60):
        grey(tmp_path / f"before/{i}.png", 0.2)
        grey(tmp_path / f"output/{i}.png", 0.1 if i == 59 else 0.9)
    items, stopped = command._judge(scan(tmp_path).entries, None, 1)
    assert not stopped and len(items) == 60
    with_pictures = [item for item in items if item.pictures]
    assert len(with_pictures) == verdict_sheet.MOST_ROWS and with_pictures[-1].verdict.verdict == "no edit"


@pytest.mark.slow
def test_workers_give_the_same_in_the_same_order(hard):
    entries = scan(hard).entries[:3]
    alone, together = (list(judge_folder(entries, workers=n)) for n in (1, 2))
    assert [i.as_dict() for i in alone] == [i.as_dict() for i in together]
    assert torch.equal(alone[0].verdict.maps["unchanged"], together[0].verdict.maps["unchanged"])
