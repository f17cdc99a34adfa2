"""The measuring process: takes requests as JSON lines on standard input, answers on standard output.

``open`` makes a contender, ``prepare`` a task and warms it up, ``turn`` times it, ``check`` asks for other figures,
``close`` ends. What a contender itself prints goes to standard error. An error ends the process, and
the harness reports it; other contenders go on.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

from benchmarks import memory
from benchmarks.contender import Contender, Task, Unavailable, build


class Worker:
    """One contender and its present task."""

    def __init__(self) -> None:
        self.contender: Contender | None = None
        self.task: Task | None = None
        self.before = 0
        self.highest = 0
        self.separate = False  # whether the peak is that of the present task alone
        self.last = 0.0

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make the contender."""
        self.contender = build(request["factory"], request["options"])
        return {"resident": memory.resident()}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make the task; run it once unless it says not to. ``first`` is the time of that run.

        A job may name a tiny form of itself, which is done before: code loaded or compiled at the first call is
        then not counted as memory that the work takes.
        """
        if self.contender is None:
            raise ValueError("prepare: expected a contender to be open")
        job = request["job"]
        self.task = None
        if "tiny" in job:
            self.contender.prepare({**job, **job["tiny"]}).run()
        memory.release()
        self.task = self.contender.prepare(job)
        self.highest = max(self.highest, memory.peak())
        self.before = memory.resident()
        self.separate = memory.reset_peak()
        self.last = self._run() if self.task.warm_up else 0.0
        return {"first": self.last}

    def turn(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time the task for some seconds, at least once. Times are in seconds per part.

        A short task is run once untimed first: other processes have had the caches since.
        """
        if self.task is None:
            raise ValueError("turn: expected a task to be prepared")
        seconds, most = request["seconds"], request["most"]
        gc.collect()
        if self.task.warm_up and self.last < seconds:
            self._run()
        samples = []
        end = time.perf_counter() + seconds
        while not samples or (time.perf_counter() < end and len(samples) < most):
            self.last = self._run()
            samples.append(self.last / self.task.parts)
        return {"samples": samples}

    def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """Memory of the task, and its own figures.

        ``working`` is what its runs took on top of what was there before the first of them: inputs and weights.
        """
        if self.task is None:
            raise ValueError("check: expected a task to be prepared")
        top = memory.peak()
        self.highest = max(self.highest, top)
        figures = {"peak": self.highest, "resident": memory.resident(), "working": max(0, top - self.before)}
        return {"figures": figures | self.task.check(), "separate": self.separate}

    def _run(self) -> float:
        assert self.task is not None
        start = time.perf_counter()
        own = self.task.run()
        return time.perf_counter() - start if own is None else own


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything prints from here on
    worker = Worker()
    actions = {"open": worker.open, "prepare": worker.prepare, "turn": worker.turn, "check": worker.check}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "close":
            break
        try:
            answer = actions[request["do"]](request)
        except Unavailable as reason:
            answer = {"unavailable": str(reason)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
