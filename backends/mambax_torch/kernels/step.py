"""One token by the Triton kernels: ``mambax::triton_conv_step`` and ``mambax::triton_scan_step``; no gradients.

``conv_step_into`` and ``scan_step_into`` write the state after into given memory, which may be that of the state
before. They launch one kernel each, and allocate nothing but the output.

Dimensions: B batch, D channels, K width of the convolution, N d_state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambax_torch.kernels import step_kernels
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.fusion import FUSED
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.kernels.step_targets import target_of
from mambax_torch.operators import may_call_directly

KERNELS: Any = step_kernels  # in whose signatures pyright does not see that numbers may be constants

CONV_BLOCK = 256
SCAN_BLOCK = 512
"""States that a program handles: 32 channels of 16."""

LAUNCH: dict[str, Any] = {"num_warps": 2, **FUSED}


def _check(name: str, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Refuse what the kernels would read beyond."""
    for label, (tensor, shape) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {label} is {tuple(tensor.shape)}; expected {shape}")


def side_by_side(x: Tensor) -> Tensor:
    """x with neighbouring channels side by side; a copy only if it must be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def conv_step_into(
    x: Tensor,  # (B, D)
    weight: Tensor,  # (D, 1, K)
    bias: Tensor | None,  # (D,)
    before: Tensor,  # (B, K-1, D)
    after: Tensor,  # (B, K-1, D)
    activation: str | None = "silu",
) -> Tensor:
    """:func:`mambax.convolution.causal_conv1d` of one position.

    Args:
        x, weight, bias, activation: as there, the position left out of x.
        before: the K-1 inputs before x, contiguous.
        after: where the K-1 last inputs go, contiguous; may be `before`.

    Returns:
        y (B, D) in the dtype of x.

    Raises:
        ValueError: for a shape that does not fit.
    """
    batch, channels = x.shape
    width, has_bias = weight.shape[2], bias is not None
    state = (batch, width - 1, channels)
    _check(
        "conv_step",
        {"weight": (weight, (channels, 1, width)), "bias": (bias, (channels,)), "before": (before, state),
         "after": (after, state)},
    )  # fmt: skip
    if not (before.is_contiguous() and after.is_contiguous()):
        raise ValueError("conv_step: the states before and after must be contiguous; call .contiguous() on them")
    x, bias = side_by_side(x), x if bias is None else bias.contiguous()
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    block = min(CONV_BLOCK, next_power_of_2(channels))
    blocks = cdiv(channels, block)
    with on_device_of(x):
        KERNELS.conv_step_kernel[(batch * blocks,)](
            x, weight.contiguous(), bias, before, y, after, x.stride(0), channels, blocks,
            K=width, HAS_BIAS=has_bias, SILU=activation == "silu", BLOCK_D=block, **LAUNCH,
        )  # fmt: skip
    return y


def scan_step_into(
    u: Tensor,  # (B, D)
    delta: Tensor,  # (B, D)
    A: Tensor,  # (D, N)
    B: Tensor,  # (B, N)
    C: Tensor,  # (B, N)
    D: Tensor | None,  # (D,)
    z: Tensor | None,  # (B, D)
    delta_bias: Tensor | None,  # (D,)
    delta_softplus: bool,
    before: Tensor | None,  # (B, D, N)
    after: Tensor,  # (B, D, N)
    *,
    A_is_log: bool = False,
) -> Tensor:
    """One step of :func:`mambax.scan.selective_scan`.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as there, the position left out.
        before: the state before the step, float32, contiguous; None for zeros.
        after: where the state after it goes, float32, contiguous; may be `before`.
        A_is_log: A is log(-A), as models keep it.

    Returns:
        y (B, D) in the dtype of u.

    Raises:
        ValueError: for a shape or dtype that does not fit.
    """
    (batch, channels), states = u.shape, A.shape[1]
    rows, state = (batch, channels), (batch, channels, states)
    _check(
        "scan_step",
        {"delta": (delta, rows), "A": (A, (channels, states)), "B": (B, (batch, states)),
         "C": (C, (batch, states)), "D": (D, (channels,)), "z": (z, rows), "delta_bias": (delta_bias, (channels,)),
         "before": (before, state), "after": (after, state)},
    )  # fmt: skip
    for held in (before, after):
        if held is not None and not (held.dtype == torch.float32 and held.is_contiguous()):
            raise ValueError(f"scan_step: states must be float32 and contiguous, found {held.dtype}")
    u, delta, B, C = map(side_by_side, (u, delta, B, C))
    gate = u if z is None else side_by_side(z)
    skip, bias = (u if x is None else x.contiguous() for x in (D, delta_bias))
    y = torch.empty((batch, channels), dtype=u.dtype, device=u.device)
    wide = next_power_of_2(states)
    block = max(1, min(SCAN_BLOCK // wide, next_power_of_2(channels)))
    blocks = cdiv(channels, block)
    with on_device_of(u):
        KERNELS.scan_step_kernel[(batch * blocks,)](
            u, delta, A.contiguous(), B, C, skip, gate, bias,
            after if before is None else before, y, after,
            u.stride(0), delta.stride(0), B.stride(0), C.stride(0), gate.stride(0), channels, states, blocks,
            IS_LOG=A_is_log, HAS_SKIP=D is not None, HAS_GATE=z is not None, HAS_BIAS=delta_bias is not None,
            SOFTPLUS=delta_softplus, HAS_BEFORE=before is not None, BLOCK_D=block, BLOCK_N=wide, **LAUNCH,
        )  # fmt: skip
    return y


# --- as operators, for what is traced ------------------------------------------------------------------------


def _new_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """y (B, D) and the state after (B, K-1, D)."""
    after = target_of(before)
    before = before.contiguous()
    after = torch.empty_like(before) if after is None else after
    return conv_step_into(x, weight, bias, before, after, activation), after


_conv_step = torch.library.custom_op("mambax::triton_conv_step", _new_conv_step, mutates_args=())
_conv_step.register_fake(
    lambda x, weight, bias, before, activation: (x.new_empty(x.shape), before.new_empty(before.shape))
)


def _new_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, D) and the state after (B, D, N) float32."""
    before = None if before is None else before.float().contiguous()
    after = target_of(before)
    if after is None:
        after = torch.empty((*u.shape, A.shape[1]), dtype=torch.float32, device=u.device)
    return scan_step_into(u, delta, A, B, C, D, z, delta_bias, delta_softplus, before, after), after


_scan_step = torch.library.custom_op("mambax::triton_scan_step", _new_scan_step, mutates_args=())


@_scan_step.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty((*u.shape, A.shape[1]), dtype=torch.float32)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """y (B, D) and the state after (B, K-1, D); arguments as of :func:`conv_step_into`."""
    before = before.to(x.dtype)
    direct = may_call_directly((x, weight, bias, before))
    return (_new_conv_step if direct else _conv_step)(x, weight, bias, before, activation)


def scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.scan.selective_scan` of one position, (B, 1, D) and (B, 1, N) arguments. No gradients."""
    given = (u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, None if z is None else z[:, 0], delta_bias)
    direct = may_call_directly((*given, initial_state))
    y, after = (_new_scan_step if direct else _scan_step)(*given, delta_softplus, initial_state)
    return y[:, None], after
