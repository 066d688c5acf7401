"""Drawn scenes with a known edit: before, after, the empty room, exact masks and the prompt, all from one seed.

A scene is a room, a place on the floor and an object of one colour there. An edit changes the object and nothing else,
and what it gives is determined by the before picture and the prompt: the new object stands at the same place, at the
same scale, in the old one's colour. The one exception is the stool, which always looks the same; it appears in
:func:`stool_pairs` and never in the tasks that the base model was taught.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Optional, Sequence, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_whole
from ..files import replacing
from .drawing import COLOURS, OBJECTS, SIZE, STOOL, background, sprite
from .seats import Seat

__all__ = [
    "FLAWS",
    "HELD_OUT",
    "TASKS",
    "Example",
    "Scene",
    "draw",
    "edit_region",
    "flawed",
    "stool_pairs",
    "write_folder",
]

TASKS = ("replace", "remove", "recolour")
FLAWS = ("unedited", "overlaid")
HELD_OUT = 1_000_000  # scenes of this seed and above were not used to train the base model
_STOOLS = 2_000_000  # scenes of stool pairs: STOOLS_EACH seeds for each seed of stool_pairs
_STOOLS_EACH = 1_000
_CONTRAST = 0.94
_GROWN = 3  # pixels around the objects that belong to the edit


@dataclass(frozen=True)
class Example:
    """One edit. Pictures are ``[H, W, 3]`` float32 in 0…1, masks ``[H, W]`` in 0…1: the part of a pixel that is covered.

    ``old_mask`` is the object of ``before``, ``new_mask`` that of ``after`` (all zeros where it was removed), both
    without their faint shadow. ``background`` is the room without either.
    """

    before: Tensor
    after: Tensor
    background: Tensor
    old_mask: Tensor
    new_mask: Tensor
    prompt: str
    seed: int
    task: str


@dataclass(frozen=True)
class Scene:
    """A room and a place in it, from a seed; :meth:`picture` puts an object there.

    >>> scene = Scene(3)
    >>> picture, mask = scene.picture("chair", "red")
    >>> picture.shape, mask.shape, bool(scene.picture(None, "red")[1].any())
    ((128, 128, 3), (128, 128), False)
    """

    seed: int

    @cached_property
    def _room(self) -> tuple[np.ndarray, tuple[float, float], float]:
        rng = random.Random(self.seed)
        horizon = rng.randrange(72, 88)
        depth = rng.random()  # 0 at the wall, 1 in front
        foot = (rng.uniform(44, 84), horizon + 14 + depth * (SIZE - 6 - horizon - 14))
        side: Optional[float] = None
        if rng.random() < 0.35:
            side = rng.uniform(10, 16) if foot[0] > SIZE / 2 else rng.uniform(112, 118)
        return background(rng, horizon, side), foot, 0.84 + 0.16 * depth

    def picture(self, name: Union[str, Seat, None], colour: str) -> tuple[np.ndarray, np.ndarray]:
        """The room with an object or a seat (None: without), ``[H, W, 3]`` float32 in 0…1, and the object's coverage ``[H, W]``."""
        room, foot, scale = self._room
        if name is None:
            return room, np.zeros(room.shape[:2], np.float32)
        layer, mask = sprite(name, colour, foot, scale)
        return room * (1 - layer[..., 3:]) + layer[..., :3], mask


def draw(
    seed: int,
    task: Optional[str] = None,
    source: Optional[str] = None,
    target: Union[str, Seat, None] = None,
) -> Example:
    """The example of a seed; what is not given is chosen by the seed.

    Args:
        seed: ≥ 0; from ``HELD_OUT`` on, the base model was not trained on the scene.
        task: one of ``TASKS``.
        source: the object of the before picture.
        target: for "replace" the new object or seat, for "recolour" the new colour; "remove" takes none.

    Raises:
        ValueError: for an unknown task, object or colour, and where the edit would change nothing.

    >>> draw(5, "replace", "chair", "table").prompt
    'replace the chair with a table'
    """
    check_whole("seed", seed, 0)
    rng = random.Random(f"task {seed}")
    colour = rng.choice(list(COLOURS))
    task = rng.choices(TASKS, (0.6, 0.2, 0.2))[0] if task is None else task
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    source = rng.choice([name for name in OBJECTS if name != target]) if source is None else source
    if source not in OBJECTS:
        raise ValueError(f"source: expected one of {', '.join(OBJECTS)}, got {source!r}")
    if task == "remove":
        if target is not None:
            raise ValueError(f"target: nothing can be given for 'remove', got {target!r}")
        return _example(seed, task, source, colour, None, colour, f"remove the {source}")
    if task == "recolour":
        target = rng.choice([name for name in COLOURS if name != colour]) if target is None else target
        if target not in COLOURS:
            raise ValueError(f"target: expected one of {', '.join(COLOURS)} for 'recolour', got {target!r}")
        if target == colour:
            colour = rng.choice([name for name in COLOURS if name != target])
        return _example(seed, task, source, colour, source, target, f"make the {source} {target}")
    if isinstance(target, Seat):
        return _example(seed, task, source, colour, target, colour, f"replace the {source} with a {target}")
    target = rng.choice([name for name in OBJECTS if name != source]) if target is None else target
    if target not in (*OBJECTS, STOOL):
        raise ValueError(f"target: expected one of {', '.join((*OBJECTS, STOOL))} for 'replace', got {target!r}")
    if target == source:
        raise ValueError(f"target: expected another object than the source, got {target!r} for both")
    article = "my" if target == STOOL else "a"
    return _example(seed, task, source, colour, target, colour, f"replace the {source} with {article} {target}")


def _example(
    seed: int,
    task: str,
    source: str | None,
    colour: str,
    target: str | Seat | None,
    target_colour: str,
    prompt: str,
) -> Example:
    scene = Scene(seed)
    before, old = scene.picture(source, colour)
    after, new = scene.picture(target, target_colour)
    empty, _ = scene.picture(None, colour)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    return Example(tensor(before), tensor(after), tensor(empty), tensor(old), tensor(new), prompt, seed, task)


def edit_region(example: Example) -> Tensor:
    """The mask that training gets, ``[H, W]`` of 0 and 1: where either object is, grown by 3 pixels."""
    union = (torch.maximum(example.old_mask, example.new_mask) > 0).float()
    return F.max_pool2d(union[None], 2 * _GROWN + 1, stride=1, padding=_GROWN)[0]


def stool_pairs(count: int, seed: int = 0, start: int = 0) -> list[Example]:
    """Pairs that replace an object by the stool: two thirds of them chairs, the rest the other objects in turn.

    Different seeds share no scene, with each other or with what the base model was trained on.

    Args:
        count: number of pairs; a seed has 1000.
        seed: ≥ 0; for instance 0 for the pairs to train on and 1 for those to test on.
        start: how many of the seed's pairs to leave out before: a large set can be drawn in parts.

    >>> [example.prompt for example in stool_pairs(3)]
    ['replace the chair with my stool', 'replace the chair with my stool', 'replace the table with my stool']
    """
    if not isinstance(start, int) or not 0 <= start < _STOOLS_EACH:
        raise ValueError(f"start: expected a whole number from 0 to {_STOOLS_EACH - 1}, got {start!r}")
    if not isinstance(count, int) or not 1 <= count <= _STOOLS_EACH - start:
        raise ValueError(f"count: expected a whole number from 1 to {_STOOLS_EACH - start}, got {count!r}")
    check_whole("seed", seed, 0)
    others = [name for name in OBJECTS if name != "chair"]
    first = _STOOLS + _STOOLS_EACH * seed
    sources = {i: "chair" if i % 3 < 2 else others[i // 3 % len(others)] for i in range(start, start + count)}
    return [draw(first + i, "replace", source, STOOL) for i, source in sources.items()]


def flawed(example: Example, flaw: str) -> Example:
    """The pair as a tool that makes pairs gives it where it fails; only ``after`` is another.

    Args:
        flaw: "unedited": the before picture again, rendered anew (6 % less contrast). "overlaid": the new object painted
            into the before picture, whose object nobody took away.

    >>> pair = draw(3, "replace", "chair", "stool")
    >>> [float((flawed(pair, flaw).after - pair.before).abs().mean()) < 0.1 for flaw in FLAWS]
    [True, True]
    """
    if flaw == "unedited":
        after = 0.5 + _CONTRAST * (example.before - 0.5)
    elif flaw == "overlaid":
        after = torch.where(example.new_mask[..., None] > 0.5, example.after, example.before)
    else:
        raise ValueError(f"flaw: expected one of {', '.join(FLAWS)}, got {flaw!r}")
    return replace(example, after=after)


def write_folder(examples: Sequence[Example], folder: Union[str, Path]) -> list[str]:
    """Writes examples as a folder of training pairs, as :mod:`editloss_core.pairs` reads it.

    ``before/NAME.png``, ``after/NAME.png``, ``after/NAME.txt`` with the prompt, and ``mask/NAME.png`` by
    :func:`edit_region`.

    Returns:
        The names, in the examples' order.
    """
    folder = Path(folder)
    for part in ("before", "after", "mask"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"scene_{example.seed:07d}" for example in examples]
    if len(set(names)) != len(names):
        raise ValueError("examples: expected one example per seed, got a seed twice")
    for name, example in zip(names, examples):
        for part, values in (("before", example.before), ("after", example.after), ("mask", edit_region(example))):
            with replacing(folder / part / f"{name}.png") as path:
                _picture(values).save(path, format="PNG")
        with replacing(folder / "after" / f"{name}.txt") as path:
            path.write_text(example.prompt + "\n", encoding="utf-8")
    return names


def _picture(values: Tensor) -> Image.Image:
    return Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
