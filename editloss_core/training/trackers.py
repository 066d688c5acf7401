"""What accelerate's trackers (TensorBoard and others) are told: every number of the log that is one per step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Optional, Union

from ..runs.log import StepLog, ValidationLog

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_trackers(accelerator: Optional[Accelerator], folder: Optional[Path], info: Mapping[str, Any]) -> None:
    """Start the trackers that the accelerator was made with (``log_with``), under the name of the run's folder.

    Nothing happens without any, or where the caller has started them.
    """
    if accelerator is None or not accelerator.log_with or accelerator.trackers:
        return
    settings = info.get("settings", {})
    config = {f"settings/{k}": v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in settings.items()}
    accelerator.init_trackers("editloss" if folder is None else folder.name, config=config)


def scalars(entry: Union[StepLog, ValidationLog]) -> dict[str, float]:
    """The numbers of a step or a validation, by names with slashes.

    A step has ``train/loss``, ``train/gradient_norm``, ``train/learning_rate``, ``train/seconds`` and, for each term that
    counted for one of its samples, means over those: ``loss/TERM``, ``weighted/TERM``, ``open/TERM`` (of the hinge) and
    ``gradient/TERM`` (its norm at the model's output, where it was measured). A validation has ``validation/TERM`` with
    the LoRA and ``validation_base/TERM`` without it.
    """
    if isinstance(entry, ValidationLog):
        return {
            f"{group}/{name}": value
            for group, velocity, terms in (
                ("validation", entry.velocity, entry.terms),
                ("validation_base", entry.velocity_base, entry.terms_base),
            )
            for name, value in {"velocity": velocity, **terms}.items()
        }
    found = {f"train/{name}": getattr(entry, name) for name in ("loss", "gradient_norm", "learning_rate", "seconds")}
    for name in dict.fromkeys(name for sample in entry.samples for name in sample.terms):
        rows = [sample.terms[name] for sample in entry.samples if name in sample.terms]
        for group, field in (("loss", "raw"), ("weighted", "weighted"), ("open", "open"), ("gradient", "gradient")):
            values = [getattr(row, field) for row in rows]
            if None not in values:
                found[f"{group}/{name}"] = sum(values) / len(values)
    return found
