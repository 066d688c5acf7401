"""Progress of work: how it is reported, and how a terminal shows it."""

from __future__ import annotations

import sys
from typing import Any, Callable

Progress = Callable[[int, int], None]  # called with (done, total)


class ConsoleBar:
    """A tqdm bar behind the (done, total) that work of the core reports; the total may come with the first report.

    Args:
        what: is done, in front of the bar.
        options: of tqdm.
    """

    def __init__(self, what: str, **options: Any):
        from tqdm import tqdm

        if not sys.stderr.isatty():
            options = {"mininterval": 10.0, **options}  # not a line every tenth of a second in a log
        self._bar = tqdm(desc=what, **options)

    def __enter__(self) -> ConsoleBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
