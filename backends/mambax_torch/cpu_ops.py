"""The fused CPU kernels as PyTorch operators: ``mambax::cpu_selective_scan``, ``mambax::cpu_causal_conv1d``.

Each is opaque to ``torch.compile`` in both directions, so that compiling takes as long for any L. Where nothing can
ask for a gradient and nothing is being traced, the kernels are called directly: an operator costs tens of
microseconds, which a one-token step would feel.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mambax_cpu import convolution, scan
from torch import Tensor


def _array(x: Tensor | None) -> Any:
    """The values as a NumPy array, shared where NumPy has the dtype."""
    if x is None:
        return None
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _like(values: Any, x: Tensor | None) -> Tensor:
    """A tensor of the values in the dtype of x; without elements where x is None."""
    return torch.empty(0) if x is None else torch.from_numpy(values).to(x.dtype)


def _optional(x: Tensor | None) -> Tensor:
    return torch.empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def may_call_directly(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels may be called as they are: plain tensors, no gradient wanted, nothing traced."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    wanted = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in (Tensor, torch.nn.Parameter) or (wanted and x.requires_grad)):
            return False
    return True


# --- the selective scan --------------------------------------------------------------------------------------


def _scan_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
) -> scan.Arguments:
    return scan.arguments(
        *map(_array, (u, delta, A, B, C, D)),
        z=_array(z),
        delta_bias=_array(delta_bias),
        delta_softplus=delta_softplus,
        initial_state=_array(initial_state),
        mask=_array(mask),
    )


@torch.library.custom_op("mambax::cpu_selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that the backward pass starts from (no elements unless `save`)."""
    given = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask)
    y, final, saved = scan.forward(given, save=save, threads=torch.get_num_threads())
    return _like(y, u), torch.from_numpy(final), torch.empty(0) if saved is None else torch.from_numpy(saved)


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    final = torch.empty((batch, channels, A.shape[1]), dtype=torch.float32)
    shape = scan.saved_shape(batch, length, channels, A.shape[1]) if save else (0,)
    return u.new_empty((batch, length, channels)), final, torch.empty(shape, dtype=torch.float32)


@torch.library.custom_op("mambax::cpu_selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    given = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask)
    gradients = scan.backward(given, _array(saved), _array(dy), _array(dfinal), threads=torch.get_num_threads())
    return [
        _like(g, x) for g, x in zip(gradients, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True)
    ]


@_scan_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    return [_optional(x) for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)]


def _scan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, initial_state, mask, _ = inputs
    ctx.save_for_backward(output[2], *tensors, initial_state, mask)
    ctx.softplus = softplus


def _scan_gradient(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved, *tensors, initial_state, mask = ctx.saved_tensors
    gradients = _scan_backward(dy, dfinal, saved, *tensors, ctx.softplus, initial_state, mask)
    *of_tensors, of_initial = (
        gradient if x is not None else None
        for gradient, x in zip(gradients, (*tensors, initial_state), strict=True)
    )
    return *of_tensors, None, of_initial, None, None


_scan.register_autograd(_scan_gradient, setup_context=_scan_context)


def selective_scan(
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
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.scan.selective_scan` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, and for float64.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if may_call_directly(tensors):
        given = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask)
        y, final, _ = scan.forward(given, threads=torch.get_num_threads())
        return _like(y, u), torch.from_numpy(final)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, final, _ = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, save)
    return y, final


# --- the convolution -----------------------------------------------------------------------------------------


@torch.library.custom_op("mambax::cpu_causal_conv1d", mutates_args=(), device_types="cpu")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> Tensor:
    """y (B, L, D)."""
    given = _conv_arguments(x, weight, bias, initial_state, activation)
    return _like(convolution.forward(given, threads=torch.get_num_threads()), x)


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mambax::cpu_causal_conv1d_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
) -> list[Tensor]:
    """The gradients of x, weight, bias and initial_state."""
    given = _conv_arguments(x, weight, bias, initial_state, activation)
    gradients = convolution.backward(given, _array(dy), threads=torch.get_num_threads())
    return [_like(g, of) for g, of in zip(gradients, (x, weight, bias, initial_state), strict=True)]


@_conv_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
) -> list[Tensor]:
    return [_optional(of) for of in (x, weight, bias, initial_state)]


def _conv_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> convolution.Arguments:
    x_, weight_, bias_, initial = map(_array, (x, weight, bias, initial_state))
    return convolution.arguments(x_, weight_, bias_, initial_state=initial, activation=activation)


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = _conv_backward(dy, *tensors, ctx.activation)
    return *(g if of is not None else None for g, of in zip(gradients, tensors, strict=True)), None


_conv.register_autograd(_conv_gradient, setup_context=_conv_context)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.convolution.causal_conv1d` without a mask by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, another activation, and float64.
    """
    length, past = x.shape[1], weight.shape[2] - 1
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    if may_call_directly((x, weight, bias, initial_state)):
        given = _conv_arguments(x, weight, bias, initial_state, activation)
        y = _like(convolution.forward(given, threads=torch.get_num_threads()), x)
    else:
        y = _conv(x, weight, bias, initial_state, activation)
    if length >= past:  # a copy: the state must not keep all inputs in memory
        return y, x[:, length - past :].clone(memory_format=torch.contiguous_format)
    before = x.new_zeros(x.shape[0], past, x.shape[2]) if initial_state is None else initial_state
    return y, torch.cat([before[:, length:], x], 1)
