"""What became of an edit of a drawn scene: good, no edit, overlay, distorted or collateral, from its exact masks.

No encoder takes part, so nothing that was trained towards can flatter itself here. Pictures: x the output, s the before
picture, g the after picture, b the empty room. Where the output has another room (all of it darker, the wall in another
colour), b, s and g are taken with the room in the output's colours, so that the object is judged by itself.

Decisions, in this order:

1. **no edit**: more than half of the old object is left (``old_left`` above ``KEPT``), and nearly nothing of the new one has
   come (``new_there``, for a removal ``progress``, below ``ARRIVED``).
2. **overlay**: the old object is still seen (``old_left`` above ``OLD_LEFT``), and the new one has come.
   Neither of the two can be, where much of the picture is neither s nor g (``residual`` above ``STRANGE``; where both
   objects have one outline, as in a change of colour, above ``RESIDUAL``).
3. **distorted**: outline (``silhouette``), colours (``residual``) or sharpness (``detail``) are not the new object's. A
   misplaced object is distorted too, whatever its shape: the place was part of the task.
4. **collateral**: all that is right, but the room was changed elsewhere (``background``).
5. **good**.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing.statistics import wilson
from .scenes import Example

__all__ = ["VERDICTS", "Verdict", "copy_source", "judge", "table"]

VERDICTS = ("good", "no edit", "overlay", "distorted", "collateral")

# Measured on constructed outputs of some 60 held-out scenes of each task and of the stool. "Good" below: the target, its
# round trip through the small autoencoder, a blur of 0.7 px, noise of 2/255, 1 px moved.
KEPT = 0.5  # the round trip of a copy from 0.74; most chairs that the base model drew anew have more
ARRIVED = 0.25  # the round trip of a copy up to 0.12, a mix with 30 % of the after picture from 0.30
OLD_LEFT = 0.27  # good up to 0.15, a mix with 30 % of the before picture from 0.29
STRANGE = 0.28  # any mix or paste up to 0.1, another object from 0.30
SILHOUETTE = 0.97  # good from 0.98, an object without one leg up to 0.96
CLEARED = 0.9  # of a removal; good from 0.96
RESIDUAL = 0.16  # good up to 0.12, another colour from 0.21
DETAIL = 0.55  # good from 0.62, the soft edges of a short training from 0.59; a blur of 4 px up to 0.51
BACKGROUND = 0.03  # rms; good up to 0.02, a room of 15 % less red from 0.05

_FAINT, _VISIBLE = 0.2, 0.3  # distances in RGB; the darkest shadow has 0.16
_NEAR = 8  # pixels around both objects that belong to the edit
_SLACK = 2  # pixels by which an outline may be off
_AROUND = 8  # pixels around within which the room may have been guessed
_APART = 4  # pixels from one object at which only the other can be seen, even in a soft picture
_ROUNDS = 5  # of reweighting
_OWN_PLACE = 40  # pixels that an object must have for itself, or it is told from the other one by colour


@dataclass(frozen=True)
class Verdict:
    """One output's verdict, one of ``VERDICTS``, and the scores behind it.

    Attributes:
        verdict: see the module.
        progress: ⟨x − s, g − s⟩ / ‖g − s‖² over both objects: 0 for a copy of the before picture, 1 for the target.
        old_left: how much of the old object is left: the least-squares α of x − b ≈ α · (s − b) where only that is. Where it
            has no place of its own, as in a change of colour, of x − b ≈ α · (s − b) + β · (g − b) over both objects, but
            at most 1 − progress.
        new_there: the same of the new object, x − b on g − b; 0 for a removal.
        silhouette: 1 − (missing + extra pixels) / (pixels of the new object), with ``_SLACK`` pixels allowed: a pixel of the
            object is missing where the room is seen, one outside is extra where something else than the room is seen. For
            a removal, the share of the old object's pixels that show the room again. What the old object had hidden had to
            be guessed: there, whatever has colours of the room around counts as room. At most 1; negative for a larger
            object.
        residual: ‖x − what s and g could give by mixing‖ / ‖g − b‖ (for a removal ‖s − b‖), of means over 9 × 9 pixels,
            within a pixel, and without what was guessed well enough.
        detail: √(‖∇x‖² / ‖∇g‖²) inside the new object: below 1 for a blurred one; 1 for a removal.
        background: rms of x − g away from both objects, of means over 9 × 9 pixels, which a round trip keeps.
    """

    verdict: str
    progress: float
    old_left: float
    new_there: float
    silhouette: float
    residual: float
    detail: float
    background: float


def judge(outputs: Tensor, examples: Sequence[Example]) -> list[Verdict]:
    """One verdict per output.

    Args:
        outputs: ``[B, H, W, 3]`` in 0…1; values beyond are clamped.
        examples: B examples of that size, in the same order.

    Raises:
        ValueError: no examples, shapes or numbers that do not agree, or values that are not finite.

    >>> from .scenes import draw
    >>> example = draw(3, "replace", "chair", "table")
    >>> [v.verdict for v in judge(torch.stack([example.before, example.after]), [example, example])]
    ['no edit', 'good']
    """
    _check(outputs, examples)
    pictures = outputs.detach().float().cpu().clamp(0, 1)
    with torch.inference_mode():
        return [_judge(x, example) for x, example in zip(pictures, examples)]


def copy_source(examples: Sequence[Example]) -> Tensor:
    """The outputs ``[B, H, W, 3]`` of a model that changes nothing: a row to print beside every other."""
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    return torch.stack([example.before for example in examples])


def table(rows: Mapping[str, Sequence[Verdict]]) -> str:
    """A Markdown table: per row the share and number of each verdict, and the means of progress and of the old object left.

    The interval behind "good" is Wilson's of 95 %.

    Raises:
        ValueError: a row without verdicts.

    >>> print(table({"model": [Verdict("good", 1.0, 0.0, 1.0, 1.0, 0.1, 0.9, 0.01)]}))
    | outputs | n | good | no edit | overlay | distorted | collateral | progress | old left |
    |---|---|---|---|---|---|---|---|---|
    | model | 1 | 100 % (1), 21–100 % | 0 % (0) | 0 % (0) | 0 % (0) | 0 % (0) | 1.00 | 0.00 |
    """
    lines = [f"| outputs | n | {' | '.join(VERDICTS)} | progress | old left |", "|---" * (len(VERDICTS) + 4) + "|"]
    for name, verdicts in rows.items():
        n = len(verdicts)
        if n == 0:
            raise ValueError(f"rows: expected verdicts under {name!r}, got none")
        counts = [sum(v.verdict == kind for v in verdicts) for kind in VERDICTS]
        shares = [f"{100 * count / n:.0f} % ({count})" for count in counts]
        low, high = wilson(counts[0], n)
        shares[0] += f", {100 * low:.0f}–{100 * high:.0f} %"
        means = [sum(getattr(v, key) for v in verdicts) / n for key in ("progress", "old_left")]
        lines.append(f"| {' | '.join([name.replace('|', '/'), str(n), *shares, *(f'{mean:.2f}' for mean in means)])} |")
    return "\n".join(lines)


def _check(outputs: Tensor, examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        came = f"{outputs.dtype} {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"outputs: expected pictures [B, H, W, 3] in 0…1, got {came}")
    for i, example in enumerate(examples):
        if example.before.shape != examples[0].before.shape:
            sizes = list(examples[0].before.shape), list(example.before.shape)
            raise ValueError(f"examples: expected one size, got {sizes[0]} and, at {i}, {sizes[1]}")
    expected = [len(examples), *examples[0].before.shape]
    if list(outputs.shape) != expected:
        raise ValueError(f"outputs: expected {expected}, a picture for each example, got {list(outputs.shape)}")
    bad = [i for i, x in enumerate(outputs) if not bool(torch.isfinite(x).all())]
    if bad:
        raise ValueError(f"outputs: expected finite values, got NaN or infinity in {', '.join(map(str, bad))}")


def _judge(x: Tensor, e: Example) -> Verdict:
    union = (e.old_mask > 0.5) | (e.new_mask > 0.5)
    away = ~_grow(union, _NEAR)
    background = float(_low(x - e.after)[away].square().mean().sqrt()) if away.any() else 0.0
    change = _room_change(x, e.background, away)
    around = _window(~away)
    x, b, change = (p[around] for p in (x, e.background + change, change))
    old, new, near = ((mask > 0.5)[around] for mask in (e.old_mask, e.new_mask, ~away))
    s, g = (
        picture[around] + change * (1 - mask[around][..., None])
        for picture, mask in ((e.before, e.old_mask), (e.after, e.new_mask))
    )
    union, removal = old | new, not bool(new.any())

    progress = _fit((x - s)[union], (g - s)[union])
    old_left = _presence(x - b, s - b, g - b, old, new)
    arrived = progress if removal else _presence(x - b, g - b, s - b, new, old)
    one_outline = not bool(_own_place(old, new).any())
    if one_outline:  # what lies on the way from s to g counts, not what is merely softer
        old_left, arrived = min(old_left, 1 - progress), min(arrived, progress)
    uncovered = _grow(old, _SLACK) & ~_grow(new, _SLACK) & _like_the_room(x, b)
    off = near & ~uncovered
    silhouette = _cleared(x - b, s - b, old, uncovered) if removal else _silhouette(x - b, g - b, new, off)
    low_x, low_s, low_g, low_b = (_low(p) for p in (x, s, g, b))
    strange = _off_the_line(low_x, low_s, low_g)[off].square().sum()
    residual = float((strange / ((low_s if removal else low_g) - low_b)[union].square().sum()).sqrt())
    detail = 1.0 if removal else float((_slopes(x)[new].sum() / _slopes(g)[new].sum()).sqrt())

    known = residual <= (RESIDUAL if one_outline else STRANGE)
    if known and arrived < ARRIVED and old_left > KEPT:
        verdict = "no edit"
    elif known and arrived >= ARRIVED and old_left > OLD_LEFT:
        verdict = "overlay"
    elif silhouette < (CLEARED if removal else SILHOUETTE) or residual > RESIDUAL or detail < DETAIL:
        verdict = "distorted"
    else:
        verdict = "collateral" if background > BACKGROUND else "good"
    new_there = 0.0 if removal else arrived
    return Verdict(verdict, progress, old_left, new_there, silhouette, residual, detail, background)


def _room_change(x: Tensor, room: Tensor, where: Tensor) -> Tensor:
    """What an affine map of the room's colours, fitted where nothing was to change, adds to the room: ``[H, W, 3]``.

    Fitted by least distances (a few rounds of reweighted squares), so that what was repainted in one place counts for that
    place alone; a ridge keeps the map at nothing in the directions in which the room has no colours.
    """
    colours = torch.cat([room, torch.ones_like(room[..., :1])], -1)
    known, change = colours[where][::3].double(), (x - room)[where][::3].double()
    if not len(known):
        return torch.zeros_like(room)
    weight = torch.ones_like(known[:, :1])
    for _ in range(_ROUNDS):
        gram = known.T @ (known * weight) + 1e-3 * weight.sum() * torch.eye(4, dtype=torch.float64)
        affine = torch.linalg.solve(gram, known.T @ (change * weight))
        weight = 1 / (change - known @ affine).norm(dim=-1, keepdim=True).clamp_min(0.01)
    return colours @ affine.float()


def _window(mask: Tensor) -> tuple[slice, slice]:
    """The bounding box of a mask: where everything but the room is measured."""
    rows, columns = (slice(int(i.min()), int(i.max()) + 1) for i in torch.nonzero(mask, as_tuple=True))
    return rows, columns


def _own_place(mask: Tensor, other: Tensor) -> Tensor:
    """Where one object is and the other one is not even in a soft picture; nowhere if that is too small to judge by."""
    place = mask & ~_grow(other, _APART)
    return place if place.sum() >= _OWN_PLACE else torch.zeros_like(mask)


def _presence(x: Tensor, layer: Tensor, other: Tensor, mask: Tensor, other_mask: Tensor) -> float:
    """How much of an object is in x; all three pictures are differences from the room."""
    place = _own_place(mask, other_mask)
    if place.any():
        return _fit(x[place], layer[place])
    union = mask | other_mask
    return _fit(x[union], layer[union], other[union])


def _fit(x: Tensor, y: Tensor, other: Tensor | None = None) -> float:
    """The least-squares α of x ≈ α · y, or of x ≈ α · y + β · other."""
    basis = torch.stack([y.flatten()] + ([] if other is None else [other.flatten()]), 1).double()
    gram = basis.T @ basis + 1e-6 * torch.eye(basis.shape[1], dtype=torch.float64)
    return float(torch.linalg.solve(gram, basis.T @ x.flatten().double())[0])


def _silhouette(x: Tensor, g: Tensor, new: Tensor, near: Tensor) -> float:
    """Of differences from the room. Two thresholds, so that what is nearly invisible counts on neither side."""
    x, g = x.norm(dim=-1), g.norm(dim=-1)
    body = new & (g > _VISIBLE)
    missing = body & ~_grow(x > _FAINT, _SLACK)
    extra = near & (x > _VISIBLE) & ~_grow(g > _FAINT, _SLACK)
    return 1 - float(missing.sum() + extra.sum()) / max(1, int(body.sum()))


def _cleared(x: Tensor, s: Tensor, old: Tensor, uncovered: Tensor) -> float:
    """The share of the old object that is gone; of differences from the room."""
    visible = old & (s.norm(dim=-1) > _VISIBLE)
    return 1 - float((visible & (x.norm(dim=-1) > _FAINT) & ~uncovered).sum()) / max(1, int(visible.sum()))


def _like_the_room(x: Tensor, room: Tensor) -> Tensor:
    """Where each channel lies in the room's range around: a carpet that was guessed a little too wide is no object."""
    wide = torch.cat([room, -room], -1).movedim(-1, 0)[None]
    size = 2 * _AROUND + 1
    wide = F.max_pool2d(F.max_pool2d(wide, (size, 1), 1, (_AROUND, 0)), (1, size), 1, (0, _AROUND))[0].movedim(0, -1)
    return ((x <= wide[..., :3] + 0.05) & (x >= -wide[..., 3:] - 0.05)).all(-1)


def _off_the_line(x: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """Distance ``[H, W]`` of x from the segment between the colours of s and g, where x may be moved by up to a pixel."""
    height, width = x.shape[:2]
    wide = F.pad(x.movedim(-1, 0)[None], (1, 1, 1, 1), mode="replicate")[0].movedim(0, -1)
    moved = torch.stack([wide[i : i + height, j : j + width] for i in range(3) for j in range(3)]) - s
    step = g - s
    share = (moved * step).sum(-1, True) / step.square().sum(-1, True).clamp_min(1e-9)
    return (moved - share.clamp(0, 1) * step).square().sum(-1).amin(0).sqrt()


def _low(picture: Tensor) -> Tensor:
    """Means over 9 × 9 pixels, in which soft edges and a pixel's shift hardly count."""
    wide = F.pad(picture.movedim(-1, 0)[None], (4, 4, 4, 4), mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(wide, (9, 1), 1), (1, 9), 1)[0].movedim(0, -1)


def _slopes(picture: Tensor) -> Tensor:
    """Squared central differences ``[H, W]``, 0 at the border."""
    slopes = torch.zeros(picture.shape[:2])
    slopes[:, 1:-1] += (picture[:, 2:] - picture[:, :-2]).square().sum(-1)
    slopes[1:-1] += (picture[2:] - picture[:-2]).square().sum(-1)
    return slopes


def _grow(mask: Tensor, pixels: int) -> Tensor:
    size = 2 * pixels + 1  # along one axis after the other, which is the same and cheaper
    rows = F.max_pool2d(mask[None, None].float(), (size, 1), 1, (pixels, 0))
    return F.max_pool2d(rows, (1, size), 1, (0, pixels))[0, 0] > 0
