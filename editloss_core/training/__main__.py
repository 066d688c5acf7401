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
    missing = missing_packages()
    if missing:
        raise ImportError(f'{", ".join(missing)} is not installed; pip install -e ".[train]" in the folder of EditLoss')
    return check(given.config, given.parser.prog) if given.check else _train(given.config, given.parser.prog)


def missing_packages() -> list[str]:
    import importlib.util

    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _plan(path: Path) -> Any:
    from .config_reader import read_config
    from .run import plan

    config = read_config(path)
    with ConsoleBar("looking at pairs", delay=1.0) as bar:
        return plan(config, path.parent, bar.update)


def check(path: Path, prog: str) -> int:
    try:
        print(_plan(path).describe())
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return UNUSABLE
    return DONE


def _train(path: Path, prog: str) -> int:
    from .run import accelerator_for, run

    try:
        plan = _plan(path)
        accelerator = accelerator_for(plan)
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
    except (NonFinite, OutOfMemory, ProcessLost) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return FOUND  # what was learnt is in the last checkpoint
    except (SelfCheckFailed, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return UNUSABLE
    if main_process:
        finish(plan, result)
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
