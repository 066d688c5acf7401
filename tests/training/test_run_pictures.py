"""What a run leaves for its report: the pictures of every validation and what happened, also after a stop and a resume."""

import json

import pytest
import torch
from PIL import Image
from small import ALL, LATENTS, StopAfter, prepared_pairs, trainer, without_times

from editloss_core.objective import EditObjective, LossTerm
from editloss_core.pairs.pictures import read_picture
from editloss_core.run_report import report
from editloss_core.run_report.verdicts import judge_run
from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, checkpoints
from editloss_core.runs.log import RunLog
from editloss_core.runs.pictures import PICTURE_FOLDER, PreviewRow, save_pictures
from editloss_core.training.host import Host

OPTIONS = {"validate_every": 2, "preview_steps": 2, "previews": 2, "gradients_every": 1}


class Keep(Host):
    def __init__(self):
        self.rows = []

    def on_validation(self, log, pictures):
        self.rows.append(pictures)


def made(folder, **options):
    return trainer(folder, validation=prepared_pairs(2, seed=9, names="held out"), **{**OPTIONS, **options})


def files(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / PICTURE_FOLDER).glob("*"))}


def as_bytes(picture):
    return (picture * 255).round().to(torch.uint8)


def test_every_validation_keeps_its_pictures_without_loss_and_constants_once(tmp_path):
    host = Keep()
    log = made(tmp_path, host=host).run().log
    assert RunLog.read(tmp_path).validations == log.validations and len(host.rows) == 3
    for validation, rows in zip(log.validations, host.rows):
        assert [p.pair for p in validation.pictures] == ["held out 0", "held out 1"]
        for entry, row in zip(validation.pictures, rows):
            assert entry.caption == "make it a square" and set(entry.files) == {
                "before",
                "base",
                "lora",
                "after",
                "mask",
            }
            for part, name in entry.files.items():
                kept = torch.from_numpy(read_picture(tmp_path / PICTURE_FOLDER / name, part == "mask").values)
                assert torch.equal(as_bytes(kept), as_bytes(getattr(row, part))), part
    parts = [name.split("-")[1] for name in files(tmp_path)]
    assert {part: parts.count(part) for part in set(parts)} == {
        "before": 2,
        "base": 2,
        "after": 2,
        "mask": 2,
        "lora": 6,
    }


@pytest.mark.slow
def test_no_previews_and_no_folder_leave_no_pictures(tmp_path):
    for folder, options in ((tmp_path, {"preview_steps": 0}), (None, {})):
        log = made(folder, **options).run().log
        assert [v.pictures for v in log.validations] == [()] * 3
    assert not (tmp_path / PICTURE_FOLDER).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, checks", [(3, 0), (2, 1), (4, 12)], ids=["between", "at the validation", "while sampling"]
)
def test_stopped_and_resumed_it_keeps_what_an_uninterrupted_run_keeps(step, checks, tmp_path):
    whole = made(tmp_path / "whole")
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "halves", host=StopAfter(step, checks)).run()
    before = files(tmp_path / "halves")
    again = made(tmp_path / "halves")
    again.resume(checkpoints(tmp_path / "halves" / CHECKPOINT_FOLDER)[-1])
    again.run()
    assert without_times(RunLog.read(tmp_path / "halves")) == without_times(RunLog.read(tmp_path / "whole"))
    assert (
        files(tmp_path / "halves") == files(tmp_path / "whole") and before.items() <= files(tmp_path / "halves").items()
    )
    events = [(e.event, e.step) for e in RunLog.read(tmp_path / "halves").events]
    assert [event for event in events if event[0] != "unchecked"] == [
        ("started", 0), ("stopped", step), ("resumed", step), ("ended", 6),
    ]  # fmt: skip


def test_going_back_loses_no_picture(tmp_path):
    """What the given-up branch showed stays, even where it is shown otherwise now."""
    made(tmp_path).run()
    before = files(tmp_path)
    again = made(tmp_path, learning_rate=0.3)
    again.resume(tmp_path / CHECKPOINT_FOLDER / "step_000002.safetensors")
    again.run()
    assert before.items() < files(tmp_path).items()
    events = [event for event in RunLog.read(tmp_path).events if event.event != "unchecked"]
    assert [e.event for e in events] == ["started", "resumed", "ended"]
    assert events[1].notes == ("resumed with other settings or pairs than before: learning_rate 0.01 → 0.3",)
    assert events[1].info["settings"]["learning_rate"] == 0.3


@pytest.mark.slow
def test_taking_the_lora_of_an_earlier_step_leaves_the_run_as_it_is(tmp_path):
    """As the report advises for the step that fails least: resume there with nothing left to train."""
    made(tmp_path).run()
    before, log = files(tmp_path), RunLog.read(tmp_path)
    names = [p.name for p in checkpoints(tmp_path / CHECKPOINT_FOLDER)]
    again = made(tmp_path, steps=4)
    again.resume(tmp_path / CHECKPOINT_FOLDER / "step_000004.safetensors")
    assert again.run().steps == 4
    assert [p.name for p in checkpoints(tmp_path / CHECKPOINT_FOLDER)] == names and files(tmp_path) == before
    assert without_times(RunLog.read(tmp_path)) == without_times(log)
    assert judge_run(tmp_path).steps == 6


def test_the_signal_is_the_objective_on_the_output_itself(tmp_path):
    """Whatever the gates say about noise levels, of which a sampled output has none."""
    gated = EditObjective(tuple(LossTerm(**{**vars(t), "t_min": 0.9}) for t in ALL.terms))
    found = []
    for name, objective in (("all", ALL), ("gated", gated)):
        run = made(tmp_path / name, objective=objective, learning_rate=1e-9, steps=2)
        run.run()
        found.append(run.log.validations[0].pictures[0].signals)
    assert found[0]["base"]["terms"].keys() == {t.name for t in ALL.terms}
    for name, numbers in found[0]["lora"]["terms"].items():
        assert numbers == pytest.approx(found[0]["base"]["terms"][name], rel=1e-3)  # a LoRA that learnt nothing
        assert numbers == pytest.approx(found[1]["lora"]["terms"][name], rel=1e-3)
        assert numbers["raw"] >= 0 and numbers["toward_failure"] >= 0


def test_a_run_without_an_objective_has_no_signals(tmp_path):
    log = made(tmp_path, objective=None, steps=2).run().log
    assert [p.signals for p in log.validations[0].pictures] == [{}, {}]


@pytest.mark.slow
def test_a_signal_says_nothing_where_no_term_answers_a_failure(tmp_path):
    watched = EditObjective((LossTerm("feature_match", LATENTS),))
    log = made(tmp_path, objective=watched, steps=2).run().log
    assert all(s.keys() == {"terms"} for p in log.validations[0].pictures for s in p.signals.values())
    assert [o.says for o in judge_run(tmp_path).outputs] == [None, None]


def test_names_of_pairs_become_names_of_files(tmp_path):
    flat = torch.full((16, 16, 3), 0.5)
    for name in ("../../etc/passwd", "猫", "a" * 300, "", "con: <b>"):
        (entry,) = save_pictures(tmp_path, [PreviewRow(name, flat, flat, flat, flat)])
        assert entry.pair == name and set(entry.files) == {"before", "base", "lora", "after"}
        for file in entry.files.values():
            assert file.isascii() and "/" not in file and len(file) < 100
            with Image.open(tmp_path / PICTURE_FOLDER / file) as image:
                assert image.size == (16, 16)
    json.dumps(entry.files)


def test_what_cannot_be_seen_is_written_as_black(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -3.0]).expand(16, 16, 3)
    (entry,) = save_pictures(tmp_path, [PreviewRow("odd", odd, odd, odd, odd)])
    with Image.open(tmp_path / PICTURE_FOLDER / entry.files["lora"]) as image:
        assert image.getpixel((3, 3)) == (0, 255, 0)


@pytest.mark.slow
def test_a_real_run_is_reported(tmp_path):
    """With the judge itself, on pictures that are tiny: numbers for every output, one page, and the same again."""
    made(tmp_path / "run").run()
    run = judge_run(tmp_path / "run")
    assert [v.failing.n for v in (run.base, *run.validations)] == [2] * 4 and run.best and not run.cut_off
    assert run.terms_of == {"no edit": ["no edit"], "distorted": ["geometry"], "overlay": ["overlay"]}
    assert run.checkpoint(run.best.step) and run.settings["steps"] == 6
    html = report.write_page(run).read_text(encoding="utf-8")
    assert html.count("<figure") == 2 * 6 and "Signal says, judge says" in html and "Ended at step 6" in html
    assert report.page(judge_run(tmp_path / "run")) == html
