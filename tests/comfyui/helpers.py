"""Small helpers for tests against a real ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runner.server import locate, pack_root


def graph(**nodes: tuple[Any, ...]) -> dict[str, Any]:
    """An API prompt in one line per node: ``name=("ClassType", {"input": value_or_link})``.

    A link is written ``link("name")`` or ``link("name", output_slot)``. The names become the node ids, so an
    error or an output can be found by the name that the test gave.

    >>> graph(a=("EmptyImage", {"width": 8}), b=("PreviewImage", {"images": link("a")}))["b"]["inputs"]
    {'images': ['a', 0]}
    """
    return {
        name: {"class_type": node[0], "inputs": dict(node[1]) if len(node) > 1 else {}} for name, node in nodes.items()
    }


def link(node: str, slot: int = 0) -> list[Any]:
    """The output ``slot`` of the node called ``node``, as an input value."""
    return [node, slot]


def frontend_prompt(page: Any, workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The prompt that the real frontend makes of a saved workflow, through the playwright ``page``."""
    page.evaluate(
        """workflow => window.app.loadGraphData(workflow, true, false, null,
                                             {showMissingNodesDialog: false, showMissingModelsDialog: false})""",
        workflow,
    )
    return open_prompt(page, object_info)


def open_prompt(page: Any, object_info: dict[str, Any]) -> dict[str, Any]:
    """The prompt that the real frontend makes of the graph that is open.

    Inputs that the node class does not declare are left out: they are widgets with which the frontend shows
    results, such as the text box of Preview as Text, and the server ignores them.
    """
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in prompt.values():
        declared = object_info[node["class_type"]]["input"]
        known = {*declared.get("required", ()), *declared.get("optional", ())}
        linked = {name for name, value in node["inputs"].items() if isinstance(value, list)}
        node["inputs"] = {name: value for name, value in node["inputs"].items() if name in known | linked}
    return prompt


def run_driver(name: str, scratch: Path) -> dict[str, str]:
    """Run a driver of this folder in a process of its own, inside ComfyUI.

    Returns:
        Check → traceback, or "skipped: " and why; empty where it passed.
    """
    driver = Path(__file__).with_name(name)
    command = [sys.executable, str(driver), str(pack_root().resolve()), str(scratch)]
    done = subprocess.run(command, check=False, cwd=locate(), capture_output=True, text=True, timeout=600)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    if done.returncode:
        pytest.fail(f"the driver stopped after {len(said)} checks:\n{done.stderr[-3000:]}")
    return {check["name"]: check["error"] for check in said}


def check_passed(name: str, results: dict[str, str]) -> None:
    """Fail with a driver's traceback of a check, or skip with its reason."""
    assert name in results, "the driver did not run it"
    if results[name].startswith("skipped: "):
        pytest.skip(results[name].removeprefix("skipped: "))
    assert not results[name], results[name]
