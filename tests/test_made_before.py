"""What was written before the modules moved is read as it was then: checkpoints, caches, embeddings, LoRAs, commands.

The files are in ``made_before``; its README.md says what made them. The docstring of each test says how. Weights that a
file depends on are filled by arithmetic, so that they are the same on every machine.
"""

from __future__ import annotations

import csv
import math
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

for name in ("diffusers", "timm", "jinja2", "matplotlib"):
    pytest.importorskip(name)

ROOT = Path(__file__).resolve().parents[1]
from small import ALL, LATENTS, PATCHES, Patches, parts, trainer, weights
from small_kontext import VAE

from editloss_core.embeddings import INDEX, EmbeddingSet, StaleEmbeddings, encode_pairs, load_shards
from editloss_core.encoders import TimmEncoder
from editloss_core.hard_negatives import HardNegativeBuffer, image_key, quantize_image
from editloss_core.hashing import hash_module
from editloss_core.lora.keys import save_both
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.autoencoder import vae_encoder
from editloss_core.models.captions import encode_captions
from editloss_core.models.folder import ModelFolder
from editloss_core.models.kontext import KONTEXT
from editloss_core.negatives import OverlaySettings
from editloss_core.objective import EditObjective, LossTerm
from editloss_core.pairs import PairSet, find_pairs
from editloss_core.run_report.report import write_report
from editloss_core.run_report.verdicts import judge_run
from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, Checkpoint, checkpoint_path
from editloss_core.runs.log import RunLog
from editloss_core.training.config import (
    EstimateSection,
    ModelSection,
    OpenCLIPSection,
    PairsSection,
    RunSection,
    TimmSection,
    TrainingConfig,
    VAESection,
    ValidationSection,
    to_toml,
)
from editloss_core.training.config_reader import read_config
from editloss_core.training.convert_lora import convert_lora
from editloss_core.training.flow import Timesteps
from editloss_core.training.prepare import prepare
from editloss_core.training.self_check import recall
from editloss_core.training.settings import TrainingSettings
from editloss_core.verdict.judge import FAILURES

MADE = ROOT / "tests" / "made_before"
BLEND = OverlaySettings(kinds=("blend",))
LAYERS = {"rank": 2, "alpha": 3.0, "layers": "all"}
CAPTION = "Mach daraus ein „Quadrat“"
# Of the base and by step: what failed of two outputs, and the mean scores by failure.
VERDICTS = dict.fromkeys((None, 2, 4), {"unusable": 2})  # noise; "distorted" before there was a word for it
SCORES = {
    None: [0.1359, 0.2114, 1.0, 0.893],
    2: [0.1301, 0.2435, 1.0, 0.8856],
    4: [0.1279, 0.1925, 1.0, 0.8852],
}
# How far scores and measures have moved: the shape is asked inside the mask, a tint counts as a change around it, and pictures are
# compared at sizes that go by area. Edges lost of their places are distorted since: an overlay has lost more than it had before.
MOVED = {
    "distorted": 0.15, "shape": 0.05, "outline": 0.04, "outline in place": 0.02, "collateral change": 0.2, "overlay": 0.04,
    "unchanged": 0.03, "old edges": 0.01, "old inside": 0.01, "new there": 0.003, "soft": 0.01, "stretch": 0.003,
    "displaced": 0.001, "resized": 0.003,
}  # fmt: skip
JUDGED = [
    ["good", "good"], ["no after", "undecided"], ["no output", ""], ["overlaid", "overlay"], ["unedited", "no edit"],
    ["waved", "distorted"],
]  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """A copy of the files that may be written to."""
    return shutil.copytree(MADE, tmp_path / "made")


def filled(module: nn.Module) -> nn.Module:
    """Weights without a random number: whole ones, times a power of two near 1 / √fan-in."""
    with torch.no_grad():
        for k, (_, p) in enumerate(sorted(module.named_parameters())):
            n = torch.arange(p.numel())
            numbers = ((31 * n + 7919) * (n + k) + 104729 * k) % 1009 - 504
            p.copy_(numbers.reshape(p.shape) * 2.0 ** -round(math.log2(300 * math.sqrt(p[0].numel()))))
    return module.eval()


def pairs():
    """Six pairs of 64×64 pixels with masks and captions, drawn by ``small.pictures``."""
    return find_pairs(MADE / "pairs", resolution=64)


def two_pairs():
    return pairs().split(2, seed=0)[1]


def images():
    """Of the two pairs."""
    loaded = [two_pairs().load(i) for i in range(2)]
    return {
        "gt": torch.stack([p.after for p in loaded]),
        "src": torch.stack([p.before for p in loaded]),
        "mask": torch.stack([p.mask for p in loaded]),
    }


def encoders(seed=None):
    """Latents and patches; of the patches' encoder with other weights if there is a seed."""
    vae, patches = parts()[1], Patches(seed or 0)
    if seed is None:
        filled(patches.net)
        patches.info = replace(patches.info, fingerprint=hash_module(patches.net, patches.info.preprocessing))
    return {LATENTS: vae, PATCHES: patches}


# ---------------------------------------------------------------------------------------------------------------------
# A run that was stopped
# ---------------------------------------------------------------------------------------------------------------------


def small_run(folder=None, host=None, cache=None):
    """The small trainer on four of the pairs, watched on the two others."""
    train, held_out = (
        prepare(some, parts()[1], encoders(), crop=32, overlay=BLEND) for some in pairs().split(2, seed=0)
    )
    return trainer(
        folder, prepared=train, validation=held_out, with_encoders=encoders(), objective=ALL, host=host, cache=cache,
        steps=8, schedule="cosine", ema=0.9, validate_every=2, previews=2, preview_steps=2, checkpoint_every=2, keep=1,
        self_check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted():
    """(what was learnt, the log) of the same run, made now."""
    result = small_run().run()
    return weights(result.lora), result.log


def close(a, b, **tolerance):
    """The same names, and tensors as near as the tolerance says."""
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def test_a_run_goes_on_from_its_checkpoint(made, uninterrupted):
    """``run`` is ``small_run(folder, StopAfter(5))``: stopped by Ctrl+C after 5 of 8 steps."""
    (learnt, log), place = uninterrupted, made / "run" / CHECKPOINT_FOLDER
    again = small_run(made / "run")
    again.resume(checkpoint_path(place, 5))
    assert again.notes == [] and again.step == 5
    close(weights(again.lora), Checkpoint.load(checkpoint_path(place, 5)).lora, rtol=0, atol=0)
    result = again.run()
    assert again.notes == [] and result.steps == 8 and result.checkpoint == checkpoint_path(place, 8)
    close(weights(result.lora), learnt, rtol=0, atol=1e-5)
    kept = RunLog.read(made / "run")
    assert [step.step for step in kept.steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step.loss for step in kept.steps] == pytest.approx([step.loss for step in log.steps], rel=1e-4)
    assert [event.event for event in kept.events][-3:] == ["resumed", "checked", "ended"]


def test_its_log_reads_back_whole(uninterrupted):
    """The log that ``small_run`` wrote until it was stopped, against that of the same steps made now."""
    kept, (_, log) = RunLog.read(MADE / "run"), uninterrupted
    assert len(kept.steps) + len(kept.validations) + len(kept.events) == len(
        (MADE / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert [event.event for event in kept.events] == ["started", "checked", "stopped"]
    assert kept.events[0].info["settings"]["steps"] == 8 and kept.events[-1].notes == ("KeyboardInterrupt",)
    for old, new in zip(kept.steps, log.steps[:5], strict=True):
        assert old.learning_rate == pytest.approx(new.learning_rate, rel=1e-6)
        assert [(s.pair, s.t, list(s.terms)) for s in old.samples] == [
            (s.pair, s.t, list(s.terms)) for s in new.samples
        ]
        for before, now in zip(old.samples, new.samples):
            assert [t.raw for t in before.terms.values()] == pytest.approx(
                [t.raw for t in now.terms.values()], rel=1e-4
            )
    for old, new in zip(kept.validations, log.validations[:2], strict=True):
        assert (old.step, list(old.noise_levels)) == (new.step, list(new.noise_levels))
        assert [old.velocity, old.velocity_base] == pytest.approx([new.velocity, new.velocity_base], rel=1e-4)
        assert old.terms == pytest.approx(new.terms, rel=1e-4)
        assert [p.pair for p in old.pictures] == sorted(p.pair for p in old.pictures) and len(old.pictures) == 2
        assert all((MADE / "run" / "pictures" / name).is_file() for p in old.pictures for name in p.files.values())


@pytest.mark.slow
def test_its_report_is_written_and_its_pictures_are_judged_as_then(made):
    """``SCORES`` are what ``judge_run`` said of the folder then. Its outputs are noise: now unusable, and so neither unedited nor
    overlays, and of another tint all around, which the last of the scores did not know."""
    run = judge_run(made / "run")
    judged = {v.step: v for v in (run.base, *run.validations)}
    assert {step: dict(v.counts) for step, v in judged.items()} == VERDICTS
    for step, scores in SCORES.items():
        *found, unusable = (judged[step].score(failure) for failure in FAILURES)
        assert found == pytest.approx([0, 0, scores[2], 1], abs=0.01) and unusable > 0.85
    assert run.best.step == 4 and run.steps == 5 and run.checkpoint(5) is not None and run.cut_off == 0
    page = write_report(made / "run")
    text = page.read_text(encoding="utf-8")
    assert page == made / "run" / "report.html" and text.count("data:image/webp;base64,") == 2 * 5  # two pairs
    assert "step 4" in text and "held-out loss 1.4333" in text and "Self-check passed" in text


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


def cached(folder, timm_weights, told):
    """Two of the pairs, prepared for Kontext's kind of autoencoder and a timm network."""
    from diffusers import AutoencoderKL

    network = {"model_name": "vit_tiny_patch16_224", "output": "grid", "image_size": 32}
    network["model_kwargs"] = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    save_file(filled(TimmEncoder(**network, random_seed=0).network).state_dict(), timm_weights)
    vae = filled(AutoencoderKL(**VAE))
    used = [vae_encoder(vae, scaled=False), TimmEncoder(**network, weights=timm_weights)]
    return prepare(
        two_pairs(), vae_encoder(vae), {encoder.info.name: encoder for encoder in used}, folder,
        crop=32, overlay=BLEND, progress=lambda done, total: told.append(done),
    )  # fmt: skip


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_of_a_cache_is_made_again(made, tmp_path):
    """``cache`` is what ``cached`` left in a new folder."""
    nothing, everything = [], []
    found = cached(made / "cache", tmp_path / "weights.safetensors", nothing)
    assert nothing == [] and files(made / "cache") == files(MADE / "cache")
    fresh = cached(None, tmp_path / "weights.safetensors", everything)
    assert everything[-1] == 2 * (1 + 2 + 2 * 3)  # a mask, two latents, and three embeddings by each of two
    assert found.crops == fresh.crops and found.about() == fresh.about() and found.notes == fresh.notes
    old, new = ({"gt": p.after([0, 1]), "src": p.before([0, 1]), "mask": p.pixel_masks([0, 1])} for p in (found, fresh))
    close(old, new, rtol=1e-5, atol=1e-6)
    old, new = (dict(p.embeddings([0, 1]).tensors) for p in (found, fresh))
    assert len(old) == 6
    close(old, new, rtol=1e-5, atol=1e-6)


def test_no_caption_of_a_cache_is_encoded_again(made):
    """``cache/captions`` is of ``CAPTION`` by the pipeline of ``small_kontext.write_kontext``. ``kontext`` has the
    parts of its folder that read text, without their weights; the key holds the fingerprint of these."""
    (made / "kontext" / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}', encoding="utf-8")
    fingerprint = ModelFolder(made / "kontext", dtype="fp32").text_fingerprint
    picture = torch.linspace(0, 1, 64 * 64 * 3).reshape(1, 64, 64, 3)
    pairs = [PairSet.from_images(picture, 1 - picture, None, CAPTION)]

    def load():
        raise AssertionError("the text encoders were loaded")

    ((found,),) = encode_captions(KONTEXT, pairs, load, fingerprint, made / "cache")
    (kept,) = (MADE / "cache" / "captions").iterdir()
    assert found.tokens.shape == (512, 24) and found.pooled.shape == (20,)
    close(found._asdict(), load_file(kept), rtol=0, atol=0)
    for other in (fingerprint[::-1], ModelFolder(made / "kontext", dtype="bf16").text_fingerprint):
        with pytest.raises(AssertionError, match="were loaded"):
            encode_captions(KONTEXT, pairs, load, other, made / "cache")


def test_a_self_check_is_remembered():
    """``cache/self_checks`` is what the run of ``run`` found. Its key holds the code of that time: a run looks
    again."""
    (kept,) = (MADE / "cache" / "self_checks").iterdir()
    found = recall(MADE / "cache", kept.stem)
    (checked,) = (event for event in RunLog.read(MADE / "run").events if event.event == "checked")
    assert checked.notes == (found.line().replace(f", remembered from {found.remembered}", ""),)
    assert not found.wrong and [part.part for part in found.parts] == [part["part"] for part in checked.info["parts"]]


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings, negatives
# ---------------------------------------------------------------------------------------------------------------------


def embeddings():
    pictures = images()
    mask, made = pictures.pop("mask"), EmbeddingSet()
    pictures["overlay"] = (pictures["gt"] + pictures["src"]) / 2
    for encoder in encoders().values():
        made = made.with_images(encoder, pictures)
    return made.with_mask(mask)


def same_embeddings(old, new):
    close(dict(old.tensors), dict(new.tensors), rtol=1e-5, atol=1e-6)
    assert (old.encoders, old.grids, old.regions, old.images) == (new.encoders, new.grids, new.regions, new.images)
    assert torch.equal(old.mask, new.mask)


def test_an_embedding_file():
    """``embeddings.safetensors`` is ``embeddings().save(…)``."""
    path, pictures, used = MADE / "embeddings.safetensors", images(), list(encoders().values())
    del pictures["mask"]
    same_embeddings(EmbeddingSet.load(path, used, pictures), embeddings())
    with pytest.raises(StaleEmbeddings, match="src was made from other pictures"):
        EmbeddingSet.load(path, used, {**pictures, "src": pictures["gt"]})
    with pytest.raises(StaleEmbeddings, match="had other weights"):
        EmbeddingSet.load(path, list(encoders(seed=1).values()))


def test_embeddings_in_shards(made):
    """``shards`` is what ``python -m editloss_core.embeddings PAIRS --masks --shard-pairs 1`` does, with encoders that
    need no weights: ``encode_pairs(two_pairs(), encoders, folder, masks=True, shard_pairs=1)``."""
    used, folder = list(encoders().values()), made / "shards"
    found, pictures = load_shards(folder, used, two_pairs()), images()
    expected = EmbeddingSet()
    for encoder in used:
        expected = expected.with_images(encoder, {role: pictures[role] for role in ("gt", "src")})
    same_embeddings(replace(found, images=expected.images), expected.with_mask(pictures["mask"]))
    again = encode_pairs(two_pairs(), used, folder, masks=True, shard_pairs=1)
    assert (again.pictures, again.shards, again.kept) == (0, 2, 2)
    assert files(folder) == files(MADE / "shards") and again.index == folder / INDEX
    with pytest.raises(StaleEmbeddings, match="from other pairs"):
        load_shards(folder, used, pairs())
    with pytest.raises(StaleEmbeddings, match="had other weights"):
        load_shards(folder, list(encoders(seed=1).values()))


def test_a_buffer_of_hard_negatives(made):
    """``hard_negatives``: for each of two pairs its after picture and the mean of both, stored by
    ``quantize_image``."""
    buffer, pictures = HardNegativeBuffer(made / "hard_negatives"), images()
    keys = [image_key(before) for before in pictures["src"]]
    assert buffer.keys() == sorted(keys)
    said = [(e.key, e.score, e.note, e.step, e.sequence, e.shape, e.dtype) for e in buffer.entries()]
    assert said == [
        (keys[i // 2], 0.25 * i, f"Nr. {i} „zu nah“", 100 * i, i + 1, (64, 64, 3), "uint8") for i in range(4)
    ]
    for i, key in enumerate(keys):
        stored = [quantize_image(x[i]) for x in (pictures["gt"], (pictures["gt"] + pictures["src"]) / 2)]
        drawn = buffer.draw(key, count=2, seed=0)
        assert torch.equal(drawn, torch.stack(stored)) or torch.equal(drawn, torch.stack(stored[::-1]))
    kept = files(made / "hard_negatives")
    buffer.store(keys[0], quantize_image(pictures["gt"][0]), score=0.9)  # it is known by its content
    assert len(buffer) == 4 and files(made / "hard_negatives").keys() == kept.keys()
    assert [e.key for e in buffer.entries()] == [keys[0], keys[1], keys[1], keys[0]]


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs, configs
# ---------------------------------------------------------------------------------------------------------------------


def network_of(path):
    """Linear layers with the names and sizes that a LoRA file in ComfyUI's keys is for."""
    state, root = load_file(path), nn.Module()
    for key, down in state.items():
        layer, is_down, _ = key.removeprefix("diffusion_model.").partition(".lora_down.weight")
        if is_down:
            *above, last = layer.split(".")
            part = root
            for name in above:
                if name not in dict(part.named_children()):
                    part.add_module(name, nn.Module())
                part = part.get_submodule(name)
            up = state[key.replace("lora_down", "lora_up")]
            part.add_module(last, nn.Linear(down.shape[1], len(up), bias=False))
    return root


def test_a_lora_in_both_dialects(tmp_path):
    """``edit.safetensors`` and ``edit_diffusers.safetensors`` are ``save_both`` of a ``filled`` LoRA on layers of the
    sizes of ``small_kontext.transformer``, with ComfyUI's names."""
    ours, theirs = MADE / "edit.safetensors", MADE / "edit_diffusers.safetensors"
    assert convert_lora(ours, tmp_path / "theirs.safetensors") == ("diffusers", 36)
    assert convert_lora(theirs, tmp_path / "ours.safetensors") == ("ComfyUI", 26)
    assert (tmp_path / "theirs.safetensors").read_bytes() == theirs.read_bytes()
    assert (tmp_path / "ours.safetensors").read_bytes() == ours.read_bytes()
    lora = LoRA(network_of(ours), LoRASettings(**LAYERS), seed=1, model=KONTEXT)
    lora.load_tensors(load_file(ours))
    close(lora.tensors(), load_file(ours), rtol=0, atol=0)
    with safe_open(ours, "pt") as file:
        assert file.metadata()["note"] == "made before"
    for new, old in zip(save_both(lora, tmp_path / "again.safetensors", {"note": "made before"}), (ours, theirs)):
        with safe_open(new, "pt") as written, safe_open(old, "pt") as kept:
            assert written.metadata() == {**kept.metadata(), "editloss_edit_model": "flux_kontext"}
        close(load_file(new), load_file(old), rtol=0, atol=0)


CONFIG = TrainingConfig(
    model=ModelSection("/models/FLUX.1-Kontext-dev", quantization="nf4"),
    pairs=PairsSection("/data/pairs/after", "/data/pairs/before", 768, "Make it “red”.", True),
    run=RunSection("../runs/my_edit", cache="../cache", checkpoint_every=50, keep=5),
    encoders={
        "vae/flux_ae/grid": VAESection(256),
        "dino": TimmSection("vit_small_patch14_dinov2", "/models/dino.safetensors", "tokens", -2, 392, True),
        "clip": OpenCLIPSection("ViT-B-32", "/models/clip.safetensors", "grid", True),
    },
    objective=EditObjective(
        (
            LossTerm("no_edit_identity", "vae/flux_ae/grid", name="no edit", weight=1.0, margin=0.25),
            LossTerm("overlay_avoidance", "dino", name="overlay \"2\"", weight=0.7, margin="auto:0.25", t_max=0.8),
            LossTerm("geometry_match", "clip", name="geometry", weight=0.5, dist="cos"),
        )
    ),
    training=TrainingSettings(
        steps=300, batch_size=4, learning_rate=3e-6, warmup=3, schedule="cosine", ema=0.99, seed=7, checkpoint_every=50,
        keep=5, timesteps=Timesteps("uniform", minimum=0.1), validate_every=25, previews=2, preview_steps=3,
    ),
    lora=LoRASettings(4, 2.5, 0.1, "all, -*mod*"),
    estimate=EstimateSection(256),
    overlay=OverlaySettings(kinds=("blend",), opacity=(0.4, 0.9)),
    validation=ValidationSection(2, "", "", 25, 2, 3, 1.5),
)  # fmt: skip


def test_a_training_config():
    """``my_edit.toml`` is ``to_toml(CONFIG, heading)`` with the heading that Export Training Config writes."""
    path = MADE / "my_edit.toml"
    text = path.read_text(encoding="utf-8")
    heading = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert heading.startswith("Train it: python -m editloss_core.training my_edit.toml")
    assert read_config(path, files=False) == CONFIG
    written = to_toml(CONFIG, heading).splitlines()
    assert [line for line in text.splitlines() if line not in written] == [], (
        "what it said is still said, beside new settings"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

# Name → how its help begins, and what it says it takes.
COMMANDS = {
    "editloss_core.diagnostics": ("python -m editloss_core.", "--fail-above"),  # the old name
    "editloss_core.diagnostics.run_report": ("python -m editloss_core.", "run_folder"),  # the old name
    "editloss_core.embeddings": ("python -m editloss_core.", "--shard-pairs"),  # the old name
    "editloss_core.encoders.convert": ("python -m editloss_core.", ".pth, .pt or .bin"),  # the old name
    "editloss_core.training": ("python -m editloss_core.", "CONFIG.toml"),  # the old name
    "editloss_core.training.convert_lora": ("python -m editloss_core.", "in either program's keys"),  # the old name
    "editloss_core.demo.train": ("", "--decoder-steps"),  # the old name
}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # this process has imported some of them
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_then_says_how_it_is_used(command, monkeypatch, capsys):
    """What ``python -m`` does, in this process: one for each would import torch again."""
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    said, complained = capsys.readouterr()
    begins, takes = COMMANDS[command]
    assert (ended.value.code, complained) == (0, "") and said.startswith(f"usage: {begins}")
    assert takes.casefold() in said.casefold()


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.slow
def test_a_folder_is_judged_as_then(tmp_path):
    """``judged`` holds one scene of ``editloss_core.demo.scenes`` at 64×64 pixels with four outputs: its after
    picture, its before, the mean of both, and the after picture with a wave in it. One stem has no after picture, one
    no output."""
    command = [sys.executable, "-m", "editloss_core.diagnostics"]  # the old name
    command += [str(MADE / "judged"), "--out", str(tmp_path), "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr  # one could not be judged
    then, now = rows(MADE / "judged" / "verdicts.csv"), rows(tmp_path / "verdicts.csv")
    assert [row[:2] for row in now[1:]] == JUDGED
    since = ("unusable", "edges lost", "like old", "away", "tint", "old seen", "new seen", "new colours", "room seen")
    assert [head for head in now[0] if head not in since] == then[0]
    for old, new in zip(then[1:], now[1:], strict=True):
        named = dict(zip(now[0], new, strict=True))  # columns came since
        for head, a in zip(then[0], old, strict=True):
            number = a.replace(".", "", 1).removeprefix("-").isdigit()
            same = (
                float(named[head]) == pytest.approx(float(a), abs=MOVED.get(head, 5e-4)) if number else a == named[head]
            )
            assert same or head == "verdict", f"{old[0]}: {head}"
