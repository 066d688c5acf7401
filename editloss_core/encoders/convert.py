"""Weights from a PyTorch pickle (.pth, .pt, .bin) as safetensors, without running any code from the file.

python -m editloss_core.encoders.convert dinov2_vits14_pretrain.pth dinov2_vits14.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Mapping, Union

import torch
from torch import Tensor

from ..commands.exits import DONE
from ..commands.programs import CONVERT_ENCODER
from ..files import replacing

# Where training scripts put a network's tensors, in the order of preference.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "teacher", "module", "params")


def convert_to_safetensors(source: Union[str, Path], target: Union[str, Path], overwrite: bool = False) -> int:
    """Write the tensors of ``source`` to ``target`` and return how many there are.

    A ``state_dict`` or ``model`` inside is unwrapped, a ``module.`` before every name is dropped, and what is not a
    tensor is left out. ``source`` is read with ``weights_only=True``: pickled code is refused, not run.

    Raises:
        FileNotFoundError: if there is no ``source``.
        FileExistsError: if ``target`` exists and ``overwrite`` is False.
        ValueError: for a target that is not .safetensors and a source that holds code, a TorchScript program, or no
            tensors.
    """
    from safetensors.torch import save_file

    source, target = Path(source), Path(target)
    if target.suffix.lower() != ".safetensors":
        raise ValueError(f"target: expected a name ending in .safetensors, got {target.name}")
    if not source.is_file():
        raise FileNotFoundError(f"source: no such file: {source}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"target: {target} exists already")
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of anything else raises anything else
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"source: {source.name} is not a plain file of tensors and was not opened, since it could "
            f"run code ({reason})"
        ) from error
    tensors = _tensors(loaded, source.name)
    with replacing(target) as partial:
        save_file(tensors, partial, metadata={"format": "pt", "converted_from": source.name})
    return len(tensors)


def _tensors(loaded: Any, file: str) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping) and not any(isinstance(v, Tensor) for v in loaded.values()):
        inner = next((loaded[k] for k in _CONTAINERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    # Tied weights share memory, which safetensors refuses: each gets its own.
    tensors = (
        {str(k): v.detach().clone().contiguous() for k, v in loaded.items() if isinstance(v, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not tensors:
        keys = f", with {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, Mapping) and loaded else ""
        raise ValueError(f"source: {file} holds no named tensors (found {type(loaded).__name__}{keys})")
    if all(k.startswith("module.") for k in tensors):
        tensors = {k[len("module.") :]: v for k, v in tensors.items()}
    return tensors


def run(given: argparse.Namespace) -> int:
    count = convert_to_safetensors(given.source, given.target, given.overwrite)
    print(f"{count} tensors written to {given.target}")
    return DONE


main = CONVERT_ENCODER.main

if __name__ == "__main__":
    raise SystemExit(main())
