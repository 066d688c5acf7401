"""Every node has a help page that ComfyUI can show, and it speaks of what the node has today.

The schemas are read from the source, so that no ComfyUI is needed.
"""

from __future__ import annotations

import ast
import copy
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from editloss_core.objective import TERMS, LossTerm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "web" / "docs"
MOST_LINES = 42  # beside the inputs


@dataclass(frozen=True)
class Node:
    title: str
    inputs: frozenset[str]
    outputs: frozenset[str]
    widgets: dict[str, dict[str, object]] = field(default_factory=dict)  # name → its constants: default, min, max


class Source:
    """The nodes of one file: names given to ``io.X.Input`` and ``io.X.Output``, through the helpers of that file and those that it
    imports from its neighbours."""

    def __init__(self, path: Path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        self.helpers: dict[str, ast.AST] = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        for n in tree.body:
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name):
                self.helpers[n.targets[0].id] = n.value
            elif isinstance(n, ast.ImportFrom) and n.level == 1 and path.with_name(f"{n.module}.py").is_file():
                there = Source(path.with_name(f"{n.module}.py")).helpers
                self.helpers.update({a.name: there[a.name] for a in n.names if a.name in there})

    def nodes(self) -> dict[str, Node]:
        found = {}
        for c in self.classes.values():
            fields = _fields(c)
            if fields.get("NODE_ID"):
                node_id, title = fields["NODE_ID"], fields["TITLE"]
                inputs = self._loss_inputs(fields["KIND"], fields.get("FIXED", ()))
                schema = self._schema(self.classes["LossNode"])
            else:
                schema = self._schema(c)
                ids = (
                    {k.arg: k.value for k in schema.keywords if k.arg in ("node_id", "display_name")} if schema else {}
                )
                if not isinstance(ids.get("node_id"), ast.Constant):
                    continue  # the base class of the losses
                node_id, title = ids["node_id"].value, ids["display_name"].value
                inputs = self._names(_keyword(schema, "inputs"), "Input")
            found[node_id] = Node(
                title,
                frozenset(inputs),
                frozenset(self._names(_keyword(schema, "outputs"), "Output")),
                self._widgets(_keyword(schema, "inputs")),
            )
        return found

    def _schema(self, c: ast.AST) -> ast.Call | None:
        """The ``io.Schema(…)`` of a class, also one that a helper of the file makes of its arguments."""
        for call in (n for n in ast.walk(c) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) == "io.Schema":
                return call
            helper = self.helpers.get(ast.unparse(call.func))
            if isinstance(helper, ast.FunctionDef) and isinstance(helper.body[-1], ast.Return):
                answer = helper.body[-1].value
                if isinstance(answer, ast.Call) and ast.unparse(answer.func) == "io.Schema":
                    given = dict(zip((a.arg for a in helper.args.args), call.args))
                    return _Filled(given).visit(copy.deepcopy(answer))
        return None

    def _loss_inputs(self, kind: str, fixed: tuple[str, ...]) -> set[str]:
        """What every loss has, and the settings of its kind from the table of terms."""
        settings = {name for name in TERMS[kind].defaults if name not in fixed}
        common = self._names(_keyword(self._schema(self.classes["LossNode"]), "inputs"), "Input")
        if "margin" in settings and _takes_auto(kind):
            settings.add("margin_mode")
        return common | settings

    def _names(self, tree: ast.AST, end: str) -> set[str]:
        """First argument or ``display_name`` of each ``….Input`` or ``….Output`` in ``tree`` and in the helpers it uses."""
        names: set[str] = set()
        for n in ast.walk(tree):
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == end:
                named = n.args[0] if n.args else next(k.value for k in n.keywords if k.arg in ("id", "display_name"))
                if isinstance(named, ast.Constant):
                    names.add(named.value)
            elif isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in self.helpers:
                inside = self._names(self.helpers[n.func.id], end)
                # or a helper that is handed the name
                names |= inside or {a.value for a in n.args[:1] if isinstance(a, ast.Constant)}
            elif isinstance(n, ast.Name) and isinstance(self.helpers.get(n.id), ast.Call):
                names |= self._names(self.helpers[n.id], end)
        return names

    def _widgets(self, tree: ast.AST) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        for n in ast.walk(tree):
            if not isinstance(n, ast.Call):
                continue
            if isinstance(n.func, ast.Attribute) and n.func.attr == "Input" and n.args:
                constants = {k.arg: k.value.value for k in n.keywords if isinstance(k.value, ast.Constant)}
                if isinstance(n.args[0], ast.Constant):
                    found[n.args[0].value] = constants
            elif isinstance(n.func, ast.Name) and n.func.id in self.helpers:
                found |= self._widgets(self.helpers[n.func.id])
        return found


class _Filled(ast.NodeTransformer):
    """Names of parameters become what was given for them."""

    def __init__(self, arguments: dict[str, ast.AST]):
        self.arguments = arguments

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.arguments.get(node.id, node)


def _fields(c: ast.ClassDef) -> dict[str, object]:
    """Constants of a class body, of tuples too: ``KIND, NODE_ID = "a", "b"``."""
    values: dict[str, object] = {}
    for n in c.body:
        if not isinstance(n, ast.Assign):
            continue
        target = n.targets[0]
        names = [t.id for t in target.elts] if isinstance(target, ast.Tuple) else [target.id]
        try:
            value = ast.literal_eval(n.value)
        except ValueError:
            continue
        values.update(zip(names, value if isinstance(target, ast.Tuple) else [value]))
    return values


def _keyword(call: ast.Call, name: str) -> ast.AST:
    return next(k.value for k in call.keywords if k.arg == name)


def _takes_auto(kind: str) -> bool:
    try:
        LossTerm(kind, "encoder", margin="auto")
    except ValueError:
        return False
    return True


NODES = {
    node_id: node for path in sorted((ROOT / "nodes").glob("*.py")) for node_id, node in Source(path).nodes().items()
}
OF_TRAINING = {
    n for f in ("training", "training_options", "pairs", "demo") for n in Source(ROOT / "nodes" / f"{f}.py").nodes()
}
each_node = pytest.mark.parametrize("node_id", sorted(NODES))


def page(node_id: str) -> str:
    return (DOCS / f"{node_id}.md").read_text(encoding="utf-8")


def inputs(text: str) -> list[tuple[str, str, str]]:
    """Name, what it is, and a first value of each input. A list, since a table would be cut off in ComfyUI's narrow panel."""
    return re.findall(r"^- \*\*`(.+?)`\*\*: (.*) \*First value:\* (.*)$", text, re.M)


def test_every_node_has_a_page_and_every_page_a_node():
    ids = set()
    for path in (ROOT / "nodes").glob("*.py"):
        ids |= set(re.findall(r'"(EditLoss[A-Za-z0-9]+)"', path.read_text(encoding="utf-8")))
    assert ids == set(NODES), "the reader of the schemas misses nodes"
    assert ids == {p.stem for p in DOCS.glob("*.md")}


def test_reader_of_schemas_finds_what_helpers_and_tables_make():
    assert NODES["EditLossEncode"].inputs >= {"encoder", "pred", "gt", "hard_negative", "mask", "batch_size"}
    assert NODES["EditLossTimmEncoder"].inputs >= {"model_name", "weights", "output", "layer", "image_size", "crop"}
    assert NODES["EditLossTriplet"].inputs >= {
        "encoder",
        "weight",
        "margin",
        "margin_mode",
        "negative",
        "objective",
        "agg",
    }
    assert "margin_mode" not in NODES["EditLossMarginRanking"].inputs
    assert "anchor" not in NODES["EditLossNoEditIdentity"].inputs
    assert NODES["EditLossRunOptions"].inputs >= {"keep", "guidance", "options"}
    assert NODES["EditLossRunOptions"].outputs == {"options"}
    assert NODES["EditLossRunOptions"].widgets["keep"].items() >= {"default": 3, "min": 1, "max": 1000}.items()
    assert NODES["EditLossLoadPairs"].widgets["resolution"]["max"] == 2048
    assert NODES["EditLossEvaluateObjective"].outputs == {"picture", "text", "total", "values"}


@each_node
def test_title_is_the_display_name(node_id):
    assert page(node_id).splitlines()[0] == f"# {NODES[node_id].title}"


@each_node
def test_begins_with_what_it_does_in_two_sentences_and_its_picture(node_id):
    """Paths are relative: ComfyUI's page looks for them below the folder of the pages, whatever the pack's folder is called."""
    _, what, picture, _ = page(node_id).split("\n\n", 3)
    assert 1 <= len(re.findall(r"[.!?](?=\s|$)", what)) <= 2
    assert picture == f"![{NODES[node_id].title}, wired to its neighbours](pictures/{node_id}.webp)"
    assert (DOCS / "pictures" / f"{node_id}.webp").is_file()


def test_no_page_has_a_picture_that_is_not_there():
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", path.read_text(encoding="utf-8")):
            assert (DOCS / target).is_file(), f"{path.name}: {target}"
    assert {path.stem for path in (DOCS / "pictures").glob("*.webp")} == set(NODES)


@each_node
def test_every_input_is_explained_and_no_other(node_id):
    names = [name for name, _, _ in inputs(page(node_id))]
    assert sorted(names) == sorted(NODES[node_id].inputs)


@each_node
def test_every_input_has_a_meaning_and_a_first_value(node_id):
    for found in inputs(page(node_id)):
        assert all(found), found
    assert page(node_id).count("- **`") == len(inputs(page(node_id)))


@each_node
def test_ranges_are_those_of_the_node(node_id):
    """Wherever an input says "LOW to HIGH"."""
    for name, what, _ in inputs(page(node_id)):
        limits = NODES[node_id].widgets.get(name, {})
        said = re.search(r"(?<![`\w.])(-?\d[\d.]*) to (\d[\d.]*\d|\d)(?![\w`])", what)
        if said and {"min", "max"} <= limits.keys():
            assert [float(x) for x in said.groups()] == [limits["min"], limits["max"]], name


def starts_with(first: str, default: object) -> bool:
    """Whether the first value begins with a widget's default."""
    if isinstance(default, bool):
        return first.split()[0].strip(";,") == ("on" if default else "off")
    if isinstance(default, (int, float)):
        number = re.match(r"[\d.]+(e-?\d+)?(?=$|[^\d.])", first)
        return number is not None and float(number[0].rstrip(".")) == default
    return first.startswith(f"`{default}`" if f"`{default}`" in first else default)


@each_node
def test_first_values_of_training_are_the_nodes_own(node_id):
    """Whoever leaves everything as it is begins as the page advises."""
    for name, _, first in inputs(page(node_id)) if node_id in OF_TRAINING else ():
        default = NODES[node_id].widgets.get(name, {}).get("default")
        assert default in (None, "") or starts_with(first, default), (name, first, default)


@each_node
def test_every_output_is_named(node_id):
    for name in NODES[node_id].outputs:
        assert f"`{name}`" in page(node_id), name


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
    source = Source(ROOT / "nodes" / "losses.py")
    ids = [f["NODE_ID"] for f in map(_fields, source.classes.values()) if f.get("KIND") == kind]
    assert len(ids) == 1
    block = page(ids[0]).split("```")[1]
    assert "L = " in block
    assert ("margin" in TERMS[kind].defaults) == ("margin" in block)
