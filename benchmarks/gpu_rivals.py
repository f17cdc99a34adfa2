"""Rivals at one piece of work, in one process: they share inputs, take turns, and a failure costs no other.

A rival makes its run, which is warmed up, measured for memory and checked; then all that can take turns.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.contender import Job, Unavailable
from benchmarks.gpu_timing import Clock
from benchmarks.harness import Case, Entry, summary

FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError, OSError,
    ArithmeticError,
)  # fmt: skip
"""What packages raise when they cannot do something: running out of GPU memory is a RuntimeError."""


@dataclass(frozen=True)
class Rival:
    """An implementation at one piece of work.

    Args:
        label: its name in the results; those of mambax start with ``mambax``.
        make: returns the run, which does the work once; raises :class:`Unavailable` where it cannot.
        check: from what the run returned, figures to show beside the time, such as errors.
        parts: how many equal parts a run has; times are given per part.
        gradients: False runs it without recording for gradients.
    """

    label: str
    make: Callable[[], Callable[[], Any]]
    check: Callable[[Any], dict[str, float]] = field(default=lambda result: {})
    parts: int = 1
    gradients: bool = False


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Args:
        rounds: turns of each rival.
        turn_s: seconds of a turn.
        most: runs of a turn, at most.
        part_s: seconds after which a part measures nothing more.
    """

    rounds: int = 3
    turn_s: float = 0.15
    most: int = 20
    part_s: float = 240.0


class Arena:
    """Where rivals meet, within the time of one part."""

    def __init__(self, clock: Clock, pace: Pace, tell: Callable[[str], None] = lambda text: None) -> None:
        self.clock = clock
        self.pace = pace
        self.tell = tell
        self._end = time.perf_counter() + pace.part_s

    def left(self) -> float:
        """Seconds that are left for this part, one at least."""
        return max(1.0, self._end - time.perf_counter())

    def compare(self, name: str, job: Job, rivals: Sequence[Rival], *, alone: bool = False) -> Case:
        """Let rivals do one piece of work. One that cannot has its reason in the case.

        With ``alone`` each is gone before the next is made: for models that do not fit into memory side by side.
        """
        groups = [[rival] for rival in rivals] if alone else [rivals]
        entries = [entry for group in groups for entry in self._together(name, job, group)]
        return Case(name, dict(job), entries)

    def _together(self, name: str, job: Job, rivals: Sequence[Rival]) -> list[Entry]:
        entries = [Entry(rival.label) for rival in rivals]
        runs: list[Callable[[], Any] | None] = []
        for rival, entry in zip(rivals, entries, strict=True):
            self.tell(f"{name} {' '.join(f'{v}' for v in job.values())}: {rival.label}")
            runs.append(self._ready(rival, entry))
        samples: list[list[float]] = [[] for _ in rivals]
        for _ in range(self.pace.rounds):
            for rival, entry, run, found in zip(rivals, entries, runs, samples, strict=True):
                if run is not None and entry.status == "ok":
                    found += self._turn(rival, entry, run)
        for rival, entry, found in zip(rivals, entries, samples, strict=True):
            if entry.status == "ok":
                entry.seconds = summary([time / rival.parts for time in found])
        runs.clear()
        self._release()
        return entries

    def _ready(self, rival: Rival, entry: Entry) -> Callable[[], Any] | None:
        if time.perf_counter() > self._end:
            entry.status, entry.reason = "skipped", f"the {self.pace.part_s:.0f} s of this part were over"
            return None
        result = None
        self._release()  # or what others left would be taken for this rival's
        before = self.clock.allocated()
        try:
            with torch.set_grad_enabled(rival.gradients):
                run = rival.make()
                run()  # whatever compiles or tunes itself does it here
                held = self._held()
                top = self.clock.peak(run)
                result = run()
                self.clock.wait()
            beyond = max(0.0, top - before)  # scratch memory of cuBLAS, if nothing else, may have been given back
            entry.figures = {"peak": beyond, "working": top - held, **rival.check(result)}
        except Unavailable as reason:
            entry.status, entry.reason = "skipped", str(reason)
            return None
        except FAILURES as error:
            self._fail(entry, error)
            return None
        finally:
            del result
            self._release()
        return run

    def _turn(self, rival: Rival, entry: Entry, run: Callable[[], Any]) -> list[float]:
        try:
            with torch.set_grad_enabled(rival.gradients):
                return self.clock.samples(run, self.pace.turn_s, self.pace.most)
        except FAILURES as error:
            self._fail(entry, error)
            return []

    def _fail(self, entry: Entry, error: BaseException) -> None:
        text = " ".join(str(error).split())
        entry.status, entry.reason = "failed", f"{type(error).__name__}: {text[:300]}"

    def _held(self) -> float:
        """Bytes that are in use between runs: the least of some looks, as PyTorch's thread for gradients lets go of
        what it worked on a little later."""
        looks = []
        for _ in range(3 if self.clock.cuda else 1):
            self._release()
            looks.append(self.clock.allocated())
            time.sleep(0.002 if self.clock.cuda else 0.0)
        return min(looks)

    def _release(self) -> None:
        if self.clock.cuda:
            gc.collect()
            torch.cuda.empty_cache()
