"""The record of the experiment: what is kept of a run is what its report is made from."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "efficacy"


@pytest.fixture(scope="module")
def record():
    return runpy.run_path(str(FOLDER / "record.py"))


def run(seed=0, base="abc", verdicts=("good", "overlay", "no edit", "distorted", "collateral")):
    return {
        "arm": "recipe", "data": "right", "variants": 8, "steps": 250, "seed": seed, "rooms": len(verdicts), "trained": 250,
        "base": base, "processor": "one", "seconds": 12.3456, "curve": [[62, 3.14159, 0.25], [250, 12.3456, 0.2]],
        "verdicts": [{"verdict": v, "progress": 0.5} for v in verdicts], "notes": ["left out"],
    }  # fmt: skip


def test_a_record_gives_back_what_the_report_reads(record, tmp_path):
    path = tmp_path / "runs.jsonl"
    record["save"](path, [run(1), run(0)])
    first, second = record["load"](path, "abc")
    assert (first["seed"], second["seed"]) == (0, 1)
    assert [v["verdict"] for v in first["verdicts"]] == ["good", "overlay", "no edit", "distorted", "collateral"]
    assert first["seconds"] == 12.35 and first["curve"] == [[62, 3.14, 0.25], [250, 12.35, 0.2]]
    assert "notes" not in first
    record["save"](tmp_path / "again.jsonl", [first, second])
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_runs_on_another_model_are_not_of_this_experiment(record, tmp_path):
    record["save"](tmp_path / "runs.jsonl", [run(0), run(1, base="other")])
    assert [r["seed"] for r in record["load"](tmp_path / "runs.jsonl", "abc")] == [0]
    assert record["load"](tmp_path / "none.jsonl", "abc") == []


def test_the_digest_is_of_the_weights(record, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = record["digest"](tmp_path)
    (tmp_path / "note.txt").write_text("no weights")
    assert record["digest"](tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert record["digest"](tmp_path) != before


def test_the_committed_record_is_of_the_model_that_ships(record):
    root = FOLDER.parents[1]
    base = record["digest"](root / "editloss_core" / "demo" / "weights")
    path = root / "benchmarks" / "results" / "efficacy_runs.jsonl"
    runs = record["load"](path, base)
    assert len(runs) == len(path.read_text().splitlines()) > 0
    assert all(len(r["verdicts"]) == r["rooms"] == 64 for r in runs)
    names = [(r["arm"], r["data"], r["variants"], r["steps"], r["seed"]) for r in runs]
    assert len(names) == len(set(names))


def test_signs_are_held_to_as_many_tests_as_there_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "arms", runpy)  # the report's texts are not asked here
    report = runpy.run_path(str(FOLDER / "report.py"))
    assert report["sign_test"](5, 5) == 1.0
    assert report["sign_test"](10, 0) == pytest.approx(2 / 1024)
    held = report["holm"]({"a": 0.01, "b": 0.04, "c": 0.03})
    assert held == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
