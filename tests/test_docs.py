"""What docs/losses.md and docs/training.md say of functions, nodes and the example graph is what these have today."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import editloss_core
from editloss_core import losses

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_help_pages import NODES, defined, page

ROOT = Path(__file__).resolve().parents[1]
LOSSES, TRAINING = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("losses.md", "training.md"))
# What stands above a help page is the node's title; brackets in it are there to be searched.
TITLES = {page(node).splitlines()[0].removeprefix("# ").partition(" (")[0]: node for node in NODES}


def section(text: str, heading: str) -> str:
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^## |^---|\Z)", text, re.S | re.M)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of every table row that begins with a name in code."""
    lines = re.findall(r"^\| *(`.*) \|$", text, re.M)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


@pytest.mark.parametrize("name", editloss_core.__all__)
def test_a_loss_has_a_section_that_speaks_of_it(name):
    text = section(LOSSES, name)
    signature = inspect.signature(getattr(losses, name)).parameters
    documented: dict[str, str] = {}
    for cells in rows(text):
        names = re.findall(r"`(\w+)`", cells[0])
        defaults = [d.strip() for d in re.findall(r"`([^`]*)`", cells[3])]
        documented.update(zip(names, defaults or [""] * len(names)))
        assert len(defaults) in (0, len(names)), cells
    assert set(documented) == set(signature)
    for parameter, default in documented.items():
        value = signature[parameter].default
        said = json.dumps(value) if isinstance(value, str) else repr(value)
        assert default == ("" if value is inspect.Parameter.empty else said), parameter
    for part in ("**When**", "**When it is right**", "**When it is not**", "Source: "):
        assert part in text, part
    (title,) = re.findall(r"Node: \*\*(.*?)\*\*", text)
    assert title in TITLES


def test_the_shared_parameters_are_those_of_the_code():
    text = section(LOSSES, "What all of them share")
    shared = inspect.signature(losses.triplet_margin_loss).parameters
    for cells in rows(text):
        (name,) = re.findall(r"^`(\w+)`$", cells[0])
        value = shared[name].default
        assert cells[3].strip("`") == (json.dumps(value) if isinstance(value, str) else repr(value))


def test_what_to_turn_names_real_nodes_and_widgets():
    text = TRAINING[TRAINING.index("## What to turn") :]
    settings = [line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| ") and "**" in line]
    assert len(settings) > 20
    for setting in settings:
        names = re.split(r"\*\*(.*?)\*\*", setting)[1:]
        for title, rest in zip(names[::2], names[1::2]):
            widgets = re.findall(r"`(\w+)`", rest)
            assert title in TITLES and set(widgets) <= defined(TITLES[title]).keys(), (title, widgets)


def test_tables_of_settings_are_those_of_the_graph():
    """The first values and the row of 24 GB are what workflows/train_kontext_lora.json has."""
    graph = json.loads((ROOT / "workflows" / "train_kontext_lora.json").read_text(encoding="utf-8"))
    values: dict[str, dict[str, object]] = {}
    titles = {node: title for title, node in TITLES.items()}
    for node in graph["nodes"]:
        if node["type"] in NODES:
            names = [i["widget"]["name"] for i in node["inputs"] if "widget" in i]
            values[titles[node["type"]]] = dict(zip(names, node["widgets_values"]))
    text = section(TRAINING, "Settings by GPU memory")
    checked = 0
    for said, title in re.findall(r"^\| (`.*) \| \*\*(.*?)\*\* \|$", text, re.M):
        for name, value in re.findall(r"`(\w+)` (attention \+ MLP|[\w.-]+)", said):
            there = values[title][name]
            assert there == (value if isinstance(there, str) else float(value)), name
            checked += 1
    assert checked > 15
    assert "| 24 GB | fp8 | 1024 | 512 |" in text
    assert values["Load Pairs"]["resolution"] == 1024 and values["Objective Options"]["crop"] == 512
    note = next(node for node in graph["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
    for card in ("12 GB", "16 GB", "24 GB", "48 GB"):
        (ours,), (theirs,) = (re.findall(rf"^\| {card} \| (\w+ \| \d+ \| \d+) \|", t, re.M) for t in (text, note))
        assert ours == theirs
