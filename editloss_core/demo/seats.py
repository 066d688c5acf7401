"""Seats from parameters: what the base model knows of shapes and colours. The stool is one combination that it never sees.

A seat has a height, a top, legs and a back, and a colour for its top, its rim (and the board of its back) and its legs. Words name all of it,
so that what a prompt asks for is determined: 108 shapes in 729 colourings.
"""

from __future__ import annotations

import random
import re
from dataclasses import astuple, dataclass, fields

from .pen import COLOURS, RGB, Pen, tone

__all__ = ["PART_COLOURS", "SEAT", "SEAT_WORDS", "STOOL_LOOK", "Seat", "draw_seat", "drawn_seat", "find_seat"]

HEIGHTS = {"low": -26, "medium": -40, "tall": -54}  # of the legs' upper ends
TOPS = ("round", "square", "cushioned")
LEGS = ("splayed", "straight", "pedestal", "crossed")
BACKS = ("backless", "barred", "boarded")
PART_COLOURS: dict[str, RGB] = {
    **COLOURS,
    "teal": (38, 200, 190),
    "pink": (222, 60, 140),
    "brown": (92, 52, 40),
}
PARTS = ("top", "rim", "legs")
SEAT = "seat"
SEAT_WORDS = (*HEIGHTS, *TOPS, *LEGS, *BACKS, *(f"{colour} {part}" for part in PARTS for colour in PART_COLOURS))


@dataclass(frozen=True)
class Seat:
    """One seat, in the words of a prompt.

    >>> print(STOOL_LOOK)
    medium round backless seat with splayed legs, teal top, pink rim, brown legs
    """

    height: str
    shape: str
    legs: str
    back: str
    top_colour: str
    rim_colour: str
    legs_colour: str

    def __post_init__(self) -> None:
        known = (tuple(HEIGHTS), TOPS, LEGS, BACKS, *[tuple(PART_COLOURS)] * len(PARTS))
        for field, words in zip(fields(self), known):
            if getattr(self, field.name) not in words:
                raise ValueError(f"{field.name}: expected one of {', '.join(words)}, got {getattr(self, field.name)!r}")

    @property
    def words(self) -> tuple[str, ...]:
        """Of ``SEAT_WORDS``, one for each parameter."""
        height, shape, legs, back, *colours = astuple(self)
        return (height, shape, legs, back, *(f"{colour} {part}" for colour, part in zip(colours, PARTS)))

    def __str__(self) -> str:
        top, rim, legs = self.words[4:]
        return f"{self.height} {self.shape} {self.back} seat with {self.legs} legs, {top}, {rim}, {legs}"


STOOL_LOOK = Seat("medium", "round", "splayed", "backless", "teal", "pink", "brown")


def drawn_seat(rng: random.Random) -> Seat:
    """Any seat but the stool: none of its shape has two of its colours."""
    while True:
        words = tuple(rng.choice(list(c)) for c in (HEIGHTS, TOPS, LEGS, BACKS, *[PART_COLOURS] * len(PARTS)))
        same = [a == b for a, b in zip(words, astuple(STOOL_LOOK))]
        if not (all(same[:4]) and sum(same[4:]) >= 2):
            return Seat(*words)


_DESCRIBED = re.compile(rf"(\w+) (\w+) (\w+) {SEAT} with (\w+) legs (\w+) top (\w+) rim (\w+) legs")


def find_seat(text: str) -> tuple[str, Seat | None]:
    """The text with the description of a seat, if one is in it, cut to ``SEAT``; and that seat.

    Args:
        text: lower case, without punctuation.

    Raises:
        ValueError: a description with a word that is not known.
    """
    found = _DESCRIBED.search(text)
    if found is None:
        return text, None
    height, shape, back, legs, *colours = found.groups()
    return f"{text[: found.start()]}{SEAT}{text[found.end() :]}", Seat(height, shape, legs, back, *colours)


def draw_seat(pen: Pen, seat: Seat) -> None:
    top, rim, legs = (PART_COLOURS[c] for c in (seat.top_colour, seat.rim_colour, seat.legs_colour))
    y = HEIGHTS[seat.height]
    if seat.back != "backless":
        _back(pen, seat.back, y - 6, rim, legs)
    {"splayed": _splayed, "straight": _straight, "pedestal": _pedestal, "crossed": _crossed}[seat.legs](pen, y, legs)
    {"round": _round, "square": _square, "cushioned": _cushioned}[seat.shape](pen, y, top, rim)


def _splayed(pen: Pen, y: float, c: RGB) -> None:
    line = tone(c, 0.5)
    pen.polygon([(-3, y), (3, y), (3, -7), (-2, -7)], tone(c, 0.75), line)
    pen.polygon([(-17, y), (-10, y), (-20, 0), (-26, 0)], c, line)
    pen.polygon([(10, y), (17, y), (26, 0), (20, 0)], c, line)


def _straight(pen: Pen, y: float, c: RGB) -> None:
    line = tone(c, 0.5)
    for x in (-13, 8):
        pen.box(x, y, x + 5, -7, tone(c, 0.75), line)
    for x in (-23, 17):
        pen.box(x, y, x + 6, 0, c, line)


def _pedestal(pen: Pen, y: float, c: RGB) -> None:
    line = tone(c, 0.5)
    pen.ellipse(-18, -8, 18, 4, tone(c, 0.75), line)
    pen.box(-4, y, 4, -2, c, line)


def _crossed(pen: Pen, y: float, c: RGB) -> None:
    line = tone(c, 0.5)
    pen.polygon([(15, y), (22, y), (-16, 0), (-23, 0)], tone(c, 0.75), line)
    pen.polygon([(-22, y), (-15, y), (23, 0), (16, 0)], c, line)


def _round(pen: Pen, y: float, top: RGB, rim: RGB) -> None:
    pen.ellipse(-25, y - 10, 25, y + 8, rim, tone(rim, 0.45))
    pen.ellipse(-25, y - 17, 25, y + 1, top, tone(top, 0.4))
    pen.ellipse(-15, y - 14, 8, y - 6, tone(top, 1.4))


def _square(pen: Pen, y: float, top: RGB, rim: RGB) -> None:
    pen.box(-26, y - 3, 26, y + 5, rim, tone(rim, 0.45))
    pen.polygon([(-26, y - 3), (26, y - 3), (20, y - 16), (-20, y - 16)], top, tone(top, 0.4))
    pen.polygon([(-17, y - 6), (4, y - 6), (2, y - 13), (-14, y - 13)], tone(top, 1.4))


def _cushioned(pen: Pen, y: float, top: RGB, rim: RGB) -> None:
    pen.box(-24, y - 2, 24, y + 6, rim, tone(rim, 0.45))
    pen.ellipse(-26, y - 20, 26, y + 3, top, tone(top, 0.4))
    pen.ellipse(-14, y - 17, 7, y - 9, tone(top, 1.4))


def _back(pen: Pen, kind: str, y: float, rim: RGB, legs: RGB) -> None:
    if kind == "boarded":
        pen.polygon([(-21, y), (21, y), (18, y - 28), (-18, y - 28)], tone(rim, 0.8), tone(rim, 0.45))
        return
    for x in (-20, 15):
        pen.box(x, y - 28, x + 5, y, tone(legs, 0.75), tone(legs, 0.5))
    pen.box(-20, y - 28, 20, y - 19, tone(rim, 0.8), tone(rim, 0.45))
