"""The walls of the house (docs/architecture.md), read from the imports: those inside functions and for types alone as well.

A room knows the rooms below it and none above; modules know one another in no circle; no room takes another's private names;
the core knows no ComfyUI, and of ``nodes/`` only ``nodes/comfy`` reaches into its models.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Lowest first. Rooms on one line do not know each other.
ROOMS = """
ahead cache checks commands device_memory extras files hashing masks processes progress
losses
encoders pairs
embeddings
negatives hard_negatives
objective
models
lora
runs
drawing
verdict objective_report
pair_audit encoder_audit
run_report
training
demo
diagnostics __main__
""".strip().splitlines()
GROUND = ROOMS[0].split()
LEVEL = {f"editloss_core.{room}": level for level, line in enumerate(ROOMS) for room in line.split()}
COMFYUI = (
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "comfy_config",
    "folder_paths",
    "server",
    "execution",
)
# What the nodes ask of ComfyUI: its public interface, and what every node needs. All else goes through nodes/comfy.
FOR_NODES = {"comfy_api", "comfy.utils", "comfy.model_management", "comfy_execution.utils", "folder_paths"}


class Import(NamedTuple):
    """``from target import name``, or ``import target`` with an empty name."""

    source: str
    line: int
    target: str
    name: str
    bound: str

    def __str__(self) -> str:
        return f"{path_of(self.source)}:{self.line}: {self.target}{self.name and f'.{self.name}'}"


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the repository → file, of core and nodes."""
    found = {}
    for path in [ROOT / "__init__.py", *(p for top in ("editloss_core", "nodes") for p in (ROOT / top).rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def path_of(module: str) -> str:
    return modules()[module].relative_to(ROOT).as_posix()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Every import of a module, whatever it stands in; a relative one by its whole name."""
    package = module.split(".") if modules()[module].name == "__init__.py" else module.split(".")[:-1]
    found = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found += [Import(module, node.lineno, a.name, "", a.asname or a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*above, *([node.module] if node.module else [])])
            for a in node.names:
                whole = f"{target}.{a.name}" if target else a.name
                into = (whole, "") if whole in modules() else (target, a.name)
                found.append(Import(module, node.lineno, *into, a.asname or a.name))
    return tuple(found)


def all_imports() -> Iterator[Import]:
    for module in modules():
        yield from imports(module)


def room_of(module: str) -> str:
    """``editloss_core.training`` of its parts; a file at the top of the core is a room of its own, as each node is."""
    top, *rest = module.split(".")
    return f"{top}.{rest[0]}" if rest else top


def test_every_file_has_a_room():
    rooms = {room_of(module) for module in modules() if module.startswith("editloss_core.")}
    assert rooms == set(LEVEL)


def test_the_page_and_its_picture_show_these_rooms():
    docs = ROOT / "docs"
    rooms = [line.split() for line in ROOMS if "diagnostics" not in line]  # doors and old names of programs, no room
    core = (docs / "architecture.md").read_text("utf-8").partition("Beside the core")[0]
    told = [re.findall(r"`([\w]+)(?:/|\.py)?`", row) for row in re.findall(r"^\| ((?:`[\w./]+` ?)+)\|", core, re.M)]
    assert [sorted(row) for row in told] == [sorted(row) for row in rooms]
    drawn = re.findall(r'class="room"[^>]*>(.*?)<', (docs / "pictures" / "architecture.svg").read_text("utf-8"))
    assert [row.removesuffix(".py").split(" · ") for row in reversed(drawn)][1:] == rooms[1:]


def test_no_arrow_goes_up():
    up = [
        str(i)
        for i in all_imports()
        if (a := LEVEL.get(room_of(i.source))) is not None
        and (b := LEVEL.get(room_of(i.target))) is not None
        and room_of(i.source) != room_of(i.target)
        and b >= a
        and not {room_of(i.source), room_of(i.target)} <= {f"editloss_core.{room}" for room in GROUND}
    ]
    assert not up, up


def test_the_core_knows_no_node_and_no_comfyui():
    core = [i for i in all_imports() if i.source.startswith("editloss_core")]
    assert core
    wrong = [str(i) for i in core if i.target.split(".")[0] in (*COMFYUI, "nodes", "workflows", "benchmarks", "tests")]
    assert not wrong, wrong


def test_losses_know_torch_alone():
    assert {i.target.split(".")[0] for i in imports("editloss_core.losses")} <= {"torch", *sys.stdlib_module_names}


def test_only_one_room_reaches_into_comfyui_s_models():
    wrong = []
    for i in all_imports():
        whole = f"{i.target}.{i.name}" if i.name else i.target
        if not i.source.startswith("nodes") or i.source.startswith("nodes.comfy") or whole.split(".")[0] not in COMFYUI:
            continue
        if not any(whole == public or whole.startswith(f"{public}.") for public in FOR_NODES):
            wrong.append(str(i))
    assert not wrong, wrong
    below = [str(i) for i in all_imports() if i.source.startswith("nodes.comfy") and room_of(i.target) not in (*LEVEL, "nodes.comfy") and i.target.startswith("nodes")]  # fmt: skip
    assert not below, below


def test_imports_of_the_house_are_relative():
    """The pack is imported under a path-like name, by which no absolute import would find it."""
    wrong = []
    for module in modules():
        for node in ast.walk(tree(module)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{path_of(module)}:{node.lineno}: {name}" for name in names if name.split(".")[0] in ("editloss_core", "nodes")]  # fmt: skip
    assert not wrong, wrong


def test_there_is_no_circle():
    arrows = {m: {i.target for i in imports(m) if i.target in modules()} - {m} for m in modules()}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*map(path_of, path[path.index(module) :]), path_of(module)])
        if module in done:
            return
        for target in sorted(arrows[module]):
            walk(target, (*path, module))
        done.add(module)

    for module in arrows:
        walk(module, ())


def test_no_room_takes_another_s_private_names():
    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    taken = []
    for module in modules():
        foreign = {}  # name in this file → module of another room that it stands for
        for i in imports(module):
            if i.target not in modules() or room_of(i.target) == room_of(i.source):
                continue
            if private(i.name) or any(private(part) for part in i.target.split(".")):
                taken.append(str(i))
            if not i.name:
                foreign[i.bound] = i.target
        for node in ast.walk(tree(module)):
            known = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in foreign
            if known and private(node.attr):
                taken.append(f"{path_of(module)}:{node.lineno}: {foreign[node.value.id]}.{node.attr}")
    assert not taken, taken
