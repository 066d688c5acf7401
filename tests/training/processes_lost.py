"""Run by a launcher, in two processes: a run whose second process is lost after its third step.

Arguments: the run's folder, and how it is lost: "SIGKILL", or "SIGSTOP", after which it does not answer.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch

torch.set_num_threads(1)

from small import trainer

from editloss_core import processes
from editloss_core.training.host import Host

RUN = {"steps": 6, "checkpoint_every": 2, "batch_size": 2}


class Lost(Host):
    def __init__(self, how: signal.Signals):
        self.how = how

    def on_step(self, log, total):
        if log.step == 3:
            os.kill(os.getpid(), self.how)


def main(folder: Path, how: str) -> None:
    from accelerate import Accelerator

    processes.GRACE = 0.5
    accelerator = Accelerator(cpu=True)
    host = None if accelerator.is_main_process else Lost(signal.Signals[how])
    trainer(folder, accelerator=accelerator, host=host, **RUN).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
