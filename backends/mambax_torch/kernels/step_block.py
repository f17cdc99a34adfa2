"""One token through a mixer between its two large products, by two launches; no gradients.

Dimensions: B batch, M d_model, D d_inner, K d_conv, N d_state, R dt_rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambax_torch.kernels import step_block_kernels
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.fusion import FUSED
from mambax_torch.kernels.sizes import cdiv, next_power_of_2

KERNELS: Any = step_block_kernels  # in whose signatures pyright does not see that numbers may be constants

WIDEST = 8192
"""Channels that x_proj's kernel takes at once, at most."""

FEW_ROWS = 8
"""Rows up to which the two launches are used: each row reads x_proj and dt_proj by itself, from the cache."""


def mixed(
    xz: Tensor,  # (B, 2D)
    conv_weight: Tensor,  # (D, 1, K)
    conv_bias: Tensor | None,  # (D,)
    x_weight: Tensor,  # (R + 2N, D)
    dt_weight: Tensor,  # (D, R)
    dt_bias: Tensor | None,  # (D,)
    A_log: Tensor,  # (D, N)
    skip: Tensor,  # (D,)
    states: tuple[Tensor, Tensor],  # (B, K-1, D), (B, D, N)
    after: tuple[Tensor, Tensor],
) -> Tensor:
    """What a mixer makes of one token between in_proj and out_proj.

    Args:
        xz: what in_proj gave; the other weights as the mixer has them, contiguous.
        states: those of convolution and recurrence before the token, contiguous, the first in the dtype of xz and
            the second float32.
        after: where the states after it go; they may be the same.

    Returns:
        y (B, D) in the dtype of xz, the input of out_proj. Products are of values in that dtype, summed in float32.
    """
    (conv_before, before), (conv_after, ssm_after) = states, after
    batch, channels, width = len(xz), conv_weight.shape[0], conv_weight.shape[2]
    rank, count = dt_weight.shape[1], A_log.shape[1]
    outputs = rank + 2 * count
    dbc = torch.empty((batch, outputs), dtype=xz.dtype, device=xz.device)
    y = torch.empty((batch, channels), dtype=xz.dtype, device=xz.device)
    x, z = xz[:, :channels], xz[:, channels:]
    bias = xz if conv_bias is None else conv_bias
    taps = _four_in_one(conv_weight, xz.dtype)
    switches = {"K": width, "HAS_BIAS": conv_bias is not None, "PACKED": taps is not None}
    taps = conv_weight if taps is None else taps
    block_o, wide_d = 2, min(WIDEST, next_power_of_2(channels))
    blocks_o = cdiv(outputs, block_o)
    wide = next_power_of_2(count)
    block_d = max(1, min(256 // wide, next_power_of_2(channels)))
    blocks_d = cdiv(channels, block_d)
    with on_device_of(xz):
        KERNELS.x_proj_kernel[(batch * blocks_o,)](
            x, taps, bias, conv_before, x_weight, dbc, xz.stride(0), channels, outputs, blocks_o,
            **switches, BLOCK_O=block_o, BLOCK_D=wide_d, num_warps=min(16, max(4, wide_d // 512)), **FUSED,
        )  # fmt: skip
        KERNELS.scan_kernel[(batch * blocks_d,)](
            x, z, taps, bias, conv_before, conv_after, dbc, dt_weight, xz if dt_bias is None else dt_bias,
            A_log, skip, before, ssm_after, y, xz.stride(0), channels, count, rank, blocks_d,
            **switches, HAS_DT_BIAS=dt_bias is not None, BLOCK_D=block_d, BLOCK_N=wide,
            BLOCK_R=min(64, next_power_of_2(rank)), num_warps=2, **FUSED,
        )  # fmt: skip
    return y


def _four_in_one(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The taps (D, 1, 4) of a convolution of values in `dtype`, of 16 bits too, as (D,) int64; None where they are
    not so many, not of that dtype or not aligned."""
    if weight.shape[2] != 4 or weight.element_size() != 2 or weight.dtype != dtype:
        return None
    if weight.data_ptr() % 8 or weight.storage_offset() % 4:
        return None
    return weight.view(torch.int64).view(-1)
