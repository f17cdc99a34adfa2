"""The figures of docs/parallel-scan.md, drawn from what :mod:`mambax.scan` does.

    python docs/figures/scan_figures.py [folder]

Dimensions: T steps, D channels, N d_state.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import mambax
from mambax import scan

INK, RED, BLUE, GREEN = "#333333", "#c0392b", "#2468a8", "#3b8a4a"
STYLES: dict[str, dict[str, Any]] = {
    "sequential": {"color": INK, "marker": "s"},
    "pscan": {"color": BLUE, "marker": "o"},
    "logcumsumexp": {"color": RED, "marker": "^"},
    "logcumsumexp, one chunk": {"color": RED, "marker": "^", "linestyle": "--", "markerfacecolor": "white"},
    "doubling": {"color": GREEN, "marker": "v", "linestyle": "--"},
}


# --- what the algorithms do, recorded by numbers that keep their own history ------------------------------------


@dataclass
class Ledger:
    """Arithmetic done so far, and which steps were joined: (last step before, last step here)."""

    work: int = 0
    joins: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Traced:
    """A number that keeps its history: the steps ``first`` to ``last`` went into it, by ``depth`` operations."""

    ledger: Ledger
    first: int
    last: int
    depth: int = 0

    def exp(self) -> Traced:
        """NumPy calls this for ``np.exp``. Every algorithm takes the same exponentials: they are not counted."""
        return self

    def __mul__(self, other: Traced) -> Traced:
        self.ledger.work += 1
        first, last = min(self.first, other.first), max(self.last, other.last)
        return Traced(self.ledger, first, last, max(self.depth, other.depth) + 1)

    def __add__(self, other: Traced) -> Traced:
        """The end of ``a * before + here``; steps up to the first of ``here`` went into ``before``."""
        self.ledger.joins.append((other.first - 1, other.last))
        return self * other


def doubling(nn: Any, a: np.ndarray, b: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The scan of Hillis and Steele (1986): step s adds what lies s behind, s = 1, 2, 4, ... For comparison."""
    b = np.concatenate([a[:, :1] * h[:, None] + b[:, :1], b[:, 1:]], axis=1)
    s = 1
    while s < a.shape[1]:
        b = np.concatenate([b[:, :s], a[:, s:] * b[:, :-s] + b[:, s:]], axis=1)
        a = np.concatenate([a[:, :s], a[:, s:] * a[:, :-s]], axis=1)
        s *= 2
    return b


def trace(recurrence: Callable[..., np.ndarray], length: int) -> tuple[Ledger, np.ndarray]:
    """Run a recurrence over ``length`` steps; return what it did, and every state (length,) as :class:`Traced`."""
    ledger = Ledger()
    a, b = (np.array([Traced(ledger, t, t) for t in range(length)], object).reshape(1, length, 1, 1) for _ in "ab")
    h = np.array([[[Traced(ledger, -1, -1)]]], object)
    return ledger, recurrence(mambax.get_backend("numpy"), a, b, h).ravel()


def cost(recurrence: Callable[..., np.ndarray], length: int) -> tuple[int, int]:
    """(work, depth) of a recurrence: operations on scalars in all, and one after another."""
    ledger, states = trace(recurrence, length)
    return ledger.work, max(state.depth for state in states)


# --- measured error ---------------------------------------------------------------------------------------------


def inputs(length: int, time_step: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log_a (1, T, D, N), b (1, T, D, N) and h0 (1, D, N) as in a model: A = -1..-N, delta about ``time_step``."""
    rng = np.random.default_rng(seed)
    channels, d_state = 8, 16
    delta = time_step * np.exp(0.5 * rng.standard_normal((1, length, channels, 1)))
    log_a = -delta * np.arange(1, d_state + 1)
    b = delta * rng.standard_normal((1, length, channels, 1)) * rng.standard_normal((1, length, 1, d_state))
    return log_a, b, rng.standard_normal((1, channels, d_state))


def in_chunks(name: str, arrays: Sequence[np.ndarray], chunk: int) -> np.ndarray:
    """Every state (1, T, D, N) by the named algorithm, ``chunk`` steps at a time."""
    log_a, b, h = arrays
    nn, parts = mambax.get_backend("numpy"), []
    for start in range(0, log_a.shape[1], chunk):
        part = slice(start, start + chunk)
        parts.append(scan.ALGORITHMS[name][0](nn, log_a[:, part], b[:, part], h, None))
        h = parts[-1][:, -1]
    return np.concatenate(parts, axis=1)


def errors(length: int, time_step: float) -> dict[str, float]:
    """Relative error of each algorithm in float32, all states together, against the sequential one in float64."""
    exact = inputs(length, time_step)
    want = in_chunks("sequential", exact, length)
    narrow = [array.astype(np.float32) for array in exact]
    chunks = {name: (name, chunk) for name, (_, chunk) in scan.ALGORITHMS.items()}
    chunks["logcumsumexp, one chunk"] = ("logcumsumexp", length)
    with np.errstate(over="ignore", invalid="ignore"):
        got = {label: in_chunks(name, narrow, chunk) for label, (name, chunk) in chunks.items()}
    return {label: float(np.linalg.norm(y - want) / np.linalg.norm(want)) for label, y in got.items()}


# --- the figures ------------------------------------------------------------------------------------------------


def levels(joins: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The joins made at once: an array operation goes from left to right, so that a step back starts the next."""
    rows: list[list[tuple[int, int]]] = []
    for source, target in joins:
        if not rows or target <= rows[-1][-1][1]:
            rows.append([])
        rows[-1].append((source, target))
    return rows


def tree_figure(steps: int = 8) -> Figure:
    """Which steps pscan combines with which: time to the right, later operations further down."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    rows = levels(trace(scan.pscan, steps)[0].joins[1:])  # the first join is that with the initial state
    up, bottom = math.ceil(math.log2(steps)), len(rows) + 1
    first = list(range(steps))  # the first step that each wire covers so far
    for t in range(steps):
        axes.plot([t, t], [0, bottom - 0.2], color="#cccccc", zorder=0)
        axes.text(t, bottom, f"$h_{{{t}}}$", ha="center", va="center", color=INK)
        _node(axes, t, 0, str(t), INK)
    for row, joins in enumerate(rows, start=1):
        colour = BLUE if row <= up else GREEN
        for source, target in joins:
            axes.plot([source, target], [row - 0.62, row], color=colour, linewidth=1.6, zorder=1)
            _node(axes, target, row, f"{first[source]}\N{EN DASH}{target}", colour)
        for source, target in joins:
            first[target] = first[source]
    for middle, label, colour in (
        (0, "steps", INK),
        ((1 + up) / 2, "combine pairs", BLUE),
        ((1 + up + len(rows)) / 2, "fill in", GREEN),
    ):
        axes.text(-0.75, middle, label, rotation=90, ha="center", va="center", color=colour)
    axes.set(xlim=(-1.1, steps - 0.4), ylim=(bottom + 0.4, -0.5))
    axes.set_axis_off()
    return figure


def _node(axes: Axes, x: float, y: float, label: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
    axes.text(x, y, label, ha="center", va="center", fontsize=9, color=colour, bbox=box, zorder=2)


def error_figure(lengths: Sequence[int], steps: Sequence[float]) -> Figure:
    """Error against float64 as the sequence grows, and as the time steps grow."""
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_length = [errors(length, 0.05) for length in lengths]
    by_step = [errors(1024, step) for step in steps]
    for axes, x, measured in ((left, lengths, by_length), (right, steps, by_step)):
        for label in measured[0]:
            axes.plot(x, [m[label] for m in measured], label=label, markersize=4.5, **STYLES[label])
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.25)
    left.set_xscale("log", base=2)
    left.set(xlabel="length (time step 0.05)", ylabel="relative error of the states, float32")
    right.set(xlabel="time step (length 1024)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def cost_figure(lengths: Sequence[int]) -> Figure:
    """Operations in all and one after another, counted by running the algorithms."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    work, depth = figure.subplots(1, 2)
    for name, recurrence in (("sequential", scan.sequential), ("pscan", scan.pscan), ("doubling", doubling)):
        counted = [cost(recurrence, length) for length in lengths]
        for axes, values in zip((work, depth), zip(*counted, strict=True), strict=True):
            axes.plot(lengths, values, label=name, markersize=4.5, **STYLES[name])
    for axes, label in ((work, "operations per channel and state"), (depth, "operations one after another")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="length", ylabel=label)
        axes.grid(alpha=0.25)
    work.legend(frameon=False, fontsize=9)
    return figure


def draw(folder: Path, *, lengths: Sequence[int], steps: Sequence[float]) -> list[Path]:
    """Write the figures into a folder; return their paths."""
    figures = {
        "scan-tree.png": tree_figure(),
        "scan-error.png": error_figure(lengths, steps),
        "scan-cost.png": cost_figure([n for n in lengths if n <= 1024]),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150, metadata={"Software": None})
    return [folder / name for name in figures]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for path in draw(
        target,
        lengths=[2**k for k in range(3, 14)],
        steps=[float(step) for step in np.geomspace(1e-3, 10, 13)],
    ):
        print(path)
