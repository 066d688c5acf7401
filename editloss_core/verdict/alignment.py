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

from ..masks import blur

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
    half = [F.avg_pool2d(blur(t, 1.0, 2), 2) for t in (x, g)]
    w = F.avg_pool2d(weights, 2)
    small = Alignment(start.centre / 2 - 0.25, start.matrix, start.shift, start.size / 2)
    height, width = w.shape[-2:]
    reach = max(1, min(int(farthest * small.size), height // 2, width // 2))
    best = (math.inf, start)
    for scale in SCALES:
        grown = Alignment(small.centre, torch.eye(2) * scale, small.shift, small.size)
        weight, template = warp(w, grown), warp(half[1], grown)
        total = weight.sum().clamp_min(1e-6)
        # Σ w (x − g)² = Σ w x² − 2 Σ w g x + Σ w g², all as correlations
        squared = half[0].square().sum(1, keepdim=True)
        costs = _correlate(squared, weight, reach) - 2 * _correlate(half[0], weight * template, reach)
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


def _correlate(x: Tensor, template: Tensor, reach: int) -> Tensor:
    """Σ_q template(q) x(q + shift) for shifts up to ``reach``, summed over channels: ``[2 reach + 1, 2 reach + 1]``."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(template, s=size).conj()
    return torch.fft.irfft2(spectrum.sum(1), s=size)[0, : 2 * reach + 1, : 2 * reach + 1]


def _refine(x: Tensor, g: Tensor, weights: Tensor, found: Alignment, affine: bool) -> Alignment:
    height, width = x.shape[-2:]
    inside = weights.flatten() > 0.05
    offsets = (_grid(height, width) - found.centre)[inside]
    w, target = weights.flatten()[inside], g.flatten(2)[0].T[inside]
    size = max(found.size, 1.0)
    u, v = (offsets / size).unbind(1)
    zero, one = torch.zeros_like(u), torch.ones_like(u)
    moves_x = [one, zero, u, v, zero, zero] if affine else [one, zero, u, -v]
    moves_y = [zero, one, zero, zero, u, v] if affine else [zero, one, v, u]
    slopes = (torch.gradient(x, dim=3)[0], torch.gradient(x, dim=2)[0])
    stacked = torch.cat([x, *slopes], 1)
    basis_x, basis_y = torch.stack(moves_x, 1), torch.stack(moves_y, 1)
    best = found
    for _ in range(STEPS):
        values = _sampled(stacked, offsets @ best.matrix.T + best.centre + best.shift).T
        residual = values[:, :3] - target
        robust = w / (1 + residual.square().sum(1) / OUTLIER**2)
        jacobian = values[:, 3:6, None] * basis_x[:, None] + values[:, 6:9, None] * basis_y[:, None]
        weighted = jacobian * robust[:, None, None]
        gram = torch.einsum("ncp,ncq->pq", weighted, jacobian)
        gram = gram + torch.eye(len(gram)) * (1e-3 * gram.diagonal().mean() + 1e-9)
        move = -torch.linalg.solve(gram, torch.einsum("ncp,nc->p", weighted, residual))
        move = move.clamp(-0.1 * size, 0.1 * size)
        turn = torch.stack([move[2], move[3], move[4], move[5]] if affine else [move[2], -move[3], move[3], move[2]])
        best = Alignment(best.centre, best.matrix + turn.view(2, 2) / size, best.shift + move[:2], best.size)
        if float(move.abs().max()) < CLOSE:
            break
    lost = not bool(best.matrix.isfinite().all()) or not 0.5 < best.scale < 2 or float(best.shift.norm()) > 2 * size
    return found if lost else best
