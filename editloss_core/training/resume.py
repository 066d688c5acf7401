"""Whether a run can go on from a checkpoint, and what is not as it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Mapping

from ..lora.lora import LoRA
from ..runs.checkpoint import Checkpoint, CheckpointError
from .settings import TrainingSettings


def resumable(path: Path, lora: LoRA, settings: TrainingSettings) -> Checkpoint:
    """The checkpoint at ``path``, if a run of these settings can go on from it.

    Raises:
        CheckpointError: a file that cannot be used, or of a run with another LoRA, optimiser or model.
    """
    saved = Checkpoint.load(path)
    for name, theirs, mine in (
        ("lora", saved.info.get("lora"), asdict(lora.settings)),
        ("optimizer", saved.info.get("settings", {}).get("optimizer"), settings.optimizer),
    ):
        if theirs != mine:
            raise CheckpointError(f"{path.name}: its {name} is {theirs}, this run's is {mine}; use the same to resume")
    if {n: p.shape for n, p in lora.named_parameters()} != {n: t.shape for n, t in saved.lora.items()}:
        raise CheckpointError(f"{path.name}: it was made for another model")
    if (saved.average is None) != (not settings.ema):
        raise CheckpointError(f"{path.name}: one of the two runs has a moving average (ema), the other has none")
    return saved


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One note on what is not as in the run that is resumed, so that the end is not that of a run that was never stopped.

    What only watches (previews, measurements, checkpoints) is no difference, and neither is what ``then`` does not know.
    """
    harmless = {
        "gradients_every", "validate_every", "preview_steps", "previews", "checkpoint_every", "keep", "self_check",
    }  # fmt: skip
    if now["settings"]["schedule"] == "constant":
        harmless.add("steps")
    then = {"variants": None, **then}  # what was trained before there were any had none
    old, new = (
        {**info.get("settings", {}), **{k: v for k, v in info.items() if k != "settings"}} for info in (then, now)
    )
    changed = []
    for name in sorted(old.keys() & new.keys() - harmless):
        # As JSON with sorted keys: what was read from a file has its keys in another order, and lists for tuples.
        before, after = (json.dumps(value[name], sort_keys=True) for value in (old, new))
        if before != after:
            short = len(before) + len(after) < 60 and not isinstance(new[name], (dict, list, tuple))
            changed.append(f"{name} {before} → {after}" if short else name)
    return [f"resumed with other settings or pairs than before: {', '.join(changed)}"] if changed else []
