"""Mamba-2's scan on the GPU beside mamba_ssm's Triton kernels, forwards and with gradients.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_peers
from benchmarks.contender import Unavailable
from benchmarks.gpu_context import Context
from benchmarks.gpu_rivals import Rival
from benchmarks.harness import Case

CHECKED = (2, 2048)
"""Heads and steps of the first row that are compared with float64."""

CHUNK = 256
"""Steps of a chunk of mamba_ssm's kernels, as its models choose."""

KEPT = 1 << 14
"""Steps of all rows above which the array algorithm, which keeps everything for the gradient, is not tried."""

Function = Callable[[dict[str, Any]], torch.Tensor]
"""From the arguments to y (B, L, H, P)."""


def inputs(c: Context, batch: int, length: int, shape: tuple[int, int, int, int]) -> dict[str, torch.Tensor]:
    """Random arguments as a model has them: (H, P, G, N), decays from about 0.5 to 1."""
    heads, width, groups, states = shape
    generator = torch.Generator(c.plan.device).manual_seed(length + heads)

    def normal(*sizes: int, dtype: torch.dtype = c.dtype) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=c.plan.device, dtype=dtype)

    wide = torch.float32
    rates = torch.linspace(1, 16, heads, device=c.plan.device)
    return {
        "x": normal(batch, length, heads, width), "dt": normal(batch, length, heads), "A": -rates,
        "B": normal(batch, length, groups, states), "C": normal(batch, length, groups, states),
        "D": normal(heads, dtype=wide), "dt_bias": normal(heads, dtype=wide) - 4,
    }  # fmt: skip


def recurrence(given: dict[str, torch.Tensor]) -> np.ndarray:
    """y of the first row, first heads and steps, (steps, heads, P) float64, one step after another."""
    heads, steps = CHECKED
    x, dt = (given[name][0, :steps, :heads].double().cpu().numpy() for name in ("x", "dt"))
    B, C = (given[name][0, :steps, 0].double().cpu().numpy() for name in ("B", "C"))
    A, skip, bias = (given[name][:heads].double().cpu().numpy() for name in ("A", "D", "dt_bias"))
    dt = np.logaddexp(0, dt + bias)
    h, y = np.zeros((*x.shape[1:], B.shape[1])), np.empty_like(x)
    for t in range(len(x)):
        h = np.exp(dt[t] * A)[:, None, None] * h + (dt[t][:, None] * x[t])[:, :, None] * B[t]
        y[t] = h @ C[t] + skip[:, None] * x[t]
    return y


def cases(c: Context) -> Iterator[Case]:
    """Every shape, batch and length of the plan, forwards and with gradients."""
    for backward in (False, True):
        for name, shape in c.plan.ssd.items():
            for batch in c.plan.batches:
                for length in c.plan.ssd_lengths:
                    yield _case(c, name, shape, batch, length, backward)


def least(
    c: Context, batch: int, length: int, shape: tuple[int, int, int, int], backward: bool
) -> dict[str, float]:
    """What any implementation has to move and to multiply: bytes, and operations in chunks of 64 steps.

    Forwards x, dt, B and C are read and y is written; with gradients dy and they again are read, and their
    gradients written. Each product of the forward pass has two in the backward one.
    """
    heads, width, groups, states = shape
    tokens, size = batch * length, torch.finfo(c.dtype).bits // 8
    row = heads * width + heads + 2 * groups * states
    values = row + heads * width
    products = 2 * (64 * states * groups + 64 * heads * width + 2 * heads * width * states)
    if backward:
        values += 2 * row + heads * width
        products *= 3
    return {"bytes": float(tokens * values * size), "operations": float(tokens * products)}


def _case(c: Context, name: str, shape: tuple[int, int, int, int], batch: int, length: int, backward: bool) -> Case:
    heads, width, _, states = shape
    job = {
        "kind": "backward" if backward else "forward", "model": name, "batch": batch, "length": length,
        "channels": heads * width, "states": states, "precision": c.plan.dtype,
    }  # fmt: skip
    given = inputs(c, batch, length, shape)
    want, needed = recurrence(given), least(c, batch, length, shape, backward)

    def check(y: torch.Tensor) -> dict[str, float]:
        got = y[0, : CHECKED[1], : CHECKED[0]].detach().double().cpu().numpy()
        return {"error": float(np.linalg.norm(got - want) / np.linalg.norm(want)), **needed}

    rivals = [
        Rival(label, made(make, c, given, backward=backward), check, gradients=backward)
        for label, make in MAKERS.items()
    ]
    return c.arena.compare("ssd", job, rivals)


def made(
    make: Callable[[Context, int], Function], c: Context, given: dict[str, torch.Tensor], *, backward: bool
) -> Callable[[], Callable[[], Any]]:
    """What makes the run of a rival: forward, or forward and the gradients of everything."""

    def ready() -> Callable[[], Any]:
        function = make(c, given["x"].shape[0] * given["x"].shape[1])
        if not backward:
            return lambda: function(given)
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        factors = torch.randn_like(given["x"])

        def run() -> Any:
            y = function(leaves)
            torch.autograd.grad(y, list(leaves.values()), factors)
            return y

        return run

    return ready


def _triton(c: Context, steps: int) -> Function:
    from mambax_torch.kernels.devices import old_for_ssd

    from mambax import get_backend

    nn = get_backend("torch")
    if reason := nn.scan_implementations()["triton"] or old_for_ssd():
        raise Unavailable(f"implementation 'triton': {reason}")
    return lambda x: nn.ssd(**x, dt_softplus=True, impl="triton")[0]


def _chunked(c: Context, steps: int) -> Function:
    from mambax import get_backend

    if steps > KEPT:
        raise Unavailable(f"not tried beyond {KEPT} steps: it keeps the products of every chunk")
    nn = get_backend("torch")
    return lambda x: nn.ssd(**x, dt_softplus=True, impl="chunked")[0]


def _mamba_ssm(c: Context, steps: int) -> Function:
    """mamba_ssm's Triton kernels, which nothing has to be compiled for."""
    module = gpu_peers.load("mamba_ssm.ops.triton.ssd_combined", folder=c.peers, compiled=False)
    if c.plan.device != "cuda":
        raise Unavailable("mamba_ssm's Triton kernels run on a GPU alone")

    def function(x: dict[str, Any]) -> torch.Tensor:
        return module.mamba_chunk_scan_combined(
            x["x"], x["dt"], x["A"], x["B"], x["C"], CHUNK, D=x["D"], dt_bias=x["dt_bias"], dt_softplus=True
        )

    return function


MAKERS: dict[str, Callable[[Context, int], Function]] = {
    "mambax triton": _triton,
    "mamba_ssm Triton": _mamba_ssm,
    "mambax chunked": _chunked,
}
"""Label -> what makes the function, from the context and the steps of all rows."""
