"""The harness: contenders take turns in one run, so that whatever the machine does befalls all of them.

Each contender is a process of its own and stays alive, idle, while others have their turn. A round gives each one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import psutil

from benchmarks.contender import Job, Spec
from benchmarks.processes import Failed, Process, Skipped

Progress = Callable[[str], None]
"""Told what happens now, in a few words."""


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        threads: threads of each contender.
        rounds: turns of each contender, at most.
        least: turns of each contender, at least.
        turn_s: seconds of one turn; a run that has started is finished.
        contender_s: seconds after which a contender gets no more turns, once it has had the least.
        call_s: a contender whose next run is expected to take longer, going by the size before, does not do it.
        timeout_s: seconds after which an answer is no longer waited for.
        pause_s: seconds of rest between turns, in which threads of the last contender stop spinning.
    """

    threads: int
    rounds: int = 5
    least: int = 2
    turn_s: float = 0.4
    contender_s: float = 12.0
    call_s: float = 12.0
    timeout_s: float = 180.0
    pause_s: float = 0.1


@dataclass
class Entry:
    """One contender's result in a case.

    Attributes:
        status: ``"ok"``, ``"skipped"`` (it could not or should not run; the reason says why) or ``"failed"``.
        seconds: min, q1, median, q3, max and count of the times of one part of the job.
        figures: bytes of memory (``peak`` of the process, ``working`` during the runs), errors and the like.
    """

    label: str
    status: str = "ok"
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Median time in seconds, if it was measured."""
        return self.seconds.get("median") if self.status == "ok" else None


@dataclass
class Case:
    """A job, and what every contender made of it."""

    name: str
    job: dict[str, Any]
    entries: list[Entry]

    def entry(self, label: str) -> Entry | None:
        """The result of the contender of this name that was measured."""
        return next((e for e in self.entries if e.label == label and e.status == "ok"), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; :func:`case_from_dict` is the way back."""
        return asdict(self)


def case_from_dict(values: dict[str, Any]) -> Case:
    """The case that :meth:`Case.to_dict` wrote."""
    return Case(values["name"], values["job"], [Entry(**entry) for entry in values["entries"]])


def summary(samples: Sequence[float]) -> dict[str, float]:
    """min, q1, median, q3, max and count of some times."""
    low, q1, median, q3, high = np.percentile(np.asarray(samples, np.float64), (0, 25, 50, 75, 100)).tolist()
    return {"min": low, "q1": q1, "median": median, "q3": q3, "max": high, "count": len(samples)}


class _Runner:
    """A contender over the jobs of a group."""

    def __init__(self, spec: Spec, settings: Settings) -> None:
        self.spec = spec
        self.settings = settings
        self.process: Process | None = None
        self.lost = Entry(spec.label)  # why it is gone, once it is
        self.seen: dict[str, tuple[float, float, float]] = {}  # kind -> size, seconds of a run, working bytes
        self.entry = Entry(spec.label)
        self.samples: list[float] = []
        self.first = 0.0
        self.longest = 0.0  # seconds of a run among others of its turn
        self.spent = 0.0

    def ask(self, do: str, **values: Any) -> dict[str, Any] | None:
        """An answer, or None when the contender cannot go on with this job, with the reason in the entry."""
        if self.process is None:
            return None
        try:
            return self.process.ask(do, self.settings.timeout_s, **values)
        except Skipped as reason:
            self.entry.status, self.entry.reason = "skipped", str(reason)
        except Failed as reason:
            self.entry.status, self.entry.reason = "failed", str(reason)
            self.end()
        return None

    def open(self) -> None:
        self.process = Process(self.spec, self.settings.threads)
        if self.ask("open", factory=self.spec.factory, options=dict(self.spec.options)) is None:
            self.end()

    def end(self) -> None:
        if self.process is not None:
            self.process.end()
            self.process = None
            self.lost = self.entry

    def prepare(self, job: Job) -> None:
        self.samples, self.spent, self.longest = [], 0.0, 0.0
        if self.process is None:
            self.entry = Entry(self.spec.label, self.lost.status, self.lost.reason)
            return
        self.entry = Entry(self.spec.label)
        reason = self._too_large(job)
        if reason:
            self.entry.status, self.entry.reason = "skipped", reason
            return
        start = time.perf_counter()
        answer = self.ask("prepare", job=dict(job))
        self.spent = time.perf_counter() - start
        self.first = answer["first"] if answer else 0.0

    def turn(self, number: int) -> bool:
        """Measure once more; False when this contender has had enough."""
        s = self.settings
        if self.entry.status != "ok" or self.process is None:
            return False
        if number >= s.least and self.spent > s.contender_s:
            return False
        start = time.perf_counter()
        answer = self.ask("turn", seconds=s.turn_s, most=200)
        took = time.perf_counter() - start
        self.spent += took
        if answer is not None:
            self.samples += answer["samples"]
            self.longest = max(self.longest, took / len(answer["samples"]))
        return answer is not None

    def finish(self, job: Job) -> Entry:
        """The entry of this job, with the memory and the figures of its own."""
        answer = self.ask("check") if self.entry.status == "ok" else None
        if answer is not None:
            self.entry.seconds = summary(self.samples)
            self.entry.figures = {"first": self.first, **answer["figures"]}
            run = max(self.first, self.longest)
            self.seen[job["kind"]] = (job.get("size", 1), run, answer["figures"]["working"])
        return self.entry

    def _too_large(self, job: Job) -> str:
        """Why a job is not tried: memory, or time going by the last one of its kind; empty when it is."""
        free = psutil.virtual_memory().available
        if free < self.spec.needs:
            return f"not tried: it needs about {self.spec.needs / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
        if job["kind"] not in self.seen:
            return ""
        size, seconds, working = self.seen[job["kind"]]
        factor = job.get("size", 1) / size
        if factor > 1 and seconds * factor > self.settings.call_s:
            return f"not tried: one run would take about {seconds * factor:.0f} s, going by the size before"
        if factor > 1 and working * factor > 0.8 * free:
            needed, there = working * factor / 1e9, free / 1e9
            return (
                f"not tried: it would need about {needed:.1f} GB, going by the size before; {there:.1f} GB are free"
            )
        return ""


@contextmanager
def _opened(specs: Sequence[Spec], settings: Settings, progress: Progress) -> Iterator[list[_Runner]]:
    runners: list[_Runner] = []
    try:
        for spec in specs:
            progress(f"starting {spec.label}")
            runner = _Runner(spec, settings)
            runners.append(runner)
            runner.open()
        yield runners
    finally:
        for runner in runners:
            runner.end()


def compare(
    name: str,
    specs: Sequence[Spec],
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress = lambda text: None,
) -> Iterator[Case]:
    """Let contenders do one job after another, taking turns at each.

    Args:
        name: of the cases.
        specs: the contenders.
        jobs: what they do, in this order; sizes of one kind should grow, for a contender that gets too slow or too
            large is then left out of what follows.
        settings: how long to measure.
        progress: told what happens.

    Yields:
        One case for each job. A contender that crashes or is missing has its reason there; the others go on.
    """
    kinds = {job["kind"] for job in jobs}
    needed = [spec for spec in specs if kinds & set(spec.kinds or kinds)]
    with _opened(needed, settings, progress) as runners:
        for job in jobs:
            taking = [runner for runner in runners if job["kind"] in (runner.spec.kinds or (job["kind"],))]
            about = " ".join(
                f"{value}" for key, value in job.items() if key not in ("size", "tiny", "compare", "backward")
            )
            for runner in taking:
                progress(f"{about}: preparing {runner.spec.label}")
                runner.prepare(job)
            for number in range(settings.rounds):
                going = 0
                for runner in taking:
                    progress(f"{about}: round {number + 1} of {settings.rounds}, {runner.spec.label}")
                    going += runner.turn(number)
                    time.sleep(settings.pause_s if runner.process else 0)
                if not going:
                    break
            yield Case(name, dict(job), [runner.finish(job) for runner in taking])
