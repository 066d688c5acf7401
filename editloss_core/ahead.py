"""What comes next is read while the present is worked on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

# Pillow lets go of Python's lock while it decodes and resizes. One core is left to the caller: on two of them one reader was
# faster than two, beside an encoder on the CPU (benchmarks/caching.py).
WORKERS = max(1, min(4, (os.cpu_count() or 1) - 1))


@contextmanager
def ahead(read: Callable[[K], V], keys: Iterable[K], workers: int = WORKERS) -> Iterator[Iterator[V]]:
    """``read(key)`` for each key in order, up to ``workers`` of them ahead of the caller and in threads of their own.

    An exception of ``read`` comes where its result would have come. Leaving the block, in whatever way, starts no more
    reads and waits for those that run: nothing is left behind.

    >>> with ahead(str.upper, ["a", "b", "c"]) as read:
    ...     list(read)
    ['A', 'B', 'C']
    """
    left, waiting = iter(keys), deque[Future[V]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="editloss-ahead")

    def results() -> Iterator[V]:
        waiting.extend(pool.submit(read, key) for key in islice(left, workers))
        while waiting:
            value = waiting.popleft().result()
            waiting.extend(pool.submit(read, key) for key in islice(left, 1))
            yield value

    try:
        yield results()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
