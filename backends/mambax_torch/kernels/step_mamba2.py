"""One token through a mixer of Mamba-2 between its two large products, by one launch or two; no gradients.

Dimensions: B batch, D d_inner = H P, H heads, P head_dim, G groups, N d_state, K d_conv, C channels of the
convolution = D + 2 G N.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambax.options import Mamba2Options
from mambax.ssd import check_shapes
from mambax_torch.kernels import gated_norm, step_mamba2_kernels
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.fusion import UNFUSED
from mambax_torch.kernels.norm import WIDEST
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.kernels.step import side_by_side
from mambax_torch.kernels.step_targets import target_of

KERNELS: Any = step_mamba2_kernels  # in whose signatures pyright does not see that numbers may be constants

FEW, MANY = 16, 32
"""Elements of the state for each thread, of one row and of more: few make more programs, many share more."""


def why_not(options: Mamba2Options) -> str:
    """Why the kernels cannot take mixers of this kind; empty when they can."""
    width = options.d_inner // options.n_groups
    if options.gated_norm != "none" and width > WIDEST:
        return f"the gated norm has {width} channels in a group, and a program holds {WIDEST}"
    if options.part_multipliers != (1.0,) * len(options.part_multipliers):
        return "its input has factors"
    return ""


def mixed(
    options: Mamba2Options,
    projected: Tensor,  # (B, D + C + H)
    conv_weight: Tensor,  # (C, 1, K)
    conv_bias: Tensor | None,  # (C,)
    dt_bias: Tensor,  # (H,)
    A_log: Tensor,  # (H,)
    skip: Tensor,  # (H,)
    norm_weight: Tensor | None,  # (D,)
    states: tuple[Tensor, Tensor],  # (B, K-1, C), (B, H, P, N)
    after: tuple[Tensor, Tensor],
) -> Tensor:
    """What a mixer makes of one token between in_proj and out_proj.

    Args:
        options: sizes and kind, such that :func:`why_not` has nothing against them.
        projected: what in_proj gave; the other weights as the mixer has them, contiguous, of up to float32.
        norm_weight: of the gated norm; None where there is none.
        states: those of convolution and recurrence before the token, contiguous, the first in the dtype of
            `projected` and the second float32.
        after: where the states after it go, not the same for the convolution: several programs read it.

    Returns:
        (B, D), the input of out_proj, in the dtype of the norm's weight, or of `projected` without a norm.
    """
    (conv_before, before), (conv_after, ssm_after) = states, after
    batch, heads, width, count = len(projected), options.n_heads, options.head_dim, options.d_state
    projected = side_by_side(projected)
    y = torch.empty((batch, options.d_inner), dtype=projected.dtype, device=projected.device)
    (smallest, largest), tile = options.dt_limit, _tile(batch, width, count)
    blocks = cdiv(width, tile["BLOCK_P"])
    with on_device_of(projected):
        KERNELS.ssd_kernel[(batch * heads * blocks,)](
            projected, conv_weight, projected if conv_bias is None else conv_bias,
            conv_before, conv_after, dt_bias, A_log, skip, before, ssm_after, y,
            projected.stride(0), heads, width, options.n_groups, count, blocks, smallest, largest,
            K=options.d_conv, BLOCK_K=next_power_of_2(options.d_conv), HAS_BIAS=conv_bias is not None,
            LIMITED=smallest > 0 or largest < math.inf, GATED=options.gated_norm == "none", **tile,
        )  # fmt: skip
    if norm_weight is None:
        return y
    norm_first, z = options.gated_norm == "norm_first", projected[:, : options.d_inner]
    return gated_norm.normed(y, z, norm_weight, options.n_groups, options.norm_epsilon, norm_first=norm_first)


def ssd_step(
    x: Tensor,  # (B, 1, H, P)
    dt: Tensor,  # (B, 1, H)
    A: Tensor,  # (H,)
    B: Tensor,  # (B, 1, G, N)
    C: Tensor,  # (B, 1, G, N)
    D: Tensor | None = None,  # (H,)
    *,
    dt_bias: Tensor | None = None,  # (H,)
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,  # (B, H, P, N)
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.ssd.ssd` of one position, by one launch; no gradients.

    The state after goes where :mod:`mambax_torch.kernels.step_targets` says.

    Raises:
        ValueError: for a shape that does not fit, more than one position, and tensors on another device than x.
    """
    others = {"dt": dt, "A": A, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    check_shapes(x, B, **others)
    if x.shape[1] != 1:
        raise ValueError(f"ssd_step: expected one position, found x of {tuple(x.shape)}; call ssd for more")
    for name, other in {"B": B, **others}.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"ssd_step: {name} is on {other.device} and x on {x.device}; move it there")
    batch, _, heads, width = x.shape
    groups, count = B.shape[2:]
    before = None if initial_state is None else initial_state.float().contiguous()
    after = target_of(before)
    if after is None:
        after = torch.empty((batch, heads, width, count), dtype=torch.float32, device=x.device)
    u, step, b, c = (side_by_side(part.reshape(batch, -1)) for part in (x, dt, B, C))
    skip, bias = (A if part is None else part.contiguous() for part in (D, dt_bias))
    y = torch.empty((batch, heads * width), dtype=x.dtype, device=x.device)
    (smallest, largest), tile = dt_limit, _tile(batch, width, count)
    blocks = cdiv(width, tile["BLOCK_P"])
    with on_device_of(x):
        KERNELS.ssd_step_kernel[(batch * heads * blocks,)](
            u, step, A.contiguous(), b, c, skip, bias, after if before is None else before, after, y,
            u.stride(0), step.stride(0), b.stride(0), c.stride(0), heads, width, heads // groups, count, blocks,
            float(smallest), float(largest), HAS_SKIP=D is not None, HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus, LIMITED=smallest > 0 or largest < math.inf, HAS_BEFORE=before is not None, **tile,
        )  # fmt: skip
    return y.view(x.shape), after


def _tile(batch: int, width: int, count: int) -> dict[str, Any]:
    """What a program has of a state (P, N), and its threads: one for each channel of B, or for more."""
    wide = next_power_of_2(count)
    warps = max(1, min(4, wide // 32))
    rows = max(1, min(32 * warps * (FEW if batch == 1 else MANY) // wide, next_power_of_2(width)))
    return {"BLOCK_P": rows, "BLOCK_N": wide, "num_warps": warps, **UNFUSED}
