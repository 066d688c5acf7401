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
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "OVERLAY_KINDS",
    "OverlayBatch",
    "OverlaySettings",
    "estimate_mask",
    "feather_mask",
    "make_overlays",
]

OVERLAY_KINDS = ("new_over_old", "old_over_new", "blend", "double")

# Differences in Oklab, where 0.02 is about the smallest that an eye sees (Ottosson 2020, "A perceptual color space for
# image processing"). Measured on three pairs of real edit models: the 95th percentile of an untouched background,
# re-encoded as WebP, is 0.015 to 0.03 after the blur below; the edited objects reach 0.13 to 0.45.
JUST_VISIBLE = 0.02
LARGEST_DRIFT = 0.06  # a colour shift of the whole picture; the pairs above have 0.003 to 0.016. More is an edit.
LARGEST_NOISE = 0.15  # what differs by more is changed, even if it is the whole picture
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
        _check_number("min_visible", self.min_visible, 0.0, 0.5, open_low=True)
        for name, low, high in (
            ("opacity", self.min_visible, 1.0),
            ("blend", self.min_visible, 1.0 - self.min_visible),
            ("scale", 0.5, 2.0),
            ("spread", 0.0, 2.0),
        ):
            object.__setattr__(self, name, _checked_range(name, getattr(self, name), low, high))
        _check_number("feather", self.feather, 0.0, math.inf)
        _check_number("max_offset", self.max_offset, 0.0, 0.5)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")


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

    Returns:
        An :class:`OverlayBatch` of B·K pictures on the device and in the dtype of ``before``.

    Raises:
        ValueError: for a wrong shape, dtype, device or range; for a mask that is empty; for a sample whose pictures are
            equal inside the edit region; and for an overlay that comes out equal to before or to after.
    """
    settings = OverlaySettings() if settings is None else settings
    if not isinstance(settings, OverlaySettings):
        raise ValueError(f"settings: expected OverlaySettings, got {type(settings).__name__}")
    _check_pair(before, after)
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
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"indices[{b}]: expected an integer, got {index!r}")
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
    ready: dict[str, Tensor] = {n: _checked_mask(n, m, before) for n, m in given.items() if m is not None}
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


@torch.no_grad()
def feather_mask(mask: Tensor, feather: float) -> Tensor:
    """A mask with a soft edge: a Gaussian of standard deviation ``feather / 2``, cut off at ``ceil(feather)`` pixels.

    Farther than ``ceil(feather)`` pixels (along rows or columns) from the mask the result is exactly 0. The borders of
    the picture are reflected, so that a full mask stays full.

    Args:
        mask: ``[B, H, W]`` in 0…1.
        feather: half-width of the edge in pixels, ≥ 0 and less than H and W; 0 returns ``mask`` itself.

    Returns:
        ``[B, H, W]`` in 0…1.

    Raises:
        ValueError: for a wrong shape, dtype or feather.

    >>> feather_mask(torch.ones(1, 4, 4), 2.0).eq(1).all()
    tensor(True)
    """
    _check_floating("mask", mask)
    if mask.ndim != 3 or mask.numel() == 0:
        raise ValueError(f"mask: expected [B, H, W], got {_shape(mask)}")
    _check_number("feather", feather, 0.0, math.inf)
    if feather >= min(mask.shape[-2:]):
        raise ValueError(f"feather: expected less than the mask's {mask.shape[-2]} x {mask.shape[-1]}, got {feather:g}")
    if feather == 0:
        return mask
    # reflect padding needs radius < size
    radius = min(math.ceil(feather), mask.shape[-1] - 1, mask.shape[-2] - 1)
    return _blur(mask[:, None], feather / 2, radius)[:, 0].clamp(0, 1)


def _blur(x: Tensor, sigma: float, radius: int) -> Tensor:
    """Separable Gaussian over [B, C, H, W], reflected at the borders."""
    steps = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    channels = x.shape[1]
    rows = kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="reflect"), rows, groups=channels)
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="reflect"), rows.transpose(-1, -2), groups=channels)


# ---------------------------------------------------------------------------------------------------------------------
# Where did the picture change?
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def estimate_mask(
    before: Tensor,
    after: Tensor,
    threshold: float | str = "auto",
    margin: float = 0.01,
    min_area: float = 0.001,
    feather: float = 0.0,
    working_size: int = 384,
) -> Tensor:
    """The region in which two pictures of a pair differ, made to survive re-encoding and shifts by a pixel.

    1. Both pictures are reduced to at most ``working_size`` pixels on the long side, taken to Oklab and blurred.
    2. d(p) = max(min_q ‖before(p) − after(q)‖, min_q ‖after(p) − before(q)‖) over q at most one pixel from p, so that
       edges that moved by a pixel do not count as changed. A colour shift of the whole background, measured as the
       median over the unchanged pixels, is taken out first.
    3. Pixels with d above a low threshold are kept if they are connected to enough pixels above a high one.
       ``"auto"``: with the noise n = median + 4 · 1.4826 · MAD of the pixels below Otsu's threshold, low is
       max(n, 0.02), at most 0.15, and high is max(Otsu, low, 0.04), at most 0.3. A number is used for low and its
       double for high.
    4. The region is closed, pieces smaller than ``min_area`` (or than 2 % of the largest) go, holes up to 2 % of the
       picture are filled, and the rest grows by ``margin``.

    Args:
        before: ``[B, H, W, 3]`` in 0…1.
        after: the same shape.
        threshold: ``"auto"`` or a distance in Oklab, > 0; 0.02 is just visible, black and white are 1 apart. Lower it
            if the mask misses parts of the object, raise it if it takes in the background.
        margin: growth on every side, as a fraction of the long side, 0…0.25.
        min_area: smallest piece that counts, as a fraction of the picture's area, 0…1.
        feather: half-width of the soft edge in pixels, see :func:`feather_mask`; 0 leaves the mask in {0, 1}.
        working_size: pixels on the long side at which the work is done, ≥ 32.

    Returns:
        ``[B, H, W]`` in the dtype of ``before``; all zeros for a sample without a visible edit.

    Raises:
        ValueError: for a wrong shape, dtype, device, range or option.
    """
    _check_pair(before, after)
    if not (isinstance(threshold, str) and threshold == "auto"):
        _check_number("threshold", threshold, 0.0, math.inf, open_low=True, also="'auto' or ")
    _check_number("margin", margin, 0.0, 0.25)
    _check_number("min_area", min_area, 0.0, 1.0)
    _check_number("feather", feather, 0.0, math.inf)
    if not isinstance(working_size, int) or working_size < 32:
        raise ValueError(f"working_size: expected an integer >= 32, got {working_size!r}")
    height, width = before.shape[1:3]
    ratio = min(1.0, working_size / max(height, width))
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    masks = []
    for b in range(before.shape[0]):  # one at a time: the thresholds are each sample's own
        small = [t[b : b + 1].float().permute(0, 3, 1, 2) for t in (before, after)]
        if size != (height, width):
            small = [F.interpolate(t, size=size, mode="area") for t in small]
        found = _changed(*small, threshold, min_area, round(margin * max(size)))
        if size != (height, width):
            found = F.interpolate(found.float(), size=(height, width), mode="bilinear", align_corners=False) > 0.5
        masks.append(found[:, 0])
    result = torch.cat(masks).float()
    return (feather_mask(result, feather) if feather else result).to(before.dtype)


def _changed(before: Tensor, after: Tensor, threshold: float | str, min_area: float, grow: int) -> Tensor:
    """The edit region of one pair [1, 3, H, W] as a boolean [1, 1, H, W]."""
    height, width = before.shape[-2:]
    lab0, lab1 = (_oklab(t) for t in (before, after))
    if min(height, width) > 3:
        lab0, lab1 = (_blur(t, 1.0, 3) for t in (lab0, lab1))
    d = _tolerant_distance(lab0, lab1)
    quiet = (d < _otsu(d))[0, 0]
    if quiet.float().mean() > 0.5:  # otherwise the "background" may be the edit itself
        drift = (lab1 - lab0)[0, :, quiet].median(dim=1).values
        if drift.norm().item() <= LARGEST_DRIFT:
            d = _tolerant_distance(lab0, lab1 - drift.view(1, 3, 1, 1))
    if threshold == "auto":
        otsu = _otsu(d)
        background = d[d < otsu] if bool((d < otsu).any()) else d.flatten()
        median = background.median()
        noise = (median + 4 * 1.4826 * (background - median).abs().median()).item()
        low = min(max(noise, JUST_VISIBLE), LARGEST_NOISE)
        high = min(max(otsu, low, 2 * JUST_VISIBLE), 2 * LARGEST_NOISE)
    else:
        low, high = float(threshold), 2 * float(threshold)
    seeds = d > high
    for edge in (seeds[..., 0, :], seeds[..., -1, :], seeds[..., 0], seeds[..., -1]):
        edge.fill_(False)  # a picture that moved by a pixel has a new row at its border
    if not seeds.any():
        return seeds
    # A piece needs a core of strong pixels, not one stray: a hundredth of the smallest piece that counts, and 3 pixels.
    # Closing by one pixel mends lines; the wider closing comes after stray pixels of the background are gone.
    pixels = height * width
    labels = _components(_close(d > low, 1))
    core = torch.bincount(labels[seeds], minlength=pixels + 1)
    core[0] = 0
    region = (core >= max(3, 0.01 * min_area * pixels))[labels]
    region = _close(region, max(1, round(0.01 * max(height, width))))
    labels = _components(region)
    area = torch.bincount(labels.flatten(), minlength=pixels + 1)
    area[0] = 0
    region = ((area >= min_area * pixels) & (area >= 0.02 * area.max()) & (area > 0))[labels]
    # Holes: pieces of the complement that do not reach the border.
    outside = _components(~region)
    area = torch.bincount(outside.flatten(), minlength=pixels + 1)
    area[0] = 0
    for side in (outside[..., 0, :], outside[..., -1, :], outside[..., 0], outside[..., -1]):
        area[side.flatten()] = 0
    region = region | ((area > 0) & (area <= 0.02 * pixels))[outside]
    return _dilate(region, grow)


def _oklab(image: Tensor) -> Tensor:
    """sRGB [B, 3, H, W] in 0…1 → Oklab (Ottosson 2020): L in 0…1, a and b about −0.4…0.4."""
    image = image.clamp(0, 1)
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    to_lms = linear.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = linear.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lms = torch.einsum("ij,bjhw->bihw", to_lms, linear).clamp_min(0) ** (1 / 3)
    return torch.einsum("ij,bjhw->bihw", to_lab, lms)


def _tolerant_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance [B, 1, H, W] of two pictures that forgives shifts by one pixel, symmetric in its arguments."""
    height, width = a.shape[-2:]

    def nearest(x: Tensor, y: Tensor) -> Tensor:
        padded = F.pad(y, (1, 1, 1, 1), mode="replicate")
        best: Tensor | None = None
        for i in range(3):
            for j in range(3):
                d = (x - padded[..., i : i + height, j : j + width]).square().sum(1, keepdim=True)
                best = d if best is None else torch.minimum(best, d)
        return best.sqrt()

    return torch.maximum(nearest(a, b), nearest(b, a))


def _otsu(d: Tensor, bins: int = 256) -> float:
    """Otsu's threshold (1979): the split with the largest variance between the two sides."""
    top = d.max().item()
    if top <= 0:
        return 0.0
    counts = torch.histc(d.flatten().cpu(), bins=bins, min=0.0, max=top).double()
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * top / bins
    below = counts.cumsum(0)
    above = counts.sum() - below
    sums = (counts * centres).cumsum(0)
    gap = sums / below.clamp_min(1) - (sums[-1] - sums) / above.clamp_min(1)
    best = int((below * above * gap.square()).argmax())
    return (best + 1) * top / bins


def _dilate(region: Tensor, radius: int) -> Tensor:
    """Growth of a boolean [B, 1, H, W] by a disc-like octagon of the given radius in pixels."""
    result = region.to(torch.float32)
    for step in range(radius):  # a square and a diamond by turns
        if step % 2:
            result = F.max_pool2d(result, 3, stride=1, padding=1)
        else:
            rows = F.max_pool2d(result, (3, 1), stride=1, padding=(1, 0))
            result = torch.maximum(rows, F.max_pool2d(result, (1, 3), stride=1, padding=(0, 1)))
    return result > 0.5


def _close(region: Tensor, radius: int) -> Tensor:
    """Growth, then the same shrinking. The border of the picture does not eat into the region."""
    return ~_dilate(~_dilate(region, radius), radius)


def _components(region: Tensor) -> Tensor:
    """Labels of the 8-connected pieces of a boolean [1, 1, H, W].

    0 outside; within a piece, the largest pixel number in it, counted from 1. Every round joins each label to the
    largest one beside it, found by max pooling, and follows the joins to their end, so that even a spiral takes a few
    rounds only.
    """
    numbers = torch.arange(region.numel() + 1, device=region.device)
    labels = torch.where(region, numbers[1:].view_as(region), 0)
    exact = torch.float32 if region.numel() < 1 << 24 else torch.float64  # the pooled type has to hold every label
    while True:
        beside = F.max_pool2d(labels.to(exact), 3, stride=1, padding=1).long()
        beside = torch.where(region, beside, 0)
        if torch.equal(beside, labels):
            return labels
        joined = numbers.scatter_reduce(0, labels.flatten(), beside.flatten(), "amax")
        while not torch.equal(joined, joined[joined]):
            joined = joined[joined]
        labels = joined[labels]


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _check_number(name: str, value: float, low: float, high: float, open_low: bool = False, also: str = "") -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or value > high or (open_low and value == low):
        sign = ">" if open_low else ">="
        bounds = f"{sign} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
        raise ValueError(f"{name}: expected {also}a number {bounds}, got {value!r}")


def _checked_range(name: str, value: Sequence[float], low: float, high: float) -> tuple[float, float]:
    numbers = tuple(value) if isinstance(value, (tuple, list)) else ()
    fine = len(numbers) == 2 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)
    if not fine or not low - 1e-9 <= numbers[0] <= numbers[1] <= high + 1e-9:
        raise ValueError(
            f"{name}: expected two numbers (low, high) with {low:g} <= low <= high <= {high:g}, got {value!r}"
        )
    return float(numbers[0]), float(numbers[1])


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype with values in 0…1, got {x.dtype}")


def _check_values(name: str, x: Tensor) -> None:
    low, high = (v.item() for v in torch.aminmax(x))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails as well
        raise ValueError(f"{name}: expected values in 0…1, got values from {low:g} to {high:g}")


def _check_pair(before: Tensor, after: Tensor) -> None:
    for name, x in (("before", before), ("after", after)):
        _check_floating(name, x)
        if x.ndim != 4 or x.shape[-1] != 3 or x.numel() == 0:
            raise ValueError(f"{name}: expected pictures [B, H, W, 3], got {_shape(x)}")
        _check_values(name, x)
    if after.shape != before.shape:
        raise ValueError(f"after: expected shape {_shape(before)} like before, got {_shape(after)}")
    if after.device != before.device:
        raise ValueError(f"after: expected device {before.device} like before, got {after.device}")


def _checked_mask(name: str, mask: Tensor, images: Tensor) -> Tensor:
    """[B, H, W] or [1, H, W] → [B, 1, H, W] in float32, in 0…1, no sample empty."""
    _check_floating(name, mask)
    batch, height, width, _ = images.shape
    if mask.ndim != 3:
        raise ValueError(f"{name}: expected [B, H, W], got {_shape(mask)}")
    if mask.shape[1:] != (height, width):
        raise ValueError(
            f"{name}: expected height and width {height} x {width} like the pictures, "
            f"got {mask.shape[1]} x {mask.shape[2]}"
        )
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"{name}: expected a batch of {batch} like the pictures, or of 1, got {mask.shape[0]}")
    if mask.device != images.device:
        raise ValueError(f"{name}: expected device {images.device} like the pictures, got {mask.device}")
    _check_values(name, mask)
    empty = (mask.amax((1, 2)) < 0.5).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"{name}: expected a mask that reaches 0.5 somewhere in every sample, got an empty one for sample "
            f"{empty[0]}; pass None to do without"
        )
    return mask.float().clamp(0, 1).expand(batch, height, width)[:, None]
