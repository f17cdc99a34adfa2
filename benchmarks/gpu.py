"""The GPU benchmark: ``python -m benchmarks.gpu [--only scan,decode] [--peers FOLDER] [--dry-run]``.

Runs the tests that need an NVIDIA GPU, compute-sanitizer, and all measurements, and writes ``gpu.json``, ``gpu.md``
and plots to ``benchmarks/results``. It needs PyTorch, the source tree, and no network; nothing has to be installed.
Each part is a process of its own, of five minutes at most (nine for compiling the peers): one that dies costs no
other. Parts that are not run now keep their earlier results. ``--dry-run`` does every part on the CPU, at tiny
sizes, in this process.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, machine, results
from benchmarks.gpu_goals import goals
from benchmarks.gpu_plans import MODELS, PLANS
from benchmarks.harness import Case, Entry
from benchmarks.report import RESULTS, goals_table

LIMIT_S = 300.0
"""Seconds after which a part's process is ended."""

COMPILING_S = 560.0
"""The same for ``peers``, which measures nothing."""

Part = Callable[[Any], Iterator[Case]]


def parts_by_name() -> dict[str, Part]:
    """The parts, in the order in which they are run: what counts most comes first. ``limits`` is part of every run.

    Imports torch.
    """
    from benchmarks import (
        gpu_commands,
        gpu_kernels,
        gpu_models,
        gpu_profile,
        gpu_scan,
        gpu_ssd,
        gpu_training,
        gpu_tuning,
    )

    return {
        "limits": gpu_kernels.limits,
        "tests": gpu_commands.tests,
        "peers": gpu_commands.peers,
        "tune": gpu_tuning.cases,
        "scan": lambda c: gpu_scan.cases(c, backward=False),
        "scan-backward": lambda c: gpu_scan.cases(c, backward=True),
        "decode": gpu_models.decode,
        "prefill": gpu_models.prefill,
        "training": gpu_training.cases,
        "profile": gpu_profile.cases,
        "ssd": gpu_ssd.cases,
        "kernels": gpu_kernels.kernels,
        "long": gpu_kernels.long,
        "million": gpu_models.million,
        "sanitizer": gpu_commands.sanitizer,
    }


NAMES = (
    "limits", "tests", "peers", "tune", "scan", "scan-backward", "decode", "profile", "prefill", "training", "ssd",
    "kernels", "long", "million", "sanitizer",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts; return 1 when something of mambax failed."""
    chosen = _arguments(arguments)
    if chosen.child:
        _measure(chosen, chosen.child, chosen.child_file)
        return 0
    stem = gpu_report.STEM if chosen.plan == "full" else f"{gpu_report.STEM}-{chosen.plan}"
    path = chosen.results / f"{stem}.json"
    parts = results.load(path)
    limits: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mambax-gpu-") as folder:
        if chosen.plan != "full":
            _prepare_dry_run(Path(folder))
        for name in chosen.only:
            print(f"--- {name}", flush=True)
            part = _part(chosen, name, Path(folder))
            if name == "limits":
                limits = results.limits_of(part.cases)
            part.limits = dict(limits)
            parts[name] = part
            parts = {key: parts[key] for key in NAMES if key in parts}
            results.save(parts, path)
            for case in part.cases:
                print("\n".join([gpu_report.title(case), *gpu_report.case_table(case)]), flush=True)
    for written in gpu_report.write(parts, chosen.results, stem):
        print(written)
    if chosen.plan == "full":
        print("\n".join(goals_table(goals({name: parts[name] for name in chosen.only}))))
    return _failures({name: parts[name] for name in chosen.only})


def _prepare_dry_run(folder: Path) -> None:
    """Parts run in this process: it needs mambax, and Triton's interpreter before anything imports Triton."""
    from benchmarks.gpu_commands import use_source_tree

    use_source_tree(folder)
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="mambax beside others, on a GPU.")
    parser.add_argument("--only", default=",".join(NAMES), help=f"parts, separated by commas: {', '.join(NAMES)}")
    parser.add_argument("--peers", type=Path, help="a folder with source distributions to compile and compare with")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    parser.add_argument(
        "--dry-run", dest="plan", action="store_const", const="dry-run", default="full",
        help="tiny sizes on the CPU: does it run?",
    )  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the part that this process measures
    parser.add_argument("--child-file", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    names = [name.strip() for name in chosen.only.split(",")]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; expected some of: {', '.join(NAMES)}")
    if chosen.peers is not None and not chosen.peers.is_dir():
        parser.error(f"--peers: there is no folder {chosen.peers}")
    chosen.only = [name for name in NAMES if name in names or name == "limits"]
    chosen.results = chosen.results.resolve()
    chosen.peers = None if chosen.peers is None else chosen.peers.resolve()
    return chosen


def _command(chosen: argparse.Namespace) -> str:
    """The command that measures the same; folders are not part of it."""
    words = ["python", "-m", "benchmarks.gpu"]
    if chosen.only != list(NAMES):
        words += ["--only", ",".join(chosen.only)]
    words += ["--peers", "FOLDER"] if chosen.peers is not None else []
    return shlex.join(words + ([] if chosen.plan == "full" else [f"--{chosen.plan}"]))


def _part(chosen: argparse.Namespace, name: str, folder: Path) -> results.Part:
    """A part, measured in a process of its own unless this is a dry run."""
    file = folder / f"{name}.json"
    if chosen.plan != "full":
        _measure(chosen, name, file)
        return results.load(file)[name]
    from benchmarks.gpu_commands import environment, finished

    peers = [] if chosen.peers is None else ["--peers", str(chosen.peers)]
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, "--child-file", str(file), *peers]
    start = time.perf_counter()
    limit = COMPILING_S if name == "peers" else LIMIT_S
    try:
        done = finished(command, limit, environment(folder))
        lines = done.stderr.strip().splitlines() or ["nothing on standard error"]
        lost = f"its process ended with status {done.returncode}: {lines[-1][:300]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        lost = f"its process was stopped after {limit:.0f} s"
    part = results.load(file).get(name) or _empty(chosen, name)
    part.command = _command(chosen)
    part.elapsed_s = time.perf_counter() - start
    if lost:
        part.cases.append(
            Case(name, {"kind": "part"}, [Entry(f"{results.OURS}: the rest of {name}", "failed", lost)])
        )
    return part


def _empty(chosen: argparse.Namespace, name: str) -> results.Part:
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    described = {"gpu": "not asked", **machine.describe()}
    return results.Part(
        name, chosen.plan, _command(chosen), date, described, machine.versions(), machine.usable_threads(), {}
    )


def _measure(chosen: argparse.Namespace, name: str, file: Path) -> None:
    """Measure a part in this process; the file has every case as soon as it is done."""
    import torch

    from benchmarks.gpu_context import Context
    from benchmarks.gpu_rivals import Arena
    from benchmarks.gpu_timing import Clock, describe

    plan = PLANS[chosen.plan]
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: there is no NVIDIA GPU that PyTorch can use; --dry-run does without")
    part = _empty(chosen, name)
    part.machine |= describe()
    if name == "prefill":
        part.shape = _shape(plan.prefill[0])
    results.save({name: part}, file)
    start = time.perf_counter()
    arena = Arena(Clock(plan.device), plan.pace, lambda text: print(text, file=sys.stderr, flush=True))
    for case in parts_by_name()[name](Context(plan, arena, chosen.peers)):
        part.cases.append(case)
        part.elapsed_s = time.perf_counter() - start
        results.save({name: part}, file)


def _shape(name: str) -> dict[str, Any]:
    from mambax import MambaLMConfig

    config = MambaLMConfig(**MODELS[name])
    return asdict(config) | {"dt_rank": int(config.dt_rank)}


def _failures(parts: dict[str, results.Part]) -> int:
    """1 when something of mambax failed in these parts, with what it said."""
    failed = [
        (name, case, entry)
        for name, part in parts.items()
        for case in part.cases
        for entry in case.entries
        if entry.status == "failed" and entry.label.startswith(results.OURS)
    ]
    for name, case, entry in failed:
        print(f"{name}, {gpu_report.title(case)}: {entry.label} {entry.reason}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
