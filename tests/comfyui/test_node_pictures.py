"""The pictures on the help pages: there, served, true, and readable. EDITLOSS_UPDATE_PICTURES=1 makes them again."""

from __future__ import annotations

import io
import json
import os
import re

import node_pictures
import pytest
from node_pictures import DESCRIBED, FOLDER, describe, neighbourhoods
from PIL import Image
from runner.server import PACK
from test_served_files import fetch

UPDATE = os.environ.get("EDITLOSS_UPDATE_PICTURES") == "1"
MOST_BYTES = 40_000


@pytest.fixture(scope="module")
def prompts(object_info):
    return neighbourhoods(object_info)


@pytest.mark.skipif(not UPDATE, reason="pictures are made with EDITLOSS_UPDATE_PICTURES=1")
def test_make_the_pictures(page, prompts, object_info):
    page.locator(".p-blockui-mask").wait_for(state="detached", timeout=60_000)
    for node_id, prompt in prompts.items():
        node_pictures.save(node_pictures.draw(page, prompt), node_id, MOST_BYTES)
    node_pictures.write_descriptions({node_id: describe(prompt, object_info) for node_id, prompt in prompts.items()})
    assert page.errors == []


def test_every_node_has_a_picture_of_what_it_is_today(prompts, object_info):
    was = json.loads(DESCRIBED.read_text(encoding="utf-8"))
    now = {node_id: describe(prompt, object_info) for node_id, prompt in prompts.items()}
    assert set(now) == {name for name in object_info if name.startswith("EditLoss")}
    other = [node_id for node_id in {*was, *now} if was.get(node_id) != now.get(node_id)]
    assert not other, (
        f"these pictures show what is no more; EDITLOSS_UPDATE_PICTURES=1 makes them again: {sorted(other)}"
    )
    assert {path.stem for path in FOLDER.glob("*.webp")} == set(now)


@pytest.mark.skipif(UPDATE, reason="the server has the pictures from before")
def test_pages_show_their_pictures_which_are_served_and_readable(comfyui_server, prompts):
    for node_id in prompts:
        folder = f"extensions/{PACK}/docs"
        page = fetch(comfyui_server, f"{folder}/{node_id}.md").decode()
        (picture,) = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", page, re.M)
        served = fetch(comfyui_server, f"{folder}/{picture}")
        assert len(served) <= MOST_BYTES
        image = Image.open(io.BytesIO(served)).convert("RGB")
        # A letter of 14 pixels is drawn with 21, and the panel that shows the page is about 450 pixels wide.
        assert node_pictures.LEAST <= image.width <= 1200 and image.height >= 140, node_id
        assert len(image.getcolors(1 << 24)) > 500, f"{node_id}: an empty picture"


def test_every_node_is_shown_with_neighbours(prompts):
    for node_id, prompt in prompts.items():
        wires = [v for entry in prompt.values() for v in entry["inputs"].values() if node_pictures.is_link(v)]
        assert wires and all(source in prompt for source, _ in wires), node_id


def test_the_help_panel_finds_the_picture(page, object_info):
    """As a person opens it: the page of the node in the frontend, with the picture loaded."""
    page.locator(".p-blockui-mask").wait_for(state="detached", timeout=60_000)
    page.evaluate(
        """() => {
            const node = window.LiteGraph.createNode('EditLossTriplet');
            window.app.graph.clear();
            window.app.graph.add(node);
            window.app.canvas.centerOnNode(node);
            window.app.canvas.selectNode(node);
        }"""
    )
    page.locator("[data-testid=info-button], button.help-button").first.click(timeout=20_000)
    loaded = "() => document.querySelector('.node-help-content img')?.naturalWidth > 0"
    page.wait_for_function(loaded, timeout=20_000)
    shown = page.locator(".node-help-content img").first.get_attribute("src")
    assert shown.endswith("/docs/pictures/EditLossTriplet.webp")
