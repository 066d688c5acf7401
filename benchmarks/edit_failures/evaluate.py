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
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tones
import torch
import unseen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from failures import BEHIND, HIDDEN, KINDS, TABLE, Item, items
from peers import PEERS, Peers
from render import PARTS as COUNTS
from render import Scene, load_scene
from tqdm import tqdm

from editloss_core.drawing.statistics import Interval, grouped_auroc, wilson
from editloss_core.masks import oklab
from editloss_core.verdict.judge import VERDICTS, judge

OURS = "verdict"
SEEN = 0.04  # Oklab; a pixel further than this from the after picture's differs visibly
LEAST = 0.001  # share of a picture that has to differ visibly for there to be a failure that anything could see


def picture(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()


def visible(output: np.ndarray, after: np.ndarray) -> float:
    """The share of a picture that differs visibly from the after picture."""
    a, b = (oklab(picture(p).permute(2, 0, 1)[None]) for p in (output, after))
    return float(((a - b).norm(dim=1) > SEEN).float().mean())


def chosen(scene: Scene, sample: int) -> Iterator[tuple[str, Item]]:
    """Every outcome of a scene; with a ``sample`` above 0 only those of moderate severity and each so manieth good one, from
    scene to scene another."""
    turn = sum(scene.name.encode())

    def wanted(kind: str, level: str, number: int) -> bool:
        return not sample or (level == "moderate" if kind != "good" else (number + turn) % sample == 0)

    for group, made in (("table", items(scene, wanted)), ("unseen", unseen.items(scene, wanted))):
        for item in made:
            yield group, item


def toned(scene: Scene, sample: int) -> list[dict]:
    """Edits of the whole picture, of every third scene where only a sample is asked for."""
    if sample and scene.number % 3:
        return []
    rows = []
    for after, item in tones.items(scene):
        start = time.perf_counter()
        verdict = judge(picture(scene.before), picture(item.picture), picture(after))
        seconds = time.perf_counter() - start
        rows.append(
            {
                "scene": scene.name, "kind": item.kind, "construction": item.construction, "severity": 0.0, "level": "-",
                "held out": True, "group": "tone", "verdict": verdict.verdict, "seconds": seconds,
                **{f"{OURS}: {k}": v for k, v in verdict.scores.items()},
                **{f"measure: {k}": v for k, v in verdict.measures.items()},
            }
        )  # fmt: skip
    return rows


def rows_of(path: Path, sample: int = 0) -> list[dict]:
    """Every outcome of a scene: what it is, what was said of it, and what the peers measure."""
    torch.set_num_threads(1)
    scene: Scene = load_scene(path)
    before, after, mask = (picture(getattr(scene, name)) for name in ("before", "after", "mask"))
    peers = not sample or scene.number % 3 == 0
    inside, outside = (Peers(scene.after, where) if peers else None for where in (scene.mask, 1 - scene.mask))
    rows = []
    for group, item in chosen(scene, sample):
        output = picture(item.picture)
        start = time.perf_counter()
        verdict = judge(before, output, after, mask)
        seconds = time.perf_counter() - start
        alone = None if sample else judge(before, output, None, mask)
        # The report has the peers at moderate severity only.
        near = inside.distances(item.picture) if inside and item.level in ("-", "moderate") else dict.fromkeys(PEERS)
        away = (
            outside.distances(item.picture)
            if outside and (item.kind == "good" or (item.kind, item.level) == ("collateral change", "moderate"))
            else dict.fromkeys(PEERS)
        )
        rows.append(
            {
                "scene": scene.name, "kind": item.kind, "construction": item.construction, "severity": item.severity,
                "level": item.level, "held out": item.held_out, "group": group,
                "visible": visible(item.picture, scene.after), "verdict": verdict.verdict, "alone": alone.verdict if alone else "",
                "seconds": seconds,
                **{f"{OURS}: {k}": v for k, v in verdict.scores.items()},
                **{f"alone: {k}": alone.scores[k] if alone else None for k in verdict.scores},
                **{f"measure: {k}": v for k, v in verdict.measures.items()},
                **near,
                **{f"outside: {k}": v for k, v in away.items()},
            }
        )  # fmt: skip
    return rows + toned(scene, sample)


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


def confusion(groups: Iterable[tuple[str, list[dict]]]) -> list[str]:
    lines = ["| outputs | n | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 2) + "|"]
    for name, some in groups:
        if some:
            counts = Counter(r["verdict"] for r in some)
            shares = (f"{counts[v] / len(some):.0%}" if counts[v] else "·" for v in VERDICTS)
            lines.append(f"| {name} | {len(some)} | " + " | ".join(shares) + " |")
    return lines


def constructions(rows: list[dict], failures: list[dict]) -> list[str]:
    """A line for each construction and severity, against the good ones among ``rows``."""
    lines = [
        "| failure | construction | severity | in view | shows | AUROC | verdict right | without an after picture |",
        "|---" * 8 + "|",
    ]
    keys = dict.fromkeys((r["kind"], r["construction"], r["severity"], r["held out"]) for r in failures)
    for kind, construction, severity, held_out in keys:
        some = [r for r in failures if (r["construction"], r["severity"]) == (construction, severity)]
        shows = sum(r["visible"] >= LEAST for r in some) / len(some)
        right = sum(r["verdict"] == kind for r in some) / len(some)
        alone = "–" if some[0][f"alone: {kind}"] is None else f"{separation(rows, f'alone: {kind}', some).value:.3f}"
        found = shown(separation(rows, f"{OURS}: {kind}", some))
        seen = "" if some[0]["group"] == "unseen" else "kept out" if held_out else "fitted"
        lines.append(
            f"| {kind} | {construction} | {severity:g} | {seen} | {shows:.0%} | {found} | {right:.0%} | {alone} |"
        )
    return lines


def false_alarms(some: list[dict]) -> str:
    wrong = sum(r["verdict"] != "good" for r in some)
    low, high = wilson(wrong, len(some))
    return f"{wrong / len(some):.1%} ({wrong} of {len(some)}, {low:.1%}–{high:.1%})"


# What was known of each part when its numbers were made.
PARTS = {
    "fit": "The lines were fitted on this part.",
    "report": "The lines were fitted on this part too.",
    "confirm": "The lines were fitted on this part too, after it had been judged once.",
    "fresh": "Measures were chosen on this part too, after it had been judged once.",
    "newest": "Measures and lines were chosen on this part too, after it had been judged once.",
    "sealed": "No mesh or photograph of this part is in another one, and it was judged once, without a look at its pictures: nothing "
    "was changed after its numbers were seen. Measures and lines were chosen on scenes of the five other parts. Sizes are 256 to "
    "1536 pixels, proportions 1:3 to 3:1, and every third scene has two old objects and two new ones. The seconds of a verdict are "
    "those of a machine that other work shared.",
}


def report(every: list[dict], part: str) -> str:
    rows = [r for r in every if r["group"] == "table"]
    new = [r for r in every if r["group"] == "unseen"]
    tone = [r for r in every if r["group"] == "tone"]
    good = [r for r in rows if r["kind"] == "good"]
    jpeg = [r for r in good if r["construction"] == "JPEG"]
    scenes = {r["scene"] for r in rows}
    meshes = [{s.split("_")[k] for s in scenes} for k in (2, 3)]
    sampled = not any(r["level"] == "slight" for r in rows)
    seconds = float(np.median([r["seconds"] for r in rows]))
    lines = [
        "# Verdicts on rendered pairs",
        "",
        f"{len(every)} outputs of {len(scenes)} scenes of the part *{part}* ({len(meshes[0])} meshes before, {len(meshes[1])} after), "
        f"by `benchmarks/edit_failures/evaluate.py`. {PARTS[part]} A verdict takes {seconds:.2f} s (median, one thread). "
        + (f"These are the first of the part's {COUNTS[part]} scenes. " if len(scenes) < COUNTS[part] else "")
        + (
            "Failures at moderate severity, and a share of the good outputs, another one in each scene. "
            if sampled
            else ""
        )
        + "In brackets behind an AUROC: its 95 % interval over scenes.",
        "",
        "## Aims",
        "",
        "| aim | reached |",
        "|---|---|",
    ]
    moderate = {f: [r for r in rows if r["kind"] == f and r["level"] == "moderate"] for f in KINDS[1:]}
    for failure, some in moderate.items():
        lines.append(f"| {failure}, moderate: AUROC ≥ 0.97 | {shown(separation(rows, f'{OURS}: {failure}', some))} |")
    for failure in moderate:
        some = [r for r in rows + new if r["kind"] == failure and r["level"] == "moderate"]
        right = sum(r["verdict"] == failure for r in some)
        low, high = wilson(right, len(some))
        lines.append(
            f"| {failure}, moderate: right verdict ≥ 92 % | {right / len(some):.1%} ({right} of {len(some)}, {low:.1%}–{high:.1%}) |"
        )
    quarter = [r for r in rows if r["kind"] == "overlay" and r["severity"] == 0.25]
    if quarter:
        lines.append(
            f"| overlay at 25 % opacity: AUROC ≥ 0.9 | {shown(separation(rows, f'{OURS}: overlay', quarter))} |"
        )
    lines.append(f"| recompressed ground truth: ≤ 2 % false alarms | {false_alarms(jpeg)} |")
    palettes = [r for r in good if r["construction"].startswith("palette")]
    if palettes:
        lines.append(f"| ground truth in 32 to 128 colours: ≤ 2 % false alarms | {false_alarms(palettes)} |")
    every_good = [r for r in every if r["kind"] == "good"]
    lines.append(f"| all good outputs: ≤ 2 % false alarms | {false_alarms(every_good)} |")

    plain = [r for r in moderate["overlay"] if r["visible"] >= LEAST]
    hidden = len(moderate["overlay"]) - len(plain)
    left_out = scenes - {r["scene"] for r in rows if r["construction"] in BEHIND}
    behind = sum(len(s) for name in BEHIND for level, s in TABLE[name][1].items() if level == "moderate" or not sampled)
    if left_out:
        lines += [
            "",
            f"In {len(left_out)} of the {len(scenes)} scenes the new object leaves less than {HIDDEN:.0%} of the old one to be seen. What "
            f"would lie behind it ({', '.join(BEHIND)}) is left out there, {len(left_out) * behind} outputs in all: a rule that was made "
            "after the fit part had shown that such outputs are missed.",
        ]
    lines += [
        "",
        f"{hidden} of the {len(moderate['overlay'])} moderate overlays differ from the after picture by more than {SEEN} in Oklab in fewer "
        f"than {LEAST:.1%} of their pixels; they count above. Without them: {shown(separation(rows, f'{OURS}: overlay', plain))}.",
        "",
        "## Verdicts",
        "",
    ]
    fixed = [
        (name, [r for r in rows if r["construction"] == what])
        for name, what in (("copy of the before picture", "copy"), ("round trip of the after picture", "round trip"))
    ]
    groups = [
        (f"{kind}, {level}", [r for r in rows if r["kind"] == kind and r["level"] == level])
        for kind in KINDS[1:]
        for level in ("slight", "moderate", "severe")
    ]
    lines += confusion([*fixed, ("good, all", good), *groups])

    measures = [OURS, *PEERS]
    lines += [
        "",
        "## Beside other measures",
        "",
        "AUROC against all good outputs, at moderate severity. The peers are distances to the after picture, inside the mask; for "
        "collateral change outside of it, where it happens. They say that something is wrong, not what. LPIPS-, DINO- and "
        "CLIP-style: their formulas on EfficientNet-Lite0 with ImageNet weights, since no weights of the real ones could be "
        "had; the real ones may do better or worse." + (" Peers are measured on every third scene." if sampled else ""),
        "",
        "| failure | " + " | ".join(measures) + " |",
        "|---" * (len(measures) + 1) + "|",
    ]
    for failure, some in moderate.items():
        where = "outside: " if failure == "collateral change" else ""
        names = [f"{OURS}: {failure}", *(where + m for m in PEERS)]
        lines.append(f"| {failure} | " + " | ".join(f"{separation(rows, n, some).value:.3f}" for n in names) + " |")

    lines += [
        "",
        "## By construction",
        "",
        "*Fitted*: lines were set on it. *Kept out*: no line was set on it alone, but its numbers on the fitted parts were seen. An "
        "AUROC of collateral change does not depend on its line; what the verdict says does. *Shows*: how many of "
        f"the outputs differ visibly from the after picture in at least {LEAST:.1%} of their pixels.",
        "",
        *constructions(rows, [r for r in rows if r["kind"] != "good"]),
        "",
        "## Constructions that nobody had seen",
        "",
        "`unseen.py`, first judged in this run. Against the good outputs of the other table.",
        "",
    ]
    failures = [r for r in new if r["kind"] != "good"]
    lines += constructions([*good, *failures], failures)
    lines += ["", f"False alarms on its good outputs: {false_alarms([r for r in new if r['kind'] == 'good'])}.", ""]
    if tone:
        lines += [
            "## Edits of the whole picture",
            "",
            "`tones.py`: the room in other light or colours, judged without a mask. Halfway nothing is decided.",
            "",
            *confusion((name, [r for r in tone if r["construction"].endswith(": " + name)]) for name in tones.TABLE),
            "",
        ]
    lines += [
        "## Good outputs",
        "",
        "| construction | severity | called good |",
        "|---|---|---|",
    ]
    for construction, severity in dict.fromkeys(
        (r["construction"], r["severity"]) for r in every if r["kind"] == "good" and r["group"] != "tone"
    ):
        some = [r for r in every if (r["construction"], r["severity"]) == (construction, severity)]
        lines.append(f"| {construction} | {severity:g} | {sum(r['verdict'] == 'good' for r in some) / len(some):.0%} |")
    return "\n".join(lines) + "\n"


def read_rows(path: Path) -> list[dict]:
    """The outcomes of ``--csv``, to write the report anew without judging them again."""
    words = {"scene", "kind", "construction", "level", "group", "verdict", "alone"}
    with path.open(newline="") as file:
        rows = [
            {
                k: v if k in words else None if v == "" else v == "True" if k == "held out" else float(v)
                for k, v in r.items()
            }
            for r in csv.DictReader(file)
        ]
    return rows


def write_rows(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenes", type=Path, help="folder that render.py wrote")
    parser.add_argument("--part", choices=tuple(PARTS), default="sealed")
    parser.add_argument("--sample", type=int, default=0, help="moderate failures and each so manieth good output only")
    parser.add_argument("--limit", type=int, help="only so many scenes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="also write every outcome with its numbers")
    parser.add_argument("--rows", type=Path, help="report what an earlier --csv wrote, judging nothing")
    parser.add_argument("--out", type=Path, help="a Markdown file; printed otherwise")
    arguments = parser.parse_args()
    if arguments.rows:
        rows = read_rows(arguments.rows)
    else:
        paths = sorted(arguments.scenes.glob(f"{arguments.part}_*.npz"))[: arguments.limit]
        if not paths:
            parser.error(f"no scenes of the part {arguments.part} in {arguments.scenes}")
        rows = []
        with get_context("spawn").Pool(arguments.workers) as pool:
            work = pool.imap(partial(rows_of, sample=arguments.sample), paths)
            for some in tqdm(work, total=len(paths), unit="scene"):
                rows += some
                if arguments.csv:  # what was judged is kept
                    write_rows(rows, arguments.csv)
    text = report(rows, arguments.part)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
