"""The smaller kernels on the GPU beside others, and what the GPU can do at most.

Dimensions: B batch, L length, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import gpu_peers, gpu_quantized
from benchmarks.contender import Job
from benchmarks.gpu_context import Context
from benchmarks.gpu_rivals import Rival
from benchmarks.harness import Case

EPS = 1e-5


def limits(c: Context) -> Iterator[Case]:
    """Copy bandwidth, and the rate of square matrix products in bfloat16 and float32."""
    p = c.plan
    source = torch.randn(p.bytes // 4, device=p.device)
    target = torch.empty_like(source)
    copy = Rival("copy", lambda a=target, b=source: lambda: a.copy_(b))
    yield c.arena.compare("limits copy", {"kind": "copy", "bytes": 2 * p.bytes}, [copy])
    del source, target, copy
    for name in ("bfloat16", "float32"):
        a, b = (torch.randn((p.side, p.side), device=p.device, dtype=getattr(torch, name)) for _ in range(2))
        rival = Rival("torch", lambda a=a, b=b: lambda: a @ b)
        yield c.arena.compare(f"limits products {name}", {"kind": "product", "side": p.side}, [rival])


def _differentiated(function: Callable[..., Any], leaves: list[torch.Tensor]) -> Callable[[], Any]:
    """A run of function and the gradients of its leaves."""
    held = [x.detach().requires_grad_() for x in leaves]
    factors: list[torch.Tensor] = []

    def run() -> Any:
        y = function(*held)
        if not factors:
            factors.append(torch.randn_like(y))
        torch.autograd.grad(y, held, factors[0])
        return y

    return run


def _against(want: torch.Tensor) -> Callable[[torch.Tensor], dict[str, float]]:
    def check(y: torch.Tensor) -> dict[str, float]:
        return {"error": float((y.detach().float() - want).norm() / want.norm())}

    return check


def kernels(c: Context) -> Iterator[Case]:
    """Convolution and norm, forwards and with gradients; products with quantised weights."""
    for backward in (False, True):
        for channels in c.plan.widths:
            yield _convolution(c, channels, backward)
        for channels in c.plan.widths:
            yield _norm(c, channels, backward)
    yield from gpu_quantized.products(c)


def _job(c: Context, channels: int, backward: bool) -> Job:
    batch, length = c.plan.rows
    kind = "backward" if backward else "forward"
    return {"kind": kind, "batch": batch, "length": length, "channels": channels, "precision": c.plan.dtype}


def _rivals(
    makers: dict[str, Callable[[], Callable[..., Any]]], leaves: list[torch.Tensor], want: Any, backward: bool
) -> list[Rival]:
    def made(maker: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            function = maker()
            return _differentiated(function, leaves) if backward else lambda: function(*leaves)

        return make

    return [Rival(label, made(maker), _against(want), gradients=backward) for label, maker in makers.items()]


def _convolution(c: Context, channels: int, backward: bool) -> Case:
    batch, length = c.plan.rows
    xz = torch.randn((batch, length, 2 * channels), device=c.plan.device, dtype=c.dtype)
    leaves = [xz[..., :channels], *(torch.randn(s, device=c.plan.device) for s in ((channels, 1, 4), (channels,)))]

    def in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv1d(x.transpose(1, 2), weight.to(x), bias.to(x), padding=3, groups=channels)
        return torch.nn.functional.silu(y[..., : x.shape[1]]).transpose(1, 2)

    def ours() -> Callable[..., Any]:
        from mambax_torch.kernels.conv import causal_conv1d

        return lambda x, weight, bias: causal_conv1d(x, weight, bias)[0]

    def official() -> Callable[..., Any]:
        function = gpu_peers.load("causal_conv1d.causal_conv1d_interface", folder=c.peers).causal_conv1d_fn
        return lambda x, weight, bias: function(
            x.transpose(1, 2), weight[:, 0].to(x), bias.to(x), activation="silu"
        ).transpose(1, 2)

    def fla() -> Callable[..., Any]:
        function = gpu_peers.load("fla.modules.convolution", folder=None).causal_conv1d
        return lambda x, weight, bias: function(x, weight[:, 0], bias, activation="silu")[0]

    makers = {
        "mambax triton": ours, "causal_conv1d CUDA": official, "flash-linear-attention": fla,
        "torch": lambda: in_float32,
    }  # fmt: skip
    with torch.no_grad():
        want = in_float32(*(x.float() for x in leaves))
    return c.arena.compare("convolution", _job(c, channels, backward), _rivals(makers, leaves, want, backward))


def _norm(c: Context, channels: int, backward: bool) -> Case:
    """The residual stream in float32, as in a model."""
    batch, length = c.plan.rows
    x = torch.randn((batch, length, channels), device=c.plan.device, dtype=c.dtype)
    leaves = [
        x,
        torch.randn_like(x, dtype=torch.float32),
        torch.randn(channels, device=c.plan.device, dtype=c.dtype),
    ]

    def in_torch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total = residual + x.float()
        scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
        return (total * scale * weight.float()).to(weight.dtype)

    def ours() -> Callable[..., Any]:
        from mambax_torch.kernels.norm import rms_norm

        return lambda x, residual, weight: rms_norm(x, weight, EPS, residual)[0]

    def official() -> Callable[..., Any]:
        module = gpu_peers.load("mamba_ssm.ops.triton.layer_norm", folder=c.peers, compiled=False)
        options: dict[str, Any] = {"prenorm": True, "residual_in_fp32": True, "eps": EPS}
        return lambda x, residual, weight: module.rms_norm_fn(x, weight, None, residual=residual, **options)[0]

    def fla() -> Callable[..., Any]:
        module = gpu_peers.load("fla.modules.layernorm", folder=None)
        options: dict[str, Any] = {"prenorm": True, "residual_in_fp32": True, "eps": EPS}
        return lambda x, residual, weight: module.rms_norm(x, weight, None, residual=residual, **options)[0]

    makers = {
        "mambax triton": ours, "mamba_ssm Triton": official, "flash-linear-attention": fla,
        "torch": lambda: in_torch,
    }  # fmt: skip
    with torch.no_grad():
        want = in_torch(*(leaf.float() for leaf in leaves))
    return c.arena.compare("norm", _job(c, channels, backward), _rivals(makers, leaves, want, backward))


def long(c: Context) -> Iterator[Case]:
    """Arrays of more than 2^31 elements: the last steps must be what they are by themselves."""
    length, channels = c.plan.large
    tail = max(1, min(100, length // 2))

    def difference(whole: torch.Tensor, alone: torch.Tensor) -> dict[str, float]:
        return {"error": float((whole[:, -tail:].float() - alone.float()).norm() / alone.float().norm())}

    x = torch.randn((1, length, channels), device=c.plan.device, dtype=c.dtype)
    job = {"kind": "large", "length": length, "channels": channels, "precision": c.plan.dtype}

    def convolve() -> Callable[[], Any]:
        from mambax_torch.kernels.conv import causal_conv1d

        weight = torch.randn((channels, 1, 4), device=c.plan.device)

        def run() -> Any:
            whole = causal_conv1d(x, weight)[0]
            before = x[:, -tail - 3 : -tail]
            return whole[:, -tail:], causal_conv1d(x[:, -tail:], weight, initial_state=before)[0]

        return run

    def scan() -> Callable[[], Any]:
        from mambax import get_backend

        nn = get_backend("torch")
        generator = torch.Generator(c.plan.device).manual_seed(1)
        B, C = (
            torch.randn((1, length, 16), device=c.plan.device, dtype=c.dtype, generator=generator) for _ in range(2)
        )
        A = -torch.ones((channels, 16), device=c.plan.device)

        def run() -> Any:
            """With A = -1 and delta about 0.7, nothing is left of a state after 2,000 steps."""
            last = slice(max(0, length - 4000), length)
            whole = nn.selective_scan(x, x, A, B, C, delta_softplus=True)[0][:, -tail:]
            parts = (array[:, last] for array in (x, x, B, C))
            u, delta, b, c_ = parts
            return whole, nn.selective_scan(u, delta, A, b, c_, delta_softplus=True)[0][:, -tail:]

        return run

    def check(result: Any) -> dict[str, float]:
        return difference(*result)

    yield c.arena.compare("convolution beyond 2^31", job, [Rival("mambax triton", convolve, check)])
    yield c.arena.compare("scan beyond 2^31", {**job, "states": 16}, [Rival("mambax triton", scan, check)])
