"""The command ``editloss``: its help without torch, one list of exit statuses, tables in four forms, and what each program says
of bad arguments."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from editloss_core.commands.exits import DONE, FOUND, INCOMPLETE, MEANINGS, UNUSABLE
from editloss_core.commands.program import Parser
from editloss_core.commands.programs import LIMITS, OTHER_WORDS, PROGRAMS, SHARD_PAIRS, SHEET_ROWS, main
from editloss_core.commands.tables import Answer, aligned, formatted
from editloss_core.embeddings.shards import SHARD_PAIRS as SHARDS
from editloss_core.encoder_audit import audit as encoder_audit
from editloss_core.training import check_setup
from editloss_core.verdict import items as verdict_items
from editloss_core.verdict.judge import FAILURES, MEASURES, Verdict
from editloss_core.verdict.picture import MOST_ROWS

ROOT = Path(__file__).parents[2]
NAMES = [
    "diagnose",
    "audit-pairs",
    "audit-encoders",
    "report",
    "embed",
    "train",
    "convert-lora",
    "convert-encoder",
    "check",
]


@pytest.fixture
def by_grey(monkeypatch):
    """A judge that takes no time: dark outputs are not edited, others good."""

    def judge(before, output, after=None, mask=None):
        found = "no edit" if float(output.mean()) < 0.3 else "good"
        scores = {f: (0.9 if f == found else 0.1) for f in FAILURES}
        return Verdict(found, scores, dict.fromkeys(MEASURES, 0.25), (), {}, torch.ones(before.shape[:2]))

    monkeypatch.setattr(verdict_items, "judge", judge)


def grey(path, level=0.9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (round(255 * level),) * 3).save(path)


def text_of(name):
    parser = next(p for p in PROGRAMS if p.name == name).add_to(Parser(prog=f"editloss {name}"))
    return parser.format_help()


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_the_programs_are_these():
    assert [p.name for p in PROGRAMS] == NAMES


@pytest.mark.slow
def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from editloss_core.commands.programs import PROGRAMS, main\n"
        "for arguments in ([], *([p.name] for p in PROGRAMS)):\n"
        "    try: main([*arguments, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("name", NAMES)
def test_every_help_ends_with_its_exit_statuses(name):
    program = next(p for p in PROGRAMS if p.name == name)
    assert {DONE, UNUSABLE} <= set(program.exits) <= set(MEANINGS)
    told = text_of(name).partition("exit status:\n")[2]
    for status, words in program.exits.items():
        assert f"  {status}" in told and words.splitlines()[0] in told
    assert ("--format" in text_of(name)) == program.tables == (name in NAMES[:4] or name == "check")


def test_without_a_command_it_says_where_to_begin(capsys):
    assert main([]) == UNUSABLE
    said = capsys.readouterr().out
    assert (
        all(name in said for name in NAMES) and "exit status:" in said and "I do not know whether it is set up" in said
    )


def test_numbers_and_names_in_the_tree_are_those_of_the_core():
    assert (SHEET_ROWS, SHARD_PAIRS) == (MOST_ROWS, SHARDS)
    assert LIMITS == (*(failure.replace(" ", "-") for failure in FAILURES), "any")
    assert set(OTHER_WORDS.values()) <= set(LIMITS)


def test_the_audit_of_encoders_begins_as_its_node_does():
    """The node's own first values are held to the core's by tests/test_widget_defaults.py."""
    program = next(p for p in PROGRAMS if p.name == "audit-encoders")
    given = vars(program.add_to(Parser()).parse_args(["PAIRS", "--encoder", "x"]))
    defaults = encoder_audit.audit_encoders.__kwdefaults__
    assert all(given[setting] == defaults[setting] for setting in ("layers", "max_pairs", "crop", "batch_size"))


# --- forms of a table -------------------------------------------------------------------------------------------------

ANSWER = Answer(
    "two", [{"name": "ä", "n": 1.5}, {"name": "b,c", "n": None}], {"n": 2, "rate": float("nan")}, {"more": [1]}
)


def test_one_answer_in_four_forms():
    assert formatted(ANSWER, "text", "x", 1) == "two"
    assert list(csv.DictReader(io.StringIO(formatted(ANSWER, "csv", "x", 1)))) == [{"name": "ä", "n": "1.5"}, {"name": "b,c", "n": ""}]  # fmt: skip
    line = formatted(ANSWER, "line", "x", 1)
    assert "\n" not in line and json.loads(line) == {"command": "x", "exit": 1, "n": 2, "rate": None}
    assert json.loads(formatted(ANSWER, "json", "x", 1)) == {
        "command": "x",
        "exit": 1,
        "n": 2,
        "rate": None,
        "more": [1],
    }
    assert formatted(Answer("", (), {}, {}, ("a", "b")), "csv", "x", 0) == "a,b"
    assert aligned([("a", "bb"), ("ccc", "")]) == "a    bb\nccc"


# --- diagnose ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(tmp_path):
    """Two pairs at three steps: none, half and all are edited."""
    for pair in ("a", "b"):
        grey(tmp_path / f"control/{pair}.png")
        grey(tmp_path / f"target/{pair}.png")
        for step, dark in ((250, "ab"), (500, "a"), (750, "")):
            grey(tmp_path / f"samples/{pair}_{step:09d}.png", 0.1 if pair in dark else 0.9)
    return tmp_path


def test_rates_over_steps_and_the_last_step_alone(sampled, by_grey, capsys):
    assert main(["diagnose", str(sampled), "--workers", "1"]) == DONE
    said = capsys.readouterr().out
    assert "step 250  2 of 2" in said and "step 500  1 of 2" in said and "step 750  0 of 2" in said
    assert not (sampled / "verdicts.csv").exists()
    assert main(["diagnose", str(sampled), "--step", "last", "--format", "line", "--fail-above", "any=0"]) == DONE
    line = json.loads(capsys.readouterr().out)
    assert (line["step"], line["outputs"], line["rates"]["any"], line["exceeded"]) == (750, 2, 0.0, [])
    assert (
        main(["diagnose", str(sampled), "--step", "250", "--format", "line", "--fail-above", "no-change=0.5"]) == FOUND
    )
    line = json.loads(capsys.readouterr().out)
    assert (line["exit"], line["exceeded"]) == (FOUND, ["no edit"])
    assert main(["diagnose", str(sampled), "--step", "9"]) == UNUSABLE
    assert "--step: expected one of 250, 500, 750, got 9" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(sampled), "--step", "soon", "--format", "line"])
    said = capsys.readouterr()
    assert (
        ended.value.code == json.loads(said.out)["exit"] == UNUSABLE
        and "argument --step" in json.loads(said.out)["error"]
    )


def test_csv_has_pair_and_step(sampled, by_grey, capsys):
    assert main(["diagnose", str(sampled), "--format", "csv"]) == DONE
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["pair"], row["step"], row["verdict"]) for row in rows[:3]] == [("a", "250", "no edit"), ("b", "250", "no edit"), ("a", "500", "no edit")]  # fmt: skip


def test_a_limit_does_not_swallow_the_folder(sampled, by_grey, capsys):
    assert main(["diagnose", "--fail-above", "overlay=0.1", "no-edit=1", str(sampled)]) == DONE
    assert main(["diagnose", "--fail-above", "ghost=0.1", "--", str(sampled)]) == DONE
    assert "10%: kept" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_to_is_a_sentence_and_3(sampled, by_grey, capsys):
    (sampled / "file").write_text("x")
    for out in ("file", "file/below"):
        assert main(["diagnose", str(sampled), "--out", str(sampled / out), "--format", "line"]) == INCOMPLETE
        said = capsys.readouterr()
        assert (
            f"--out: expected a folder to write to; {sampled / out} cannot be written: {sampled / 'file'} is a file"
            in said.err
        )
        assert json.loads(said.out)["exit"] == INCOMPLETE and "Errno" not in said.err


def test_a_picture_as_folder_is_told_how_to_name_it(sampled, capsys):
    assert main(["diagnose", str(sampled / "control/a.png")]) == UNUSABLE
    assert "single pictures are named one by one: --before A --output B" in capsys.readouterr().err
    assert main(["diagnose", str(sampled), "--maps"]) == UNUSABLE
    assert "--maps: expected --out DIR" in capsys.readouterr().err


# --- audits, check and the others -------------------------------------------------------------------------------------


def room(path, seed, edited):
    g = torch.Generator().manual_seed(seed)
    picture = torch.rand(3, 12, 12, generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2) * 0.6 + 0.2
    picture[:, 36:60, 36:60] = torch.tensor([0.1, 0.2, 0.9] if edited else [0.9, 0.1, 0.1])[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(path)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms")
    for i in range(3):
        room(folder / f"before/{i}.png", i, False)
        room(folder / f"after/{i}.png", i, True)
        (folder / f"after/{i}.txt").write_text("make it blue")
    return folder


@pytest.mark.slow
def test_audit_of_pairs_says_what_the_node_says(rooms, tmp_path, capsys):
    assert main(["audit-pairs", str(rooms), "--out", str(tmp_path / "out")]) == DONE
    assert "# Pair audit: 3 pairs: nothing found" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pairs.json", "pairs.md", "pairs.png"]
    broken = tmp_path / "broken"
    for part in ("before", "after"):
        for i in range(3):
            (broken / part).mkdir(parents=True, exist_ok=True)
            (broken / part / f"{i}.png").write_bytes((rooms / part / f"{i}.png").read_bytes())
    (broken / "after/2.png").write_bytes((rooms / "before/2.png").read_bytes())
    assert main(["audit-pairs", str(broken), "--default-caption", "make it blue", "--format", "line"]) == FOUND
    line = json.loads(capsys.readouterr().out)
    assert (line["exit"], line["ok"], line["pairs"]) == (FOUND, False, 3) and line["kinds"] == {"no edit": 1}
    assert main(["audit-pairs", str(tmp_path / "nowhere")]) == UNUSABLE


@pytest.mark.slow
def test_audit_of_encoders_prints_a_row_per_encoder_layer_and_failure(rooms, capsys):
    spec = "timm:test_vit,random_seed=0,output=grid"
    assert (
        main(["audit-encoders", str(rooms), "--encoder", spec, "--no-layers", "--crop", "96", "--format", "csv"])
        == FOUND
    )
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {(row["encoder"], row["failure"]) for row in rows} >= {("timm/test_vit/grid", f) for f in FAILURES[:3]}
    with pytest.raises(SystemExit) as ended:
        main(["audit-encoders", str(rooms), "--encoder", spec, "--encoder", spec])
    assert ended.value.code == UNUSABLE and "expected each once" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["embed", str(rooms), "--encoder", "clip:x", "--out", str(rooms / "out")])
    assert (
        ended.value.code == UNUSABLE
        and "argument --encoder: expected a kind of timm, openclip" in capsys.readouterr().err
    )


def test_check_names_what_is_missing_and_how_to_get_it(monkeypatch, capsys):
    assert main(["check", "--format", "line"]) == DONE
    assert set(json.loads(capsys.readouterr().out)["works"].values()) == {"yes"}
    there = check_setup.find_spec
    monkeypatch.setattr(
        check_setup, "find_spec", lambda name: None if name in ("jinja2", "peft", "timm") else there(name)
    )
    assert main(["check"]) == FOUND
    said = capsys.readouterr().out
    assert 'pip install -e ".[encoders,reports,train]"' in said and "What next:" in said
    lines = {
        line.split()[0]: line.split(maxsplit=1)[1]
        for line in said.splitlines()
        if line.split()[:1] and line.split()[0] in NAMES
    }
    assert lines["report"] == "no       jinja2" and lines["train"] == "no       peft" and lines["diagnose"] == "yes"
    assert lines["embed"] == "in part  timm for its encoders"


@pytest.mark.slow
def test_check_of_a_config_is_that_of_train(tmp_path, capsys):
    config = tmp_path / "edit.toml"
    config.write_text((ROOT / "configs/one_24gb.toml").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["check", str(config), "--format", "line"]) == main(["train", str(config), "--check"]) == UNUSABLE
    line, _, _ = capsys.readouterr().out.partition("\n")
    assert "pairs.folder" in json.loads(line)["problems"]
