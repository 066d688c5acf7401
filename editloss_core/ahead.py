"""What comes next is read, and what is done is put away, while the present is worked on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

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


@contextmanager
def behind(do: Callable[..., Any], waiting: int = 4) -> Iterator[Callable[..., None]]:
    """``do(*args)`` for each call of what this gives, in their order and in a thread of its own, up to ``waiting`` of them
    behind the caller.

    An exception of ``do`` comes from a later call or at the end of the block. Leaving the block, in whatever way, waits for
    everything that was given: nothing is lost, and nothing left behind.

    >>> kept = []
    >>> with behind(kept.append) as keep:
    ...     keep("a"), keep("b")
    (None, None)
    >>> kept
    ['a', 'b']
    """
    given = deque[Future[Any]]()
    pool = ThreadPoolExecutor(1, thread_name_prefix="editloss-behind")

    def give(*args: Any) -> None:
        while given and (given[0].done() or len(given) >= waiting):
            given.popleft().result()
        given.append(pool.submit(do, *args))

    try:
        yield give
        while given:
            given.popleft().result()
    finally:
        pool.shutdown(wait=True)
