"""Checkpoints: whole or not there, everything comes back as it was, and nothing foreign or damaged is taken."""

import json
import os
import uuid

import pytest
import safetensors.torch
import torch
from small import equal
from torch import nn

from editloss_core.runs.checkpoint import SET_ASIDE, Checkpoint, CheckpointError, checkpoints, tidy
from editloss_core.training.settings import OPTIMIZERS, TrainingSettings


def parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=g)) for shape in ((64, 128), (3, 5))]  # 8-bit only from 4096 on


def trained(name, steps=3, seed=0):
    """An optimiser with a past, and its parameters."""
    if OPTIMIZERS[name]:
        pytest.importorskip(OPTIMIZERS[name])
    own = parameters(seed)
    optimiser = TrainingSettings(optimizer=name, learning_rate=0.1).make_optimizer(own)
    for i in range(steps):
        step(own, optimiser, i)
    return own, optimiser


def step(own, optimiser, i):
    g = torch.Generator().manual_seed(i)
    for p in own:
        p.grad = torch.randn(p.shape, generator=g)
    optimiser.step()


def small(step=1, **changes):
    return Checkpoint(**{"step": step, "lora": {"a": torch.arange(3.0)}, "optimizer": {"state": {}}, **changes})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimiser_state_comes_back_and_goes_on_bit_for_bit(name, tmp_path):
    own, optimiser = trained(name)
    values = {str(i): p.detach().clone() for i, p in enumerate(own)}
    found = Checkpoint.load(Checkpoint(3, values, optimiser.state_dict()).save(tmp_path))
    assert equal(found.optimizer, optimiser.state_dict()) and equal(found.lora, values)
    mine = [nn.Parameter(found.lora[str(i)]) for i in range(len(own))]
    resumed = TrainingSettings(optimizer=name, learning_rate=0.1).make_optimizer(mine)
    resumed.load_state_dict(found.optimizer)
    for i in range(3, 6):
        step(own, optimiser, i)
        step(mine, resumed, i)
    assert all(map(torch.equal, own, mine))
    assert equal(resumed.state_dict(), optimiser.state_dict())


def test_8_bits_stay_8_bits(tmp_path):
    _, optimiser = trained("adamw8bit")
    found = Checkpoint.load(Checkpoint(3, {}, optimiser.state_dict()).save(tmp_path))
    state = next(iter(found.optimizer["state"][0].values())), *found.optimizer["state"][0].values()
    nested = next(v for v in state if isinstance(v, dict))
    assert nested["state1"].dtype == torch.uint8


def test_keys_and_values_keep_their_types(tmp_path):
    odd = {
        "state": {0: {"step": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}, 17: {}, "17": {"x": 1}},
        "param_groups": [{"lr": 1e-45, "betas": (0.9, 0.999), "none": None, "flag": True, "inf": float("inf"),
                          "nan": float("nan"), "params": [0, 17], "empty": (), "text": "é"}],
        1.5: "float key",
        True: [],
    }  # fmt: skip
    saved = small(
        optimizer=odd, average={"a": torch.zeros(3)}, info={"x": {"y": [1, 2.5, None]}, "text": "größer \u2028"}
    )
    found = Checkpoint.load(saved.save(tmp_path))
    assert equal(found.optimizer, odd) and equal(found.average, saved.average) and found.info == saved.info
    assert found.step == 1 and equal(found.lora, saved.lora)


def test_equal_paths_of_different_tensors_do_not_mix(tmp_path):
    """Tensors are stored under the path of their keys, which is not always one key's alone."""
    odd = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, 0: torch.full((1,), 2.0), "0": torch.full((1,), 3.0)}
    assert equal(Checkpoint.load(small(optimizer=odd).save(tmp_path)).optimizer, odd)


def test_what_is_saved_is_a_copy_and_what_is_loaded_can_be_trained(tmp_path):
    p = torch.ones(2, 3).t()  # not contiguous
    with torch.inference_mode():
        path = small(lora={"a": p, "b": p, "under/stroke": p[0]}).save(tmp_path)
        found = Checkpoint.load(path)
    assert not found.lora["a"].is_inference() and equal(found.lora, {"a": p, "b": p, "under/stroke": p[0]})
    p.zero_()
    assert Checkpoint.load(path).lora["a"].min() == 1
    path.write_bytes(b"")  # who overwrites the file changes nothing
    assert found.lora["b"].min() == 1


def test_rotation_keeps_the_latest(tmp_path):
    folder = tmp_path / "new" / "folder"
    for step in (2, 10, 999_999, 1_000_000):
        path = small(step).save(folder, keep=3)
    (folder / "step_x.safetensors").touch()
    (folder / "my_step_000001.safetensors").touch()
    assert [Checkpoint.load(p).step for p in checkpoints(folder)] == [10, 999_999, 1_000_000]
    assert path == checkpoints(folder)[-1] and checkpoints(tmp_path / "nothing") == []
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["my_step_000001.safetensors", "step_000010.safetensors", "step_1000000.safetensors",
         "step_999999.safetensors", "step_x.safetensors"]
    )  # fmt: skip


def test_the_last_one_is_that_of_the_last_step_whatever_the_times_of_the_files(tmp_path):
    for age, number in ((1, 20), (2, 3), (0, 100)):
        os.utime(small(number).save(tmp_path), (1e9 + age, 1e9 + age))
    assert [Checkpoint.load(p).step for p in checkpoints(tmp_path)] == [3, 20, 100]


def test_without_a_number_to_keep_all_stay(tmp_path):
    for number in range(1, 6):
        small(number).save(tmp_path, keep=None)
    assert len(checkpoints(tmp_path)) == 5


def test_tidying_removes_what_was_half_written_and_sets_later_steps_aside(tmp_path):
    for number in (2, 4, 6):
        small(number).save(tmp_path)
    half = tmp_path / f".{uuid.uuid4().hex}.tmp"
    theirs = tmp_path / ".notes.tmp", tmp_path / f"{uuid.uuid4().hex}.tmp"
    for path in (half, *theirs):
        path.write_bytes(b"half")
    tidy(tmp_path, 4)
    assert [Checkpoint.load(p).step for p in checkpoints(tmp_path)] == [2, 4]
    assert not half.exists() and all(path.exists() for path in theirs)
    assert [Checkpoint.load(p).step for p in (tmp_path / SET_ASIDE).iterdir()] == [6]
    tidy(tmp_path / "nothing", 0)
    assert not (tmp_path / "nothing").exists()


def test_the_same_step_is_replaced(tmp_path):
    small(5).save(tmp_path)
    small(5, lora={"a": torch.zeros(1)}).save(tmp_path)
    assert len(checkpoints(tmp_path)) == 1 and Checkpoint.load(checkpoints(tmp_path)[0]).lora["a"].shape == (1,)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = small(5).save(tmp_path)
    before = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        small(5, lora={"a": torch.zeros(1)}).save(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        small(6).save(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.load(path)
    assert path.name in str(error.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = small(5, lora={"a": torch.arange(1000.0)}).save(tmp_path)
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "not a readable checkpoint.*resume from an earlier one")


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path):
    path = small(5, lora={"a": torch.arange(1000.0)}, info={"seed": 1234}).save(tmp_path)
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    places = [body + 10, len(whole) - 1, whole.index(b"1234"), whole.index(b"lora/a") + 5]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            Checkpoint.load(path)


@pytest.mark.parametrize("entry", ["step", "optimizer", "info"])
def test_changed_metadata_is_refused(tmp_path, entry):
    path = small(5).save(tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    for changed in ({**metadata, entry: json.dumps(7)}, {k: v for k, v in metadata.items() if k != entry}):
        safetensors.torch.save_file(tensors, path, metadata=changed)
        refused(path, "damaged")


def test_foreign_and_missing_files_are_refused(tmp_path):
    for name, metadata, message in (
        ("plain.safetensors", None, "expected a checkpoint.*got no format entry"),
        ("other.safetensors", {"format": "pt"}, "expected a checkpoint.*got pt"),
    ):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / name, metadata=metadata)
        refused(tmp_path / name, message)
    (tmp_path / "text.safetensors").write_text("no tensors here, only words")
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("text", "pickle", "folder", "nothing"):
        refused(tmp_path / f"{name}.safetensors", "not a readable checkpoint")
