"""Do the losses earn their place? Ways to train against one another, judged in held-out rooms without an encoder.

    python benchmarks/efficacy --comfyui PATH

Every arm starts from the embedded model with the same pairs, seed and number of steps, and is judged in rooms that none has
seen, from what was drawn (editloss_core/demo/judge.py). Runs are spread over processes of one thread; each leaves a file
below --runs, and one that is there, or in --record, is not made again, so that the experiment can be stopped and go on,
on another machine as well. Writes benchmarks/results/efficacy.md, a picture of the curves, and the record.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arms  # noqa: E402
import record  # noqa: E402
from in_comfyui import ROOT, start  # noqa: E402

WEIGHTS = ROOT / "editloss_core" / "demo" / "weights"
PLAN = {  # (data, variants of each pair) → arms, in the order in which they are made
    ("flawed kept", 8): (
        arms.PLAIN, arms.RECIPE, "regression on rollouts", "only no-edit identity", "only overlay avoidance",
        "pair weights", "losses on rollouts", "edit region × 4", "contrastive flow matching", "attract-only features",
        "Flow-DPO",
    ),
    ("right", 8): (
        arms.PLAIN, arms.RECIPE, "regression on rollouts", "only geometry match", "one-step losses × 4", arms.LONGER,
    ),
    ("right", 0): (arms.PLAIN, arms.RECIPE),
    ("flawed left out", 8): (arms.PLAIN, arms.RECIPE),
    ("flawed kept", 0): (arms.PLAIN, arms.RECIPE),
}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--comfyui", default="", help="ComfyUI's folder (default: COMFYUI_PATH)")
parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated; each has its own pairs, rooms and noise")
parser.add_argument("--rooms", type=int, default=64, help="held-out rooms per run (default: 64)")
parser.add_argument("--steps", type=int, default=250, help="of each run (default: 250)")
parser.add_argument("--arms", default="", help="comma-separated names; default: all")
parser.add_argument("--data", default="", help="comma-separated: right, flawed kept, flawed left out; default: all")
parser.add_argument("--variants", default="", help="comma-separated numbers; default: those of the plan")
parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each (default: the cores)")
parser.add_argument("--runs", type=Path, default=ROOT / "results" / "efficacy", help="folder of what each run found")
parser.add_argument(
    "--record", type=Path, default=ROOT / "benchmarks" / "results" / "efficacy_runs.jsonl", help="of all runs, in git"
)
parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "efficacy.md")
parser.add_argument("--report", action="store_true", help="no runs: write the report of those that are there")
parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def jobs(args: argparse.Namespace) -> list:
    """In the order in which they are made: seed by seed, so that an early stop leaves whole comparisons."""
    from one import Job

    def chosen(text: str, everything: list) -> list:
        return [part.strip() for part in text.split(",")] if text else everything

    found = []
    for seed in map(int, args.seeds.split(",")):
        for (data, variants), names in PLAN.items():
            if data in chosen(args.data, [data]) and str(variants) in chosen(args.variants, [str(variants)]):
                for name in names:
                    if name in chosen(args.arms, [name]):
                        found.append(Job(name, data, variants, args.steps, seed, args.rooms))
    return sorted(found, key=lambda job: (job.seed, job.arm == arms.LONGER))


def work(args: argparse.Namespace) -> None:
    """Take jobs that nobody has taken until there are none."""
    from one import Lab

    lab, recorded = Lab(start(args.comfyui), args.runs / "cache"), known(args)
    for job in jobs(args):
        path, claim = args.runs / f"{job.name}.json", args.runs / f"{job.name}.claim"
        if path.is_file() or job in recorded:
            continue
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        cost = 1.0
        if lab.arms[job.arm].longer:
            pair = [replace(job, arm=name) for name in (lab.arms[job.arm].longer, arms.PLAIN)]
            times = [read(args.runs / f"{other.name}.json") or recorded.get(other) for other in pair]
            if None in times:
                claim.unlink()
                continue
            cost = times[0]["seconds"] / times[1]["seconds"]
        write(path, lab.run(job, cost))
        claim.unlink()
    for seed in map(int, args.seeds.split(",")):
        path = args.runs / f"base-{seed}-{args.rooms}.json"
        if not path.is_file():
            write(path, {"verdicts": lab.base(seed, args.rooms)})


def known(args: argparse.Namespace) -> dict:
    """Jobs that the record has, and what they found."""
    from one import Job

    runs = record.load(args.record, record.digest(WEIGHTS))
    return {Job(*(run[field.name] for field in fields(Job))): run for run in runs}


def read(path: Path) -> dict | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def write(path: Path, values: dict) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.worker:
        work(args)
        return
    todo, recorded = jobs(args), known(args)

    def made() -> int:
        return sum(j in recorded or (args.runs / f"{j.name}.json").is_file() for j in todo)

    if not args.report:
        for claim in args.runs.glob("*.claim"):
            claim.unlink()
        began, before = time.time(), made()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent), *sys.argv[1:], "--worker"]
        for _turn in range(2):  # once more for what waited for another run
            workers = [subprocess.Popen(command, env=environment) for _ in range(args.processes)]
            while any(w.poll() is None for w in workers):
                time.sleep(20)
                done = made()
                left = (time.time() - began) / max(1, done - before) * (len(todo) - done)
                print(f"{done} of {len(todo)} runs; about {left / 60:.0f} minutes left", flush=True)
            if any(w.returncode for w in workers):
                raise SystemExit("a process failed; what is done is kept")
    from report import write_report

    ours = {"base": record.digest(WEIGHTS), "processor": record.processor()}
    for job in todo:
        found = read(args.runs / f"{job.name}.json")
        if found:
            recorded[job] = {**ours, **found}
    record.save(args.record, list(recorded.values()))
    results = [recorded[job] for job in todo if job in recorded]
    bases = [read(p)["verdicts"] for p in sorted(args.runs.glob(f"base-*-{args.rooms}.json"))]
    chosen = {"data": args.data, "variants": args.variants, "arms": args.arms}
    options = "".join(f" --{name} {shlex.quote(value)}" for name, value in chosen.items() if value)
    write_report(args.out, results, bases, start(args.comfyui), options)


if __name__ == "__main__":
    main()
