"""The report on a run: which step it chooses, what it says where something is missing, and that the page is one file."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from editloss_core.drawing.statistics import Share, wilson
from editloss_core.run_report import report, verdicts
from editloss_core.run_report.__main__ import main
from editloss_core.run_report.verdicts import judge_run
from editloss_core.runs.log import EventLog, RunLog, Sample, StepLog, TermSample, ValidationLog
from editloss_core.runs.pictures import PICTURE_FOLDER, PreviewRow, save_pictures
from editloss_core.training.settings import TrainingSettings
from editloss_core.training.trainer import UNCHECKED
from editloss_core.verdict.judge import FAILURES, VERDICTS, Verdict

ROOT = Path(__file__).parents[2]
# What the judge of these tests sees: a level of grey in the output's first pixel stands for a verdict.
GREYS = {verdict: (20 + 35 * i) / 255 for i, verdict in enumerate(VERDICTS)}
TERMS = {"no edit": "no_edit_identity", "overlay": "overlay_avoidance"}


def by_grey(before, output, after=None, mask=None):
    level = float(output[0, 0, 0])
    verdict = min(GREYS, key=lambda v: abs(GREYS[v] - level))
    assert before.shape == output.shape == after.shape and abs(GREYS[verdict] - level) < 1e-3
    return Verdict(verdict, {f: 0.9 if f == verdict else 0.1 for f in FAILURES}, {})


@pytest.fixture(autouse=True)
def judge_by_grey(monkeypatch):
    monkeypatch.setattr(verdicts, "judge_picture", by_grey)


def said(failure):
    toward = {"no edit": 0.9 if failure == "no edit" else 0.1, "overlay": 0.8 if failure == "overlay" else 0.2}
    return {
        "says": failure,
        "terms": {name: {"raw": toward[f], "toward_failure": toward[f]} for f, name in TERMS.items()},
    }


def row(pair, verdict, signal=None, side=16, caption="make it a stool"):
    before, after = torch.full((side, side, 3), 0.9), torch.full((side, side, 3), 0.95)
    base, lora = (torch.full((side, side, 3), GREYS[v]) for v in ("no edit", verdict))
    return PreviewRow(pair, before, base, lora, after, torch.ones(side, side), caption, {"base": said("no edit"), "lora": said(signal)})  # fmt: skip


def make_run(folder, plan, losses=None, every=10, keep=(), pairs=None, objective=True, events=True, **settings):
    """A run's folder. ``plan``: a list of verdicts per validation; ``keep``: steps whose checkpoints are there."""
    folder.mkdir(parents=True)
    log, steps = RunLog(folder), every * max(1, len(plan))
    chosen = TrainingSettings(**{"steps": steps, "validate_every": every, "checkpoint_every": every, **settings})
    terms = [{"kind": kind, "name": kind, "encoder": "vit", "weight": 1.0} for kind in TERMS.values()]
    info = {"settings": chosen.as_dict(), "lora": {"rank": 4, "layers": "all"}, "objective": terms if objective else []}
    log.rewrite()
    if events:
        log.add(EventLog(0, "started", (), info))
    for step in range(1, steps + 1):
        values = {
            n: TermSample(1 / step, 1 / step, None, 0.5) for n in ("velocity", *(TERMS.values() if objective else ()))
        }
        log.add(StepLog(step, 1 / step, 1.0, 1e-4, [Sample("p", step / (steps + 1), values)]))
        if step % every == 0 and plan:
            verdicts = plan[step // every - 1]
            rows = [row((pairs or {}).get(i, f"pair {i}"), v) for i, v in enumerate(verdicts)]
            loss = losses[step // every - 1] if losses else 1 / step
            log.add(ValidationLog(step, loss, 1.0, {}, {}, {}, save_pictures(folder, rows) if rows else ()))
    if events:
        log.add(EventLog(steps, "ended"))
    (folder / "checkpoints").mkdir()
    for step in keep:
        (folder / "checkpoints" / f"step_{step:06d}.safetensors").write_bytes(b"")
    return folder


# --- choosing ---------------------------------------------------------------------------------------------------------

BAD, FINE = "overlay", "good"


@pytest.mark.parametrize(
    "plan, losses, best, lowest",
    [
        ([[BAD, BAD], [FINE, BAD], [BAD, BAD]], [3, 2, 1], 20, 30),
        ([[FINE, BAD], [FINE, BAD], [BAD, BAD]], [3, 2, 1], 20, 30),  # a tie: the lower loss
        ([[FINE, FINE], [FINE, FINE]], [1, 1], 10, 10),  # and then the earlier one
        ([[], [BAD, BAD], []], [1, 2, 3], 20, 10),  # what has no pictures is not chosen
        ([[FINE, BAD], [FINE, FINE]], [2, math.nan], 20, 10),  # a loss that was not finite is none
    ],
)
def test_the_best_step_fails_least_and_of_equals_has_the_lower_loss(plan, losses, best, lowest, tmp_path):
    run = judge_run(make_run(tmp_path / "run", plan, losses))
    assert (run.best.step, run.lowest.step) == (best, lowest)


def test_rates_have_wilsons_interval():
    """Against the formula's other form: the roots of (p − k/n)² = z² p (1 − p) / n."""
    for k, n in ((0, 4), (1, 4), (4, 4), (30, 60)):
        for p in wilson(k, n):
            assert (p - k / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-9)
    assert wilson(0, 4)[0] == 0 and wilson(4, 4)[1] == pytest.approx(1)
    for k, n in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="successes: expected"):
            wilson(k, n)


def test_every_verdict_is_counted(tmp_path):
    known = [verdict for verdict in VERDICTS if verdict != "undecided"]
    run = judge_run(make_run(tmp_path / "run", [known, ["good"] * 5 + ["distorted"]]))
    first, second = run.validations
    assert [first.judged_as(v).count for v in known] == [1] * 6 and first.failing == Share(5, 6)
    assert second.failing == Share(1, 6) and run.base.judged_as("no edit") == Share(6, 6)
    assert second.failing.interval == wilson(1, 6)
    assert first.score("overlay") == pytest.approx((0.9 + 5 * 0.1) / 6)


def test_undecided_outputs_are_never_good(tmp_path):
    """The second step has no failure, but only one output is known to be good."""
    plan = [["good"] * 3 + ["overlay"], ["good"] + ["undecided"] * 3, ["undecided"] * 4]
    run = judge_run(make_run(tmp_path / "run", plan))
    first, second, third = run.validations
    assert [(v.failing, v.undecided) for v in run.validations] == [(Share(1, 4), 0), (Share(0, 4), 3), (Share(0, 4), 4)]
    assert [v.badness[0] for v in run.validations] == [0.25, 0.75, 1.0]
    assert run.best is first and not run.alike
    text = report.text(run)
    assert "| undecided |" in text and "3 undecided" not in run.advice()[0]
    html = report.page(run)
    assert 'class="chip undecided"' in html and '"></i>undecided' not in html
    alone = judge_run(make_run(tmp_path / "alone", [["undecided"] * 2, ["undecided"] * 2]))
    assert alone.best is None and "all 4 outputs that could be judged are undecided" in alone.advice()[0]
    assert all(o.agree is None for o in alone.outputs)


def column(html: str, head: str) -> list[str]:
    """The cells under a head of the page's table of steps."""
    table = html[html.index("<table>") : html.index("</table>")]
    heads = re.findall("<th>(.*?)</th>", table)
    return [re.findall("<td>(.*?)</td>", row)[heads.index(head)] for row in table.split("<tr")[2:]]


def test_it_says_which_file_is_there_and_what_to_take_instead(tmp_path):
    plan = [[FINE, FINE], [FINE, BAD], [BAD, BAD]]
    run = judge_run(make_run(tmp_path / "run", plan, keep=(20, 30)))
    assert run.best.step == 10 and run.best_kept.step == 20 and run.checkpoint(10) is None
    words = " ".join(run.advice())
    assert "not there any more: a run keeps its last 3" in words and "step 20 fails least: 1 of 2" in words
    assert "Choosing by loss would have taken step 30, where 2 more of 2 fail." in words
    again = judge_run(make_run(tmp_path / "apart", plan, keep=(30,), checkpoint_every=15))
    assert "none was made at this step (checkpoint_every 15, validate_every 10)" in again.where(10)
    assert column(report.page(again), "checkpoint") == ["", "none made", "none made", "there"]
    assert column(report.page(run), "checkpoint") == ["", "gone", "there", "there"]
    aside = tmp_path / "run" / "checkpoints" / "set_aside"
    aside.mkdir()
    (aside / "step_000010.safetensors").write_bytes(b"")
    assert judge_run(tmp_path / "run").where(10) == "checkpoints/set_aside/step_000010.safetensors"


def test_steps_that_fail_alike_are_not_told_apart(tmp_path):
    words = judge_run(make_run(tmp_path / "run", [["no edit"] * 3, [BAD] * 3], [2, 1])).advice()
    assert words[0].startswith("Every step fails as often: 3 of 3 (") and "Step 20 has the lowest loss" in words[0]
    assert "The base model without the LoRA fails no more often than that." in words and len(words) == 3


def test_where_all_fail_alike_the_page_calls_no_step_the_best_by_failures(tmp_path):
    alike = judge_run(make_run(tmp_path / "alike", [[BAD] * 3, [BAD] * 3, [BAD] * 3], [2, 1, 3], keep=(30,)))
    assert alike.alike and "Of those that are there, step 30 fails as often." in " ".join(alike.advice())
    html = report.page(alike)
    assert (
        "Every step fails as often: the lowest loss of them" in html and "Best checkpoint by failure rate" not in html
    )
    for plan in ([[BAD]], [[BAD], [FINE]], []):
        assert not judge_run(make_run(tmp_path / f"{len(plan)}{plan == [[BAD]]}", plan)).alike


@pytest.mark.parametrize("plan, few", [([[BAD] * 4, [FINE] * 3 + [BAD]], True), ([[BAD] * 20, [FINE] * 20], False)])
def test_few_pictures_are_said_to_prove_nothing(plan, few, tmp_path):
    assert any("intervals overlap" in s for s in judge_run(make_run(tmp_path / "run", plan)).advice()) == few


# --- signal and judge -------------------------------------------------------------------------------------------------


def test_signal_and_judge_side_by_side(tmp_path):
    folder = make_run(tmp_path / "run", [[]])
    log = RunLog.read(folder)
    rows = [row("a", "overlay", "overlay"), row("b", "overlay"), row("c", "good"), row("d", "good", "no edit")]
    log.validations[0] = ValidationLog(10, 0.5, 1.0, {}, {}, {}, save_pictures(folder, rows))
    log.rewrite()
    run = judge_run(folder)
    assert [o.agree for o in run.outputs] == [True, False, True, False]
    says, counts = verdicts.matrix(run)
    table = {name: dict(zip(VERDICTS, row)) for name, row in zip(says, counts)}
    assert table["overlay"]["overlay"] == table["no failure"]["overlay"] == table["no failure"]["good"] == 1
    assert table["no edit"]["good"] == 1 and sum(map(sum, counts)) == 4
    assert run.validations[0].toward(run.terms_of["overlay"]) == pytest.approx((0.8 + 3 * 0.2) / 4)
    assert run.terms_of == {f: [n] for f, n in TERMS.items()}
    html = report.page(run)
    assert (
        html.count('class="ne"') == 2
        and "Signal and judge agree on 2 of 4 outputs. In 1 the judge sees overlay where the signal points to no failure."
        in html
    )
    assert "In 1 the signal points to no edit where the judge finds the output good." in html


def test_without_an_objective_there_is_no_signal(tmp_path):
    folder = make_run(tmp_path / "run", [[]], objective=False)
    log = RunLog.read(folder)
    plain = row("a", "good")
    plain = PreviewRow("a", plain.before, plain.base, plain.lora, plain.after)
    log.validations[0] = ValidationLog(10, 0.5, 1.0, {}, {}, {}, save_pictures(folder, [plain]))
    log.rewrite()
    run = judge_run(folder)
    assert (
        run.outputs[0].says is None
        and run.outputs[0].agree is None
        and verdicts.matrix(run)[1] == [[0] * len(verdicts.SAYING)]
    )
    html = report.page(run)
    assert "Signal says, judge says" not in html
    assert "velocity loss alone" in html and "mask" not in run.outputs[0].files


# --- the page ---------------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "link", "input", "hr"}
SVG_LEAVES = {"line", "rect", "path", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Tags that are opened and closed in order, and whatever points outside."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.pointers, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.pointers += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data", "poster")]
        assert not any(k.startswith("on") for k, _ in attrs), attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


EVIL = '<script>alert("1")</script>'


def test_the_page_is_one_file_and_escapes_what_others_wrote(tmp_path):
    names = {0: EVIL, 1: '"><img src=x onerror=alert(1)>', 2: "é 猫 {{ 7 * 7 }} {% raw %}"}
    folder = make_run(tmp_path / "a&b <i>", [[FINE, BAD, "distorted"]] * 2, keep=(20,), pairs=names)
    log = RunLog.read(folder)
    log.events.append(EventLog(20, "stopped", (f"ValueError: {EVIL}",)))
    log.events[0].info["objective"][0]["name"] = EVIL
    log.events[0].info["model"] = EVIL
    log.steps[0] = StepLog(1, 1.0, 1.0, 1e-4, [Sample("p", 0.5, {"velocity": TermSample(1, 1), EVIL: TermSample(1, 1, None, 1.0)})])  # fmt: skip
    log.rewrite()
    path = report.write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob(".*.tmp"))
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "{{ 7 * 7 }}" in html and "49" not in "".join(page.words[:40])
    assert EVIL not in html and html.count("&lt;script&gt;") >= 4
    assert page.pointers and all(p.startswith("data:image/webp;base64,") for p in page.pointers)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert "prefers-color-scheme: dark" in html
    assert page.tags.count("img") == 3 * 5  # before, base, two steps, after
    assert {"no failure", "overlay"} <= {w.strip() for w in page.words} and "a&b <i>" in page.words


def test_the_page_goes_where_it_is_sent_and_replaces_an_older_one(tmp_path):
    folder = make_run(tmp_path / "run", [[FINE]])
    out = tmp_path / "deep" / "page.html"
    assert report.write_report(folder, out) == out
    first = out.read_text()
    report.write_report(folder, out)
    assert out.read_text() == first and len(list(out.parent.iterdir())) == 1


def test_many_validations_are_thinned_but_not_the_best(tmp_path):
    plan = [[BAD, BAD]] * 20
    plan[7] = [FINE, BAD]
    run = judge_run(make_run(tmp_path / "run", plan, every=2))
    html = report.page(run)
    first, second = (re.findall(r'class="what">step (\d+)', row) for row in html.split('<section class="row">')[1:])
    steps = [int(step) for step in first]
    assert first == second and len(steps) == 7 < report.MOST_COLUMNS and steps == sorted(steps)
    assert {run.best.step, run.lowest.step, run.validations[0].step} <= set(steps) and run.best.step == 16
    assert "Shown: 7 of 20 validations." in html and html.count("<figure") == 2 * (7 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("width", [640, 1600])
@pytest.mark.parametrize("plan", [[], [[]], [[FINE, BAD]], [[BAD, FINE]] * 30])
def test_the_picture_and_the_text(plan, width, tmp_path):
    run = judge_run(make_run(tmp_path / "run", plan, every=2))
    image = report.picture(run, width)
    assert image.shape[0] == 1 and image.shape[2:] == (width, 3)
    assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1 and image.std() > 0.02
    words = report.text(run)
    assert run.advice()[0] in words
    assert (words.count("\n| ") == 2 + len(plan)) == bool(plan and plan[0])  # the head, the base, the validations


# --- what is missing --------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="run_folder: expected a folder that a training run has written, got no log.jsonl in 'empty'"):  # fmt: skip
        judge_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="'nowhere', which is no folder"):
        judge_run(tmp_path / "nowhere")
    (tmp_path / "empty" / "log.jsonl").write_text('{"kind": "st')
    with pytest.raises(ValueError, match="nothing can be read in empty/log.jsonl"):
        judge_run(tmp_path / "empty")


@pytest.mark.parametrize(
    "plan, words", [([], "No validation: this run watched"), ([[]], "No failure rates: of 1 valid")]
)
def test_without_pictures_there_is_a_page_that_says_so(plan, words, tmp_path):
    run = judge_run(make_run(tmp_path / "run", plan))
    html = report.page(run)
    Page(html)
    assert run.best is None and words in html and "<figure" not in html and "Losses</h2>" in html


def test_a_log_of_an_older_version_is_enough(tmp_path):
    folder = make_run(tmp_path / "run", [[], []], events=False)
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in lines:
        entry.pop("pictures", None)
    path.write_text("".join(json.dumps(e) + "\n" for e in lines))
    run = judge_run(folder)
    html = report.page(run)
    assert len(run.validations) == 2 and run.lowest.step == 20 and "does not say with which settings" in html


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_killed_run_is_reported_up_to_its_last_whole_line(kept, tmp_path):
    folder = make_run(tmp_path / "run", [[FINE, BAD], [FINE, FINE]])
    path = folder / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)[:-1]  # the run did not end
    assert json.loads(lines[-1])["kind"] == "validation"
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    run = judge_run(folder)
    assert [v.step for v in run.validations] == [10] and run.best.failing == Share(1, 2) and run.cut_off == 1
    html = report.page(run)
    Page(html)
    assert "1 line of the log could not be read" in html and "The log ends at step 20 of 20" in html
    assert "There is one validation only" in html


def test_files_that_are_missing_or_damaged_are_named_and_the_rest_is_judged(tmp_path):
    folder = make_run(tmp_path / "run", [[FINE, BAD, FINE]])
    first, second, third = RunLog.read(folder).validations[0].pictures
    place = folder / PICTURE_FOLDER
    (place / second.files["lora"]).unlink()
    (place / third.files["after"]).write_bytes(b"no picture")
    run = judge_run(folder)
    assert run.validations[0].failing == Share(0, 1) and run.base.failing == Share(2, 2)
    problems = [o.problem for o in run.outputs]
    assert problems[0] == "" and second.files["lora"] in problems[1] and third.files["after"] in problems[2]
    html = report.page(run)
    Page(html)
    assert "pair 1, step 10: not judged" in html and 'class="gap"' in html
    assert report.picture(run).shape[0] == 1


def test_what_the_judge_refuses_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("mask: expected some of it")

    monkeypatch.setattr(verdicts, "judge_picture", refuse)
    run = judge_run(make_run(tmp_path / "run", [[FINE]]))
    assert run.best is None and "they could not be judged" in run.advice()[0]
    assert "mask: expected some of it" in report.page(run)


def test_names_of_files_do_not_lead_out_of_the_run(tmp_path):
    folder = make_run(tmp_path / "run", [[FINE]])
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    path = folder / "log.jsonl"
    path.write_text(re.sub(r'"lora": "[^"]+"', '"lora": "../../secret.png"', path.read_text()))
    assert "secret.png" in judge_run(folder).outputs[0].problem


def test_validations_of_other_pairs_are_pointed_out(tmp_path):
    folder = make_run(tmp_path / "run", [[FINE], [FINE]])
    log = RunLog.read(folder)
    assert not any("other pairs" in n for n in judge_run(folder).notes())
    log.validations[0] = ValidationLog(10, 0.5, 1.0, {}, {}, {}, save_pictures(folder, [row("another", BAD)]))
    log.rewrite()
    assert any("up to step 10 watched other pairs" in n for n in judge_run(folder).notes())


# --- the command line, and a run that is real ----------------------------------------------------------------------------


def test_the_command_line(tmp_path, capsys):
    folder = make_run(tmp_path / "run", [[FINE, BAD]])
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "Step 10 is the only one that was watched; failing: 1 of 2 (50 %" in out and out.rstrip().endswith(
        "page.html"
    )
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "expected a folder that a training run has written" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_as_a_module(tmp_path):
    """On a run without validations: there is a page, and it names no checkpoint."""
    folder = make_run(tmp_path / "run", [])
    done = subprocess.run(
        [sys.executable, "-m", "editloss_core.run_report", str(folder)], capture_output=True, text=True,
        cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3 and (folder / "report.html").is_file(), done.stderr


@pytest.mark.parametrize(
    "event, line", [("checked", "self-check passed (ComfyUI 0.33.0): LoRA 0.01 %"), ("unchecked", UNCHECKED)]
)
def test_the_self_check_stands_in_the_report(event, line, tmp_path):
    folder = make_run(tmp_path / "run", [["good"]])
    log = RunLog.read(folder)
    log.events.insert(1, EventLog(0, event, (line,)))
    log.rewrite()
    run = judge_run(folder)
    said = line[0].upper() + line[1:]
    assert run.notes()[0] == said and said in report.page(run) and said in report.text(run)


def test_the_self_check_s_word_does_not_hide_what_was_trained(tmp_path):
    """The event "checked" carries numbers of its own."""
    folder = make_run(tmp_path / "run", [[FINE, BAD]], batch_size=3)
    log = RunLog.read(folder)
    log.events.insert(1, EventLog(0, "checked", ("self-check: right",), {"parts": [{"part": "LoRA"}]}))
    log.rewrite()
    run = judge_run(folder)
    assert run.settings["batch_size"] == 3 and run.info["lora"]["rank"] == 4 and "no edit" in run.terms_of


def test_the_last_look_at_own_failures_stands_in_the_report(tmp_path):
    folder = make_run(tmp_path / "run", [["good"]])
    log = RunLog.read(folder)
    log.events = [e for e in log.events if e.event in ("started", "resumed")]
    for step, failed in ((5, 3), (9, 1)):
        log.events.append(
            EventLog(step, "own failures", (f"{failed} of 4 outputs failed: overlay {failed}",), {"outputs": 4})
        )
    log.rewrite()
    notes = judge_run(folder).notes()
    told = [note for note in notes if note.startswith("Own failures")]
    assert told == ["Own failures at step 9, the last look: 1 of 4 outputs failed: overlay 1"]
    assert any("the run goes on, or was killed" in note for note in notes)


def test_a_run_whose_losses_are_not_known_is_reported(tmp_path):
    run = judge_run(make_run(tmp_path / "run", [[FINE, BAD], [FINE, FINE]], losses=[None, None]))
    assert run.lowest is None and run.best.step == 20
    assert "No validation has a loss to choose by." in run.advice()
    assert "not known" in report.page(run) and report.picture(run).shape[0] == 1 and "20" in report.text(run)


def test_settings_are_named_as_the_graph_and_the_configuration_have_them(tmp_path):
    run = judge_run(make_run(tmp_path / "run", []))
    assert run.advice() == [
        "No validation: this run watched no held-out pairs, or ended before the first. Set hold_out, and validate_every "
        "(Run Options; [validation])."
    ]
