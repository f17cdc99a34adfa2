"""The layouts of the Triton scan against each other; the fastest of each class of sizes is kept for this GPU.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from mambax_torch.operands import ScanOperands

from benchmarks.gpu_context import Context
from benchmarks.gpu_rivals import Rival
from benchmarks.gpu_scan import inputs
from benchmarks.harness import Case


def cases(c: Context) -> Iterator[Case]:
    """Forward, and with gradients, by every layout; mambax uses the fastest with gradients from then on."""
    for sizes in c.plan.tuned:
        yield _case(c, "forward", sizes)
        case = _case(c, "backward", sizes)
        _keep(c, case, sizes)
        yield case


def _case(c: Context, kind: str, sizes: tuple[int, int, int, int]) -> Case:
    from mambax_torch.kernels import scan, tuning

    batch, length, channels, states = sizes
    given = scan.arguments(
        ScanOperands(**inputs(c, *sizes), delta_softplus=True, initial_state=None, mask=None, boundaries=None)
    )
    job = {
        "kind": kind, "batch": batch, "length": length, "channels": channels, "states": states,
        "precision": c.plan.dtype,
    }  # fmt: skip
    rivals = [Rival(_label(layout), _made(given, layout, kind == "backward")) for layout in tuning.CANDIDATES]
    return c.arena.compare("tune", job, rivals)


def _label(layout: Any) -> str:
    return "mambax " + " ".join(f"{name}={value}" for name, value in layout._asdict().items())


def _made(given: Any, layout: Any, backward: bool) -> Callable[[], Callable[[], Any]]:
    from mambax_torch.kernels import scan

    def run() -> Any:
        y, final, saved = scan.forward(given, save=backward, layout=layout)
        if saved is None:
            return y
        return scan.backward(given, saved, torch.ones_like(y), torch.zeros_like(final), layout=layout)

    return lambda: run


def _keep(c: Context, case: Case, sizes: tuple[int, int, int, int]) -> None:
    """Let mambax know the fastest; one that could not be measured is not it."""
    from mambax_torch.kernels import tuning

    if c.plan.device != "cuda":
        return
    medians = {entry.label: entry.median for entry in case.entries}
    if any(medians.values()):
        device = torch.device("cuda", torch.cuda.current_device())
        tuning.tune(device, *sizes, lambda layout: medians[_label(layout)] or float("inf"))
