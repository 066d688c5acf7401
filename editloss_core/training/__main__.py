"""Train a Kontext LoRA without ComfyUI: ``python -m editloss_core.training CONFIG.toml``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from ..processes import ProcessLost, leave
from ..progress import ConsoleBar
from .gradients import NonFinite
from .memory import OutOfMemory
from .self_check import SelfCheckFailed

DONE, STOPPED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
PACKAGES = ("diffusers", "accelerate", "transformers")
EPILOG = """\
CONFIG.toml is written by the node Export Training Config, or by hand: configs/ has examples, docs/training_config.md every
key. On several processes:

  accelerate launch -m editloss_core.training CONFIG.toml

Written to the run's folder: lora.safetensors (for ComfyUI), lora_diffusers.safetensors (for diffusers), checkpoints,
log.jsonl, pictures of held-out pairs, and report.html.

exit status:
  0  the run is done, or --check found nothing wrong
  1  the run was stopped (out of memory, a loss that is not a number, a full disk); what was learnt is in the last checkpoint
  2  something is wrong with the config, the pairs or the model, or the self-check failed; nothing was learnt
  130  interrupted; what was learnt is in the last checkpoint
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m editloss_core.training",
        description="Train a LoRA for FLUX.1 Kontext on before/after pairs, with an objective on embeddings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to train, on what, and how")
    parser.add_argument("--check", action="store_true", help="check everything and print the plan; train nothing")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # peft imports it whatever a run quantises; what it wants for kernels of CPUs is in nobody's way here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    missing = _missing_packages()
    if missing:
        print(
            f'{parser.prog}: {", ".join(missing)} is not installed; pip install -e ".[train]" in the folder of EditLoss',
            file=sys.stderr,
        )
        return UNUSABLE
    return _check(given.config, parser.prog) if given.check else _train(given.config, parser.prog)


def _missing_packages() -> list[str]:
    import importlib.util

    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _plan(path: Path) -> Any:
    from .run import plan_of

    with ConsoleBar("looking at pairs", delay=1.0) as bar:
        return plan_of(path, bar.update)


def _check(path: Path, prog: str) -> int:
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
        return STOPPED
    except (SelfCheckFailed, ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return UNUSABLE
    if main_process:
        try:
            finish(plan, result)
        except OSError as error:
            print(f"{prog}: {error}\nThe LoRA is kept in {plan.folder}.", file=sys.stderr)
            return STOPPED
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
