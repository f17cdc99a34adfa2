"""The CPU benchmark: ``python -m benchmarks.cpu [--only scan,prefill] [--quick | --dry-run]``.

Results go to ``benchmarks/results``: ``cpu.json``, ``cpu.md`` and plots; those of a quick run to ``cpu-quick``.
Parts that are not run now keep their earlier results. It wants an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from benchmarks import machine, report, results
from benchmarks.goals import goals
from benchmarks.harness import Case, compare
from benchmarks.parts import PARTS, Context
from benchmarks.plans import PLANS
from benchmarks.processes import ROOT, environment
from benchmarks.shapes import SHAPES, read_shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts; return 1 when something of mambax failed."""
    chosen = _arguments(arguments)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 160
    plan = PLANS[chosen.plan]
    stem = report.STEM if plan.name == "full" else f"{report.STEM}-{plan.name}"
    path = chosen.results / f"{stem}.json"
    parts = results.load(path)
    ordered = parts
    with _folder(chosen.work) as folder, Status("", console=console) as status:
        context = Context(plan, chosen.threads, folder / plan.model, folder / plan.long_model)
        for target in {target: None for name in chosen.only for target in context.folders(name)}:
            _weights(target, chosen.threads, status, console)
        limits: dict[str, float] = {}
        for name in chosen.only:
            part = _new_part(name, context, _command(chosen), limits)
            start = time.perf_counter()
            for case in _cases(name, context, status, console):
                part.cases.append(case)
                _show(case, part, console)
            part.elapsed_s = time.perf_counter() - start
            if name == "limits":
                limits.update(results.limits_of(part.cases))
            if part.cases:
                parts[name] = part
            ordered = {key: parts[key] for key in PARTS if key in parts}
            results.save(ordered, path)
            console.print(f"[bold]{name}[/bold]: {part.elapsed_s:.0f} s")
    for written in report.write(ordered, chosen.results, stem):
        console.print(str(written), highlight=False)
    if plan.name == "full" and chosen.results == report.RESULTS:
        report.update_page(ordered)
    if plan.name != "dry-run":
        _show_goals({name: ordered[name] for name in chosen.only if name in ordered}, console)
    return _failures(parts, chosen.only, console)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="mambax beside others, on a CPU.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="plan", action="store_const", const="quick", help="fewer sizes and rounds")
    size.add_argument(
        "--dry-run", dest="plan", action="store_const", const="dry-run", help="tiny sizes: does it run?"
    )
    parser.add_argument("--threads", type=int, default=machine.usable_threads(), help="threads of each contender")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="the folder to write to")
    parser.add_argument("--work", type=Path, help="keep the random weights in this folder, for the next run")
    chosen = parser.parse_args(arguments)
    names = [name.strip() for name in chosen.only.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; expected some of: {', '.join(PARTS)}")
    if chosen.threads < 1:
        parser.error(f"--threads is {chosen.threads}; expected at least 1")
    chosen.only = [name for name in PARTS if name in names or name == "limits"]
    chosen.plan = chosen.plan or "full"
    chosen.results = chosen.results.resolve()
    return chosen


def _command(chosen: argparse.Namespace) -> str:
    """The command that measures the same; where the results went is not part of it."""
    words = ["python", "-m", "benchmarks.cpu", "--threads", str(chosen.threads)]
    if chosen.only != list(PARTS):
        words += ["--only", ",".join(chosen.only)]
    return shlex.join(words + ([] if chosen.plan == "full" else [f"--{chosen.plan}"]))


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        yield work.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="mambax-benchmarks-") as folder:
        yield Path(folder)


def _weights(folder: Path, threads: int, status: Status, console: Console) -> None:
    """Write random weights for every contender, unless they are there."""
    if (folder / "done").exists():
        return
    status.update(f"writing random weights of {folder.name}")
    commands = [["benchmarks.weights", str(folder), folder.name]]
    if "layer_types" not in SHAPES[folder.name]:  # the others are not given to llama.cpp
        commands.append(["benchmarks.gguf_files", str(folder)])
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment(threads), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.stdout:
            console.print(done.stdout.strip(), style="yellow", highlight=False, markup=False)
        if done.returncode and command[0] == "benchmarks.weights":
            raise SystemExit(f"benchmarks.weights failed:\n{done.stderr}")
        if done.returncode:  # llama.cpp alone goes without
            console.print(f"no GGUF files:\n{done.stderr}", style="red", highlight=False, markup=False)
    (folder / "done").touch()


def _new_part(name: str, context: Context, command: str, limits: dict[str, float]) -> results.Part:
    folders = context.folders(name)
    shape: dict[str, Any] = read_shape(folders[0]) if folders else {}
    return results.Part(
        name, context.plan.name, command, datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine.describe(), machine.versions(), context.threads, shape, dict(limits),
    )  # fmt: skip


def _cases(name: str, context: Context, status: Status, console: Console) -> Iterator[Case]:
    groups = PARTS[name](context)
    for number, group in enumerate(groups):
        console.rule(f"{name}: {group.name}, {number + 1} of {len(groups)}", align="left")

        def progress(text: str, title: str = group.name) -> None:
            status.update(f"{title}: {text}")

        yield from compare(group.name, group.specs, group.jobs, group.settings, progress)


def _show(case: Case, part: results.Part, console: Console) -> None:
    """A case as a short table."""
    table = Table(title=report.title(case), title_justify="left", box=None, pad_edge=False)
    for column in ("", "median", "quartiles", "of the limit", "working MB", "error", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for entry in case.entries:
        if entry.median is None:
            table.add_row(entry.label, "", "", "", "", "", f"{entry.status}: {entry.reason}", style="dim")
            continue
        least = results.bound(case, entry, part)
        spread = f"{report.duration(entry.seconds['q1'])} to {report.duration(entry.seconds['q3'])}"
        share = "" if least is None else f"{100 * least / entry.median:.0f} %"
        error = f"{entry.figures['error']:.1e}" if "error" in entry.figures else ""
        working = report.memory(entry.figures.get("working"))
        style = "bold" if entry.label.startswith(results.OURS) else ""
        table.add_row(entry.label, report.duration(entry.median), spread, share, working, error, "", style=style)
    console.print(table)


def _show_goals(parts: dict[str, results.Part], console: Console) -> None:
    table = Table("goal", "found", "should be", "reached", box=None, pad_edge=False)
    styles = {True: ("yes", "green"), False: ("no", "red"), None: ("not measured", "dim")}
    for goal in goals(parts):
        word, style = styles[goal.reached]
        found = "" if goal.found is None else f"{goal.found:.3g}"
        table.add_row(goal.about, found, f"{goal.bound[0]} {goal.bound[1]:.3g}", word, style=style)
    console.print(table)


def _failures(parts: dict[str, results.Part], names: Sequence[str], console: Console) -> int:
    """1 when a contender of mambax crashed in one of these parts, with what it said."""
    failed = [
        (case, entry)
        for name in names
        if name in parts
        for case in parts[name].cases
        for entry in case.entries
        if entry.status == "failed" and entry.label.startswith(results.OURS)
    ]
    for case, entry in failed:
        console.print(
            f"{report.title(case)}: {entry.label} {entry.reason}", style="red", highlight=False, markup=False
        )
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
