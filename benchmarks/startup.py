"""What the start costs: `import editloss_core` beside `import torch`, and the pack in ComfyUI beside ComfyUI's own imports.

    python benchmarks/startup.py --comfyui PATH

Each number is the median over fresh processes, which take turns, with all files read before. The core is imported after
torch. The pack is loaded as ComfyUI does it, by its own `load_custom_node`, schemas included, after what ComfyUI imports
by itself. Writes benchmarks/results/startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from load import add_switch, busy, told
from step_tools import machine
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "matplotlib",
    "timm",
    "open_clip",
    "jinja2",
    "scipy",
    "transformers",
    "diffusers",
    "torchvision",
    "PIL",
    "numpy",
)

CORE = """
import json, sys, time
now = lambda: (time.perf_counter(), time.process_time())
began = now()
import torch
middle = now()
import editloss_core
ended = now()
print(json.dumps({"torch": [b - a for a, b in zip(began, middle)], "core": [b - a for a, b in zip(middle, ended)]}))
"""
PACK = """
import asyncio, json, sys, time
root, comfyui = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)
now = lambda: (time.perf_counter(), time.process_time())
began = now()
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config
import nodes
import comfy_api.latest
asyncio.run(nodes.load_custom_node(comfyui + "/comfy_extras/nodes_mask.py", module_parent="comfy_extras"))  # as at every start
middle, before, known = now(), set(sys.modules), set(nodes.NODE_CLASS_MAPPINGS)
assert asyncio.run(nodes.load_custom_node(root)), "ComfyUI could not load the pack"
added = [nodes.NODE_CLASS_MAPPINGS[name] for name in set(nodes.NODE_CLASS_MAPPINGS) - known]
for node in added:
    node.GET_NODE_INFO_V1()
ended = now()
new = sorted(set(sys.modules) - before)
took = {"comfyui": [b - a for a, b in zip(began, middle)], "pack": [b - a for a, b in zip(middle, ended)]}
print(json.dumps({**took, "nodes": len(added), "new": new}))
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--comfyui", default="", help="ComfyUI's folder (default: COMFYUI_PATH; without one, the core alone)"
)
parser.add_argument("--repeats", type=int, default=9, help="processes of each (default: 9)")
add_switch(parser)


def measured(code: str, *arguments: str) -> dict:
    env = {**os.environ, "PYTHONPATH": str(ROOT) if code is CORE else ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, cwd=ROOT.parent
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parser.parse_args()
    comfyui = args.comfyui or os.environ.get("COMFYUI_PATH", "")
    codes = [(CORE,), *([(PACK, str(ROOT), comfyui)] if comfyui else [])]
    for code in codes:
        measured(*code)  # to have all files in memory, and compiled
    with busy(args.load):
        runs = [[measured(*code) for code in codes] for _ in tqdm(range(args.repeats), disable=None)]
        load = told(args.load)

    def row(label: str, which: int, name: str, base: str = "") -> str:
        wall, processor = (statistics.median(run[which][name][k] for run in runs) for k in (0, 1))
        share = statistics.median(run[which][name][1] / run[which][base][1] for run in runs) if base else 0.0
        return f"| {label} | {wall:.3f} | {processor:.3f} | {f'{share:.1%} of {base}' if base else ''} |"

    lines = [
        "# Start-up",
        "",
        f"{machine(torch.device('cpu'))}; {load}. Medians of {args.repeats} processes. A busy machine stretches the wall time; shares are of "
        "processor time.",
        "",
        "| | seconds | of processor time | share |",
        "|---|---|---|---|",
        row("`import torch`", 0, "torch"),
        row("`import editloss_core` after it", 0, "core", "torch"),
    ]
    if comfyui:
        new = runs[0][1]["new"]
        heavy = [name for name in HEAVY if name in {module.partition(".")[0] for module in new}]
        lines += [
            row("ComfyUI's own imports", 1, "comfyui"),
            row(f"the pack's {runs[0][1]['nodes']} nodes, loaded by ComfyUI", 1, "pack", "comfyui"),
            "",
            f"The pack imports {len(new)} modules that ComfyUI has not; of {', '.join(HEAVY)} "
            f"{'these: ' + ', '.join(heavy) if heavy else 'none'}.",
        ]
    text = "\n".join(lines) + "\n"
    out = ROOT / "benchmarks" / "results" / "startup.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
