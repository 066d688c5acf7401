"""Translations of the nodes: every node, input and output has one, and they keep what must not change with the language.

Nothing of ComfyUI is needed. That every text has its translation is tested in tests/comfyui, against what a real server
says of the nodes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "locales"
SCHEMA = Path(__file__).parent / "comfyui" / "schema.json"  # tests/comfyui/test_schema.py holds it to the nodes
LANGUAGES = sorted(path.stem for path in FOLDER.glob("*.json"))
GROUPS = ["categories", "titles", "names", "texts"]
SAME = {"EditLoss", "alpha", "clip", "ema", "lora", "vae"}  # called the same in every language, capitals aside
SPECIAL = set("{}@$|")  # the frontend's message format: a link, a placeholder, one of several plurals

each_language = pytest.mark.parametrize("language", LANGUAGES)


def words(language: str) -> dict[str, dict[str, str]]:
    return json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))


def kept(text: str) -> set[str]:
    """What a translation has to take over as it is: numbers, paths, names of files, models, inputs and formats.

    >>> sorted(kept("0.05 to 1e-4: a .txt file below models/loras, or t_min, on a GPU with DINOv2; FLUX.1 takes 2."))
    ['.txt', '0.05', '1e-4', '2', 'DINOv2', 'FLUX.1', 'GPU', 'models/loras', 't_min']
    """
    found = re.findall(r"\.?[A-Za-z_*][\w*./]*|\d+(?:\.\d+)?(?:e-?\d+)?", text, re.ASCII)
    as_it_is = {word.rstrip(".") for word in found if re.search(r"[\d_/*]|^\.|[A-Z].*[A-Z]", word)}
    return as_it_is - {"before/after", "Before/after"}


def test_kept_knows_what_must_stay():
    assert kept("Try 0.2 to 0.3, in units of x_t.") == {"0.2", "0.3", "x_t"}
    assert kept("ComfyUI's own CLIP, SigLIP: plain words.") == {"ComfyUI", "CLIP", "SigLIP"}
    assert kept("Without ending; output/editloss/runs/NAME. Or double_blocks.*.img_attn.*, -1") >= {
        "output/editloss/runs/NAME",
        "double_blocks.*.img_attn.*",
        "1",
    }


@each_language
def test_groups_are_there_and_nothing_is_empty(language):
    assert list(words(language)) == GROUPS
    for english, translation in _all(language):
        assert translation and translation == translation.strip(), english


@each_language
def test_nothing_was_left_in_english(language):
    left = [e for e, t in _all(language) if e.rpartition(".")[2].lower() == t.lower() and t.lower() not in _lower(SAME)]
    assert left == []


def _lower(names: set[str]) -> set[str]:
    return {name.lower() for name in names}


def _all(language: str) -> list[tuple[str, str]]:
    return [pair for group in words(language).values() for pair in group.items()]


@each_language
def test_numbers_and_names_are_kept(language):
    groups = words(language)
    for english, translation in (groups["titles"] | groups["texts"]).items():
        lost, new = kept(english) - kept(translation), numbers(translation) - numbers(english)
        assert not lost | new, f"{english!r}\n{translation!r}\nlost {sorted(lost)}, new numbers {sorted(new)}"


def numbers(text: str) -> set[str]:
    return {word for word in kept(text) if word[0].isdigit()}


@each_language
def test_a_node_is_called_by_its_title(language):
    """Where an English text names a node, the translation names it as its title bar does; what a title has in brackets aside.

    Titles of one word are left out: they are also parts of the titles of other packs' nodes.
    """
    groups = words(language)
    titles = {e.partition(" (")[0]: re.split(r" ?[(（]", t)[0] for e, t in groups["titles"].items()}
    titles = {title: translated for title, translated in titles.items() if " " in title}
    for english, translation in groups["texts"].items():
        for title, translated in titles.items():
            if re.search(rf"(?<![\w:]){re.escape(title)}(?!\w)", english):
                assert translated in translation, f"{english!r} names {title!r}, {translation!r} does not"


@each_language
def test_frontend_reads_no_markup_in_them(language):
    for english, translation in _all(language):
        assert not SPECIAL & set(translation), english


@each_language
def test_files_that_comfyui_serves_say_what_the_list_says(language):
    said = {translation for _, translation in _all(language)}
    for name in ("main.json", "nodeDefs.json"):
        served = json.loads((FOLDER / language / name).read_text(encoding="utf-8"))
        assert served and set(_strings(served)) <= said, name


def _strings(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [text for v in value.values() for text in _strings(v)]


@each_language
def test_every_node_input_and_output_has_a_name_and_no_other(language):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    served = json.loads((FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(served) == set(schema)
    for node_id, node in schema.items():
        assert set(served[node_id]["inputs"]) == {row["name"] for row in node["inputs"]}, node_id
        assert list(served[node_id]["outputs"]) == [str(i) for i in range(len(node["outputs"]))], node_id
