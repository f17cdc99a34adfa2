"""Quantised weights on NVIDIA GPUs, by Triton: what :mod:`mambax_torch.quantized_ops` makes operators of.

A few rows are multiplied with the weights as they are stored; for more, and for gradients, the weights are made
wide for PyTorch's own product. Nothing here waits for the GPU, so that all of it can be captured in a CUDA graph.

Dimensions: M rows, O outputs, I inputs; see :mod:`mambax.quantization` for the formats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambax.quantization import BLOCK, WORDS
from mambax_torch.kernels.fusion import FUSED
from mambax_torch.kernels.sizes import cdiv, next_power_of_2

FEW_ROWS = 64
"""Rows up to which the kernels read the stored weights; above, widening them once is spread over enough rows."""

_FILL = 4
"""Programs per processor up to which the inputs are divided: that many blocks of weights are then on their way."""

_STAGES = {2: 4, 4: 2}
"""Blocks of rows and weights that are on their way together, by the bytes of a value of the rows. They fit into the
99 KiB that a program can have of the smaller GPUs."""

_PLAIN: dict[str, Any] = {"num_warps": 4, **FUSED}

_WIDENED = (8, 256)
"""Outputs and inputs of a program that makes weights wide."""


def why_not(device: torch.device) -> str:
    """Why quantised layers cannot run on a CUDA device, and what to do; empty when they can."""
    from mambax_torch.kernels import devices

    if torch.version.hip is not None:
        return "PyTorch was built for AMD GPUs, where the kernels were never tried"
    return devices.missing() or devices._too_old(device.index)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What many rows are multiplied in: weights are rounded to the dtype of the rows."""
    return dtype


def few_rows(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """x (M, I) to (M, O) in the dtype of x: exact products, sums in float32. The weights are contiguous."""
    from mambax_torch.kernels.devices import on_device_of

    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel():
        with on_device_of(x):
            (_one_row if len(x) == 1 else _some_rows)(x, weight, scales, bias, y, inputs)
    return y


def _one_row(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, inputs: int) -> None:
    from mambax_torch.kernels.tuning import processors

    kernels, given, outputs = _kernels(), x if bias is None else bias, weight.shape[0]
    block_o, warps = (32, 4) if outputs >= 2 * 32 * processors(x.device) else (8, 2)
    options = {"HAS_BIAS": bias is not None, "BLOCK_O": block_o, "STAGES": 3, "num_warps": warps, **FUSED}
    if weight.dtype == torch.int8:
        kernels.int8_row_kernel[(cdiv(outputs, block_o),)](
            x, weight, scales, given, y, outputs, inputs, BLOCK_I=8192 // block_o, **options
        )
    else:
        words = weight.shape[1] // 4
        kernels.int4_row_kernel[(cdiv(outputs, block_o),)](
            x, weight.view(torch.int32), scales.view(torch.int32), given, y, 15, outputs, inputs, words,
            GROUP=_group(weight, scales), BLOCK_W=2048 // block_o, **options,
        )  # fmt: skip


class _Grid(NamedTuple):
    """How a product of some rows is divided over programs.

    Attributes:
        block_m, block_o: rows and outputs of a program.
        parts: of the inputs.
        steps: of the inputs of a part.
    """

    block_m: int
    block_o: int
    parts: int
    steps: int

    @classmethod
    def of(cls, rows: int, outputs: int, steps: int, device: torch.device) -> _Grid:
        from mambax_torch.kernels.tuning import processors

        block_m = max(16, next_power_of_2(min(rows, FEW_ROWS)))
        block_o = 32 if block_m < 64 else 64
        wanted = cdiv(_FILL * processors(device), cdiv(outputs, block_o) * cdiv(rows, block_m))
        each = cdiv(steps, max(1, min(wanted, steps // 4)))
        return cls(block_m, block_o, cdiv(steps, each), each)


def _some_rows(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, inputs: int) -> None:
    from mambax_torch.kernels.devices import interpreted

    kernels, given, (rows, outputs) = _kernels(), x if bias is None else bias, y.shape
    eight = weight.dtype == torch.int8
    step = BLOCK if eight else 1
    steps = cdiv(inputs, BLOCK)
    grid = _Grid.of(rows, outputs, steps, x.device)
    places = (cdiv(outputs, grid.block_o), cdiv(rows, grid.block_m), grid.parts)
    sums = y if grid.parts == 1 else torch.empty((grid.parts, rows, outputs), device=x.device)
    options = {
        "WIDE": interpreted(), "HAS_BIAS": bias is not None, "PARTS": grid.parts, "BLOCK_M": grid.block_m,
        "BLOCK_O": grid.block_o, "num_warps": 4, "num_stages": _STAGES[x.element_size()], **FUSED,
    }  # fmt: skip
    sizes = x.stride(0), rows, outputs, inputs
    if eight:
        kernels.int8_kernel[places](
            x, weight, scales, given, y, sums, *sizes, grid.steps * step, BLOCK_I=BLOCK, **options
        )
    else:
        kernels.int4_kernel[places](
            x, weight.view(torch.int32), scales.view(torch.int32), given, y, sums, 15, *sizes, steps, grid.steps,
            GROUP=_group(weight, scales), **options,
        )  # fmt: skip
    if grid.parts > 1:
        kernels.sum_kernel[(cdiv(y.numel(), 1024),)](
            sums, given, y, y.numel(), outputs, PARTS=grid.parts, HAS_BIAS=bias is not None, BLOCK=1024, **_PLAIN
        )


def dequantized(weight: Tensor, scales: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """(O, I) in a dtype. The weights are contiguous."""
    from mambax_torch.kernels.devices import on_device_of

    outputs = weight.shape[0]
    wide = torch.empty((outputs, inputs), dtype=dtype, device=weight.device)
    if not wide.numel():
        return wide
    block_o, block_i = _WIDENED
    blocks, kernels = cdiv(inputs, block_i), _kernels()
    grid = (cdiv(outputs, block_o) * blocks,)
    with on_device_of(weight):
        if weight.dtype == torch.int8:
            kernels.widen_int8_kernel[grid](
                weight, scales, wide, outputs, inputs, blocks, BLOCK_O=block_o, BLOCK_I=block_i, **_PLAIN
            )
        else:
            kernels.widen_int4_kernel[grid](
                weight.view(torch.int32), scales, wide, outputs, inputs, weight.shape[1] // 4, blocks,
                GROUP=_group(weight, scales), BLOCK_O=block_o, BLOCK_W=block_i // BLOCK * WORDS, **_PLAIN,
            )  # fmt: skip
    return wide


def _group(weight: Tensor, scales: Tensor) -> int:
    """Inputs to a scale of int4."""
    return 2 * weight.shape[1] // scales.shape[1]


def _kernels() -> Any:
    """In whose signatures pyright does not see that numbers may be constants."""
    from mambax_torch.kernels import step_quantized_kernels

    return step_quantized_kernels
