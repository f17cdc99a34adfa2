"""Time and memory on a GPU: CUDA events, with the caches emptied before each run; a clock where there is no GPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSHED = 1 << 28
"""Bytes that are written before a timed run, so that nothing of its inputs is left in the second-level cache."""

AHEAD = 2_000_000
"""Cycles, about a millisecond, that the GPU waits before a timed run, in which the host can launch its kernels."""


class Clock:
    """Times runs on a device.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a dry run.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device == "cuda"
        self._flush = torch.empty(FLUSHED if self.cuda else 1, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        """Until everything that was launched is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def samples(self, run: Callable[[], Any], seconds: float, most: int) -> list[float]:
        """Times in seconds of single runs, at least one, until `seconds` have passed or there are `most`."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or (time.perf_counter() < end and len(found) < most):
            found.append(self._events(run) if self.cuda else self._once(run))
        return found

    def _once(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _events(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(AHEAD)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def allocated(self) -> float:
        """Bytes of device memory that tensors occupy now; 0 without a GPU."""
        return float(torch.cuda.memory_allocated()) if self.cuda else 0.0

    def peak(self, run: Callable[[], Any]) -> float:
        """The most bytes that tensors occupied during a run; 0 without a GPU."""
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return float(torch.cuda.max_memory_allocated()) if self.cuda else 0.0


def describe() -> dict[str, Any]:
    """The GPU, its clocks and power limit now, and the versions that go with it."""
    if not torch.cuda.is_available():
        return {"gpu": "none: a dry run on the CPU"}
    properties = torch.cuda.get_device_properties(0)
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,driver_version"
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **dict(zip(fields.split(","), _smi(fields), strict=False)),
    }


def _smi(fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU; nothing where there is no such program."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [word.strip() for word in done.stdout.strip().split(",")] if not done.returncode else []
