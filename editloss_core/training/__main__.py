"""Train a Kontext LoRA without ComfyUI: ``python -m editloss_core.training CONFIG.toml``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from ..commands.exits import DONE, FOUND, INTERRUPTED, UNUSABLE
from ..commands.programs import TRAIN
from ..processes import ProcessLost, leave
from ..progress import ConsoleBar
from .gradients import NonFinite
from .memory import OutOfMemory
from .self_check import SelfCheckFailed

PACKAGES = ("diffusers", "accelerate", "transformers")
main = TRAIN.main


def start(given: argparse.Namespace) -> int:
    """Train, or check, what the configuration says."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # peft imports it whatever a run quantises; what it wants for kernels of CPUs is in nobody's way here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    missing = missing_packages()
    if missing:
        raise ImportError(f'{", ".join(missing)} is not installed; pip install -e ".[train]" in the folder of EditLoss')
    return check(given.config, given.parser.prog) if given.check else _train(given.config, given.parser.prog)


def missing_packages() -> list[str]:
    import importlib.util

    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _plan(path: Path) -> Any:
    from .run import plan_of

    with ConsoleBar("looking at pairs", delay=1.0) as bar:
        return plan_of(path, bar.update)


def check(path: Path, prog: str) -> int:
    from .run import accelerator_for, check_device

    try:
        plan = _plan(path)
        accelerator = accelerator_for(plan)
        check_device(plan, accelerator.device)
        print(plan.describe(accelerator.num_processes))
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return UNUSABLE
    return DONE


def _train(path: Path, prog: str) -> int:
    from .run import RunStopped, accelerator_for, check_device, run

    try:
        plan = _plan(path)
        accelerator = accelerator_for(plan)
        check_device(plan, accelerator.device)
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return UNUSABLE
    main_process = accelerator.is_main_process
    if main_process:
        print(plan.describe(accelerator.num_processes), flush=True)
    try:
        result = run(plan, accelerator)
    except KeyboardInterrupt:
        print(f'{prog}: interrupted; set resume = "last" in [run] to go on', file=sys.stderr)
        return INTERRUPTED
    except (NonFinite, OutOfMemory, ProcessLost, RunStopped) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return FOUND  # what was learnt is in the last checkpoint
    except (SelfCheckFailed, ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return UNUSABLE
    if main_process:
        try:
            finish(plan, result)
        except OSError as error:
            print(f"{prog}: {error}\nThe LoRA is kept in {plan.folder}.", file=sys.stderr)
            return FOUND
    for tracker in accelerator.trackers:
        tracker.finish()
    return DONE


def finish(plan: Any, result: Any) -> None:
    """The run's report: held-out pictures judged from their pixels."""
    from ..run_report.report import write_report

    if result.pictures:
        print(str(write_report(plan.folder)))
    print(f"{result.steps} steps, kept in {plan.folder}")


if __name__ == "__main__":
    leave(main())
