"""Each example graph as a person meets it: a fresh ComfyUI with nothing in ``input``, the graph opened from the template
browser, Run pressed, and what then stands on the nodes, on the canvas and with Nodes 2.0.

With EDITLOSS_UPDATE_PICTURES=1 the screenshots that are taken at the end become the thumbnails in workflows/ and the
pictures in docs/.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from frontends import DRAWN, FIT, check_whole, finished, open_page, open_template, overlapping
from PIL import Image

from editloss_core.objective import TERMS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
RENDERERS = {"canvas": False, "nodes 2.0": True}
LOADERS = {"UNETLoader", "DualCLIPLoader", "CLIPLoader", "VAELoader"}
NEEDS_A_DOWNLOAD = {"train_kontext_lora", "train_flux2_lora", "train_qwen_edit_lora"}  # opened and compared, not run
PICTURES = ROOT / "docs" / "pictures"
UPDATE = os.environ.get("EDITLOSS_UPDATE_PICTURES") == "1"

# Nodes that show a picture of at least this many pixels across.
PICTURE_NODES = {
    "EditLossEvaluateObjective": 1600,
    "EditLossDemoJudge": 1000,
    "EditLossPlotLosses": 1600,
    "EditLossCompare": 1000,
    "EditLossDemoPairs": 250,
    "EditLossExamplePictures": 500,
    "EditLossExamplePairs": 800,
    "EditLossDiagnoseOutputs": 1600,
    "EditLossAuditPairs": 1600,
    "EditLossAuditEncoders": 1600,
}
DESK = {"width": 2880, "height": 1620}
GLIMPSE = {"width": 320, "height": 180}  # a page that shows progress on the processor takes a third of its time


@pytest.fixture(scope="module")
def desk(browser, comfyui_server):
    """A page large enough to read a whole graph, with nothing of the page in front of it."""
    aside = comfyui_server.base / "input of other tests"
    comfyui_server.input_dir.rename(aside)
    comfyui_server.input_dir.mkdir()
    with open_page(browser, comfyui_server) as page:
        page.set_viewport_size(DESK)
        page.locator(".p-blockui-mask").wait_for(state="detached", timeout=60_000)
        page.server = comfyui_server
        yield page
    assert [
        p for p in comfyui_server.input_dir.rglob("*") if p.is_file()
    ] == []  # folders of ComfyUI's own are made there
    shutil.rmtree(comfyui_server.input_dir)
    aside.rename(comfyui_server.input_dir)


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_runs_as_it_is_opened(path, renderer, desk, client, object_info):
    """With Nodes 2.0 a graph runs right after its run on the canvas, so that ComfyUI still knows what it gave."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    modern = RENDERERS[renderer]
    if modern and "ImageCompare" not in object_info:
        pytest.skip("Nodes 2.0 are a trial in this frontend: ComfyUI has no node yet that needs them")
    if not modern:
        client.call("/free", {"free_memory": True})  # every graph runs in full, whatever ran before it
    desk.evaluate("on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", modern)
    open_template(desk, path.stem)
    check_whole(desk, workflow, object_info, without_files=LOADERS)

    by_id = {node["id"]: node["type"] for node in workflow["nodes"]}
    desk.evaluate(FIT)  # a node loads its picture when it is drawn, so all must be in sight
    if path.stem not in NEEDS_A_DOWNLOAD:
        before = set(client.call("/history"))
        desk.get_by_role("button", name="Run", exact=True).first.click()
        desk.set_viewport_size(GLIMPSE)
        outputs = finished(client, before)["outputs"]
        desk.set_viewport_size(DESK)
        shown = [n["id"] for n in workflow["nodes"] if n["type"] in PICTURE_NODES]
        for node in shown:
            picture = _picture(client, outputs[str(node)])
            assert picture.width >= PICTURE_NODES[by_id[node]] and len(picture.getcolors(1 << 24)) > 500
        _wait_for_pictures(desk, shown, modern)
        OUTCOMES[path.stem](client, outputs, workflow)
        if path.stem == "train_demo":
            _trained_is_shown(desk, outputs, workflow, modern)
    else:
        _missing_models_are_named(desk, workflow)
    assert desk.errors == []
    assert overlapping(desk) == []
    _screenshot(desk, path, UPDATE and not modern)


def _trained_is_shown(desk, outputs: dict, workflow: dict, modern: bool) -> None:
    """The failure table is a table, the LoRA lies among the user's own, and Nodes 2.0 compares base and LoRA with its slider."""
    (table,) = outputs[_node(workflow, "EditLossDemoJudge")]["text"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "---" not in line]
    shown = desk.locator(".editloss-said table tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    assert shown == cells
    loras = desk.server.models_dir / "loras" / "editloss"
    assert [path.name for path in loras.iterdir()] == ["demo_stool.safetensors"], "the pack's own counts as taken"
    if modern:
        rows = outputs[_node(workflow, "EditLossCompare")]["a_images"]
        node = desk.locator(f'[data-node-id="{_node(workflow, "EditLossCompare")}"]')
        sides = node.locator("img").evaluate_all(
            "images => images.map(e => new URL(e.src).searchParams.get('filename'))"
        )
        assert rows[0]["filename"] in sides


def _missing_models_are_named(desk, workflow: dict) -> None:
    """The page knows of each file that a loader names where to get it and where to put it."""
    offered = desk.evaluate("window.app.graph.nodes.flatMap(n => n.properties.models ?? [])")
    named = [v for n in workflow["nodes"] if n["type"] in LOADERS for v in n["widgets_values"] if ".safetensors" in v]
    assert [model["name"] for model in offered] == named and len(named) >= 3
    for model in offered:
        assert model["url"].startswith("https://") and model["url"].endswith(f"/{model['name']}")
        assert model["directory"] in ("diffusion_models", "text_encoders", "vae")


def _wait_for_pictures(desk, nodes: list[int], modern: bool) -> None:
    """Until every node shows the one picture that it made."""
    if modern:
        for node in nodes:
            desk.wait_for_function(
                """id => { window.app.canvas.setDirty(true, true);
                           return [...document.querySelectorAll(`[data-node-id="${id}"] img`)].some(e => e.naturalWidth >= 250); }""",
                arg=str(node),
            )
        return
    end = time.monotonic() + 20
    hanging: dict = {}
    while time.monotonic() < end:
        desk.evaluate(FIT)  # a picture is loaded when its node is drawn, and an idle page draws nothing
        hanging = desk.evaluate(
            "ids => Object.fromEntries(ids.map(id => [id, window.app.graph.getNodeById(id).imgs?.length ?? 0]))", nodes
        )
        if all(count == 1 for count in hanging.values()):
            return
        desk.wait_for_timeout(500)
    raise AssertionError(f"pictures on the nodes: {hanging}")


def _picture(client, shown: dict) -> Image.Image:
    (image,) = shown["images"]
    return Image.open(io.BytesIO(client.download(image))).convert("RGB")


def _node(workflow: dict, kind: str) -> str:
    (found,) = (str(n["id"]) for n in workflow["nodes"] if n["type"] == kind)
    return found


def _keep(client, outputs: dict, workflow: dict, kind: str, name: str) -> None:
    if UPDATE:
        _picture(client, outputs[_node(workflow, kind)]).save(PICTURES / f"{name}.webp", quality=85)


def _diagnosed(client, outputs: dict, workflow: dict) -> None:
    """The report names the failure of each output; what lies outside the mask is none of the losses' business."""
    (text,) = outputs[_node(workflow, "EditLossEvaluateObjective")]["text"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    signals = {row[0]: row[1] for row in rows if row[0].isdigit()}
    assert list(signals.values()) == ["no failure signal", "NO EDIT", "OVERLAY", "DISTORTED", "no failure signal"]
    _keep(client, outputs, workflow, "EditLossEvaluateObjective", "report")


def _stool_learnt(client, outputs: dict, workflow: dict) -> None:
    """The demo: the base does not edit or misshapes; the trained model puts the stool there in most rooms."""
    (table,) = outputs[_node(workflow, "EditLossDemoJudge")]["text"]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = {line[0]: dict(zip(head, line)) for line in lines}

    def share(row: str, verdict: str) -> float:
        return float(rows[row][verdict].split("%")[0])

    assert share("source copied", "no edit") == 100
    assert share("target through the VAE", "good") >= 90, table
    assert share("base", "no edit") >= 50 and share("base", "good") == 0, table
    assert share("with the LoRA", "good") >= 25, table
    assert share("with the LoRA", "no edit") <= 2 and share("with the LoRA", "overlay") <= 12, table
    assert float(rows["base"]["progress"]) < 0.4 and float(rows["with the LoRA"]["progress"]) > 0.7, table
    assert float(rows["with the LoRA"]["old left"]) < 0.2 < float(rows["base"]["old left"]), table
    for kind, name in (("Judge", "demo_verdicts"), ("Plot", "demo_losses")):
        kind = {"Judge": "EditLossDemoJudge", "Plot": "EditLossPlotLosses"}[kind]
        _keep(client, outputs, workflow, kind, name)


def _lora_applied(client, outputs: dict, workflow: dict) -> None:
    """The LoRA that train_demo saved makes another picture of the same noise, and one that is nearer to the stool."""
    by_title = {n.get("title"): str(n["id"]) for n in workflow["nodes"]}
    names = ("Picture of the base", "Picture with the LoRA", "What it should be")
    base, lora, after = (np.asarray(_picture(client, outputs[by_title[name]])).astype(float) for name in names)
    assert np.square(lora - after).mean() < 0.8 * np.square(base - after).mean()


def _told_apart(client, outputs: dict, workflow: dict) -> None:
    """Every kind of output gets its own verdict."""
    (text,) = outputs[_node(workflow, "EditLossDiagnoseOutputs")]["text"]
    verdicts = ("good", "no edit", "overlay", "distorted", "collateral change")
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    for row, verdict in zip(rows, verdicts):
        assert verdict in row.split("|")[2], text
    _keep(client, outputs, workflow, "EditLossDiagnoseOutputs", "verdicts")


def _mistakes_found(client, outputs: dict, workflow: dict) -> None:
    (text,) = outputs[_node(workflow, "EditLossAuditPairs")]["text"]
    for mistake in ("not_edited", "shifted", "mask_elsewhere", "twice"):
        assert mistake in text
    _keep(client, outputs, workflow, "EditLossAuditPairs", "audit_pairs")


def _encoders_compared(client, outputs: dict, workflow: dict) -> None:
    (text,) = outputs[_node(workflow, "EditLossAuditEncoders")]["text"]
    assert "vae/taesd" in text and "AUROC" in text
    for term in ("no_edit_identity", "geometry_match", "overlay_avoidance"):
        assert term in text
    _keep(client, outputs, workflow, "EditLossAuditEncoders", "audit_encoders")


def _all_evaluated(client, outputs: dict, workflow: dict) -> None:
    (text,) = outputs[_node(workflow, "EditLossEvaluateObjective")]["text"]
    assert f"{len(TERMS)} terms" in text


OUTCOMES = {
    "all_losses": _all_evaluated,
    "apply_lora": _lora_applied,
    "audit_encoders": _encoders_compared,
    "audit_pairs": _mistakes_found,
    "diagnose_edit": _diagnosed,
    "diagnose_outputs": _told_apart,
    "train_demo": _stool_learnt,
}


def _screenshot(desk, path: Path, keep: bool) -> None:
    box = desk.evaluate(FIT)
    if keep:
        desk.mouse.move(1440, 1610)  # from the button that was pressed, whose tooltip would be in the picture
        desk.get_by_text("job completed").wait_for(state="hidden", timeout=60_000)
        desk.wait_for_timeout(2500)  # everything is drawn sharp
    desk.evaluate(f"async () => {{ {DRAWN} }}")
    shot = Image.open(io.BytesIO(desk.screenshot())).convert("RGB")
    graph = shot.crop((int(box[0]) - 12, int(box[1]) - 12, int(box[2]) + 12, int(box[3]) + 12))
    assert len(graph.getcolors(1 << 24)) > 5000, "the canvas is blank"
    if keep:
        small = graph.resize((1440, round(1440 * graph.height / graph.width)), Image.Resampling.LANCZOS)
        small.save(path.with_suffix(".jpg"), quality=85, optimize=True)
        graph.save(PICTURES / f"workflow_{path.stem}.webp", quality=80)
