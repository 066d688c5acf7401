"""The contact sheet and the table of verdicts: what they show, what they leave out, and where signal and judge disagree."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from editloss_core.demo.scenes import draw
from editloss_core.drawing.colours import VERDICT_COLORS as COLORS
from editloss_core.verdict import picture as verdict_sheet
from editloss_core.verdict.items import Item, Signal, signals, table, with_signals
from editloss_core.verdict.judge import FAILURES, VERDICTS, Verdict
from editloss_core.verdict.picture import heat, sheet


@pytest.fixture(scope="module")
def items():
    pair = draw(3, "replace", "chair", "table")
    after = {"after": pair.after, "mask": pair.mask} if hasattr(pair, "mask") else {"after": pair.after}
    return [
        Item.judged("copy of before", pair.before, pair.before, **after),
        Item.judged("after | itself", pair.before, pair.after, **after),
        Item.judged("椅子 without after", pair.before, pair.after),
        Item.judged("wrong size", pair.before, pair.after[:100], **after),
        Item("lost", None, "output: nothing.png cannot be read: it is empty"),
    ]


def made_up(verdict, name="item"):
    picture = torch.full((32, 32, 3), 128, dtype=torch.uint8)
    scores = {f: 0.9 if f == verdict else 0.1 for f in FAILURES}
    maps = {name: torch.zeros(16, 16) for name in verdict_sheet.MAPS}
    found = Verdict(verdict, scores, {}, (), maps, torch.ones(32, 32))
    return Item(name, found, pictures=dict.fromkeys(verdict_sheet.PICTURES, picture))


def has_colour(picture, color):
    wanted = torch.tensor([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return bool(((picture - wanted).abs().amax(-1) < 0.01).any())


def test_items_are_judged_and_refused(items):
    assert [item.verdict and item.verdict.verdict for item in items] == ["no edit", "good", "undecided", None, None]
    assert "100" in items[3].message and "128" in items[3].message
    assert items[0].pictures["output"].dtype == torch.uint8 and set(items[2].pictures) == {"before", "output"}


@pytest.mark.slow
def test_a_black_output_is_judged_with_a_note():
    pair = draw(3, "replace", "chair", "table")
    item = Item.judged("black", pair.before, torch.zeros_like(pair.before), pair.after)
    assert item.verdict is not None and item.verdict.verdict != "good"
    assert item.notes == ("The output is all black.",)
    assert Item.judged("fine", pair.before, pair.after, pair.after).notes == ()


@pytest.mark.slow
def test_sheet_shows_each_verdict_in_its_colour_and_the_maps(items):
    picture = sheet(items, 1000)
    assert picture.shape[0] == 1 and picture.shape[2:] == (1000, 3) and picture.min() >= 0 and picture.max() <= 1
    assert has_colour(picture, COLORS["good"]) and has_colour(picture, COLORS["no edit"])
    assert not has_colour(picture[:, 100:], COLORS["overlay"])  # below the heads of the maps

    def reds(x):
        return int(((x[..., 0] > 0.6) & (x[..., 1] < 0.25) & (x[..., 2] < 0.3)).sum())

    blank = replace(
        items[0], verdict=replace(items[0].verdict, maps={k: v * 0 for k, v in items[0].verdict.maps.items()})
    )
    assert reds(sheet(items[:1], 1000)) > reds(sheet([blank], 1000)) + 500


def test_an_undecided_verdict_is_only_outlined():
    def painted(name):
        colour = torch.tensor([int(COLORS[name][k : k + 2], 16) / 255 for k in (1, 3, 5)])
        row = sheet([made_up(name)], 1000)[0, 100:]
        return int(((row - colour).abs().amax(-1) < 0.01).sum())

    assert painted("undecided") < 0.1 * painted("good")


def test_sheet_is_the_same_twice(items):
    assert torch.equal(sheet(items[:2], 800), sheet(items[:2], 800))


@pytest.mark.slow
def test_hundreds_of_items_fit_and_no_failure_is_crowded_out(monkeypatch):
    drawn = []
    monkeypatch.setattr(verdict_sheet.VerdictSheet, "draw_row", lambda self, item, top: drawn.append(item.name))
    many = [made_up("good", f"good {i}") for i in range(300)] + [made_up("no edit", f"copy {i}") for i in range(100)]
    many += [made_up("overlay", "overlay"), Item("error", None, "no file")]
    picture = sheet(many, 1600)
    assert picture.shape[1] <= verdict_sheet.HIGHEST
    assert drawn[0].startswith("copy") and "overlay" in drawn and not any(name.startswith("good") for name in drawn)
    assert len(drawn) <= verdict_sheet.MOST_ROWS
    assert sheet(many, 4096).shape[1] <= verdict_sheet.HIGHEST


def test_all_items_in_their_order_where_they_fit(monkeypatch):
    drawn = []
    monkeypatch.setattr(verdict_sheet.VerdictSheet, "draw_row", lambda self, item, top: drawn.append(item.name))
    sheet([made_up(v, v) for v in VERDICTS])
    assert drawn == list(VERDICTS)


def test_nothing_to_show_is_refused():
    with pytest.raises(ValueError, match="at least one output"):
        sheet([])


def test_table_has_a_row_per_item_and_says_what_was_not_answered(items):
    lines = table(items).splitlines()
    assert lines[0] == "**5 outputs: 1 good, 1 no edit, 1 undecided, 2 not judged**"
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 5 and "after \\| itself" in rows[1]
    assert rows[2].count("–") >= 2 and "Not answered: distorted" in rows[2]
    assert "cannot be read" in rows[4] and "not judged" in rows[4]


def test_items_are_json(items):
    values = json.loads(json.dumps([item.as_dict() for item in items], allow_nan=False))
    assert values[0]["verdict"] == "no edit" and values[0]["scores"]["no edit"] == 1.0
    assert values[2]["scores"]["distorted"] is None and values[4]["message"]


def test_heat_is_grey_at_0_and_red_at_1():
    picture = torch.rand(20, 30, 3)
    values = torch.zeros(10, 15)
    values[:, 8:] = 1.0
    laid = heat(picture, values)
    assert laid.shape == picture.shape and laid.min() >= 0 and laid.max() <= 1
    assert torch.allclose(laid[:, :10, 0], laid[:, :10, 2])
    assert bool((laid[:, -5:, 0] - laid[:, -5:, 2] > 0.4).all())


@pytest.mark.parametrize(
    "says, toward, verdict, words",
    [
        ("overlay", {"overlay": 0.8}, "overlay", ""),
        (None, {"overlay": 0.1}, "good", ""),
        (None, {}, "good", ""),
        (None, {"overlay": 0.1}, "undecided", ""),
        ("overlay", {"overlay": 0.8}, "undecided", "the training signal says overlay, the judge no failure"),
        (None, {"overlay": 0.1}, "unusable", "No term of the objective looks for an unusable output."),
        (None, {"overlay": 0.1}, "overlay", "the training signal says no failure, the judge overlay"),
        ("overlay", {"overlay": 0.8}, "good", "the training signal says overlay, the judge no failure"),
        (None, {"overlay": 0.1}, "no edit", "No term of the objective looks for a missing edit."),
        ("not a number", {}, "good", "not a number"),
    ],
)
def test_disagreement_in_words(says, toward, verdict, words):
    found = Signal(says, toward).disagreement(made_up(verdict).verdict)
    assert (words in found) if words else found == ""


def test_what_the_judge_could_not_answer_is_no_disagreement():
    verdict = Verdict("good", {**dict.fromkeys(FAILURES, 0.1), "overlay": None}, {})
    assert Signal("overlay", {"overlay": 0.8}).disagreement(verdict).endswith("the judge could not answer that.")


def test_the_signal_of_a_report_stands_beside_the_verdict(items):
    def term(kind, toward):
        return SimpleNamespace(term=SimpleNamespace(kind=kind), toward_failure=torch.tensor(toward))

    terms = [
        term("no_edit_identity", [0.9, 0.2]),
        term("no_edit_identity", [0.4, 0.3]),
        term("overlay_avoidance", [0.1, 0.8]),
    ]
    report = SimpleNamespace(signal=lambda: ["no edit", "overlay"], terms=terms)
    said = signals(report)
    assert said[0].toward == pytest.approx({"no edit": 0.9, "overlay": 0.1})
    both = with_signals(items[:2], report)
    assert both[0].disagreement == "" and "says overlay, the judge no failure" in both[1].disagreement
    assert "They disagree" in table(both) and "training signal" in table(both)
    plain, shown = sheet(items[:2], 1000), sheet(items[:2], 1000, report)
    assert plain.shape != shown.shape or not torch.equal(plain, shown)
    with pytest.raises(ValueError, match="expected 3 outputs like items, got 2"):
        sheet(items[:3], 1000, report)
