"""What saved graphs rely on: ids, inputs, defaults and outputs of the nodes, and what a change of them does to a file.

A workflow file keeps widget values by their position, an API prompt keeps inputs by their name, both keep outputs by
their position. Whoever opens last year's file gets last year's graph as long as nothing of that moves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("schema.json")
Schema = dict[str, dict[str, Any]]


def frozen(object_info: dict[str, Any]) -> Schema:
    """The part of the server's ``/object_info`` that files rely on, for the nodes of this pack.

    A combo that has no default lists files or runs: what is in it differs from one machine to the next, and is left out.
    """
    return {name: _node(info) for name, info in sorted(object_info.items()) if name.startswith("EditLoss")}


def _node(info: dict[str, Any]) -> dict[str, Any]:
    inputs = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, ()):
            kind, *rest = info["input"][group][name]
            options = rest[0] if rest else {}
            row = {"name": name, "type": kind, "in": group}
            row |= {key: options[key] for key in ("default", "min", "max", "control_after_generate") if key in options}
            if kind == "COMBO":
                row["options"] = options["options"] if "default" in options else "files"
            inputs.append(row)
    outputs = [{"name": name, "type": kind} for name, kind in zip(info["output_name"], info["output"])]
    return {"runs_by_itself": info["output_node"], "inputs": inputs, "outputs": outputs}


def read() -> Schema:
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(schema: Schema) -> None:
    """One input or output a line, so that a change is a line in the diff."""
    nodes = []
    for name, node in sorted(schema.items()):
        lists = [
            f'    "{key}": ['
            + ",".join(f"\n      {json.dumps(row, ensure_ascii=False)}" for row in node[key])
            + "\n    ]"
            for key in ("inputs", "outputs")
        ]
        own = f'    "runs_by_itself": {json.dumps(node["runs_by_itself"])}'
        nodes.append(f"  {json.dumps(name)}: {{\n" + ",\n".join([own, *lists]) + "\n  }")
    FILE.write_text("{\n" + ",\n".join(nodes) + "\n}\n", encoding="utf-8")


def compare(old: Schema, new: Schema) -> tuple[list[str], list[str]]:
    """Every difference, one a line: those that break saved graphs, and those that do not.

    >>> row = {"name": "rank", "type": "INT", "in": "required", "default": 16, "min": 1, "max": 512}
    >>> node = {"runs_by_itself": False, "inputs": [row], "outputs": []}
    >>> compare({"Train": node}, {"Train": {**node, "inputs": [{**row, "default": 8, "max": 1024}]}})
    (['Train.rank: default 16 is now 8'], ['Train.rank: max 512 is now 1024'])
    """
    breaks = [f"{name}: the node is gone" for name in old if name not in new]
    fine = [f"{name}: a new node" for name in new if name not in old]
    for name in (n for n in old if n in new):
        was, now = old[name], new[name]
        if was["runs_by_itself"] != now["runs_by_itself"]:
            told = breaks if was["runs_by_itself"] else fine
            told.append(f"{name}: {'no longer runs' if was['runs_by_itself'] else 'runs'} without a node behind it")
        for what in ("input", "output"):
            _compare_rows(f"{name}", what, was[f"{what}s"], now[f"{what}s"], breaks, fine)
    return breaks, fine


def _compare_rows(
    node: str, what: str, was: list[dict[str, Any]], now: list[dict[str, Any]], breaks: list[str], fine: list[str]
) -> None:
    old, new = {row["name"]: row for row in was}, {row["name"]: row for row in now}
    breaks += [f"{node}.{name}: the {what} is gone" for name in old if name not in new]
    kept, still = [n for n in old if n in new], [n for n in new if n in old]
    if kept != still:
        breaks.append(f"{node}: the {what}s {', '.join(kept)} are now in the order {', '.join(still)}")
    last = max((i for i, row in enumerate(now) if row["name"] in old), default=-1)
    for i, row in enumerate(now):
        if row["name"] not in old:
            where = f"{node}.{row['name']}: a new {what}"
            if i < last:
                breaks.append(f"{where} before {now[i + 1]['name']}; put it at the end")
            elif row.get("in") == "required":
                breaks.append(f"{where} that is required; make it optional")
            else:
                fine.append(f"{where} at the end")
    for name in kept:
        _compare_row(f"{node}.{name}", old[name], new[name], breaks, fine)


def _compare_row(where: str, was: dict[str, Any], now: dict[str, Any], breaks: list[str], fine: list[str]) -> None:
    for key in sorted({*was, *now} - {"name", "options"}, key=[*was, *now].index):
        a, b = was.get(key), now.get(key)
        if a == b and type(a) is type(b):
            continue
        wider = {
            "min": lambda: b is None or (a is not None and b <= a),
            "max": lambda: b is None or (a is not None and b >= a),
        }
        harmless = wider[key]() if key in wider else key == "in" and b == "optional"
        (fine if harmless else breaks).append(f"{where}: {key} {_said(a)} is now {_said(b)}")
    a, b = was.get("options"), now.get("options")
    if isinstance(a, list) and isinstance(b, list):
        breaks += [f"{where}: the choice {_said(c)} is gone" for c in a if c not in b]
        fine += [f"{where}: a new choice {_said(c)}" for c in b if c not in a]
    elif a != b:
        breaks.append(f"{where}: options {_said(a)} is now {_said(b)}")


def _said(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
