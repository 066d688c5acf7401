"""What the README and the pages of docs/ say is true: code runs, files and anchors exist, tables name real things."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import editloss_core
from editloss_core import losses
from editloss_core.demo import pictures
from editloss_core.verdict.judge import judge

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md"]
FIRST_SCREEN = 40  # lines beside the picture


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].ndim == 0 and names["z_pred"].grad.isfinite().all()


def test_the_two_commands_are_one_line_each():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2 and "workflows/run.py" in commands[0] and commands[1].endswith("-m pytest -n 2")


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_linked_files_and_anchors_exist(page):
    text = without_code(page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert links
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file() and file.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(file), link


def test_checklists_name_files_and_options_that_there_are():
    """In CONTRIBUTING.md; what stands in capitals is for the reader to fill in."""
    text = without_code((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    paths = {
        part
        for code in re.findall(r"`([^`]+)`", text)
        for part in code.split()
        if re.fullmatch(r"[\w.]+(/[\w.]+)+", part)
    }
    paths = {path for path in paths if not path.startswith(".venv") and not re.search("[A-Z]{2}", path)}
    assert len(paths) > 40
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "comfyui").glob("*.py"))
    options = set(re.findall(r"EDITLOSS_UPDATE_\w+", text))
    assert options and options <= set(re.findall(r"EDITLOSS_UPDATE_\w+", tests))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_have_words_and_a_width(page):
    for picture in re.findall(r"<img [^>]*>", page.read_text(encoding="utf-8")):
        assert re.search(r'width="\d+"', picture) and re.search(r'alt="[^"]{20,}"', picture), picture


def test_the_first_screen_shows_what_it_is_for():
    """Purpose, one picture, both commands and the pages of docs/."""
    head = README[: README.index("## In ComfyUI")]
    assert len([line for line in head.splitlines() if line]) <= FIRST_SCREEN
    assert head.count("<img") == 1 and len(re.findall(r"^python3 -m venv ", head, re.M)) == 2
    assert {p.name for p in PAGES[1:]} == set(re.findall(r"\(docs/([\w-]+\.md)\)", head))


def test_the_picture_of_the_three_failures_is_true():
    """docs/pictures/failures.webp is drawn from these outputs; the verdicts on them are still those that it shows."""
    pair = pictures.edit("oak chair")
    made = pictures.outputs(pair)
    for verdict in ("no edit", "distorted", "overlay"):
        assert judge(pair.before, made[verdict], pair.after, pair.mask).verdict == verdict


def test_every_public_loss_is_in_the_table():
    table = set(re.findall(r"^\| `(\w+)` \|", README, re.M))
    assert table == set(editloss_core.__all__)
    assert set(editloss_core.__all__) <= set(losses.__all__)
