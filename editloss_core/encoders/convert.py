"""Weights from a PyTorch pickle (.pth, .pt, .bin) as safetensors, without running any code from the file.

python -m editloss_core.encoders.convert dinov2_vits14_pretrain.pth dinov2_vits14.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Mapping, Optional, Union

import torch
from torch import Tensor

from ..commands.exits import DONE
from ..commands.programs import CONVERT_ENCODER
from ..files import check_conversion, replacing

# Where training scripts put a network's tensors, in the order of preference: averaged weights first, as they are what a
# checkpoint is judged by (timm takes them first as well).
_CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "g_ema", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "module", "params", "network", "net", "weights", "generator"),
    *("encoder", "backbone", "student", "shadow"),
)
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile


def convert_to_safetensors(source: Union[str, Path], target: Union[str, Path], overwrite: bool = False) -> int:
    """Write the tensors of ``source`` to ``target`` and return how many there are.

    See :func:`convert`, which also says where they were.
    """
    return convert(source, target, overwrite)[0]


def convert(source: Union[str, Path], target: Union[str, Path], overwrite: bool = False) -> tuple[int, str]:
    """Write the tensors of ``source`` to ``target``.

    They are looked for in what training scripts wrap them in (``state_dict``, ``model``, ``model_ema`` …, also one in another),
    before any that lie beside it (an accuracy, an epoch, a state of randomness); averaged weights (ema) are taken before the
    others. A ``module.`` or ``_orig_mod.`` before every name is dropped, and what is not a tensor is left out. ``source`` is
    read with ``weights_only=True``: pickled code is refused, not run.

    Returns:
        How many tensors were written, and where in the source they were, such as ``"model.state_dict"``; ``""`` for its top.

    Raises:
        FileNotFoundError: if there is no ``source``, or no folder for ``target``.
        IsADirectoryError: if one of them is a folder.
        FileExistsError: if ``target`` exists and ``overwrite`` is False.
        NotWritten: no room left for ``target``, or no right to write it.
        ValueError: for a target that is not .safetensors and a source that holds code, a TorchScript program, no weights, or
            tensors that safetensors does not hold (sparse, quantised, without data).
    """
    from safetensors.torch import save_file

    source, target = Path(source), Path(target)
    check_conversion(source, target, overwrite)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of anything else raises anything else
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"source: {source.name} is not a plain file of tensors and was not opened, since it could "
            f"run code ({reason})"
        ) from error
    tensors, where = _tensors(loaded, source.name)
    with replacing(target) as partial:
        save_file(tensors, partial, metadata={"format": "pt", "converted_from": source.name})
    return len(tensors), where


def _tensors(loaded: Any, file: str) -> tuple[dict[str, Tensor], str]:
    found = _weights(loaded)
    if found is None:
        keys = f", with {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, Mapping) and loaded else ""
        raise ValueError(f"source: {file} holds no named tensors (found {type(loaded).__name__}{keys})")
    path, state = found
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    for name, value in tensors.items():
        fault = _fault(value)
        if fault:
            raise ValueError(f"source: {file} has {fault} as {name}; expected plain tensors")
    # Tied weights share memory, which safetensors refuses: each gets its own.
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    while wrapper := next((w for w in _WRAPPERS if all(k.startswith(w) for k in tensors)), ""):
        tensors = {k[len(wrapper) :]: v for k, v in tensors.items()}
    return tensors, ".".join(path)


def _weights(loaded: Any) -> Optional[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """(where it is, the mapping of a network's tensors); None if there is none. Single numbers alone are no network's."""
    if not isinstance(loaded, Mapping):
        return None
    for key in _CONTAINERS:
        found = _weights(loaded.get(key))
        if found is not None:
            return (key, *found[0]), found[1]
    return ((), loaded) if any(isinstance(v, Tensor) and v.ndim for v in loaded.values()) else None


def _fault(value: Tensor) -> str:
    """What safetensors does not hold of a tensor."""
    from safetensors.torch import save

    if value.is_meta:
        return "a tensor without data (on the device meta)"
    if value.is_quantized:
        return f"a quantised tensor ({value.dtype})"
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({value.layout})"
    try:
        save({"": torch.empty(0, dtype=value.dtype)})
    except (KeyError, ValueError):
        return f"a tensor of {value.dtype}"
    return ""


def run(given: argparse.Namespace) -> int:
    count, where = convert(given.source, given.target, given.overwrite)
    print(f"{count} tensors{f' of {where}' if where else ''} written to {given.target}")
    return DONE


main = CONVERT_ENCODER.main

if __name__ == "__main__":
    raise SystemExit(main())
