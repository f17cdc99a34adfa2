"""mambax on MLX beside mlx-lm and mambapy: ``python -m benchmarks.mlx [--quick | --dry-run] [--device cpu]``.

Runs on MLX's GPU where there is one: on a Mac, this one command. Results go to ``benchmarks/results/mlx.json`` and
``mlx.md``, those of a quick run to ``mlx-quick``; a part that is run replaces its earlier results and leaves the
others. mambapy has no MLX; its training step is on torch, on the CPU.
It wants an otherwise idle machine, and ``pip install 'mambax[mlx]' mlx-lm mambapy psutil``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from benchmarks import machine, mlx_report, results, weights
from benchmarks.harness import Settings, compare
from benchmarks.mlx_parts import PLANS, Context, Plan, parts
from benchmarks.report import RESULTS
from benchmarks.results import Part
from benchmarks.shapes import read_shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 when something of mambax failed."""
    chosen = _arguments(arguments)
    plan: Plan = PLANS[chosen.plan]
    console = Console(stderr=True, highlight=False)
    stem = "mlx" if plan.name == "full" else f"mlx-{plan.name}"
    path = chosen.results / f"{stem}.json"
    found = results.load(path)
    with tempfile.TemporaryDirectory(prefix="mambax-benchmarks-") as made:
        context = _context(plan, chosen.work or Path(made), chosen.device, console)
        for name in chosen.only:
            for part in _measured(name, context, chosen, console):
                found[name] = part  # kept after each case, should it be the last
                results.save({key: found[key] for key in parts(plan) if key in found}, path)
    found = results.load(path)
    for written in mlx_report.write(found, chosen.results, stem):
        print(written)
    if plan.name == "full" and chosen.results == RESULTS:
        mlx_report.update_page(found)
    cases = [case for name in chosen.only for case in found[name].cases]
    failed = [e for case in cases for e in case.entries if e.status == "failed" and e.label.startswith("mambax")]
    for entry in failed:
        console.print(f"{entry.label} failed: {entry.reason}", style="red", markup=False)
    return 1 if failed else 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mlx", description="mambax on MLX beside others.")
    size = parser.add_mutually_exclusive_group()
    for name, words in (("quick", "fewer sizes and rounds"), ("dry-run", "tiny sizes: does it run?")):
        size.add_argument(f"--{name}", dest="plan", action="store_const", const=name, help=words)
    parser.add_argument("--only", default="", help="parts, or the first words of several, separated by commas")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="of MLX; its default one unless named")
    parser.add_argument("--threads", type=int, default=machine.usable_threads(), help="threads of each contender")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    parser.add_argument("--work", type=Path, help="keep the random weights in this folder, for the next run")
    chosen = parser.parse_args(arguments)
    if chosen.threads < 1:
        parser.error(f"--threads is {chosen.threads}; expected at least 1")
    chosen.plan = chosen.plan or "full"
    known = list(parts(PLANS[chosen.plan]))
    words = [word.strip() for word in chosen.only.split(",")] if chosen.only else known
    for word in words:
        if not any(name == word or name.split()[0] == word for name in known):
            parser.error(f"unknown part {word!r}; expected some of: {', '.join(known)}")
    chosen.only = [name for name in known if name in words or name.split()[0] in words]
    chosen.results = chosen.results.resolve()
    chosen.device = chosen.device or _default_device()
    return chosen


def _command(chosen: argparse.Namespace, name: str) -> str:
    words = ["python", "-m", "benchmarks.mlx", *([] if chosen.plan == "full" else [f"--{chosen.plan}"])]
    return shlex.join([*words, "--only", name, "--device", chosen.device, "--threads", str(chosen.threads)])


def _default_device() -> str:
    try:
        from mambax_mlx.host import default_device
    except ImportError as error:
        raise SystemExit(f"MLX cannot be imported ({error}): pip install 'mambax[mlx]'") from error
    return default_device()


def _context(plan: Plan, work: Path, device: str, console: Console) -> Context:
    """The weights of both models, written unless they are there."""
    for shape in dict.fromkeys((plan.shape, plan.long_shape)):
        if not (work / shape / "shape.json").exists():
            console.print(f"writing random weights of {shape}")
            weights.write(work / shape, shape)
    shape = read_shape(work / plan.shape)
    sizes = {"channels": round(shape["expand"] * shape["d_model"]), "states": shape["d_state"]}
    return Context(plan, work / plan.shape, work / plan.long_shape, device, sizes)


def _device(device: str) -> dict[str, object]:
    """The device and what runs each op there."""
    import mlx.core as mx

    import mambax

    mx.set_default_device(getattr(mx, device))
    return {f"mlx {name}": text for name, text in mambax.get_backend("mlx").describe().items()}


def _measured(name: str, context: Context, chosen: argparse.Namespace, console: Console) -> Iterator[Part]:
    """The part, again and again, with one more case."""
    plan, work = context.plan, parts(context.plan)[name](context)
    part = Part(
        name, plan.name, _command(chosen, name), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine.describe() | _device(chosen.device), machine.versions(), chosen.threads,
        read_shape(context.long_folder if work.long else context.folder),
    )  # fmt: skip
    start = time.perf_counter()
    changes = {**plan.settings, **plan.part_settings.get(name.split()[0], {})}
    settings = dataclasses.replace(Settings(chosen.threads), **changes)
    for case in compare(name.split()[0], work.specs, work.jobs, settings, console.print):
        part.cases.append(case)
        part.elapsed_s = time.perf_counter() - start
        console.print("\n".join(mlx_report.case_table(case)))
        yield part


if __name__ == "__main__":
    sys.exit(main())
