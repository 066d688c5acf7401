"""A run that has ended is not trained again because ComfyUI let go of what it gave.

ComfyUI keeps a node's outputs and does not run it again for the same inputs. Yet it lets go of them: for other graphs, at
"Free model and node cache", and newer ones, by default, where main memory gets short, which it does with a large model. The
next Run of the same graph, for another picture of the curves, would then train for hours what is on disk already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Sequence

import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..editloss_core.lora.lora import LoRA
from .sockets import TrainingRun


@dataclass(frozen=True)
class _Ended:
    """The last run of this session, without its model: a LoRA takes megabytes, what it is attached to gigabytes."""

    request: str
    run: TrainingRun
    weights: Mapping[str, Tensor]
    notes: tuple[str, ...]


_last: Optional[_Ended] = None


def request(prompt: Optional[Mapping[str, Any]], name: str, info: Mapping[str, Any]) -> str:
    """What the node that runs was asked for, as text: itself and all nodes before it, and what their outputs hold.

    Args:
        prompt: the graph (``io.Hidden.prompt``).
        name: of the run.
        info: of the trainer: settings, and the digests of pairs and encoders.

    Returns:
        "" where there is no graph, or the node is not in it.
    """
    context = get_executing_context()
    if not prompt or context is None or context.node_id not in prompt:
        return ""
    before, waiting = {}, [context.node_id]
    while waiting:
        node = waiting.pop()
        if node not in before:
            before[node] = {key: prompt[node][key] for key in ("class_type", "inputs")}
            links = [value for value in prompt[node]["inputs"].values() if isinstance(value, list) and len(value) == 2]
            waiting += [source for source, _ in links if isinstance(source, str) and source in prompt]
    return json.dumps([before, name, info], sort_keys=True, default=str)


def find(asked: str, lora: LoRA) -> Optional[tuple[TrainingRun, tuple[str, ...]]]:
    """The run that this very request led to, with its weights in ``lora``, and its notes.

    None if there was none in this session, or its files are gone: who deletes them wants another.
    """
    if not asked or _last is None or _last.request != asked or not _last.run.result.checkpoint.is_file():
        return None
    with torch.no_grad():
        for parameter_name, p in lora.named_parameters():
            p.copy_(_last.weights[parameter_name])
    lora.eval()
    return replace(_last.run, result=replace(_last.run.result, lora=lora)), _last.notes


def keep(asked: str, run: TrainingRun, notes: Sequence[str]) -> None:
    """Remember a run that has ended, in place of the one before it."""
    global _last
    if asked and run.result.checkpoint is not None:
        weights = {name: p.detach().cpu().clone() for name, p in run.result.lora.named_parameters()}
        _last = _Ended(asked, replace(run, result=replace(run.result, lora=None)), weights, tuple(notes))
