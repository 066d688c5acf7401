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
STAGE = "stage: "


@dataclass
class Peak:
    """Bytes above those at the start: at the fullest, and at the fullest of each stage that :meth:`enter` began."""

    device: torch.device
    most: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    _stage: str = ""

    def enter(self, stage: str) -> None:
        if self.device.type == "cuda":
            self._close()
        else:
            with torch.profiler.record_function(STAGE + stage):
                pass
        self._stage = stage

    def _close(self) -> None:
        torch.cuda.synchronize()
        self._count(self._stage, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def _count(self, stage: str, held: int) -> None:
        self.most = max(self.most, held)
        self.stages[stage] = max(self.stages.get(stage, 0), held)


@contextmanager
def memory(device: torch.device) -> Iterator[Peak]:
    """What a block allocates through torch at its fullest: every allocation counted on a CPU, the allocator's own on CUDA."""
    peak = Peak(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak._close()
        peak.most -= start
        peak.stages = {stage: held - start for stage, held in peak.stages.items()}
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    held, stage = 0, ""
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak._count(stage, held)
        elif event.name().startswith(STAGE):
            stage = event.name()[len(STAGE) :]
            peak._count(stage, held)


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
