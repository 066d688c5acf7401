"""Every node has a help page that ComfyUI can show, and it speaks of what the node has today.

What the nodes have is what ``comfyui/schema.json`` froze, so that no ComfyUI is needed; ``comfyui/test_schema.py`` holds it to
the nodes, and ``comfyui/test_nodes.py`` the titles.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from editloss_core.objective import TERMS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "web" / "docs"
MOST_LINES = 42  # beside the inputs
NODES: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "comfyui" / "schema.json").read_text(encoding="utf-8"))
# Whoever leaves everything as it is begins as the page advises, but for these.
ADVISED = {
    "Contrastive": {"dist", "margin"},
    "DiffusionEncoder": {"image_size"},
    "FeatureMatch": {"weight", "dist"},
    "InfoNCE": {"weight"},
    "MarginRanking": {"margin"},
    "MultiNegative": {"weight", "margin"},
    "PairDistance": {"weight", "anchor", "positive", "dist"},
    "Triplet": {"margin"},
}
each_node = pytest.mark.parametrize("node_id", sorted(NODES))


def page(node_id: str) -> str:
    return (DOCS / f"{node_id}.md").read_text(encoding="utf-8")


def inputs(text: str) -> list[tuple[str, str, str]]:
    """Name, what it is, and a first value of each input. A list, since a table would be cut off in ComfyUI's narrow panel."""
    return re.findall(r"^- \*\*`(.+?)`\*\*: (.*) \*First value:\* (.*)$", text, re.M)


def defined(node_id: str) -> dict[str, dict[str, Any]]:
    """The inputs of a node as the schema has them."""
    return {row["name"]: row for row in NODES[node_id]["inputs"]}


def test_every_node_has_a_page_and_every_page_a_node():
    ids = set()
    for path in (ROOT / "nodes").glob("*.py"):
        ids |= set(re.findall(r'"(EditLoss[A-Za-z0-9]+)"', path.read_text(encoding="utf-8")))
    assert ids == set(NODES), "schema.json does not have the nodes of today"
    assert ids == {p.stem for p in DOCS.glob("*.md")}


@each_node
def test_begins_with_what_it_does_in_two_sentences_and_its_picture(node_id):
    """Paths are relative: ComfyUI's page looks for them below the folder of the pages, whatever the pack's folder is called."""
    _, what, picture, _ = page(node_id).split("\n\n", 3)
    assert 1 <= len(re.findall(r"[.!?](?=\s|$)", what)) <= 2
    title = page(node_id).splitlines()[0].removeprefix("# ")
    assert picture == f"![{title}, wired to its neighbours](pictures/{node_id}.webp)"
    assert (DOCS / "pictures" / f"{node_id}.webp").is_file()


def test_no_page_has_a_picture_that_is_not_there():
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", path.read_text(encoding="utf-8")):
            assert (DOCS / target).is_file(), f"{path.name}: {target}"
    assert {path.stem for path in (DOCS / "pictures").glob("*.webp")} == set(NODES)


@each_node
def test_every_input_is_explained_and_no_other(node_id):
    names = [name for name, _, _ in inputs(page(node_id))]
    assert sorted(names) == sorted(defined(node_id))


@each_node
def test_every_input_has_a_meaning_and_a_first_value(node_id):
    for found in inputs(page(node_id)):
        assert all(found), found
    assert page(node_id).count("- **`") == len(inputs(page(node_id)))


@each_node
def test_ranges_are_those_of_the_node(node_id):
    """Wherever an input says "LOW to HIGH"."""
    for name, what, _ in inputs(page(node_id)):
        limits = defined(node_id)[name]
        said = re.search(r"(?<![`\w.])(-?\d[\d.]*) to (\d[\d.]*\d|\d)(?![\w`])", what)
        if said and {"min", "max"} <= limits.keys():
            assert [float(x) for x in said.groups()] == [limits["min"], limits["max"]], name


def starts_with(first: str, default: object) -> bool:
    """Whether the first value begins with a widget's default."""
    if isinstance(default, bool):
        return first.split()[0].strip(";,") == ("on" if default else "off")
    if isinstance(default, (int, float)):
        number = re.match(r"−?[\d.]+(e-?\d+)?(?=$|[^\d.])", first)
        return number is not None and float(number[0].rstrip(".").replace("−", "-")) == default
    return first.startswith(f"`{default}`" if f"`{default}`" in first else default)


@each_node
def test_first_values_are_the_nodes_own(node_id):
    others = {
        name
        for name, _, first in inputs(page(node_id))
        if (default := defined(node_id)[name].get("default")) not in (None, "") and not starts_with(first, default)
    }
    assert others == ADVISED.get(node_id.removeprefix("EditLoss"), set())


@each_node
def test_every_output_is_named(node_id):
    for output in NODES[node_id]["outputs"]:
        assert f"`{output['name']}`" in page(node_id), output


@each_node
def test_says_what_to_turn_when_things_go_wrong(node_id):
    assert "\n## When things go wrong\n" in page(node_id)


@each_node
def test_is_plain_markdown(node_id):
    text = page(node_id)
    assert not re.search(r"<[A-Za-z!/]", text), "HTML"
    assert not re.search(r"(?<![\w.)/*])[/~]\w|[A-Za-z]:[\\/]", text), "an absolute path"
    assert not re.search(r"[ \t]+$", text, re.M), "trailing whitespace"
    assert "\t" not in text and "\r" not in text
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert text.count("```") % 2 == 0
    assert not re.search(r"[\U0001F000-\U0001FAFF\u2600-\u27BF]", text), "an emoji"


@each_node
def test_is_short(node_id):
    text = page(node_id)
    assert 15 <= len(text.splitlines()) <= MOST_LINES + len(inputs(text))


@pytest.mark.parametrize("kind", sorted(TERMS))
def test_every_loss_gives_its_formula(kind):
    """Of the terms, each has exactly one node, and the page a code block that starts with the loss."""
    ids = [node_id for node_id in NODES if node_id.lower() == f"editloss{kind.replace('_', '')}"]
    assert len(ids) == 1
    block = page(ids[0]).split("```")[1]
    assert "L = " in block
    assert ("margin" in TERMS[kind].defaults) == ("margin" in block)
