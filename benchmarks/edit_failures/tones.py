"""Edits of the whole picture, made from a room: light, colours and tone change, and no object does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from failures import Item, blurred, jpeg, webp
from render import Scene

GREY = np.array([0.299, 0.587, 0.114])

# what the picture becomes
EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "evening": lambda p: p**1.6 * np.array([1.0, 0.78, 0.6]),
    "grey": lambda p: np.repeat((p @ GREY)[..., None], 3, 2),
    "blue hour": lambda p: p * np.array([0.5, 0.65, 1.0]),
    "faded": lambda p: 0.35 + 0.6 * p,
}

# construction → (kind, what it makes of before and after)
TABLE: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "copy": ("no edit", lambda s, g: s),
    "copy, JPEG": ("no edit", lambda s, g: jpeg(s, 60)),
    "a tenth": ("no edit", lambda s, g: 0.9 * s + 0.1 * g),
    "after": ("good", lambda s, g: g),
    "JPEG": ("good", lambda s, g: jpeg(g, 50)),
    "WebP": ("good", lambda s, g: webp(g, 60)),
    "blur": ("good", lambda s, g: blurred(g, 0.7)),
    "half": ("undecided", lambda s, g: 0.5 * (s + g)),
}


def items(scene: Scene) -> Iterator[tuple[np.ndarray, Item]]:
    """(after picture, output) of every edit."""
    before = scene.before
    for edit, change in EDITS.items():
        after = change(before).clip(0, 1).astype(np.float32)
        for construction, (kind, make) in TABLE.items():
            picture = make(before, after).clip(0, 1).astype(np.float32)
            yield after, Item(kind, f"{edit}: {construction}", 0.0, "-", True, picture)
