"""Embeddings of a folder of pairs: ``python -m editloss_core.embeddings PAIRS --encoder … --out DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch

from ..device_memory import is_out_of_memory
from ..encoders.spec import EncoderSpec
from ..pairs import PairProblems, find_pairs
from ..processes import Processes, launched, leave
from ..progress import ConsoleBar
from .shards import SHARD_PAIRS, encode_pairs

if TYPE_CHECKING:
    from accelerate import Accelerator

DONE, UNUSABLE = 0, 2
EPILOG = f"""\
PAIRS is a folder with before/ and after/, or with NAME_before and NAME_after in one place, as for training.

An encoder is KIND:NAME,SETTING=VALUE,…: timm:vit_small_patch14_dinov2,weights=FILE.safetensors,output=grid,image_size=518 or
openclip:ViT-B-32,weights=FILE.safetensors. Several --encoder read the pictures once.

Written to DIR: shards of {SHARD_PAIRS} pairs (safetensors) and embeddings.safetensors.index.json, which
editloss_core.embeddings.load_shards(DIR) reads. Run the same command again after it was interrupted: shards that are there
are kept. On several GPUs, or CPUs by torchrun, the processes share out the shards, and the set is the same:

  accelerate launch -m editloss_core.embeddings PAIRS --encoder … --out DIR
  torchrun --nproc-per-node 3 -m editloss_core.embeddings PAIRS --encoder … --out DIR

exit status: 0 all is written, 2 wrong arguments, pairs or weights
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = _parser()
    return _run(parser.parse_args(arguments), _accelerator(), parser.prog)


def _run(given: argparse.Namespace, accelerator: Optional[Accelerator], program: str) -> int:
    processes = Processes(accelerator)
    device = accelerator.device if accelerator is not None else "cuda" if torch.cuda.is_available() else "cpu"

    def say(text: str) -> None:
        if processes.main:
            print(text, file=sys.stderr, flush=True)

    began = time.perf_counter()
    try:
        encoders = [spec.load(device) for spec in given.encoder]
        pairs = processes.once(
            lambda: find_pairs(given.pairs, given.control, resolution=given.resolution, default_caption="none"),
            (ValueError, OSError),
        )
        for note in pairs.notes:
            say(f"note: {note}")
        what = f"process 1 of {processes.count}" if processes.count > 1 else "encoding"
        with ConsoleBar(what, unit=" pictures", disable=not processes.main, smoothing=0.1) as bar:
            began = time.perf_counter()
            made = encode_pairs(
                pairs, encoders, given.out, masks=given.masks, batch_size=given.batch_size, shard_pairs=given.shard_pairs,
                processes=processes, progress=bar.update,
            )  # fmt: skip
    except (PairProblems, ValueError, OSError, ImportError) as error:
        say(f"{program}: {error}")
        return UNUSABLE
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say(f"{program}: the device has not enough memory ({error}); lower --batch-size, now {given.batch_size}")
        return UNUSABLE
    seconds = time.perf_counter() - began
    pictures = sum(processes.gather([made.pictures]))
    kept = f", {made.kept} of {made.shards} shards were there" if made.kept else ""
    by = f" by {processes.count} processes" if processes.count > 1 else ""
    say(f"{pictures} pictures in {seconds:.1f} s, {pictures / seconds:.1f} pictures/s{by}{kept}; see {made.index}")
    return DONE


def _accelerator() -> Optional[Accelerator]:
    """Of the processes that a launcher started; None for one alone, which needs no accelerate."""
    if launched() < 2:
        return None
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # They meet twice, at the start and at the end, and may differ by a shard's time.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patient])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m editloss_core.embeddings",
        description="Encode the before and after pictures of a folder of pairs into shards with an index.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pairs", metavar="PAIRS", help="see below")
    parser.add_argument(
        "--encoder",
        action="append",
        required=True,
        type=_spec,
        metavar="KIND:NAME,…",
        help="see below; may be given again",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--control", default="", metavar="DIR", help="folder of the before pictures, if PAIRS has the after ones"
    )
    parser.add_argument(
        "--resolution", type=int, default=1024, help="that pictures are read at, before the encoder's own (%(default)s)"
    )
    parser.add_argument(
        "--masks", action="store_true", help="keep the edit masks; every pair must have one, all of one size"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pictures per pass (%(default)s)")
    parser.add_argument("--shard-pairs", type=int, default=SHARD_PAIRS, help="pairs per file (%(default)s)")
    return parser


def _spec(text: str) -> EncoderSpec:
    try:
        return EncoderSpec.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    leave(main())
