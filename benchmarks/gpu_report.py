"""The GPU benchmark's results as Markdown and plots. ``python -m benchmarks.gpu_report`` makes them again."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_goals import goals
from benchmarks.harness import Case, Entry
from benchmarks.report import RESULTS, duration, goals_table, memory, stem_of
from benchmarks.results import OURS, Part, best, load, ours

STEM = "gpu"
COLOURS = {
    "mambax triton": "#c0392b", "mamba_ssm CUDA": "#2c3e50", "mambapy pscan": "#2980b9", "mambax pscan": "#e59866",
}  # fmt: skip
SHORT = {"batch": "B", "length": "L", "channels": "D", "states": "N"}


def title(case: Case) -> str:
    """A heading for a case: its name, what is done, and the sizes."""
    job = case.job
    words = [case.name]
    if job["kind"] in ("forward", "backward"):
        words.append("forward" if job["kind"] == "forward" else "forward and backward")
    words += [str(job["model"])] if "model" in job else []
    words += [f"{short} {job[key]}" for key, short in SHORT.items() if key in job]
    if "checkpointing" in job:
        words.append("blocks computed again" if job["checkpointing"] else "everything kept")
    return ", ".join([*words, *([job["precision"]] if "precision" in job else [])])


def case_table(case: Case, limits: Mapping[str, float] | None = None) -> list[str]:
    """One case: a row for each rival, with the reason where it has no time, and how near the limits it comes."""
    first = ours(case) or best(case.entries)
    lines = [
        "| | median | quartiles | times the best of mambax | working MB | peak MB | error | |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    return lines + [_row(entry, first, _share(case, entry, limits or {})) for entry in case.entries]


def _share(case: Case, entry: Entry, limits: Mapping[str, float]) -> str:
    """The least time that the limits allow, as a share of the time taken; where it is known what has to be done."""
    f, rate = entry.figures, limits.get(str(case.job.get("precision")))
    if not entry.median or not rate or "copy" not in limits or not {"bytes", "operations"} <= f.keys():
        return ""
    least = max(f["bytes"] / limits["copy"], f["operations"] / rate)
    return f"{100 * least / entry.median:.0f} % of what the limits allow"


def _row(entry: Entry, first: Entry | None, share: str) -> str:
    s, f = entry.seconds, entry.figures
    said = "" if entry.status == "ok" else f"{entry.status}: {entry.reason}".replace("|", "\\|")
    counts = ", ".join(f"{f[word]:.0f} {word}" for word in ("passed", "failed", "skipped") if word in f)
    if "launches" in f:
        counts = f"{f['launches']:.4g} launches" + (f", {100 * f['share']:.0f} %" if "share" in f else "")
    ratio = entry.median / first.median if entry.median and first and first.median else None
    cells = [
        entry.label,
        duration(s.get("median")),
        f"{duration(s['q1'])} to {duration(s['q3'])}" if s else "",
        "" if ratio is None else f"{ratio:.2f}",
        memory(f.get("working")),
        memory(f.get("peak")),
        f"{f['error']:.1e}" if "error" in f else "",
        "; ".join(filter(None, (counts, said, share))),
    ]
    return "| " + " | ".join(cells) + " |"


def provenance(part: Part) -> str:
    """Where, when and with what a part was measured."""
    m = part.machine
    named = (
        "compute_capability",
        "multiprocessors",
        "clocks.max.sm",
        "clocks.sm",
        "clocks.mem",
        "power.limit",
        "driver_version",
    )
    said = ", ".join(f"{name} {m[name]}" for name in named if name in m)
    versions = ", ".join(f"{name} {version}" for name, version in part.versions.items())
    return f"`{part.command}` on {part.date}: {m['gpu']} ({said}); {part.elapsed_s:.0f} s. {versions}."


def limits_line(part: Part) -> str:
    """What the GPU did at most in the run that a part belongs to."""
    words = {"copy": "copies {:.3g} GB/s", "bfloat16": "bfloat16 products {:.4g} TFLOP/s"}
    words["float32"] = "float32 products {:.4g} TFLOP/s"
    scale = {"copy": 1e9}
    found = [text.format(part.limits[k] / scale.get(k, 1e12)) for k, text in words.items() if k in part.limits]
    return "In that run the GPU " + ", ".join(found) + "."


def markdown(parts: dict[str, Part], pictures: list[Path]) -> str:
    """The whole report."""
    lines = ["# GPU benchmarks", "", "Medians; written by `benchmarks/gpu_report.py`, not by hand.", ""]
    found = goals(parts)
    if found:
        lines += ["## Goals", "", *goals_table(found), ""]
    for name, part in parts.items():
        lines += [f"## {name}", "", provenance(part), ""]
        if part.limits:
            lines += [limits_line(part), ""]
        for case in part.cases:
            lines += [f"### {title(case)}", "", *case_table(case, part.limits), ""]
    for picture in pictures:
        lines += [f"![{picture.stem}]({picture.name})", ""]
    return "\n".join(lines)


def write(parts: dict[str, Part], folder: Path, stem: str) -> list[Path]:
    """Write the Markdown, and the plots where matplotlib is there; return their paths."""
    pictures: list[Path] = []
    if importlib.util.find_spec("matplotlib") is not None:
        pictures = _draw(parts, folder, stem)
    page = folder / f"{stem}.md"
    page.write_text(markdown(parts, pictures), encoding="utf-8", newline="\n")
    return [page, *pictures]


def _draw(parts: dict[str, Part], folder: Path, stem: str) -> list[Path]:
    figures = {name: _scan_figure(parts[name].cases) for name in ("scan", "scan-backward") if name in parts}
    bars = [
        case
        for name in ("ssd", "kernels", "prefill", "decode", "training")
        if name in parts
        for case in parts[name].cases
    ]
    bars = [case for case in bars if best(case.entries) is not None]
    if bars:
        figures["models"] = _bar_figure(bars)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        paths.append(path)
    return paths


def _scan_figure(cases: list[Case]) -> Any:
    """A panel for each batch, D and N: time over the length."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((c.job["batch"], c.job["channels"], c.job["states"]) for c in cases))
    columns = min(4, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        for label, colour in COLOURS.items():
            points = []
            for case in cases:
                entry = case.entry(label)
                if (
                    (case.job["batch"], case.job["channels"], case.job["states"]) == panel
                    and entry
                    and entry.median
                ):
                    points.append((case.job["length"], entry.median))
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=label, color=colour)
        axes.set(xscale="log", yscale="log", xlabel="length", ylabel="seconds")
        axes.set_title("B {}, D {}, N {}".format(*panel), fontsize=9)
        axes.grid(alpha=0.25)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _bar_figure(cases: list[Case]) -> Any:
    """A panel for each case: seconds, or seconds per token."""
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(14, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(cases) :]:
        axes.set_axis_off()
    for axes, case in zip(grid, cases, strict=False):
        shown = [entry for entry in case.entries if entry.median is not None]
        colours = ["#c0392b" if entry.label.startswith(OURS) else "#7f8c8d" for entry in shown]
        axes.barh(range(len(shown)), [entry.seconds["median"] for entry in shown], color=colours)
        axes.set_yticks(range(len(shown)), [entry.label for entry in shown], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(title(case), fontsize=8)
        axes.set_xlabel("seconds", fontsize=8)
    return figure


def main() -> None:
    """Redraw everything from the JSON."""
    stem = stem_of("python -m benchmarks.gpu_report", "Write tables and plots again from the JSON.", STEM)
    parts = load(RESULTS / f"{stem}.json")
    if not parts:
        raise SystemExit(f"{RESULTS / stem}.json does not exist; run python -m benchmarks.gpu first")
    for written in write(parts, RESULTS, stem):
        print(written)


if __name__ == "__main__":
    main()
