"""What mambax sets out to reach on an NVIDIA GPU, held against what was measured in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.goals import Goal
from benchmarks.harness import Case, Entry
from benchmarks.results import Part
from benchmarks.shapes import matrix_flops


def goals(parts: dict[str, Part]) -> list[Goal]:
    """Every goal that the parts say something about."""
    return [goal for name, of in GOALS.items() if name in parts for goal in of(parts[name])]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _faster(us: Entry | None, other: Entry | None) -> float | None:
    """How many times as long the other takes."""
    return _ratio(other.median if other else None, us.median if us else None)


def _tests(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        for entry in case.entries:
            found = None if entry.status == "skipped" else float(entry.status != "ok")
            yield Goal(f"{case.name}: {entry.label.removeprefix('mambax: ')}, failures", found, ("<=", 0.0))


def _scan(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        job = case.job
        us, official = case.entry("mambax triton"), case.entry("mamba_ssm CUDA")
        sizes = f"B {job['batch']}, L {job['length']}, D {job['channels']}, N {job['states']}"
        about = f"scan, {'forward' if job['kind'] == 'forward' else 'forward and backward'}, {sizes}: "
        times = 1.5 if job["batch"] == 1 and job["length"] >= 8192 else 1.0
        yield Goal(about + "times as fast as mamba_ssm's CUDA kernels", _faster(us, official), (">=", times))
        if case.entry("mambapy pscan") is not None:
            yield Goal(about + "times as fast as mambapy", _faster(us, case.entry("mambapy pscan")), (">=", 5.0))
        if job["kind"] == "backward":
            share = _ratio(*(entry.figures.get("working") if entry else None for entry in (us, official)))
            yield Goal(about + "memory of the run, as a share of mamba_ssm's", share, ("<=", 1.0))


def _ssd(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        job = case.job
        done = "forward" if job["kind"] == "forward" else "forward and backward"
        about = f"ssd, {done}, {job['model']}, B {job['batch']}, L {job['length']}: "
        faster = _faster(case.entry("mambax triton"), case.entry("mamba_ssm Triton"))
        yield Goal(about + "times as fast as mamba_ssm's Triton kernels", faster, (">=", 1.0))


def _long(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        for entry in case.entries:
            error = entry.figures.get("error") if entry.status == "ok" else None
            yield Goal(f"{case.name}, {entry.label}: error at the end", error, ("<=", 2e-2))


def _decode(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        us, official = case.entry("mambax graph"), case.entry("mamba_ssm graph")
        about = f"decode of {case.job['model']}, batch {case.job['batch']}: "
        if case.job["batch"] == 1:
            yield Goal(
                about + "bytes read, as a share of the measured bandwidth", _bandwidth(us, part), (">=", 0.8)
            )
        yield Goal(about + "times as fast as mamba_ssm's graph", _faster(us, official), (">=", 1.0))


def _bandwidth(us: Entry | None, part: Part) -> float | None:
    """Weights read once, and the state read and written, over the time and the bandwidth of a copy."""
    if us is None or not us.median or "copy" not in part.limits:
        return None
    moved = us.figures["weights"] + 2 * us.figures["state"]
    return moved / us.median / part.limits["copy"]


def _prefill(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        us, job = case.entry("mambax"), case.job
        about = f"prefill of {job['model']}, {job['batch']} x {job['length']}: "
        share = _ratio(_rate(case, us, part), part.limits.get(job["precision"]))
        yield Goal(about + "share of the measured matrix rate", share, (">=", 0.6))


def _rate(case: Case, us: Entry | None, part: Part) -> float | None:
    if us is None or not us.median:
        return None
    return matrix_flops(part.shape, case.job["batch"] * case.job["length"]) / us.median


def _training(part: Part) -> Iterator[Goal]:
    for case in part.cases:
        us, official = case.entry("mambax"), case.entry("mamba_ssm")
        job = case.job
        kept = "blocks computed again" if job["checkpointing"] else "everything kept"
        about = f"training step of {job['model']}, {job['batch']} x {job['length']}, {kept}: "
        yield Goal(about + "times as fast as mamba_ssm", _faster(us, official), (">=", 1.0))
        share = _ratio(*(entry.figures.get("peak") if entry else None for entry in (us, official)))
        yield Goal(about + "peak memory, as a share of mamba_ssm's", share, ("<=", 1.0))


GOALS: dict[str, Callable[[Part], Iterator[Goal]]] = {
    "tests": _tests,
    "sanitizer": _tests,
    "scan": _scan,
    "scan-backward": _scan,
    "ssd": _ssd,
    "long": _long,
    "million": _long,
    "decode": _decode,
    "prefill": _prefill,
    "training": _training,
}
"""Part -> its goals."""
