"""The log: what is written comes back, also after an end in the middle of a line, and its means are means."""

import json
import math
import random

import pytest

from editloss_core.runs.log import LOG_FILE, RunLog, Sample, StepLog, TermSample, ValidationLog


def step(number, *samples, loss=0.5):
    return StepLog(number, loss, 1.25, 1e-4, list(samples), 0.1)


def sample(t, pair="stool é", **terms):
    return Sample(pair, t, {name: TermSample(*values) for name, values in terms.items()})


def some_log(folder=None, steps=5):
    log = RunLog(folder)
    log.rewrite()
    for i in range(1, steps + 1):
        log.add(step(i, sample(i / 7, velocity=(1 / i, 2 / i, None, None), hinge=(0.1 * i, 0.2, 1.0, 3e-9))))
        if i % 2 == 0:
            log.add(
                ValidationLog(i, 1 / 3, 0.4, {"hinge": 0.1}, {"hinge": 0.2}, {"0.1": (0.5, 0.25), "0.9": (1.0, 2.0)})
            )
    return log


def test_round_trip(tmp_path):
    log = some_log(tmp_path)
    found = RunLog.read(tmp_path)
    assert found.steps == log.steps and found.validations == log.validations
    lines = (tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["step", "step", "validation"] * 2 + ["step"]


def test_a_line_per_entry_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path)
    for i in range(1, 4):
        log.add(step(i))
        assert len((tmp_path / LOG_FILE).read_text().splitlines()) == i


def test_without_a_folder_everything_stays_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = some_log()
    assert len(log.steps) == 5 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [1, 10, -2, -1])
def test_a_line_that_was_cut_off_is_left_out(tmp_path, kept):
    log = some_log(tmp_path, 3)
    path = tmp_path / LOG_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: kept if kept > 0 else len(lines[-1]) - 1 + kept])
    found = RunLog.read(tmp_path)
    assert found.steps == log.steps[:2] and found.validations == log.validations
    found.rewrite()
    found.add(log.steps[2])
    assert RunLog.read(tmp_path).steps == log.steps


def test_lines_of_others_are_passed_over(tmp_path):
    log = some_log(tmp_path, 2)
    with open(tmp_path / LOG_FILE, "ab") as file:
        file.write(
            b'3\n[]\nnull\n{"kind": "step"}\n{"kind": "other", "step": 1}\n{}\n\n{"kind": "step", "samples": 3}\n'
        )
        file.write(b"\xff\xfe\x00 rubbish of a damaged disk\n")
    assert RunLog.read(tmp_path).steps == log.steps


def test_reading_ends_at_the_last_step(tmp_path):
    some_log(tmp_path)
    found = RunLog.read(tmp_path, 3)
    assert [s.step for s in found.steps] == [1, 2, 3] and [v.step for v in found.validations] == [2]
    found.rewrite()
    assert [s.step for s in RunLog.read(tmp_path).steps] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == [LOG_FILE]  # nothing temporary stays
    assert RunLog.read(tmp_path / "nothing").steps == []


def test_rewriting_keeps_validations_after_their_step(tmp_path):
    some_log(tmp_path).rewrite()
    entries = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [(e["step"], e["kind"]) for e in entries] == [
        (1, "step"), (2, "step"), (2, "validation"), (3, "step"), (4, "step"), (4, "validation"), (5, "step")
    ]  # fmt: skip


def test_numbers_that_are_not_finite_leave_readable_json(tmp_path):
    log = RunLog(tmp_path)
    log.add(step(1, sample(0.5, watched=(math.nan, 0.0, math.nan, math.inf))))
    assert "NaN" not in (tmp_path / LOG_FILE).read_text()
    found = RunLog.read(tmp_path).steps[0].samples[0].terms["watched"]
    assert found == TermSample(None, 0.0, None, None)


def test_means_do_not_depend_on_whether_the_log_was_read_back(tmp_path):
    """A value that is not finite is no value, in memory as on disk."""
    log = RunLog(tmp_path)
    log.add(
        step(1, sample(0.5, watched=(2.0, 0.0, 1.0, 1.0)), sample(0.5, watched=(math.nan, 0.0, math.nan, math.inf)))
    )
    found = RunLog.read(tmp_path)
    assert log.loss_map() == found.loss_map() == {"loss": [0.5], "watched": [2.0]}
    assert log.by_noise_level(1) == found.by_noise_level(1)


def test_the_loss_map_has_a_value_per_step():
    log = RunLog()
    log.add(step(1, sample(0.1, velocity=(1.0, 1.0)), sample(0.2, velocity=(3.0, 3.0)), loss=4.0))
    log.add(step(2, sample(0.1, velocity=(5.0, 1.0), hinge=(0.5, 9.0)), sample(0.2, velocity=(5.0, 1.0)), loss=3.0))
    log.add(step(3, sample(0.3, velocity=(7.0, 1.0)), loss=2.0))
    assert log.terms == ["velocity", "hinge"]
    assert log.loss_map() == {"loss": [4.0, 3.0, 2.0], "velocity": [2.0, 5.0, 7.0], "hinge": [0.5, 0.5, 0.5]}


def test_the_loss_map_has_no_column_for_a_term_without_any_value():
    log = RunLog()
    log.add(step(1, sample(0.1, velocity=(1.0, 1.0), watched=(math.nan, 0.0))))
    assert log.loss_map() == {"loss": [0.5], "velocity": [1.0]}


@pytest.mark.parametrize("buckets, last", [(5, None), (3, 4), (1, 1), (4, 0), (5, 1000)])
def test_means_by_noise_level_equal_a_calculation_by_hand(buckets, last):
    rng, log = random.Random(0), RunLog()
    levels = [0.0, 1.0, 0.2, 0.4, 0.6, 0.8, 0.25, 0.5] + [rng.random() for _ in range(32)]
    for i in range(10):
        rows = []
        for t in levels[4 * i : 4 * i + 4]:
            gradient = rng.random() if i % 3 == 0 else None
            terms = {"velocity": (rng.random(), rng.random(), None, gradient)}
            if i % 2:
                terms["hinge"] = (rng.random(), rng.random(), float(rng.random() > 0.5), gradient)
            rows.append(sample(t, **terms))
        log.add(step(i + 1, *rows))
    found = log.by_noise_level(buckets, last)
    used = log.steps if last is None else log.steps[max(0, len(log.steps) - last) :]
    samples = [s for entry in used for s in entry.samples]
    assert [b["t"] for b in found] == [(k / buckets, (k + 1) / buckets) for k in range(buckets)]
    assert sum(b["samples"] for b in found) == len(samples)

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    for k, bucket in enumerate(found):
        inside = [s for s in samples if min(int(s.t * buckets + 1e-12), buckets - 1) == k]
        assert bucket["samples"] == len(inside)
        assert set(bucket["terms"]) == {name for s in inside for name in s.terms}
        norms = {}
        for name, values in bucket["terms"].items():
            rows = [s.terms[name] for s in inside if name in s.terms]
            for key, field in (("raw", "raw"), ("weighted", "weighted"), ("active", "open"), ("gradient", "gradient")):
                assert values[key] == pytest.approx(mean([getattr(r, field) for r in rows])), (name, key)
            norms[name] = mean([r.gradient for r in rows])
        known = [v["share"] for v in bucket["terms"].values() if v["share"] is not None]
        assert not known or sum(known) == pytest.approx(1.0)
        whole = sum(v for v in norms.values() if v is not None)
        for name, values in bucket["terms"].items():
            assert values["share"] == (None if norms[name] is None else pytest.approx(norms[name] / whole))
