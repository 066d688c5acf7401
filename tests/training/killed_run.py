"""Run as a program: train in children that are killed at random moments, until one gets to the end.

Arguments: folder, seed. Prints how far each child got. The parent never trains, so that its children start clean.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 — checkpoints import it on first use: once here, not in every child

torch.set_num_threads(1)

from small import prepared_pairs, trainer  # noqa: E402

from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, checkpoints
from editloss_core.runs.log import LOG_FILE, RunLog

KILLS = 6
RUN = {"steps": 30, "checkpoint_every": 4, "ema": 0.9, "accumulation": 2, "batch_size": 2, "schedule": "cosine",
       "validate_every": 7, "lora": {"rank": 4, "alpha": 4.0, "layers": "all", "dropout": 0.1}}  # fmt: skip


def run(folder):
    """The run itself, from its last checkpoint if there is one; None instead of a folder keeps it in memory."""
    made = trainer(folder, prepared=prepared_pairs(), validation=prepared_pairs(1, seed=9, names="held out"), **RUN)
    saved = checkpoints(folder / CHECKPOINT_FOLDER) if folder else []
    if saved:
        made.resume(saved[-1])
    return made, made.run()


def changed(folder: Path) -> int:
    log = folder / LOG_FILE
    return log.stat().st_mtime_ns if log.is_file() else 0


def wait_for(folder: Path, begun: int, steps: int) -> None:
    """Until the child has written its log anew, and ``steps`` steps after that; 20 seconds at most."""
    until = time.monotonic() + 20
    while changed(folder) == begun and time.monotonic() < until:
        time.sleep(0.001)
    first = len(RunLog.read(folder).steps)
    while len(RunLog.read(folder).steps) < first + steps and time.monotonic() < until:
        time.sleep(0.005)


def main(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    prepared_pairs(), prepared_pairs(1, seed=9, names="held out")
    for attempt in range(KILLS + 1):
        before = [p.name for p in checkpoints(folder / CHECKPOINT_FOLDER)][-1:]
        begun = changed(folder)
        child = os.fork()
        if not child:
            code = 1
            try:
                run(folder)
                code = 0
            finally:
                os._exit(code)
        if attempt < KILLS:
            wait_for(folder, begun, rng.randint(0, 8))
            time.sleep(rng.uniform(0.0, 0.05))  # about a step
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        done = RunLog.read(folder).steps
        print(attempt, before, status, done[-1].step if done else 0, flush=True)
        if not os.WIFSIGNALED(status):
            sys.exit(os.WEXITSTATUS(status))
    sys.exit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
