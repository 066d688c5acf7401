"""More looks at the same pairs: flips, shifts, zooms, small turns and mild tone, one transform for all of a pair's pictures.

They are drawn from the settings' seed, the pair's content and the variant's number, so that they stay when other pairs come
or go; pictures are transformed as they are loaded, and nothing is written beside the folder.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_number, check_whole
from ..hashing import hash_tensors
from ..masks import edit_region
from .geometry import PairImages, bounding_box

METHOD = "variants 1"  # part of every variant's content: count up when they come to be drawn or made in another way
VERTICAL = 0.25  # of the shift: rooms and people stand on the ground
INSIDE = 1e-3  # pixels by which a sampling position may miss the picture: rounding

# A caption with one of these means something else in the mirror: sides, directions of turning, and whatever can be read.
SIDED = re.compile(
    r"\b(left|right)(most|ward|wards|hand|side)?\b|\b(counter|anti)?-?clockwise\b|\bmirror(s|ed|ing)?\b"
    r"|\b(text|letter|letters|lettering|word|words|writ(e|es|ing|ten)|wrote|inscription|inscribed|signs?|signage|logos?|label(s|led)?"
    r"|font|typography|numbers?|digits?|slogan|captions?|titles?|says|reads|reading|spell(s|ed|ing)?)\b"
    r"|\b(links|rechts|gauche|droite|izquierda|derecha|sinistra|destra|esquerda|direita)\b"
    r"|[左右字写寫文]|顺时针|逆时针|順時針|逆時針|镜像|鏡像|标志|標誌|标识|標識|招牌|商标|商標|왼쪽|오른쪽"
    r"|[\"“”„«»「『]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class VariantSettings:
    """How variants of pairs are drawn.

    Attributes:
        count: of each pair, itself included; 1 makes none.
        flip: whether every other one is mirrored left to right; never where the caption says so (:func:`sided`).
        shift: largest shift sideways as a share of the width, 0…0.5; a quarter of it up and down.
        zoom: largest factor, 1…2; the smallest is one over it.
        turn: largest turn either way, in degrees, 0…45.
        tone: largest change of brightness, contrast and colours, as a share, 0…0.5.
        seed: of all that is drawn.
    """

    count: int = 8
    flip: bool = True
    shift: float = 0.25
    zoom: float = 1.14
    turn: float = 2.0
    tone: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("count", self.count, 1)
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip: expected true or false, got {self.flip!r}")
        for name, low, high in (("shift", 0.0, 0.5), ("zoom", 1.0, 2.0), ("turn", 0.0, 45.0), ("tone", 0.0, 0.5)):
            check_number(name, getattr(self, name), low, high)
        check_whole("seed", self.seed)


class Tone(NamedTuple):
    """Shares by which contrast, brightness and each colour change."""

    contrast: float = 0.0
    brightness: float = 0.0
    red: float = 0.0
    green: float = 0.0
    blue: float = 0.0


@dataclass(frozen=True)
class Variant:
    """One transform of a pair: mirrored, then turned and enlarged about its centre, then shifted.

    Attributes:
        of: name of the pair.
        number: from 1; the pair itself is 0 and has no transform.
        flip: left to right.
        turn: in degrees, clockwise.
        zoom: factor.
        shift: (down, right) as shares of height and width, before it is held back to keep the edit in view.
        tone: alike for before and after.
    """

    of: str
    number: int
    flip: bool = False
    turn: float = 0.0
    zoom: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    tone: Tone = Tone()

    def apply(self, images: PairImages) -> PairImages:
        """The pair's pictures as this variant shows them.

        What comes from beyond the pictures repeats their border, and is 0 in ``valid`` and in the mask. A pair without a mask
        gets the estimated one: the edit has to be known, to stay in view. Where none stands out, any view shows it.
        """
        with torch.inference_mode(False), torch.no_grad():
            before, after, mask, references = images.before, images.after, images.mask, images.references
            if mask is None:
                mask = edit_region(before, after)
            anywhere = mask is None
            if mask is None:  # for where the pictures come from
                mask = torch.zeros(before.shape[:2])
            if self.flip:
                before, after, mask = before.flip(1), after.flip(1), mask.flip(1)
                references = tuple(
                    reference.flip(1) for reference in references
                )  # what is taken from them is mirrored too
            valid = None
            where = self._positions(mask)
            if where is not None:
                height, width = mask.shape
                x, y = where
                inside = (x >= -0.5 - INSIDE) & (x <= width - 0.5 + INSIDE)
                inside &= (y >= -0.5 - INSIDE) & (y <= height - 0.5 + INSIDE)
                grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)[None].float()
                both = torch.cat([before, after], -1).movedim(-1, 0)[None]
                # Turned by 2°, rendered rooms keep 97 % of their gradients; bilinearly 81 %, and blur would be learnt.
                both = _sample(both, grid, "bicubic")[0].movedim(0, -1).clamp(0.0, 1.0)
                before, after = both[..., :3], both[..., 3:]
                mask = _sample(mask[None, None], grid, "bilinear")[0, 0] * inside
                valid = None if bool(inside.all()) else inside.float()
            before, after = self._toned(before), self._toned(after)
            references = tuple(map(self._toned, references))
        mask = None if anywhere else mask
        return images._replace(before=before, after=after, mask=mask, valid=valid, references=references)

    def _toned(self, picture: Tensor) -> Tensor:
        contrast, brightness, *colours = self.tone
        if not any(self.tone):
            return picture.contiguous()
        factors = 1 + brightness + torch.tensor(colours)
        return (((picture - 0.5) * (1 + contrast) + 0.5) * factors).clamp(0.0, 1.0)

    def _positions(self, mask: Tensor) -> Optional[tuple[Tensor, Tensor]]:
        """(x, y) in pixels of where each pixel comes from, ``[H, W]`` in float64; None if nothing moves."""
        height, width = mask.shape
        angle = math.radians(self.turn)
        cos, sin = math.cos(angle), math.sin(angle)
        centre = ((width - 1) / 2, (height - 1) / 2)
        right, down = self._shift(mask, cos, sin)
        if not (right or down or self.turn) and self.zoom == 1.0:
            return None
        y, x = torch.meshgrid(
            torch.arange(height, dtype=torch.float64) - centre[1] - down,
            torch.arange(width, dtype=torch.float64) - centre[0] - right,
            indexing="ij",
        )
        return (cos * x + sin * y) / self.zoom + centre[0], (cos * y - sin * x) / self.zoom + centre[1]

    def _shift(self, mask: Tensor, cos: float, sin: float) -> tuple[int, int]:
        """(right, down) in whole pixels, so that a shift alone blurs nothing: as drawn, or by as little less or more as it
        takes for the edit to be in the picture, or the picture in the edit where that is the larger one."""
        sides = mask.shape[1], mask.shape[0]
        wanted = round(self.shift[1] * sides[0]), round(self.shift[0] * sides[1])
        box = bounding_box(mask.numpy())
        if box is None:
            return wanted
        corners = [
            ((x - 0.5) * sides[0], (y - 0.5) * sides[1]) for x in (box.left, box.right) for y in (box.top, box.bottom)
        ]
        turned = [(self.zoom * (cos * x - sin * y), self.zoom * (sin * x + cos * y)) for x, y in corners]
        held = []
        for axis, side in enumerate(sides):
            low, high = (edge(point[axis] for point in turned) + side / 2 for edge in (min, max))
            ends = sorted((-low, side - high))
            held.append(round(min(max(wanted[axis], ends[0]), ends[1])))
        return held[0], held[1]


def sided(caption: str) -> bool:
    """Whether a caption speaks of left and right, of turning, or of something to read: what a mirror would make wrong."""
    return bool(SIDED.search(caption))


def draw(name: str, caption: str, content: str, number: int, settings: VariantSettings) -> Variant:
    """Variant ``number`` (from 1) of a pair; ``content``: sha256 of its pictures.

    Always the same numbers in the same order, so that one setting changes nothing of what the others draw.
    """
    digest = hashlib.sha256(f"variant/{settings.seed}/{content}/{number}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    right, down, zoom, turn, *tone = (2 * torch.rand(9, generator=generator, dtype=torch.float64) - 1).tolist()
    scales = Tone(settings.tone, settings.tone, *[settings.tone / 2] * 3)
    return Variant(
        name,
        number,
        flip=settings.flip and number % 2 == 1 and not sided(caption),
        turn=turn * settings.turn,
        zoom=settings.zoom**zoom,
        shift=(down * settings.shift * VERTICAL, right * settings.shift),
        tone=Tone(*(value * scale for value, scale in zip(tone, scales))),
    )


def content_of(content: str, variant: Variant) -> str:
    """sha256 of a variant of pictures: the name is not in it, so that the same pictures under another one are the same."""
    return hash_tensors([], METHOD, content, repr(astuple(replace(variant, of="", number=0))))


def _sample(x: Tensor, grid: Tensor, mode: str) -> Tensor:
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)
