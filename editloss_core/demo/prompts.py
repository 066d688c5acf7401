"""Prompts as the small model reads them: a token per role, and a pooled vector of the operation and its target.

A Flux gives text tokens no order, so a token says itself what part it plays: it is (word ⊕ role). Word vectors are rows of
a Hadamard matrix: fixed, orthogonal, the same on every machine, and not learned. A seat is the sum of its words. Only the stool's is mixed, at a cosine
of 0.75 with the chair's, as a real text encoder would have it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .drawing import COLOURS, OBJECTS, STOOL
from .seats import SEAT, SEAT_WORDS, STOOL_LOOK, Seat, find_seat

__all__ = ["CONTEXT", "POOLED", "encode"]

WORD, ROLE = 64, 8
CONTEXT, POOLED = WORD + ROLE, WORD + ROLE
STOOL_CHAIR_COSINE = 0.75

OPERATIONS = ("replace", "remove", "make", "keep")
_IGNORED = ("a", "an", "the", "my", "with", "by", "please", "it")
_FORMS = "'replace the chair with a table', 'remove the lamp', 'make the box red' or 'keep the plant'"


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _vectors() -> dict[str, Tensor]:
    rows = _hadamard(WORD)[1:]  # the first row is constant
    words = {word: rows[i] for i, word in enumerate((*OBJECTS, *COLOURS, STOOL, "nothing", *SEAT_WORDS))}
    own = (1 - STOOL_CHAIR_COSINE**2) ** 0.5
    words[STOOL] = STOOL_CHAIR_COSINE * words["chair"] + own * words[STOOL]
    return words


_WORDS = _vectors()
_ROLES = {name: row for name, row in zip((*OPERATIONS, "source", "target"), _hadamard(ROLE))}


def encode(text: str) -> tuple[Tensor, Tensor]:
    """What a text encoder would give for a prompt.

    Case, punctuation and articles do not matter. A seat is one token as well: the sum of the vectors of its words, of one
    word's length.

    Args:
        text: such as "replace the chair with a table", "remove the lamp", "make the box red" or "keep the plant", or
            with a :class:`~editloss_core.demo.seats.Seat` as the target: "replace the chair with a " + str(seat).

    Returns:
        context ``[1, 2, CONTEXT]``: the source and the target, each with the role it plays; and pooled ``[1, POOLED]``: the
        target and the operation.

    Raises:
        ValueError: for an unknown word (the message names the known ones) and for a sentence of another form.

    >>> context, pooled = encode("Replace the chair with my stool.")
    >>> context.shape, pooled.shape
    (torch.Size([1, 2, 72]), torch.Size([1, 72]))
    """
    if not isinstance(text, str):
        raise ValueError(f"text: expected a string, got {type(text).__name__}")
    words = re.findall(r"[^\W_]+", text.lower())
    described, seat = find_seat(" ".join(words))
    words = [word for word in described.split() if word not in _IGNORED]
    things = (*OBJECTS, STOOL) if seat is None else (*OBJECTS, STOOL, SEAT)
    unknown = [word for word in words if word not in (*OPERATIONS, *things, *COLOURS)]
    if unknown:
        raise ValueError(
            f"text: the small model does not know {', '.join(map(repr, unknown))} in {text!r}; it knows "
            f"{', '.join(OPERATIONS)}; {', '.join((*OBJECTS, STOOL))}; {', '.join(COLOURS)}; seats such as 'a {STOOL_LOOK}'"
        )
    operation, source, target = (*words, "", "", "")[:3]
    wanted = {"replace": things, "make": tuple(COLOURS)}.get(operation, ("",))
    if len(words) > 3 or operation not in OPERATIONS or source not in things or source == SEAT or target not in wanted:
        raise ValueError(f"text: expected {_FORMS}, got {text!r}")
    target = target or ("nothing" if operation == "remove" else source)
    meaning = _WORDS[target] if target != SEAT or seat is None else _together(seat)
    tokens = [torch.cat([_WORDS[source], _ROLES["source"]]), torch.cat([meaning, _ROLES["target"]])]
    pooled = torch.cat([meaning, _ROLES[operation]])
    return torch.stack(tokens)[None], pooled[None]


def _together(seat: Seat) -> Tensor:
    vectors = torch.stack([_WORDS[word] for word in seat.words])
    return vectors.sum(0) / len(vectors) ** 0.5
