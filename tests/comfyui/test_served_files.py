"""What the frontend fetches beside the nodes: help pages, example graphs and their thumbnails."""

from __future__ import annotations

import io
import json
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

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
