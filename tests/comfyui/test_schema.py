"""The nodes as saved graphs know them: compared with what was frozen in schema.json."""

from __future__ import annotations

import copy
import os

import pytest
import schema
from schema import compare, frozen

UPDATE = "EDITLOSS_UPDATE_SCHEMA"


def test_nodes_are_what_saved_graphs_expect(object_info):
    now = frozen(object_info)
    if os.environ.get(UPDATE) == "1":
        schema.write(now)
    was = schema.read()
    if now == was:
        return
    breaks, fine = compare(was, now)
    parts = [f"The nodes differ from {schema.FILE.name}."]
    if breaks:
        parts.append("These break graphs and prompts that people have saved; take them back:\n  " + "\n  ".join(breaks))
    if fine:
        parts.append("These leave saved graphs as they are:\n  " + "\n  ".join(fine))
    parts.append(
        f"To accept all of it: {UPDATE}=1 python -m pytest tests/comfyui/test_schema.py\n"
        "Optional inputs and outputs may be added at the end, and ranges and choices widened. Whatever is removed, renamed, "
        "reordered or has another default breaks saved graphs: make a node with a new id instead."
    )
    pytest.fail("\n\n".join(parts), pytrace=False)


def test_the_file_is_sorted_with_one_line_per_input():
    was, text = schema.read(), schema.FILE.read_text(encoding="utf-8")
    assert list(was) == sorted(was)
    rows = sum(len(node["inputs"]) + len(node["outputs"]) for node in was.values())
    assert sum(line.startswith('      {"name": ') for line in text.splitlines()) == rows


def row(name: str, kind: str = "INT", group: str = "required", **options) -> dict:
    return {"name": name, "type": kind, "in": group, **options}


NODE = {
    "runs_by_itself": True,
    "inputs": [
        row("steps", default=1000, min=1, max=10000),
        row("layers", "COMBO", default="all", options=["attention", "all"]),
        row("file", "COMBO", options="files"),
        row("name", "STRING", "optional", default=""),
    ],
    "outputs": [{"name": "model", "type": "MODEL"}, {"name": "text", "type": "STRING"}],
}


def changed(change) -> tuple[list[str], list[str]]:
    node = copy.deepcopy(NODE)
    change(node, node["inputs"], node["outputs"])
    return compare({"Train": NODE}, {"Train": node})


BREAKING = {
    "removed": lambda n, i, o: i.pop(0),
    "renamed": lambda n, i, o: i[0].update(name="count"),
    "reordered": lambda n, i, o: i.insert(0, i.pop(1)),
    "inserted": lambda n, i, o: i.insert(1, row("seed", group="optional", default=0)),
    "required at the end": lambda n, i, o: i.append(row("seed", default=0)),
    "other default": lambda n, i, o: i[0].update(default=500),
    "true is not 1": lambda n, i, o: i[3].update(default=False),
    "no default": lambda n, i, o: i[3].pop("default"),
    "other type": lambda n, i, o: i[0].update(type="FLOAT"),
    "narrower": lambda n, i, o: i[0].update(min=10),
    "less": lambda n, i, o: i[0].update(max=100),
    "a limit where none was": lambda n, i, o: i[3].update(max=3),
    "now required": lambda n, i, o: i[3].update({"in": "required"}),
    "a choice less": lambda n, i, o: i[1]["options"].remove("attention"),
    "files instead of choices": lambda n, i, o: i[1].update(options="files"),
    "another widget behind it": lambda n, i, o: i[0].update(control_after_generate=True),
    "output removed": lambda n, i, o: o.pop(),
    "outputs reordered": lambda n, i, o: o.reverse(),
    "output of another type": lambda n, i, o: o[0].update(type="LATENT"),
    "output inserted": lambda n, i, o: o.insert(0, {"name": "lora", "type": "LORA_MODEL"}),
    "needs a node behind it": lambda n, i, o: n.update(runs_by_itself=False),
}
HARMLESS = {
    "optional at the end": lambda n, i, o: i.append(row("seed", group="optional", default=0)),
    "now optional": lambda n, i, o: i[2].update({"in": "optional"}),
    "wider": lambda n, i, o: i[0].update(min=0, max=20000),
    "no limit": lambda n, i, o: i[0].pop("max"),
    "a choice more": lambda n, i, o: i[1]["options"].append("MLP"),
    "output at the end": lambda n, i, o: o.append({"name": "lora", "type": "LORA_MODEL"}),
}


@pytest.mark.parametrize("change", BREAKING)
def test_changes_that_break_saved_graphs_are_called_so(change):
    breaks, _ = changed(BREAKING[change])
    assert breaks and all(line.startswith("Train") for line in breaks)


@pytest.mark.parametrize("change", HARMLESS)
def test_changes_that_break_nothing_are_called_so(change):
    breaks, fine = changed(HARMLESS[change])
    assert not breaks and fine


def test_nodes_that_come_and_go():
    assert compare({"Train": NODE}, {}) == (["Train: the node is gone"], [])
    assert compare({}, {"Train": NODE}) == ([], ["Train: a new node"])
    assert compare({"Train": NODE}, {"Train": copy.deepcopy(NODE)}) == ([], [])
