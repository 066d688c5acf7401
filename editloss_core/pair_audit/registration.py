"""Whether two pictures of a pair lie on one another: the affine map that carries the background of one to the other.

Both pictures become normalised detail y = h / √(blur(h²) + ε²), h = x − blur(x), of their luminance, which forgets
brightness and contrast. The map A minimises Σ ρ(after(A q) − before(q)) over places q with detail, coarse to fine, by
inverse compositional Gauss–Newton steps (Baker and Matthews 2004, "Lucas-Kanade 20 years on") under Geman and McClure's
weights, whose influence falls to zero, so that the edit does not pull. It starts from no movement and, where that does not
fit, from the best shift and scale of a phase correlation (Kuglin and Hines 1975).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import blur

FLOOR = 0.01  # luminance: detail below this is noise, and stays small
LEVELS = (64, 128, 256, 512)  # pixels on the long side
POINTS = 6000  # places per level
STEPS = 12
WIDTHS = (1.2, 0.8, 0.6, 0.5)  # of the weights, in units of normalised detail, per level
SCALES = (0.76, 0.82, 0.88, 0.94, 1.0, 1.06, 1.13, 1.22, 1.32)  # that the search tries
BLOCK = 16  # pixels: the blocks of the finest level that are asked whether they agree
AGREE = 0.7  # correlation from which a block does
TEXTURED = 0.35  # mean detail from which a block is asked
ENOUGH = 0.5  # share of agreeing blocks with which the search is left out
LEAST_BLOCKS = 12
LEAST_SHARE = 0.12  # of the blocks with detail that must agree
LEAST_SPREAD = 0.12  # standard deviation of the agreeing blocks' places, as a share of the side
ROUGH = 0.1  # correlation of the whole above which a mirrored or turned picture is told


@dataclass(frozen=True)
class Registration:
    """q → matrix · q + shift: where in the after picture is what lies at q in the before picture.

    Places are (x, y) from the centre, in long sides of the before picture.

    Attributes:
        matrix: ``[2, 2]``.
        shift: ``[2]``.
        agreement: share of the blocks with detail that correlate after it, 0…1.
        at_rest: the same share without any movement.
        sd: standard error of the movement in the corners, in long sides.
        trusted: whether enough blocks agree, far enough apart.
        asked: whether there was detail to compare.
    """

    matrix: Tensor
    shift: Tensor
    agreement: float
    at_rest: float
    sd: float
    trusted: bool
    asked: bool

    @property
    def zoom(self) -> float:
        """Size of things in the after picture over their size before."""
        return math.sqrt(max(float(torch.linalg.det(self.matrix)), 1e-6))

    @property
    def rotation(self) -> float:
        """Degrees, clockwise on the screen."""
        m = self.matrix
        return math.degrees(math.atan2(float(m[1, 0] - m[0, 1]), float(m[0, 0] + m[1, 1])))

    @property
    def stretch(self) -> float:
        """Growth in width over growth in height."""
        return float(self.matrix[:, 0].norm() / self.matrix[:, 1].norm().clamp_min(1e-6))

    def farthest(self, height: int, width: int) -> float:
        """The longest way that a corner of a picture moves, in long sides."""
        x, y = (0.5 * side / max(height, width) for side in (width, height))
        corners = torch.tensor([[x, y], [x, -y], [-x, y], [-x, -y]])
        return float((corners @ (self.matrix - torch.eye(2)).T + self.shift).norm(dim=1).max())


@torch.no_grad()
def register(before: Tensor, after: Tensor, ignore: Optional[Tensor] = None) -> Registration:
    """The affine map from before to after, over what the two have in common.

    Measured on 14 rendered rooms of 448 pixels with an object replaced: shifts by 2 and 14 pixels are found to 0.01 pixels,
    by 1 pixel with JPEG of quality 80 to 0.06; zooms by 2 to 20 % to 0.02 %, turns by 2 degrees to 0.01 degrees, stretches by
    2 % to 0.01 %. Shifts by 43 pixels are found in most rooms, and no other shift is claimed in the rest. 28 unmoved pairs seem
    to move by 0.02, 0.11 and 0.29 pixels at most in the corners, as JPEG of quality 95, 60 and 30.
    55 ms at 512 pixels on one core.

    Args:
        before, after: pictures ``[3, h, w]`` in 0…1 of one size, at most 512 pixels on the long side.
        ignore: ``[h, w]``, 1 where the edit is known to be.
    """
    height, width = before.shape[-2:]
    greys = [luminance(t) for t in (before, after)]
    pyramid = []
    for size in LEVELS:
        ratio = size / max(height, width)
        if ratio < 1 or size == LEVELS[-1]:
            old, new = (detail(_scaled(grey, min(1.0, ratio))) for grey in greys)
            pyramid.append((old, new))
    # A small picture has fewer levels, and its finest one is always the last.
    widths = WIDTHS[-len(pyramid) :]
    finest = pyramid[-1]
    still = torch.eye(3)
    at_rest, rest_spread = _agreement(finest[0], finest[1], still, ignore)
    best, sd = _descend(pyramid, still, widths, ignore)
    share, spread = _agreement(finest[0], finest[1], best, ignore)
    if share < ENOUGH:
        start = _search(*pyramid[min(1, len(pyramid) - 1)])
        if start is not None:
            other, other_sd = _descend(pyramid, start, widths, ignore)
            other_share, other_spread = _agreement(finest[0], finest[1], other, ignore)
            if other_share > share + 0.05:
                best, sd, share, spread = other, other_sd, other_share, other_spread
        if float((best - still).abs().max()) > 0.01:  # so far away that the fine levels may have run out of steps
            again, again_sd = _descend(pyramid[-2:], best, widths[-2:], ignore)
            again_share, again_spread = _agreement(finest[0], finest[1], again, ignore)
            if again_share > share:
                best, sd, share, spread = again, again_sd, again_share, again_spread
    if at_rest > share + 0.02:
        best, share, spread = still, at_rest, rest_spread
    trusted = spread >= LEAST_SPREAD and share >= LEAST_SHARE
    asked = int((F.avg_pool2d(finest[0].square(), BLOCK) > TEXTURED).sum()) >= LEAST_BLOCKS
    return Registration(best[:2, :2].clone(), best[:2, 2].clone(), share, at_rest, sd, trusted, asked)


@torch.no_grad()
def warp(after: Tensor, found: Registration) -> tuple[Tensor, Tensor]:
    """(after seen from the before picture ``[C, h, w]``, where that is known ``[h, w]``, boolean)."""
    height, width = after.shape[-2:]
    places = _grid(height, width)
    there = places @ found.matrix.T + found.shift
    limits = torch.tensor([width, height]) / max(height, width) / 2
    inside = (there.abs() <= limits).all(1).view(height, width)
    return _sample(after[None], there)[0].view(-1, height, width), inside


@torch.no_grad()
def turned(before: Tensor, after: Tensor) -> str:
    """How the after picture is mirrored or turned against the before picture, in words; empty if it is not.

    Args:
        before, after: pictures ``[3, h, w]``; they may differ in size.
    """
    small = []
    for t in (before, after):
        grey = F.interpolate(luminance(t), size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
        small.append(detail(grey)[0, 0])
    ways = {
        "": small[1],
        "mirrored": small[1].flip(1),
        "upside down": small[1].flip(0),
        "turned by 180°": small[1].flip(0, 1),
        "turned by 90° clockwise": torch.rot90(small[1], 1),
        "turned by 90° anticlockwise": torch.rot90(small[1], -1),
    }
    scores = {way: _correlation(small[0], picture) for way, picture in ways.items()}
    way = max(scores, key=lambda words: scores[words])
    return way if scores[way] > 0.4 and scores[way] > 2 * max(scores[""], ROUGH) else ""


def luminance(picture: Tensor) -> Tensor:
    """``[3, h, w]`` → ``[1, 1, h, w]``, Rec. 709 weights on the values as they are."""
    red, green, blue = picture
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue)[None, None]


def _scaled(grey: Tensor, ratio: float) -> Tensor:
    if ratio >= 1:
        return grey
    size = [max(16, round(side * ratio)) for side in grey.shape[-2:]]
    return F.interpolate(grey, size=size, mode="bilinear", antialias=True, align_corners=False)


def detail(grey: Tensor) -> Tensor:
    """``[1, 1, h, w]`` → what stands out of its surroundings, in units of how much stands out there."""
    fine = blur(grey, 0.7, 1)
    high = fine - _mean(fine)
    return high / (_mean(high.square()) + FLOOR**2).sqrt()


def _mean(x: Tensor, radius: int = 7) -> Tensor:
    """Over a square around each pixel, by running sums: several times faster than a wide Gaussian."""
    for dim in (2, 3):
        padding = (0, 0, radius + 1, radius) if dim == 2 else (radius + 1, radius, 0, 0)
        sums = F.pad(x, padding, mode="replicate").double().cumsum(dim)
        length = x.shape[dim]
        x = ((sums.narrow(dim, 2 * radius + 1, length) - sums.narrow(dim, 0, length)) / (2 * radius + 1)).to(x.dtype)
    return x


def _grid(height: int, width: int) -> Tensor:
    """Centres of the pixels ``[h · w, 2]``, in long sides from the middle."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x.flatten() - width / 2, y.flatten() - height / 2], 1) / max(height, width)


def _sample(picture: Tensor, places: Tensor, mode: str = "bilinear") -> Tensor:
    """``[1, C, h, w]`` at ``[n, 2]`` → ``[1, C, n]``."""
    height, width = picture.shape[-2:]
    scaled = 2 * max(height, width) * places / torch.tensor([width, height])
    return F.grid_sample(picture, scaled.view(1, 1, -1, 2), mode, "border", align_corners=False)[:, :, 0]


def _inside(places: Tensor, height: int, width: int) -> Tensor:
    limits = torch.tensor([width, height]) / max(height, width) / 2 - 2 / max(height, width)
    return (places.abs() < limits).all(1)


def _descend(
    pyramid: list[tuple[Tensor, Tensor]], start: Tensor, widths: tuple[float, ...], ignore: Optional[Tensor]
) -> tuple[Tensor, float]:
    """(map 3 × 3, standard error in the corners), from coarse to fine; similarities first, affine maps where it is fine."""
    best, sd = start, math.inf
    for level, ((before, after), width) in enumerate(zip(pyramid, widths)):
        affine = level >= len(pyramid) - 2
        best, sd = _refine(before, after, best, width, affine, ignore)
    return best, sd


def _points(before: Tensor, ignore: Optional[Tensor]) -> Tensor:
    """Indices of places with detail, evenly spread; never at the border."""
    height, width = before.shape[-2:]
    strength = torch.gradient(before, dim=2)[0].square() + torch.gradient(before, dim=3)[0].square()
    strength[..., :2, :], strength[..., -2:, :], strength[..., :2], strength[..., -2:] = 0, 0, 0, 0
    if ignore is not None:
        strength = strength * (1 - F.interpolate(ignore[None, None], size=(height, width), mode="area")).square()
    places = (strength.flatten() > 0.01).nonzero()[:, 0]
    return places if len(places) <= POINTS else places[torch.linspace(0, len(places) - 1, POINTS).long()]


def _refine(
    before: Tensor, after: Tensor, start: Tensor, width: float, affine: bool, ignore: Optional[Tensor]
) -> tuple[Tensor, float]:
    """Gauss–Newton over one level. The template is the before picture, so its slopes are taken once."""
    rows, columns = before.shape[-2:]
    long = max(rows, columns)
    at = _points(before, ignore)
    if len(at) < 50:
        return start, math.inf
    q = _grid(rows, columns)[at]
    target = before.flatten()[at]
    slope_x, slope_y = (torch.gradient(before, dim=d)[0].flatten()[at] * long for d in (3, 2))
    x, y = q.unbind(1)
    if affine:
        jacobian = torch.stack([slope_x, slope_y, slope_x * x, slope_x * y, slope_y * x, slope_y * y], 1)
    else:
        jacobian = torch.stack([slope_x, slope_y, slope_x * x + slope_y * y, slope_y * x - slope_x * y], 1)
    best, sd = start, math.inf
    for _ in range(STEPS):
        there = q @ best[:2, :2].T + best[:2, 2]
        residual = _sample(after, there, "bicubic")[0, 0] - target
        weights = _inside(there, rows, columns) / (1 + residual.square() / width**2).square()
        weighted = jacobian * weights[:, None]
        gram = weighted.T @ jacobian
        gram = gram + 1e-6 * torch.diag(gram.diagonal()) + 1e-9 * torch.eye(len(gram))
        move = torch.linalg.solve(gram, weighted.T @ residual)
        move = move.clamp(-4 / long, 4 / long)  # pixels in the corners
        turn = move[2:].view(2, 2) if affine else torch.stack([move[2], -move[3], move[3], move[2]]).view(2, 2)
        update = torch.eye(3)
        update[:2, :2] += turn
        update[:2, 2] = move[:2]
        best = best @ torch.linalg.inv(update)  # inverse compositional
        if not bool(best.isfinite().all()) or not 0.5 < float(torch.linalg.det(best[:2, :2])) < 2.0:
            return start, math.inf
        if float(move.abs().max()) * long < 0.01:
            break
    # Neighbouring pixels share their detail: about one in nine is independent.
    noise = 9 * (weights * residual.square()).sum() / weights.sum().clamp_min(1e-6)
    covariance = torch.linalg.inv(gram) * noise
    sd = math.sqrt(max(float(covariance[:2, :2].trace() + 0.25 * covariance[2:, 2:].trace()), 0.0))
    return best, sd


def _agreement(before: Tensor, after: Tensor, transform: Tensor, ignore: Optional[Tensor]) -> tuple[float, float]:
    """(share of the blocks with detail that correlate, how far apart these lie) under a map; (0, 0) for too few."""
    rows, columns = before.shape[-2:]
    size = BLOCK if min(rows, columns) >= 8 * BLOCK else BLOCK // 2
    there = _grid(rows, columns) @ transform[:2, :2].T + transform[:2, 2]
    moved = _sample(after, there).view(1, 1, rows, columns)
    known = _inside(there, rows, columns).view(1, 1, rows, columns).float()
    if ignore is not None:
        known = known * (1 - F.interpolate(ignore[None, None], size=(rows, columns), mode="nearest"))

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x * known, size)

    share = F.avg_pool2d(known, size)
    energy = mean(before.square()), mean(moved.square())
    correlation = mean(before * moved) / (energy[0] * energy[1]).sqrt().clamp_min(1e-6)
    asked = (torch.maximum(*energy) > TEXTURED * share) & (share > 0.5)
    agree = asked & (correlation > AGREE)
    count = int(agree.sum())
    if count < LEAST_BLOCKS:
        return (0.0, 0.0) if not count else (count / max(int(asked.sum()), 1), 0.0)
    places = agree[0, 0].nonzero().float() / torch.tensor(agree.shape[-2:])
    return count / int(asked.sum()), float(places.std(0, correction=0).min())


def _search(before: Tensor, after: Tensor) -> Optional[Tensor]:
    """The start that a phase correlation gives, over a few scales; None if none stands out."""
    rows, columns = before.shape[-2:]
    window = torch.hann_window(rows, periodic=False)[:, None] * torch.hann_window(columns, periodic=False)
    spectrum = torch.fft.rfft2(before[0, 0] * window)
    places, best, peak = _grid(rows, columns), None, 0.0
    for scale in SCALES:
        scaled = _sample(after, places * scale)[0, 0].view(rows, columns)
        cross = torch.fft.rfft2(scaled * window) * spectrum.conj()
        surface = torch.fft.irfft2(cross / cross.abs().clamp_min(1e-6) ** 0.7, s=(rows, columns))
        height = float(surface.max() / surface.std().clamp_min(1e-9))
        if height > peak:
            peak = height
            dy, dx = divmod(int(surface.argmax()), columns)
            dy, dx = (d - n if d > n / 2 else d for d, n in ((dy, rows), (dx, columns)))
            best = torch.eye(3)
            best[:2, :2] *= scale
            best[:2, 2] = scale * torch.tensor([dx, dy]) / max(rows, columns)
    return best if peak > 5 else None


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt().clamp_min(1e-9))
