"""What a person does with the nodes in the page, in the frontend that ComfyUI 0.3.75 asks for and in the newest one: find,
add, read the help, wire, look.

The newest frontend is made for a newer ComfyUI than the one behind it here. Nothing of the pack is left out because of that;
only the search words that a newer ComfyUI sends with the nodes are put into its answer (``open_page``).
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from frontends import LINKS, SearchBox, add, check_whole, clear, click_title, drop, finished, images_in_help, wire
from helpers import graph, link
from PIL import Image
from runner.client import Client

from editloss_core.runs.checkpoint import Checkpoint, checkpoints
from editloss_core.runs.log import RunLog

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PACK = "comfyui-editloss"
SET_WIDGETS = """changes => window.app.graph.nodes.forEach(node => Object.entries(changes[node.type] ?? {}).forEach(
    ([name, value]) => { node.widgets.find(widget => widget.name === name).value = value; }))"""
NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))

# What people type → the nodes that they must see, without EditLoss in front of the ids, and among how many.
FOUND_BY = {
    "no edit": ({"NoEditIdentity"}, 1),
    "overlay": ({"OverlayAvoidance", "OverlayNegative"}, 3),  # ComfyUI 0.33.0 has a Draw Text Overlay
    "double object": ({"OverlayAvoidance"}, 2),
    "ghost": ({"OverlayAvoidance"}, 2),
    "distorted": ({"GeometryMatch"}, 2),
    "DINO": ({"TimmEncoder"}, 2),
    "DINOv3": ({"TimmEncoder"}, 1),
    "CLIP encoder": ({"OpenCLIPEncoder", "CLIPVisionEncoder"}, 3),
    "CLIP": ({"OpenCLIPEncoder", "CLIPVisionEncoder"}, 30),  # after what ComfyUI itself calls CLIP
    "SigLIP": ({"OpenCLIPEncoder"}, 2),
    "VAE latents": ({"VAEEncoder"}, 1),
    "triplet": ({"Triplet"}, 1),
    "InfoNCE": ({"InfoNCE"}, 1),
    "contrastive": ({"Contrastive"}, 1),
    "margin": ({"Triplet", "MarginRanking"}, 3),
    "Kontext": ({"TrainKontextLoRA"}, 6),
    "train LoRA": ({"TrainKontextLoRA"}, 3),
    "LoRA": ({"TrainKontextLoRA", "SaveLoRA", "LoRAOptions"}, 18),  # 0.33.0 has more of its own
    "mask": ({"EstimateMask"}, 24),  # and here
    "edit mask": ({"EstimateMask"}, 1),
    "verdict": ({"DiagnoseOutputs"}, 2),
    "diagnose": ({"DiagnoseOutputs"}, 1),
    "before after": ({"LoadPairs"}, 2),
    "pairs": ({"LoadPairs", "MakePairs", "AuditPairs"}, 5),
    "audit": ({"AuditPairs", "AuditEncoders"}, 2),
    "hard negative": ({"StoreHardNegative", "DrawHardNegative"}, 3),
    "embeddings": ({"SaveEmbeddings", "LoadEmbeddings"}, 3),
    "loss curve": ({"PlotLosses"}, 2),
    "resume": ({"ResumeTraining"}, 1),
    "preset": ({"RecommendedMix"}, 1),
    "demo": ({"DemoModel", "DemoPairs"}, 3),
}
# These words stand in no display name, so they are found where the server sends search words.
FOUND_BY_SEARCH_WORDS = {
    "ghosting": ({"OverlayAvoidance"}, 2),
    "unchanged": ({"NoEditIdentity"}, 1),
    "distortion": ({"GeometryMatch"}, 2),
    "heatmap": ({"EvaluateObjective", "DiagnoseOutputs"}, 2),
    "metric learning": ({"Triplet", "Contrastive", "InfoNCE"}, 6),
    "timestep sampling": ({"NoiseOptions"}, 2),
    "Kontext": ({"TrainKontextLoRA"}, 6),
    "FLUX.2": ({"TrainKontextLoRA"}, 12),  # 0.33.0 has nodes of its own for it
    "Qwen Image Edit": ({"TrainKontextLoRA"}, 6),
    "Qwen-Image-Edit": ({"TrainKontextLoRA"}, 6),
    "LongCat": ({"TrainKontextLoRA"}, 12),
    "OmniGen2": ({"TrainKontextLoRA"}, 12),
    "learning rate": ({"TrainKontextLoRA", "OptimizerOptions"}, 2),
    "dataset": ({"LoadPairs", "MakePairs"}, 15),
    "perceptual": ({"FeatureMatch"}, 2),
    "ConvNeXt": ({"TimmEncoder"}, 8),
    "no change": ({"NoEditIdentity", "DiagnoseOutputs", "AuditPairs"}, 6),
    "double": ({"OverlayAvoidance", "OverlayNegative", "DiagnoseOutputs"}, 8),
    "ghost": ({"OverlayAvoidance", "OverlayNegative", "DiagnoseOutputs"}, 4),
    "background changed": ({"DiagnoseOutputs"}, 2),
    "shift": ({"DiagnoseOutputs", "AuditPairs"}, 12),
    "offset": ({"DiagnoseOutputs", "AuditPairs"}, 12),
    "zoom": ({"DiagnoseOutputs", "AuditPairs"}, 12),
    "when to stop": ({"RunReport"}, 2),
}


@pytest.fixture(scope="module")
def nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    """Id → definition of the pack's nodes."""
    return {name: info for name, info in object_info.items() if name.startswith("EditLoss")}


@pytest.fixture
def tab(shared_page: Page) -> Iterator[Page]:
    """The shared page with an empty canvas; a test must not leave an error in it."""
    shared_page.errors.clear()
    shared_page.locator(".p-blockui-mask").wait_for(state="detached", timeout=60_000)
    clear(shared_page)
    yield shared_page
    assert shared_page.errors == []


def test_the_search_box_finds_nodes_by_the_words_people_use(tab, nodes):
    box = SearchBox(tab)
    for words, (ids, first) in {**FOUND_BY, **(FOUND_BY_SEARCH_WORDS if tab.newest else {})}.items():
        box.type(words, [nodes[f"EditLoss{name}"]["display_name"] for name in sorted(ids)], first)
    box.press("Escape")


def test_every_node_is_added_from_the_search_box(tab, nodes):
    assert sorted(nodes) == NODES
    some = NODES[::4]  # all of them once is enough, and most in the newer page, which takes half the time
    for node_id in [n for n in NODES if n not in some] if tab.newest else some:
        box = SearchBox(tab)
        box.type(nodes[node_id]["display_name"], [nodes[node_id]["display_name"]], 1)
        box.press("Enter")
        tab.wait_for_function("window.app.graph.nodes.length === 1")
        if tab.evaluate("!!window.app.graph.nodes[0].flags.ghost"):  # it follows the mouse until it is put down
            tab.mouse.move(500, 400)
            tab.mouse.click(500, 400)
        added = tab.evaluate("window.app.graph.nodes.map(n => [n.type, n.title, !!n.flags.ghost])")
        assert added == [[node_id, nodes[node_id]["display_name"], False]]
        clear(tab)


def test_a_graph_is_wired_with_the_mouse_and_a_wrong_wire_is_refused(tab):
    encoder, loss = add(tab, "EditLossVAEEncoder", 120, 200), add(tab, "EditLossNoEditIdentity", 460, 200)
    evaluate, picture = add(tab, "EditLossEvaluateObjective", 820, 200), add(tab, "LoadImage", 120, 420)

    wire(tab, picture, "IMAGE", loss, "encoder")
    wire(tab, loss, "objective", encoder, "vae")
    assert tab.evaluate(LINKS) == [], "a picture is no encoder, and an objective no VAE"

    wire(tab, encoder, "encoder", loss, "encoder")
    wire(tab, loss, "objective", evaluate, "objective")
    linked = [[encoder, "encoder", loss, "encoder"], [loss, "objective", evaluate, "objective"]]
    assert tab.evaluate(LINKS) == linked


def test_the_template_browser_shows_the_example_graphs(tab):
    tab.get_by_role("button", name="Templates").first.click()
    browser = tab.get_by_role("dialog")
    browser.get_by_text(PACK).first.click()
    for name in (path.stem for path in WORKFLOWS):
        # A thumbnail is loaded when it comes into sight.
        browser.get_by_text(name, exact=True).first.evaluate("e => e.scrollIntoView({block: 'center'})")
        thumbnail = browser.get_by_alt_text(name, exact=True)
        tab.wait_for_function("e => e.complete && e.naturalWidth >= 600", arg=thumbnail.element_handle())
    thumbnail.click()
    tab.wait_for_function("window.app.graph.nodes.length > 0", timeout=60_000)


@pytest.mark.parametrize("shared_page", ["newest"], indirect=True)  # test_frontend.py does more in the other one
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_open_whole(path, tab, object_info):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    drop(tab, workflow, path.name)
    check_whole(
        tab,
        workflow,
        object_info,
        without_files={"UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoaderModelOnly"},
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_nodes_show_is_readable_on(theme, tab):
    """A node's picture brings its own background; its text must stand out from the theme's."""
    tab.evaluate("theme => window.app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
    said, picture = audited(tab)
    assert picture.convert("RGBA").getextrema()[3] == (255, 255), "the page's background shines through the picture"
    assert contrast(tab, said) >= 4.5


def test_what_a_node_says_comes_back_with_its_tab(tab):
    said, _ = audited(tab)
    text = said.inner_text()
    tab.get_by_role("button", name="Create a new blank workflow").click()
    said.wait_for(state="detached")
    tab.evaluate("window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    said.wait_for()
    assert said.inner_text() == text


@pytest.mark.parametrize("shared_page", ["newest"], indirect=True)
def test_nodes_show_text_and_picture_in_the_modern_node_design(tab):
    setting = "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    tab.evaluate(setting, True)
    try:
        shown = "width => [...document.querySelectorAll('[data-node-id] img')].some(e => e.naturalWidth === width)"
        tab.wait_for_function(shown, arg=audited(tab)[1].width)
    finally:
        tab.evaluate(setting, False)


def audited(tab: Page) -> tuple[Locator, Image.Image]:
    """Wire and run an audit of demo pairs; the text on the node, and its picture."""
    pairs, audit = add(tab, "EditLossDemoPairs", 120, 200), add(tab, "EditLossAuditPairs", 500, 200)
    wire(tab, pairs, "pairs", audit, "pairs")
    client = Client(tab.server.url)
    before = set(client.call("/history"))
    tab.get_by_role("button", name="Run", exact=True).first.click()
    outputs = finished(client, before)["outputs"][str(audit)]
    said = tab.locator(".editloss-said", has_text=outputs["said"][0].splitlines()[0])  # the pairs say something too
    said.wait_for()
    assert said.inner_text() == outputs["said"][0]
    return said, Image.open(io.BytesIO(client.download(outputs["images"][0])))


def test_every_help_page_opens_from_the_node(tab, nodes):
    """Select the node, press the ⓘ above it: the panel shows the page under its title, and its pictures are there."""
    text = tab.locator(".markdown-content, .comfy-markdown-content")
    for k, node_id in enumerate(NODES[:: 3 if tab.newest else 1]):
        clear(tab)
        click_title(tab, add(tab, node_id, 450 + 100 * (k % 2), 300))  # two clicks on one spot would be a double-click
        tab.get_by_test_id("info-button").click()
        text.locator("h1", has_text=nodes[node_id]["display_name"]).wait_for()
        assert text.locator("h1").inner_text() == nodes[node_id]["display_name"]
        pictures = text.locator("img")
        assert pictures.count() == images_in_help(node_id)
        for picture in pictures.all():
            picture.scroll_into_view_if_needed()
            tab.wait_for_function("e => e.complete && e.naturalWidth > 100", arg=picture.element_handle())


@pytest.mark.parametrize("shared_page", ["own"], indirect=True)  # a training takes too long to do it twice
def test_cancel_in_the_page_ends_training_and_keeps_what_was_learnt(tab):
    workflow = json.loads((ROOT / "workflows" / "train_demo.json").read_text(encoding="utf-8"))
    drop(tab, workflow, "train_demo.json")
    changes = {
        "EditLossTrainKontextLoRA": {"name": "cancelled_in_page", "steps": 100_000, "batch_size": 1},
        "EditLossRunOptions": {"validate_every": 0},
    }
    tab.evaluate(SET_WIDGETS, changes)
    client = Client(tab.server.url)
    before = set(client.call("/history"))
    tab.get_by_role("button", name="Run", exact=True).first.click()
    folder = tab.server.output_dir / "editloss" / "runs" / "cancelled_in_page"
    wait_for(lambda: (folder / "log.jsonl").is_file() and len(RunLog.read(folder).steps) >= 3)

    tab.get_by_role("button", name="Cancel current run").click()
    pressed = time.monotonic()
    history = finished(client, before, "error")
    assert time.monotonic() - pressed < 30
    assert "execution_interrupted" in [kind for kind, _ in history["status"]["messages"]]
    (kept,) = checkpoints(folder / "checkpoints")
    assert Checkpoint.load(kept).step >= 3
    next_one = graph(
        a=("EmptyImage", {"width": 8, "height": 8, "batch_size": 1, "color": 0}),
        b=("PreviewImage", {"images": link("a")}),
    )
    assert client.run(next_one).outputs["b"]["images"]


def wait_for(condition: Callable[[], bool], timeout: float = 300.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def contrast(tab: Page, text: Locator) -> float:
    """Ratio of luminances of letters and ground, from 1 to 21, as the Web Content Accessibility Guidelines define it."""
    shot = Image.open(io.BytesIO(tab.screenshot(clip=text.bounding_box()))).convert("RGB")
    colors = shot.getcolors(1 << 24)
    ground = luminance(max(colors)[1])
    letters = max((luminance(color) for _, color in colors), key=lambda light: abs(light - ground))
    light, dark = max(ground, letters), min(ground, letters)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: tuple[int, int, int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
