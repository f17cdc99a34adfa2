"""Linear layers for many rows on the CPU: ``mambax::cpu_product``, the fastest way of PyTorch on this machine.

PyTorch hands its float32 products to one library whatever the processor, and has no fast product of float16 on
processors without instructions for it. The same product by :mod:`mambax_cpu.products`, through oneDNN, or on
widened values can be several times faster. Which it is, is measured once per process and dtype, in some
milliseconds, at the first large product. Weights are used as they lie in memory: no copy of them is kept.

Dimensions: R rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import mambax_cpu
import torch
from torch import Tensor
from torch.nn import functional as F

from mambax_torch.cpu_ops import array
from mambax_torch.operators import may_call_directly

Way = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(x (..., in), weight (out, in), bias (out,) | None) -> (..., out), all of one dtype."""

LARGE = 1 << 22
"""Products (R in out) from which on the choice matters more than the call of an operator."""

_ROUNDS = 4
_CLEARLY = 0.9
"""A way is taken instead of one before it when it needs less than this share of its time. The kernels come first,
because their threads are those of the scan; of narrow dtypes, the way that widens nothing."""


def _kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from mambax_cpu import products

    rows = x.reshape(-1, x.shape[-1])
    y = products.product(*map(array, (rows, weight, bias)), threads=torch.get_num_threads())
    return torch.from_numpy(y).reshape(*x.shape[:-1], weight.shape[0])


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    run = torch.ops.mkldnn._linear_pointwise
    # It copies a first factor whose rows are not contiguous. Where that is the gradient of a wide layer, it takes
    # less to compute the transpose of the result, and to copy that.
    if bias is None and x.dim() == 2 and x.stride(1) != 1:
        (rows, inner), columns = x.shape, weight.shape[0]
        if rows * inner > (inner + rows) * columns:
            return run(weight, x, None, "none", [], "").t().contiguous()
    return run(x, weight, bias, "none", [], "")


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = fastest(torch.float32)
    return wide(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@cache
def fastest(dtype: torch.dtype) -> Way:
    """The fastest way to large products of a dtype on this machine; measured by the first call."""
    times = {way: float("inf") for way in _ways(dtype)}
    # values that need no random numbers: those are the user's
    x, weight = (torch.full((size, 768), 0.5, dtype=dtype, device="cpu") for size in (512, 768))
    with torch.no_grad():
        for way in list(times) * _ROUNDS:
            with suppress(AttributeError, RuntimeError):  # this build, or this processor, does not have it
                for _ in range(2):
                    # As between the layers of a model: PyTorch's threads keep the processors busy for a while after
                    # each of its operations, which slows down whatever has threads of its own.
                    torch.add(x, x)
                    start = time.perf_counter()
                    way(x, weight, None)
                    times[way] = min(times[way], time.perf_counter() - start)
    best, *others = times
    for way in others:
        if times[way] < _CLEARLY * times[best]:
            best = way
    return best


def _ways(dtype: torch.dtype) -> list[Way]:
    """The ways to a product, the preferred one first."""
    if dtype != torch.float32:
        return [F.linear, _widened]
    return [*([] if mambax_cpu.missing() else [_kernels]), _onednn, F.linear]


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias by the fastest way; by PyTorch's own where the user has turned oneDNN off."""
    way = fastest(x.dtype)
    if way is _onednn and not torch._C._get_mkldnn_enabled():
        way = F.linear
    return way(x, weight, bias)


@torch.library.custom_op("mambax::cpu_product", mutates_args=(), device_types="cpu")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., out) in the dtype of x."""
    return _run(x, weight, bias)


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    rows = dy.reshape(-1, dy.shape[-1])  # (R, out)
    dx = product(dy, weight.t(), None) if for_x else None
    dweight = product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if for_weight else None
    return dx, dweight, rows.sum(0) if for_bias else None


_product.register_autograd(_gradient, setup_context=_context)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) weight^T + bias, (..., out), differentiable any number of times.

    Args:
        x: float32, bfloat16 or float16, on the CPU, in any memory layout.
        weight: (out, in) in the dtype of x, in any memory layout.
        bias: (out,) in the dtype of x, or None.
    """
    return (_run if may_call_directly((x, weight, bias)) else _product)(x, weight, bias)
