"""What a run leaves: parts with their cases, and the machine, versions, limits and command of each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Entry, case_from_dict
from benchmarks.shapes import matrix_flops

OURS = "mambax"
"""What the labels of mambax start with."""

ALONE = "products alone"
"""What the labels of matrix products start with, which are a limit and not a peer."""


@dataclass
class Part:
    """One part of a run.

    Attributes:
        limits: ``read``, ``copy`` (bytes/s), ``float32``, ``bfloat16`` (operations/s), ``exponentials`` (1/s), of
            the same run.
        shape: the fields of the model's configuration.
    """

    name: str
    plan: str
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    threads: int
    shape: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    elapsed_s: float = 0.0


def save(parts: dict[str, Part], path: Path) -> None:
    """Write parts as JSON; the file appears complete or not at all."""
    values = {"format": 1, "parts": {name: asdict(part) for name, part in parts.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(staged, path)


def load(path: Path) -> dict[str, Part]:
    """The parts that :func:`save` wrote; none when there is no file.

    Raises:
        ValueError: when the file is something else.
    """
    if not path.exists():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format") != 1:
        raise ValueError(
            f"{path}: expected results of format 1, found {values.get('format')!r}; move the file away"
        )
    parts = {}
    for name, part in values["parts"].items():
        cases = [case_from_dict(case) for case in part.pop("cases")]
        parts[name] = Part(**part, cases=cases)
    return parts


def best(entries: list[Entry]) -> Entry | None:
    """The fastest of those that were measured."""
    measured = [entry for entry in entries if entry.median is not None]
    return min(measured, key=lambda entry: entry.median or 0.0, default=None)


def ours(case: Case) -> Entry | None:
    """The fastest of mambax."""
    return best([entry for entry in case.entries if entry.label.startswith(OURS)])


def peers(case: Case, start: str = "") -> Iterator[Entry]:
    """The others that were measured, or those of them whose label starts so; never products alone."""
    for entry in case.entries:
        if entry.median is not None and not entry.label.startswith((OURS, ALONE)) and entry.label.startswith(start):
            yield entry


def limits_of(cases: list[Case]) -> dict[str, float]:
    """The best rate for each limit, from the cases of the part ``limits``."""
    found = {}
    for case in cases:
        entry = best(case.entries)
        if entry is None or entry.median is None:
            continue
        job = case.job
        if job["kind"] in ("read", "copy"):
            found[job["kind"]] = job["bytes"] / entry.median
        elif job["kind"] == "product":
            found[case.name.rpartition(" ")[2]] = 2 * job["side"] ** 3 / entry.median
        else:
            found["exponentials"] = job["count"] / entry.median
    return found


def bound(case: Case, entry: Entry, part: Part) -> float | None:
    """The least time in seconds that a part of the job can take on this machine; None where no limit is known.

    scan: its exponentials, or the memory it reads and writes. prefill, training: the matrix products at the rate of
    large square ones; gradients need twice as many. decode: the weights read once.
    """
    limits, job = part.limits, case.job
    precision = job.get("precision", "float32")
    if job["kind"] in ("forward", "backward") and {"exponentials", "copy"} <= limits.keys():
        values = job["length"] * job["channels"]
        arrays, exponentials = (
            (4, values * job["states"]) if job["kind"] == "forward" else (11, 2 * values * job["states"])
        )
        return max(exponentials / limits["exponentials"], 4 * arrays * values / limits["copy"])
    if job["kind"] == "prefill" and precision in limits:
        return matrix_flops(part.shape, job["length"]) / limits[precision] / job["length"]
    if job["kind"] == "decode" and "read" in limits and "weights" in entry.figures:
        return entry.figures["weights"] / limits["read"]
    if job["kind"] == "training" and "float32" in limits:
        tokens = job["batch"] * job["length"]
        shape = part.shape
        head = 2 * (tokens - 1) * shape["vocab_size"] * shape["d_model"]  # matrix_flops counts one position of it
        return 3 * (matrix_flops(shape, tokens) + head) / limits["float32"]
    return None
