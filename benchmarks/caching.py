"""Does caching keep the encoder busy? 1,000 pairs of picture files, read and written beside it and one after the other.

    python benchmarks/caching.py

Generated JPEG and PNG files and two encoders: a network with random weights on one thread of torch (timm's
tf_efficientnet_lite0), and one that computes next to nothing and sleeps for --elsewhere milliseconds, which stands for a device
that takes no processor time; on a CUDA device the network alone. Each way prepares every pair anew, in blocks that take turns, and
the embeddings must be equal to the last bit. Busy is the share of the wall time of embedding in which the encoder works. Writes
benchmarks/results/caching.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from load import add_switch, busy, told
from PIL import Image
from step_tools import machine
from torch.nn import functional as F
from tqdm import tqdm

from editloss_core.encoders.base import EncoderInfo, PixelEncoder, Preprocess
from editloss_core.encoders.timm_net import TimmEncoder
from editloss_core.encoders.vae import VAEEncoder
from editloss_core.pairs import find_pairs
from editloss_core.training import prepare as preparing

RESULTS = Path(__file__).resolve().parent / "results"
BESIDE, ONE_BY_ONE = "beside the encoder", "one after the other"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pairs", type=int, default=1000)
parser.add_argument("--pixels", type=int, default=256, help="side of the files (default: 256)")
parser.add_argument("--resolution", type=int, default=192, help="that pairs are prepared at (default: 192)")
parser.add_argument(
    "--crop", type=int, default=96, help="side of what the encoder sees; half, as by default (default: 96)"
)
parser.add_argument("--blocks", type=int, default=10, help="parts of the pairs, prepared in turns (default: 10)")
parser.add_argument("--encoder", default="tf_efficientnet_lite0", help="a timm name (default: tf_efficientnet_lite0)")
parser.add_argument(
    "--elsewhere", type=float, default=30.0, help="milliseconds per pair of the encoder that sleeps (default: 30)"
)
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the encoder")
add_switch(parser)


@contextmanager
def one_by_one(read, keys, workers=0):
    """In place of editloss_core.ahead.ahead: nothing is read before it is asked for."""
    yield map(read, keys)


@contextmanager
def at_once(do):
    """In place of editloss_core.ahead.behind."""
    yield do


class Elsewhere(PixelEncoder):
    """Means of 8×8 pixels, after a while without processor time."""

    def __init__(self, seconds: float):
        self.seconds, info = seconds, EncoderInfo("elsewhere/grid", "", "elsewhere", "grid")
        super().__init__(info, Preprocess(0, 0, multiple=8), torch.device("cpu"))

    def features(self, pixels):
        time.sleep(self.seconds)
        return F.avg_pool2d(pixels, 8)


class Busy:
    """An encoder's function, and the seconds in it."""

    def __init__(self, function, device):
        self.function, self.device, self.seconds = function, device, 0.0

    def __call__(self, x):
        began = time.perf_counter()
        answer = self.function(x)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        return answer


def write_pairs(folder: Path, count: int, pixels: int) -> None:
    """Soft noise with a square of another; before as JPEG, after as PNG."""
    for part in ("before", "after"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in tqdm(range(count), desc="files", disable=None):
        soft = [
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
                (pixels, pixels), Image.Resampling.BICUBIC
            )
            for _ in range(2)
        ]
        soft[0].save(folder / "before" / f"{i:04}.jpg", quality=92)
        side = pixels // 3
        top, left = (int(v) for v in rng.integers(0, pixels - side, 2))
        after = soft[0].copy()
        after.paste(soft[1].crop((0, 0, side, side)), (left, top))
        after.save(folder / "after" / f"{i:04}.png", compress_level=1)


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(1)
    mixing = torch.randn(16, 3 * 64, generator=torch.Generator().manual_seed(0)) / 8

    def project(x):  # latents that cost nothing: this is about the encoder of pictures
        return (mixing @ F.unfold(x, 8, stride=8)).unflatten(2, (x.shape[2] // 8, x.shape[3] // 8))

    vae = VAEEncoder(project, "projection", "0", 8)
    network = TimmEncoder(args.encoder, layer=-1, image_size=-1, random_seed=0, device=args.device)
    encoders = {args.encoder: network}
    if args.device == "cpu":
        encoders[f"{args.elsewhere:g} ms elsewhere"] = Elsewhere(args.elsewhere / 1000)
    ways = {ONE_BY_ONE: (one_by_one, at_once), BESIDE: (preparing.ahead, preparing.behind)}
    took = {(label, way): [] for label in encoders for way in ways}
    with tempfile.TemporaryDirectory() as place, busy(args.load):
        folder = Path(place)
        write_pairs(folder, args.pairs, args.pixels)
        pairs = find_pairs(folder, resolution=args.resolution, default_caption="edit")
        step = -(-len(pairs) // args.blocks)
        for block in tqdm(range(0, len(pairs), step), desc="blocks", disable=None):
            part = pairs.subset(range(block, min(block + step, len(pairs))))
            ready = folder / "ready" / str(block)
            preparing.prepare(part, vae, {}, ready, crop=args.crop)  # masks and latents are there before
            for label, encoder in encoders.items():
                made = {}
                for way, (preparing.ahead, preparing.behind) in ways.items():
                    cache = folder / "caches" / label / way / str(block)
                    shutil.copytree(ready, cache)
                    work = Busy(type(encoder).forward.__get__(encoder), args.device)
                    encoder.forward, began, used = work, time.perf_counter(), time.process_time()
                    made[way] = preparing.prepare(part, vae, {encoder.info.name: encoder}, cache, crop=args.crop)
                    took[label, way].append((time.perf_counter() - began, work.seconds, time.process_time() - used))
                for i in range(len(part)):
                    a, b = (made[way].embeddings([i]).tensors for way in ways)
                    assert all(torch.equal(a[key], b[key]) for key in a), f"the embeddings of pair {i} differ"
        load = told(args.load)
    lines = [
        "# Caching the embeddings of pairs",
        "",
        f"{machine(torch.device(args.device))}, {load}. {args.pairs} pairs of {args.pixels}² files at {args.resolution}², crop {args.crop}², "
        f"in {args.blocks} blocks that take turns.",
        "",
        "| encoder | reading and writing | encoder busy | time | milliseconds a pair | cores in use |",
        "|---|---|---|---|---|---|",
    ]
    for (label, way), blocks in took.items():
        whole, work, processor = (sum(values) for values in zip(*blocks))
        ratio = statistics.median(mine[0] / other[0] for mine, other in zip(blocks, took[label, ONE_BY_ONE]))
        lines.append(
            f"| {label} | {way} | {work / whole:.0%} | {ratio:.2f} × | {1000 * whole / args.pairs:.0f} | {processor / whole:.2f} |"
        )
    text = (
        "\n".join(
            [
                *lines,
                "",
                "The embeddings of both ways are equal to the last bit. Where the process "
                "gets no more than one core, reading ahead of an encoder on the CPU cannot save time.",
            ]
        )
        + "\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "caching.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
