"""Which pixels belong to the old object, and which to the new one, where only their pictures are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur, mean_pool
from .measures import fitting_pixels

SIZE = 96  # pixels on a side at which patches are compared; as many in all where the crop is not square
RING = 3000  # patches of the surroundings at most
CHANGED = 0.03  # Oklab; 0.02 is just visible
NEAR = 0.15  # Oklab distance that a patch from the other end of the picture is put at a disadvantage by
RIVAL = 0.05  # how much an unlikely patch in the other picture speaks for this one being background
STEEP = 3.0  # slope of a mask's edge: shares from one third to two thirds
AT_A_TIME = 64  # patches: what a core keeps beside it; twice as fast as 2,048
NOISE = (
    4.0  # a patch is an object's where its squared distance exceeds this many times what is usual in the surroundings
)


@dataclass(frozen=True)
class Regions:
    """Soft masks ``[1, 1, h, w]`` in 0…1.

    Attributes:
        old: the old object; the background in the before picture's place elsewhere.
        new: the new object.
    """

    old: Tensor
    new: Tensor

    @property
    def old_alone(self) -> Tensor:
        return self.old * (1 - self.new)

    @property
    def new_alone(self) -> Tensor:
        return self.new * (1 - self.old)


def find_regions(before: Tensor, after: Tensor, mask: Tensor) -> Regions:
    """Where in the mask the old and the new object stand.

    A patch of 5 × 5 pixels that has a like among the patches around the edit, not too far away, is background; one that has
    none is an object. The cost c of a patch in s or g is the squared distance to its nearest like, and its share
    c / (c + ``NOISE`` · n) · c / (c + ``RIVAL`` · c') with the median n of the same between patches of the surroundings, and
    the cost c' of the other picture's patch. Where s and g differ, one of the two is an object, so that the greater share
    counts as 1.

    Args:
        before, after: Oklab ``[1, 3, h, w]``.
        mask: boolean ``[1, 1, h, w]``; some of it outside.
    """
    size = fitting_pixels(before.shape[-2:], SIZE, enlarge=False)
    small = [F.interpolate(t, size=size, mode="area") for t in (before, after)]
    inside = F.interpolate(mask.float(), size=size, mode="area") > 0.25
    difference = blur((small[1] - small[0]).norm(dim=1, keepdim=True), 0.7, 2)
    changed = inside & (difference > CHANGED)
    around = ~(F.max_pool2d((changed | inside).float(), 5, 1, 2) > 0)
    if not bool(around.any()):
        around = ~changed
    if not bool(changed.any()) or int(around.sum()) < 16:
        nothing = torch.zeros_like(mask, dtype=before.dtype)
        return Regions(nothing, nothing + mask)
    patches = [_patches(t) for t in small]
    ring = around.flatten().nonzero()[:, 0]
    ring = ring[:: -(-len(ring) // RING)]
    known = patches[0][ring]
    usual = _usual(known, size, ring)
    where = changed.flatten()
    costs = []
    for p in patches:
        cost = torch.zeros(p.shape[0])
        cost[where] = _nearest(p[where], known)
        costs.append(mean_pool(F.pad(cost.view(1, 1, *size), (1, 1, 1, 1), mode="replicate"), 3, 1))
    shares = [
        cost / (cost + NOISE * usual) * cost / (cost + RIVAL * other + 1e-9) for cost, other in (costs, costs[::-1])
    ]
    top = torch.maximum(*shares).clamp_min(1e-6)
    old, new = ((share / top) * changed for share in shares)
    old, new = (F.interpolate(t, size=before.shape[-2:], mode="bilinear", align_corners=False) for t in (old, new))
    return Regions(*(((t - 0.5) * STEEP + 0.5).clamp(0, 1) for t in (old, new)))


def _patches(picture: Tensor) -> Tensor:
    """Every pixel's neighbourhood and place ``[pixels, features]``; mean squares over a patch."""
    height, width = picture.shape[-2:]
    columns = F.unfold(F.pad(picture, (2, 2, 2, 2), mode="replicate"), 5)[0].T / 5.0
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.cat([columns, NEAR * torch.stack([y.flatten(), x.flatten()], 1)], 1)


def _nearest(patches: Tensor, known: Tensor) -> Tensor:
    """Squared distance to the nearest of the known patches: ‖p‖² + min (‖k‖² − 2 p · k)."""
    squared, columns = known.square().sum(1), known.T.contiguous()
    parts = patches.split(AT_A_TIME)
    nearest = torch.cat([torch.addmm(squared, part, columns, alpha=-2).amin(1) for part in parts])
    return (nearest + patches.square().sum(1)).clamp_min(0)


def _usual(known: Tensor, size: tuple[int, int], places: Tensor) -> Tensor:
    """The median of the same between patches of the surroundings that do not overlap."""
    some = torch.arange(0, len(known), max(1, len(known) // 400))
    places = places.int()  # half the traffic of a long's differences
    y, x = places // size[1], places % size[1]
    apart = torch.maximum((y[some, None] - y[None]).abs(), (x[some, None] - x[None]).abs()) > 4
    distances = torch.cdist(known[some], known).where(apart, torch.full((), torch.inf))
    nearest = distances.amin(1)
    nearest = nearest[nearest.isfinite()]
    return (nearest.square().median() if len(nearest) else torch.tensor(0.0)).clamp_min(1e-4)
