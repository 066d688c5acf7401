"""Seconds that the diagnosis of a folder takes, beside what reading its pictures alone does.

    python benchmarks/diagnose_folder.py --out benchmarks/results/diagnose_folder.md

The folder is made from the rendered pairs of editloss_core/demo/pictures: every output is a right edit, a copy, a mixture or a soft one in
turn, so that no two are alike. The command runs as a user runs it, in a process of its own, start-up and files included.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from load import add_switch, busy, told
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "editloss_core" / "demo" / "pictures"
PARTS = ("before", "output", "after", "mask")


def make(folder: Path, count: int, side: int) -> None:
    names = sorted(p.stem for p in (PAIRS / "before").iterdir())
    for part in PARTS:
        (folder / part).mkdir()
    for i in range(count):
        pair = {
            part: Image.open(next((PAIRS / part).glob(f"{names[i % len(names)]}.*")))
            .convert("RGB")
            .resize((side, side))
            for part in ("before", "after", "mask")
        }
        kinds = (
            pair["after"],
            pair["before"],
            Image.blend(pair["after"], pair["before"], 0.2 + 0.6 * i / count),
            pair["after"].filter(ImageFilter.GaussianBlur(0.5 + i / count)),
        )
        pair["output"] = kinds[i % len(kinds)]
        for part in PARTS:
            pair[part].save(folder / part / f"{i:04}.png")


def read(path: Path) -> int:
    return len(Image.open(path).convert("RGB").tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--side", type=int, default=512, help="of the pictures, in pixels")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    add_switch(parser)
    parser.add_argument("--out", type=Path, help="a Markdown file; printed otherwise")
    given = parser.parse_args()
    ours, bound = [], []
    with tempfile.TemporaryDirectory() as name, busy(given.load):
        folder = Path(name) / "pictures"
        folder.mkdir()
        make(folder, given.count, given.side)
        files = sorted(p for part in PARTS for p in (folder / part).iterdir())
        command = [sys.executable, "-m", "editloss_core.verdict", str(folder), "--workers", str(given.workers)]
        for k in range(given.repeats):
            start = time.perf_counter()
            with ProcessPoolExecutor(given.workers) as pool:
                assert min(pool.map(read, files, chunksize=8)) > 0
            bound.append(time.perf_counter() - start)
            start = time.perf_counter()
            subprocess.run([*command, "--out", f"{name}/{k}"], check=True, cwd=ROOT, capture_output=True)
            ours.append(time.perf_counter() - start)
        load = told(given.load)
    best, least = min(ours), min(bound)
    text = f"""# Diagnosis of a folder

By `benchmarks/diagnose_folder.py`: {given.count} outputs of {given.side} × {given.side} pixels with before, after and mask,
{given.workers} processes, best of {given.repeats}. {platform.machine()}, torch {torch.__version__}; {load}.

| | seconds | over reading | a picture |
|---|---|---|---|
| reading and decoding the {len(files)} files alone | {least:.1f} | 1 | |
| `python -m editloss_core.verdict`: verdicts, CSV and sheet, start-up included | {best:.1f} | {best / least:.1f} | {best / given.count:.2f} |

Every run: {", ".join(f"{t:.1f}" for t in ours)} s.
"""
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
