"""What mambax sets out to reach on a CPU, held against what was measured.

Each goal gives a figure, the bound that it is to keep, and whether it does. The figures are ratios within one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.harness import Case, Entry
from benchmarks.results import ALONE, OURS, Part, best, bound, ours, peers


@dataclass(frozen=True)
class Goal:
    """One goal and what was found.

    Attributes:
        about: what is compared, in words.
        found: the figure; None when it was not measured.
        bound: what the figure should be: ``(">=", 9.0)`` or ``("<=", 1.5)``.
    """

    about: str
    found: float | None
    bound: tuple[str, float]

    @property
    def reached(self) -> bool | None:
        """Whether the figure keeps the bound; None when it was not measured."""
        if self.found is None:
            return None
        sign, value = self.bound
        return self.found >= value if sign == ">=" else self.found <= value


def goals(parts: dict[str, Part]) -> list[Goal]:
    """Every goal that the parts say something about."""
    found: list[Goal] = []
    for name, of in GOALS.items():
        if name in parts:
            found += of(parts[name])
    return found


def _faster(us: Entry | None, other: Entry | None) -> float | None:
    """How many times as long the other takes."""
    if us is None or other is None or not us.median or not other.median:
        return None
    return other.median / us.median


def _scan(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        if case.name != "scan":
            continue
        us = ours(case)
        about = f"scan, L {case.job['length']}, {_pass(case)}: "
        if case.job["kind"] == "forward":
            yield Goal(
                about + "times as fast as the torch loop", _faster(us, case.entry("torch loop")), (">=", 9.0)
            )
            slower = _faster(case.entry("C loop"), us)
            yield Goal(about + "times as long as the loop in C", slower, ("<=", 1.5))
            continue
        us, pscan = case.entry("mambax torch cpu"), case.entry("mambapy pscan")
        yield Goal(about + "times as fast as mambapy", _faster(us, pscan), (">=", 10.0))
        share = us and pscan and us.figures["working"] / pscan.figures["working"]
        yield Goal(about + "working memory, as a share of mambapy's", share, ("<=", 1 / 8))
    for kind in ("forward", "backward"):
        yield from _linear(
            [case for case in part.cases if case.name == "scan by length" and case.job["kind"] == kind]
        )


def _linear(cases: list[Case]) -> Iterator[Goal]:
    """Time per token at every length against that in the middle of them (2048 in a full run)."""
    entries = [(case, case.entry("mambax torch cpu")) for case in cases]
    rates = [(case.job["length"], e.median / case.job["length"]) for case, e in entries if e and e.median]
    if len(rates) < 2:
        return
    usual = next((rate for length, rate in rates if length == 2048), rates[len(rates) // 2][1])
    worst = max(max(rate / usual, usual / rate) for _, rate in rates)
    shortest, longest = rates[0][0], rates[-1][0]
    about = f"scan, {_pass(cases[0])}, L {shortest} to {longest}: "
    yield Goal(about + "time per token at most so many times more or less than usual", worst, ("<=", 1.5))


def _pass(case: Case) -> str:
    return "forward" if case.job["kind"] == "forward" else "forward and backward"


def _prefill(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        us = ours(case)
        about = f"prefill of {case.job['length']}, {case.job['precision']}: "
        for name, times in (("llama.cpp", 2.0), ("mambapy", 4.0), ("transformers compiled", 2.0)):
            others = list(peers(case, name))
            if others:
                yield Goal(about + f"times as fast as {name}", _faster(us, best(others)), (">=", times))
        alone = best([entry for entry in case.entries if entry.label.startswith(ALONE)])
        if alone is not None:
            yield Goal(about + "share of the rate of its matrix products alone", _faster(us, alone), (">=", 0.75))


def _decode(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        us, precision = ours(case), case.job["precision"]
        about = f"decode, batch {case.job['batch']}, {precision}: "
        if case.job["batch"] > 1:
            rival = best(list(peers(case)))
            yield Goal(about + "times as fast as the fastest other", _faster(us, rival), (">=", 1.0))
            continue
        floating = precision in ("float32", "bfloat16")
        llama = best(list(peers(case, "llama")))
        yield Goal(about + "times as fast as llama.cpp", _faster(us, llama), (">=", 1.3 if floating else 1.0))
        if floating:
            least = bound(case, us, part) if us else None
            longer = us.median / least if us and us.median and least else None
            yield Goal(about + "times as long as reading the weights once", longer, ("<=", 1.2))


def _flat(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        for entry in case.entries:
            f = entry.figures if entry.status == "ok" else {}
            reached = "tokens read" if case.job["kind"] == "reach" else "steps"
            about = f"{entry.label}, {case.job['steps']} {reached}: "
            time = f["last_step"] / f["first_step"] if f else None
            memory = f["last_resident"] / f["first_resident"] if f else None
            yield Goal(about + "time of a step, last against first", time, ("<=", 1.1))
            yield Goal(about + "memory, last against first", memory, ("<=", 1.02))


def _training(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        us = ours(case)
        about = f"training step, {case.job['batch']} x {case.job['length']}: "
        for name in ("transformers", "mambapy"):
            peer = case.entry(name)
            share = us.figures["peak"] / peer.figures["peak"] if us and peer else None
            yield Goal(about + f"times as fast as {name}", _faster(us, peer), (">=", 5.0))
            yield Goal(about + f"peak memory, as a share of {name}'s", share, ("<=", 1 / 3))


def _start(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        us = case.entry("mambax numpy")
        if case.job["kind"] == "first":
            yield from _first(case)
            continue
        yield Goal("seconds from process start to the first token", us.median if us else None, ("<=", 1.0))
        share = us.figures["peak"] / us.figures["weights"] if us else None
        yield Goal("peak memory then, as a share of the weights", share, ("<=", 1.2))


def _first(case: Case) -> Iterator[Goal]:
    """What compiling the kernels adds."""
    for backend in ("numpy", "torch"):
        warm, cold = case.entry(f"mambax {backend}"), case.entry(f"mambax {backend}, no kernels yet")
        added = None
        if warm and cold and warm.median and cold.median:
            added = cold.median - warm.median
        yield Goal(f"seconds that compiling adds to the first token, {backend}", added, ("<=", 3.0))


def _mamba2(part: Part) -> Iterator[Goal]:
    """Every one of mambax, not the fastest alone."""
    times = {"prefill": 3.0, "decode": 2.0}
    for case in part.cases:
        kind, rival = case.job["kind"], case.entry("transformers")
        size = case.job["length" if kind == "prefill" else "batch"]
        for entry in case.entries:
            if entry.label.startswith(OURS):
                about = f"Mamba-2, {kind} of {size}, {case.job['precision']}: {entry.label}, "
                yield Goal(about + "times as fast as transformers", _faster(entry, rival), (">=", times[kind]))


GOALS: dict[str, Callable[[Part], Iterator[Goal]]] = {
    "scan": _scan,
    "prefill": _prefill,
    "compiled": _prefill,
    "decode": _decode,
    "flat": _flat,
    "training": _training,
    "start": _start,
    "mamba2-prefill": _mamba2,
    "mamba2-decode": _mamba2,
}
"""Part -> its goals."""
