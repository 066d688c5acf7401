"""Seconds, memory and accuracy of the losses beside their peers, on the same tensors in one process run.

    pip install -e . pytorch-metric-learning info-nce-pytorch
    python benchmarks/losses.py                    # writes benchmarks/results/losses.md
    python benchmarks/losses.py --only peers,tasks --rounds 3
    python benchmarks/losses.py --large            # also InfoNCE at 65,536 x 256
    python benchmarks/losses.py --only few,tasks --rounds 20 --threads 2 --out benchmarks/results/losses_two_threads.md
    python benchmarks/losses.py --only tasks --rounds 20 --threads 2 --load 2 --out benchmarks/results/losses_load_2.md
    python benchmarks/losses.py --only tasks --rounds 20 --threads 2 --load 4 --out benchmarks/results/losses_load_4.md

Every round runs all candidates once, one after the other, so that what disturbs the machine disturbs all of them; a row
shows the fastest round. With --load N, N other programs keep the machine busy, and of the task losses the objective and the
three functions are timed, in fp32, beside their plain compositions: the median round, and how many times as long plain
PyTorch takes in the same round, in the median and in the worst of the rounds. Memory is the peak of the resident set above
its size before the call, each in a process of its own (Linux). Errors are against float64 on the same (rounded) tensors: of
the loss, relative; of the gradient of the prediction, the largest difference relative to the largest number.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from load import add_switch, busy, told  # noqa: E402

from editloss_core import losses  # noqa: E402
from editloss_core.embeddings import EmbeddingSet  # noqa: E402
from editloss_core.encoders.base import EncoderInfo  # noqa: E402
from editloss_core.objective import recommended  # noqa: E402

SECTIONS = ("peers", "few", "tasks", "ranking", "info_nce")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARGIN = 0.25

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections (default: all)")
parser.add_argument("--shape", default="8,1024,768", help="of the four tensors of the task losses")
parser.add_argument("--rounds", type=int, default=15, help="rounds of the task losses (default: 15)")
parser.add_argument("--threads", type=int, default=0, help="of torch (default: as torch has it)")
parser.add_argument(
    "--cpu-time", action="store_true", help="CPU seconds of the process, for one thread on a machine that others use"
)
parser.add_argument("--large", action="store_true", help="also InfoNCE of 65,536 x 256, which takes minutes")
add_switch(parser)
parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "losses.md"), help="'' writes no file")
parser.add_argument("--measure", default="", help=argparse.SUPPRESS)  # one candidate in a process of its own


# --- candidates ------------------------------------------------------------------------------------------------------


def embeddings(count: int, shape, dtype=torch.float32) -> list[torch.Tensor]:
    """Tensors with a common part, as embeddings of similar pictures have; hinges of margin 0.25 are open."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(shape, generator=generator)
    return [(0.5 * common + torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]


def plain_cosine(a, b):
    return 1 - (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


def plain(pred, gt, src, overlay, geometry="cos"):
    """Written down as the formulas stand."""
    no_edit = F.relu(plain_cosine(pred, gt).mean(1) - plain_cosine(pred, src).mean(1) + MARGIN).mean()
    match = (pred - gt).square().sum(-1).mean() if geometry == "l2" else plain_cosine(pred, gt).mean()
    overlaid = F.relu(plain_cosine(pred, gt).mean(1) - plain_cosine(pred, overlay).mean(1) + MARGIN).mean()
    return no_edit + 0.5 * match + 0.7 * overlaid


def torchs_own(pred, gt, src, overlay, geometry="cos"):
    def distance(a, b):
        return (1 - F.cosine_similarity(a, b, dim=-1)).mean(1)

    def triplet(negative):
        return F.triplet_margin_with_distance_loss(pred, gt, negative, distance_function=distance, margin=MARGIN)

    match = (
        F.mse_loss(pred, gt, reduction="sum") / pred.shape[:-1].numel()
        if geometry == "l2"
        else distance(pred, gt).mean()
    )
    return triplet(src) + 0.5 * match + 0.7 * triplet(overlay)


def three_functions(pred, gt, src, overlay, geometry="l2"):
    return (
        losses.loss_no_edit_identity(pred, gt, src, margin=MARGIN)
        + 0.5 * losses.loss_geometry_match(pred, gt, kind=geometry)
        + 0.7 * losses.loss_overlay_avoidance(pred, gt, overlay, margin=MARGIN)
    )


MIX, INFO = recommended("encoder"), EncoderInfo("encoder", "", "", "grid")


def objective(pred, gt, src, overlay):
    made = EmbeddingSet()
    for role, z in (("pred", pred), ("gt", gt), ("src", src), ("overlay", overlay.unsqueeze(1))):
        made = made.with_embedding(role, INFO, z.unflatten(-2, (1, -1)))
    return MIX.evaluate(made).total


def bound(pred, gt, src, overlay):
    """Reads the four tensors and writes one of their size: no gradient can be had for less."""
    for x in (pred, gt, src, overlay):
        x.detach().sum()
    return torch.ones_like(pred)


TASKS = {
    "plain, cos": lambda *x: plain(*x),
    "torch's own, cos": lambda *x: torchs_own(*x),
    "objective": objective,
    "plain, l2": lambda *x: plain(*x, geometry="l2"),
    "torch's own, l2": lambda *x: torchs_own(*x, geometry="l2"),
    "three functions": three_functions,
}
COMPILED = {"plain, cos, compiled": "plain, cos", "objective, compiled": "objective", "three functions, compiled": "three functions"}  # fmt: skip


def plain_hinge(pred, gt, src):
    return F.relu(plain_cosine(pred, gt) - plain_cosine(pred, src) + MARGIN).mean()


def plain_hinges(pred, gt, negatives):
    return F.relu(plain_cosine(pred, gt)[:, None] - plain_cosine(pred[:, None], negatives) + MARGIN).mean()


def plain_contrastive(a, b):
    return plain_contrastive_on((a - b).norm(dim=-1))


def plain_contrastive_on(d):
    return (0.5 * SAME * d.square() + 0.5 * (1 - SAME) * F.relu(1 - d).square()).mean()


def plain_own_negatives(a, p, negatives):
    scores = torch.cat([plain_cosine(a, p)[:, None], plain_cosine(a[:, None], negatives)], 1)
    return F.cross_entropy(scores / -0.07, FIRST)


def plain_bank(a, p, bank):
    a, p, bank = (F.normalize(x, dim=-1) for x in (a, p, bank))
    return F.cross_entropy(torch.cat([(a * p).sum(-1, keepdim=True), a @ bank.T], 1) / 0.07, FIRST)


SAME, FIRST = torch.tensor([1.0, 0.0] * 4), torch.zeros(8, dtype=torch.long)

# Name → plainly written, and the public function, of three batches of vectors and of one of four negatives to each.
FEW = {
    "loss_no_edit_identity": (
        lambda p, g, s, n: plain_hinge(p, g, s),
        lambda p, g, s, n: losses.loss_no_edit_identity(p, g, s, margin=MARGIN),
    ),
    "loss_no_edit_identity, margin auto": (
        lambda p, g, s, n: F.relu(plain_cosine(p, g) - plain_cosine(p, s) + 0.5 * plain_cosine(g, s)).mean(),
        lambda p, g, s, n: losses.loss_no_edit_identity(p, g, s, margin="auto"),
    ),
    "loss_geometry_match, l2": (
        lambda p, g, s, n: (p - g).square().sum(-1).mean(),
        lambda p, g, s, n: losses.loss_geometry_match(p, g),
    ),
    "loss_geometry_match, l1": (
        lambda p, g, s, n: (p - g).abs().sum(-1).mean(),
        lambda p, g, s, n: losses.loss_geometry_match(p, g, kind="l1"),
    ),
    "loss_geometry_match, cos": (
        lambda p, g, s, n: plain_cosine(p, g).mean(),
        lambda p, g, s, n: losses.loss_geometry_match(p, g, kind="cos"),
    ),
    "loss_overlay_avoidance": (
        lambda p, g, s, n: plain_hinge(p, g, s),
        lambda p, g, s, n: losses.loss_overlay_avoidance(p, g, s, margin=MARGIN),
    ),
    "loss_overlay_avoidance, 4 overlays": (
        lambda p, g, s, n: plain_hinges(p, g, n),
        lambda p, g, s, n: losses.loss_overlay_avoidance(p, g, n, margin=MARGIN),
    ),
    "triplet_margin_loss": (
        lambda p, g, s, n: plain_hinge(p, g, s),
        lambda p, g, s, n: losses.triplet_margin_loss(p, g, s, margin=MARGIN),
    ),
    "multi_negative_ranking_loss, 4 negatives": (
        lambda p, g, s, n: plain_hinges(p, g, n),
        lambda p, g, s, n: losses.multi_negative_ranking_loss(p, g, n, margin=MARGIN),
    ),
    "contrastive_pair_loss": (
        lambda p, g, s, n: plain_contrastive(p, g),
        lambda p, g, s, n: losses.contrastive_pair_loss(p, g, SAME),
    ),
    "info_nce_loss, the batch": (
        lambda p, g, s, n: plain_info_nce(p, g),
        lambda p, g, s, n: losses.info_nce_loss(p, g),
    ),
    "info_nce_loss, a bank of 8": (
        lambda p, g, s, n: plain_bank(p, g, s),
        lambda p, g, s, n: losses.info_nce_loss(p, g, s),
    ),
    "info_nce_loss, 4 negatives": (
        lambda p, g, s, n: plain_own_negatives(p, g, n),
        lambda p, g, s, n: losses.info_nce_loss(p, g, n),
    ),
    "margin_ranking_on_distances": (
        lambda p, g, s, n: F.relu(p[:, 0] - g[:, 0] + MARGIN).mean(),
        lambda p, g, s, n: losses.margin_ranking_on_distances(p[:, 0], g[:, 0], MARGIN),
    ),
    "contrastive_on_distances": (
        lambda p, g, s, n: plain_contrastive_on(p[:, 0]),
        lambda p, g, s, n: losses.contrastive_on_distances(p[:, 0], SAME),
    ),
    "info_nce_on_distances": (
        lambda p, g, s, n: F.cross_entropy(torch.cat([p[:, :1], g[:, :4]], 1) / -0.07, FIRST),
        lambda p, g, s, n: losses.info_nce_on_distances(p[:, 0], g[:, :4]),
    ),
}


def plain_ranking(anchor, positive, negatives):
    d_neg = plain_cosine(anchor.unsqueeze(1), negatives).flatten(2).mean(2)
    return F.relu(plain_cosine(anchor, positive).mean(1, keepdim=True) - d_neg + MARGIN).mean()


RANKING = {
    "plain": plain_ranking,
    "multi_negative_ranking_loss": lambda a, p, n: losses.multi_negative_ranking_loss(a, p, n, margin=MARGIN),
}


def info_nce_pytorch(a, p):
    from info_nce import info_nce

    return info_nce(a, p, temperature=0.07)


def clip_loss(a, p):
    """Both directions, so twice the work after the product of the two batches."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(F.normalize(a, dim=-1), F.normalize(p, dim=-1), 1 / 0.07)


def metric_learning(a, p):
    from pytorch_metric_learning.losses import NTXentLoss

    labels = torch.arange(len(a))  # two tensors: given one twice, it takes a and p for the same samples
    return NTXentLoss(temperature=0.07)(a, labels, ref_emb=p, ref_labels=labels.clone())


def plain_info_nce(a, p):
    logits = F.normalize(a, dim=-1) @ F.normalize(p, dim=-1).T / 0.07
    return F.cross_entropy(logits, torch.arange(len(a)))


INFO_NCE = {
    "info-nce-pytorch": info_nce_pytorch,
    "open_clip ClipLoss": clip_loss,
    "pytorch-metric-learning NTXent": metric_learning,
    "info_nce_loss": lambda a, p: losses.info_nce_loss(a, p, temperature=0.07),
}


# --- measuring -------------------------------------------------------------------------------------------------------


def step(function, inputs):
    """Loss, gradient of the first input."""
    for x in inputs:
        x.grad = None
    result = function(*inputs)
    if result.requires_grad:
        result.backward()
    return result.detach(), inputs[0].grad


def seconds(candidates: dict, inputs, rounds: int) -> dict[str, list[float]]:
    """Of every round."""
    options = {"num_threads": torch.get_num_threads(), "timer": clock()}
    timers = {
        name: Timer("step(function, inputs)", globals={"step": step, "inputs": inputs, "function": f}, **options)
        for name, f in candidates.items()
    }
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer.timeit(1).mean)
    return found


def clock():
    return time.process_time if ARGS.cpu_time else time.perf_counter


def errors(function, inputs, reference) -> tuple[float, float]:
    value, gradient = step(function, inputs)
    expected, expected_gradient = reference
    off = (gradient.double() - expected_gradient).abs().max() / expected_gradient.abs().max()
    return abs(value.item() - expected.item()) / abs(expected.item()), off.item()


def in_float64(function, inputs):
    return step(function, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])


def status(key: str) -> float:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def measured(section: str, name: str, *shape: int, dtype: str = "fp32") -> dict:
    """Seconds and peak MiB of one call in a process of its own, or what it raised."""
    command = [sys.executable, __file__, "--measure", json.dumps([section, name, shape, dtype])]
    command += ["--threads", str(torch.get_num_threads())] + ["--cpu-time"] * ARGS.cpu_time
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"raised": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_here(section: str, name: str, shape, dtype: str) -> None:
    function = {"tasks": TASKS, "info_nce": INFO_NCE, "ranking": RANKING}[section][name]
    for size in ((2, *shape[1:]) if section != "info_nce" else (64, *shape[1:]), tuple(shape)):
        if section == "ranking":
            batch, k, *rest = size
            inputs = [*embeddings(2, (batch, *rest), DTYPES[dtype]), embeddings(1, (batch, k, *rest), DTYPES[dtype])[0]]
        else:
            inputs = embeddings(4 if section == "tasks" else 2, size, DTYPES[dtype])
        for x in inputs if section == "info_nce" else inputs[:1]:
            x.requires_grad_()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that would be used again goes back …
        Path("/proc/self/clear_refs").write_text("5")  # … and the peak so far is forgotten
        before, began = status("VmRSS"), clock()()
        function(*inputs).backward()
        took, peak = clock()() - began, status("VmHWM") - before
    print(json.dumps({"seconds": took, "mib": peak}))


# --- sections --------------------------------------------------------------------------------------------------------


def table(head: str, rows: list[str]) -> list[str]:
    return [head, "|" + "---|" * head.strip("|").count("|") + "---|", *rows, ""]


def tasks(args) -> list[str]:
    shape = tuple(int(n) for n in args.shape.split(","))
    if args.load:
        return tasks_under_load(args, shape)
    lines = [f"## The three task losses, forward and backward, 4 × {list(shape)}", ""]
    lines += [
        "Margins 0.25, weights 1, 0.5, 0.7, every hinge open, gradient for the prediction alone. The objective matches "
        "geometry by cosine, as the recommended mix does; the three public functions, one by one, by their default, squared "
        "L2. The ratios compare with the composition of the same geometry. The bound reads the four tensors and writes one. Memory is in tensors of one embedding's size; the gradient "
        "is one of them. Called one by one, the three functions read tensors 16 times, write three gradients, "
        "and autograd adds these up: five times the traffic of the bound. "
        "The objective and a compiler share it. Unscaled fp16 gradients of this size are subnormal numbers: their error is the dtype's.",
        "",
    ]
    for dtype in DTYPES:
        inputs = embeddings(4, shape, DTYPES[dtype])
        inputs[0].requires_grad_()
        candidates = {"bound": bound, **TASKS}
        if dtype == "fp32":
            for name, of in COMPILED.items():
                torch._dynamo.reset()
                candidates[name] = torch.compile(TASKS[of])
                step(candidates[name], inputs)
        every = seconds(candidates, inputs, args.rounds)
        times = {name: min(rounds) for name, rounds in every.items()}
        references = {g: in_float64(lambda *x, g=g: plain(*x, geometry=g), inputs) for g in ("cos", "l2")}
        size = inputs[0].numel() * inputs[0].element_size() / 2**20
        rows = []
        for name, took in times.items():
            geometry = "l2" if "l2" in name or "three" in name else "cos"
            cells = ["–"] * 5
            if name != "bound":
                base, own = times[f"plain, {geometry}"], times[f"torch's own, {geometry}"]
                off = errors(candidates[name], inputs, references[geometry])
                peak = measured("tasks", name, *shape, dtype=dtype) if name in TASKS else None
                cells = [f"{base / took:.1f} ×", f"{own / took:.1f} ×", f"{peak['mib'] / size:.1f}" if peak else "–"]
                cells += [f"{e:.0e}" for e in off]
            row = [name, f"{1e3 * took:.1f} ms", f"{took / times['bound']:.1f} ×", *cells]
            rows.append("| " + " | ".join(row) + " |")
            print(dtype, rows[-1], flush=True)
        head = "| {} | fastest | of the bound | plain takes | torch's own takes | memory | error: loss | gradient |"
        lines += table(head.format(dtype), rows)
    return lines


def tasks_under_load(args, shape) -> list[str]:
    lines = [f"## The three task losses while others run, forward and backward, 4 × {list(shape)}, fp32", ""]
    lines += [f"Of {args.rounds} rounds; the ratios are of the same round.", ""]
    inputs, rows = embeddings(4, shape), []
    inputs[0].requires_grad_()
    bases = {
        "plain, cos": "plain, cos",
        "objective": "plain, cos",
        "plain, l2": "plain, l2",
        "three functions": "plain, l2",
    }
    now, found = clock(), {name: [] for name in bases}
    for _ in range(1 + args.rounds):  # the first does not count; torch's timer would call each three times a round
        for name, times in found.items():
            began = now()
            step(TASKS[name], inputs)
            times.append(now() - began)
    found = {name: times[1:] for name, times in found.items()}
    for name, base in bases.items():
        ratios = [theirs / ours for ours, theirs in zip(found[name], found[base])]
        row = [name, *(f"{1e3 * take(found[name]):.0f} ms" for take in (min, median, max))]
        row += ["–", "–"] if name == base else [f"{median(ratios):.1f} ×", f"{min(ratios):.1f} ×"]
        rows.append(f"| {' | '.join(row)} |")
        print(rows[-1], flush=True)
    head = "| | fastest | median | slowest | plain takes, in the median round | in the round that is worst for it |"
    return lines + table(head, rows)


def few(args) -> list[str]:
    inputs = [*embeddings(3, (8, 512)), embeddings(1, (8, 4, 512))[0]]
    inputs[0].requires_grad_()
    rows = []
    for name, pair in FEW.items():
        timers = [
            Timer("step(f, inputs)", globals={"step": step, "inputs": inputs, "f": f}, num_threads=torch.get_num_threads(),
                  timer=clock())
            for f in pair
        ]  # fmt: skip
        found = [[timer.timeit(200).mean for timer in timers] for _ in range(args.rounds)]
        plainly, ours = (1e6 * min(column) for column in zip(*found))
        ratio = median(b / a for a, b in found)
        rows.append(f"| {name} | {plainly:.0f} µs | {ours:.0f} µs | {ratio:.2f} × |")
        print(rows[-1], flush=True)
    lines = ["## A batch of 8 vectors of 512 features, forward and backward, checks included, fp32", ""]
    lines += ["Gradient for the prediction alone; the fastest of the rounds of 200 calls, and the median of the rounds' ratios.", ""]  # fmt: skip
    return lines + table("| | plain | the function | of plain |", rows)


def ranking(args) -> list[str]:
    batch, k, tokens, dim = 4, 64, 256, 768
    lines = [f"## Multi-negative ranking, K = {k} negatives of [{batch}, {tokens}, {dim}], fp32", ""]
    anchor, positive = embeddings(2, (batch, tokens, dim))
    inputs = [anchor.requires_grad_(), positive, embeddings(1, (batch, k, tokens, dim))[0]]
    every = seconds(RANKING, inputs, max(2, args.rounds // 4))
    times = {name: min(rounds) for name, rounds in every.items()}
    reference = in_float64(plain_ranking, inputs)
    size, rows = anchor.numel() * 4 / 2**20, []
    for name, took in times.items():
        off = errors(RANKING[name], inputs, reference)
        peak = measured("ranking", name, batch, k, tokens, dim)["mib"] / size
        rows.append(
            f"| {name} | {1e3 * took:.0f} ms | {times['plain'] / took:.1f} × | {peak:.1f} | {off[0]:.0e} | {off[1]:.0e} |"
        )
        print(rows[-1], flush=True)
    head = "| | fastest | plain takes | memory, in anchors | error: loss | gradient |"
    return lines + table(head, rows)


def info_nce(args) -> list[str]:
    lines = ["## InfoNCE against the batch, forward and backward, fp32, gradients for both inputs", ""]
    rows = []
    small = [x.requires_grad_() for x in embeddings(2, (1024, 512))]
    reference = in_float64(plain_info_nce, small)
    plans = {"info-nce-pytorch": 3, "info_nce_loss": 3, "open_clip ClipLoss": 1, "pytorch-metric-learning NTXent": 1}
    for batch in (4096, 16384):
        found: dict[str, list[dict]] = {name: [] for name in plans}
        for turn in range(3):
            for name, turns in plans.items():
                if turn < turns and not (batch > 4096 and "metric" in name):  # wants batch³ booleans
                    found[name].append(measured("info_nce", name, batch, 512))
        best = {name: min(r, key=lambda x: x.get("seconds", 1e9)) for name, r in found.items() if r}
        base = best["info-nce-pytorch"]
        for name, r in best.items():
            if "raised" in r:
                rows.append(f"| {name} | {batch} × 512 | {r['raised']} | | | | | |")
                continue
            off = errors(INFO_NCE[name], small, reference)
            accuracy = ("other loss", "") if "Clip" in name else (f"{off[0]:.0e}", f"{off[1]:.0e}")
            rows.append(
                f"| {name} | {batch} × 512 | {r['seconds']:.2f} s | {r['seconds'] / base['seconds']:.2f} × | {r['mib']:.0f} MiB "
                f"| 1/{base['mib'] / r['mib']:.1f} | {accuracy[0]} | {accuracy[1]} |"
            )
            print(rows[-1], flush=True)
    head = "| | batch | fastest | of info-nce-pytorch | peak memory | of info-nce-pytorch | error at 1024: loss | gradient |"
    lines += table(head, rows)
    lines += ["Peak memory of `info_nce_loss` over the batch (inputs not counted, their two gradients counted):", ""]
    sizes = [(n, 256) for n in (4096, 8192, 16384, 32768)] + [(256, 64, 256), (1024, 64, 256)]
    rows = []
    for shape in sizes + ([(65536, 256)] if args.large else []):
        r = measured("info_nce", "info_nce_loss", *shape)
        numbers = torch.Size(shape).numel()
        rows.append(
            f"| {' × '.join(map(str, shape))} | {r['seconds']:.2f} s | {r['mib']:.0f} MiB | {r['mib'] * 2**20 / 4 / numbers:.1f} |"
            if "mib" in r
            else f"| {' × '.join(map(str, shape))} | {r['raised']} | | |"
        )
        print(rows[-1], flush=True)
    return lines + table("| batch × (tokens ×) features | time | peak | in tensors of one input's size |", rows)


def peers(args) -> list[str]:
    """Tries each peer on what a trainer of edit models has: tokens, bf16, a batch of one."""
    from pytorch_metric_learning.losses import TripletMarginLoss

    def pml_triplet(a, p):
        n = torch.arange(len(a))
        return TripletMarginLoss(margin=3.0)(torch.cat([a, p]), torch.cat([n, n]))

    def pml_batch_of_one(a, p):
        """One anchor and positive of one label and one negative of another."""
        return TripletMarginLoss(margin=3.0)(torch.cat([a, p, -a]), torch.tensor([0, 0, 1]))

    made = {
        "tokens [4, 16, 32]": embeddings(2, (4, 16, 32)),
        "bf16 [4, 32]": embeddings(2, (4, 32), torch.bfloat16),
        "fp16 with a zero vector": [x.index_fill(0, torch.tensor([0]), 0.0) for x in embeddings(2, (4, 32), torch.float16)],
        "a batch of one": embeddings(2, (1, 32)),
    }  # fmt: skip
    candidates = {
        "torch cosine_similarity + triplet": lambda a, p: F.triplet_margin_with_distance_loss(
            a, p, -a, distance_function=lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1)
        ),
        "pytorch-metric-learning triplet": pml_triplet,
        "pytorch-metric-learning NTXent": metric_learning,
        "info-nce-pytorch": info_nce_pytorch,
        "open_clip ClipLoss": clip_loss,
        "triplet_margin_loss": lambda a, p: losses.triplet_margin_loss(a, p, -a, margin=3.0),
        "info_nce_loss": lambda a, p: losses.info_nce_loss(a, p),
    }
    rows = []
    for name, function in candidates.items():
        cells = []
        for what, inputs in made.items():
            inputs = [x.detach().clone().requires_grad_() for x in inputs]
            try:
                single = "one" in what and name == "pytorch-metric-learning triplet"
                value, gradient = step(pml_batch_of_one if single else function, inputs)
                if gradient is None or not (value.isfinite().all() and gradient.isfinite().all()):
                    cells.append("not a number" if gradient is not None else f"{value.item():g}, no gradient")
                else:
                    cells.append(f"{value.item():.4g}" + (" (rounded)" if value.dtype == torch.bfloat16 else ""))
            except Exception as error:  # noqa: BLE001 (what it raises is what is asked)
                cells.append(f"raises {type(error).__name__}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    lines = ["## What the peers can be given", ""]
    lines += ['The loss that each gives, or why it gives none. "rounded": the loss itself is a bf16 number.', ""]
    return lines + table(f"| | {' | '.join(made)} |", rows)


def main(args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure:
        measure_here(*json.loads(args.measure))
        return
    wanted, found = args.only.split(","), []
    with busy(args.load):
        for section in SECTIONS:
            if section in wanted:
                found += globals()[section](args)
        load = told(args.load)
    lines = [
        "# The losses beside their peers",
        "",
        f"`{' '.join(['python benchmarks/losses.py', *sys.argv[1:]])}` on a CPU ({torch.backends.cpu.get_cpu_capability()}), "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); {load}"
        + (". CPU seconds of the process." if args.cpu_time else "."),
        "",
        *found,
    ]
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(exist_ok=True)
        out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    ARGS = parser.parse_args()
    main(ARGS)
