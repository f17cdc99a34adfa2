"""Memory of every family on a CPU: ``python -m benchmarks.families [--only bamba,zamba2] [--dry-run]``.

For each family, random weights are written, and each backend loads them and reads prompts in a process of its own.
Results go to ``benchmarks/results``: ``memory.json`` and ``memory.md``. A family that is run replaces its earlier
results and leaves the others. It takes about 15 minutes on two processors that do nothing else,
half of them for the attention of Falcon-H1 and Zamba2.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import machine, report, results
from benchmarks.contender import Spec
from benchmarks.family_shapes import FAMILIES, TINY, Shape
from benchmarks.harness import Entry, Settings, compare
from benchmarks.processes import ROOT, environment

STEM = "memory"
BACKENDS = ("numpy", "torch", "mlx")
PROMPTS = ((2048, 4), (32768, 1))
"""Tokens, and how often so many are read. The shorter prompt is read several times: memory that the allocator of
the system keeps grows over the first thousands of tokens, whatever prompts they are of."""

PAGE = report.PAGE
BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
FLAT = 1.02
"""What a pure state-space model may need for the longest prompt, as a multiple of the shortest."""


def measure(name: str, shape: Shape, chosen: argparse.Namespace, folder: Path) -> results.Part:
    """Write the weights of one family, and let every backend load and read."""
    prompts = ((24, 2), (40, 1)) if chosen.dry_run else PROMPTS
    command = ["python", "-m", "benchmarks.families", "--threads", str(chosen.threads)]
    command += ["--backends", ",".join(chosen.backends)]
    if chosen.only != list(TINY if chosen.dry_run else FAMILIES):
        command += ["--only", ",".join(chosen.only)]
    command += ["--dry-run"] if chosen.dry_run else []
    part = results.Part(
        name, "dry-run" if chosen.dry_run else "full", shlex.join(command), chosen.date, machine.describe(),
        machine.versions(), chosen.threads, {"of": shape.of, "flat": shape.flat, **shape.raw}, {},
    )  # fmt: skip
    start = time.perf_counter()
    writer = [sys.executable, "-m", "benchmarks.family_shapes", name, str(folder)]
    done = subprocess.run(
        writer + (["--tiny"] if chosen.dry_run else []), cwd=ROOT, env=environment(chosen.threads),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"benchmarks.family_shapes {name} failed:\n{done.stderr}")
    specs = [
        Spec(f"mambax {backend}", "family_memory:FamilyMemory", {"folder": str(folder), "backend": backend})
        for backend in chosen.backends
    ]
    settings = Settings(chosen.threads, rounds=1, least=1, turn_s=0.0, timeout_s=400.0)
    job = {"kind": "memory", "prompts": prompts}
    part.cases = list(compare(name, specs, [job], settings, lambda text: print(f"{name} {text}", file=sys.stderr)))
    part.elapsed_s = time.perf_counter() - start
    return part


def markdown(parts: dict[str, results.Part]) -> list[str]:
    """The results as tables."""
    lines = ["# Memory of every family, on a CPU", "", "Written by `benchmarks/families.py`, not by hand.", ""]
    return [*lines, *table(parts), *origins(parts), "", "## The models", "", *models(parts)]


def models(parts: dict[str, results.Part]) -> list[str]:
    """What the model of each family is, as a list."""
    return [f"- {name}: {part.shape['of']}." for name, part in parts.items()]


def origins(parts: dict[str, results.Part]) -> list[str]:
    """A paragraph for each run: what it measured, where, when and with what."""
    lines: list[str] = []
    runs: dict[tuple[str, str], list[results.Part]] = {}
    for part in parts.values():
        runs.setdefault((part.command, part.date), []).append(part)
    for of_run in runs.values():
        total = replace(of_run[0], elapsed_s=sum(part.elapsed_s for part in of_run))
        lines += ["", f"{', '.join(part.name for part in of_run)}: {report.provenance(total)}"]
    return lines


def update_page(parts: dict[str, results.Part], page: Path = PAGE) -> None:
    """Put the table and the models between the marks of the documentation's page.

    Raises:
        ValueError: when the page has lost its marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}; put them where the table belongs")
    lines = [*table(parts), *origins(parts), "", *models(parts)]
    page.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + after, encoding="utf-8", newline="\n")


def table(parts: dict[str, results.Part]) -> list[str]:
    """A row for each family and backend: megabytes, and the longest prompt against the shortest."""
    prompts = next(iter(parts.values())).cases[0].job["prompts"]
    head = ["family", "backend", "before", "weights", "loading"]
    head += [f"{length:,} tokens" for length, _ in prompts] + ["longest / shortest", "state after the longest"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for name, part in parts.items():
        for entry in part.cases[0].entries:
            backend = entry.label.removeprefix(f"{results.OURS} ")
            if entry.median is None:
                reason = entry.reason.replace("|", "\\|")
                lines.append(f"| {name} | {backend} | {entry.status}: {reason} |" + " |" * (len(head) - 3))
                continue
            row = [name, backend, *_figures(entry, part)]
            lines.append("| " + " | ".join(row) + " |")
    return lines


def _figures(entry: Entry, part: results.Part) -> list[str]:
    lengths = [length for length, _ in part.cases[0].job["prompts"]]
    names = ["before", "weights", "loading", *(f"prompt_{length}" for length in lengths)]
    ratio = growth(entry, part)
    shown = f"{ratio:.3f}"
    if part.shape["flat"] and ratio > FLAT:
        shown = f"**{shown}**"
    state = f"{entry.figures[f'state_{lengths[-1]}'] / 1e6:.1f}"
    return [*(report.memory(entry.figures[name]) for name in names), shown, state]


def growth(entry: Entry, part: results.Part) -> float:
    """Peak memory of the longest prompt as a multiple of that of the shortest."""
    lengths = [length for length, _ in part.cases[0].job["prompts"]]
    return entry.figures[f"prompt_{lengths[-1]}"] / entry.figures[f"prompt_{lengths[0]}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure families; return 1 when something of mambax failed."""
    chosen = _arguments(arguments)
    path = chosen.results / f"{STEM}.json"
    parts = results.load(path)
    shapes = TINY if chosen.dry_run else FAMILIES
    for name in chosen.only:
        with tempfile.TemporaryDirectory(prefix="mambax-benchmarks-") as folder:
            parts[name] = measure(name, shapes[name], chosen, Path(folder))
        parts = {key: parts[key] for key in shapes if key in parts}
        results.save(parts, path)
        page = chosen.results / f"{STEM}.md"
        page.write_text("\n".join(markdown(parts)) + "\n", encoding="utf-8", newline="\n")
        if chosen.results == report.RESULTS and not chosen.dry_run:
            update_page(parts)
    failed = [entry for name in chosen.only for entry in parts[name].cases[0].entries if entry.status == "failed"]
    for entry in failed:
        print(f"{entry.label}: {entry.reason}", file=sys.stderr)
    return int(bool(failed))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description="Memory of every family.")
    parser.add_argument("--only", help=f"families, separated by commas: {', '.join(FAMILIES)}")
    parser.add_argument("--backends", default="numpy,torch", help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--threads", type=int, default=machine.usable_threads(), help="threads of each process")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="the folder to write to")
    chosen = parser.parse_args(arguments)
    known = {"only": TINY if chosen.dry_run else FAMILIES, "backends": BACKENDS}
    chosen.only = ",".join(known["only"]) if chosen.only is None else chosen.only
    for option, names in known.items():
        given = [name.strip() for name in getattr(chosen, option).split(",")]
        unknown = [name for name in given if name not in names]
        if unknown:
            parser.error(f"--{option} has {unknown[0]!r}; expected some of: {', '.join(names)}")
        setattr(chosen, option, given)
    chosen.results = chosen.results.resolve()
    if chosen.threads < 1:
        parser.error(f"--threads is {chosen.threads}; expected at least 1")
    chosen.date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
