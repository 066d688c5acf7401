"""A report on the sample pictures of another trainer, and on what ``workflows/run.py`` leaves of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from editloss_core.commands.exits import DONE, FOUND, INCOMPLETE, UNUSABLE
from editloss_core.drawing.statistics import Share
from editloss_core.run_report import report, verdicts
from editloss_core.run_report.__main__ import main
from editloss_core.run_report.verdicts import judge_samples
from editloss_core.runs.log import RunLog, ValidationLog
from editloss_core.runs.pictures import PreviewRow, save_pictures
from editloss_core.verdict.folder import scan
from editloss_core.verdict.judge import FAILURES, UNDECIDED, Verdict

PLAN = {0: "nn", 250: "no", 500: "og", 750: "gg", 1000: "dg", 1250: "dd"}  # step → verdicts of the two pairs
GREYS = {"n": (40, "no edit"), "o": (90, "overlay"), "g": (140, "good"), "d": (190, "distorted")}


@pytest.fixture(autouse=True)
def judge_by_grey(monkeypatch):
    def judge(before, output, after=None, mask=None):
        level = round(float(output[0, 0, 0]) * 255)
        verdict = next(v for grey, v in GREYS.values() if abs(grey - level) < 6)
        return Verdict(verdict, {f: 0.9 if f == verdict else 0.1 for f in FAILURES}, {})

    monkeypatch.setattr(verdicts, "judge_picture", judge)


def grey(path, level=220):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level,) * 3).save(path)


def trained(
    root: Path, name="{time}__{step:09d}_{pair}.png", checkpoint="my_lora_{step:09d}.safetensors", plan=PLAN
) -> Path:
    """A folder as ai-toolkit leaves it, with the pairs beside the samples."""
    for pair in (0, 1):
        for part in ("control", "target"):
            grey(root / part / f"{'ab'[pair]}.png")
    for step, kinds in plan.items():
        for pair, kind in enumerate(kinds):
            grey(root / "samples" / name.format(time=1_700_000_000_000 + step, step=step, pair=pair), GREYS[kind][0])
        if step and checkpoint:
            (root / checkpoint.format(step=step)).write_bytes(b"")
    return root


def run_of(root):
    return judge_samples(scan(root, {}), root)


def test_the_best_checkpoint_of_another_trainer(tmp_path):
    run = run_of(trained(tmp_path / "run"))
    assert [v.step for v in run.validations] == [250, 500, 750, 1000, 1250] and len(run.base.outputs) == 2
    assert run.best.step == 750 and run.best.failing.count == 0 and run.since_best == 2
    assert run.where(750) == "my_lora_000000750.safetensors"
    said = " ".join(run.advice())
    assert (
        "Step 750 fails least: 0 of 2" in said
        and "None of the 2 later ones fails less: it could have stopped there." in said
    )
    assert "Its checkpoint: my_lora_000000750.safetensors." in said and "loss" not in said
    assert "matched to before pictures by their numbers: 0 = control/a.png" in run.notes()[0]


def test_its_page_has_no_losses_and_no_settings(tmp_path):
    run = run_of(trained(tmp_path / "run"))
    html, words = report.page(run), report.text(run)
    assert "Judged from sample pictures alone" in html and "step 750 ★" in html and "velocity" not in html + words
    assert "| 750 | 0 of 2 |" in words and "| base | 2 of 2 |" in words and words.count("| there |") == 5
    picture = report.picture(run, 800)
    assert picture.shape[0] == 1 and picture.shape[2] >= 800 and 0 <= float(picture.min()) and float(picture.max()) <= 1
    assert report.picture(run, 800, rows=1).shape[1] < picture.shape[1]


def test_without_after_pictures_what_is_not_seen_to_fail_is_undecided_and_still_chosen(tmp_path, monkeypatch):
    """It is not called good, and a step at which nothing fails is not one that was not judged."""
    judged = verdicts.judge_picture

    def judge(before, output, after=None, mask=None):
        found = judged(before, output, after, mask)
        return (
            found
            if found.verdict != "good"
            else Verdict(UNDECIDED, {**found.scores, "distorted": None}, {}, ("distorted: …",))
        )

    monkeypatch.setattr(verdicts, "judge_picture", judge)
    run = run_of(trained(tmp_path / "run"))
    assert run.best.step == 750 and (run.best.failing, run.best.undecided) == (Share(0, 2), 2) and run.since_best == 2
    said = " ".join(run.advice())
    assert (
        "Step 750 fails least: 0 of 2" in said and "2 outputs of that step are undecided: no failure was found" in said
    )
    assert "| 500 | 1 of 2 |" in report.text(run) and "0 of 2 fail, 2 undecided" in report.page(run)
    alone = run_of(trained(tmp_path / "alone", plan={250: "gg", 500: "gg"}))
    assert alone.best is None and "are undecided" in alone.advice()[0]


def test_epochs_of_kohya(tmp_path):
    plan = {1: "no", 2: "gg", 3: "gd"}
    root = trained(tmp_path / "run", "name_e{step:06d}_0{pair}_20240101120000.png", "name-{step:06d}.safetensors", plan)
    (root / "samples").rename(root / "sample")
    run = run_of(root)
    assert (run.unit, run.best.step, run.where(2)) == ("epoch", 2, "name-000002.safetensors")
    assert run.advice()[0].startswith("Epoch 2 fails least") and report.text(run).count("| epoch |") == 1
    assert not run.base.outputs and "Without the LoRA" not in report.page(run)


def test_checkpoints_in_folders_and_samples_named_by_pair(tmp_path):
    plan = {250: "gn", 500: "gg"}
    root = trained(tmp_path / "run", "checkpoint-{step}/{pair}.png", "", plan)
    for place in ("control", "target"):
        for old, new in (("a", "0"), ("b", "1")):
            (root / place / f"{old}.png").rename(root / place / f"{new}.png")
    (root / "checkpoint-500").mkdir()
    (root / "checkpoint-500/pytorch_lora_weights.safetensors").write_bytes(b"")
    (root / "lora_250.safetensors").write_bytes(b"")
    (root / "vae_16.safetensors").write_bytes(b"")
    run = run_of(root)
    assert run.best.step == 500 and run.where(500) == "checkpoint-500" and not run.remarks
    assert run.where(250) == "lora_250.safetensors" and set(run.checkpoints) == {250, 500}
    (root / "lora_250.safetensors").unlink()
    run = run_of(root)
    assert "not known" in run.where(250)


def test_the_command_and_its_one_line(tmp_path, capsys):
    root = trained(tmp_path / "run")
    assert main([str(root), "--format", "line", "--out", str(tmp_path / "page")]) == DONE
    line = json.loads(capsys.readouterr().out)
    assert line["best_step"] == 750 and line["best_checkpoint"].endswith("my_lora_000000750.safetensors")
    assert (line["last_step"], line["last_failing"], line["validations_since_best"]) == (1250, 1.0, 2)
    assert (tmp_path / "page/report.html").is_file() and not (root / "report.html").exists()
    assert main([str(root), "--stop-after", "3"]) == DONE and (root / "report.html").is_file()
    assert main([str(root), "--stop-after", "2"]) == FOUND
    shutil.move(root / "control", tmp_path / "elsewhere")
    assert main([str(root)]) == UNUSABLE
    assert "got no log.jsonl in 'run', and of samples" in capsys.readouterr().err
    assert main([str(root / "samples"), "--before", str(tmp_path / "elsewhere")]) == DONE
    (tmp_path / "file").write_text("")
    assert (
        main([str(root), "--before", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "file/x.html")]) == INCOMPLETE
    )
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_outputs_without_steps_are_for_diagnose(tmp_path, capsys):
    for part in ("before", "output"):
        grey(tmp_path / part / "a.png")
    assert main([str(tmp_path)]) == UNUSABLE
    assert "outputs without steps are for editloss diagnose" in capsys.readouterr().err


def test_the_default_place_may_be_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(trained(tmp_path / "run"))
    assert main([".", "--out", "."]) == DONE and Path("report.html").is_file()


# --- what is left of a run ---------------------------------------------------------------------------------------------


def left(root: Path, pictures: bool) -> Path:
    """NAME.log.jsonl, and with it NAME.pictures/, as workflows/run.py copies them."""
    scratch = root / "scratch"
    scratch.mkdir(parents=True)
    log = RunLog(scratch)
    side = torch.ones(16, 16)
    for step, kind in ((10, "o"), (20, "g")):
        shown = [torch.full((16, 16, 3), level / 255) for level in (220, GREYS["n"][0], GREYS[kind][0], 220)]
        rows = save_pictures(scratch, [PreviewRow("a", *shown, side, "x", {})])
        log.add(ValidationLog(step, 1 / step, 1.0, {}, {}, {}, rows))
    (scratch / "log.jsonl").rename(root / "demo.log.jsonl")
    if pictures:
        (scratch / "pictures").rename(root / "demo.pictures")
    shutil.rmtree(scratch)
    return root


def test_a_run_that_was_copied_out_of_its_folder(tmp_path, capsys):
    assert main([str(left(tmp_path / "train_demo", True)), "--format", "line"]) == DONE
    assert json.loads(capsys.readouterr().out)["best_step"] == 20
    assert (tmp_path / "train_demo/report.html").is_file()


def test_pictures_that_were_not_copied_are_what_is_missing(tmp_path, capsys):
    root = left(tmp_path / "train_demo", False)
    assert main([str(root)]) == INCOMPLETE
    said = capsys.readouterr().out
    assert "the log names pictures of 2 outputs, and there is no folder pictures/ in train_demo" in said
    assert "Run Options" not in said and "not judged:" not in said
    shutil.copy(root / "demo.log.jsonl", root / "other.log.jsonl")
    assert main([str(root)]) == UNUSABLE and "got demo.log.jsonl, other.log.jsonl" in capsys.readouterr().err
    assert main([str(root / "other.log.jsonl")]) == INCOMPLETE
