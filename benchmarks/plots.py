"""Plots of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import Case
from benchmarks.results import ALONE, OURS, Part

COLOURS = {"cpu": "#c0392b", "sequential": "#2c3e50", "pscan": "#2980b9", "logcumsumexp": "#8e44ad"}
AXES = {"scan by length": ("length", "length"), "scan by d_state": ("states", "d_state")}
AXES["scan by d_inner"] = ("channels", "d_inner")


def draw(parts: dict[str, Part], folder: Path, stem: str) -> list[Path]:
    """Write the plots that the parts have figures for; return their paths."""
    figures: dict[str, Figure] = {}
    if "scan" in parts and any(case.name in AXES for case in parts["scan"].cases):
        figures["scan"] = scan_figure(parts["scan"].cases)
    bars = [
        case for name in ("prefill", "decode", "training", "start") if name in parts for case in parts[name].cases
    ]
    if bars:
        figures["models"] = bar_figure(bars)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        paths.append(path)
    return paths


def scan_figure(cases: Sequence[Case]) -> Figure:
    """Time over each size that was varied, over the length also memory and error; forward, then with gradients."""
    panels: list[tuple[str, str, str]] = []
    for name in AXES:
        if any(case.name == name for case in cases):
            panels.append((name, "time", "seconds"))
            if name == "scan by length":
                panels += [(name, "working", "working memory, MB"), (name, "error", "error against float64")]
    kinds = ("forward", "backward")
    figure = Figure(figsize=(3.6 * len(panels), 6.4), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False)
    for row, kind in zip(grid, kinds, strict=True):
        for axes, (name, what, label) in zip(row, panels, strict=True):
            _lines(axes, [case for case in cases if case.name == name and case.job["kind"] == kind], what)
            axes.set(xscale="log", yscale="log", xlabel=AXES[name][1], ylabel=label)
            axes.set_title("forward" if kind == "forward" else "forward and backward", fontsize=9)
            axes.grid(alpha=0.25)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _lines(axes: Any, cases: Sequence[Case], what: str) -> None:
    """One line for each implementation, through the sizes at which it was measured."""
    labels = dict.fromkeys(entry.label for case in cases for entry in case.entries)
    for label in labels:
        points = []
        for case in cases:
            entry = case.entry(label)
            if entry is None or entry.median is None:
                continue
            value = {
                "time": entry.median,
                "working": entry.figures["working"] / 1e6,
                "error": entry.figures["error"],
            }
            points.append((case.job[AXES[case.name][0]], value[what]))
        implementation = label.rpartition(" ")[2]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="o", markersize=3.5, label=implementation,
                color=COLOURS.get(implementation),
            )  # fmt: skip


def bar_figure(cases: Sequence[Case]) -> Figure:
    """One panel for each case: tokens per second, or seconds, with a line from the lower to the upper quartile."""
    columns = 3
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(14, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(cases) :]:
        axes.set_axis_off()
    for axes, case in zip(grid, cases, strict=False):
        rate = case.job["kind"] in ("prefill", "decode")
        shown = [entry for entry in case.entries if entry.median is not None]
        tokens = case.job["batch"] if case.job["kind"] == "decode" else 1

        def value(seconds: float, rate: bool = rate, tokens: int = tokens) -> float:
            return tokens / seconds if rate else seconds

        heights = [value(entry.seconds["median"]) for entry in shown]
        ends = [sorted(value(entry.seconds[q]) for q in ("q1", "q3")) for entry in shown]
        spread = [[h - low for h, (low, _) in zip(heights, ends, strict=True)]]
        spread.append([high - h for h, (_, high) in zip(heights, ends, strict=True)])
        colours = [_colour(entry.label) for entry in shown]
        axes.barh(range(len(shown)), heights, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        axes.set_yticks(range(len(shown)), [entry.label for entry in shown], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(_title(case), fontsize=9)
        axes.set_xlabel("tokens per second" if rate else "seconds", fontsize=8)
    return figure


def _colour(label: str) -> str:
    return "#c0392b" if label.startswith(OURS) else "#d5d8dc" if label.startswith(ALONE) else "#7f8c8d"


def _title(case: Case) -> str:
    job = case.job
    sizes = [f"{key} {job[key]}" for key in ("length", "batch") if key in job]
    return ", ".join([job["kind"], *([job["precision"]] if "precision" in job else []), *sizes])
