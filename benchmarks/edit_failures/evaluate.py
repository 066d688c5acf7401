"""How well the verdicts tell the failures apart, on scenes whose meshes were not used to fit a line; next to the peers.

python benchmarks/edit_failures/render.py --out SCENES
python benchmarks/edit_failures/evaluate.py SCENES --out benchmarks/results/verdicts.md
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from failures import KINDS, items
from peers import PEERS, Peers
from render import Scene, load_scene
from tqdm import tqdm

from editloss_core.diagnostics.statistics import Interval, grouped_auroc, wilson
from editloss_core.diagnostics.verdict import FAILURES, VERDICTS, judge

OURS = "verdict"


def picture(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()


def rows_of(path: Path) -> list[dict]:
    """Every outcome of a scene: what it is, what was said of it, and what the peers measure."""
    torch.set_num_threads(1)
    scene: Scene = load_scene(path)
    before, after, mask = (picture(getattr(scene, name)) for name in ("before", "after", "mask"))
    peers = Peers(scene.after, scene.mask)
    rows = []
    for item in items(scene):
        output = picture(item.picture)
        start = time.perf_counter()
        verdict = judge(before, output, after, mask)
        seconds = time.perf_counter() - start
        alone = judge(before, output, None, mask)
        rows.append(
            {
                "scene": scene.name, "kind": item.kind, "construction": item.construction, "severity": item.severity,
                "level": item.level, "held out": item.held_out, "verdict": verdict.verdict, "alone": alone.verdict,
                "seconds": seconds,
                **{f"{OURS}: {k}": v for k, v in verdict.scores.items()},
                **{f"alone: {k}": v for k, v in alone.scores.items()},
                **{f"measure: {k}": v for k, v in verdict.measures.items()},
                **peers.distances(item.picture),
            }
        )  # fmt: skip
    return rows


def separation(rows: list[dict], score: str, chosen: Iterable[dict]) -> Interval:
    """AUROC of the chosen outcomes against all good ones, by scenes."""
    scenes = sorted({r["scene"] for r in rows})
    good = [r for r in rows if r["kind"] == "good"]
    chosen = list(chosen)
    sides = [
        [torch.tensor([r[score] for r in side if r["scene"] == s and r[score] is not None]) for s in scenes]
        for side in (chosen, good)
    ]
    return grouped_auroc(*sides)


def shown(x: Interval) -> str:
    return f"{x.value:.3f} ({x.low:.2f}–{x.high:.2f})"


def report(rows: list[dict], part: str) -> str:
    good = [r for r in rows if r["kind"] == "good"]
    jpeg = [r for r in good if r["construction"] == "JPEG"]
    scenes = {r["scene"] for r in rows}
    seconds = float(np.median([r["seconds"] for r in rows]))
    lines = [
        "# Verdicts on rendered chair → stool pairs",
        "",
        f"{len(rows)} outputs of {len(scenes)} scenes of the part *{part}*, by `benchmarks/edit_failures/evaluate.py`. "
        + (
            "No mesh or photograph of this part was used to fit a line or to choose a measure. "
            if part == "report"
            else "The lines were fitted on this part. "
        )
        + f"A verdict takes {seconds:.2f} s on one core for {448} × {448} pixels. Behind an AUROC: its 95 % interval over scenes.",
        "",
        "## Aims",
        "",
        "| aim | reached |",
        "|---|---|",
    ]
    moderate = {
        f: separation(rows, f"{OURS}: {f}", (r for r in rows if r["kind"] == f and r["level"] == "moderate"))
        for f in FAILURES
    }
    for failure, found in moderate.items():
        lines.append(f"| {failure}, moderate: AUROC ≥ 0.97 | {shown(found)} |")
    quarter = separation(
        rows, f"{OURS}: overlay", (r for r in rows if r["kind"] == "overlay" and r["severity"] == 0.25)
    )
    lines.append(f"| overlay at 25 % opacity: AUROC ≥ 0.9 | {shown(quarter)} |")
    for name, some in (("recompressed ground truth", jpeg), ("all good outputs", good)):
        wrong = sum(r["verdict"] != "good" for r in some)
        low, high = wilson(wrong, len(some))
        aim = ": ≤ 2 % false alarms" if some is jpeg else ", false alarms"
        lines.append(f"| {name}{aim} | {wrong / len(some):.1%} ({wrong} of {len(some)}, {low:.1%}–{high:.1%}) |")

    lines += [
        "",
        "## Verdicts",
        "",
        "| outputs | n | " + " | ".join(VERDICTS) + " |",
        "|---" * (len(VERDICTS) + 2) + "|",
    ]
    groups = [
        (f"{kind}, {level}", [r for r in rows if r["kind"] == kind and r["level"] == level])
        for kind in KINDS[1:]
        for level in ("slight", "moderate", "severe")
    ]
    fixed = [
        (name, [r for r in rows if r["construction"] == what])
        for name, what in (("copy of the before picture", "copy"), ("round trip of the after picture", "round trip"))
    ]
    for name, some in [*fixed, ("good, all", good), *groups]:
        counts = Counter(r["verdict"] for r in some)
        lines.append(
            f"| {name} | {len(some)} | "
            + " | ".join(f"{counts[v] / len(some):.0%}" if counts[v] else "·" for v in VERDICTS)
            + " |"
        )

    measures = [OURS, *PEERS]
    lines += [
        "",
        "## Beside other measures",
        "",
        "AUROC against all good outputs, at moderate severity. The peers are distances to the after picture inside the mask; "
        "they say that something is wrong, not what. LPIPS-, DINO- and CLIP-style: their formulas on EfficientNet-Lite0 with "
        "ImageNet weights, since no weights of the real ones could be had.",
        "",
        "| failure | " + " | ".join(measures) + " |",
        "|---" * (len(measures) + 1) + "|",
    ]
    for failure in FAILURES:
        some = [r for r in rows if r["kind"] == failure and r["level"] == "moderate"]
        cells = [f"{separation(rows, f'{OURS}: {failure}' if m == OURS else m, some).value:.3f}" for m in measures]
        lines.append(f"| {failure} | " + " | ".join(cells) + " |")

    lines += ["", "## By construction", "", "Held out: no measure and no line was chosen on it, on either part.", ""]
    lines += [
        "| failure | construction | severity | held out | AUROC | verdict right | without an after picture |",
        "|---" * 7 + "|",
    ]
    keys = dict.fromkeys(
        (r["kind"], r["construction"], r["severity"], r["held out"]) for r in rows if r["kind"] != "good"
    )
    for kind, construction, severity, held_out in keys:
        some = [r for r in rows if (r["construction"], r["severity"]) == (construction, severity)]
        right = sum(r["verdict"] == kind for r in some) / len(some)
        alone = "–" if some[0][f"alone: {kind}"] is None else f"{separation(rows, f'alone: {kind}', some).value:.3f}"
        found = shown(separation(rows, f"{OURS}: {kind}", some))
        lines.append(
            f"| {kind} | {construction} | {severity:g} | {'yes' if held_out else ''} | {found} | {right:.0%} | {alone} |"
        )
    lines += ["", "## Good outputs", "", "| construction | severity | called good |", "|---|---|---|"]
    for construction, severity in dict.fromkeys((r["construction"], r["severity"]) for r in good):
        some = [r for r in good if (r["construction"], r["severity"]) == (construction, severity)]
        lines.append(f"| {construction} | {severity:g} | {sum(r['verdict'] == 'good' for r in some) / len(some):.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenes", type=Path, help="folder that render.py wrote")
    parser.add_argument("--part", choices=("fit", "report"), default="report")
    parser.add_argument("--limit", type=int, help="only so many scenes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="also write every outcome with its numbers")
    parser.add_argument("--out", type=Path, help="a Markdown file; printed otherwise")
    arguments = parser.parse_args()
    paths = sorted(arguments.scenes.glob(f"{arguments.part}_*.npz"))[: arguments.limit]
    if not paths:
        parser.error(f"no scenes of the part {arguments.part} in {arguments.scenes}")
    with get_context("spawn").Pool(arguments.workers) as pool:
        rows = [row for some in tqdm(pool.imap(rows_of, paths), total=len(paths), unit="scene") for row in some]
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    text = report(rows, arguments.part)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
