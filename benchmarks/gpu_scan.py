"""The selective scan on the GPU beside others, forwards and with gradients.

Each gets its inputs in its own layout: mamba_ssm's kernels want time innermost, the others channels.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import gpu_peers
from benchmarks.contender import Unavailable
from benchmarks.gpu_context import Context
from benchmarks.gpu_rivals import Rival
from benchmarks.harness import Case

CHECKED = (4, 2048)
"""Channels and steps of the first row that are compared with float64."""

NARROW = 1 << 31
"""Bytes of every state, (B, L, D, N) in float32, above which rivals that keep them all are not tried."""


def inputs(c: Context, batch: int, length: int, channels: int, states: int) -> dict[str, torch.Tensor]:
    """Random arguments as a model has them: decays from about 0.1 to 1."""
    generator = torch.Generator(c.plan.device).manual_seed(length + states)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=c.plan.device, dtype=dtype)

    narrow, wide = c.dtype, torch.float32
    rows, vectors = (batch, length, channels), (batch, length, states)
    return {
        "u": normal(*rows, dtype=narrow), "delta": normal(*rows, dtype=narrow),
        "A": -torch.arange(1, states + 1, device=c.plan.device, dtype=wide).expand(channels, states).contiguous(),
        "B": normal(*vectors, dtype=narrow), "C": normal(*vectors, dtype=narrow),
        "D": normal(channels, dtype=wide), "z": normal(*rows, dtype=narrow),
        "delta_bias": normal(channels, dtype=wide) - 4,
    }  # fmt: skip


def recurrence(given: dict[str, torch.Tensor]) -> np.ndarray:
    """y of the first row, first channels and steps, (steps, channels) float64, one step after another."""
    d, t = CHECKED
    u, delta, z = (given[name][0, :t, :d].double().cpu().numpy() for name in ("u", "delta", "z"))
    B, C = (given[name][0, :t].double().cpu().numpy() for name in ("B", "C"))
    A, skip, bias = (given[name][:d].double().cpu().numpy() for name in ("A", "D", "delta_bias"))
    dt = np.logaddexp(0, delta + bias)
    h, y = np.zeros(A.shape), np.empty_like(u)
    for step in range(len(u)):
        h = np.exp(dt[step][:, None] * A) * h + (dt[step] * u[step])[:, None] * B[step]
        y[step] = h @ C[step] + skip * u[step]
    return y * z / (1 + np.exp(-z))


def cases(c: Context, *, backward: bool) -> Iterator[Case]:
    """The grid of the plan."""
    p = c.plan
    for length in p.lengths:
        for batch in p.batches:
            for channels in p.channels:
                for states in p.states:
                    yield _case(c, batch, length, channels, states, backward)


def _case(c: Context, batch: int, length: int, channels: int, states: int, backward: bool) -> Case:
    job = {
        "kind": "backward" if backward else "forward", "batch": batch, "length": length, "channels": channels,
        "states": states, "precision": c.plan.dtype,
    }  # fmt: skip
    given = inputs(c, batch, length, channels, states)
    want = recurrence(given)

    def check(y: torch.Tensor) -> dict[str, float]:
        got = y[0, : CHECKED[1], : CHECKED[0]].detach().double().cpu().numpy()
        return {"error": float(np.linalg.norm(got - want) / np.linalg.norm(want))}

    every = 4 * batch * length * channels * states
    rivals = [
        Rival(label, _made(make, c, given, backward, every), check, gradients=backward)
        for label, make in MAKERS.items()
    ]
    return c.arena.compare("scan", job, rivals)


Function = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""From the arguments, in the layout that it wants, to y (B, L, D)."""


def _made(
    make: Callable[[Context], tuple[Function, Callable[[Any], Any], bool]],
    c: Context,
    given: dict[str, torch.Tensor],
    backward: bool,
    every: int,
) -> Callable[[], Callable[[], Any]]:
    """What makes the run of a rival: forward, or forward and the gradients of everything."""

    def made() -> Callable[[], Any]:
        function, layout, keeps_states = make(c)
        if keeps_states and every > NARROW:
            raise Unavailable(f"not tried: it keeps every state, {every / 1e9:.0f} GB in float32")
        own = layout(given)
        if not backward:
            return lambda: function(own)
        leaves = {name: x.detach().requires_grad_() for name, x in own.items()}
        factors = torch.randn_like(given["u"])

        def run() -> Any:
            y = function(leaves)
            torch.autograd.grad(y, list(leaves.values()), factors, allow_unused=True)
            return y

        return run

    return made


def _ours(impl: str) -> Callable[[Context], tuple[Function, Callable[[Any], Any], bool]]:
    def make(c: Context) -> tuple[Function, Callable[[Any], Any], bool]:
        from mambax import get_backend

        nn = get_backend("torch")
        reason = nn.scan_implementations().get(impl, "there is no such implementation")
        if reason:
            raise Unavailable(f"scan implementation {impl!r}: {reason}")
        keeps_states = impl != "triton"

        def function(x: dict[str, torch.Tensor]) -> torch.Tensor:
            return nn.selective_scan(**x, delta_softplus=True, impl=impl)[0]

        return function, lambda given: given, keeps_states

    return make


def _mamba_ssm(c: Context) -> tuple[Function, Callable[[Any], Any], bool]:
    """mamba_ssm's CUDA kernels, (B, D, L) arguments."""
    interface = gpu_peers.load("mamba_ssm.ops.selective_scan_interface", folder=c.peers)

    def layout(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        turned = ("u", "delta", "z", "B", "C")
        return {name: x.transpose(1, 2).contiguous() if name in turned else x for name, x in given.items()}

    def function(x: dict[str, torch.Tensor]) -> torch.Tensor:
        y = interface.selective_scan_fn(
            x["u"], x["delta"], x["A"], x["B"], x["C"], x["D"], z=x["z"], delta_bias=x["delta_bias"],
            delta_softplus=True,
        )  # fmt: skip
        return y.transpose(1, 2)

    return function, layout, False


def _mambapy(c: Context) -> tuple[Function, Callable[[Any], Any], bool]:
    """mambapy's parallel scan, with the rest of the operation as its MambaBlock writes it."""
    gpu_peers.add_site(c.peers)
    pscan = gpu_peers.load("mambapy.pscan", folder=None).pscan

    def function(x: dict[str, torch.Tensor]) -> torch.Tensor:
        delta = F.softplus(x["delta"].float() + x["delta_bias"])
        decays = torch.exp(delta[..., None] * x["A"])
        terms = (delta * x["u"].float())[..., None] * x["B"].float()[:, :, None]
        y = (pscan(decays, terms) @ x["C"].float()[..., None])[..., 0] + x["D"] * x["u"].float()
        return (y * F.silu(x["z"].float())).to(x["u"].dtype)

    return function, lambda given: given, True


MAKERS: dict[str, Callable[[Context], tuple[Function, Callable[[Any], Any], bool]]] = {
    "mambax triton": _ours("triton"),
    "mamba_ssm CUDA": _mamba_ssm,
    "mambapy pscan": _mambapy,
    "mambax pscan": _ours("pscan"),
}
"""Label -> what makes (function, layout of its arguments, whether it keeps every state in memory)."""
