"""ComfyUI's page in two versions, and what a person does in it with the mouse.

The frontend that ComfyUI asks for is installed with it; two of them cannot be in one environment, so the newest is kept in
the user's cache folder and served by a second ComfyUI.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import open_prompt
from runner.server import PACK, cache_folder
from runner.ui_to_api import to_prompt

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route
    from runner.client import Client
    from runner.server import ComfyServer

NEWEST_FRONTEND = "1.58.1"  # of comfyui-frontend-package
ROOT = Path(__file__).resolve().parents[2]

DROP = """async ([text, name]) => {
    const dropped = new DataTransfer();
    dropped.items.add(new File([text], name, {type: 'application/json'}));
    const canvas = document.getElementById('graph-canvas');
    for (const kind of ['dragenter', 'dragover', 'drop'])
        canvas.dispatchEvent(new DragEvent(kind, {dataTransfer: dropped, bubbles: true, cancelable: true}));
}"""
# Shows all groups at once, between the page's own bars.
FIT = """() => {
    const {graph, canvas} = window.app, groups = graph.groups, margin = 60, top = 90, left = 110, bottom = 80;
    const box = [Math.min(...groups.map(g => g.pos[0])), Math.min(...groups.map(g => g.pos[1])),
                 Math.max(...groups.map(g => g.pos[0] + g.size[0])), Math.max(...groups.map(g => g.pos[1] + g.size[1]))];
    const width = window.innerWidth - left, height = window.innerHeight - top - bottom;
    const scale = Math.min(width / (box[2] - box[0] + margin), height / (box[3] - box[1] + margin));
    canvas.ds.scale = scale;
    canvas.ds.offset = [(left + (width - (box[2] - box[0]) * scale) / 2) / scale - box[0],
                        (top + (height - (box[3] - box[1]) * scale) / 2) / scale - box[1]];
    canvas.setDirty(true, true);
    return [...[box[0], box[1]].map((v, i) => (v + canvas.ds.offset[i]) * scale),
            ...[box[2], box[3]].map((v, i) => (v + canvas.ds.offset[i]) * scale)];
}"""
# Where each node is: its title and body on the canvas, or its element in Nodes 2.0.
BOXES = """() => window.app.graph.nodes.map(node => {
    const element = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
    const [width, height] = element ? [element.offsetWidth, element.offsetHeight] : [node.size[0], node.size[1] + 30];
    return [`${node.id} ${node.title}`, node.pos[0], node.pos[1] - 30, width, height];
})"""
# What is drawn can be clicked, and nothing else.
DRAWN = "for (const _ of [1, 2]) await new Promise(requestAnimationFrame);"
CLEAR = f"""async () => {{
    const {{graph, canvas}} = window.app;
    canvas.deselectAll();
    window.app.clean();
    graph.clear();
    [canvas.ds.scale, canvas.ds.offset] = [1, [0, 0]];
    canvas.setDirty(true, true);
    {DRAWN}
}}"""
ADD = f"""async ([type, x, y]) => {{
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    window.app.graph.add(node);
    {DRAWN}
    return node.id;
}}"""
# Where a socket, or the title of a node, is in the window.
SOCKET = """([id, side, name]) => {
    const {graph, canvas} = window.app, node = graph.getNodeById(id), edge = canvas.canvas.getBoundingClientRect();
    const slot = name === null ? -1 : node[side].findIndex(s => s.name === name);
    const at = slot < 0 ? [node.pos[0] + 40, node.pos[1] - 15] : node.getConnectionPos(side === 'inputs', slot);
    return [(at[0] + canvas.ds.offset[0]) * canvas.ds.scale + edge.left,
            (at[1] + canvas.ds.offset[1]) * canvas.ds.scale + edge.top];
}"""
LINKS = """() => [...window.app.graph.links.values()].map(link => {
    const [from, to] = [link.origin_id, link.target_id].map(id => window.app.graph.getNodeById(id));
    return [from.id, from.outputs[link.origin_slot].name, to.id, to.inputs[link.target_slot].name];
})"""


# ---------------------------------------------------------------------------- the page


def newest_frontend() -> Path:
    """The static folder of the newest frontend, installed on first use; skips the test where PyPI has it not to give."""
    folder = cache_folder() / f"frontend-{NEWEST_FRONTEND}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="frontend-") as scratch:
            package = f"comfyui-frontend-package=={NEWEST_FRONTEND}"
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                f"{scratch}/it",
                package,
            ]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
            if done.returncode:
                pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
            try:
                os.replace(Path(scratch, "it"), folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was quicker
                    raise
    return folder / "comfyui_frontend_package" / "static"


@contextmanager
def open_page(browser: Browser, server: ComfyServer, newer_server: bool = False) -> Iterator[Page]:
    """ComfyUI's frontend, loaded and ready; ``window.app`` is the live application.

    ``page.errors`` collects uncaught exceptions of the page.

    Args:
        newer_server: send the page the nodes' search words with their definitions, as a newer ComfyUI does; schemas of
            ComfyUI 0.3.75 have no place for them.
    """
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    for told in ("vueNodesBannerDismissed", "comfy.vueNodesMigration.dismissed"):  # about Nodes 2.0, in frontend 1.32.9
        context.add_init_script(f"localStorage.setItem('{told}', 'true')")
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    if newer_server:
        page.route("**/object_info", _with_search_words)
    page.goto(server.url, wait_until="domcontentloaded", timeout=120_000)
    # vueAppReady is set when the extensions are loaded and the first graph is on the canvas.
    page.wait_for_function("window.app && window.app.vueAppReady && window.app.graph", timeout=120_000)
    yield page
    context.close()


def _with_search_words(route: Route) -> None:
    words = search_words()
    answer = route.fetch()
    nodes = answer.json()
    for name in words.keys() & nodes.keys():
        nodes[name]["search_aliases"] = list(words[name])
    route.fulfill(response=answer, json=nodes)


def search_words() -> dict[str, tuple[str, ...]]:
    """The table of ``nodes/search_words.py``, which needs no ComfyUI."""
    return runpy.run_path(str(ROOT / "nodes" / "search_words.py"))["SEARCH_WORDS"]


# ---------------------------------------------------------------------------- in the page


def drop(page: Page, workflow: dict[str, Any], name: str) -> None:
    """Let a workflow file fall on the canvas, and wait until it is the open one."""
    page.evaluate(DROP, [json.dumps(workflow), name])
    opened = "([n, name]) => window.app.graph.nodes.length === n && document.title.includes(name)"
    page.wait_for_function(opened, arg=[len(workflow["nodes"]), Path(name).stem], timeout=60_000)


def open_template(page: Page, name: str) -> None:
    """Open one of the pack's example graphs as a person does, from the template browser."""
    page.get_by_role("button", name="Templates").first.click()
    browser = page.get_by_role("dialog")
    browser.get_by_text(PACK).first.click()
    # A thumbnail is loaded when it comes into sight.
    browser.get_by_text(name, exact=True).first.evaluate("e => e.scrollIntoView({block: 'center'})")
    thumbnail = browser.get_by_alt_text(name, exact=True)
    page.wait_for_function("e => e.complete && e.naturalWidth >= 600", arg=thumbnail.element_handle())
    thumbnail.click()
    browser.wait_for(state="detached")
    page.wait_for_function("name => document.title.includes(name)", arg=name, timeout=60_000)


def check_whole(
    page: Page, workflow: dict[str, Any], object_info: dict[str, Any], without_files: Collection[str] = ()
) -> None:
    """The open graph is that of the file: no node is missing, no widget and no link lost, and so is its prompt.

    Args:
        without_files: types of nodes that may be marked in red, since the files that they load are not on this machine.
    """
    loaded = page.evaluate(
        """() => Object.fromEntries(window.app.graph.nodes.map(n => [n.id, {
            type: n.type, known: n.type in LiteGraph.registered_node_types, errors: !!n.has_errors,
            values: JSON.parse(JSON.stringify(n.serialize().widgets_values ?? null)),
            links: (n.inputs ?? []).filter(i => i.link != null).length}]))"""
    )
    for node in workflow["nodes"]:
        found = loaded[str(node["id"])]
        assert found["known"], f"{node['type']} is missing in the page"
        assert not found["errors"] or node["type"] in without_files, f"{node['type']} is marked in red"
        assert (found["values"] or []) == node.get("widgets_values", []), f"{node['type']} lost a widget value"
        assert found["links"] == sum(i.get("link") is not None for i in node.get("inputs", []))
    assert page.locator(".p-toast-message").all_inner_texts() == []
    # Titles are left out: a page may have other names for ComfyUI's own nodes than its server.
    made, expected = open_prompt(page, object_info), to_prompt(workflow, object_info)
    assert _untitled(made) == _untitled(expected)


def overlapping(page: Page) -> list[str]:
    """Nodes that lie over one another."""
    boxes = page.evaluate(BOXES)
    return [
        f"{a} and {b}"
        for i, (a, x, y, w, h) in enumerate(boxes)
        for b, u, v, p, q in boxes[i + 1 :]
        if x < u + p and u < x + w and y < v + q and v < y + h
    ]


def _untitled(prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: node[key] for key in ("class_type", "inputs")} for name, node in prompt.items()}


def finished(client: Client, before: set[str], status: str = "success", timeout: float = 600.0) -> dict[str, Any]:
    """The entry in the history of the one prompt that was queued since ``before`` was read."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        new = {k: v for k, v in client.call("/history").items() if k not in before}
        if new:
            (entry,) = new.values()
            assert entry["status"]["status_str"] == status, entry["status"]["messages"]
            return entry
        time.sleep(0.3)
    raise AssertionError("the queue button queued nothing, or the prompt did not finish")


def clear(page: Page) -> None:
    """An empty canvas at 100 %, without the buttons of a selected node, which go away a moment later."""
    page.evaluate(CLEAR)
    page.get_by_test_id("info-button").wait_for(state="hidden")


def add(page: Page, node_type: str, x: int, y: int) -> int:
    """A node at a place of the canvas; its id."""
    return page.evaluate(ADD, [node_type, x, y])


def click_title(page: Page, node: int) -> None:
    page.mouse.click(*page.evaluate(SOCKET, [node, "", None]))


def wire(page: Page, node: int, output: str, other: int, socket: str) -> None:
    """Drag with the mouse from an output to an input."""
    (x, y), (u, v) = (page.evaluate(SOCKET, end) for end in ([node, "outputs", output], [other, "inputs", socket]))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + u) / 2, (y + v) / 2, steps=4)
    page.mouse.move(u, v, steps=4)
    page.mouse.up()


class SearchBox:
    """The search box that a double-click on the canvas opens."""

    RESULTS = "[role=option]:not(.p-autocomplete-input-chip)"
    # The page's first lines of the first results hold all the names.
    SHOWN = """([results, names, first]) => {
        const shown = [...document.querySelectorAll(results)].slice(0, first).map(e => e.innerText.trim().split('\\n')[0].trim());
        return names.every(name => shown.includes(name));
    }"""

    def __init__(self, page: Page) -> None:
        from playwright.sync_api import TimeoutError as TookTooLong

        self.page = page
        focused = page.locator("input:focus")
        for patience in (5_000, 10_000, 30_000):  # two clicks that a busy page takes apart are no double-click
            page.mouse.dblclick(600, 500)
            with suppress(TookTooLong):
                focused.wait_for(timeout=patience)
                break
        self.input = focused.element_handle(timeout=1_000)

    def type(self, words: str, expected: list[str], first: int) -> None:
        """Type, and wait until the display names that are expected are among the first results."""
        wanted = [self.RESULTS, expected, first]
        if self.page.evaluate(self.SHOWN, wanted):  # by what was typed before
            self.input.fill("qqqqqq")
            self.page.wait_for_function(f"wanted => !({self.SHOWN})(wanted)", arg=wanted)
        self.input.fill(words)
        try:
            self.page.wait_for_function(self.SHOWN, arg=wanted, timeout=15_000)
        except Exception as error:
            shown = [text.split("\n")[0].strip() for text in self.page.locator(self.RESULTS).all_inner_texts()]
            raise AssertionError(f"{words!r} shows {shown}; expected {expected} among the first {first}") from error

    def press(self, key: str) -> None:
        """Enter takes the first result, Escape none; then the box goes away."""
        self.page.keyboard.press(key)
        self.input.wait_for_element_state("hidden")


def images_in_help(node_id: str) -> int:
    page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    return len(re.findall(r"!\[", page))
