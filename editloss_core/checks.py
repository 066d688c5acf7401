"""Checks of single values that settings and arguments share: a wrong one is refused by its name, before any work."""

from __future__ import annotations

import math
from typing import Any, Collection, Optional


def is_number(value: object) -> bool:
    """Whether it is a finite int or float; True and False are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether it is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False, also: str = ""
) -> None:
    """ValueError unless ``low`` ≤ value ≤ ``high``.

    Args:
        name: of the setting, as the message begins with it.
        open_low: ``low`` itself is refused.
        also: what else would do, in front of "a number".
    """
    if not is_number(value) or value < low or value > high or (open_low and value == low):
        bounds = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
        raise ValueError(f"{name}: expected {also}a number {bounds}, got {value!r}")


def check_whole(name: str, value: Any, low: Optional[int] = None, unit: str = "") -> None:
    """ValueError unless it is a whole number, and at least ``low``; ``unit``: of it, for the message."""
    if not is_whole(value) or (low is not None and value < low):
        bound = "" if low is None else f" >= {low}"
        raise ValueError(f"{name}: expected a whole number{bound}{unit and f' {unit}'}, got {value!r}")


def check_option(name: str, value: Any, options: Collection[str]) -> None:
    """ValueError unless it is one of ``options``."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
