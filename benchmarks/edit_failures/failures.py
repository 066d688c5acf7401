"""Controlled outcomes of an edit at graded severity, made from a scene's layers.

Whatever concerns the new object is done to its layer and laid over the empty room, so that the room behind stays exact.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from render import Scene, over
from scipy import ndimage, special

KINDS = ("good", "no edit", "overlay", "distorted", "collateral change")


@dataclass(frozen=True)
class Item:
    """One output of a scene.

    Attributes:
        kind: one of ``KINDS``.
        construction: how it was made.
        severity: what the number means is the construction's own; larger is worse.
        level: "slight", "moderate" or "severe"; "-" for good ones.
        held_out: no line or measure was fitted on this construction, on any part.
    """

    kind: str
    construction: str
    severity: float
    level: str
    held_out: bool
    picture: np.ndarray


HIDDEN = 0.1  # share of the old object that is seen past the new one
BEHIND = ("old behind new", "multiplied")
ELSEWHERE = ("displaced", "resized", "displaced, JPEG")

# construction → (kind, severities as slight / moderate / severe, held out)
TABLE = {
    "copy": ("no edit", {"moderate": (0,)}, False),
    "copy, JPEG": ("no edit", {"moderate": (60,), "severe": (85,)}, False),
    "copy, brighter and softer": ("no edit", {"moderate": (1,)}, False),
    "copy, old object retouched": ("no edit", {"moderate": (1,)}, True),
    "after shines through": ("no edit", {"slight": (0.15,), "moderate": (0.1,), "severe": (0.05,)}, False),
    "blend": ("overlay", {"slight": (0.1, 0.25), "moderate": (0.5,), "severe": (0.7,)}, False),
    "old behind new": ("overlay", {"slight": (0.1, 0.25), "moderate": (0.5,), "severe": (0.75, 1.0)}, False),
    "old over new": ("overlay", {"slight": (0.1, 0.25), "moderate": (0.5,), "severe": (0.75,)}, False),
    "edges of old": ("overlay", {"slight": (0.25,), "moderate": (0.6,), "severe": (1.0,)}, True),
    "multiplied": ("overlay", {"slight": (0.1, 0.25), "moderate": (0.5,), "severe": (0.75, 1.0)}, True),
    "warp": ("distorted", {"slight": (0.02, 0.04), "moderate": (0.07,), "severe": (0.1, 0.15)}, False),
    "stretch": ("distorted", {"slight": (1.1,), "moderate": (1.25,), "severe": (1.4, 1.6)}, False),
    "shear": ("distorted", {"slight": (0.1,), "moderate": (0.25,), "severe": (0.4,)}, True),
    "part missing": ("distorted", {"slight": (0.08,), "moderate": (0.2,), "severe": (0.4,)}, False),
    "upper half turned": ("distorted", {"moderate": (1,)}, True),
    "melted": ("distorted", {"slight": (0.02,), "moderate": (0.05,), "severe": (0.1,)}, False),
    "region recoloured": ("collateral change", {"slight": (0.08,), "moderate": (0.2,), "severe": (0.35,)}, False),
    "thing added": ("collateral change", {"slight": (0.06,), "moderate": (0.12,), "severe": (0.2,)}, False),
    "room repainted": ("collateral change", {"moderate": (0.15,), "severe": (0.3,)}, True),
    "picture moved": ("collateral change", {"slight": (0.01,), "moderate": (0.03,), "severe": (0.06,)}, False),
    "after": ("good", {"-": (0,)}, False),
    "JPEG": ("good", {"-": (90, 70, 50, 35)}, False),
    "soft and noisy": ("good", {"-": (1,)}, False),
    "round trip": ("good", {"-": (2,)}, True),
    "brightness": ("good", {"-": (-0.06, 0.06)}, False),
    "warmer": ("good", {"-": (0.05,)}, True),
    "contrast": ("good", {"-": (0.9, 1.1)}, False),
    "blur": ("good", {"-": (0.7, 1.2)}, False),
    "noise": ("good", {"-": (0.02,)}, False),
    "displaced": ("good", {"-": (0.03, 0.06, 0.12)}, False),
    "resized": ("good", {"-": (0.95, 1.05)}, False),
    "moved by a pixel": ("good", {"-": (1,)}, False),
    "copy, moved by a pixel": ("no edit", {"moderate": (1,)}, True),
    "copy, gamma": ("no edit", {"moderate": (1.06,)}, True),
    "screened": ("overlay", {"slight": (0.25,), "moderate": (0.5,), "severe": (0.75,)}, False),
    "old in patches": ("overlay", {"slight": (0.25,), "moderate": (0.5,), "severe": (0.75,)}, True),
    "bent": ("distorted", {"slight": (0.05,), "moderate": (0.12,), "severe": (0.2,)}, True),
    "feet cut off": ("distorted", {"slight": (0.1,), "moderate": (0.25,), "severe": (0.4,)}, True),
    "patch copied": ("collateral change", {"slight": (0.06,), "moderate": (0.12,), "severe": (0.2,)}, True),
    "WebP": ("good", {"-": (80, 40)}, True),
    "gamma": ("good", {"-": (0.92, 1.08)}, True),
    "displaced, JPEG": ("good", {"-": (0.08,)}, True),
    "copy, chroma halved": ("no edit", {"moderate": (1,)}, True),
    "old in grains": ("overlay", {"slight": (0.25,), "moderate": (0.5,), "severe": (0.75,)}, True),
    "soft ghost behind": ("overlay", {"slight": (0.25,), "moderate": (0.5,), "severe": (0.75,)}, True),
    "outline of old drawn": ("overlay", {"slight": (0.25,), "moderate": (0.5,), "severe": (1.0,)}, True),
    "twisted": ("distorted", {"slight": (0.3,), "moderate": (0.7,), "severe": (1.2,)}, True),
    "tapered": ("distorted", {"slight": (0.15,), "moderate": (0.35,), "severe": (0.6,)}, True),
    "one side darkened": ("collateral change", {"slight": (0.1,), "moderate": (0.2,), "severe": (0.35,)}, True),
    "sharpened": ("good", {"-": (0.5,)}, True),
    "chroma halved": ("good", {"-": (1,)}, True),
    "region tinted": ("collateral change", {"slight": (0.5,), "moderate": (1.0,), "severe": (1.6,)}, False),
    "palette": ("good", {"-": (128, 64, 32)}, False),
    "palette, dithered": ("good", {"-": (128, 64, 32)}, False),
    "palette, dithered, JPEG": ("good", {"-": (64,)}, False),
    "copy, palette": ("no edit", {"moderate": (64,)}, False),
    "ghost beside": ("overlay", {"slight": (0.25,), "moderate": (0.5,), "severe": (0.75,)}, False),
    "half wiped away": ("overlay", {"slight": (0.15,), "moderate": (0.4,), "severe": (0.7,)}, False),
    "waves": ("distorted", {"slight": (0.03,), "moderate": (0.07,), "severe": (0.12,)}, False),
    "in two pieces": ("distorted", {"slight": (0.06,), "moderate": (0.15,), "severe": (0.3,)}, False),
    "corner lit": ("collateral change", {"slight": (0.15,), "moderate": (0.3,), "severe": (0.5,)}, False),
    "region without colour": ("collateral change", {"moderate": (1,)}, False),
    "ordered dithering": ("good", {"-": (6,)}, False),
    "WebP, three quarters": ("good", {"-": (60,)}, False),
    "copy, enlarged again": ("no edit", {"moderate": (0.6,)}, False),
    "interlaced": ("overlay", {"slight": (0.2,), "moderate": (0.4,), "severe": (0.6,)}, False),
    "grey ghost": ("overlay", {"slight": (0.25,), "moderate": (0.5,), "severe": (0.75,)}, False),
    "pinched": ("distorted", {"slight": (0.2,), "moderate": (0.45,), "severe": (0.7,)}, False),
    "seen twice": ("distorted", {"slight": (0.05,), "moderate": (0.12,), "severe": (0.25,)}, False),
    "region out of focus": ("collateral change", {"slight": (0.01,), "moderate": (0.025,), "severe": (0.05,)}, False),
    "region mirrored": ("collateral change", {"moderate": (1,)}, False),
    "film grain": ("good", {"-": (0.03,)}, False),
    "JPEG twice": ("good", {"-": (75,)}, False),
    "five bits": ("good", {"-": (32,)}, False),
}


def items(scene: Scene, wanted: Callable[[str, str, int], bool] = lambda kind, level, number: True) -> Iterator[Item]:
    """Outcomes of a scene, each from a seed of its own: those whose kind, level and number are ``wanted``.

    Where the new object hides nearly all of the old one, what lies behind it cannot be seen and is left out. Where it reaches the
    picture's edge, there is nothing of it to move in from beyond, and a good output of one that stands elsewhere is left out.
    """
    old, new = scene.old[..., 3], scene.new[..., 3]
    hidden = (old * (1 - new)).sum() < HIDDEN * old.sum()
    cut_off = max(edge.max() for edge in (new[0], new[-1], new[:, 0], new[:, -1])) > 0.5
    number = -1
    for construction, (kind, levels, held_out) in TABLE.items():
        if (hidden and construction in BEHIND) or (cut_off and construction in ELSEWHERE):
            continue
        for level, severities in levels.items():
            for severity in severities:
                number += 1
                if not wanted(kind, level, number):
                    continue
                seed = [sum(scene.name.encode()), list(TABLE).index(construction), round(severity * 1000) % 10007]
                picture = _MAKE[construction](scene, severity, np.random.default_rng(seed)).clip(0, 1)
                yield Item(kind, construction, severity, level, held_out, picture.astype(np.float32))


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=int(quality))
    return np.asarray(Image.open(buffer).convert("RGB"), np.float32) / 255


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(picture, (sigma, sigma) + (0,) * (picture.ndim - 2), mode="nearest")


def size_of(layer: np.ndarray) -> float:
    """√(area) of an object in pixels."""
    return float(layer[..., 3].sum()) ** 0.5


def box_of(layer: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(layer[..., 3] > 0.5)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def moved(layer: np.ndarray, look_y: np.ndarray, look_x: np.ndarray) -> np.ndarray:
    """A layer looked up at other places; colours weighted by alpha."""
    channels = layer if layer.ndim == 3 else layer[..., None]
    if channels.shape[-1] == 4:
        channels = np.concatenate([channels[..., :3] * channels[..., 3:], channels[..., 3:]], -1)
    out = np.stack(
        [ndimage.map_coordinates(c, [look_y, look_x], order=1, mode="constant") for c in np.moveaxis(channels, -1, 0)],
        -1,
    )
    if layer.ndim == 2:
        return out[..., 0]
    return np.concatenate([out[..., :3] / np.maximum(out[..., 3:], 1e-6) * (out[..., 3:] > 0), out[..., 3:]], -1)


def grid(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    return np.mgrid[: scene.plate.shape[0], : scene.plate.shape[1]].astype(np.float32)


def with_new(scene: Scene, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The after picture with the object and its shadow changed by the same map."""
    return scene.compose(change(scene.new), change(scene.new_shadow))


def _affine(scene: Scene, matrix: np.ndarray, shift=(0.0, 0.0)) -> np.ndarray:
    """About the foot of the object."""
    top, left, bottom, right = box_of(scene.new)
    y, x = grid(scene)
    y, x = y - bottom - shift[0], x - (left + right) / 2 - shift[1]
    inverse = np.linalg.inv(matrix)
    look = inverse[0, 0] * y + inverse[0, 1] * x + bottom, inverse[1, 0] * y + inverse[1, 1] * x + (left + right) / 2
    return with_new(scene, lambda layer: moved(layer, *look))


def _warp(scene: Scene, share: float, rng) -> np.ndarray:
    """Smooth random displacements with this share of the object's size as their root mean square over the object."""
    size = size_of(scene.new)
    field = np.stack(
        [ndimage.gaussian_filter(rng.standard_normal(scene.plate.shape[:2]), 0.13 * size) for _ in range(2)]
    )
    inside = scene.new[..., 3] > 0.5
    field -= field[:, inside].mean(1)[:, None, None]
    field *= share * size / np.sqrt((field[:, inside] ** 2).sum(0).mean())
    y, x = grid(scene)
    return with_new(scene, lambda layer: moved(layer, y + field[0], x + field[1]))


def _missing(scene: Scene, share: float, rng) -> np.ndarray:
    """The lowest pixels on one side are cut off, as many as this share of the object; the shadow stays."""
    top, left, bottom, right = box_of(scene.new)
    y, x = grid(scene)
    side = rng.choice([-1, 1])
    order = (y - top) / (bottom - top) + side * (x - (left + right) / 2) / (right - left)
    alpha = scene.new[..., 3]
    inside = alpha > 0.5
    edge = np.quantile(order[inside], 1 - share)
    layer = scene.new.copy()
    layer[..., 3] *= order < edge
    return scene.compose(layer, scene.new_shadow)


def _turned(scene: Scene, _severity, _rng) -> np.ndarray:
    top, left, bottom, right = box_of(scene.new)
    middle = (top + bottom) // 2
    y, x = grid(scene)
    look_y = np.where(y < middle, top + middle - 1 - y, y)
    return with_new(scene, lambda layer: moved(layer, look_y, x) if layer.ndim == 3 else layer)


def _melted(scene: Scene, share: float, rng) -> np.ndarray:
    sigma = share * size_of(scene.new)
    layer = scene.new
    soft = blurred(np.concatenate([layer[..., :3] * layer[..., 3:], layer[..., 3:]], -1), sigma)
    layer = np.concatenate([soft[..., :3] / np.maximum(soft[..., 3:], 1e-6), soft[..., 3:]], -1)
    return scene.compose(layer, scene.new_shadow)


def _soft_mask(scene: Scene) -> np.ndarray:
    return blurred(scene.mask, 2.0)[..., None]


def _old_at(scene: Scene, share: float) -> tuple[np.ndarray, np.ndarray]:
    layer = scene.old.copy()
    layer[..., 3] *= share
    return layer, np.maximum(scene.new_shadow, share * scene.old_shadow)


def _behind(scene: Scene, share: float, _rng) -> np.ndarray:
    layer, shadow = _old_at(scene, share)
    return over(scene.compose(layer, shadow), scene.new)


def _before_new(scene: Scene, share: float, _rng) -> np.ndarray:
    layer, shadow = _old_at(scene, share)
    return over(scene.compose(scene.new, shadow), layer)


def _edges(scene: Scene, share: float, _rng) -> np.ndarray:
    fine = scene.before - blurred(scene.before, 4.0)
    room = scene.plate - blurred(scene.plate, 4.0)
    return scene.after + share * (fine - room) * _soft_mask(scene)


def _multiplied(scene: Scene, share: float, _rng) -> np.ndarray:
    ghost = scene.compose(scene.old, scene.old_shadow) / np.maximum(scene.plate, 0.08)
    return scene.after * (1 - share + share * ghost.clip(0, 1.6))


def _place_apart(scene: Scene, radius: float, rng) -> tuple[float, float]:
    """A middle for something of this radius outside the mask."""
    distance = ndimage.distance_transform_edt(np.pad(scene.mask < 0.5, 1))[1:-1, 1:-1]
    rows, columns = np.nonzero(distance >= min(radius + 12, distance.max()))
    chosen = rng.integers(len(rows))
    return rows[chosen], columns[chosen]


def _recoloured(scene: Scene, strength: float, rng) -> np.ndarray:
    side = min(scene.plate.shape[:2])
    cy, cx = _place_apart(scene, 0.1 * side, rng)
    y, x = grid(scene)
    blob = np.exp(-((((y - cy) ** 2 + (x - cx) ** 2) / (2 * (0.08 * side) ** 2)) ** 2))[..., None]
    blob = blob * (1 - _soft_mask(scene))
    tint = np.array([1.0, -0.6, -1.0]) * rng.choice([-1, 1])
    return scene.after + strength * blob * tint


def _added(scene: Scene, share: float, rng) -> np.ndarray:
    side = min(scene.plate.shape[:2])
    radius = share * side / 2
    cy, cx = _place_apart(scene, radius, rng)
    y, x = grid(scene)
    disc = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2).astype(np.float32)
    shade = 1 - 0.5 * ((y - cy) + (x - cx) + 2 * radius) / (4 * radius)
    thing = np.stack([shade * c for c in rng.uniform(0.2, 1.0, 3)] + [disc * (scene.mask < 0.5)], -1)
    return over(scene.after, thing.clip(0, 1))


def _repainted(scene: Scene, strength: float, rng) -> np.ndarray:
    """Another wall: the upper third gets a new pattern."""
    y, x = grid(scene)
    side = min(scene.plate.shape[:2])
    wall = special.expit((scene.plate.shape[0] / 3 - y) / 2)
    pattern = np.sin(2 * np.pi * (x + y) / (side / rng.integers(9, 16)))
    outside = 1 - _soft_mask(scene)
    return scene.after + strength * (wall * pattern)[..., None] * outside * rng.uniform(0.6, 1.0, 3)


def _picture_moved(scene: Scene, share: float, rng) -> np.ndarray:
    """Zoomed about the middle by twice this share, and shifted by this share of the side."""
    height, width = scene.plate.shape[:2]
    y, x = grid(scene)
    angle = rng.uniform(0, 2 * np.pi)
    look = [
        (c - n / 2) / (1 + 2 * share) + n / 2 + share * n * f
        for c, n, f in ((y, height, np.sin(angle)), (x, width, np.cos(angle)))
    ]
    return np.stack(
        [ndimage.map_coordinates(c, look, order=1, mode="nearest") for c in np.moveaxis(scene.after, -1, 0)], -1
    )


def _retouched(scene: Scene, _severity, rng) -> np.ndarray:
    """The old object a little lighter and with a slight texture: it is still the old object."""
    grain = blurred(rng.standard_normal(scene.plate.shape[:2]), 3.0)
    grain = 0.02 * grain / grain.std()
    return jpeg(scene.before + scene.old[..., 3:] * (0.02 + grain[..., None]), 85)


def _soft_noisy(scene: Scene, _severity, rng) -> np.ndarray:
    return blurred(scene.after, 0.8) + 0.01 * rng.standard_normal(scene.after.shape)


def _round_trip(picture: np.ndarray, factor: int) -> np.ndarray:
    """Halved and doubled again, which costs about the detail that a VAE does."""
    height, width = picture.shape[:2]
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    small = image.resize((width * 2 // (factor + 1), height * 2 // (factor + 1)), Image.Resampling.LANCZOS)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


def _resized(scene: Scene, factor: float, _rng) -> np.ndarray:
    return _affine(scene, np.eye(2) * factor)


def _displaced(scene: Scene, share: float, rng) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    length = share * size_of(scene.new)
    return _affine(scene, np.eye(2), (length * np.sin(angle), length * np.cos(angle)))


def _stretch(scene: Scene, factor: float, rng) -> np.ndarray:
    return _affine(scene, np.diag([factor, 1.0]) if rng.random() < 0.5 else np.diag([1.0, factor]))


def _shear(scene: Scene, amount: float, rng) -> np.ndarray:
    return _affine(scene, np.array([[1.0, 0.0], [amount * rng.choice([-1, 1]), 1.0]]))


def webp(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "WEBP", quality=int(quality))
    return np.asarray(Image.open(buffer).convert("RGB"), np.float32) / 255


def _screened(scene: Scene, share: float, _rng) -> np.ndarray:
    """Both exposures on one film: what the old object adds to the light of the room is added to the after picture."""
    light = scene.old[..., :3] * scene.old[..., 3:]
    return 1 - (1 - scene.after) * (1 - share * light)


def _patches(scene: Scene, share: float, rng) -> np.ndarray:
    """The old object was removed in some places only; ``share`` of it is still there, in front of the new one."""
    field = blurred(rng.standard_normal(scene.plate.shape[:2]), 0.08 * size_of(scene.old))
    layer = scene.old.copy()
    layer[..., 3] *= field > np.quantile(field[layer[..., 3] > 0.5], 1 - share)
    return over(scene.after, layer)


def _bent(scene: Scene, share: float, rng) -> np.ndarray:
    """Top and bottom to one side, the middle to the other, by this share of the object's size."""
    top, _, bottom, _ = box_of(scene.new)
    y, x = grid(scene)
    height = 2 * (y - top) / (bottom - top) - 1
    look_x = x + rng.choice([-1, 1]) * share * size_of(scene.new) * (height.clip(-1, 1) ** 2 - 0.5) * 2
    return with_new(scene, lambda layer: moved(layer, y, look_x))


def _footless(scene: Scene, share: float, _rng) -> np.ndarray:
    """The lowest share of the object's height is not there; the shadow is."""
    top, _, bottom, _ = box_of(scene.new)
    layer = scene.new.copy()
    layer[round(bottom - share * (bottom - top)) :, :, 3] = 0
    return scene.compose(layer, scene.new_shadow)


def _copied(scene: Scene, share: float, rng) -> np.ndarray:
    """A square of the room stands elsewhere once more: of 60 random ones, that which changes the picture most."""
    height, width = scene.plate.shape[:2]
    wide = round(share * min(height, width))
    clear = scene.mask < 0.5
    best, worst = scene.after, 0.0
    for y, x, v, u in rng.integers(0, [height - wide, width - wide] * 2, (60, 4)):
        there, source = (slice(y, y + wide), slice(x, x + wide)), (slice(v, v + wide), slice(u, u + wide))
        where = clear[there] & clear[source]
        new = np.where(where[..., None], scene.after[source], scene.after[there])
        change = float(np.abs(new - scene.after[there]).sum())
        if where.mean() > 0.9 and change > worst:
            best, worst = scene.after.copy(), change
            best[there] = new
    return best


def _chroma_halved(picture: np.ndarray) -> np.ndarray:
    """Colour at half the resolution, brightness as it is, as JPEG's 4:2:0 has it."""
    grey = picture @ np.array([0.299, 0.587, 0.114])
    return grey[..., None] + blurred(picture - grey[..., None], 1.0)


def in_squares(scene: Scene, share: float, rng, side: int) -> np.ndarray:
    """The old object in front of the new one, in this share of squares of so many pixels."""
    height, width = scene.plate.shape[:2]
    coarse = rng.random((height // side + 1, width // side + 1)) < share
    layer = scene.old.copy()
    layer[..., 3] *= np.kron(coarse, np.ones((side, side)))[:height, :width]
    return over(scene.after, layer)


def _grains(scene: Scene, share: float, rng) -> np.ndarray:
    return in_squares(scene, share, rng, 6)


def _soft_ghost(scene: Scene, share: float, _rng) -> np.ndarray:
    """The old object out of focus and translucent, behind the new one."""
    layer = np.concatenate([scene.old[..., :3] * scene.old[..., 3:], scene.old[..., 3:]], -1)
    layer = blurred(layer, 0.04 * size_of(scene.old))
    ghost = scene.plate * (1 - scene.new_shadow[..., None]) * (1 - share * layer[..., 3:]) + share * layer[..., :3]
    return over(ghost, scene.new)


def _outline(scene: Scene, share: float, _rng) -> np.ndarray:
    """The old object's outline as a dark line of about three pixels over everything."""
    alpha = blurred(scene.old[..., 3], 1.0)
    line = (4 * alpha * (1 - alpha)).clip(0, 1)[..., None]
    return scene.after * (1 - share * line)


def _twisted(scene: Scene, angle: float, rng) -> np.ndarray:
    """Turned about its middle, the less the farther out: by this many radians in the middle."""
    top, left, bottom, right = box_of(scene.new)
    y, x = grid(scene)
    y, x = y - (top + bottom) / 2, x - (left + right) / 2
    turn = rng.choice([-1, 1]) * angle * np.exp(-(y**2 + x**2) / (2 * (0.4 * size_of(scene.new)) ** 2))
    look_y = np.cos(turn) * y + np.sin(turn) * x + (top + bottom) / 2
    look_x = -np.sin(turn) * y + np.cos(turn) * x + (left + right) / 2
    return with_new(scene, lambda layer: moved(layer, look_y, look_x))


def _tapered(scene: Scene, share: float, rng) -> np.ndarray:
    """Narrower by this share at one end, wider by it at the other."""
    top, left, bottom, right = box_of(scene.new)
    y, x = grid(scene)
    height = (2 * (y - top) / (bottom - top) - 1).clip(-1, 1) * rng.choice([-1, 1])
    middle = (left + right) / 2
    return with_new(scene, lambda layer: moved(layer, y, (x - middle) / (1 + share * height) + middle))


def _darkened(scene: Scene, strength: float, rng) -> np.ndarray:
    """The light goes out on one side of the room, but not about the edit."""
    _, x = grid(scene)
    side = min(scene.plate.shape[:2])
    dark = special.expit(16 * rng.choice([-1, 1]) * (x / scene.plate.shape[1] - 0.5))
    away = special.expit((ndimage.distance_transform_edt(scene.mask < 0.5) - 0.08 * side) / (0.02 * side))
    return scene.after * (1 - strength * dark * away)[..., None]


def rectangle(scene: Scene, shares: tuple[float, float], rng) -> np.ndarray:
    """1 in the largest of 60 random rectangles less the mask; their sides are such shares of the picture's."""
    height, width = scene.plate.shape[:2]
    best = np.zeros((height, width))
    for _ in range(60):
        tall, wide = (rng.uniform(*shares, 2) * (height, width)).astype(int)
        top, left = rng.integers(0, height - tall), rng.integers(0, width - wide)
        region = np.zeros((height, width))
        region[top : top + tall, left : left + wide] = scene.mask[top : top + tall, left : left + wide] < 0.5
        if region.sum() > best.sum():
            best = region
    return best


def _tinted(scene: Scene, strength: float, rng) -> np.ndarray:
    """A rectangle of the room is in warmer or colder light: at strength 1 one end of the spectrum has 0.8, the other 1.15."""
    region = rectangle(scene, (0.2, 0.45), rng)
    tint = 1 + strength * np.array([-0.2, 0.0, 0.15])[:: rng.choice([-1, 1])]
    return scene.after * (1 + (tint - 1) * region[..., None])


def palette(picture: np.ndarray, colours: int, dithered: bool) -> np.ndarray:
    """As a GIF or a small PNG has it."""
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    small = image.quantize(int(colours))
    if dithered:
        small = image.quantize(palette=small, dither=Image.Dither.FLOYDSTEINBERG)
    return np.asarray(small.convert("RGB"), np.float32) / 255


def _beside(scene: Scene, share: float, rng) -> np.ndarray:
    """The old object translucent, and not quite where it stood."""
    by = 0.05 * size_of(scene.old)
    y, x = grid(scene)
    layer = moved(scene.old, y, x + rng.choice([-1, 1]) * by)
    layer[..., 3] *= share
    return over(scene.after, layer)


def _half_wiped(scene: Scene, share: float, rng) -> np.ndarray:
    """One side of the old object, as much of it as this share, is still there and in front of the new one."""
    _, x = grid(scene)
    x = x * rng.choice([-1, 1])
    layer = scene.old.copy()
    layer[..., 3] *= x < np.quantile(x[layer[..., 3] > 0.5], share)
    return over(scene.after, layer)


def _waves(scene: Scene, share: float, rng) -> np.ndarray:
    """Its rows swing to both sides, one and a half times over its height."""
    top, _, bottom, _ = box_of(scene.new)
    y, x = grid(scene)
    swing = np.sin(3 * np.pi * (y - top) / (bottom - top) + rng.uniform(0, np.pi)) * share * size_of(scene.new)
    return with_new(scene, lambda layer: moved(layer, y, x + swing))


def _in_two(scene: Scene, share: float, rng) -> np.ndarray:
    """The upper half stands to one side of the lower one."""
    top, _, bottom, _ = box_of(scene.new)
    y, x = grid(scene)
    aside = rng.choice([-1, 1]) * share * size_of(scene.new) * (y < (top + bottom) / 2)
    return with_new(scene, lambda layer: moved(layer, y, x + aside))


def _away(scene: Scene) -> np.ndarray:
    """0 about the edit, 1 farther off."""
    side = min(scene.plate.shape[:2])
    return (ndimage.distance_transform_edt(scene.mask < 0.5) / (0.06 * side) - 0.5).clip(0, 1)[..., None]


def _lit(scene: Scene, strength: float, rng) -> np.ndarray:
    """Light from one corner."""
    height, width = scene.plate.shape[:2]
    y, x = grid(scene)
    far = np.hypot(y / height - rng.integers(2), x / width - rng.integers(2))
    return scene.after + strength * ((1 - far / 0.7).clip(0, 1)[..., None] * _away(scene)) * (1 - scene.after)


def _greyed(scene: Scene, strength: float, _rng) -> np.ndarray:
    """The upper half has lost its colours."""
    grey = (scene.after @ np.array([0.299, 0.587, 0.114]))[..., None]
    y, _ = grid(scene)
    where = (y < scene.plate.shape[0] / 2)[..., None] * _away(scene) * strength
    return scene.after * (1 - where) + grey * where


def _ordered(picture: np.ndarray, levels: float) -> np.ndarray:
    """Bayer's 4 × 4 thresholds, so many levels per channel."""
    bayer = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16 + 1 / 32
    height, width = picture.shape[:2]
    threshold = np.tile(bayer, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    return np.floor(picture * (levels - 1) + threshold) / (levels - 1)


def _three_quarters(picture: np.ndarray, quality: float) -> np.ndarray:
    """Saved at three quarters of the size, and enlarged again."""
    height, width = picture.shape[:2]
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    small = np.asarray(image.resize((width * 3 // 4, height * 3 // 4), Image.Resampling.LANCZOS), np.float32) / 255
    large = Image.fromarray((webp(small, quality) * 255).round().astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.asarray(large, np.float32) / 255


def enlarged(picture: np.ndarray, factor: float, by: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """Saved smaller by this factor, and enlarged again."""
    height, width = picture.shape[:2]
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    small = image.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
    return np.asarray(small.resize((width, height), by), np.float32) / 255


def _interlaced(scene: Scene, share: float, rng) -> np.ndarray:
    """The old object in front of the new one, in this share of bands of rows."""
    y, _ = grid(scene)
    band = max(4, round(0.04 * size_of(scene.old)))
    layer = scene.old.copy()
    layer[..., 3] *= (y + rng.integers(band)) % band < share * band
    return over(scene.after, layer)


def _grey_ghost(scene: Scene, share: float, _rng) -> np.ndarray:
    """The old object without its colours, translucent, in front of the new one."""
    layer = scene.old.copy()
    layer[..., :3] = (layer[..., :3] @ np.array([0.299, 0.587, 0.114]))[..., None]
    layer[..., 3] *= share
    return over(scene.after, layer)


def _pinched(scene: Scene, strength: float, rng) -> np.ndarray:
    """Drawn together towards its middle, or driven apart from it, the less the farther out."""
    top, left, bottom, right = box_of(scene.new)
    y, x = grid(scene)
    y, x = y - (top + bottom) / 2, x - (left + right) / 2
    near = np.exp(-(y**2 + x**2) / (2 * (0.35 * size_of(scene.new)) ** 2))
    factor = 1 + rng.choice([-0.7, 1.0]) * strength * near
    return with_new(scene, lambda layer: moved(layer, y * factor + (top + bottom) / 2, x * factor + (left + right) / 2))


def _twice(scene: Scene, share: float, rng) -> np.ndarray:
    """Two exposures of the new object, this share of its size apart."""
    y, x = grid(scene)
    aside = rng.choice([-1, 1]) * share * size_of(scene.new)
    return 0.5 * (scene.after + with_new(scene, lambda layer: moved(layer, y, x + aside)))


def _out_of_focus(scene: Scene, share: float, rng) -> np.ndarray:
    region = rectangle(scene, (0.25, 0.5), rng)[..., None]
    soft = blurred(scene.after, share * min(scene.plate.shape[:2]))
    return scene.after * (1 - region) + soft * region


def _mirrored(scene: Scene, _severity, rng) -> np.ndarray:
    """A rectangle of the room with left and right exchanged."""
    region = rectangle(scene, (0.25, 0.5), rng)
    columns = np.nonzero(region.any(0))[0]
    there = slice(columns.min(), columns.max() + 1)
    other = scene.after.copy()
    other[:, there] = scene.plate[:, there][:, ::-1]
    return np.where(region[..., None] > 0.5, other, scene.after)


def _grainy(scene: Scene, strength: float, rng) -> np.ndarray:
    """The grain of a film: of about two pixels, alike in all colours, most in the middle tones."""
    grain = blurred(rng.standard_normal(scene.plate.shape[:2]), 0.7)
    middle = 4 * scene.after * (1 - scene.after)
    return scene.after + strength * (grain / grain.std())[..., None] * (0.3 + 0.7 * middle)


_MAKE: dict[str, Callable] = {
    "copy": lambda s, v, r: s.before,
    "copy, JPEG": lambda s, v, r: jpeg(s.before, v),
    "copy, brighter and softer": lambda s, v, r: blurred(s.before * 1.04, 0.8),
    "copy, old object retouched": _retouched,
    "after shines through": lambda s, v, r: jpeg((1 - v) * s.before + v * s.after, 90),
    "blend": lambda s, v, r: v * s.before + (1 - v) * s.after,
    "old behind new": _behind,
    "old over new": _before_new,
    "edges of old": _edges,
    "multiplied": _multiplied,
    "warp": _warp,
    "stretch": _stretch,
    "shear": _shear,
    "part missing": _missing,
    "upper half turned": _turned,
    "melted": _melted,
    "region recoloured": _recoloured,
    "thing added": _added,
    "room repainted": _repainted,
    "picture moved": _picture_moved,
    "after": lambda s, v, r: s.after,
    "JPEG": lambda s, v, r: jpeg(s.after, v),
    "soft and noisy": _soft_noisy,
    "round trip": lambda s, v, r: _round_trip(s.after, v),
    "brightness": lambda s, v, r: s.after + v,
    "warmer": lambda s, v, r: s.after * (1 + v * np.array([1.0, 0.0, -1.0])),
    "contrast": lambda s, v, r: (s.after - 0.5) * v + 0.5,
    "blur": lambda s, v, r: blurred(s.after, v),
    "noise": lambda s, v, r: s.after + v * r.standard_normal(s.after.shape),
    "displaced": _displaced,
    "resized": _resized,
    "moved by a pixel": lambda s, v, r: np.roll(s.after, (1, 1), (0, 1)),
    "copy, moved by a pixel": lambda s, v, r: np.roll(s.before, (-1, 1), (0, 1)),
    "copy, gamma": lambda s, v, r: s.before**v,
    "screened": _screened,
    "old in patches": _patches,
    "bent": _bent,
    "feet cut off": _footless,
    "patch copied": _copied,
    "WebP": lambda s, v, r: webp(s.after, v),
    "gamma": lambda s, v, r: s.after**v,
    "displaced, JPEG": lambda s, v, r: jpeg(_displaced(s, v, r), 70),
    "copy, chroma halved": lambda s, v, r: _chroma_halved(s.before),
    "old in grains": _grains,
    "soft ghost behind": _soft_ghost,
    "outline of old drawn": _outline,
    "twisted": _twisted,
    "tapered": _tapered,
    "one side darkened": _darkened,
    "sharpened": lambda s, v, r: s.after + v * (s.after - blurred(s.after, 1.0)),
    "chroma halved": lambda s, v, r: _chroma_halved(s.after),
    "region tinted": _tinted,
    "palette": lambda s, v, r: palette(s.after, v, False),
    "palette, dithered": lambda s, v, r: palette(s.after, v, True),
    "palette, dithered, JPEG": lambda s, v, r: jpeg(palette(s.after, v, True), 85),
    "copy, palette": lambda s, v, r: palette(s.before, v, True),
    "ghost beside": _beside,
    "half wiped away": _half_wiped,
    "waves": _waves,
    "in two pieces": _in_two,
    "corner lit": _lit,
    "region without colour": _greyed,
    "ordered dithering": lambda s, v, r: _ordered(s.after, v),
    "WebP, three quarters": lambda s, v, r: _three_quarters(s.after, v),
    "copy, enlarged again": lambda s, v, r: enlarged(s.before, v),
    "interlaced": _interlaced,
    "grey ghost": _grey_ghost,
    "pinched": _pinched,
    "seen twice": _twice,
    "region out of focus": _out_of_focus,
    "region mirrored": _mirrored,
    "film grain": _grainy,
    "JPEG twice": lambda s, v, r: jpeg(np.roll(jpeg(np.roll(s.after, 3, 1), v), -3, 1), v),
    "five bits": lambda s, v, r: np.floor(s.after * (v - 1) + 0.5) / (v - 1),
}
assert _MAKE.keys() == TABLE.keys()
