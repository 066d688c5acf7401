"""Where the new object stands in an output: the similarity, then the affine map, that carries it there.

The output x and the after picture g are compared in Oklab on the object's pixels q, weighted w(q), under a map A about the
object's centre: Σ w(q) ρ(x(A q) − g(q)). Shifts are tried all at once by a correlation (fast Fourier transforms) at a few
scales; the best one is refined by Gauss–Newton steps with Cauchy's weights (Baker and Matthews 2004, "Lucas-Kanade 20 years
on"), first over similarities, then over affine maps, whose stretch is a measure of distortion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur, mean_pool

SCALES = (0.8, 0.9, 1.0, 1.12, 1.25)
FARTHEST = 0.5  # of the object's size, by which it is looked for in any direction
TIE = 0.08  # relative cost by which an object elsewhere or of another size must be better, per object's size of shift
STEPS = 8  # of Gauss–Newton per level
OUTLIER = 0.08  # Oklab, where a residual counts half
CLOSE = 1e-3  # pixels


@dataclass(frozen=True)
class Alignment:
    """A q = centre + matrix · (q − centre) + shift, in pixels (x, y); takes places of g to places of x.

    Attributes:
        centre, shift: ``[2]``.
        matrix: ``[2, 2]``.
        size: of the object: √(area under the weights), in pixels.
    """

    centre: Tensor
    matrix: Tensor
    shift: Tensor
    size: float

    @property
    def scale(self) -> float:
        return math.sqrt(max(1e-6, float(torch.linalg.det(self.matrix))))

    @property
    def stretch(self) -> float:
        """The larger singular value over the smaller one, ≥ 1."""
        values = torch.linalg.svdvals(self.matrix)
        return float(values[0] / values[1].clamp_min(1e-6))

    @property
    def displacement(self) -> float:
        """Length of the shift as a share of the object's size."""
        return float(self.shift.norm()) / max(self.size, 1.0)


def align(x: Tensor, g: Tensor, weights: Tensor, farthest: float = FARTHEST) -> tuple[Alignment, Alignment]:
    """(similarity, affine map) by which the object in g is found in x.

    Args:
        x, g: Oklab ``[1, 3, h, w]``.
        weights: of the object in g, ``[1, 1, h, w]`` in 0…1, not all zero.
        farthest: how far away it is looked for, in sizes of the object.
    """
    height, width = x.shape[-2:]
    places = _grid(height, width)
    w = weights.flatten()
    centre = (places * w[:, None]).sum(0) / w.sum()
    start = Alignment(centre, torch.eye(2), torch.zeros(2), float(w.sum()) ** 0.5)
    best = _search(x, g, weights, start, farthest)
    for sigma in (2.0, 1.0):
        radius = math.ceil(2 * sigma)
        best = _refine(blur(x, sigma, radius), blur(g, sigma, radius), weights, best, affine=False)
    x, g = blur(x, 1.0, 2), blur(g, 1.0, 2)
    plain = _refine(x, g, weights, start, affine=False)  # a search may be led astray where the object is itself
    if cost(x, g, weights, plain) <= cost(x, g, weights, best) * (1 + TIE * best.displacement):
        best = plain
    return best, _refine(x, g, weights, best, affine=True)


def cost(x: Tensor, g: Tensor, weights: Tensor, found: Alignment) -> float:
    """Mean of Cauchy's robust cost over the object."""
    residual = (look_up(x, found) - g).square().sum(1, keepdim=True)
    return float((weights * torch.log1p(residual / OUTLIER**2)).sum() / weights.sum())


def look_up(x: Tensor, found: Alignment) -> Tensor:
    """x(A q) for every place q."""
    height, width = x.shape[-2:]
    places = _grid(height, width)
    return _sample(x, (places - found.centre) @ found.matrix.T + found.centre + found.shift)


def warp(g: Tensor, found: Alignment) -> Tensor:
    """g(A⁻¹ p) for every place p: the object of g where it was found in the output."""
    height, width = g.shape[-2:]
    back = torch.linalg.inv(found.matrix)
    return _sample(g, (_grid(height, width) - found.centre - found.shift) @ back.T + found.centre)


def _grid(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1).float()


def _sample(picture: Tensor, places: Tensor) -> Tensor:
    height, width = picture.shape[-2:]
    return _sampled(picture, places).view(1, -1, height, width)


def _sampled(picture: Tensor, places: Tensor) -> Tensor:
    """``[1, C, h, w]`` at places ``[n, 2]`` → ``[C, n]``."""
    height, width = picture.shape[-2:]
    scaled = (2 * places + 1) / torch.tensor([width, height]) - 1
    return F.grid_sample(picture, scaled[None, None], "bilinear", "border", align_corners=False)[0, :, 0]


def _search(x: Tensor, g: Tensor, weights: Tensor, start: Alignment, farthest: float) -> Alignment:
    """The best whole-pixel shift at the best of a few scales, at half the resolution."""
    half = [mean_pool(blur(t, 1.0, 2), 2, 2) for t in (x, g)]
    w = mean_pool(weights, 2, 2)
    small = Alignment(start.centre / 2 - 0.25, start.matrix, start.shift, start.size / 2)
    height, width = w.shape[-2:]
    reach = max(1, min(int(farthest * small.size), height // 2, width // 2))
    best = (math.inf, start)
    found = _spectrum(torch.cat([half[0].square().sum(1, keepdim=True), half[0]], 1), reach)
    for scale in SCALES:
        grown = Alignment(small.centre, torch.eye(2) * scale, small.shift, small.size)
        weight, template = warp(torch.cat([w, half[1]], 1), grown).split([1, 3], 1)
        total = weight.sum().clamp_min(1e-6)
        # Σ w (x − g)² = Σ w x² − 2 Σ w g x + Σ w g², all as correlations
        costs = _correlate(found, torch.cat([weight, -2 * weight * template], 1), reach)
        costs = ((costs + (weight * template.square()).sum()) / total).clamp_min(0)
        offsets = torch.arange(-reach, reach + 1).float()
        shift = (offsets[:, None].square() + offsets[None].square()).sqrt() / small.size
        costs = (costs + 1e-4) * (1 + TIE * (shift + abs(math.log(scale)) * 4))
        at = int(costs.argmin())
        if float(costs.flatten()[at]) < best[0]:
            dy, dx = divmod(at, 2 * reach + 1)
            move = 2 * torch.tensor([dx - reach, dy - reach]).float()
            best = (float(costs.flatten()[at]), Alignment(start.centre, torch.eye(2) * scale, move, start.size))
    return best[1]


def _spectrum(x: Tensor, reach: int) -> tuple[Tensor, torch.Size]:
    """Of a picture with ``reach`` pixels more on each side, and its size."""
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    return torch.fft.rfft2(padded), padded.shape[-2:]


def _correlate(found: tuple[Tensor, torch.Size], template: Tensor, reach: int) -> Tensor:
    """Σ_q template(q) x(q + shift) for shifts up to ``reach``, summed over channels: ``[2 reach + 1, 2 reach + 1]``.

    Args:
        found: the :func:`_spectrum` of x.
    """
    spectrum, size = found
    product = spectrum * torch.fft.rfft2(template, s=size).conj()
    return torch.fft.irfft2(product.sum(1), s=size)[0, : 2 * reach + 1, : 2 * reach + 1]


def _refine(x: Tensor, g: Tensor, weights: Tensor, found: Alignment, affine: bool) -> Alignment:
    """Gauss–Newton steps from ``found``. The equations Σ r JᵀJ · move = −Σ r Jᵀ(x − g) have J = ∇x · ∂(A q)/∂move, and the second
    factor is linear in the place q = (u, v): all that is summed over pixels are products of slopes, and their moments in u and v."""
    height, width = x.shape[-2:]
    inside = weights.flatten() > 0.05
    offsets = (_grid(height, width) - found.centre)[inside]
    w, target = weights.flatten()[inside], g[0].flatten(1)[:, inside]
    size = max(found.size, 1.0)
    u, v = (offsets / size).unbind(1)
    moments = torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], 1)
    slopes = (torch.gradient(x, dim=3)[0], torch.gradient(x, dim=2)[0])
    stacked = torch.cat([x, *slopes], 1)
    best = found
    for _ in range(STEPS):
        values, across, down = _sampled(stacked, offsets @ best.matrix.T + best.centre + best.shift).split(3)
        residual = values - target
        robust = w / (1 + residual.square().sum(0) / OUTLIER**2)
        products = [across * across, across * down, down * down, across * residual, down * residual]
        gram, towards = _normal(torch.stack([p.sum(0) for p in products]) * robust @ moments, affine)
        gram = gram + torch.eye(len(gram)) * (1e-3 * gram.diagonal().mean() + 1e-9)
        move = -torch.linalg.solve(gram, towards)
        move = move.clamp(-0.1 * size, 0.1 * size)
        turn = torch.stack([move[2], move[3], move[4], move[5]] if affine else [move[2], -move[3], move[3], move[2]])
        best = Alignment(best.centre, best.matrix + turn.view(2, 2) / size, best.shift + move[:2], best.size)
        if float(move.abs().max()) < CLOSE:
            break
    lost = not bool(best.matrix.isfinite().all()) or not 0.5 < best.scale < 2 or float(best.shift.norm()) > 2 * size
    return found if lost else best


# Of the moves, in the order of `_refine`: which share of them is along x and along y, as coefficients of 1, u and v.
AFFINE = torch.tensor(
    [
        [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]],
    ]
).float()
SIMILAR = torch.tensor(
    [[[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, -1]], [[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]]
).float()


def _normal(sums: Tensor, affine: bool) -> tuple[Tensor, Tensor]:
    """(Σ r JᵀJ, Σ r Jᵀ(x − g)) from the moments 1, u, v, u², uv, v² ``[5, 6]`` of r times xx, xy, yy of the slopes, and of r
    times the slopes and the residual."""
    basis = AFFINE if affine else SIMILAR
    seconds = sums[:3, [0, 1, 2, 1, 3, 4, 2, 4, 5]].view(3, 3, 3)  # of products of two of 1, u, v
    along = seconds[[0, 1, 1, 2]].view(2, 2, 3, 3)
    gram = torch.einsum("ipa,ijab,jqb->pq", basis, along, basis)
    return gram, torch.einsum("ipa,ia->p", basis, sums[3:, :3])
