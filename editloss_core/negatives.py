"""Negatives that imitate a failed edit: the *overlay*, where the new object is painted over the old one.

A triplet loss needs an example of what the model should stay away from. "No edit" has one for free (the before
picture). For the overlay it has to be made from the pair itself; :func:`make_overlays` does so in several ways at once:

==================  ==============  ============================================================================
kind                base picture    what is painted on it
==================  ==============  ============================================================================
``"new_over_old"``  before          the object of *after*, translucent, a little moved and scaled
``"old_over_new"``  after           the object of *before*, the same way: the old object did not go away
``"blend"``         before          a cross-dissolve of the two pictures inside the edit region, nothing moved
``"double"``        before          the object of *after*, moved by a part of its size, so that both stand there
==================  ==============  ============================================================================

Conventions
    * Pictures are floats ``[B, H, W, 3]`` in 0…1 (ComfyUI's IMAGE), masks ``[B, H, W]`` in 0…1 (ComfyUI's MASK); a
      mask batch of one serves every sample.
    * ``mask`` is the edit region: everything that may differ. ``mask_before`` and ``mask_after`` are the silhouettes
      of the old and of the new object. With silhouettes an object is cut out along its own outline, so that the other
      one stays visible around it; without them the whole edit region is pasted and translucency alone shows both.
      Silhouettes make the more convincing negatives.
    * Everything here is data, not part of a loss: it runs without gradients, in float32.

Every function raises ValueError for a wrong shape, dtype, range or option, naming the argument, what came and what was
expected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_number, check_whole, is_number
from .masks import check_pair, checked_mask, estimate_mask, feather_mask
from .progress import Progress

__all__ = [
    "OVERLAY_KINDS",
    "OverlayBatch",
    "OverlaySettings",
    "make_overlays",
]

OVERLAY_KINDS = ("new_over_old", "old_over_new", "blend", "double")

SAME_PIXEL = 2.5 / 255  # largest difference that 8-bit rounding of two equal pictures explains, with a margin


# ---------------------------------------------------------------------------------------------------------------------
# Overlays
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverlaySettings:
    """How overlays are made.

    Attributes:
        kinds: the constructions, in the order in which they are returned; see :data:`OVERLAY_KINDS`. A kind may stand
            there several times and is then drawn anew each time.
        opacity: range of the pasted object's opacity, within ``min_visible``…1. Lowered per sample where it would hide
            more than ``1 - min_visible`` of the other object.
        blend: range of the share of *after* in ``"blend"``, within ``min_visible``…``1 - min_visible``.
        feather: half-width of the soft edge in pixels, ≥ 0. Farther than ``ceil(feather)`` pixels (along rows or
            columns) from the pasted silhouette the picture is exactly its base.
        max_offset: largest shift of a paste along x and along y, as a fraction of the width and of the height, 0…0.5.
        scale: range of the pasted object's scale factor, within 0.5…2. It does not touch ``"blend"``.
        spread: range of the shift of ``"double"`` to one side, as a fraction of the object's own width, within 0…2
            (up or down, as a fraction of its height, where the picture leaves no room to the sides).
        min_visible: the least share of the covered object that stays visible, in (0, 0.5].
        seed: any integer. See :func:`make_overlays` for what a draw depends on.

    Raises:
        ValueError: when a value is outside its range.

    >>> OverlaySettings(kinds=("blend",)).kinds
    ('blend',)
    """

    kinds: tuple[str, ...] = OVERLAY_KINDS
    opacity: tuple[float, float] = (0.55, 1.0)
    blend: tuple[float, float] = (0.35, 0.65)
    feather: float = 2.0
    max_offset: float = 0.02
    scale: tuple[float, float] = (0.95, 1.05)
    spread: tuple[float, float] = (0.3, 0.6)
    min_visible: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        if not kinds:
            raise ValueError(f"kinds: expected at least one of {', '.join(map(repr, OVERLAY_KINDS))}, got none")
        for kind in kinds:
            if kind not in OVERLAY_KINDS:
                raise ValueError(f"kinds: expected names among {', '.join(map(repr, OVERLAY_KINDS))}, got {kind!r}")
        object.__setattr__(self, "kinds", kinds)
        check_number("min_visible", self.min_visible, 0.0, 0.5, open_low=True)
        for name, low, high in (
            ("opacity", self.min_visible, 1.0),
            ("blend", self.min_visible, 1.0 - self.min_visible),
            ("scale", 0.5, 2.0),
            ("spread", 0.0, 2.0),
        ):
            object.__setattr__(self, name, _checked_range(name, getattr(self, name), low, high))
        check_number("feather", self.feather, 0.0)
        check_number("max_offset", self.max_offset, 0.0, 0.5)
        check_whole("seed", self.seed)


@dataclass(frozen=True)
class OverlayBatch:
    """Overlays of B samples in K constructions, sample by sample: sample b in construction k is at ``b * K + k``.

    Attributes:
        images: ``[B*K, H, W, 3]`` in 0…1.
        masks: ``[B*K, H, W]`` in 0…1, the feathered silhouette of what was pasted, before opacity.
        opacity: ``[B*K]``, the opacity that each paste got.
        kinds: names of the K constructions.
    """

    images: Tensor
    masks: Tensor
    opacity: Tensor
    kinds: tuple[str, ...]

    @property
    def count(self) -> int:
        """K, the number of constructions per sample."""
        return len(self.kinds)

    @property
    def names(self) -> list[str]:
        """The construction of each of the B*K pictures."""
        return list(self.kinds) * (self.images.shape[0] // self.count)

    def split(self) -> list[Tensor]:
        """K tensors ``[B, H, W, 3]``, one per construction: views, in the order of ``kinds``."""
        return list(self.images.unflatten(0, (-1, self.count)).unbind(1))


@torch.no_grad()
def make_overlays(
    before: Tensor,
    after: Tensor,
    mask: Tensor | None = None,
    mask_before: Tensor | None = None,
    mask_after: Tensor | None = None,
    settings: OverlaySettings | None = None,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> OverlayBatch:
    """Overlay negatives of every sample in every construction of ``settings.kinds``.

    With base picture x, source picture y, silhouette m (feathered) and opacity α, after y and m were moved by a shift t
    and scaled by s about the centroid of m, an overlay is::

        x + α · m · (y − x)

    Both objects stay visible: where the paste covers a share h of the other object, its visible share is 1 − α·h, and α
    is drawn from ``opacity`` cut off at (1 − min_visible) / h. So an opaque paste of a whole edit region, which would
    be the after picture itself, does not happen: without silhouettes h is near 1 and α at most near 1 − min_visible.
    An object that touches the border of the picture is not moved away from it and not shrunk, because its cut edge
    would show; any other is not shifted across the border.

    Every draw comes from a generator on the CPU, seeded by (seed, index of the sample, kind, how often the kind came
    before): it does not depend on the device, on the other samples or on the other kinds.

    Args:
        before: ``[B, H, W, 3]`` in 0…1.
        after: the same shape.
        mask: edit region ``[B, H, W]`` or ``[1, H, W]``. If it is None, it is the union of the two silhouettes, or
            (where one is missing) :func:`estimate_mask`.
        mask_before: silhouette of the old object, like ``mask``. If it is None, the edit region takes its place.
        mask_after: silhouette of the new object, like ``mask``. If it is None, the edit region takes its place.
        settings: see :class:`OverlaySettings`; its defaults if None.
        indices: B integers that tell samples apart in the draws, such as their places in a data set. If it is None,
            0…B−1.
        progress: called with (done, total) samples after each one.

    Returns:
        An :class:`OverlayBatch` of B·K pictures on the device and in the dtype of ``before``.

    Raises:
        ValueError: for a wrong shape, dtype, device or range; for a mask that is empty; for a sample whose pictures are
            equal inside the edit region; and for an overlay that comes out equal to before or to after.
    """
    settings = OverlaySettings() if settings is None else settings
    if not isinstance(settings, OverlaySettings):
        raise ValueError(f"settings: expected OverlaySettings, got {type(settings).__name__}")
    check_pair(before, after)
    for name, given in (("mask", mask), ("mask_before", mask_before), ("mask_after", mask_after)):
        if isinstance(given, OverlaySettings):
            raise ValueError(f"{name}: expected a mask or None, got OverlaySettings; give it as settings=…")
    batch, height, width, _ = before.shape
    if settings.feather >= min(height, width):
        raise ValueError(
            f"feather: expected less than the picture's {height} x {width}, got {settings.feather:g} pixels"
        )
    if indices is None:
        indices = range(batch)
    elif len(indices) != batch:
        raise ValueError(f"indices: expected {batch} integers, one per sample, got {len(indices)}")
    dtype = before.dtype
    x0, x1 = (t.float().permute(0, 3, 1, 2) for t in (before, after))
    regions = _regions(before, after, mask, mask_before, mask_after)

    images: list[Tensor] = []
    masks: list[Tensor] = []
    opacities: list[float] = []
    for b, index in enumerate(indices):
        check_whole(f"indices[{b}]", index)
        old, new, union = (r[b : b + 1] for r in (regions.before, regions.after, regions.union))
        pair = x0[b : b + 1], x1[b : b + 1]
        change = ((pair[0] - pair[1]).abs().amax(1, keepdim=True) * (union > 0)).amax().item()
        if change <= SAME_PIXEL:
            raise ValueError(
                f"before, after: sample {b} has no visible edit: inside its mask the pictures differ by at most "
                f"{change:.4f}, expected more than {SAME_PIXEL:.4f} (2.5 of 255 steps)"
            )
        for k, kind in enumerate(settings.kinds):
            draw = _draw(settings.seed, index, kind, settings.kinds[:k].count(kind))
            image, pasted, alpha = _construct(kind, *pair, old, new, union, draw, settings)
            for name, picture in zip(("before", "after"), pair):
                if (image - picture).abs().amax().item() <= SAME_PIXEL / 2:
                    raise ValueError(
                        f"{kind}: the overlay of sample {b} equals {name} (opacity {alpha:.2f}); expected masks that "
                        "cover what changed, got masks under which the two pictures hardly differ"
                    )
            images.append(image)
            masks.append(pasted)
            opacities.append(alpha)
        if progress is not None:
            progress(b + 1, batch)
    return OverlayBatch(
        images=torch.cat(images).permute(0, 2, 3, 1).contiguous().to(dtype),
        masks=torch.cat(masks)[:, 0].to(dtype),
        opacity=torch.tensor(opacities, dtype=dtype, device=before.device),
        kinds=settings.kinds,
    )


def _construct(
    kind: str, before: Tensor, after: Tensor, old: Tensor, new: Tensor, union: Tensor, draw: _Draw, s: OverlaySettings
) -> tuple[Tensor, Tensor, float]:
    """One overlay of one sample: pictures [1, 3, H, W], masks [1, 1, H, W] → picture, feathered paste mask, opacity."""
    if kind == "blend":
        weight = feather_mask(union[:, 0], s.feather)[:, None]
        alpha = _within(s.blend, draw.opacity)
        return torch.lerp(before, after, alpha * weight), weight, alpha
    base, source, silhouette, covered = (
        (after, before, old, new) if kind == "old_over_new" else (before, after, new, old)
    )
    box = _box(silhouette)
    height, width = silhouette.shape[-2:]
    # Cut by the border on one side: it may move out of the picture there, but not in. On both sides: not at all.
    room = [
        _room(box.left, width - box.right, box.width),
        _room(box.top, height - box.bottom, box.height),
    ]
    scale = _within(s.scale, draw.scale)
    if any(r.cut for r in room):
        scale = max(scale, 1.0)
    if kind == "double":
        # Beside the other one: things stand on a ground, so mostly sideways; up or down only where there is no room.
        length = _within(s.spread, draw.spread) * (1 if draw.side < 0.5 else -1)
        shift = [room[0].towards(length * box.width), room[1].clamp((draw.y - 0.5) * s.spread[0] * box.height)]
        if abs(shift[0]) < 0.5 * abs(length) * box.width:
            shift[1] = room[1].towards(length * box.height)
    else:
        wanted = [(2 * draw.x - 1) * s.max_offset * width, (2 * draw.y - 1) * s.max_offset * height]
        shift = [r.clamp(w) for r, w in zip(room, wanted)]
    source, silhouette = _move(source, silhouette, shift, scale)
    weight = feather_mask(silhouette[:, 0], s.feather)[:, None]
    hidden = ((covered * weight).sum() / covered.sum()).item()
    ceiling = min(1.0, (1.0 - s.min_visible) / max(hidden, 1e-6))
    high = min(s.opacity[1], ceiling)
    alpha = _within((min(s.opacity[0], high), high), draw.opacity)
    return torch.lerp(base, source, alpha * weight), weight, alpha


class _Draw(NamedTuple):
    """Uniform numbers in [0, 1) for one construction of one sample."""

    opacity: float
    x: float
    y: float
    scale: float
    side: float
    spread: float


def _draw(seed: int, index: int, kind: str, repeat: int) -> _Draw:
    digest = hashlib.blake2b(f"overlay/{seed}/{index}/{kind}/{repeat}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    return _Draw(*torch.rand(len(_Draw._fields), generator=generator, dtype=torch.float64).tolist())


def _within(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + u * (bounds[1] - bounds[0])


class _Room(NamedTuple):
    """How far an object may move along one axis, in pixels."""

    low: float
    high: float
    cut: bool

    def clamp(self, shift: float) -> float:
        return min(max(shift, self.low), self.high)

    def towards(self, shift: float) -> float:
        """``shift``, or the same to the other side if that leads farther."""
        return max(self.clamp(shift), self.clamp(-shift), key=abs)


def _room(ahead: float, behind: float, size: float) -> _Room:
    """From the free pixels before and after an object along an axis; at 0 the border cuts the object."""
    if ahead <= 0 and behind <= 0:
        return _Room(0.0, 0.0, True)
    if ahead <= 0:
        return _Room(-size / 2, 0.0, True)
    if behind <= 0:
        return _Room(0.0, size / 2, True)
    return _Room(-ahead, behind, False)


class _Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


def _box(mask: Tensor) -> _Box:
    """Bounding box of a mask [1, 1, H, W] at one half of its largest value: right and bottom are exclusive."""
    solid = mask[0, 0] >= 0.5 * mask.amax()
    columns, rows = solid.any(0).nonzero()[:, 0], solid.any(1).nonzero()[:, 0]
    return _Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _move(source: Tensor, mask: Tensor, shift: Sequence[float], scale: float) -> tuple[Tensor, Tensor]:
    """Picture and mask scaled about the mask's centroid and then shifted by (x, y) pixels.

    A pixel p of the result comes from c + (p − c − t) / s. The picture is sampled bicubically, because the blur of
    bilinear sampling would tell a pasted object from a real one.
    """
    if scale == 1.0 and not any(shift):
        return source, mask
    height, width = mask.shape[-2:]
    weights = mask[0, 0] / mask.sum()
    ys, xs = (torch.arange(n, device=mask.device, dtype=mask.dtype) for n in (height, width))
    cx, cy = (weights.sum(0) * xs).sum(), (weights.sum(1) * ys).sum()
    px = cx + (xs - cx - shift[0]) / scale
    py = cy + (ys - cy - shift[1]) / scale
    grid = torch.stack(
        [
            ((2 * px + 1) / width - 1).expand(height, width),
            ((2 * py + 1) / height - 1)[:, None].expand(height, width),
        ],
        dim=-1,
    )[None]
    moved = F.grid_sample(source, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)
    cut = F.grid_sample(mask, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)
    return moved, cut


class _Regions(NamedTuple):
    """Masks [B, 1, H, W] in float32: the old object, the new object, the edit region."""

    before: Tensor
    after: Tensor
    union: Tensor


def _regions(
    before: Tensor, after: Tensor, mask: Tensor | None, mask_before: Tensor | None, mask_after: Tensor | None
) -> _Regions:
    given = {"mask": mask, "mask_before": mask_before, "mask_after": mask_after}
    ready: dict[str, Tensor] = {n: checked_mask(n, m, before) for n, m in given.items() if m is not None}
    union = ready.get("mask")
    if union is None and len(ready) == 2:
        union = torch.maximum(ready["mask_before"], ready["mask_after"])
    elif union is None:
        union = estimate_mask(before, after).float()[:, None]
        for b in range(union.shape[0]):
            if not union[b].any():
                raise ValueError(
                    f"mask: sample {b} has no visible edit: before and after show no difference from which a mask "
                    "could be estimated; expected a pair with an edit, or a mask"
                )
    return _Regions(ready.get("mask_before", union), ready.get("mask_after", union), union)


def _checked_range(name: str, value: Sequence[float], low: float, high: float) -> tuple[float, float]:
    numbers = tuple(value) if isinstance(value, (tuple, list)) else ()
    fine = len(numbers) == 2 and all(map(is_number, numbers))
    if not fine or not low - 1e-9 <= numbers[0] <= numbers[1] <= high + 1e-9:
        raise ValueError(
            f"{name}: expected two numbers (low, high) with {low:g} <= low <= high <= {high:g}, got {value!r}"
        )
    return float(numbers[0]), float(numbers[1])
