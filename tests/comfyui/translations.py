"""Translations of the nodes: from ``locales/LANGUAGE.json``, English to translation, to the files that ComfyUI serves.

In ``LANGUAGE.json`` every English text stands once, so that a text that many nodes share is translated once, and a text
that has changed has no translation until somebody writes one. Four groups:

``categories``  each part of a category
``titles``      display names of nodes
``names``       inputs and outputs; ``NODE.name`` where one node means something else by it than the others
``texts``       descriptions and tooltips

ComfyUI reads ``LANGUAGE/main.json`` and ``LANGUAGE/nodeDefs.json``, which are made from it.

There is no ``en``: where the page has no translation, in English or in a language that is not here, it shows what the server
says of the nodes (frontends 1.49.6 and 1.58.1, looked at in English and French). A second copy could only be out of step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = sorted(path.stem for path in FOLDER.glob("*.json"))
Words = dict[str, dict[str, str]]


def read(path: Path) -> dict[str, Any]:
    """A JSON file of ``locales/``; a key that is there twice is an error."""
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"twice in one group: {sorted(twice)}")
    return dict(pairs)


def write(language: str, files: dict[str, Any]) -> None:
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (FOLDER / language / name).write_text(text, encoding="utf-8")


class Translator:
    """Looks words up, and keeps what it did not find and what it found."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.missing: dict[str, dict[str, str]] = {}  # group → English → where it is first
        self.used: dict[str, set[str]] = {group: set() for group in words}

    def __call__(self, group: str, english: str, where: str, special: str = "") -> str:
        key = next((k for k in (special, english) if k in self.words[group]), None)
        if key is None:
            self.missing.setdefault(group, {}).setdefault(english, where)
            return english
        self.used[group].add(key)
        return self.words[group][key]

    def unused(self) -> dict[str, list[str]]:
        """Translations of what no node says any more, by group."""
        left = {group: [k for k in words if k not in self.used[group]] for group, words in self.words.items()}
        return {group: keys for group, keys in left.items() if keys}


def files(object_info: dict[str, Any], translate: Translator) -> dict[str, Any]:
    """``main.json`` and ``nodeDefs.json`` for the nodes of this pack in the server's ``/object_info``."""
    categories: dict[str, str] = {}
    nodes = {}
    for node_id, info in object_info.items():
        if not node_id.startswith("EditLoss"):
            continue
        for part in info["category"].split("/"):
            categories[part] = translate("categories", part, node_id)
        nodes[node_id] = {
            "display_name": translate("titles", info["display_name"], node_id),
            "description": translate("texts", info["description"], node_id),
            "inputs": {
                name: _slot(translate, node_id, name, options.get("tooltip")) for name, options in inputs(info).items()
            },
            "outputs": {
                str(i): _slot(translate, node_id, name, tooltip)
                for i, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"]))
            },
        }
    return {"main.json": {"nodeCategories": categories}, "nodeDefs.json": nodes}


def inputs(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Input → its options, of one node of ``/object_info``."""
    found = {}
    for group in ("required", "optional"):
        for name, (_, *options) in info["input"].get(group, {}).items():
            found[name] = options[0] if options else {}
    return found


def _slot(translate: Translator, node_id: str, name: str, tooltip: str | None) -> dict[str, str]:
    where = f"{node_id}.{name}"
    slot = {"name": translate("names", name, where, special=where)}
    return slot | ({"tooltip": translate("texts", tooltip, where)} if tooltip else {})
