"""The colour of each verdict, the same in every picture: contact sheet, run report, grids and maps.

Searched for the largest smallest distance (Oklab) between any two of them, as trichromats and as people with protanopia,
deuteranopia and tritanopia see them (Machado, Oliveira and Fernandes 2009), with a contrast of 3 or more (WCAG 2.2) on white
and on the dark page. That distance is 0.129; it is 0.076 in the colours of Okabe and Ito 2008, whose orange has a contrast of 2.3
on white.

*unusable* came later and is as far from those; *undecided* is grey, since it is no outcome, and 0.076 from the nearest.
"""

from __future__ import annotations

from typing import Optional

from .sheet import INK

VERDICT_COLORS = {
    "good": "#21a593",
    "no edit": "#436a86",
    "overlay": "#a900e1",
    "distorted": "#b83428",
    "collateral change": "#c37e00",
    "unusable": "#a87ef0",
    "undecided": "#727866",
}


def color_of(words: str) -> Optional[str]:
    """The colour of the verdict that words begin with, in any case; the first word of one is enough where it is all there is.

    >>> color_of("NO EDIT 0.93") == color_of("no edit") == VERDICT_COLORS["no edit"], color_of("not judged")
    (True, None)
    """
    words = " ".join(words.lower().split())
    return next((c for v, c in VERDICT_COLORS.items() if words.startswith(v) or words == v.split()[0]), None)


def text_on(color: str) -> str:
    """White or dark, whichever is easier to read on this colour: a contrast of 4.5 or more on those of the table."""
    light = _luminance(color) + 0.05
    return "#ffffff" if 1.05 / light >= light / (_luminance(INK) + 0.05) else INK


def _luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2), 0 to 1."""
    parts = (int(color[k : k + 2], 16) / 255 for k in (1, 3, 5))
    linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return sum(share * p for share, p in zip((0.2126, 0.7152, 0.0722), linear))
