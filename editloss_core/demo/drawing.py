"""Rooms and objects as PIL pictures: flat shading in three tones, drawn four times too large and reduced.

All coordinates are pixels of the finished ``SIZE`` × ``SIZE`` picture; an object's origin is the point on the floor where
it stands, y goes up as negative numbers.
"""

from __future__ import annotations

import colorsys
import random

import numpy as np
from PIL import Image, ImageChops

from .pen import COLOURS, FINE, RGB, Pen, tone
from .seats import STOOL_LOOK, Seat, draw_seat

__all__ = ["COLOURS", "OBJECTS", "SIZE", "STOOL", "background", "sprite"]

SIZE = 128
OBJECTS = ("chair", "table", "lamp", "box", "plant")
STOOL = "stool"  # the base model never sees it, only other seats
LEAVES = (64, 138, 84)
LEFT, RIGHT, ABOVE, BELOW = 46, 46, 88, 10  # what a sprite may cover around its foot at scale 1

# ---------------------------------------------------------------------------------------------------------------------
# Objects
# ---------------------------------------------------------------------------------------------------------------------


def chair(pen: Pen, c: RGB) -> None:
    line, light, dark = tone(c, 0.4), tone(c, 1.3), tone(c, 0.7)
    for x in (-15, 11):
        pen.box(x, -28, x + 4, -7, dark, line)
    pen.box(-18, -72, -12, -36, c, line)
    pen.box(12, -72, 18, -36, c, line)
    pen.box(-16, -70, 16, -58, light, line)
    pen.box(-14, -53, 14, -46, light, line)
    pen.polygon([(-22, -28), (22, -28), (18, -39), (-18, -39)], light, line)
    pen.box(-22, -28, 22, -22, c, line)
    for x in (-21, 15):
        pen.box(x, -22, x + 6, 0, c, line)


def table(pen: Pen, c: RGB) -> None:
    line, light, dark = tone(c, 0.4), tone(c, 1.3), tone(c, 0.7)
    for x in (-29, 24):
        pen.box(x, -32, x + 5, -8, dark, line)
    for x in (-38, 32):
        pen.box(x, -32, x + 6, 0, c, line)
    pen.polygon([(-41, -35), (41, -35), (33, -48), (-33, -48)], light, line)
    pen.box(-41, -35, 41, -28, c, line)


def lamp(pen: Pen, c: RGB) -> None:
    line, light, dark = tone(c, 0.4), tone(c, 1.35), tone(c, 0.7)
    pen.ellipse(-15, -7, 15, 3, dark, line)
    pen.box(-3, -58, 3, -3, dark, line)
    pen.polygon([(-12, -84), (12, -84), (22, -52), (-22, -52)], c, line)
    pen.polygon([(-8, -82), (-1, -82), (-5, -54), (-17, -54)], light)


def box(pen: Pen, c: RGB) -> None:
    line, light, dark = tone(c, 0.4), tone(c, 1.35), tone(c, 0.68)
    pen.polygon([(14, 0), (28, -12), (28, -50), (14, -38)], dark, line)
    pen.polygon([(-27, -38), (14, -38), (28, -50), (-13, -50)], light, line)
    pen.box(-27, -38, 14, 0, c, line)
    pen.box(-11, -38, -3, -14, light)


def plant(pen: Pen, c: RGB) -> None:
    line, light, leaf = tone(c, 0.4), tone(c, 1.25), tone(LEAVES, 0.45)
    for x, y, shade in (
        (-30, -50, 0.75),
        (30, -50, 0.75),
        (-22, -68, 0.9),
        (22, -68, 0.9),
        (0, -80, 1.0),
        (-10, -62, 1.2),
        (11, -60, 1.2),
    ):
        nx, ny = -y * 0.13, x * 0.13  # half the leaf's width, across it
        foot = (x * 0.1, -26)
        mid = (x * 0.5, foot[1] + (y - foot[1]) * 0.55)
        pen.polygon(
            [foot, (mid[0] + nx, mid[1] + ny), (x, y), (mid[0] - nx, mid[1] - ny)], tone(LEAVES, shade), leaf, 1.0
        )
    pen.polygon([(-15, -24), (15, -24), (11, 0), (-11, 0)], c, line)
    pen.polygon([(-15, -24), (-7, -24), (-6, 0), (-11, 0)], light)
    pen.box(-18, -31, 18, -23, light, line)


def stool(pen: Pen, c: RGB) -> None:
    """One fixed look, whatever the colour of the object that it replaces."""
    draw_seat(pen, STOOL_LOOK)


FURNITURE = {"chair": chair, "table": table, "lamp": lamp, "box": box, "plant": plant, STOOL: stool}
SHADOW = {"chair": 23, "table": 41, "lamp": 17, "box": 28, "plant": 16, STOOL: 26}  # half widths


def sprite(name: str | Seat, colour: str, foot: tuple[float, float], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """An object, or a seat by its looks, on transparent ground: premultiplied ``[H, W, 4]`` in 0…1 and its coverage ``[H, W]`` without shadow."""
    left, top = int(foot[0] - LEFT * scale), int(foot[1] - ABOVE * scale)
    right, bottom = int(foot[0] + RIGHT * scale) + 1, int(foot[1] + BELOW * scale) + 1
    origin = (foot[0] - left, foot[1] - top)
    small = (right - left, bottom - top)
    layer = Image.new("RGB", (small[0] * FINE, small[1] * FINE), (255, 0, 254))
    pen = Pen(layer, origin, scale)
    if isinstance(name, Seat):
        draw_seat(pen, name)
    else:
        FURNITURE[name](pen, COLOURS[colour])
    fine = np.asarray(layer)
    solid = (fine[..., 2] != 254) | (fine[..., 1] != 0)  # nothing is drawn in the key colour
    shadow = Image.new("L", layer.size)
    width = SHADOW[STOOL if isinstance(name, Seat) else name]
    Pen(shadow, origin, scale).ellipse(-width, -9, width, 5, 31)  # 12 % of 255
    covered = Image.fromarray(solid.astype(np.uint8) * 255)
    shadow.paste(255, mask=covered)
    layer.paste((0, 0, 0), mask=ImageChops.invert(covered))
    parts = [
        np.asarray(part.reduce(FINE), np.float32).reshape(small[1], small[0], -1) for part in (layer, shadow, covered)
    ]
    reduced = np.concatenate(parts, -1) / 255
    whole = np.zeros((SIZE, SIZE, 5), np.float32)
    y0, x0, y1, x1 = max(0, top), max(0, left), min(SIZE, bottom), min(SIZE, right)
    whole[y0:y1, x0:x1] = reduced[y0 - top : y1 - top, x0 - left : x1 - left]
    return whole[..., :4], whole[..., 4]


# ---------------------------------------------------------------------------------------------------------------------
# Rooms
# ---------------------------------------------------------------------------------------------------------------------


def background(rng: random.Random, horizon: int, side: float | None) -> np.ndarray:
    """A wall and a floor with patterns, something on the wall, perhaps a rug, and perhaps a ball: ``[H, W, 3]`` in 0…1.

    Args:
        rng: where all choices come from.
        horizon: row at which the floor begins.
        side: x of a ball that has nothing to do with the edit; None for none.
    """
    picture = Image.new("RGB", (SIZE * FINE, SIZE * FINE))
    pen = Pen(picture, (0, 0))
    wall = pastel(rng, 0.10, 0.30, 0.80, 0.96)
    floor = pastel(rng, 0.12, 0.34, 0.58, 0.78, hue=rng.choice((None, rng.uniform(0.05, 0.12))))
    pen.box(0, 0, SIZE, horizon, wall)
    wallpaper(pen, rng, wall, horizon)
    pen.box(0, horizon, SIZE, SIZE, floor)
    boards(pen, rng, floor, horizon)
    skirting = rng.choice(((250, 248, 244), tone(wall, 0.78)))
    pen.box(0, horizon - 5, SIZE, horizon, skirting)
    pen.box(0, horizon - 0.6, SIZE, horizon + 0.6, tone(floor, 0.7))
    if rng.random() < 0.75:
        on_the_wall(pen, rng, wall, horizon)
    if rng.random() < 0.5:
        rug(pen, rng, horizon)
    if side is not None:
        ball = pastel(rng, 0.5, 0.75, 0.7, 0.9)
        y = rng.uniform(horizon + 12, horizon + 24)
        pen.ellipse(side - 9, y - 3, side + 9, y + 3, tone(floor, 0.85))
        pen.ellipse(side - 8, y - 16, side + 8, y, ball, tone(ball, 0.5))
        pen.ellipse(side - 4, y - 13, side + 1, y - 9, tone(ball, 1.5))
    return np.asarray(picture.reduce(FINE), np.float32) / 255


def pastel(rng: random.Random, s0: float, s1: float, v0: float, v1: float, hue: float | None = None) -> RGB:
    hue = rng.random() if hue is None else hue
    r, g, b = colorsys.hsv_to_rgb(hue, rng.uniform(s0, s1), rng.uniform(v0, v1))
    return round(255 * r), round(255 * g), round(255 * b)


def wallpaper(pen: Pen, rng: random.Random, wall: RGB, horizon: int) -> None:
    kind = rng.choice(("plain", "plain", "stripes", "dots", "panels"))
    other = tone(wall, rng.choice((0.9, 1.4)))
    if kind == "stripes":
        step = rng.choice((12, 16, 24))
        for x in range(rng.randrange(step), SIZE, step):
            pen.box(x, 0, x + step / 2, horizon, other)
    elif kind == "dots":
        step = rng.choice((16, 20))
        for row, y in enumerate(range(rng.randrange(4, step), horizon, step)):
            for x in range(-step + (row % 2) * step // 2, SIZE + step, step):
                pen.ellipse(x - 2.5, y - 2.5, x + 2.5, y + 2.5, other)
    elif kind == "panels":
        top = rng.randrange(horizon - 40, horizon - 24)
        pen.box(0, top, SIZE, horizon, other)
        pen.box(0, top - 1.5, SIZE, top + 1.5, tone(wall, 0.75))


def boards(pen: Pen, rng: random.Random, floor: RGB, horizon: int) -> None:
    kind = rng.choice(("plain", "boards", "rows", "tiles"))
    other = tone(floor, 0.88)
    if kind == "boards":  # converging towards the horizon
        centre = rng.uniform(40, 88)
        for k in range(-9, 10):
            x0, x1 = centre + 14 * k, centre + 30 * k
            pen.polygon([(x0 - 0.4, horizon), (x0 + 0.4, horizon), (x1 + 0.9, SIZE), (x1 - 0.9, SIZE)], other)
    elif kind == "rows":
        y, step = float(horizon), 5.0
        while y < SIZE:
            pen.box(0, y, SIZE, y + 1.2, other)
            y, step = y + step, step * 1.35
    elif kind == "tiles":
        y, step, row = float(horizon), 7.0, 0
        while y < SIZE:
            width = step * 2.2
            for k in range(-9, 10):
                if (k + row) % 2:
                    pen.box(64 + k * width, y, 64 + (k + 1) * width, y + step, tone(floor, 0.93))
            y, step, row = y + step, step * 1.3, row + 1


def on_the_wall(pen: Pen, rng: random.Random, wall: RGB, horizon: int) -> None:
    width, height = rng.randrange(26, 42), rng.randrange(22, 34)
    x, y = rng.randrange(4, SIZE - width - 4), rng.randrange(5, max(6, horizon - height - 26))
    frame = rng.choice(((250, 248, 244), (150, 108, 72), (92, 84, 84)))
    pen.box(x - 2.5, y - 2.5, x + width + 2.5, y + height + 2.5, frame, tone(frame, 0.7), 0.8)
    if rng.random() < 0.5:  # a window
        pen.box(x, y, x + width, y + height, (186, 220, 240))
        pen.polygon(
            [(x, y + height), (x, y + height * 0.6), (x + width, y + height * 0.25), (x + width, y + height)],
            (206, 232, 246),
        )
        pen.box(x + width / 2 - 1.2, y, x + width / 2 + 1.2, y + height, frame)
        pen.box(x, y + height / 2 - 1.2, x + width, y + height / 2 + 1.2, frame)
    else:  # a painting of hills
        sky, hill = pastel(rng, 0.2, 0.4, 0.85, 0.98), pastel(rng, 0.3, 0.5, 0.55, 0.75)
        pen.box(x, y, x + width, y + height, sky)
        a, b, c = (rng.uniform(0.3, 0.75) for _ in range(3))
        pen.polygon(
            [
                (x, y + height),
                (x, y + a * height),
                (x + width / 2, y + b * height),
                (x + width, y + c * height),
                (x + width, y + height),
            ],
            hill,
        )


def rug(pen: Pen, rng: random.Random, horizon: int) -> None:
    colour = pastel(rng, 0.2, 0.4, 0.65, 0.9)
    x, y = rng.uniform(36, 92), rng.uniform(horizon + 22, SIZE - 12)
    rx, ry = rng.uniform(36, 56), rng.uniform(10, 15)
    if rng.random() < 0.5:
        pen.ellipse(x - rx, y - ry, x + rx, y + ry, tone(colour, 0.85))
        pen.ellipse(x - rx + 4, y - ry + 2.5, x + rx - 4, y + ry - 2.5, colour)
    else:
        pen.polygon(
            [(x - rx, y + ry), (x + rx, y + ry), (x + rx * 0.8, y - ry), (x - rx * 0.8, y - ry)], tone(colour, 0.85)
        )
        pen.polygon(
            [
                (x - rx + 5, y + ry - 3),
                (x + rx - 5, y + ry - 3),
                (x + rx * 0.8 - 4, y - ry + 3),
                (x - rx * 0.8 + 4, y - ry + 3),
            ],
            colour,
        )
