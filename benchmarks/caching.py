"""Does caching keep the encoder busy? 1,000 pairs of picture files, read ahead in threads and one after the other.

    python benchmarks/caching.py

Generated JPEG and PNG files, an image encoder with random weights (timm's tf_efficientnet_lite0), one thread of torch for it, so
that the other cores are free as they are beside a GPU. Each way prepares every pair anew, in blocks that take turns, and the
embeddings must be equal to the last bit. Busy is the share of the wall time of embedding in which the encoder works. Writes
benchmarks/results/caching.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from step_tools import machine
from torch.nn import functional as F
from tqdm import tqdm

from editloss_core.encoders.timm_net import TimmEncoder
from editloss_core.encoders.vae import VAEEncoder
from editloss_core.pairs import find_pairs
from editloss_core.training import prepare as preparing

RESULTS = Path(__file__).resolve().parent / "results"
AHEAD, ONE_BY_ONE = "read ahead", "one after the other"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pairs", type=int, default=1000)
parser.add_argument("--pixels", type=int, default=384, help="side of the files (default: 384)")
parser.add_argument("--resolution", type=int, default=256, help="that pairs are prepared at (default: 256)")
parser.add_argument(
    "--crop", type=int, default=128, help="side of what the encoder sees; half, as by default (default: 128)"
)
parser.add_argument("--blocks", type=int, default=10, help="parts of the pairs, prepared in turns (default: 10)")
parser.add_argument("--encoder", default="tf_efficientnet_lite0", help="a timm name (default: tf_efficientnet_lite0)")
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the encoder")


@contextmanager
def one_by_one(read, keys, workers=0):
    """In place of editloss_core.ahead.ahead: nothing is read before it is asked for."""
    yield map(read, keys)


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
    encoder = TimmEncoder(args.encoder, layer=-1, image_size=-1, random_seed=0, device=args.device)
    busy = encoder.forward = Busy(encoder.forward, args.device)
    ways = {ONE_BY_ONE: one_by_one, AHEAD: preparing.ahead}
    took = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pairs(folder, args.pairs, args.pixels)
        pairs = find_pairs(folder, resolution=args.resolution, default_caption="edit")
        step = -(-len(pairs) // args.blocks)
        for block in tqdm(range(0, len(pairs), step), desc="blocks", disable=None):
            part, made = pairs.subset(range(block, min(block + step, len(pairs)))), {}
            for way, ahead in ways.items():
                preparing.ahead = ahead
                cache = folder / "cache" / way / str(block)
                preparing.prepare(part, vae, {}, cache, crop=args.crop)  # masks and latents are there before
                busy.seconds, began = 0.0, time.perf_counter()
                made[way] = preparing.prepare(part, vae, {encoder.info.name: encoder}, cache, crop=args.crop)
                took[way].append((time.perf_counter() - began, busy.seconds))
            for i in range(len(part)):
                a, b = (made[way].embeddings([i]).tensors for way in ways)
                assert all(torch.equal(a[key], b[key]) for key in a), f"the embeddings of pair {i} differ"
    lines = [
        "# Caching the embeddings of pairs",
        "",
        f"{machine(torch.device(args.device))}, {os.cpu_count()} cores. {args.pairs} pairs of {args.pixels}² files at {args.resolution}², crop {args.crop}², "
        f"{args.encoder}, in {args.blocks} blocks that take turns.",
        "",
        "| | encoder busy | time | milliseconds a pair |",
        "|---|---|---|---|",
    ]
    for way in ways:
        share = sum(b for _, b in took[way]) / sum(w for w, _ in took[way])
        ratio = statistics.median(mine[0] / other[0] for mine, other in zip(took[way], took[ONE_BY_ONE]))
        lines.append(
            f"| {way} | {share:.0%} | {ratio:.2f} × | {1000 * sum(w for w, _ in took[way]) / args.pairs:.0f} |"
        )
    text = "\n".join([*lines, "", "The embeddings of both ways are equal to the last bit."]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "caching.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
