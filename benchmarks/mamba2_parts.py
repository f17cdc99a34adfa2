"""The parts of the CPU benchmark about Mamba-2: which contenders do which jobs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contender import Job, Spec
from benchmarks.parts import Context, Group, model

BACKENDS = ("torch", "numpy", "mlx")


def prefill(c: Context) -> list[Group]:
    """Mamba-2 beside transformers: reading a prompt."""
    jobs: list[Job] = [{"kind": "prefill", "length": n, "size": n, "tiny": {"length": 4}} for n in c.plan.prompts]
    return _beside_transformers(c, jobs)


def decode(c: Context) -> list[Group]:
    """Mamba-2 beside transformers: decoding greedily."""
    return _beside_transformers(c, [{"kind": "decode", "batch": n, "steps": c.plan.steps} for n in c.plan.batches])


def _beside_transformers(c: Context, jobs: list[Job]) -> list[Group]:
    groups = []
    for dtype in c.plan.dtypes:
        specs = _backends(c.mamba2_folder, dtype)
        specs.append(model("transformers", "transformers", c.mamba2_folder, dtype=dtype))
        groups.append(Group("mamba2", specs, [{**job, "precision": dtype} for job in jobs], c.settings()))
    return groups


def _backends(folder: Path, dtype: str) -> list[Spec]:
    """mambax on every backend."""
    return [model(f"mambax {name}", "mambax", folder, backend=name, dtype=dtype) for name in BACKENDS]
