"""Training in a real ComfyUI with the embedded model: the graph's own nodes, the stock nodes behind it, cancel, resume.

Checks that look into the process run in one of their own (see driver_training.py); here each is one test.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from driver_training import CHECKS
from helpers import check_passed, graph, link, run_driver
from PIL import Image
from runner.client import Client, ComfyError, NodeError
from runner.server import ComfyServer
from safetensors import safe_open

from editloss_core.demo.scenes import flawed, stool_pairs, write_folder
from editloss_core.runs.checkpoint import Checkpoint, checkpoints
from editloss_core.runs.log import RunLog

TRAIN = {
    "name": "test", "steps": 4, "learning_rate": 2e-3, "batch_size": 2, "rank": 4, "alpha": 8.0, "layers": "all", "seed": 0,
    "hold_out": 0,
}  # fmt: skip
RUN = {
    "checkpoint_every": 2, "keep": 9, "validate_every": 2, "previews": 1, "preview_steps": 2, "guidance": 1.0,
    "preview_guidance": 2.5, "gradient_checkpointing": False, "memory_reserve": 0.0,
}  # fmt: skip
OBJECTIVE = {
    "crop": 96, "every": 1, "weighting": "none", "weighting_cap": 100.0, "gradients_every": 2, "overlays": "all",
    "overlay_opacity": 0.55,
}  # fmt: skip


def training(run: dict[str, Any] | None = None, resume: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """Demo model and pairs, the recommended mix on VAE latents, and the trainer as ``train``."""
    wired = {"resume": link("resume")} if resume else {}
    nodes: dict[str, Any] = {"resume": ("EditLossResumeTraining", resume)} if resume else {}
    return graph(
        model=("EditLossDemoModel",),
        pairs=("EditLossDemoPairs", {"count": 4, "unedited": 0, "overlaid": 0, "held_out": 1, "seed": 0}),
        encoder=("EditLossVAEEncoder", {"vae": link("model", 2)}),
        mix=(
            "EditLossRecommendedMix",
            {"encoder": link("encoder"), "preset": "recommended", "geometry_dist": "cos"},
        ),
        objective=("EditLossObjectiveOptions", OBJECTIVE),
        run=("EditLossRunOptions", {**RUN, **(run or {}), "options": link("objective")}),
        train=(
            "EditLossTrainKontextLoRA",
            {
                **TRAIN, **values, "model": link("model"), "clip": link("model", 1), "vae": link("model", 2),
                "pairs": link("pairs"), "held_out": link("pairs", 1), "objective": link("mix"), "options": link("run"),
                **wired,
            },
        ),
        **nodes,
    )  # fmt: skip


def sampled(model: list[Any], key: str) -> dict[str, Any]:
    """One picture of a model by the stock sampler, as ``key``."""
    return graph(
        **{
            f"{key}_text": ("CLIPTextEncode", {"clip": link("model", 1), "text": "replace the chair with my stool"}),
            f"{key}_pixels": ("VAEEncode", {"pixels": link("pairs", 2), "vae": link("model", 2)}),
            f"{key}_wanted": ("ReferenceLatent", {"conditioning": link(f"{key}_text"), "latent": link(f"{key}_pixels")}),
            f"{key}_empty": ("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 1}),
            f"{key}_sampler": (
                "KSampler",
                {
                    "model": model, "positive": link(f"{key}_wanted"), "negative": link(f"{key}_text"),
                    "latent_image": link(f"{key}_empty"), "seed": 3, "steps": 4, "cfg": 1.0, "sampler_name": "euler",
                    "scheduler": "simple", "denoise": 1.0,
                },
            ),
            f"{key}_decoded": ("VAEDecode", {"samples": link(f"{key}_sampler"), "vae": link("model", 2)}),
            key: ("PreviewImage", {"images": link(f"{key}_decoded")}),
        }
    )  # fmt: skip


def pixels(client: Client, shown: dict[str, Any]) -> torch.Tensor:
    image = Image.open(io.BytesIO(client.download(shown["images"][0]))).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).float()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check → traceback, empty where it passed."""
    return run_driver("driver_training.py", tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_comfyui(name: str, results: dict[str, str]) -> None:
    check_passed(name, results)


def run_folder(server: ComfyServer, name: str) -> Path:
    return server.output_dir / "editloss" / "runs" / name


def test_a_run_its_files_and_every_node_behind_it(client: Client, comfyui_server: ComfyServer) -> None:
    prompt = {
        **training(name="whole"),
        **graph(
            save=("EditLossSaveLoRA", {"run": link("train", 4), "file_name": "editloss/whole", "dtype": "fp32"}),
            plot=("EditLossPlotLosses", {"run": link("train", 4)}),
            compare=("EditLossCompare", {"run": link("train", 4)}),
            report=("EditLossRunReport", {"run": link("train", 4)}),
            lora_alone=("PreviewImage", {"images": link("compare", 3)}),
            page=("PreviewAny", {"source": link("report", 2)}),
            judge=(
                "EditLossDemoJudge",
                {
                    "base": link("model"), "trained": link("train"), "clip": link("model", 1), "vae": link("model", 2),
                    "count": 3, "steps": 2, "seed": 0,
                },
            ),
            values=("PreviewAny", {"source": link("plot", 2)}),
            stock_plot=("LossGraphNode", {"loss": link("train", 2), "filename_prefix": "loss"}),
            stock_save=("SaveLoRA", {"lora": link("train", 1), "prefix": "loras/stock", "steps": link("train", 3)}),
            stock_load=("LoraModelLoader", {"model": link("model"), "lora": link("train", 1), "strength_model": 1.0, "bypass": False}),
        ),
        **sampled(link("model"), "base"),
        **sampled(link("train"), "memory"),
        **sampled(link("stock_load"), "stock"),
    }  # fmt: skip
    outputs = client.run(prompt).outputs
    for node in ("plot", "compare", "report", "judge", "pairs", "stock_plot"):
        picture = pixels(client, outputs[node])
        assert picture.std() > 5, node
    (shown,) = outputs["lora_alone"]["images"]
    assert Image.open(io.BytesIO(client.download(shown))).size == (128, 128)
    by_level = json.loads(outputs["values"]["text"][0])
    assert len(by_level) == 5 and sum(bucket["samples"] for bucket in by_level) == 4 * 2
    assert "| base | 3 |" in outputs["judge"]["text"][0] and "source copied" in outputs["judge"]["text"][0]

    folder = run_folder(comfyui_server, "whole")
    page = Path(outputs["page"]["text"][0])
    assert page.as_posix() == "output/editloss/runs/whole/report.html"
    assert "</html>" in (folder / page.name).read_text(encoding="utf-8")
    assert [p.stem for p in checkpoints(folder / "checkpoints")] == ["step_000002", "step_000004"]
    log = RunLog.read(folder)
    assert [s.step for s in log.steps] == [1, 2, 3, 4] and [v.step for v in log.validations] == [2, 4]
    assert set(log.terms) == {"velocity", "no edit identity", "geometry match", "overlay avoidance"}
    assert log.steps[0].samples[0].terms["geometry match"].gradient > 0

    file = comfyui_server.models_dir / "loras" / "editloss" / "whole.safetensors"
    with safe_open(file, framework="pt") as lora:
        metadata, keys = lora.metadata(), list(lora.keys())
    assert json.loads(metadata["editloss_objective"])[0]["kind"] == "no_edit_identity"
    assert json.loads(metadata["editloss_settings"])["steps"] == 4
    assert any(k.endswith(".alpha") for k in keys)

    # What the stock loader makes of the file is what was trained, and what is in memory.
    loaded = {
        **training(name="whole"),
        **graph(
            lora=(
                "LoraLoaderModelOnly",
                {"model": link("model"), "lora_name": "editloss/whole.safetensors", "strength_model": 1.0},
            )
        ),
        **sampled(link("lora"), "file"),
    }
    del loaded["train"]
    from_file = pixels(client, client.run(loaded).outputs["file"])
    base, memory, stock = (pixels(client, outputs[key]) for key in ("base", "memory", "stock"))
    assert (base - memory).abs().max() > 2, "the LoRA changes nothing"
    for picture in (stock, from_file):
        assert (picture - memory).abs().max() <= 1
    assert list((comfyui_server.output_dir / "loras").glob("stock_4_steps_*.safetensors"))


def test_cancel_is_obeyed_within_a_step_and_resume_ends_where_the_whole_run_does(
    client: Client, comfyui_server: ComfyServer
) -> None:
    options = {"checkpoint_every": 1000, "validate_every": 0}
    show = graph(show=("PreviewAny", {"source": link("train", 3)}))
    client.run({**training(options, name="uninterrupted", steps=12), **show})

    seen: list[float] = []

    def press(progress: Any) -> None:
        if progress.node_id == "train" and progress.max == 1000:
            seen.append(progress.value)
            if progress.value >= 3:
                client.interrupt()

    with pytest.raises(ComfyError, match="interrupted"):
        client.run({**training(options, name="cancelled", steps=1000), **show}, press)
    (kept,) = checkpoints(run_folder(comfyui_server, "cancelled") / "checkpoints")
    done = Checkpoint.load(kept).step
    assert 3 <= done <= max(seen) + 2 < 12

    resumed = training(options, name="ignored", steps=12, resume={"run": "cancelled", "step": 0})
    resumed.update(graph(stock_plot=("LossGraphNode", {"loss": link("train", 2), "filename_prefix": "loss"})))
    outputs = client.run({**resumed, **show}).outputs
    assert outputs["show"]["text"] == ["12"] and outputs["stock_plot"]["images"]
    whole, again = (
        Checkpoint.load(checkpoints(run_folder(comfyui_server, name) / "checkpoints")[-1])
        for name in ("uninterrupted", "cancelled")
    )
    assert whole.step == again.step == 12
    for name, tensor in whole.lora.items():
        assert torch.equal(tensor, again.lora[name]), name
    for parameter, state in whole.optimizer["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, again.optimizer["state"][parameter][name]), (parameter, name)
    logs = [RunLog.read(run_folder(comfyui_server, name)).steps for name in ("uninterrupted", "cancelled")]
    assert [s.loss for s in logs[0]] == [s.loss for s in logs[1]] and len(logs[1]) == 12


def test_a_name_that_is_taken_gets_a_number_and_the_cache_is_used(client: Client, comfyui_server: ComfyServer) -> None:
    show = graph(show=("PreviewAny", {"source": link("train", 3)}))
    client.run({**training(name="twice", steps=1), **show})
    cache = comfyui_server.output_dir / "editloss" / "cache"
    files = {p: p.stat().st_ino for p in cache.rglob("*.safetensors")}
    assert files
    client.run({**training(name="twice", steps=2), **show})
    assert {p: p.stat().st_ino for p in cache.rglob("*.safetensors")} == files
    assert checkpoints(run_folder(comfyui_server, "twice_2") / "checkpoints")


def let_go(client: Client) -> None:
    """ComfyUI forgets all outputs: it looks at what was asked of it when a prompt has ended."""
    client.call("/free", {"free_memory": True})
    client.run(graph(other=("PreviewAny", {"source": "something else"})))


def test_a_run_that_has_ended_is_not_trained_again_when_its_outputs_were_let_go_of(
    client: Client, comfyui_server: ComfyServer
) -> None:
    def asked(width: int, **values: Any) -> dict[str, Any]:
        return {
            **training(name="once", steps=2, **values),
            **graph(
                show=("PreviewAny", {"source": link("train", 3)}),
                plot=("EditLossPlotLosses", {"run": link("train", 4), "width": width}),
                save=("EditLossSaveLoRA", {"run": link("train", 4), "file_name": "let go", "dtype": "fp32"}),
            ),
        }

    (said,) = client.run(asked(640)).outputs["train"]["said"]
    assert said.startswith("2 steps, kept in output/editloss/runs/once") and "not trained again" not in said
    folder = run_folder(comfyui_server, "once")
    last = checkpoints(folder / "checkpoints")[-1]
    written = last.stat().st_mtime_ns

    let_go(client)
    found = client.run(asked(800)).outputs
    (said,) = found["train"]["said"]
    assert said.startswith("2 steps, kept in output/editloss/runs/once\n") and "not trained again" in said
    assert last.stat().st_mtime_ns == written and not folder.with_name("once_2").exists()
    assert found["show"]["text"] == ["2"] and found["plot"]["images"]
    one, two = (comfyui_server.models_dir / "loras" / f"let go{n}.safetensors" for n in ("", "_2"))
    assert one.read_bytes() == two.read_bytes()

    (said,) = client.run(asked(800, seed=1)).outputs["train"]["said"]
    assert "not trained again" not in said and folder.with_name("once_2").is_dir()
    let_go(client)
    shutil.rmtree(folder.with_name("once_2"))  # who deletes a run wants another
    (said,) = client.run(asked(800, seed=1)).outputs["train"]["said"]
    assert "not trained again" not in said and folder.with_name("once_2").is_dir()


def test_pairs_from_a_folder(client: Client, comfyui_server: ComfyServer) -> None:
    folder = comfyui_server.input_dir / "my pairs"
    names = write_folder(stool_pairs(3), folder)
    for path in [p for part in folder.iterdir() for p in part.iterdir() if p.stem == names[2]]:
        path.rename(path.with_stem(os.fsdecode("凳子".encode("gbk"))))  # as an archive from a Chinese Windows unpacks
    (folder / "before" / "IMG_1.jxl").write_bytes(b"not read here")
    load = {"folder": "my pairs", "resolution": 128}
    prompt = {**training(steps=1, name="folder", hold_out=1), **graph(load=("EditLossLoadPairs", load))}
    prompt["train"]["inputs"].update(pairs=link("load"))
    del prompt["train"]["inputs"]["held_out"]
    prompt.update(graph(show=("PreviewAny", {"source": link("train", 3)})))
    outputs = client.run(prompt).outputs
    assert "3 pairs" in outputs["load"]["text"][0] and "3 with a mask" in outputs["load"]["text"][0]
    assert pixels(client, outputs["load"]).std() > 5
    said = outputs["load"]["said"][0]
    assert "- passed over (JXL needs the package pillow-jxl-plugin; or save it as PNG): before/IMG_1.jxl" in said
    assert (
        r"- names that are not UTF-8, or have control characters, are written with \x: after/\xb5\xca\xd7\xd3.png"
        in said
    )
    audit = graph(audit=("EditLossAuditPairs", {"folder": "my pairs"}))
    found = client.run(audit).outputs["audit"]
    assert found["said"][0].startswith("3 pairs") and r"| \xb5\xca\xd7\xd3 |" in found["text"][0]

    (folder / "before" / f"{names[0]}.png").unlink()
    (folder / "mask" / f"{names[1]}.png").write_bytes(b"not a picture")
    with pytest.raises(NodeError) as caught:
        client.run(prompt)
    assert caught.value.node_id == "load"
    assert names[0] in caught.value.message and names[1] in caught.value.message


def test_variants_of_pairs_are_trained_on_and_held_out_pairs_have_none(
    client: Client, comfyui_server: ComfyServer
) -> None:
    settings = {"count": 3, "flip": True, "shift": 0.25, "zoom": 1.14, "turn": 2.0, "tone": 0.05, "seed": 0}
    prompt = training({"validate_every": 3, "previews": 4, "preview_steps": 1}, steps=3, name="variants", hold_out=2)
    prompt["train"]["inputs"].update(pairs=link("variants"))
    del prompt["train"]["inputs"]["held_out"]
    prompt.update(
        graph(
            variants=("EditLossPairVariants", {**settings, "pairs": link("pairs")}),
            report=("PreviewAny", {"source": link("variants", 1)}),
            compare=("EditLossCompare", {"run": link("train", 4)}),
        )
    )  # fmt: skip
    outputs = client.run(prompt).outputs
    said = "4 pairs × 3 = 12; latents and masks take about 1 MB of memory and 1 MB of the cache's disk"
    assert outputs["report"]["text"] == [said] and outputs["variants"]["said"] == [said]
    shown = pixels(client, outputs["variants"])
    assert shown.shape[0] > 6 * 128 and shown.shape[1] > 3 * 128 and shown.std() > 5
    log = RunLog.read(comfyui_server.output_dir / "editloss" / "runs" / "variants")
    trained = sorted(sample.pair for step in log.steps for sample in step.samples)
    own = {name.split(" ~")[0] for name in trained}
    assert len(own) == 2 and trained == sorted(f"{name}{end}" for name in own for end in ("", " ~1", " ~2"))
    watched = {picture.pair for picture in log.validations[-1].pictures}
    assert len(watched) == 2 and not any(" ~" in name for name in watched) and not own & watched


def test_flawed_pairs_are_left_out_kept_or_stopped_at(client: Client, comfyui_server: ComfyServer) -> None:
    folder = comfyui_server.input_dir / "flawed pairs"
    *right, one, two = stool_pairs(7)
    names = write_folder([*right, flawed(one, "unedited"), flawed(two, "overlaid")], folder)
    load = {"folder": "flawed pairs", "resolution": 128}

    def said(**values: str) -> dict:
        return client.run(graph(load=("EditLossLoadPairs", {**load, **values}))).outputs["load"]

    left_out = said()
    text = left_out["said"][0]
    assert text.startswith("5 pairs") and "2 of 7 pairs are flawed, and left out." in text
    assert f"{names[5]}: nothing was edited (" in text and f"{names[6]}: the old object is still there (" in text
    kept = said(flawed="keep")
    assert kept["said"][0].startswith("7 pairs") and "2 of 7 pairs are flawed, and kept as asked." in kept["said"][0]
    assert pixels(client, left_out).shape[0] > 7 * 128  # all seven are shown, the flawed ones marked
    with pytest.raises(NodeError) as caught:
        said(flawed="stop")
    assert caught.value.node_id == "load" and f"{names[6]}: the old object is still there" in caught.value.message

    demo = {"count": 5, "unedited": 1, "overlaid": 1, "held_out": 1, "seed": 0}
    outputs = client.run(graph(pairs=("EditLossDemoPairs", demo))).outputs["pairs"]
    assert outputs["said"][0].startswith("5 pairs") and "2 of 7 pairs are flawed, and left out." in outputs["said"][0]


def test_pairs_from_pictures_in_the_graph(client: Client) -> None:
    prompt = training(steps=1, name="made")
    prompt.update(
        graph(
            made=(
                "EditLossMakePairs",
                {
                    "before": link("pairs", 2), "after": link("pairs", 3), "resolution": 128,
                    "captions": "replace the chair with my stool",
                },
            ),
            show=("PreviewAny", {"source": link("train", 3)}),
        )
    )  # fmt: skip
    prompt["train"]["inputs"].update(pairs=link("made"))
    outputs = client.run(prompt).outputs
    assert outputs["show"]["text"] == ["1"] and "1 pairs" in outputs["made"]["text"][0]


def test_further_references_of_a_folder_are_shown_beside_the_before_picture(
    client: Client, comfyui_server: ComfyServer
) -> None:
    folder = comfyui_server.input_dir / "two references"
    names = write_folder(stool_pairs(2), folder)
    load = graph(load=("EditLossLoadPairs", {"folder": folder.name, "resolution": 128}))
    (folder / "before_2").mkdir()
    Image.new("RGB", (64, 96), (255, 0, 0)).save(folder / "before_2" / f"{names[0]}.png")  # the other pair has none
    outputs = client.run(load).outputs["load"]
    shown = pixels(client, outputs)
    assert "- 1 with further references" in outputs["text"][0]
    quarter = shown.shape[1] // 4
    red = ((shown[..., 0] > 240) & (shown[..., 1:].amax(-1) < 15)).float()
    assert [part.mean() > 0.1 for part in red.split(quarter, 1)[:4]] == [False, True, False, False], (
        "the second of four"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"hold_out": 4, "held_out": None}, "hold_out: expected 0 to 3"),
        ({"name": "../elsewhere"}, "name: expected a name"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(
    change: dict[str, Any], message: str, client: Client, comfyui_server: ComfyServer
) -> None:
    prompt = {**training(name="refused"), **graph(show=("PreviewAny", {"source": link("train", 3)}))}
    prompt["pairs"]["inputs"]["seed"] = 7  # rooms that no other test has prepared
    cache = comfyui_server.output_dir / "editloss" / "cache"
    before = set(cache.rglob("*"))
    prompt["train"]["inputs"].update(change)
    prompt["train"]["inputs"] = {k: v for k, v in prompt["train"]["inputs"].items() if v is not None}
    with pytest.raises(ComfyError, match=message):
        client.run(prompt)
    assert not run_folder(comfyui_server, "refused").exists()
    assert set(cache.rglob("*")) == before, "pairs were prepared"


def test_a_checkpoint_of_another_lora_is_refused_before_any_work(client: Client, comfyui_server: ComfyServer) -> None:
    show = graph(show=("PreviewAny", {"source": link("train", 3)}))
    client.run({**training(name="rank 4", steps=1), **show})
    prompt = {**training(resume={"run": "rank 4", "step": 0}, rank=8), **show}
    prompt["pairs"]["inputs"]["seed"] = 8  # rooms that no other test has prepared
    cache = comfyui_server.output_dir / "editloss" / "cache"
    before = set(cache.rglob("*"))
    with pytest.raises(ComfyError, match="its lora is .*'rank': 4.* this run's is .*'rank': 8"):
        client.run(prompt)
    assert set(cache.rglob("*")) == before, "pairs were prepared"


def test_a_gate_and_a_loss_on_pictures_through_the_decoded_crop(client: Client, comfyui_server: ComfyServer) -> None:
    from small_models import CLIP, CLIP_FILE, write_models

    write_models(comfyui_server.models_dir, comfyui_server.output_dir)
    prompt = training(name="gated", steps=3)
    prompt.update(
        graph(
            gate=("EditLossGateTerms", {"objective": link("mix"), "terms": "geometry*", "t_min": 0.999, "t_max": 1.0}),
            clip_encoder=("EditLossOpenCLIPEncoder", {"architecture": CLIP, "weights": CLIP_FILE, "output": "tokens"}),
            pictures=(
                "EditLossFeatureMatch",
                {
                    "encoder": link("clip_encoder"), "objective": link("gate"), "weight": 0.1, "anchor": "pred",
                    "positive": "gt", "dist": "cos",
                },
            ),
            show=("PreviewAny", {"source": link("train", 3)}),
        )
    )  # fmt: skip
    prompt["train"]["inputs"]["objective"] = link("pictures")
    began = time.monotonic()
    client.run(prompt)
    assert time.monotonic() - began < 120
    log = RunLog.read(run_folder(comfyui_server, "gated"))
    assert "feature match" in log.terms
    assert "geometry match" not in log.terms, "no noise level lies in its gate"
    gradients = [s.terms["feature match"].gradient for step in log.steps for s in step.samples]
    assert [g is None for g in gradients] == [False] * 2 + [True] * 2 + [False] * 2, "measured at every other step"
    assert all(g is None or g > 0 for g in gradients)


def test_what_a_node_says_stands_on_it_in_the_page(page: Any) -> None:
    """As plain text, and again when ComfyUI has the result and does not run the node."""
    caption = "replace the <b>chair</b> & keep the rest"
    prompt = graph(
        **{
            "1": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 0}),
            "2": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 0x408040}),
            "3": (
                "EditLossMakePairs",
                {"before": link("1"), "after": link("2"), "captions": caption, "resolution": 64, "upscale": False},
            ),
        }
    )
    page.locator(".p-blockui-mask").wait_for(state="detached", timeout=60_000)
    said = page.locator(".editloss-said")
    for _ in range(2):
        page.evaluate("window.app.nodeOutputs = {}")  # with which newer pages fill a graph of the same nodes at once
        page.evaluate("prompt => window.app.loadApiJson(prompt, 'pairs')", prompt)
        assert said.count() == 0
        page.evaluate("window.app.queuePrompt(0)")
        said.wait_for(state="visible", timeout=60_000)
        assert "1 pairs; 0 with a mask" in said.inner_text() and "64×64: 1 pairs" in said.inner_text()
        assert caption in said.inner_text() and said.locator("b").count() == 0, "a caption is taken for HTML"
    assert page.errors == []
