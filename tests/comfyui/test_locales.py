"""Translations of the nodes: complete, served by ComfyUI, and shown by its frontend.

After a change, put the words that the first test names into ``locales/LANGUAGE.json``, then
EDITLOSS_UPDATE_LOCALES=1 python -m pytest tests/comfyui/test_locales.py -k translated
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from frontends import open_page
from translations import FOLDER, LANGUAGES, Translator, files, inputs, read, write

UPDATE = "EDITLOSS_UPDATE_LOCALES"

each_language = pytest.mark.parametrize("language", LANGUAGES)


@each_language
def test_all_that_the_nodes_say_is_translated(language, object_info):
    translate = Translator(read(FOLDER / f"{language}.json"))
    made = files(object_info, translate)
    told = []
    for group, found in translate.missing.items():
        lines = (f"    {_line(english)}: {_line('')},    <- {where}" for english, where in found.items())
        told.append(f'  missing in "{group}":\n' + "\n".join(lines))
    for group, left in translate.unused().items():
        told.append(f'  no node says these of "{group}" any more:\n' + "\n".join(f"    {_line(k)}" for k in left))
    if told:
        pytest.fail(f"locales/{language}.json is out of step with the nodes.\n" + "\n".join(told), pytrace=False)
    if os.environ.get(UPDATE) == "1":
        write(language, made)
    for name, content in made.items():
        assert read(FOLDER / language / name) == content, f"make locales/{language}/{name} again with {UPDATE}=1"


def _line(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@each_language
def test_choices_keep_their_names(language, object_info):
    """The frontend does not translate the choices of a list, so what a tooltip calls them must stay."""
    words = read(FOLDER / f"{language}.json")["texts"]
    lost = [
        f"{node_id}.{name}: {choice}"
        for node_id, info in object_info.items()
        if node_id.startswith("EditLoss")
        for name, options in inputs(info).items()
        for choice in options.get("options", ())
        if re.search(rf"(?<![\w.]){re.escape(choice)}(?!\w)", options["tooltip"])
        and choice not in words[options["tooltip"]]
    ]
    assert lost == []


@each_language
def test_server_hands_them_out(language, client):
    folder = FOLDER / language
    served = client.call("/api/i18n")[language]
    assert served == {**read(folder / "main.json"), "nodeDefs": read(folder / "nodeDefs.json")}


SET_LOCALE = "locale => window.app.extensionManager.setting.set('Comfy.Locale', locale)"
SHOWN = """types => Object.fromEntries(types.map(type => {
    const node = LiteGraph.createNode(type), said = node.constructor.nodeData;
    return [type, {
        title: node.title, description: said.description, category: said.category,
        inputs: Object.fromEntries((node.inputs ?? []).map(i => [i.name, i.localized_name])),
        widgets: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.label])),
        outputs: (node.outputs ?? []).map(o => o.localized_name),
    }];
}))"""


@pytest.fixture
def page(browser, newest_server):
    """Of the newest frontend: the one that ComfyUI 0.3.75 asks for forgets the translations of every pack when it loads a
    language (Comfy-Org/ComfyUI_frontend#6748, mended in 1.33.13)."""
    with open_page(browser, newest_server) as tab:
        yield tab


@pytest.fixture
def speaking(page):
    """Switches the page to a language as its settings do, and back at the end: the server keeps the setting."""

    def switch(locale: str) -> None:
        page.evaluate(SET_LOCALE, locale)
        page.reload(wait_until="domcontentloaded", timeout=120_000)
        page.wait_for_function("window.app && window.app.vueAppReady && window.app.graph", timeout=120_000)
        page.locator(".p-blockui-mask").wait_for(state="detached", timeout=60_000)

    yield switch
    page.evaluate(SET_LOCALE, "en")


@each_language
def test_frontend_shows_them(language, page, speaking, object_info):
    main, nodes = (read(FOLDER / language / name) for name in ("main.json", "nodeDefs.json"))
    speaking(language)
    for node_id, shown in page.evaluate(SHOWN, list(nodes)).items():
        assert shown == _expected(nodes[node_id], main["nodeCategories"], object_info[node_id], shown["widgets"])
    assert page.errors == []


def _expected(node: dict[str, Any], categories: dict[str, str], info: dict[str, Any], widgets: dict) -> dict[str, Any]:
    names = {name: slot["name"] for name, slot in node["inputs"].items()}
    return {
        "title": node["display_name"],
        "description": node["description"],
        "category": "/".join(categories[part] for part in info["category"].split("/")),
        "inputs": names,
        "widgets": {name: names[name] for name in widgets},
        "outputs": [slot["name"] for slot in node["outputs"].values()],
    }
