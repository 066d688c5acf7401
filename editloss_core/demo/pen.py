"""A pen for flat pictures: polygons and ellipses in coordinates of the finished picture, drawn ``FINE`` times too large."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw

__all__ = ["COLOURS", "FINE", "RGB", "Pen", "tone"]

FINE = 4  # drawn at FINE times the size, then averaged: exact coverage, smooth edges

RGB = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, RGB] = {
    "red": (208, 58, 52),
    "yellow": (236, 190, 48),
    "green": (70, 150, 76),
    "blue": (56, 108, 196),
    "purple": (138, 78, 168),
    "black": (74, 74, 84),
}


def tone(colour: RGB, factor: float) -> RGB:
    """Darker below 1, towards white above 1."""
    red, green, blue = (round(c * factor if factor <= 1 else c + (255 - c) * (factor - 1)) for c in colour)
    return red, green, blue


class Pen:
    """ImageDraw in finished pixels around an origin, with a scale."""

    def __init__(self, picture: Image.Image, origin: tuple[float, float], scale: float = 1.0):
        self.draw, self.origin, self.scale = ImageDraw.Draw(picture), origin, scale

    def points(self, points: Iterable[Point]) -> list[tuple[float, float]]:
        ox, oy = self.origin
        return [((ox + x * self.scale) * FINE, (oy + y * self.scale) * FINE) for x, y in points]

    def polygon(self, points: Iterable[Point], fill: RGB, outline: RGB | None = None, width: float = 1.2) -> None:
        corners = self.points(points)
        self.draw.polygon(corners, fill=fill)
        if outline is not None:
            line = max(1, round(width * FINE))
            self.draw.line([*corners, corners[0], corners[1]], fill=outline, width=line, joint="curve")

    def box(
        self, x0: float, y0: float, x1: float, y1: float, fill: RGB, outline: RGB | None = None, width: float = 1.2
    ) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline, width)

    def ellipse(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        fill: RGB | int,
        outline: RGB | None = None,
        width: float = 1.2,
    ) -> None:
        (a, b), (c, d) = self.points([(x0, y0), (x1, y1)])
        self.draw.ellipse([a, b, c, d], fill=fill, outline=outline, width=max(1, round(width * FINE)))
