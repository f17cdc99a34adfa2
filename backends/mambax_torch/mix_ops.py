"""What is between the projections of a Mamba-1 mixer as one operation, by the Triton kernels, for training.

For the gradient it keeps its inputs, what x_proj gives and the states of the scan. What the convolution and dt_proj
give, each (B, L, D), is computed once more: a third of what the same operations would keep one by one.

Dimensions: B batch, L length, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mambax.blocks import LayerState
from mambax_torch.conv_ops import last_inputs
from mambax_torch.kernels.devices import why_not_triton
from mambax_torch.layers import is_plain_conv, is_plain_linear
from mambax_torch.operands import ConvOperands, ScanOperands
from mambax_torch.operators import are_plain, want_gradient


class _Given(NamedTuple):
    """The tensors that it is a function of."""

    xz: Tensor  # (B, L, 2D)
    conv_weight: Tensor  # (D, 1, K)
    conv_bias: Tensor | None  # (D,)
    conv_state: Tensor | None  # (B, K-1, D) in the dtype of xz
    x_weight: Tensor  # (R + 2N, D) in the dtype of xz
    dt_weight: Tensor  # (D, R) in the dtype of xz
    dt_bias: Tensor | None  # (D,) where dt_proj adds it
    A: Tensor  # (D, N)
    D: Tensor  # (D,)
    delta_bias: Tensor | None  # (D,) where the scan adds it
    ssm_state: Tensor | None  # (B, D, N)
    mask: Tensor | None  # (B, L)
    boundaries: Tensor | None  # (B, L)

    def convolution(self) -> ConvOperands:
        x, places = self.xz.chunk(2, -1)[0], (self.mask, self.boundaries)
        return ConvOperands(x, self.conv_weight, self.conv_bias, self.conv_state, *places, "silu")

    def time_steps(self, dbc: Tensor) -> Tensor:
        """delta (B, L, D), as dt_proj computes it."""
        dt, bias = dbc[..., : self.dt_weight.shape[1]], self.dt_bias
        if bias is None or bias.dtype == self.dt_weight.dtype:
            return F.linear(dt, self.dt_weight, bias)
        return F.linear(dt, self.dt_weight).to(bias.dtype) + bias

    def scan(self, x: Tensor, dbc: Tensor) -> ScanOperands:
        states, rank = self.A.shape[1], self.dt_weight.shape[1]
        B, C = dbc[..., rank : rank + states], dbc[..., rank + states :]
        z, places = self.xz.chunk(2, -1)[1], (self.mask, self.boundaries)
        delta = self.time_steps(dbc)
        return ScanOperands(x, delta, self.A, B, C, self.D, z, self.delta_bias, True, self.ssm_state, *places)


class _Mix(torch.autograd.Function):
    """The fields of :class:`_Given`, one by one, to y (B, L, D) and the scan's final state (B, D, N)."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        from mambax_torch.kernels import conv, scan

        given = _Given(*tensors)  # pyright: ignore[reportArgumentType] the fields, in their order
        x = conv.forward(given.convolution())
        dbc = F.linear(x, given.x_weight)  # (B, L, R + 2N)
        y, final, saved = scan.forward(scan.arguments(given.scan(x, dbc)), save=True)
        ctx.save_for_backward(*given, dbc, saved)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] which the decorator makes of it
        ctx: Any, dy: Tensor, dfinal: Tensor
    ) -> tuple[Tensor | None, ...]:
        *tensors, dbc, saved = ctx.saved_tensors
        needed: Any = _Given(*ctx.needs_input_grad)
        with torch.autocast(dy.device.type, enabled=False):  # whatever it was, the dtypes are those of forward
            found = _gradients(_Given(*tensors), needed, dbc, saved, dy, dfinal)
        return tuple(
            None if gradient is None or not need else gradient.to(of.dtype)
            for gradient, need, of in zip(found, needed, tensors, strict=True)
        )


def _gradients(given: _Given, needed: Any, dbc: Tensor, saved: Tensor, dy: Tensor, dfinal: Tensor) -> Any:
    """The gradients of the fields of `given`, of the projections those alone that are needed.

    The operations and their order are those of PyTorch's own gradients, and so are the bits.
    """
    from mambax_torch.kernels import conv, scan

    x = conv.forward(given.convolution())
    operands = scan.arguments(given.scan(x, dbc))
    found: Any = scan.backward(operands, saved, dy, dfinal)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dssm = found
    del operands, found  # and delta with them
    ddt_bias = ddelta.flatten(0, 1).sum(0) if needed.dt_bias else None
    ddelta = ddelta.to(given.dt_weight.dtype)
    rank = given.dt_weight.shape[1]
    ddt_weight = _of_weight(ddelta, dbc[..., :rank]) if needed.dt_weight else None
    ddbc = torch.cat((ddelta @ given.dt_weight, dB.to(dbc.dtype), dC.to(dbc.dtype)), -1)
    del ddelta
    dx_weight = _of_weight(ddbc, x) if needed.x_weight else None
    del x
    du.add_(ddbc @ given.x_weight)
    of_conv: Any = conv.backward(given.convolution(), du)
    dx, dconv_weight, dconv_bias, dconv = of_conv
    del du
    return (
        torch.cat([dx, dz], -1), dconv_weight, dconv_bias, dconv, dx_weight, ddt_weight, ddt_bias,
        dA, dD, ddelta_bias, dssm, None, None,
    )  # fmt: skip


def _of_weight(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient (out, in) of the weight of y = x weight^T: dy (B, L, out), x (B, L, in)."""
    return dy.flatten(0, 1).t() @ x.flatten(0, 1)


def mix(
    mixer: Any, xz: Tensor, A: Tensor, state: LayerState | None, mask: Tensor | None, boundaries: Tensor | None
) -> tuple[Tensor, LayerState] | None:
    """See :meth:`mambax.backend.Backend.mix`: where the Triton kernels run and a gradient is wanted, and nothing of
    the mixer is anybody's own. What torch.compile or a mode of PyTorch traces is left to the definition."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    given = _given(mixer, xz, A, state, mask, boundaries)
    if given is None or not are_plain(given) or not want_gradient(given):
        return None
    y, ssm = _Mix.apply(*given)
    x, width = xz[..., : given.A.shape[0]], given.conv_weight.shape[2]
    return y, LayerState(last_inputs(x, given.conv_state, width - 1, mask, boundaries), ssm)


def _given(
    mixer: Any, xz: Tensor, A: Tensor, state: LayerState | None, mask: Tensor | None, boundaries: Tensor | None
) -> _Given | None:
    """The operands; None where the mixer, its layers or the arguments are not what the kernels compute."""
    from mambax_torch.models import MambaMixer

    if type(mixer) is not MambaMixer or mixer.config.dt_b_c_norm != "none":
        return None
    conv, x_proj, dt_proj = mixer.conv1d, mixer.x_proj, mixer.dt_proj
    if (
        not (is_plain_conv(conv) and is_plain_linear(x_proj) and is_plain_linear(dt_proj))
        or x_proj.bias is not None
    ):
        return None
    if not _by_kernels(mixer.config.scan, xz) or not _fit(mixer.config, xz, state, mask, boundaries):
        return None
    x_weight, dt_weight, dt_bias, delta_bias = x_proj.weight, dt_proj.weight, dt_proj.bias, None
    if torch.is_autocast_enabled(xz.device.type):
        low = torch.get_autocast_dtype(xz.device.type)
        x_weight, dt_weight, dt_bias, delta_bias = x_weight.to(low), dt_weight.to(low), None, dt_bias
    if x_weight.dtype != xz.dtype or dt_weight.dtype != xz.dtype:
        return None
    past, ssm = (None, None) if state is None else (state.conv.to(xz.dtype), state.ssm)
    of_conv, of_projections = (conv.weight, conv.bias, past), (x_weight, dt_weight, dt_bias)
    return _Given(xz, *of_conv, *of_projections, A, mixer.D, delta_bias, ssm, mask, boundaries)


def _by_kernels(scan: str, xz: Tensor) -> bool:
    """Whether the kernels in Triton are wanted and run: on a GPU; in the interpreter, where the scan is named."""
    return (scan == "triton" or (scan == "auto" and xz.is_cuda)) and not why_not_triton(xz)


def _fit(config: Any, xz: Tensor, state: LayerState | None, mask: Tensor | None, boundaries: Tensor | None) -> bool:
    """Whether there is anything to compute, and the definition would refuse none of this."""
    batch, length, width = xz.shape
    if xz.numel() == 0 or width != 2 * config.d_inner or (mask is not None and boundaries is not None):
        return False
    expected: list[tuple[Tensor | None, tuple[int, ...]]] = [(mask, (batch, length)), (boundaries, (batch, length))]
    if state is not None:
        expected.append((state.conv, (batch, config.d_conv - 1, config.d_inner)))
        expected.append((state.ssm, (batch, config.d_inner, config.d_state)))
    return all(x is None or (tuple(x.shape) == shape and x.device == xz.device) for x, shape in expected)
