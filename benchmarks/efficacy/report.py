"""The tables and the picture of the experiment, from what the runs left."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Sequence

import arms
import torch

FAILURES = ("no edit", "overlay", "distorted")


def write_report(
    out: Path, results: Sequence[dict], bases: Sequence[list], pack: Callable[[str], Any], chosen: str = ""
) -> None:
    """Markdown at ``out``, and a picture of that name beside it; printed as well.

    Args:
        chosen: the options that say which of all runs these are.
    """
    judge = pack("editloss_core.demo.judge")
    about = arms.arms(pack("editloss_core.objective"))
    groups: dict[tuple[str, int], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for found in results:
        groups[found["data"], found["variants"]][found["arm"]].append(found)
    steps, seeds = results[0]["steps"], sorted({r["seed"] for r in results})
    lines = [
        "# Ways to train, judged in held-out rooms",
        "",
        f"`python benchmarks/efficacy{chosen}`: {len(seeds)} seeds, each with its own pairs, noise and {results[0]['rooms']} rooms; "
        f"{steps} steps of batch 6, rank 16, learning rate 0.008 with a cosine; encoder VAE latents where nothing else is said. "
        f"Right pairs: 12; flawed ones: 2 unedited and 2 overlaid more. torch {torch.__version__}, CPU, one thread a run. "
        "Seconds are processor seconds of the steps, as a ratio to flow matching's of the same seeds and pairs. An arm with fewer "
        "numbers under *good by seed* was run on fewer seeds.",
        "",
        "| arm | what it is |",
        "|---|---|",
        *(f"| {name} | {arm.about} |" for name, arm in about.items() if any(name in g for g in groups.values())),
    ]
    verdicts = [judge.Verdict(**v) for base in bases for v in base]
    if verdicts:
        lines += ["", "Before any training:", "", judge.table({"base": verdicts})]
    for (data, variants), runs in groups.items():
        called = f"{data}, {variants} variants of each pair" if variants else f"{data}, no variants"
        lines += ["", f"## {called[0].upper()}{called[1:]}", "", *_table(runs)]
    lines += ["", "The points before the last of a curve are of an eighth of the rooms.", ""]
    lines += [f"![Good outputs over steps and over seconds]({out.with_suffix('.webp').name})"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _picture(out.with_suffix(".webp"), groups)
    print("\n".join(lines))


def _table(runs: dict[str, list[dict]]) -> list[str]:
    plain = runs.get(arms.PLAIN)
    lines = [
        "| arm | good | no edit | overlay | distorted | collateral | good by seed | passes, seconds | good only here : only with "
        "flow matching | p (Holm) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    splits = {}
    if plain:
        for name, found in runs.items():
            seeds = {r["seed"] for r in found} & {r["seed"] for r in plain}
            if name != arms.PLAIN and seeds:
                splits[name] = _split(found, plain, seeds)
    held = holm({name: sign_test(*split) for name, split in splits.items()})
    for name, found in sorted(runs.items(), key=lambda item: list(runs).index(item[0])):
        outputs = [v["verdict"] for r in found for v in r["verdicts"]]
        shares = [f"{100 * outputs.count(kind) / len(outputs):.0f}" for kind in ("good", *FAILURES, "collateral")]
        by_seed = " ".join(f"{100 * _good(r):.0f}" for r in sorted(found, key=lambda r: r["seed"]))
        cost = ""
        if plain:
            times = {(r["seed"], r["processor"]): r["seconds"] for r in plain}
            both = [(r["seconds"], times[at]) for r in found if (at := (r["seed"], r["processor"])) in times]
            cost = f"{sum(ours for ours, _ in both) / sum(its for _, its in both):.2f} ×" if both else ""
        split = f"{splits[name][0]} : {splits[name][1]}" if name in splits else ""
        p = f"{held[name]:.2g}" if name in held else ""
        lines.append(
            f"| {name} | **{shares[0]} %** | {' | '.join(f'{s} %' for s in shares[1:])} | {by_seed} | {cost} | {split} | {p} |"
        )
    against = []
    for name, other in runs.items():
        seeds = {r["seed"] for r in runs.get(arms.RECIPE, ())} & {r["seed"] for r in other}
        if name not in (arms.PLAIN, arms.RECIPE) and seeds:
            here, there = _split(runs[arms.RECIPE], other, seeds)
            against.append(f"{name} {here} : {there} (p = {sign_test(here, there):.2g})")
    if against:
        lines += ["", f"Good only with the recipe : only with the other, seeds that both have: {'; '.join(against)}."]
    return lines


def _good(run: dict) -> float:
    return sum(v["verdict"] == "good" for v in run["verdicts"]) / len(run["verdicts"])


def _split(one: Sequence[dict], other: Sequence[dict], seeds: set[int]) -> tuple[int, int]:
    """In how many rooms one of two alone is good: (here, there)."""
    here = there = 0
    for seed in seeds:
        a, b = (next(r for r in runs if r["seed"] == seed)["verdicts"] for runs in (one, other))
        for x, y in zip(a, b):
            here += x["verdict"] == "good" != y["verdict"]
            there += y["verdict"] == "good" != x["verdict"]
    return here, there


def sign_test(here: int, there: int) -> float:
    """Two-sided: by what chance a split so uneven comes of a fair coin."""
    n = here + there
    tail = sum(math.comb(n, k) for k in range(min(here, there) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(found: dict[str, float]) -> dict[str, float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979) for as many tests as there are."""
    held, least = {}, 0.0
    for rank, (name, p) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(found) - rank) * p))
        held[name] = least
    return held


def _picture(path: Path, groups: dict) -> None:
    """Mean share of good outputs over steps and over seconds, a row for each kind of pairs; ones left out are the right ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    shown = [key for key in groups if key[0] != "flawed left out"]
    figure, axes = pyplot.subplots(len(shown), 2, figsize=(13, 4.2 * len(shown)), squeeze=False, layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    names = list(dict.fromkeys(name for key in shown for name in groups[key]))
    for row, key in zip(axes, shown):
        for name, runs in groups[key].items():
            style = {"color": colours[names.index(name) % 20], "lw": 2.6 if name in (arms.PLAIN, arms.RECIPE) else 1.3}
            curves = [[p for p in r["curve"][:-1] if p[0] < 0.95 * r["trained"]] + r["curve"][-1:] for r in runs]
            points = list(zip(*curves))
            for axis, k in zip(row, (0, 1)):
                xs = [sum(p[k] for p in at) / len(at) for at in points]
                ys = [100 * sum(p[2] for p in at) / len(at) for at in points]
                axis.plot([0, *xs], [0, *ys], marker="o", ms=3, label=name, **style)
        for axis, label in zip(row, ("steps", "processor seconds of the steps")):
            axis.set(
                xlabel=label, ylabel="good outputs, %", title=f"{key[0]}, {key[1] or 'no'} variants", ylim=(0, 100)
            )
            axis.grid(alpha=0.25)
        row[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    buffer = path.with_suffix(".png")
    figure.savefig(buffer, dpi=80)
    pyplot.close(figure)
    Image.open(buffer).convert("RGB").save(path, quality=88)
    buffer.unlink()
