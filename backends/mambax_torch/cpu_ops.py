"""The fused CPU scan as a PyTorch operator, ``mambax::cpu_selective_scan``, and what such operators share.

They are opaque to ``torch.compile`` in both directions, so that compiling takes as long for any L. Where nothing
can ask for a gradient and nothing is being traced, the kernels are called directly: an operator costs tens of
microseconds, which a one-token step would feel.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import torch
from mambax_cpu import scan
from torch import Tensor

from mambax_torch import ops


def array(x: Tensor | None) -> Any:
    """The values as a NumPy array, shared unless they are bfloat16, which become float32; None for None."""
    if x is None:
        return None
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def shared(x: Tensor | None) -> Any:
    """The values as a NumPy array that shares them, bfloat16 as ``ml_dtypes.bfloat16``; None for None."""
    if x is None:
        return None
    x = x.detach()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def like(values: Any, x: Tensor | None) -> Tensor:
    """A tensor of the values in the dtype of x; without elements where x is None."""
    return torch.empty(0) if x is None else ops.from_numpy(values).to(x.dtype)


def room_like(x: Tensor | None) -> Tensor:
    """Room for a gradient of x; without elements where x is None. For fake implementations."""
    return torch.empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def may_call_directly(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels may be called as they are: plain tensors, no gradient wanted, nothing traced."""
    return are_plain(tensors) and not want_gradient(tensors)


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are tensors and nothing made of them, and nothing is being traced."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    return all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def want_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient of one of these is wanted."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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
    boundaries: Tensor | None,
    narrow: bool = True,
) -> scan.Arguments:
    """The arguments for the kernels, of which the backward one takes no `narrow` u and z."""
    keep = shared if narrow else array
    return scan.arguments(
        keep(u),
        *map(array, (delta, A, B, C, D)),
        z=keep(z),
        delta_bias=array(delta_bias),
        delta_softplus=delta_softplus,
        initial_state=array(initial_state),
        mask=array(mask),
        boundaries=array(boundaries),
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
    boundaries: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that the backward pass starts from (no elements unless `save`)."""
    given = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries)
    y, final, saved = scan.forward(given, save=save, threads=torch.get_num_threads())
    return like(y, u), torch.from_numpy(final), torch.empty(0) if saved is None else torch.from_numpy(saved)


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
    boundaries: Tensor | None,
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
    boundaries: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    given = _scan_arguments(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries, narrow=False
    )
    gradients = scan.backward(given, array(saved), array(dy), array(dfinal), threads=torch.get_num_threads())
    of = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(like(g, x) for g, x in zip(gradients, of, strict=True))  # pyright: ignore[reportReturnType] nine


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
    boundaries: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(room_like(x) for x in of)  # pyright: ignore[reportReturnType] nine


def _scan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, initial_state, mask, boundaries, _ = inputs
    ctx.save_for_backward(output[2], *tensors, initial_state, mask, boundaries)
    ctx.softplus = softplus


def _scan_gradient(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved, *tensors, initial_state, mask, boundaries = ctx.saved_tensors
    gradients = _scan_backward(dy, dfinal, saved, *tensors, ctx.softplus, initial_state, mask, boundaries)
    *of_tensors, of_initial = (
        gradient if x is not None else None
        for gradient, x in zip(gradients, (*tensors, initial_state), strict=True)
    )
    return *of_tensors, None, of_initial, None, None, None


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
    boundaries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.scan.selective_scan` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, and for float64.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if may_call_directly(tensors):
        given = _scan_arguments(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries
        )
        y, final, _ = scan.forward(given, threads=torch.get_num_threads())
        return like(y, u), torch.from_numpy(final)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, final, _ = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries, save)
    return y, final
