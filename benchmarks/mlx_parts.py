"""The parts of the MLX benchmark: which contenders do which jobs, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.contender import Job, Spec

Precision = str | int
"""``"float32"``, ``"bfloat16"``, or the bits of quantised weights."""


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Args:
        name: of the plan; part of the names of the results, unless it is the full one.
        shape: of the model, in :data:`benchmarks.shapes.SHAPES`.
        scans: lengths of the scan by itself, at the model's sizes.
        prompts: lengths of prompts.
        long_shape: of the model that reads long prompts.
        long_prompts: their lengths.
        steps: tokens of one run of decoding.
        training: batch and length of a training step.
        precisions: of prefill and decoding.
        settings: of the harness.
        part_settings: further settings of a part, by its name.
    """

    name: str
    shape: str
    scans: tuple[int, ...]
    prompts: tuple[int, ...]
    long_shape: str
    long_prompts: tuple[int, ...]
    steps: int
    training: tuple[int, int]
    precisions: tuple[Precision, ...]
    settings: Mapping[str, float]
    part_settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


LONG = {"rounds": 1, "least": 1, "call_s": 15.0, "timeout_s": 300.0}
PLANS = {
    "full": Plan("full", "mamba-130m", (512,), (512, 2048), "small", (1000, 4000, 16000, 100_000), 32, (1, 128),
                 ("float32", "bfloat16", 8, 4), {"call_s": 40.0},
                 {"prefill": {"rounds": 3, "least": 1, "contender_s": 4.0},
                  "decode": {"rounds": 3, "contender_s": 6.0}, "memory": LONG}),
    "quick": Plan("quick", "mamba-130m", (512,), (32, 512), "small", (1000, 4000), 8, (1, 64), ("float32", 4),
                  {"rounds": 2, "least": 1, "contender_s": 4.0, "call_s": 8.0}, {"memory": LONG}),
    "dry-run": Plan("dry-run", "small", (5,), (5,), "small", (6, 9), 2, (1, 6), ("float32", 4),
                    {"rounds": 1, "least": 1, "turn_s": 0.0, "pause_s": 0.0}),
}  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What the parts of a run have in common.

    Args:
        plan: sizes and durations.
        folder: the weights of the plan's model.
        long_folder: the weights of the plan's model for long prompts.
        device: of MLX.
        sizes: ``channels`` and ``states`` of the model.
    """

    plan: Plan
    folder: Path
    long_folder: Path
    device: str
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """Contenders that take turns at some jobs. ``long`` says which weights they have."""

    specs: Sequence[Spec]
    jobs: Sequence[Job]
    long: bool = False


def scan(c: Context) -> Work:
    """The selective scan by itself: mambax's ops, and a loop over tokens as mlx-lm has it.

    On a GPU also with its gradients, and beside mambax's Triton kernels on torch, where it is one of NVIDIA's.
    """
    specs = [
        Spec(f"{label} {c.device}", "mlx_scan:ScanOnMlx", {"package": package, "device": c.device})
        for label, package in (("mambax mlx", "mambax"), ("mlx-lm's loop", "mlx-lm"))
    ]
    if c.device == "gpu":
        specs.append(Spec("mambax torch triton", "mlx_scan:TritonScan"))
    passes = ("forward", "backward") if c.device == "gpu" else ("forward",)
    jobs = [
        {"kind": kind, "length": n, "size": n, **c.sizes, "backward": kind == "backward"}
        for kind in passes
        for n in c.plan.scans
    ]
    return Work(specs, jobs)


def prefill(c: Context, precision: Precision) -> Work:
    """Reading prompts."""
    named = {**_named(precision), "compare": False}
    jobs = [{"kind": "prefill", "length": n, "size": n, "tiny": {"length": 4}, **named} for n in c.plan.prompts]
    return Work(_models(c, c.folder, precision), jobs)


def decode(c: Context, precision: Precision) -> Work:
    """Writing tokens."""
    job = {"kind": "decode", "batch": 1, "steps": c.plan.steps, "size": 1, **_named(precision), "compare": False}
    return Work(_models(c, c.folder, precision), [job])


def memory(c: Context) -> Work:
    """Long prompts through a small model: time, the memory of MLX beyond the weights, and the size of the graph."""
    specs = list(_models(c, c.long_folder, "float32"))
    options = {**specs[1].options, "package": "mlx-lm, one call"}
    specs.append(Spec(f"mlx-lm {c.device} (one call)", specs[1].factory, options))
    jobs = [{"kind": "long", "length": n, "size": n, "tiny": {"length": 4}} for n in c.plan.long_prompts]
    return Work(specs, jobs, long=True)


def training(c: Context) -> Work:
    """A training step in float32, mambapy's on torch beside it."""
    batch, length = c.plan.training
    job = {"kind": "training", "batch": batch, "length": length, "size": batch * length, "tiny": {"length": 4}}
    peer = Spec(
        "mambapy torch cpu", "training:Training", {"package": "mambapy", "folder": str(c.folder)}, ("training",)
    )
    return Work([*_models(c, c.folder, "float32"), peer], [{**job, **_named("float32"), "compare": False}])


def parts(plan: Plan) -> dict[str, Callable[[Context], Work]]:
    """Every part of a plan by name, those of several precisions once for each."""
    found: dict[str, Callable[[Context], Work]] = {"scan": scan}
    for name, make in (("prefill", prefill), ("decode", decode)):
        for precision in plan.precisions:
            words = _named(precision)["precision"]
            found[f"{name} {words}"] = lambda c, make=make, precision=precision: make(c, precision)
    return {**found, "memory": memory, "training": training}


def _named(precision: Precision) -> dict[str, str]:
    return {"precision": precision if isinstance(precision, str) else f"{precision} bits"}


def _models(c: Context, folder: Path, precision: Precision) -> list[Spec]:
    """mambax and mlx-lm on MLX's device."""
    bits = precision if isinstance(precision, int) else None
    options = {"folder": str(folder), "dtype": "float32" if bits else precision, "bits": bits, "device": c.device}
    return [
        Spec(f"{label} {c.device}", "mlx_models:OnMlx", {"package": package, **options})
        for label, package in (("mambax mlx", "mambax"), ("mlx-lm", "mlx-lm"))
    ]
