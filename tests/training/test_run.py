"""``python -m editloss_core.training``: a tiny FLUX.1 Kontext by diffusers from a config to LoRA files and a report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

for name in ("diffusers", "accelerate", "peft"):
    pytest.importorskip(name)

import torch
from safetensors.torch import load_file
from small_kontext import write_kontext

from editloss_core.lora.lora import LoRASettings
from editloss_core.objective import recommended
from editloss_core.pairs import VariantSettings
from editloss_core.training.__main__ import main
from editloss_core.training.config import (
    ModelSection,
    PairsSection,
    RunSection,
    TrainingConfig,
    VAESection,
    ValidationSection,
    to_toml,
)
from editloss_core.training.settings import TrainingSettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "editloss_core" / "demo" / "pictures"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the model and four pairs, for configs."""
    folder = tmp_path_factory.mktemp("base")
    write_kontext(folder / "kontext")
    for part in ("before", "after", "mask"):
        (folder / "pairs" / part).mkdir(parents=True)
        for path in sorted((PAIRS / part).iterdir())[:4]:
            shutil.copy(path, folder / "pairs" / part)
    return folder


def config(name="a", resume="", steps=4, **changes):
    training = TrainingSettings(
        steps=steps, batch_size=2, learning_rate=0.03, gradients_every=2, validate_every=2, preview_steps=2, previews=1,
        checkpoint_every=2, **changes,
    )  # fmt: skip
    return TrainingConfig(
        model=ModelSection("kontext", dtype="fp32"),
        pairs=PairsSection("pairs", resolution=64, default_caption="Replace the chair."),
        run=RunSection(f"runs/{name}", resume, checkpoint_every=2, lora_dtype="fp32"),
        encoders={"latents": VAESection()},
        objective=recommended("latents"),
        training=training,
        lora=LoRASettings(2, 3.0),
        validation=ValidationSection(validate_every=2, previews=1, preview_steps=2),
    )


def write(base, made):
    path = base / f"{made.run.folder.replace('/', '_')}.toml"
    path.write_text(to_toml(made), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(base):
    """The folder of a run, made as a person makes it, and what was said."""
    command = [sys.executable, "-m", "editloss_core.training", write(base, config())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "runs" / "a", done.stdout


def test_a_run_leaves_what_the_node_leaves(finished):
    folder, said = finished
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints", "pictures", "log.jsonl", "report.html", "lora.safetensors", "lora_diffusers.safetensors",
    }  # fmt: skip
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [e for e in entries if e["kind"] == "step"]
    assert len(steps) == 4 and len([e for e in entries if e["kind"] == "validation"]) == 2
    everywhere, pushes = {"velocity", "geometry match"}, {"no edit identity", "overlay avoidance"}
    for sample in [sample for step in steps for sample in step["samples"]]:
        assert set(sample["terms"]) == (everywhere | pushes if sample["t"] <= 0.5 else everywhere)
    assert "no edit identity, overlay avoidance: on the one-step estimate they count up to t = 0.5" in said
    for expected in (
        "3 to train on (64×64: 3), 1 held out",
        "1 × no edit identity (latents)",
        "report.html",
        "22 layers",
    ):
        assert expected in said


def test_the_plan_says_what_variants_will_take(base, capsys):
    made = replace(config("variants"), variants=VariantSettings(count=5))
    assert main([write(base, made), "--check"]) == 0
    said = capsys.readouterr().out
    assert "15 to train on (64×64: 15), 1 held out" in said
    assert (
        "variants    3 pairs × 5 = 15; latents and masks take about 0 MB of memory and 0 MB of the cache's disk" in said
    )


def test_its_lora_loads_in_the_pipeline_and_changes_the_picture(base, finished):
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(base / "kontext", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def sampled():
        return pipeline(
            image=picture, prompt="Replace the chair.", height=64, width=64, max_area=4096, num_inference_steps=2,
            generator=torch.Generator().manual_seed(0), _auto_resize=False, output_type="pt",
        ).images  # fmt: skip

    before = sampled()
    pipeline.load_lora_weights(finished[0], weight_name="lora_diffusers.safetensors")
    after = sampled()
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.0)
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(sampled(), before, atol=1e-6)


def test_the_same_seed_gives_the_same_file_and_so_does_a_run_that_was_stopped(base, finished):
    assert main([write(base, config("b"))]) == 0
    assert main([write(base, config("c", steps=2))]) == 0
    assert main([write(base, config("c", "last"))]) == 0
    files = [(base / "runs" / name / "lora.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]
    other = load_file(base / "runs" / "c" / "checkpoints" / "step_000002.safetensors")
    last = load_file(base / "runs" / "c" / "checkpoints" / "step_000004.safetensors")
    assert any(not torch.equal(other[k], last[k]) for k in other if k.startswith("lora/"))


def test_two_processes_give_the_same_file_and_may_share_the_weights(base, finished):
    """torchrun on loopback, as accelerate launch does it on CPUs; FSDP's gradients are compared in the processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(Path(__file__).with_name("kontext_processes.py")), str(base / "kontext"), write(base, config("two")),
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": pythonpath()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("status 0, gradients") == 2 and done.stdout.count("4 steps of 2 pairs") == 1
    one, two = (load_file(folder / "lora.safetensors") for folder in (finished[0], base / "runs" / "two"))
    apart = {k: (one[k] - two[k]).abs().max().item() for k in one}
    # A step moves a weight by up to 0.03: AdamW divides by the gradient's size, and rounding in small ones by little.
    assert max(apart.values()) < 1e-4, sorted(apart.items(), key=lambda item: item[1])[-3:]


def pythonpath():
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_processes_that_do_not_see_one_another_are_refused(base, capsys, monkeypatch):
    """Each would train for itself, and write over the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 1)
    assert main([write(base, config("alone"))]) == 2
    assert "processes: 2 were launched, and accelerate sees 1" in capsys.readouterr().err


def test_another_run_in_the_same_folder_is_refused(base, finished, capsys):
    assert main([write(base, config())]) == 2
    assert "holds checkpoints of another run; resume it (resume = 'last')" in capsys.readouterr().err


def test_a_checkpoint_of_another_lora_is_refused_before_any_work(base, finished, capsys):
    assert main([write(base, replace(config("a", "last"), lora=LoRASettings(4, 3.0))), "--check"]) == 2
    assert "this run's is {'rank': 4, " in capsys.readouterr().err


def test_check_prints_the_plan_and_trains_nothing(base, capsys):
    assert main([write(base, config("never")), "--check"]) == 0
    said = capsys.readouterr().out
    for expected in (
        "parameters in fp32, 3 blocks",
        "rank 2: 22 layers",
        "4 steps of 2 pairs",
        "GiB with all weights at 544 tokens a sample",
    ):
        assert expected in said
    assert not (base / "runs" / "never").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pairs": PairsSection("pairs", resolution=64)}, "(4):\n    after/armchair.webp"),
        (
            {"lora": LoRASettings(layers="double_blocks.*")},
            "no linear layer of FluxTransformer2DModel matches 'double_blocks.*'",
        ),
        ({"validation": ValidationSection(hold_out=4)}, "hold_out: expected 0 to 3"),
        (
            {"model": ModelSection("pairs")},
            "line 2: model.path: expected an edit model in diffusers' layout (FLUX.1 Kontext, ",
        ),
        (
            {"model": ModelSection("kontext", dtype="fp32", quantization="nf4")},
            "quantization: ",
        ),  # no GPU, or no package
        ({"run": RunSection("a.file/run")}, "a.file/run cannot be written: "),
        ({"run": RunSection("runs/wrong", cache="a.file")}, "a.file is a file, not a folder"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(base, capsys, change, expected):
    (base / "a.file").write_text("x")
    assert main([write(base, replace(config("wrong"), **change)), "--check"]) == 2
    assert expected in capsys.readouterr().err
    assert not (base / "runs" / "wrong").exists() and (base / "a.file").read_text() == "x"


def test_all_that_is_wrong_is_said_together(base, capsys):
    """A newcomer makes pairs first: what is wrong with them does not wait for the model."""
    (base / "a.file").write_text("x")
    path = write(base, config("wrong"))
    text = Path(path).read_text(encoding="utf-8")
    text = text.replace('default_caption = "Replace the chair."', "").replace(
        'path = "kontext"', 'path = "black-forest-labs/FLUX.1"'
    )
    text = text.replace('folder = "runs/wrong"', 'folder = "a.file/run"')
    Path(path).write_text(text.replace("learning_rate", "lr"), encoding="utf-8")
    assert main([path, "--check"]) == 2
    said = capsys.readouterr().err
    for expected in (
        "training.lr: unknown; did you mean learning_rate?",
        "black-forest-labs/FLUX.1 is a name of a hub: nothing is downloaded",
        "after/armchair.webp",
        "a.file/run cannot be written: ",
    ):
        assert said.count(expected) == 1, said
    Path(path).write_text(text.replace('path = "black-forest-labs/FLUX.1"', 'path = "kontext"'), encoding="utf-8")
    assert main([path, "--check"]) == 2  # nothing is wrong with the config itself
    said = capsys.readouterr().err
    assert said.count("after/armchair.webp") == said.count("a.file/run cannot be written: ") == 1, said


def test_a_full_disk_is_status_1_once_something_is_learnt(base, capsys, monkeypatch):
    from editloss_core.files import NotWritten

    def full(*_):
        raise NotWritten("lora.safetensors cannot be written: No space left on device")

    monkeypatch.setattr("editloss_core.training.run.save_both", full)
    assert main([write(base, config("full", steps=2))]) == 1
    said = capsys.readouterr().err
    assert "No space left on device\nWhat was learnt is kept in full/checkpoints/step_000002.safetensors." in said
    monkeypatch.setattr("editloss_core.cache.TensorCache.put", full)
    assert main([write(base, replace(config("full2"), run=RunSection("runs/full2", cache="other")))]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_encoders_of_pictures_and_a_folder_of_held_out_pairs(base, tmp_path):
    """timm and OpenCLIP from local weights, on a decoded crop, with half of the settings away from their defaults."""
    import timm
    from safetensors.torch import save_file

    from editloss_core.training.config import EstimateSection, TimmSection

    net = timm.create_model("test_vit", pretrained=False)
    save_file(net.state_dict(), base / "test_vit.safetensors")
    made = replace(
        config("pictures", steps=2, ema=0.9, accumulation=2),
        encoders={"vit": TimmSection("test_vit", "test_vit.safetensors")},
        objective=recommended("vit"),
        estimate=EstimateSection(32),
        validation=ValidationSection(folder="pairs", validate_every=2, previews=1, preview_steps=0),
    )
    assert main([write(base, made)]) == 0
    entries = [json.loads(line) for line in (base / "runs" / "pictures" / "log.jsonl").read_text().splitlines()]
    (validation,) = [e for e in entries if e["kind"] == "validation"]
    assert set(validation["terms"]) == {"no edit identity", "geometry match", "overlay avoidance"}
    assert not (base / "runs" / "pictures" / "report.html").exists()


def test_help_names_the_exit_statuses_and_a_missing_package_what_to_install(base, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "accelerate launch -m editloss_core.training CONFIG.toml" in said and "130  interrupted" in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else object())
    assert main([write(base, config("never"))]) == 2
    assert 'diffusers is not installed; pip install -e ".[train]"' in capsys.readouterr().err
