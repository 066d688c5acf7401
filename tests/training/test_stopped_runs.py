"""A full disk, and pictures that go away or change while a run trains: a sentence, what was learnt kept, and the log closed."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from PIL import Image
from small import (
    ALL,
    SmallDenoiser,
    conditioning,
    encoders,
    equal,
    parts,
    pictures,
    settings,
    trainer,
    weights,
)

from editloss_core.files import NotWritten
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.negatives import OverlaySettings
from editloss_core.pairs import find_pairs
from editloss_core.runs.checkpoint import checkpoints
from editloss_core.runs.log import RunLog
from editloss_core.training.host import Host
from editloss_core.training.own_failures import judged
from editloss_core.training.prepare import prepare
from editloss_core.training.trainer import Trainer

resource = pytest.importorskip("resource")  # not on Windows


@pytest.fixture
def limit():
    """Sets the largest size that a file may have, which is as a full disk to who writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


class At(Host):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step(self, log, total):
        if log.step == self.step:
            self.act()


def test_a_disk_that_is_full_when_a_checkpoint_is_written(tmp_path, limit):
    folder = tmp_path / "run"
    made = trainer(folder, steps=6, host=At(3, lambda: limit(15_000)))
    with pytest.raises(NotWritten) as raised:
        made.run()
    limit(resource.RLIM_INFINITY)
    assert str(raised.value) == (
        f"{folder}/checkpoints/step_000004.safetensors cannot be written: File too large\n"
        "What was learnt is kept in run/checkpoints/step_000002.safetensors."
    )
    log = RunLog.read(folder)
    assert [len(log.steps), log.events[-1].event, log.events[-1].step] == [4, "stopped", 4]
    assert "step_000004.safetensors cannot be written" in log.events[-1].notes[0]
    assert not list(folder.rglob("*.tmp"))
    again, whole = trainer(folder, steps=6), trainer(None, steps=6)
    again.resume(checkpoints(folder / "checkpoints")[-1])
    assert equal(weights(again.run().lora), weights(whole.run().lora))
    assert [step.step for step in RunLog.read(folder).steps] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_when_a_line_of_the_log_is_written(tmp_path, limit):
    folder = tmp_path / "run"
    log = folder / "log.jsonl"
    made = trainer(folder, steps=6, host=At(3, lambda: limit(log.stat().st_size + 40)))
    with pytest.raises(
        NotWritten, match=r"cannot be written: File too large\nWhat was learnt is kept in run/checkpoints"
    ):
        made.run()
    limit(resource.RLIM_INFINITY)
    lines = log.read_bytes()
    assert lines.endswith(b"}\n") and len(RunLog.read(folder).steps) == 3, "no half of a line"


def held_out(tmp_path, step, act):
    """A run on pictures in files, two pairs to train on and one that is watched; ``act`` gets the latter after a step."""
    before, after, mask = pictures(3, 64, 64)
    for part, batch in (("before", before), ("after", after), ("mask", mask)):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        for i, picture in enumerate(batch):
            Image.fromarray((255 * picture).round().byte().numpy()).save(tmp_path / "pairs" / part / f"p{i}.png")
    train, watched = find_pairs(tmp_path / "pairs", resolution=64, default_caption="x").split(1)
    codec, overlay = parts()[1], OverlaySettings(kinds=("blend",))
    made = [prepare(pairs, codec, encoders(), overlay=overlay) for pairs in (train, watched)]
    denoiser = SmallDenoiser()
    return Trainer(
        denoiser, LoRA(denoiser.module, LoRASettings(rank=4, alpha=4.0, layers="all")), made[0], conditioning(2),
        settings(steps=4, validate_every=2, preview_steps=2, previews=1, checkpoint_every=0), objective=ALL,
        encoders=encoders(), decode=parts()[0].decode, validation=made[1], validation_conditioning=conditioning(1),
        folder=tmp_path / "run", host=At(step, lambda: act(watched[0])),
    )  # fmt: skip


def repaint(pair):
    Image.new("RGB", (64, 64), "white").save(pair.after)


@pytest.mark.parametrize("act", [lambda pair: os.remove(pair.before), lambda pair: os.remove(pair.mask), repaint])
def test_held_out_pictures_are_those_that_were_there_at_the_start(tmp_path, act):
    made = held_out(tmp_path, 1, act)
    expected = made.prepared.pairs, made.validator.prepared.pairs.load(0)
    result = made.run()
    assert [v.step for v in result.log.validations] == [2, 4]
    row = result.pictures[0]
    assert torch.equal(row.before, expected[1].before) and torch.equal(row.after, expected[1].after)
    assert torch.equal(row.mask, expected[1].mask)


def test_one_that_is_gone_before_the_first_step_is_named(tmp_path):
    before, after, _ = pictures(2, 64, 64)
    with pytest.raises(ValueError, match="before/p.*png: No such file"):
        made = held_out(tmp_path, 9, None)
        (tmp_path / "pairs" / "before" / f"{made.validator.prepared.pairs[0].name}.png").unlink()
        type(made)(
            made.denoiser, made.lora, made.prepared, made.conditioning, made.settings, objective=ALL, encoders=encoders(),
            decode=made.decode, validation=made.validator.prepared, validation_conditioning=conditioning(1),
        )  # fmt: skip


def test_own_failures_of_a_pair_that_is_gone_are_not_judged(tmp_path):
    made = held_out(tmp_path, 9, None)
    pair = made.prepared.pairs[0]
    os.remove(pair.after)
    found = judged(made.prepared, 0, torch.rand(64, 64, 3), "here")
    assert found.picture is None and found.problem == (
        f"its pictures cannot be read any more (after/{pair.name}.png: No such file or directory)"
    )
