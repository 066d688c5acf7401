"""What the benchmarks of the training step share: peak memory, ratios between runs that take turns, facts about the machine."""

from __future__ import annotations

import platform
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Iterator, Sequence

import torch

MIB = 1 << 20


@dataclass
class Peak:
    """Bytes above those at the start; ``end`` is what was still held then."""

    most: int = 0
    end: int = 0


@contextmanager
def memory(device: torch.device) -> Iterator[Peak]:
    """What a block allocates through torch at its fullest: every allocation counted on a CPU, the allocator's own on CUDA."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        torch.cuda.synchronize()
        peak.most, peak.end = torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated() - start
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak.most = max(peak.most, held)
    peak.end = held


@dataclass
class Clock:
    """Seconds of wall and of processor time, one entry per step; the device is waited for at both ends."""

    device: torch.device
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    _began: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        wall, cpu = self._now()
        self.wall.append(wall - self._began[0])
        self.cpu.append(cpu - self._began[1])

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of neighbours: what slows the machine down for a while slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def machine(device: torch.device) -> str:
    """Facts for a result's head line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, Python {platform.python_version()}"
