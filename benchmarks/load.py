"""Other programs that keep the machine busy while a benchmark measures: ``--load N`` of each that has the switch."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from typing import Iterator

# Arithmetic without an end, on numbers that stay in the cache, until the benchmark's end of the pipe is closed.
PROGRAM = """
import sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), __import__("os")._exit(0)), daemon=True).start()
x = 1
while True:
    x = (x * 48271) % 2147483647
"""


def add_switch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load",
        type=int,
        default=0,
        metavar="N",
        help="other programs at full load meanwhile, a thread each (default: 0)",
    )


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, so many programs of one thread compute without an end."""
    programs = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()


def told(count: int) -> str:
    """For a table's heading: what else ran, by the switch and by the system's own account."""
    others = f"{count} other program{'s' if count > 1 else ''} at full load" if count else "no other program started"
    return f"{others}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end"
