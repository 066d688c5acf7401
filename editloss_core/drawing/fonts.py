"""The letters of every picture: DejaVu, which matplotlib brings along, and for scripts that it does not have the fonts of the
machine.

A character that no font here has is drawn as a box, without a word on the console.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from ..extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import ImageDraw, ImageFont

LATIN = "DejaVu Sans"
# Beginnings of the families that systems bring along for Chinese, Japanese, Korean and other scripts: of several, the first.
OTHERS = (
    "Noto Sans CJK", "Noto Sans SC", "Noto Sans JP", "Noto Sans TC", "Noto Sans KR", "Source Han Sans", "WenQuanYi",
    "Microsoft YaHei", "SimHei", "SimSun", "Microsoft JhengHei", "PingFang", "Hiragino Sans", "Heiti", "STHeiti",
    "Yu Gothic", "Meiryo", "MS Gothic", "IPAGothic", "IPAexGothic", "TakaoGothic", "VL Gothic", "Droid Sans Fallback",
    "Malgun Gothic", "Apple SD Gothic Neo", "NanumGothic", "UnDotum", "Arial Unicode MS", "Segoe UI", "FreeSans", "Unifont",
)  # fmt: skip


@lru_cache(maxsize=1)
def families() -> tuple[str, ...]:
    """For matplotlib: DejaVu, then of :data:`OTHERS` those that are installed, one family each."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):  # installed since matplotlib wrote its list
        try:
            manager.addfont(path)
        except Exception:  # noqa: B902, S112  a damaged font, or none that FreeType can read, is no reason to draw nothing
            continue
    names = sorted({entry.name for entry in manager.ttflist})
    found = (next((name for name in names if name.startswith(other)), None) for other in OTHERS)
    return LATIN, *(name for name in found if name)


@contextmanager
def quiet() -> Iterator[None]:
    """Without matplotlib's remarks on glyphs and weights that a font does not have."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            yield
    finally:
        log.setLevel(level)


def use_families(figure: Figure) -> None:
    """Every text of a figure falls back to the machine's fonts where DejaVu has no glyph."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily(families())


class Letters:
    """Text for Pillow, which has no fallback of its own: each run of characters in the first font that has them.

    Args:
        size: in pixels.
        bold: where a font has it.
    """

    def __init__(self, size: int, bold: bool = False):
        need("matplotlib")
        from matplotlib import font_manager
        from PIL import ImageFont

        with quiet():
            weight = "bold" if bold else "normal"
            paths = [
                font_manager.findfont(font_manager.FontProperties(family=[name], weight=weight)) for name in families()
            ]
            self._glyphs = [font_manager.get_font(path) for path in paths]
        self._fonts = [ImageFont.truetype(str(path), size, index=getattr(path, "face_index", 0)) for path in paths]

    def length(self, words: str) -> float:
        """Pixels across."""
        return sum(font.getlength(part) for font, part in self._runs(words))

    def fitting(self, words: str, room: float) -> str:
        """In one line, cut at the end so that it is at most ``room`` pixels wide."""
        words = " ".join(words.split())
        if self.length(words) <= room:
            return words
        while words and self.length(words + "…") > room:
            words = words[:-1]
        return words + "…"

    def write(
        self, draw: ImageDraw.ImageDraw, x: float, y: float, words: str, color: str, centred: bool = False
    ) -> None:
        """One line whose middle is at y, from x or about it."""
        ascent, descent = self._fonts[0].getmetrics()
        x -= self.length(words) / 2 if centred else 0
        for font, part in self._runs(words):
            draw.text((x, y + (ascent - descent) / 2), part, color, font, "ls")
            x += font.getlength(part)

    def _runs(self, words: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        for index, part in groupby(words, self._place):
            yield self._fonts[index], "".join(part)

    def _place(self, character: str) -> int:
        """Of the first font that has it, or 0, which draws a box."""
        code = ord(character)
        return next((i for i, font in enumerate(self._glyphs) if font.get_char_index(code)), 0)
