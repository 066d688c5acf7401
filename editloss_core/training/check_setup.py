"""What works in this Python, what is missing and how to get it, and whether a training could start: ``editloss check``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch

from .. import __version__
from ..commands.exits import DONE, FOUND, UNUSABLE
from ..commands.program import give
from ..commands.programs import PROGRAMS
from ..commands.tables import Answer, aligned
from ..extras import EXTRAS
from ..pairs.pictures import needs
from .__main__ import PACKAGES
from .__main__ import check as check_config

# Packages of the extras by command; those of "if" are wanted for a part of it.
_READS, _DRAWS = {"timm": "encoders", "open_clip": "encoders"}, {p: e for p, e in EXTRAS.items() if e == "reports"}
_NEEDS: Mapping[str, Mapping[str, str]] = {
    "report": _DRAWS,
    "audit-encoders": _READS,
    "embed": _READS,
    "train": {**dict.fromkeys(PACKAGES, "train"), "peft": "train"},
}
_WANTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "diagnose": ("--out", {"matplotlib": "reports"}),
    "audit-pairs": ("--out", {"matplotlib": "reports"}),
    "audit-encoders": ("--out", {"matplotlib": "reports"}),
    "train": ("report.html", _DRAWS),
}
NEXT = """\
What next:
  outputs of any model      editloss diagnose FOLDER        FOLDER has before/ and output/, perhaps after/ and mask/
  samples of any trainer    editloss report SAMPLES --before B --after A
  pairs to train on         editloss audit-pairs PAIRS      then write a config: configs/one_24gb.toml is one
  a config                  editloss check CONFIG.toml      then editloss train CONFIG.toml"""


def check(given: argparse.Namespace) -> int:
    """Print what works; with a configuration, check that as ``train --check`` does."""
    rows = [_row(program.name) for program in PROGRAMS]
    missing = sorted({extra for row in rows for extra in row["extras"]})
    pip = f'pip install -e ".[{",".join(missing)}]"' if missing else None
    device = _device()
    unread = ", ".join(
        f"{kind[1:].upper()}, which needs {needs(kind)}" for kind in (".avif", ".heic", ".jxl") if needs(kind)
    )
    plan, told, status = "", "", FOUND if any(row["works"] == "no" for row in rows) else DONE
    if given.config is not None:
        status, plan, told = _of_config(given)
    table = aligned([("command", "works", "missing"), *((r["command"], r["works"], r["missing"]) for r in rows)])
    lines = [
        f"EditLoss {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"device: {device}",
        *([f"pictures that are not read here: {unread}"] if unread else []),
        "",
        table,
    ]
    lines += ["", f"To have what is missing, in the folder of EditLoss:\n  {pip}"] if pip else []
    if given.config is None:
        lines += ["", NEXT]
    elif plan:
        lines += ["", plan, "", f"What next: editloss train {given.config}"]
    summary = {"device": device, "missing": missing, "pip": pip, "works": {r["command"]: r["works"] for r in rows}}
    summary |= {} if given.config is None else {"problems": (told or None) if status else None}
    details = {"commands": rows, "plan": plan or None}
    give(given, Answer("\n".join(lines).rstrip(), rows, summary, details), status)
    if told:  # last, where a person looks
        print(told, file=sys.stderr, flush=True)
    return status


def _of_config(given: argparse.Namespace) -> tuple[int, str, str]:
    """(exit status, the plan, what is wrong or to know) of a training, as ``train --check`` says it."""
    if _missing("train"):
        return UNUSABLE, "", f"{given.config} cannot be checked: {', '.join(_missing('train'))} is not installed"
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = check_config(given.config, given.parser.prog)
    told = "\n".join(line.rpartition("\r")[2] for line in err.getvalue().splitlines()).strip()  # without bars
    return status, out.getvalue().strip(), told


def _row(name: str) -> dict[str, Any]:
    lacks, part, wants = _missing(name), *_WANTS.get(name, ("", {}))
    some = {package: extra for package, extra in wants.items() if find_spec(package) is None}
    if name in ("audit-encoders", "embed") and len(lacks) < len(_READS):
        some, part, lacks = {**lacks, **some}, "its encoders", {}  # one family of encoders is enough
    told = ", ".join(lacks) or (f"{', '.join(some)} for {part}" if some else "")
    works = "no" if lacks else "in part" if some else "yes"
    return {"command": name, "works": works, "missing": told, "extras": sorted({*lacks.values(), *some.values()})}


def _missing(name: str) -> dict[str, str]:
    """Package → extra of what a command cannot do without."""
    return {package: extra for package, extra in _NEEDS.get(name, {}).items() if find_spec(package) is None}


def _device() -> str:
    if not torch.cuda.is_available():
        return "CPU alone: diagnostics and audits are for it; FLUX.1 Kontext wants a GPU of 12 GB or more to train"
    names = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GB" for p in names)
