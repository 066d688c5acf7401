"""Outputs beside their pairs: the layouts and names of trainers, and which pair and step each output is of."""

from pathlib import Path

import pytest
from PIL import Image

from editloss_core.pairs import find_pairs
from editloss_core.pairs.outputs import Moment, find_outputs, moment_of, sample_number


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(root / name)
    return root


def told(outputs):
    """Output → its pair and when it was made."""
    return {o.name: (o.key, str(o.moment)) for o in outputs.outputs}


@pytest.mark.parametrize(
    "name, count, unit",
    [
        ("1700000000000__000000250_0", 250, "step"),  # ai-toolkit
        ("pair_000_000000250", 250, "step"),
        ("mylora_000000250_00", 250, "step"),
        ("name_e000001_00_20240101120000", 1, "epoch"),  # kohya
        ("name_000250_00_20240101120000_42", 250, "step"),
        ("name_000250_00_20240101120000_1234567890", 250, "step"),  # a seed is no step
        ("name_e000003_01_20240101120000_1234567890", 3, "epoch"),
        ("chair_123456_000250_00_20240101120000", 250, "step"),  # the name has a number of its own
        ("pair_000000_000250", 250, "step"),
        ("checkpoint-500/image_0", 500, "step"),  # diffusers
        ("validation/step_250/kitchen", 250, "step"),
        ("kitchen-step00000250", 250, "step"),
        ("1000/kitchen", 1000, "step"),
        ("epoch_3/kitchen", 3, "epoch"),
        ("kitchen 250steps", 250, "step"),
        ("kitchen_250_steps", 250, "step"),
        ("steps_250_3", 250, "step"),
        ("20240101_120000_kitchen", None, "step"),  # a date and a time
        ("kitchen_00001_", None, "step"),  # ComfyUI counts with five digits
        ("1700000000000", None, "step"),
        ("kitchen", None, "step"),
        ("chair 2", None, "step"),
    ],
)
def test_the_step_in_a_name(name, count, unit):
    assert moment_of(name) == Moment(count, unit)


@pytest.mark.parametrize(
    "name, number",
    [
        ("1700000000000__000000250_3", 3),
        ("name_e000001_01_20240101120000_42", 1),
        ("name_000250_02_20240101120000_1234567890", 2),
        ("checkpoint-500/image_12", 12),
        ("step_250/kitchen", None),
        ("step_250_val_img_2", 2),
        ("image_3_step_250", 3),
        ("3/step_250", 3),
        ("1 step 250", 1),
    ],
)
def test_the_number_of_the_sample(name, number):
    assert sample_number(name) == number


def test_control_target_and_outputs_with_steps(tmp_path):
    pairs = [f"{part}/pair_00{i}.png" for part in ("control", "target") for i in (0, 1)]
    samples = [f"outputs/pair_00{i}_000000{step}.png" for i in (0, 1) for step in (250, 500)]
    found = find_outputs(made(tmp_path, *pairs, *samples))
    assert told(found)["pair_001_000000500"] == ("pair_001", "step 500") and len(found.outputs) == 4
    assert found.layout.after["pair_000"] == tmp_path / "target/pair_000.png" and found.sampled and not found.notes


def test_samples_by_number_take_the_before_picture_at_their_place_and_say_so(tmp_path):
    made(tmp_path, "b/kitchen 2.png", "b/kitchen 10.png", "samples/17000000000000__000000250_0.jpg", "samples/17000000000000__000000250_1.jpg")  # fmt: skip
    found = find_outputs(tmp_path / "samples", {"before": tmp_path / "b"})
    assert [key for key, _ in told(found).values()] == ["kitchen 2", "kitchen 10"]
    assert found.notes == ("samples were matched to before pictures by their numbers: 0 = ../b/kitchen 2.png, 1 = ../b/kitchen 10.png",)  # fmt: skip


def test_numbers_may_begin_at_one(tmp_path):
    made(tmp_path, "control/a.png", "control/b.png", "samples/step_250/image_1.png", "samples/step_250/image_2.png")
    assert [key for key, _ in told(find_outputs(tmp_path)).values()] == ["a", "b"]


def test_samples_by_number_are_not_guessed_where_before_pictures_are_more(tmp_path):
    made(tmp_path, "b/a.png", "b/b.png", "b/c.png", "samples/17000000000000__000000250_0.jpg", "samples/17000000000000__000000250_1.jpg")  # fmt: skip
    found = find_outputs(tmp_path, {"before": tmp_path / "b"})
    assert not any(o.key for o in found.outputs)
    assert "numbered 0 to 1 beside 3 before pictures" in found.outputs[0].problem


def test_one_folder_with_endings(tmp_path):
    made(tmp_path, "k_before.png", "k_after.png", "k_output.png", "j_before.png", "j_output_000250.png", "j_output_000500.png", "j_mask.png")  # fmt: skip
    found = find_outputs(tmp_path)
    assert told(found) == {"j_000250": ("j", "step 250"), "j_000500": ("j", "step 500"), "k": ("k", "")}
    assert set(found.layout.after) == {"k"} and set(found.layout.masks) == {"j"}


def test_a_name_within_another_belongs_to_the_longer_one_and_numbers_of_pairs_are_no_repeats(tmp_path):
    made(tmp_path, "before/room.png", "before/room_2.png", "before/a room.png")
    made(tmp_path, "output/room_2_000250.png", "output/a room_seed7.png", "output/room_3.png", "output/room_red.png")
    found = told(find_outputs(tmp_path))
    assert found["room_2_000250"] == ("room_2", "step 250") and found["a room_seed7"] == ("a room", "")
    assert found["room_3"] == found["room_red"] == ("", "")


def test_names_that_are_numbers(tmp_path):
    made(tmp_path, "before/000001.png", "before/000250.png", "output/000001.png", "output/000001_000250.png", "output/lora_000250_00.png")  # fmt: skip
    found = told(find_outputs(tmp_path))
    assert found["000001"] == ("000001", "") and found["000001_000250"] == ("000001", "step 250")
    assert found["lora_000250_00"] == ("", "step 250")  # no output of before/000250.png


def test_single_pictures_belong_together_whatever_they_are_called(tmp_path):
    made(tmp_path, "a.png", "t.png", "o/x.png", "o/y_step10.png")
    found = find_outputs(None, {"before": tmp_path / "a.png", "after": tmp_path / "t.png", "output": tmp_path / "o"})
    assert told(found) == {"x": ("a", ""), "y_step10": ("a", "step 10")} and found.layout.after["a"].name == "t.png"


def test_what_is_missing_is_named(tmp_path):
    made(tmp_path, "pictures/a.png", "b/a.png")
    with pytest.raises(
        ValueError, match=r"no before/ and no output/; there is: b/, pictures/. Name them with --before DIR"
    ):
        find_outputs(tmp_path)
    with pytest.raises(
        ValueError, match="expected a folder, got the file .*a.png; single pictures are named one by one"
    ):
        find_outputs(tmp_path / "b/a.png")
    with pytest.raises(ValueError, match="expected FOLDER, or --before and --output, got no --output"):
        find_outputs(None, {"before": tmp_path / "b"})
    with pytest.raises(FileNotFoundError, match="--after: there is no folder or picture"):
        find_outputs(tmp_path / "pictures", {"before": tmp_path / "b", "after": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="--before a folder, --mask a picture"):
        find_outputs(tmp_path / "pictures", {"before": tmp_path / "b", "mask": tmp_path / "b/a.png"})


def test_training_takes_the_same_names_of_folders(tmp_path):
    made(tmp_path, "control/a.png", "masks/a.png")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "control/a.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "masks/a.png")
    made(tmp_path, "target/a.png")
    (pair,) = find_pairs(tmp_path, default_caption="replace it")
    assert pair.before == tmp_path / "control/a.png" and pair.mask == tmp_path / "masks/a.png"
