"""The parts of the CPU benchmark: which contenders do which jobs.

A part is a list of groups; the contenders of a group take turns. The first of a case are always those of mambax.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contender import Job, Spec
from benchmarks.harness import Settings
from benchmarks.plans import Plan
from benchmarks.shapes import SHAPES

FLOATS = ("float32", "bfloat16")
LIBRARIES = ("numpy", "torch", "torch packed")


@dataclass(frozen=True)
class Context:
    """What the groups of a run have in common.

    Args:
        plan: sizes and durations.
        threads: of every contender.
        folder: the weights of the plan's model.
        long_folder: the weights of the plan's small model.
    """

    plan: Plan
    threads: int
    folder: Path
    long_folder: Path

    @property
    def mamba2_folder(self) -> Path:
        """The weights of the plan's Mamba-2, beside those of its model."""
        return self.folder.parent / self.plan.mamba2

    def folders(self, part: str) -> list[Path]:
        """The weights that a part takes, first those whose shape its results name; none without models."""
        if part.startswith("mamba2"):
            return [self.mamba2_folder]
        return [self.folder, self.long_folder] if part in NEED_WEIGHTS else []

    def settings(self, **changes: Any) -> Settings:
        """The plan's settings, with changes."""
        p = self.plan
        base = Settings(self.threads, p.rounds, p.least, p.turn_s, p.contender_s, p.call_s)
        return dataclasses.replace(base, **changes)


@dataclass(frozen=True)
class Group:
    """Contenders that take turns at some jobs."""

    name: str
    specs: list[Spec]
    jobs: list[Job]
    settings: Settings = field(default_factory=lambda: Settings(1))


def limits(c: Context) -> list[Group]:
    """What the machine can do at most."""
    p, threads = c.plan, {"threads": c.threads}
    reading = [Spec(f"{way}", "limits:Memory", {"way": way, **threads}, ("read",)) for way in ("kernel", "dot")]
    copying = [Spec("copy", "limits:Memory", {"way": "copy", **threads}, ("copy",))]
    jobs: list[Job] = [{"kind": kind, "bytes": p.memory_bytes} for kind in ("read", "copy")]
    groups = [Group("limits memory", reading + copying, jobs, c.settings())]
    for dtype in FLOATS:
        specs = [
            Spec(library, "limits:Products", {"library": library, "dtype": dtype})
            for library in LIBRARIES
            if library != "numpy" or dtype == "float32"
        ]
        groups.append(Group(f"limits products {dtype}", specs, [{"kind": "product", "side": p.side}], c.settings()))
    ways = [Spec(way, "limits:Exponentials", {"way": way, **threads}) for way in ("numpy", "torch", "C")]
    jobs = [{"kind": "exponentials", "count": p.exponentials}]
    return [*groups, Group("limits exponentials", ways, jobs, c.settings())]


def _scan(backend: str, impl: str) -> Spec:
    return Spec(f"mambax {backend} {impl}", "scan:Mambax", {"backend": backend, "impl": impl})


def _scan_job(plan: Plan, kind: str, **changes: int) -> Job:
    job = {"length": plan.length, "channels": plan.channels, "states": plan.states} | changes
    size = job["length"] * job["channels"] * job["states"]
    return {"kind": kind, "backward": kind == "backward", **job, "size": size, "tiny": {"length": 8}}


def scan(c: Context) -> list[Group]:
    """The scan beside others at one size, and mambax's own over the sizes; forward, and with gradients."""
    p = c.plan
    ours = [_scan("numpy", "cpu"), _scan("torch", "cpu")]
    slower = [_scan("torch", impl) for impl in ("sequential", "pscan", "logcumsumexp")]
    peers = [
        Spec("C loop", "scan:CLoop", {"threads": c.threads}, ("forward",)),
        Spec("torch loop", "scan:TorchLoop"),
        Spec("mambapy pscan", "scan:Mambapy"),
    ]
    mlx = [dataclasses.replace(_scan("mlx", impl), kinds=("forward",)) for impl in ("cpu", "pscan")]
    groups = [Group("scan", [*ours, *peers, *slower, *mlx], [_scan_job(p, k)], c.settings()) for k in KINDS]
    for kind in KINDS:
        followed = [_scan("torch", "cpu"), *slower]
        lengths = [_scan_job(p, kind, length=length) for length in p.lengths]
        brief = c.settings(contender_s=0.4 * p.contender_s, call_s=0.4 * p.call_s, rounds=min(p.rounds, 3), least=1)
        groups.append(Group("scan by length", followed, lengths, brief))
        followed = [_scan("torch", "cpu"), _scan("torch", "sequential"), _scan("torch", "pscan")]
        states = [_scan_job(p, kind, states=states) for states in sorted({p.states, *p.other_states})]
        channels = [_scan_job(p, kind, channels=n) for n in sorted({p.channels, *p.other_channels})]
        if p.other_states:
            groups.append(Group("scan by d_state", followed, states, brief))
        if p.other_channels:
            groups.append(Group("scan by d_inner", followed, channels, brief))
    return groups


KINDS = ("forward", "backward")


def model(label: str, runner: str, folder: Path, **options: Any) -> Spec:
    """A language model as a contender; see :class:`benchmarks.contenders.language_models.Model`."""
    return Spec(label, "language_models:Model", {"runner": runner, "folder": str(folder), **options})


def _floating(c: Context, dtype: str) -> list[Spec]:
    """Contenders with weights of a floating-point dtype."""
    ours = [
        model(f"mambax {name}", "mambax", c.folder, backend=name, dtype=dtype) for name in ("torch", "numpy", "mlx")
    ]
    peers = [
        model("transformers", "transformers", c.folder, dtype=dtype),
        model("transformers + mambapy", "transformers", c.folder, dtype=dtype, mambapy=True),
        model("mambapy", "mambapy", c.folder, dtype=dtype),
        model("mlx-lm", "mlx-lm", c.folder, dtype=dtype),
    ]
    peers[1] = dataclasses.replace(peers[1], kinds=("prefill",))  # its decoding is transformers'
    if dtype != "float32":
        peers = [peers[0], peers[3]]
    alone = [
        Spec(
            f"products alone, {library}", "model_products:ModelProducts",
            {"folder": str(c.folder), "library": library, "dtype": dtype}, ("prefill",),
        )
        for library in LIBRARIES
        if library != "numpy" or dtype == "float32"
    ]  # fmt: skip
    return ours + peers + _llama(c, {"float32": ["F32"], "bfloat16": ["BF16"]}[dtype]) + alone


def _quantised(c: Context, bits: int) -> list[Spec]:
    """Contenders with quantised weights. mambax keeps the others in float32."""
    ours = [
        model(f"mambax {name}", "mambax", c.folder, backend=name, dtype="float32", quantize=f"int{bits}")
        for name in ("torch", "numpy")
    ]
    peers = [model("mlx-lm", "mlx-lm", c.folder, dtype="float32", bits=bits)]
    return ours + peers + _llama(c, {8: ["Q8_0"], 4: ["Q4_0", "Q4_K_M"]}[bits])


def _llama(c: Context, kinds: list[str]) -> list[Spec]:
    specs = []
    for kind in kinds:
        options = {"kind": kind, "threads": c.threads}
        specs.append(model(f"llama.cpp {kind}", "llama.cpp", c.folder, **options))
        if os.environ.get("LLAMA_BENCH"):
            bench = {"folder": str(c.folder), **options}
            specs.append(Spec(f"llama-bench {kind}", "llama_cpp_models:LlamaBench", bench))
    return specs


def _precisions(c: Context, kind: str, jobs: Sequence[Job]) -> list[Group]:
    """A group for each precision."""
    p = {dtype: _floating(c, dtype) for dtype in FLOATS} | {f"int{bits}": _quantised(c, bits) for bits in (8, 4)}
    return [
        Group(kind, specs, [{**job, "precision": name} for job in jobs], c.settings()) for name, specs in p.items()
    ]


def prefill(c: Context) -> list[Group]:
    """Reading a prompt, up to the logits of the next token; a group for each precision."""
    jobs = [{"kind": "prefill", "length": n, "size": n, "tiny": {"length": 4}} for n in c.plan.prompts]
    return _precisions(c, "prefill", jobs)


def decode(c: Context) -> list[Group]:
    """Decoding greedily, for one row and for several; a group for each precision."""
    jobs = [{"kind": "decode", "batch": n, "steps": c.plan.steps, "size": n} for n in c.plan.batches]
    return _precisions(c, "decode", jobs)


def compiled(c: Context) -> list[Group]:
    """Prefill beside transformers under torch.compile, whose compiling, in the first run, takes minutes."""
    if not c.plan.compiled:
        return []
    specs = [
        model("mambax torch", "mambax", c.folder, backend="torch", dtype="float32"),
        model("mambax torch compiled", "mambax", c.folder, backend="torch", dtype="float32", compiled=True),
        model("transformers compiled", "transformers", c.folder, dtype="float32", compiled=True),
    ]
    length = c.plan.prompts[0]
    job = {"kind": "prefill", "length": length, "precision": "float32", "compare": False}  # or it compiles again
    return [Group("compiled", specs, [job], c.settings(timeout_s=420.0))]


def flat(c: Context) -> list[Group]:
    """Time and memory of a step from the first token to the last of very many: every one of them decoded by a small
    model, and read by the other one between a few places where steps are timed."""
    steps = c.plan.flat_steps
    specs = [
        model(f"mambax {name}", "mambax", c.long_folder, backend=name, dtype="float32")
        for name in ("numpy", "torch")
    ]
    job = {"kind": "flat", "batch": 1, "steps": steps, "windows": 20}
    settings = c.settings(rounds=1, least=1, turn_s=0.0, timeout_s=600.0)
    positions = [n for n in (16, 1000, 10_000, 100_000) if n < steps] + [steps]
    reach = {"kind": "reach", "steps": steps, "positions": positions, "window": 4 * c.plan.steps}
    large = [
        model(f"mambax {name}", "mambax", c.folder, backend=name, dtype="float32") for name in ("numpy", "torch")
    ]
    return [Group("flat", specs, [job], settings), Group("flat, shape of the others", large, [reach], settings)]


def training(c: Context) -> list[Group]:
    """A training step on torch."""
    p = c.plan
    batch, length = p.training
    shape = SHAPES[p.model]
    every_state = batch * length * 2 * shape["d_model"] * p.states * 4 * shape["n_layer"]  # of all layers, float32
    specs = [
        Spec("mambax torch", "training:Training", {"package": "mambax", "folder": str(c.folder)}),
        *(
            Spec(name, "training:Training", {"package": name, "folder": str(c.folder)}, needs=5 * every_state)
            for name in ("transformers", "mambapy")
        ),
    ]
    job = {"kind": "training", "batch": batch, "length": length, "size": batch * length, "tiny": {"length": 4}}
    return [Group("training", specs, [job], c.settings(contender_s=2 * p.contender_s, call_s=60.0))]


def start(c: Context) -> list[Group]:
    """From process start to the first token."""

    def spec(label: str, package: str, **options: Any) -> Spec:
        given = {"package": package, "folder": str(c.folder), "threads": c.threads, **options}
        return Spec(label, "start_up:StartUp", given)

    specs = [
        spec("mambax numpy", "mambax", backend="numpy"),
        spec("mambax numpy bfloat16", "mambax", backend="numpy", dtype="bfloat16"),
        spec("mambax torch", "mambax", backend="torch"),
        spec("mambax mlx", "mambax", backend="mlx"),
        spec("llama.cpp F32", "llama.cpp"),
        spec("llama.cpp BF16", "llama.cpp", dtype="bfloat16"),
        spec("transformers", "transformers"),
        spec("mlx-lm", "mlx-lm"),
    ]
    cold = [
        spec(
            f"mambax {backend}{', no kernels yet' if without else ''}",
            "mambax",
            backend=backend,
            cold=without,
            length=64,
        )
        for backend in ("numpy", "torch")
        for without in (False, True)
    ]
    settings = c.settings(rounds=min(c.plan.rounds, 3), turn_s=0.0, call_s=60.0)
    return [Group(name, made, [{"kind": name}], settings) for name, made in (("start-up", specs), ("first", cold))]


def _of_mamba2(name: str) -> Callable[[Context], list[Group]]:
    """A function of :mod:`benchmarks.mamba2_parts`, which takes its contenders from here."""

    def make(c: Context) -> list[Group]:
        from benchmarks import mamba2_parts

        return getattr(mamba2_parts, name)(c)

    return make


PARTS: dict[str, Callable[[Context], list[Group]]] = {
    "limits": limits,
    "scan": scan,
    "prefill": prefill,
    "decode": decode,
    "compiled": compiled,
    "flat": flat,
    "training": training,
    "start": start,
    "mamba2-prefill": _of_mamba2("prefill"),
    "mamba2-decode": _of_mamba2("decode"),
}
"""The parts by name, in the order in which they are run. ``limits`` is part of every run."""

NEED_WEIGHTS = ("prefill", "decode", "compiled", "flat", "training", "start")
