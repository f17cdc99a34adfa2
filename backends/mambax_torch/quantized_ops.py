"""Operators over quantised weights, one for every device: ``mambax::quantized_linear``, ``mambax::quantized_rows``.

By device they run :mod:`mambax_torch.linear_ops` or :mod:`mambax_torch.cuda_quantized`. To ``torch.compile`` they
are opaque. As the operators of :mod:`mambax_torch.operators` they are called directly where nothing asks for more.

Dimensions: O outputs, I inputs; see :mod:`mambax.quantization` for the formats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambax.quantization import WORDS
from mambax_torch.operators import may_call_directly
from mambax_torch.ops import inside_transform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device) -> str:
    """Why quantised layers cannot run on a device; empty when they can. On the meta device they have shapes."""
    if device.type in ("cpu", "meta"):
        return ""
    if device.type == "cuda":
        if torch.compiler.is_compiling():  # which takes such a GPU itself, and cannot trace what follows
            return ""
        from mambax_torch import cuda_quantized

        return cuda_quantized.why_not(device)
    return f"mambax has kernels for them on the CPU and on NVIDIA GPUs, none for {device.type!r}"


def kernels_of(device: torch.device) -> Any:
    """The module whose functions work on tensors on a device."""
    if device.type == "cuda":
        from mambax_torch import cuda_quantized

        return cuda_quantized
    from mambax_torch import linear_ops

    return linear_ops


# --- the product ---------------------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """(..., O) in the dtype of x."""
    kernels, rows = kernels_of(x.device), x.reshape(-1, inputs)
    weight, scales = weight.contiguous(), scales.contiguous()
    if len(rows) <= kernels.FEW_ROWS:
        y = kernels.few_rows(rows, weight, scales, bias, inputs)
    else:
        dtype = kernels.product_dtype(x.dtype)
        wide = kernels.dequantized(weight, scales, inputs, dtype)
        y = F.linear(rows.to(dtype), wide, None if bias is None else bias.to(dtype)).to(x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


_linear = torch.library.custom_op("mambax::quantized_linear", _product, mutates_args=())


@_linear.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("mambax::quantized_linear_backward", mutates_args=())
def _backward(dy: Tensor, weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """The gradient of x."""
    kernels = kernels_of(dy.device)
    dtype = kernels.product_dtype(dy.dtype)
    wide = kernels.dequantized(weight.contiguous(), scales.contiguous(), inputs, dtype)
    return (dy.to(dtype) @ wide).to(dy.dtype)


@_backward.register_fake
def _(dy: Tensor, weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], inputs))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, bias, ctx.inputs = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, scales)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales = ctx.saved_tensors
    dx = _backward(dy, weight, scales, ctx.inputs) if ctx.needs_input_grad[0] else None
    wanted = ctx.needs_input_grad[3]
    dbias = dy.reshape(-1, weight.shape[0]).sum(0, dtype=ctx.bias_dtype) if wanted else None
    return dx, None, None, dbias, None


_linear.register_autograd(_gradient, setup_context=_context)


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """x (..., I) times quantised weights + bias, (..., O), differentiable in x and bias.

    Args:
        x: float32, bfloat16 or float16, on the CPU or on an NVIDIA GPU.
        weight, scales: arrays of a :class:`mambax.quantization.Quantized`, beside x.
        bias: (O,) or None.
        inputs: I.

    Returns:
        In the dtype of x, or in that of autocast, as PyTorch's own product. Sums are in float32, and for few rows
        products are exact. For many rows the weights are made wide: on the CPU float32, on a GPU in the dtype of x.

    Raises:
        ValueError: for another dtype, a shape that does not fit, weights on another device than x, and a device
            that quantised layers cannot run on, with the reason.
    """
    _check(x, weight, bias, inputs)
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not torch.compiler.is_compiling() and inside_transform():  # which kernels are no part of
        wide = _by_operations(weight, scales, inputs)
        return F.linear(x.float(), wide, None if bias is None else bias.float()).to(x.dtype)
    direct = may_call_directly((x, weight, scales, bias)) and not x.is_meta
    return (_product if direct else _linear)(x, weight, scales, bias, inputs)


def _by_operations(weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """(O, I) float32, by operations of PyTorch alone."""
    if weight.dtype == torch.int8:
        return weight.float() * scales[:, None]
    words = weight.contiguous().view(torch.int32).reshape(len(weight), -1, 1, WORDS)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)[:, None]
    numbers = ((words >> shifts) & 15).reshape(len(weight), -1).float() - 8
    group = numbers.shape[1] // scales.shape[1]
    return (numbers * scales.float().repeat_interleave(group, 1))[:, :inputs]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, inputs: int) -> None:
    if x.dtype not in DTYPES:
        found = str(x.dtype).removeprefix("torch.")
        raise ValueError(
            f"quantised layer: expected float32, bfloat16 or float16, found {found}; it computes in float32 at "
            "most, use model.float(), or the full weights"
        )
    if x.shape[-1:] != (inputs,) or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
        raise ValueError(
            f"quantised layer: expected inputs (..., {inputs}) and a bias ({weight.shape[0]},) if any, found "
            f"{tuple(x.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    check_device(x.device)
    if x.device != weight.device:
        raise ValueError(
            f"quantised layer: expected values beside the weights on {weight.device}, found them on {x.device}; "
            "move one to the other"
        )


def check_device(device: torch.device) -> None:
    """Refuse a device that quantised layers cannot run on.

    Raises:
        ValueError: with the reason.
    """
    if reason := why_not(device):
        raise ValueError(f"quantised layers cannot run on {device}: {reason}. Use 'cpu', or the full weights")


# --- rows ----------------------------------------------------------------------------------------------------


def _rows_of(weight: Tensor, scales: Tensor, ids: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """(..., I) in a dtype."""
    some = ids.reshape(-1)
    chosen = weight.index_select(0, some), scales.index_select(0, some)
    return kernels_of(weight.device).dequantized(*chosen, inputs, dtype).reshape(*ids.shape, inputs)


_rows = torch.library.custom_op("mambax::quantized_rows", _rows_of, mutates_args=())


@_rows.register_fake
def _(weight: Tensor, scales: Tensor, ids: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*ids.shape, inputs), dtype=dtype)


def rows(weight: Tensor, scales: Tensor, ids: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """Rows of quantised weights, ids (...) int64 to (..., I) in a dtype.

    Raises:
        ValueError: on a device that quantised layers cannot run on, with the reason.
    """
    check_device(weight.device)
    direct = may_call_directly((weight, scales, ids)) and not weight.is_meta
    return (_rows_of if direct else _rows)(weight, scales, ids, inputs, dtype)
