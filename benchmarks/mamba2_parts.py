"""The parts of the CPU benchmark about Mamba-2, and about memory: which contenders do which jobs."""

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


def long_prompts(c: Context) -> list[Group]:
    """Memory of loading a model and of reading prompts, of Mamba-2 alone and with attention."""
    once = c.settings(rounds=1, least=1, turn_s=0.0, call_s=180.0, timeout_s=400.0)
    groups = []
    for name, folder in (("mamba2", c.mamba2_folder), ("hybrid", c.hybrid_folder)):
        loading = [
            Spec(f"mambax {backend}", "loading:Loading", {"folder": str(folder), "backend": backend})
            for backend in BACKENDS
        ]
        groups.append(Group(f"{name} loading", loading, [{"kind": "loading"}], once))
        jobs: list[Job] = [
            {"kind": "prefill", "length": n, "precision": "float32", "compare": False, "tiny": {"length": 4}}
            for n in c.plan.long_prompts
        ]
        groups.append(Group(f"{name} memory", _backends(folder, "float32"), jobs, once))
    return groups


def _backends(folder: Path, dtype: str) -> list[Spec]:
    """mambax on every backend."""
    return [model(f"mambax {name}", "mambax", folder, backend=name, dtype=dtype) for name in BACKENDS]
