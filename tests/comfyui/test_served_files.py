"""What the frontend fetches beside the nodes: help pages, example graphs and their thumbnails."""

from __future__ import annotations

import io
import json
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
PACK = "comfyui-editloss"
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def fetch(server, path: str) -> bytes:
    with urllib.request.urlopen(f"{server.url}/{path}", timeout=30) as answer:
        assert answer.status == 200
        return answer.read()


def test_every_node_has_a_help_page(comfyui_server, object_info):
    for node_id in (name for name in object_info if name.startswith("EditLoss")):
        page = fetch(comfyui_server, f"extensions/{PACK}/docs/{node_id}.md").decode()
        assert page.startswith(f"# {object_info[node_id]['display_name']}")


def test_example_graphs_are_in_the_template_browser(comfyui_server):
    listed = json.loads(fetch(comfyui_server, "api/workflow_templates"))
    assert sorted(listed[PACK]) == WORKFLOWS


@pytest.mark.parametrize("name", WORKFLOWS)
def test_templates_and_thumbnails_are_served(comfyui_server, name):
    served = json.loads(fetch(comfyui_server, f"api/workflow_templates/{PACK}/{name}.json"))
    assert served == json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    thumbnail = Image.open(io.BytesIO(fetch(comfyui_server, f"api/workflow_templates/{PACK}/{name}.jpg")))
    assert thumbnail.width >= 600 and len(thumbnail.convert("RGB").getcolors(1 << 24)) > 5000


def test_the_demos_lora_is_listed_and_gives_way_to_the_users_own(comfyui_server, client):
    name = "editloss/demo_stool.safetensors"
    assert name in json.dumps(client.call("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]["input"])
    about = f"/view_metadata/loras?filename={name}"
    assert "editloss" in json.dumps(client.call(about))
    own = comfyui_server.models_dir / "loras" / name
    own.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(1)}, own, {"whose": "mine"})
    try:
        assert client.call(about) == {"whose": "mine"}
    finally:
        own.unlink()
