"""Pictures of several pairs side by side: before, output of the base, output with the LoRA, after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runs.pictures import PreviewRow
from .colours import color_of, text_on
from .fonts import Letters
from .sheet import INK, LINE, MUTED

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

LABELS = ("before", "base", "LoRA", "after")
SMALLEST = 256  # pixels across a picture in the grid, if the page has room
TALLEST = 1.5  # height of a row, in widths of a cell

_MARGIN, _GAP, _HEAD, _NAME, _TAG, _TEXT = 16, 8, 30, 26, 30, 15  # pixels


@torch.no_grad()
def grid(
    rows: Sequence[Union[PreviewRow, Sequence[Tensor]]],
    labels: Sequence[str] = LABELS,
    names: Optional[Sequence[str]] = None,
    notes: Optional[Sequence[Optional[Sequence[Optional[str]]]]] = None,
    width: int = 1600,
) -> Tensor:
    """A labelled grid, a row per pair.

    All pictures of a row have one height. A cell is as wide as the widest picture, at least :data:`SMALLEST` pixels, or
    as the page lets it be; rows may have different shapes.

    Args:
        rows: :class:`PreviewRow`, or one picture ``[H, W, 3]`` in 0…1 per label.
        labels: heads of the columns.
        names: of the rows, above them; a :class:`PreviewRow` brings its own.
        notes: per row and cell a few words below the picture, such as a verdict, or None; in the colour of the verdict
            that they begin with (:mod:`.verdict_colors`), else grey.
        width: of the page at most, in pixels.

    Returns:
        ``[1, height, width or less, 3]`` in 0…1.

    Raises:
        ValueError: no rows, rows that do not fit the labels, things that are not pictures, or a page that is too narrow.
    """
    from PIL import Image, ImageDraw

    names, notes = _checked(rows, labels, names, notes)
    pictures = [_pictures(row, labels, f"row {i + 1}") for i, row in enumerate(rows)]
    columns = len(labels)
    room = (width - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    if room < 32:
        raise ValueError(
            f"width: expected at least {columns * (32 + _GAP) + 2 * _MARGIN} for {columns} columns, got {width}"
        )
    cell = min(room, max(SMALLEST, *(p.shape[1] for row in pictures for p in row)))
    heights = [_height(row, cell) for row in pictures]
    named, noted = any(names), [any(n for n in row) for row in notes]
    tops, y = [], _MARGIN + _HEAD
    for height, has_notes in zip(heights, noted):
        tops.append(y)
        y += (_NAME if named else 0) + height + (_TAG if has_notes else 0) + 2 * _GAP
    page = Image.new("RGB", (columns * cell + (columns - 1) * _GAP + 2 * _MARGIN, y + _MARGIN - 2 * _GAP), "white")
    draw, plain, bold = ImageDraw.Draw(page), Letters(_TEXT), Letters(_TEXT, bold=True)
    lefts = [_MARGIN + k * (cell + _GAP) for k in range(columns)]
    for left, label in zip(lefts, labels):
        bold.write(draw, left + cell / 2, _MARGIN + _HEAD / 2 - 4, bold.fitting(label, cell), INK, centred=True)
    for top, height, row, name, words in zip(tops, heights, pictures, names, notes):
        draw.line((_MARGIN, top, page.width - _MARGIN, top), LINE)
        if named:
            plain.write(draw, _MARGIN, top + _NAME / 2 + 1, plain.fitting(name, page.width - 2 * _MARGIN), MUTED)
            top += _NAME
        else:
            top += _GAP // 2
        for left, picture, note in zip(lefts, row, words):
            scaled = _scaled(picture, height, cell)
            page.paste(scaled, (left + (cell - scaled.width) // 2, top))
            if note:
                _tag(draw, note, bold, left + cell // 2, top + height + 5, cell)
    pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(page.height, page.width, 3)
    return pixels[None].float() / 255.0


def _checked(
    rows: Sequence[Union[PreviewRow, Sequence[Tensor]]],
    labels: Sequence[str],
    names: Optional[Sequence[str]],
    notes: Optional[Sequence[Optional[Sequence[Optional[str]]]]],
) -> tuple[list[str], list[list[Optional[str]]]]:
    """Names and notes, one per row and per cell."""
    if not len(rows):
        raise ValueError("rows: expected at least one row of pictures, got none")
    if not len(labels):
        raise ValueError("labels: expected at least one, got none")
    for what, given in (("names", names), ("notes", notes)):
        if given is not None and len(given) != len(rows):
            raise ValueError(f"{what}: expected one per row, which are {len(rows)}, got {len(given)}")
    if names is None:
        names = [row.pair if isinstance(row, PreviewRow) else "" for row in rows]
    full: list[list[Optional[str]]] = []
    for i, row in enumerate(notes or [None] * len(rows)):
        if row is not None and (isinstance(row, str) or len(row) != len(labels)):
            raise ValueError(f"notes: row {i + 1}: expected {len(labels)} (or None), one per label, got {row!r}")
        full.append([None] * len(labels) if row is None else list(row))
    return list(names), full


def _pictures(row: Union[PreviewRow, Sequence[Tensor]], labels: Sequence[str], where: str) -> list[Tensor]:
    """The row's pictures on the CPU, float32 in 0…1."""
    if isinstance(row, PreviewRow):
        where, row = f"{where} ({row.pair})", (row.before, row.base, row.lora, row.after)
    if len(row) != len(labels):
        raise ValueError(f"{where}: expected {len(labels)} pictures, one per label, got {len(row)}")
    found = []
    for label, picture in zip(labels, row):
        if not isinstance(picture, Tensor):
            raise ValueError(f"{where}, {label}: expected a picture [H, W, 3], got {type(picture).__name__}")
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.numel() == 0 or not picture.is_floating_point():
            shape = list(picture.shape)
            raise ValueError(
                f"{where}, {label}: expected a picture [H, W, 3] in 0…1, got {picture.dtype} of shape {shape}"
            )
        found.append(picture.detach().float().cpu().nan_to_num(0.0).clamp(0, 1))
    return found


def _height(row: Sequence[Tensor], cell: int) -> int:
    """At which the widest picture of the row fills its cell."""
    aspect = min(min(p.shape[0] / p.shape[1] for p in row), TALLEST)
    return max(1, round(cell * aspect))


def _scaled(picture: Tensor, height: int, cell: int) -> Image.Image:
    """Bicubic: as crisp as an enlargement gets without blocks or rings; with antialiasing where it gets smaller."""
    from PIL import Image

    size = height, min(cell, max(1, round(picture.shape[1] * height / picture.shape[0])))
    if size != tuple(picture.shape[:2]):
        picture = F.interpolate(picture.movedim(-1, 0)[None], size, mode="bicubic", antialias=True)[0].movedim(0, -1)
    array = (picture.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
    return Image.fromarray(array)


def _tag(draw: ImageDraw.ImageDraw, note: str, letters: Letters, middle: int, top: int, cell: int) -> None:
    color = color_of(note) or MUTED
    words = letters.fitting(note, cell - 20)
    half = letters.length(words) / 2 + 10
    draw.rounded_rectangle((middle - half, top, middle + half - 1, top + 23), 5, fill=color)
    letters.write(draw, middle, top + 11.5, words, text_on(color), centred=True)
