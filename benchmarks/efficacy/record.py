"""What every run found, in one file small enough for git: a room's verdict is a letter. From it the report is made, and the
experiment goes on where it is on another machine."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LETTERS = {"good": "g", "no edit": "n", "overlay": "o", "distorted": "d", "collateral": "c"}
KEPT = ("arm", "data", "variants", "steps", "seed", "rooms", "trained", "base", "processor", "seconds")


def digest(folder: Path) -> str:
    """Of the weights that every run starts from: runs on others are not of this experiment."""
    together = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        together.update(path.read_bytes())
    return together.hexdigest()[:12]


def processor() -> str:
    """Its name, since seconds of two machines are not comparable."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load(path: Path, base: str) -> list[dict[str, Any]]:
    """The runs on the model with this digest, as :meth:`Lab.run` gives them."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    names = {letter: name for name, letter in LETTERS.items()}
    found = [json.loads(line) for line in lines]
    return [
        {**run, "verdicts": [{"verdict": names[letter]} for letter in run["verdicts"]]}
        for run in found
        if run["base"] == base
    ]


def save(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """A line a run, in a fixed order."""
    lines = []
    for run in sorted(runs, key=lambda r: (r["data"], r["variants"], r["arm"], r["steps"], r["seed"])):
        values = {name: run[name] for name in KEPT}
        values["seconds"] = round(values["seconds"], 2)
        values["curve"] = [[step, round(seconds, 2), round(good, 4)] for step, seconds, good in run["curve"]]
        values["verdicts"] = "".join(LETTERS[v["verdict"]] for v in run["verdicts"])
        lines.append(json.dumps(values))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
