"""Where the time goes: the kernels of a decoding step, a prefill and a training step, longest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_models, gpu_training
from benchmarks.gpu_context import Context
from benchmarks.harness import Case, Entry, summary

SHOWN = 15
"""Kernels of a job."""

RUNS = 3
"""Of the job, under the profiler."""


def cases(c: Context) -> Iterator[Case]:
    """A decoding step of batch 1 and more, a prefill, and a training step of every model of the plan."""
    name, batches, steps = c.plan.decode
    model = gpu_models.mambax_model(c, name, c.dtype)
    for batch in batches:
        job = {"kind": "profile", "model": name, "batch": batch, "precision": c.plan.dtype}
        yield _case(c, "a decoding step", job, gpu_models.graph_steps(c, model, batch, steps)(), steps)
    del model
    name, (batch, length) = c.plan.prefill
    model = gpu_models.mambax_model(c, name, c.dtype)
    ids = gpu_models.token_ids(c, name, batch, length)
    job = {"kind": "profile", "model": name, "batch": batch, "length": length, "precision": c.plan.dtype}
    yield _case(c, "prefill", job, partial(model, ids, logits_to_keep=1), 1)
    del model
    for name, (batch, length) in c.plan.training:
        ids = gpu_models.token_ids(c, name, batch, length + 1)
        job = {"kind": "profile", "model": name, "batch": batch, "length": length, "precision": "bfloat16"}
        with torch.enable_grad():
            step = gpu_training.training_step(c, gpu_training.TRAINED["mambax"], name, ids, False)()
            yield _case(c, "a training step", job, step, 1)


def _case(c: Context, name: str, job: dict[str, Any], run: Callable[[], Any], parts: int) -> Case:
    """The kernels that took longest, in seconds per run or part of it, and what all of them took."""
    gradients = name == "a training step"
    with torch.set_grad_enabled(gradients):
        run()
        c.arena.clock.wait()
        on_gpu = c.plan.device == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            for _ in range(RUNS):
                run()
            c.arena.clock.wait()
    each = 1e6 * RUNS * parts
    times = [
        (float(row.self_device_time_total if on_gpu else row.self_cpu_time_total) / each, row)
        for row in found.key_averages()
    ]
    times = sorted((pair for pair in times if pair[0] > 0), key=lambda pair: -pair[0])
    total = sum(time for time, _ in times)
    entries = [Entry("all kernels", seconds=summary([total]), figures={"launches": _launches(times, parts)})]
    for time, row in times[:SHOWN]:
        shown = {"launches": row.count / (RUNS * parts), "share": time / total}
        entries.append(Entry(row.key[:100], seconds=summary([time]), figures=shown))
    return Case(name, job, entries)


def _launches(times: list[tuple[float, Any]], parts: int) -> float:
    return sum(row.count for _, row in times) / (RUNS * parts)
