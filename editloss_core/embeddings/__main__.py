"""Embeddings of a folder of pairs: ``python -m editloss_core.embeddings PAIRS --encoder … --out DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Optional

import torch

from ..commands.exits import DONE, UNUSABLE
from ..commands.programs import EMBED
from ..device_memory import is_out_of_memory
from ..encoders.spec import encoder_spec
from ..pairs import PairProblems, find_pairs
from ..processes import Processes, launched, leave
from ..progress import ConsoleBar
from .shards import encode_pairs

if TYPE_CHECKING:
    from accelerate import Accelerator

main = EMBED.main


def embed(given: argparse.Namespace) -> int:
    given.encoder = [encoder_spec(given, text) for text in given.encoder]
    return _run(given, _accelerator(), given.parser.prog)


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


if __name__ == "__main__":
    leave(main())
