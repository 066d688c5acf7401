"""Graphs and prompts that people saved with an earlier version still load and are still accepted.

``old_workflows/VERSION`` holds the example graphs as the page saved them with that version, and as ``NAME.api.json`` the
prompts that it made of them. With EDITLOSS_KEEP_WORKFLOWS=1 those of today are put there; once a version is out, nobody
edits its folder. ``tests/made_before/prompts`` holds the prompts that ``workflows/ui_to_api.py`` made of the example
graphs in ComfyUI 0.3.75 before the modules of 0.1.0 moved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import frontend_prompt
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(__file__).with_name("old_workflows")


def api_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.api.json")


SAVED = sorted(path for path in OLD.glob("*/*.json") if not path.name.endswith(".api.json"))
MADE_BEFORE = sorted((ROOT / "tests" / "made_before" / "prompts").glob("*.json"))
PROMPTS = [*map(api_file, SAVED), *MADE_BEFORE]
KEEP = os.environ.get("EDITLOSS_KEEP_WORKFLOWS") == "1"

SLOTS = """() => Object.fromEntries(window.app.graph.nodes.map(n => [n.id, {
    known: n.type in LiteGraph.registered_node_types, errors: !!n.has_errors,
    values: JSON.parse(JSON.stringify(n.serialize().widgets_values ?? [])),
    links: (n.inputs ?? []).filter(i => i.link != null).map(i => i.name)}]))"""


@pytest.fixture(scope="module", autouse=True)
def example_files(comfyui_server):
    """What the prompts load, by name: pictures in ``input``, and weights among the encoders."""
    pictures, weights = comfyui_server.input_dir, comfyui_server.models_dir / "editloss_encoders"
    for path in PROMPTS:
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            if node["class_type"] in ("LoadImage", "LoadImageMask"):
                Image.new("RGB", (64, 64)).save(pictures / node["inputs"]["image"])
            elif node["class_type"] == "EditLossTimmEncoder":
                save_file({"empty": torch.zeros(1)}, weights / node["inputs"]["weights"])


def refusals(client, prompt: dict[str, Any]) -> list[str]:
    """What the server says against a prompt. It is taken out of the queue again, so that nothing runs for long."""
    try:
        answer = client.call("/prompt", {"prompt": prompt})
    except urllib.error.HTTPError as error:
        answer = json.load(error)
    while "prompt_id" in answer:
        client.call("/queue", {"delete": [answer["prompt_id"]]})
        client.interrupt(answer["prompt_id"])
        queue = client.call("/queue")
        if not any(entry[1] == answer["prompt_id"] for entry in queue["queue_running"] + queue["queue_pending"]):
            break
        time.sleep(0.1)
    if not answer.get("node_errors"):
        return [answer["error"]["message"]] if "error" in answer else []
    return [
        f"{node['class_type']}: {error['message']}: {error['details']}"
        for node in answer["node_errors"].values()
        for error in node["errors"]
        if not _no_such_file(node["class_type"], error)
    ]


def _no_such_file(node: str, error: dict[str, Any]) -> bool:
    """A stock node that names a model which is not on this machine, as the files of FLUX.1 are not."""
    names_a_model = re.search(r"'[^']+\.(safetensors|sft|gguf)'", error["details"])
    return error["type"] == "value_not_in_list" and not node.startswith("EditLoss") and names_a_model is not None


@pytest.mark.skipif(not KEEP, reason="today's workflows are kept only with EDITLOSS_KEEP_WORKFLOWS=1")
def test_keep_todays_workflows(page, object_info):
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    folder = OLD / version
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "workflows").glob("*.json"):
        prompt = frontend_prompt(page, json.loads(path.read_text(encoding="utf-8")), object_info)
        shutil.copy(path, folder / path.name)
        lines = [f"{json.dumps(node)}: {json.dumps(entry, ensure_ascii=False)}" for node, entry in prompt.items()]
        api_file(folder / path.name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def test_there_are_files_of_an_earlier_version():
    assert SAVED and all(api_file(path).is_file() for path in SAVED)
    assert {path.name for path in MADE_BEFORE} == {path.name for path in SAVED if path.parent.name == "0.1.0"}


def test_graphs_open_whole_and_are_accepted(page, client, object_info):
    page.locator(".p-blockui-mask").wait_for(state="detached", timeout=60_000)
    wrong = {}
    for path in SAVED:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        prompt = frontend_prompt(page, workflow, object_info)
        loaded = page.evaluate(SLOTS)
        said = [] if len(loaded) == len(workflow["nodes"]) else ["nodes are missing"]
        for node in workflow["nodes"]:
            found = loaded.get(str(node["id"]))
            if found is None or not found["known"]:
                said.append(f"{node['type']} is missing")
                continue
            if found["errors"] and node["type"].startswith(
                "EditLoss"
            ):  # newer pages mark stock loaders without their model
                said.append(f"{node['type']} is marked as wrong")
            values = node.get("widgets_values", [])
            if found["values"][: len(values)] != values:  # an optional input may have been added at the end
                said.append(f"{node['type']}: {values} became {found['values']}")
            wired = {i["name"] for i in node.get("inputs", ()) if i.get("link") is not None}
            if wired - set(found["links"]):
                said.append(f"{node['type']} lost the wires of {', '.join(sorted(wired - set(found['links'])))}")
        said += refusals(client, prompt)
        kept = json.loads(api_file(path).read_text(encoding="utf-8"))
        said += [
            f"{entry['class_type']}.{name}: {value!r} became {prompt[node]['inputs'].get(name)!r}"
            for node, entry in kept.items()
            for name, value in entry["inputs"].items()
            if node in prompt and prompt[node]["inputs"].get(name) != value
        ]
        if said:
            wrong[f"{path.parent.name}/{path.name}"] = said
    assert wrong == {}
    assert page.errors == []


def test_prompts_are_accepted(client):
    wrong = {
        f"{path.parent.name}/{path.name}": said
        for path in PROMPTS
        if (said := refusals(client, json.loads(path.read_text(encoding="utf-8"))))
    }
    assert wrong == {}


def test_prompts_name_inputs_that_their_nodes_have(object_info):
    """Which ComfyUI does not look at: a name that a node does not know is left out without a word."""
    wrong = []
    for path in PROMPTS:
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            declared = object_info[node["class_type"]]["input"]
            known = {*declared.get("required", ()), *declared.get("optional", ())}
            wrong += [f"{path.name}: {node['class_type']}.{name}" for name in node["inputs"] if name not in known]
    assert wrong == []


def test_a_prompt_that_is_not_accepted_would_be_noticed(client):
    prompt = json.loads(api_file(next(p for p in SAVED if p.stem == "train_demo")).read_text(encoding="utf-8"))
    training = next(node for node in prompt.values() if node["class_type"] == "EditLossTrainKontextLoRA")
    training["inputs"]["rank"] = 0  # below its range; choices of V3 combos are not looked at by ComfyUI 0.3.75
    training["inputs"].pop("steps")
    said = [line for line in refusals(client, prompt) if line.startswith("EditLossTrainKontextLoRA")]
    assert len(said) == 2 and any("steps" in line for line in said) and any("rank" in line for line in said)
