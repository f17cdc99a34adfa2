"""The training benchmark: ``python -m benchmarks.training [--only step,loss,blocks,length] [--dry-run]``.

Time and memory of a training step on torch, on the CPU, beside ``transformers.Trainer`` and mambapy; the memory
that the loss in chunks saves, and gradient checkpointing; and memory over the length. Results go to
``benchmarks/results``: ``training.json``, ``training.md`` and ``training.png``. Parts that are not run keep theirs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import machine, report, results
from benchmarks.contender import Spec
from benchmarks.harness import Case, Settings, compare

STEM = "training"
SHAPES: dict[str, dict[str, Any]] = {
    "mamba-130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50280},
    "a quarter of mamba-130m": {"d_model": 768, "n_layer": 6, "vocab_size": 50280},
    "d_model 256, 8 layers": {"d_model": 256, "n_layer": 8, "vocab_size": 1024},
    "tiny": {"d_model": 32, "n_layer": 2, "vocab_size": 96},
}
LENGTHS = (128, 256, 512, 1024, 2048)
PARTS = ("step", "loss", "blocks", "length")


def _spec(label: str, package: str, shape: dict[str, Any], **options: Any) -> Spec:
    return Spec(label, f"training_steps:{package}", {"shape": shape, **options})


def groups(part: str, tiny: bool, batch: int, length: int) -> tuple[list[Spec], list[dict[str, Any]], str]:
    """The contenders of a part, their jobs, and the name of the shape.

    Args:
        part: of :data:`PARTS`.
        tiny: sizes that only show that it runs.
        batch, length: of the step beside others.
    """
    name = {"step": "mamba-130m", "loss": "a quarter of mamba-130m"}.get(part, "d_model 256, 8 layers")
    name = "tiny" if tiny else name  # where blocks are compared, weights and moments take little
    shape = SHAPES[name]
    ours = _spec("mambax", "Mambax", shape)
    again = _spec("mambax, checkpointing", "Mambax", shape, checkpointing=True)
    specs = {
        "step": [ours, _spec("transformers + Trainer", "Transformers", shape), _spec("mambapy", "Mambapy", shape)],
        "loss": [ours, _spec("mambax, all logits at once", "Mambax", shape, whole=True)],
        "blocks": [ours, again],
        "length": [ours, again],
    }[part]
    sizes = [(1, size) for size in LENGTHS] if part == "length" else [(1 if part == "loss" else 4, 1024)]
    sizes = [(batch, length)] if part == "step" else sizes
    if tiny:
        sizes = [(1, size) for size in (8, 16)] if part == "length" else [(1, 8)]
    jobs = [{"kind": "training", "batch": b, "length": n, "size": b * n, "tiny": {"length": 4}} for b, n in sizes]
    return specs, jobs, name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts; return 1 when something of mambax failed."""
    chosen = _arguments(arguments)
    path = chosen.results / f"{STEM}.json"
    parts = results.load(path)
    settings = Settings(chosen.threads, rounds=chosen.rounds, least=1, turn_s=0.1, contender_s=20, call_s=60)
    for name in chosen.only:
        specs, jobs, shape = groups(name, chosen.dry_run, chosen.batch, chosen.length)
        command = ["python", "-m", "benchmarks.training", "--only", name, "--threads", str(chosen.threads)]
        command += ["--rounds", str(chosen.rounds)]
        if name == "step":
            command += ["--batch", str(chosen.batch), "--length", str(chosen.length)]
        part = results.Part(
            name, "dry-run" if chosen.dry_run else "full", shlex.join(command),
            datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), machine.describe(), machine.versions(),
            chosen.threads, {"name": shape, **SHAPES["tiny" if chosen.dry_run else shape]}, {},
        )  # fmt: skip
        start = time.perf_counter()
        part.cases = list(compare(name, specs, jobs, settings, lambda text: print(text, file=sys.stderr)))
        part.elapsed_s = time.perf_counter() - start
        parts[name] = part
        results.save({key: parts[key] for key in PARTS if key in parts}, path)
    (chosen.results / f"{STEM}.md").write_text("\n".join(markdown(parts)) + "\n", encoding="utf-8", newline="\n")
    if "length" in parts:
        figure(parts["length"].cases).savefig(chosen.results / f"{STEM}.png", dpi=110, metadata={"Software": None})
    failed = [e for n in chosen.only for c in parts[n].cases for e in c.entries if e.status == "failed"]
    for entry in failed:
        print(f"{entry.label}: {entry.reason}", file=sys.stderr)
    return int(any(entry.label.startswith(results.OURS) for entry in failed))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description="Training steps, on a CPU.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--batch", type=int, default=2, help="rows of the step beside others")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender, at most")
    parser.add_argument("--threads", type=int, default=machine.usable_threads(), help="threads of each contender")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="the folder to write to")
    chosen = parser.parse_args(arguments)
    chosen.only = [name.strip() for name in chosen.only.split(",")]
    for name in chosen.only:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; expected some of: {', '.join(PARTS)}")
    return chosen


def slope(cases: Sequence[Case], label: str, what: str) -> tuple[float, float]:
    """Bytes for a token of a line through a figure over the length, and the largest distance from it, relative."""
    points = [
        (case.job["length"], entry.figures[what])
        for case in cases
        if (entry := case.entry(label)) is not None and what in entry.figures
    ]
    lengths, values = (np.array(column, np.float64) for column in zip(*points, strict=True))
    factor, offset = np.polyfit(lengths, values, 1)
    off = np.abs(values - (factor * lengths + offset)).max() / values.max()
    return float(factor), float(off)


def markdown(parts: dict[str, results.Part]) -> list[str]:
    """The results as tables."""
    lines = ["# Training on the CPU", ""]
    for name in (name for name in PARTS if name in parts):
        part = parts[name]
        lines += [f"## {name}: {part.shape['name']}", "", report.provenance(part), ""]
        lines += ["| | tokens | a step | peak, MB | working, MB | kept for the gradient, MB |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for case in part.cases:
            size = f"{case.job['batch']} x {case.job['length']}"
            for entry in case.entries:
                if entry.median is None:
                    lines.append(f"| {entry.label} | {size} | {entry.status}: {entry.reason} | | | |")
                    continue
                memory = [report.memory(entry.figures.get(key)) for key in ("peak", "working", "kept")]
                row = [entry.label, size, report.duration(entry.median), *memory]
                lines.append("| " + " | ".join(row) + " |")
        lines.append("")
        if name == "length" and len(part.cases) > 1:
            for label in dict.fromkeys(entry.label for case in part.cases for entry in case.entries):
                working, off = slope(part.cases, label, "working")
                kept, _ = slope(part.cases, label, "kept")
                lines.append(
                    f"- {label}: {working / 1e3:.0f} kB more for each token, within {100 * off:.1f} % of a line; "
                    f"kept for the gradient, {kept / 1e3:.0f} kB."
                )
            lines.append("")
    return lines[:-1]


def figure(cases: Sequence[Case]) -> Figure:
    """Working memory over the length, with the line of what autograd keeps."""
    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    for label, colour in (("mambax", "#c0392b"), ("mambax, checkpointing", "#2980b9")):
        for what, style in (("working", "o-"), ("kept", "--")):
            points = [
                (case.job["length"], entry.figures[what] / 1e6)
                for case in cases
                if (entry := case.entry(label)) is not None
            ]
            shown = f"{label}: {'memory of the step' if what == 'working' else 'kept for the gradient'}"
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=shown)
    axes.set(xlabel="tokens of a row", ylabel="MB")
    axes.set_title("memory of a training step over the length", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
