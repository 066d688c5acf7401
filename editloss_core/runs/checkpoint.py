"""Checkpoints: everything that a run needs to go on, in one safetensors file that is whole or not there."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional

import torch
from torch import Tensor

from ..files import make_folder, replacing
from ..hashing import hash_tensors

FORMAT = "editloss-checkpoint-1"
CHECKPOINT_FOLDER = "checkpoints"  # of a run
SET_ASIDE = "set_aside"  # folder below the checkpoints
_NAME = re.compile(r"step_(\d+)\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")  # names that files.replacing makes


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` optimiser steps.

    Randomness needs no entry: every draw depends on the seed and the step alone.

    Attributes:
        step: steps done.
        lora: parameters by name.
        optimizer: the optimiser's ``state_dict``.
        average: the moving average by parameter name; None without one.
        info: plain values that say what was trained: settings, objective, pairs.
        shares: running means by which terms' weights are steered, see :class:`~editloss_core.training.shares.Shares`.
    """

    step: int
    lora: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    average: Optional[Mapping[str, Tensor]] = None
    info: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    def save(self, folder: Path, keep: Optional[int] = 3) -> Path:
        """Write ``folder/step_000100.safetensors`` and remove all but the ``keep`` latest; None removes none."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {f"lora/{name}": t for name, t in self.lora.items()}
        if self.average is not None:
            tensors.update({f"average/{name}": t for name, t in self.average.items()})
        skeleton = _pull_tensors(self.optimizer, "optimizer", tensors)
        tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        metadata = {
            "format": FORMAT,
            "step": str(self.step),
            "optimizer": json.dumps(skeleton),
            "info": json.dumps(self.info, sort_keys=True),
        }
        if self.shares:
            metadata["shares"] = json.dumps(self.shares)
        metadata["content"] = _content(tensors, metadata)
        make_folder(folder)
        path = checkpoint_path(folder, self.step)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        if keep is not None:
            for old in [p for p in checkpoints(folder) if p != path][: -keep + 1 or None]:
                old.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file of :meth:`save`.

        Raises:
            CheckpointError: no checkpoint, or a damaged one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file, torch.inference_mode(False):
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CheckpointError(
                        f"{path.name}: expected a checkpoint ({FORMAT}), got {metadata.get('format', 'no format entry')}"
                    )
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path.name}: not a readable checkpoint ({error}); resume from an earlier one"
            ) from error
        if metadata.get("content") != _content(tensors, metadata):
            raise CheckpointError(
                f"{path.name}: damaged, it does not match its content hash; resume from an earlier one"
            )
        average = _under("average", tensors)
        return cls(
            int(metadata["step"]),
            _under("lora", tensors),
            _put_tensors(json.loads(metadata["optimizer"]), tensors),
            average or None,
            json.loads(metadata["info"]),
            json.loads(metadata.get("shares", "{}")),
        )


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:06d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a folder by their steps: a copy to another disk may have changed the times of the files."""
    found = [p for p in folder.glob("step_*.safetensors") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def tidy(folder: Path, step: int) -> None:
    """Make a folder of checkpoints that of a run which stands at ``step``.

    What a killed process left half written is removed. Checkpoints of later steps are of a branch that was given up by
    going back to an earlier one: they must be neither the last one nor a reason to rotate out this run's own, so they are
    moved to ``set_aside/``, where only a person removes them.
    """
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
    for path in checkpoints(folder):
        if _step(path) > step:
            (folder / SET_ASIDE).mkdir(exist_ok=True)
            os.replace(path, folder / SET_ASIDE / path.name)


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None  # `checkpoints` gives no other
    return int(found[1])


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    shares = [metadata["shares"]] if "shares" in metadata else []
    return hash_tensors(
        sorted(tensors.items()), *(metadata.get(key, "") for key in ("step", "optimizer", "info")), *shares
    )


def _under(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.split("/", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{group}/")}


def _pull_tensors(value: Any, key: str, into: dict[str, Tensor]) -> Any:
    """A nested state as JSON, with its tensors moved to ``into``; keys keep their types, which JSON would not."""
    if isinstance(value, Tensor):
        into[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        # By number: keys such as 0 and "0" would have one path.
        return {"items": [[k, _pull_tensors(v, f"{key}/{i}", into)] for i, (k, v) in enumerate(value.items())]}
    if isinstance(value, (list, tuple)):
        items = [_pull_tensors(v, f"{key}/{i}", into) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    return {"value": value}


def _put_tensors(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_pull_tensors`."""
    kind, value = next(iter(node.items()))
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {k: _put_tensors(v, tensors) for k, v in value}
    if kind == "value":
        return value
    items = [_put_tensors(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items
