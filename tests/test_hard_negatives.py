"""The buffer of hard negatives: bounds, draws, files that do not belong there, and several processes at once."""

import ast
import logging
import math
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editloss_core import hard_negatives
from editloss_core.hard_negatives import HardNegativeBuffer, dequantize_image, image_key, quantize_image

ROOT = Path(__file__).resolve().parents[1]


def number(n):
    return torch.tensor([float(n)])


def values(buffer, key):
    """What is stored under a key, the oldest first."""
    return [load_file(e.path)["negative"].item() for e in buffer.entries(key)]


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith("."))


# --- storing and drawing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_any_tensor_comes_back_as_it_was(tmp_path, dtype, shape):
    tensor = (torch.rand(shape) * 200).to(dtype)
    buffer = HardNegativeBuffer(tmp_path)
    path = buffer.store("a", tensor)
    assert path.parent == tmp_path and path.exists()
    drawn = HardNegativeBuffer(tmp_path).draw("a", 2)
    assert drawn.dtype == dtype and torch.equal(drawn, torch.stack([tensor, tensor]))


def test_description_travels_with_the_tensor(tmp_path):
    start = time.time()
    HardNegativeBuffer(tmp_path).store("a pair", torch.zeros(2, 3), score=0.75, note="Ü → overlay", step=1200)
    HardNegativeBuffer(tmp_path).store("a pair", torch.ones(2, 3))
    first, second = HardNegativeBuffer(tmp_path).entries("a pair")
    assert (first.key, first.score, first.note, first.step) == ("a pair", 0.75, "Ü → overlay", 1200)
    assert first.shape == (2, 3) and first.dtype == "float32" and start - 1 <= first.time <= time.time() + 1
    assert math.isnan(second.score) and second.step is None and second.note == ""
    assert second.sequence > first.sequence


def test_views_gradients_and_inference_tensors_are_stored_as_values(tmp_path):
    buffer = HardNegativeBuffer(tmp_path)
    base = torch.arange(10000.0).requires_grad_()
    path = buffer.store("view", base[3:5])
    assert torch.equal(buffer.draw("view"), torch.tensor([[3.0, 4.0]])) and path.stat().st_size < 2000
    with torch.inference_mode():
        buffer.store("t", torch.arange(6).view(2, 3).t())
    assert torch.equal(buffer.draw("t")[0], torch.arange(6).view(2, 3).t())


def test_draws_are_distinct_then_repeat_evenly_and_follow_the_seed(tmp_path):
    buffer = HardNegativeBuffer(tmp_path)
    for n in range(6):
        buffer.store("a", number(n))
    for seed in range(5):
        assert len(set(buffer.draw("a", 6, seed).flatten().tolist())) == 6
        assert len(set(buffer.draw("a", 4, seed).flatten().tolist())) == 4
        thirteen = buffer.draw("a", 13, seed).flatten().tolist()
        assert sorted(thirteen.count(n) for n in range(6)) == [2, 2, 2, 2, 2, 3]
        assert torch.equal(buffer.draw("a", 6, seed), HardNegativeBuffer(tmp_path).draw("a", 6, seed))
    assert len({tuple(buffer.draw("a", 6, s).flatten().tolist()) for s in range(12)}) > 6
    assert set(torch.cat([buffer.draw("a", 1, s) for s in range(60)]).flatten().tolist()) == set(range(6))


def test_the_same_content_elsewhere_gives_the_same_draw(tmp_path):
    buffers = [HardNegativeBuffer(tmp_path / name) for name in "xy"]
    for buffer in buffers:
        for n in range(5):
            buffer.store("a", number(n), note=str(random.random()))
    assert torch.equal(buffers[0].draw("a", 5, 3), buffers[1].draw("a", 5, 3))


def test_drawing_leaves_the_global_random_state_alone(tmp_path):
    buffer = HardNegativeBuffer(tmp_path)
    buffer.store("a", number(0))
    state = torch.get_rng_state()
    buffer.draw("a", 3)
    assert torch.equal(state, torch.get_rng_state())


def test_keys_length_and_clear(tmp_path):
    buffer = HardNegativeBuffer(tmp_path / "deep" / "folder")
    assert len(buffer) == 0 and buffer.keys() == [] and buffer.entries("a") == []
    for n, key in enumerate(("b", "a", "b")):
        buffer.store(key, number(n))
    assert len(buffer) == 3 and buffer.keys() == ["a", "b"]
    assert buffer.clear("b") == 2 and buffer.keys() == ["a"] and buffer.clear("b") == 0
    assert buffer.clear() == 1 and len(buffer) == 0 and files(buffer.folder) == []


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_oldest_goes_first_under_its_key_then_over_all(tmp_path):
    buffer = HardNegativeBuffer(tmp_path, capacity=5, per_key=3)
    for n in range(5):
        buffer.store("a", number(n), score=-n)  # later ones have lower scores and stay
    assert values(buffer, "a") == [2, 3, 4] and len(buffer) == 3
    for n in range(3):
        buffer.store("b", number(n))
    assert values(buffer, "a") == [3, 4] and values(buffer, "b") == [0, 1, 2]
    buffer.store("b", number(3))  # its own key makes room, the others keep theirs
    assert values(buffer, "a") == [3, 4] and values(buffer, "b") == [1, 2, 3]
    buffer.store("c", number(0))
    assert values(buffer, "a") == [4] and len(files(tmp_path)) == 5


def test_the_same_tensor_again_becomes_the_youngest_and_no_second_entry(tmp_path):
    buffer = HardNegativeBuffer(tmp_path, capacity=4, per_key=3)
    for n in range(3):
        buffer.store("a", number(n), score=n, note="first")
    path = HardNegativeBuffer(tmp_path, capacity=4, per_key=3).store("a", number(0), score=7, note="again", step=2)
    assert values(buffer, "a") == [1, 2, 0] and len(buffer) == 3 == len(files(tmp_path))  # full, and none had to go
    entry = buffer.entries("a")[-1]
    assert (entry.path, entry.score, entry.note, entry.step) == (path, 7, "again", 2)
    buffer.store("b", number(0))  # another key has its own
    assert values(buffer, "a") == [1, 2, 0] and values(buffer, "b") == [0] and len(buffer) == 4
    buffer.store("a", number(3))
    assert values(buffer, "a") == [2, 0, 3]
    buffer.store("a", number(2))
    buffer.store("b", number(1))  # over all keys, the refreshed one is not the oldest either
    assert values(buffer, "a") == [3, 2] and values(buffer, "b") == [0, 1]
    assert len({e.sequence for e in buffer.entries()}) == 4


def test_the_same_bytes_in_another_shape_dtype_or_space_are_not_the_same(tmp_path):
    contents = set()
    for n, tensor in enumerate((torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32))):
        buffer = HardNegativeBuffer(tmp_path, space=f"space {n}")
        buffer.store("a", tensor)
        buffer.store("a", tensor.clone())
        assert len(buffer) == 1
        contents.add(buffer.entries()[0].content)
    assert len(contents) == 3 == len(files(tmp_path))


def test_an_entry_without_a_content_hash_is_still_read(tmp_path):
    path = HardNegativeBuffer(tmp_path).store("a", number(1))
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "content"}
    save_file({"negative": number(1)}, path, metadata=metadata)
    buffer = HardNegativeBuffer(tmp_path)
    assert values(buffer, "a") == [1] and buffer.entries()[0].content == ""
    buffer.store("a", number(2))
    assert values(buffer, "a") == [1, 2]


def test_a_smaller_capacity_takes_effect_with_the_next_entry(tmp_path):
    for n in range(10):
        HardNegativeBuffer(tmp_path).store(str(n), number(n))
    buffer = HardNegativeBuffer(tmp_path, capacity=4)
    assert len(buffer) == 10
    buffer.store("new", number(0))
    assert buffer.keys() == ["7", "8", "9", "new"]


def test_spaces_share_a_folder_without_mixing(tmp_path):
    images = HardNegativeBuffer(tmp_path, capacity=2)
    clip = HardNegativeBuffer(tmp_path, capacity=2, space="open_clip/ViT-B-32/sha256:12")
    for n in range(3):
        images.store("a", number(n))
        clip.store("a", torch.tensor([n, n]))
    assert values(images, "a") == [1, 2] and len(clip) == 2 and len(files(tmp_path)) == 4
    assert clip.draw("a").shape == (1, 2)
    assert images.clear() == 2 and len(clip) == 2


def test_numbers_go_on_after_everything_but_the_youngest_is_gone(tmp_path):
    buffer = HardNegativeBuffer(tmp_path, capacity=1)
    numbers = []
    for n in range(4):
        buffer.store("a", number(n))
        numbers.append(buffer.entries()[0].sequence)
    assert numbers == sorted(set(numbers))


# --- files that do not belong there ----------------------------------------------------------------------------------


def test_corrupt_and_foreign_files_are_skipped_named_once_and_kept(tmp_path, caplog, capsys):
    buffer = HardNegativeBuffer(tmp_path, capacity=3, per_key=3)
    paths = [buffer.store("a", number(n)) for n in range(3)]
    paths[0].write_bytes(paths[0].read_bytes()[:-2])  # truncated
    paths[1].write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(1))
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to("/nowhere")
    save_file({"lora": torch.zeros(2)}, tmp_path / "lora.safetensors", metadata={"format": "pt"})
    save_file({"negative": torch.zeros(1)}, tmp_path / "bare.safetensors")
    save_file({"negative": torch.zeros(1)}, tmp_path / "half.safetensors", metadata={"format": hard_negatives.FORMAT})
    before = files(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert values(buffer, "a") == [2]
        assert buffer.draw("a", 2).flatten().tolist() == [2, 2]
        assert len(buffer) == 1 and buffer.keys() == ["a"]
    skipped = [r.getMessage() for r in caplog.records]
    assert len(skipped) == 10 and all(r.levelname == "WARNING" for r in caplog.records)
    for name in ("noise.safetensors", "lora.safetensors", "notes.txt", paths[0].name):
        assert sum(repr(name) in message for message in skipped) == 1
    for n in range(10, 14):  # they neither count nor are in the way
        buffer.store("a", number(n))
    assert values(buffer, "a") == [11, 12, 13]
    buffer.clear()
    assert files(tmp_path) == sorted(set(before) - {paths[2].name})
    assert capsys.readouterr().out == ""


def test_a_file_that_breaks_after_it_was_listed_is_passed_over(tmp_path, monkeypatch, caplog):
    buffer = HardNegativeBuffer(tmp_path)
    paths = [buffer.store("a", number(n)) for n in range(4)]
    load = hard_negatives.safetensors.torch.load
    broken = paths[1].read_bytes()
    paths[2].write_bytes(paths[2].read_bytes())

    def fail(data):
        if data == broken:
            raise ValueError("bad sector")
        return load(data)

    monkeypatch.setattr(hard_negatives.safetensors.torch, "load", fail)
    assert sorted(buffer.draw("a", 3).flatten().tolist()) == [0, 2, 3]
    assert paths[1].exists() and "bad sector" in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "../../x",
        "/etc/passwd",
        "a/b\\c",
        "..",
        "CON",
        "x" * 100_000,
        "ключ 🦊\n\t",
        "nul\0byte",
        "\ud800 lone",
        "%2e%2e",
    ],
)
def test_hostile_keys_stay_inside_the_folder(tmp_path, key):
    folder = tmp_path / "inner" / "folder"
    buffer = HardNegativeBuffer(folder)
    path = buffer.store(key, number(1), note=key)
    assert path.resolve().parent == folder.resolve() and len(path.name) < 120 and path.name.isascii()
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder] == []
    again = HardNegativeBuffer(folder)
    assert again.draw(key).item() == 1 and len(again.entries(key)) == 1 and again.clear(key) == 1


def test_nothing_unpickles():
    tree = ast.parse(Path(hard_negatives.__file__).read_text("utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert "pickle" not in imported and not calls & {"torch.load", "torch.save", "print", "eval", "exec"}


# --- several processes -----------------------------------------------------------------------------------------------

PROLOGUE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from editloss_core.hard_negatives import HardNegativeBuffer
folder, name = sys.argv[1:3]
"""

WRITE_AND_READ = (
    PROLOGUE
    + """
buffer = HardNegativeBuffer(folder, capacity=24, per_key=8)
for n in range(100):
    buffer.store(f"pair {n % 5}", torch.full((64,), float(n)), note=name)
    drawn = buffer.draw(f"pair {n % 5}", 3, seed=n)
    assert drawn.shape == (3, 64) and bool((drawn == drawn[:, :1]).all())
    assert len(buffer) <= 24
"""
)

WRITE_FOR_EVER = (
    PROLOGUE
    + """
buffer = HardNegativeBuffer(folder, capacity=8, per_key=8)
print("ready", flush=True)
n = 0
while True:
    n += 1
    buffer.store("a", torch.full((1_000_000,), float(n)))
"""
)


def start(program, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stderr=subprocess.PIPE, **options)


@pytest.mark.slow
def test_two_processes_write_and_read_at_once(tmp_path):
    processes = [start(WRITE_AND_READ, tmp_path, name) for name in ("one", "two")]
    most = 0
    while any(p.poll() is None for p in processes):  # seen from outside, without the lock
        most = max(most, len([f for f in files(tmp_path) if f.endswith(".safetensors")]))
        time.sleep(0.005)
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert 20 <= most <= 24 + 1  # a listing that overlaps an eviction may name a file of either side
    buffer = HardNegativeBuffer(tmp_path, capacity=24, per_key=8)
    entries = buffer.entries()
    assert len(entries) == 24 == len(files(tmp_path))
    assert len({e.sequence for e in entries}) == 24 and max(e.sequence for e in entries) == 200  # none was lost
    assert {e.note for e in entries} <= {"one", "two"}
    for entry in entries:
        assert load_file(entry.path)["negative"].shape == (64,)


STOP_IN_THE_MIDDLE = (
    PROLOGUE
    + """
import os, pathlib

def half(self, data):
    with open(self, "wb") as file:
        file.write(data[: len(data) // 2])
    stop()

def stop(*_):
    print("ready", flush=True)
    time.sleep(60)

if name == "half written":
    pathlib.Path.write_bytes = half
else:
    os.replace = stop
HardNegativeBuffer(folder, capacity=3).store("a", torch.tensor([9.0]))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half written", "not yet replaced"])
def test_a_writer_killed_while_it_refreshes_an_entry_loses_none(tmp_path, moment):
    buffer = HardNegativeBuffer(tmp_path, capacity=3, lock_timeout=10)
    for n in (9, 1, 2):
        buffer.store("a", number(n))
    process = start(STOP_IN_THE_MIDDLE, tmp_path, moment, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert values(buffer, "a") == [9, 1, 2]
    buffer.store("a", number(9))
    assert values(buffer, "a") == [1, 2, 9]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half written", "not yet replaced"])
def test_a_writer_killed_at_its_worst_moment(tmp_path, moment):
    buffer = HardNegativeBuffer(tmp_path, capacity=3, lock_timeout=10)
    for n in range(3):
        buffer.store("a", number(n))
    process = start(STOP_IN_THE_MIDDLE, tmp_path, moment, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert len(list(tmp_path.glob(".editloss-negatives-*.tmp"))) == 1
    assert values(buffer, "a") == ([0, 1, 2] if moment == "half written" else [1, 2])
    assert len(files(tmp_path)) == len(buffer)
    buffer.store("a", number(5))
    assert values(buffer, "a") == [1, 2, 5]
    assert list(tmp_path.glob(".editloss-negatives-*.tmp")) == []  # what the dead left is swept


@pytest.mark.slow
def test_a_writer_killed_at_any_moment(tmp_path):
    process = start(WRITE_FOR_EVER, tmp_path, "victim", stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    buffer = HardNegativeBuffer(tmp_path, capacity=8, per_key=8, lock_timeout=10)
    entries = buffer.entries("a")
    assert 1 <= len(entries) <= 8 and len(files(tmp_path)) == len(entries)
    for entry in entries:
        assert load_file(entry.path)["negative"].numel() == 1_000_000
    buffer.store("a", torch.zeros(1_000_000))
    assert buffer.draw("a", 2).shape == (2, 1_000_000)


def test_a_full_disk_costs_no_entry(tmp_path, monkeypatch):
    buffer = HardNegativeBuffer(tmp_path, capacity=2)
    for n in range(2):
        buffer.store("a", number(n))
    listed = files(tmp_path)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        buffer.store("a", number(2))
    assert files(tmp_path) == listed and values(buffer, "a") == [0, 1]
    assert list(tmp_path.glob(".editloss-negatives-*.tmp")) == []


def test_a_lock_that_is_held_ends_in_a_timeout(tmp_path):
    buffer = HardNegativeBuffer(tmp_path, lock_timeout=0.05)
    with FileLock(str(tmp_path / hard_negatives.LOCK_NAME)), pytest.raises(TimeoutError):
        buffer.store("a", number(0))
    buffer.store("a", number(0))


def test_a_buffer_can_be_sent_to_a_worker(tmp_path):
    buffer = HardNegativeBuffer(tmp_path, capacity=3, per_key=2, space="s", lock_timeout=7)
    buffer.store("a", number(4))
    copy = pickle.loads(pickle.dumps(buffer))
    assert (copy.capacity, copy.per_key, copy.space, copy.folder) == (3, 2, "s", tmp_path)
    assert copy.draw("a").item() == 4 and repr(copy) == repr(buffer)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_quantized_pictures_come_back_within_half_a_step():
    image = torch.rand(5, 7, 3)
    assert (dequantize_image(quantize_image(image)) - image).abs().max() <= 0.5 / 255 + 1e-6
    steps = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize_image(dequantize_image(steps)), steps)
    assert quantize_image(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]


@pytest.mark.parametrize("rounding", ["cut off", "rounded"])
def test_image_key_agrees_with_a_png(tmp_path, rounding):
    numpy = pytest.importorskip("numpy")
    image_module = pytest.importorskip("PIL.Image")
    image = torch.rand(33, 20, 3, generator=torch.Generator().manual_seed(1))
    if rounding == "rounded":  # a picture that was already 8-bit, saved with rounding
        image = (image * 255).round() / 255
        array = (image.numpy() * 255).round().astype(numpy.uint8)
    else:  # any picture, as ComfyUI's Save Image does it
        array = numpy.clip(255.0 * image.numpy(), 0, 255).astype(numpy.uint8)
    image_module.fromarray(array).save(tmp_path / "x.png")
    loaded = numpy.array(image_module.open(tmp_path / "x.png")).astype(numpy.float32) / 255.0  # as Load Image does it
    keys = {
        image_key(x) for x in (image, torch.from_numpy(loaded), torch.from_numpy(loaded)[None], torch.from_numpy(array))
    }
    assert len(keys) == 1 and len(keys.pop()) == 32


def test_image_key_tells_pictures_apart():
    image = torch.rand(4, 6, 3)
    other = image.clone()
    other[0, 0, 0] = (other[0, 0, 0] + 0.5) % 1
    keys = [image_key(x) for x in (image, other, image.permute(1, 0, 2), image.reshape(6, 4, 3))]
    assert len(set(keys)) == 4
    assert image_key(image.permute(1, 0, 2).contiguous()) == keys[2]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_missing_key_says_what_is_there(tmp_path):
    buffer = HardNegativeBuffer(tmp_path)
    with pytest.raises(KeyError, match="'chair'.*the buffer is empty"):
        buffer.draw("chair")
    for n in range(10):
        buffer.store(f"sofa {n}", number(n))
    with pytest.raises(KeyError, match="key: no hard negatives under 'chair'.*one of 10: 'sofa 0'.*and 2 more"):
        buffer.draw("chair")


def test_another_shape_or_dtype_under_a_key_is_refused(tmp_path):
    buffer = HardNegativeBuffer(tmp_path)
    buffer.store("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"tensor: expected \[2, 3\] float32 .*'a', got \[3, 2\] float32"):
        buffer.store("a", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"got \[2, 3\] uint8"):
        buffer.store("a", torch.zeros(2, 3, dtype=torch.uint8))
    buffer.store("b", torch.zeros(3, 2))
    assert len(buffer) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(capacity=0), "capacity: expected a whole number >= 1, got 0"),
        (dict(per_key=2.5), "per_key: expected a whole number >= 1, got 2.5"),
        (dict(space=""), "space: expected a non-empty string"),
        (dict(lock_timeout=-1), "lock_timeout: expected a number >= 0, got -1"),
    ],
)
def test_the_buffer_checks_its_options(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        HardNegativeBuffer(tmp_path, **arguments)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda b: b.store("", number(0)), "key: expected a non-empty string, got ''"),
        (lambda b: b.store(3, number(0)), "key: expected a non-empty string, got 3"),
        (lambda b: b.store("a", [1.0]), "tensor: expected a torch.Tensor, got list"),
        (lambda b: b.store("a", number(0), score="bad"), "score: expected a number, got 'bad'"),
        (lambda b: b.store("a", number(0), note=3), "note: expected text, got 3"),
        (lambda b: b.store("a", number(0), step=1.5), "step: expected a whole number, got 1.5"),
        (lambda b: b.draw("a", 0), "count: expected a whole number >= 1, got 0"),
        (lambda b: b.draw("a", 1, seed=0.5), "seed: expected a whole number, got 0.5"),
        (lambda b: image_key(torch.zeros(2, 4, 4, 3)), r"image: expected one picture .*got \[2, 4, 4, 3\]"),
        (lambda b: image_key(torch.zeros(4, 4, 3).half()), "image: expected float32 .*got torch.float16"),
        (lambda b: image_key(torch.full((4, 4, 3), math.nan)), "image: .*NaN"),
        (lambda b: quantize_image(torch.zeros(3, dtype=torch.uint8)), "image: expected a floating tensor.*uint8"),
        (lambda b: dequantize_image(torch.zeros(3)), "image: expected a uint8 tensor, got torch.float32"),
    ],
)
def test_calls_are_checked(tmp_path, call, words):
    buffer = HardNegativeBuffer(tmp_path)
    with pytest.raises(ValueError, match=words):
        call(buffer)
    assert files(tmp_path) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="folder: expected a folder, got the file"):
        HardNegativeBuffer(tmp_path / "x")
