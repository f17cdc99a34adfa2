"""mambax on MLX beside mlx-lm and mambapy: ``python -m benchmarks.mlx [--quick | --dry-run] [--device cpu]``.

Runs on MLX's GPU where there is one: on a Mac, this one command. Results go to ``benchmarks/results/mlx.json`` and
``mlx.md``; those of a quick run to ``mlx-quick``. mambapy has no MLX; it runs on torch, on the CPU.
It wants an otherwise idle machine, and ``pip install 'mambax[mlx]' mlx-lm mambapy psutil``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, results, weights
from benchmarks.contender import Job, Spec
from benchmarks.harness import Case, Settings, compare
from benchmarks.report import RESULTS, duration
from benchmarks.results import Part
from benchmarks.shapes import read_shape


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Args:
        name: of the plan; part of the names of the results, unless it is the full one.
        shape: of the model, in :data:`benchmarks.shapes.SHAPES`.
        prompts: lengths of prompts.
        steps: tokens of one run of decoding.
        training: batch and length of a training step.
        precisions: ``"float32"``, ``"bfloat16"``, or the bits of quantised weights.
        settings: of the harness.
    """

    name: str
    shape: str
    prompts: tuple[int, ...]
    steps: int
    training: tuple[int, int]
    precisions: tuple[str | int, ...]
    settings: dict[str, float]


PLANS = {
    "full": Plan("full", "mamba-130m", (64, 512, 2048, 16384), 32, (4, 256), ("float32", "bfloat16", 8, 4),
                 {"call_s": 60.0}),
    "quick": Plan("quick", "mamba-130m", (32, 512), 8, (1, 64), ("float32", 4),
                  {"rounds": 2, "least": 1, "contender_s": 4.0, "call_s": 8.0}),
    "dry-run": Plan("dry-run", "small", (5,), 2, (1, 6), ("float32", 4),
                    {"rounds": 1, "least": 1, "turn_s": 0.0, "pause_s": 0.0}),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 when something of mambax failed."""
    chosen = _arguments(arguments)
    plan: Plan = PLANS[chosen.plan]
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="mambax-benchmarks-") as made:
        folder = (chosen.work or Path(made)) / plan.shape
        if not (folder / "shape.json").exists():
            console.print(f"writing random weights of {plan.shape}")
            weights.write(folder, plan.shape)
        part = Part(
            "mlx", plan.name, _command(chosen), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            machine.describe() | _device(chosen.device), machine.versions(), chosen.threads, read_shape(folder),
        )  # fmt: skip
        start = time.perf_counter()
        settings: dict[str, Any] = {"threads": chosen.threads, **plan.settings}
        for precision in plan.precisions:
            specs, jobs = _specs(folder, precision, chosen.device), _jobs(plan, precision)
            for case in compare("mlx", specs, jobs, Settings(**settings), console.print):
                part.cases.append(case)
                console.print("\n".join(_table(case)))
        part.elapsed_s = time.perf_counter() - start
    stem = "mlx" if plan.name == "full" else f"mlx-{plan.name}"
    results.save({"mlx": part}, chosen.results / f"{stem}.json")
    page = chosen.results / f"{stem}.md"
    page.write_text(_page(part), encoding="utf-8")
    print(page)
    failed = [e for case in part.cases for e in case.entries if e.status == "failed" and "mambax" in e.label]
    for entry in failed:
        console.print(f"{entry.label} failed: {entry.reason}", style="red", markup=False)
    return 1 if failed else 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mlx", description="mambax on MLX beside others.")
    size = parser.add_mutually_exclusive_group()
    for name, words in (("quick", "fewer sizes and rounds"), ("dry-run", "tiny sizes: does it run?")):
        size.add_argument(f"--{name}", dest="plan", action="store_const", const=name, help=words)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="of MLX; its default one unless named")
    parser.add_argument("--threads", type=int, default=machine.usable_threads(), help="threads of each contender")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    parser.add_argument("--work", type=Path, help="keep the random weights in this folder, for the next run")
    chosen = parser.parse_args(arguments)
    if chosen.threads < 1:
        parser.error(f"--threads is {chosen.threads}; expected at least 1")
    chosen.plan = chosen.plan or "full"
    chosen.device = chosen.device or _default_device()
    return chosen


def _command(chosen: argparse.Namespace) -> str:
    plan = "" if chosen.plan == "full" else f" --{chosen.plan}"
    return f"python -m benchmarks.mlx{plan} --device {chosen.device} --threads {chosen.threads}"


def _default_device() -> str:
    try:
        from mambax_mlx.host import default_device
    except ImportError as error:
        raise SystemExit(f"MLX cannot be imported ({error}): pip install 'mambax[mlx]'") from error
    return default_device()


def _device(device: str) -> dict[str, object]:
    """The device and what runs each op there."""
    import mlx.core as mx

    import mambax

    mx.set_default_device(getattr(mx, device))
    return {f"mlx {name}": text for name, text in mambax.get_backend("mlx").describe().items()}


def _specs(folder: Path, precision: str | int, device: str) -> list[Spec]:
    """mambax and mlx-lm; mambapy as well in float32."""
    bits = precision if isinstance(precision, int) else None
    options = {"folder": str(folder), "dtype": "float32" if bits else precision, "bits": bits, "device": device}
    specs = [
        Spec(f"{label} {device}", "mlx_models:OnMlx", {"package": package, **options}, _kinds(bits, precision))
        for label, package in (("mambax mlx", "mambax"), ("mlx-lm", "mlx-lm"))
    ]
    if precision != "float32":
        return specs
    runner = {"runner": "mambapy", "folder": str(folder), "dtype": "float32"}
    training = {"package": "mambapy", "folder": str(folder)}
    return [
        *specs,
        Spec("mambapy torch cpu", "language_models:Model", runner, ("prefill", "decode")),
        Spec("mambapy torch cpu (training)", "training:Training", training, ("training",)),
    ]


def _kinds(bits: int | None, precision: str | int) -> tuple[str, ...]:
    return ("prefill", "decode", "training") if bits is None and precision == "float32" else ("prefill", "decode")


def _jobs(plan: Plan, precision: str | int) -> list[Job]:
    named = {"precision": precision if isinstance(precision, str) else f"{precision} bits", "compare": False}
    jobs: list[Job] = [
        {"kind": "prefill", "length": n, "size": n, "tiny": {"length": 4}, **named} for n in plan.prompts
    ]
    jobs.append({"kind": "decode", "batch": 1, "steps": plan.steps, "size": 1, **named})
    if precision == "float32":
        batch, length = plan.training
        tiny = {"length": 4}
        jobs.append(
            {"kind": "training", "batch": batch, "length": length, "size": batch * length, "tiny": tiny, **named}
        )
    return jobs


def _table(case: Case) -> list[str]:
    """Time for one token, or for one training step, of every contender."""
    job = case.job
    size = f"{job['length']} tokens" if "length" in job else f"{job['steps']} tokens"
    unit = "step" if job["kind"] == "training" else "token"
    lines = [
        f"## {job['kind']}, {size}, {job['precision']}",
        "",
        f"| | median per {unit} | first run | MLX peak, MB |",
    ]
    lines.append("| --- | ---: | ---: | ---: |")
    for entry in case.entries:
        if entry.status != "ok":
            lines.append(f"| {entry.label} | {entry.status}: {entry.reason} | | |")
            continue
        peak = entry.figures.get("mlx_peak")
        first = duration(entry.figures["first"])
        held = "" if peak is None else f"{peak / 1e6:.0f}"
        lines.append(f"| {entry.label} | {duration(entry.median)} | {first} | {held} |")
    return [*lines, ""]


def _page(part: Part) -> str:
    about = [f"- {name}: {value}" for name, value in {**part.machine, **part.versions}.items()]
    head = [f"# MLX, {part.date}", "", f"`{part.command}`, {part.threads} threads, {part.elapsed_s:.0f} s.", ""]
    return "\n".join([*head, *about, "", *(line for case in part.cases for line in _table(case))]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
