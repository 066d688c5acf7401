"""The picture on every help page: the node as the frontend draws it, wired to the nodes that it is mostly used with.

Neighbours come from the example graphs, or for nodes that are in none of them from the few lines of ``OTHERS``. They are
folded to their titles, so that the letters stay large enough in the narrow panel that shows the page.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from helpers import graph, link
from PIL import Image
from runner.ui_to_api import to_prompt

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "web" / "docs" / "pictures"
DESCRIBED = Path(__file__).with_name("node_pictures.json")  # what each picture shows
MOST_BEHIND = 3  # neighbours that take the node's outputs
Prompt = dict[str, dict[str, Any]]

OTHERS = [
    graph(
        mix=("EditLossRecommendedMix",),
        gate=("EditLossGateTerms", {"objective": link("mix")}),
        train=("EditLossTrainKontextLoRA", {"objective": link("gate")}),
    ),
    graph(
        vision=("CLIPVisionLoader",),
        encoder=("EditLossCLIPVisionEncoder", {"clip_vision": link("vision")}),
        embed=("EditLossEncode", {"encoder": link("encoder")}),
        loss=("EditLossGeometryMatch", {"encoder": link("encoder")}),
    ),
    graph(
        model=("UNETLoader",),
        vae=("VAELoader",),
        text=("CLIPTextEncode",),
        encoder=(
            "EditLossDiffusionEncoder",
            {"model": link("model"), "vae": link("vae"), "conditioning": link("text")},
        ),
        loss=("EditLossGeometryMatch", {"encoder": link("encoder")}),
        audit=("EditLossAuditEncoders", {"encoder_1": link("encoder")}),
    ),
    graph(
        vae=("VAELoader",),
        encoder=("EditLossVAEDecoderEncoder", {"vae": link("vae")}),
        loss=("EditLossGeometryMatch", {"encoder": link("encoder")}),
        audit=("EditLossAuditEncoders", {"encoder_1": link("encoder")}),
    ),
    graph(
        encoder=("EditLossOpenCLIPEncoder", {"weights": "ViT-L-14.safetensors"}),
        embed=("EditLossEncode", {"encoder": link("encoder")}),
        loss=("EditLossNoEditIdentity", {"encoder": link("encoder")}),
    ),
    graph(
        encoder=("EditLossTimmEncoder",),
        before=("LoadImage",),
        after=("LoadImage",),
        saved=(
            "EditLossLoadEmbeddings",
            {"file": "my_edit [output]", "encoder": link("encoder"), "gt": link("after"), "src": link("before")},
        ),
        embed=("EditLossEncode", {"embeddings": link("saved")}),
        evaluate=("EditLossEvaluateObjective", {"embeddings": link("saved")}),
    ),
    graph(
        before=("LoadImage",),
        after=("LoadImage",),
        mask=("EditLossEstimateMask",),
        pairs=("EditLossMakePairs", {"before": link("before"), "after": link("after"), "mask": link("mask")}),
        train=("EditLossTrainKontextLoRA", {"pairs": link("pairs")}),
    ),
    graph(
        pairs=("EditLossLoadPairs",),
        variants=("EditLossPairVariants", {"pairs": link("pairs")}),
        train=("EditLossTrainKontextLoRA", {"pairs": link("variants")}),
        export=("EditLossExportTraining", {"pairs": link("variants")}),
        text=("PreviewAny", {"source": link("variants", 1)}),
    ),
    graph(
        pairs=("EditLossLoadPairs",),
        mix=("EditLossRecommendedMix",),
        run=("EditLossRunOptions",),
        export=(
            "EditLossExportTraining",
            {"pairs": link("pairs"), "objective": link("mix"), "options": link("run")},
        ),
        text=("PreviewAny", {"source": link("export")}),
    ),
    graph(
        model=("UNETLoader",),
        clip=("DualCLIPLoader",),
        vae=("VAELoader",),
        pairs=("EditLossLoadPairs",),
        mix=("EditLossRecommendedMix",),
        run=("EditLossRunOptions",),
        check=(
            "EditLossSelfCheck",
            {
                "model": link("model"),
                "clip": link("clip"),
                "vae": link("vae"),
                "pairs": link("pairs"),
                "objective": link("mix"),
                "options": link("run"),
            },
        ),
        text=("PreviewAny", {"source": link("check")}),
    ),
    graph(
        noise=("EditLossNoiseOptions",),
        lora=("EditLossLoRAOptions", {"options": link("noise")}),
        train=("EditLossTrainKontextLoRA", {"options": link("lora")}),
    ),
    graph(
        pairs=("EditLossLoadPairs",),
        mix=("EditLossRecommendedMix",),
        run=("EditLossRunOptions",),
        export=(
            "EditLossExportTraining",
            {"pairs": link("pairs"), "objective": link("mix"), "options": link("run")},
        ),
    ),
    graph(
        train=("EditLossTrainKontextLoRA",),
        report=("EditLossRunReport", {"run": link("train", 4)}),
        text=("PreviewAny", {"source": link("report", 2)}),
        point=("EditLossResumeTraining", {"run": "my_edit", "step": link("report", 3)}),
        longer=("EditLossTrainKontextLoRA", {"resume": link("point")}),
    ),
]

# The neighbours to the left and right of the middle node, folded, without anything else on the canvas.
ARRANGE = """async ([prompt, middle]) => {
    const {app} = window, gap = 30, row = 38, most = 20, title = LiteGraph.NODE_TITLE_HEIGHT;
    await app.loadApiJson(prompt, 'help');
    const graph = app.graph, node = graph.getNodeById(middle);
    const short = words => words.length <= most ? words : words.includes(': ') ? short(words.split(': ')[1])
        : words.slice(0, most + 1).split(' ').slice(0, -1).join(' ').replace(/ on$/, '');  // LiteGraph would cut within a word
    const context = app.canvas.ctx, size = node.computeSize();
    context.font = `${LiteGraph.NODE_TEXT_SIZE}px Arial`;
    node.setSize([Math.max(size[0], context.measureText(node.title).width + 60), size[1]]);
    for (const other of graph.nodes) {
        other.badges = [];  // the pack's folder name
        if (other === node) continue;
        other.title = short(other.title.split(' (')[0]);
        if (!other.flags.collapsed) other.collapse();
    }
    app.canvas.draw(true, true);
    const order = new Map();
    node.inputs.forEach((slot, i) => slot.link != null && !order.has(graph.links.get(slot.link).origin_id)
        && order.set(graph.links.get(slot.link).origin_id, i));
    const others = graph.nodes.filter(other => other !== node);
    const left = others.filter(other => order.has(other.id)).sort((a, b) => order.get(a.id) - order.get(b.id));
    const right = others.filter(other => !order.has(other.id));
    node.pos = [0, 0];
    const stack = (column, x) => {  // beside the slots, or lower where there are more than fit
        const first = Math.max(8, Math.min(28, (node.size[1] - title - (column.length - 1) * row) / 2));
        column.forEach((other, i) => other.pos = [x(other), first + i * row + title]);
        return column.length ? first + (column.length - 1) * row + title : 0;
    };
    const low = [stack(left, other => -gap - other._collapsed_width), stack(right, () => node.size[0] + gap)];
    const box = [Math.min(0, ...left.map(other => other.pos[0])), -title,
                 Math.max(node.size[0], ...right.map(other => other.pos[0] + other._collapsed_width)),
                 Math.max(node.size[1], ...low)];
    app.canvas.ds.scale = %(scale)s;
    const room = Math.max(0, %(least)s / app.canvas.ds.scale - (box[2] - box[0])) / 2;
    box[0] -= room;
    box[2] += room;
    app.canvas.ds.offset = [%(left)s / app.canvas.ds.scale - box[0], %(top)s / app.canvas.ds.scale - box[1]];
    app.canvas.deselectAll();
    app.canvas.setDirty(true, true);
    app.canvas.draw(true, true);
    return [box[2] - box[0], box[3] - box[1]].map(v => v * app.canvas.ds.scale);
}"""
# Zoom; the least width, so that letters are of one size on all pages; where on the page; what is left around the nodes.
SCALE, LEAST, LEFT, TOP, EDGE = 1.5, 800, 140, 130, 12


def neighbourhoods(object_info: dict[str, Any]) -> dict[str, Prompt]:
    """Node id → a prompt of that node, called "node", and its neighbours: where it has the most neighbours before it, and wires to this pack."""
    graphs = [
        to_prompt(json.loads(p.read_text("utf-8")), object_info) for p in sorted((ROOT / "workflows").glob("*.json"))
    ]
    found: dict[str, tuple[tuple[int, int], Prompt]] = {}
    for prompt in [*graphs, *OTHERS]:
        for name, entry in prompt.items():
            if _is_ours(entry):
                around = _around(prompt, name)
                ends = [(around[v[0]], e) for e in around.values() for v in e["inputs"].values() if is_link(v)]
                before = sum(other.startswith("before") for other in around)
                rank = (before, sum(_is_ours(a) and _is_ours(b) for a, b in ends))
                if entry["class_type"] not in found or rank > found[entry["class_type"]][0]:
                    found[entry["class_type"]] = (rank, around)
    return {kind: around for kind, (_, around) in sorted(found.items())}


def _around(prompt: Prompt, middle: str) -> Prompt:
    """One node, what is wired to its inputs, and the first few kinds of nodes that take its outputs."""
    names = {middle: "node"}
    for value in prompt[middle]["inputs"].values():
        if is_link(value):
            names.setdefault(value[0], f"before_{len(names)}")
    around = {
        new: _kept(prompt[old], prompt[old]["inputs"] if old == middle else {}, names) for old, new in names.items()
    }
    kinds: set[str] = set()
    for name, entry in prompt.items():
        taken = {k: v for k, v in entry["inputs"].items() if is_link(v) and v[0] == middle}
        if taken and name not in names and entry["class_type"] not in kinds and len(kinds) < MOST_BEHIND:
            kinds.add(entry["class_type"])
            around[f"behind_{len(kinds)}"] = _kept(entry, taken, names)
    return around


def _is_ours(entry: dict[str, Any]) -> bool:
    return entry["class_type"].startswith("EditLoss")


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _kept(entry: dict[str, Any], inputs: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    inputs = {k: [names[v[0]], v[1]] if is_link(v) else v for k, v in inputs.items()}
    return {"class_type": entry["class_type"], "inputs": inputs}


def describe(prompt: Prompt, object_info: dict[str, Any]) -> dict[str, Any]:
    """All words of a picture: if these are today's, so is the picture. Nodes of ComfyUI, which it names anew now and then, by
    their class."""
    info = object_info[prompt["node"]["class_type"]]
    inputs = [name for group in ("required", "optional") for name in info["input"].get(group, {})]
    shown = {name: entry["inputs"] if name == "node" else {} for name, entry in prompt.items()}
    return {
        "title": info["display_name"],
        "inputs": inputs,
        "outputs": info["output_name"],
        "values": {name: value for name, value in shown["node"].items() if not is_link(value)},
        "wires": [
            [_called(prompt[v[0]], object_info), v[1], k, _called(e, object_info)]
            for e in prompt.values()
            for k, v in e["inputs"].items()
            if is_link(v)
        ],
    }


def _called(entry: dict[str, Any], object_info: dict[str, Any]) -> str:
    return object_info[entry["class_type"]]["display_name"] if _is_ours(entry) else entry["class_type"]


def draw(page: Any, prompt: Prompt) -> Image.Image:
    """A screenshot of the frontend, cut to the nodes."""
    page.set_viewport_size({"width": 1900, "height": 1700})
    script = ARRANGE % {"scale": SCALE, "least": LEAST, "left": LEFT, "top": TOP}
    width, height = page.evaluate(script, [prompt, "node"])
    page.wait_for_timeout(400)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    box = (LEFT - EDGE, TOP - EDGE, LEFT + round(width) + EDGE, TOP + round(height) + EDGE)
    assert box[2] <= shot.width and box[3] <= shot.height, f"{prompt['node']['class_type']} does not fit the page"
    return shot.crop(box)


def save(picture: Image.Image, node_id: str, most_bytes: int) -> None:
    """As WebP, in the best quality that is small enough."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for quality in range(90, 30, -10):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= most_bytes:
            break
    (FOLDER / f"{node_id}.webp").write_bytes(buffer.getvalue())


def write_descriptions(described: dict[str, Any]) -> None:
    lines = [f"  {json.dumps(node)}: {json.dumps(what, ensure_ascii=False)}" for node, what in described.items()]
    DESCRIBED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
