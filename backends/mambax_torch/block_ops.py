"""Blocks of Mamba-1 as one operation each, with a gradient of their own, by the kernels of :mod:`mambax_cpu.block`.

For the gradient a block keeps about half of what its operations would keep one by one, and no other threads come in
between.

Dimensions: B batch, L length, M d_model, D d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mambax_cpu.block import Kept, Parameters, State, copied, forward
from mambax_cpu.block_gradient import backward
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambax.blocks import LayerState

_WEIGHTS = Parameters._fields[1:]


class _Block(torch.autograd.Function):
    """hidden (B, L, M), the state before, epsilon and the weights, to hidden and the state after."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, conv: Tensor, ssm: Tensor, epsilon: float, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.epsilon = epsilon
        out = copied(hidden.numpy())
        state = State(conv.numpy(), ssm.numpy())
        after, kept = forward(_parameters(epsilon, weights), out, state, keep=True, threads=torch.get_num_threads())
        assert kept is not None
        ctx.save_for_backward(hidden, conv, ssm, *map(torch.from_numpy, kept), *weights)
        return torch.from_numpy(out), torch.from_numpy(after.conv), torch.from_numpy(after.ssm)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] which the decorator makes of it
        ctx: Any, *given: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, conv, ssm, *others = ctx.saved_tensors
        kept, weights = Kept(*(x.numpy() for x in others[:3])), others[3:]
        dhidden, *after = (None if x is None else np.ascontiguousarray(x.numpy(), np.float32) for x in given)
        if dhidden is None:
            dhidden = np.zeros(hidden.shape, np.float32)
        needed = ctx.needs_input_grad[4:]
        found = backward(
            _parameters(ctx.epsilon, weights),
            hidden.numpy(),
            State(conv.numpy(), ssm.numpy()),
            kept,
            dhidden,
            (after[0], after[1]),
            wanted=tuple(name for name, need in zip(_WEIGHTS, needed, strict=True) if need),
            threads=torch.get_num_threads(),
        )
        of_state = (None, None)  # nothing asks for the gradient of the state before
        of_weights = (
            torch.from_numpy(gradient) if need else None for gradient, need in zip(found[3:], needed, strict=True)
        )
        return torch.from_numpy(found.hidden), *of_state, None, *of_weights


def _parameters(epsilon: float, weights: Any) -> Parameters:
    arrays: list[Any] = [None if w is None else w.detach().numpy() for w in weights]
    return Parameters(epsilon, *arrays)


def run(block: Any, hidden: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """A block whose weights are float32, contiguous and not quantised, on its inputs; differentiable once.

    Args:
        block: made of the classes of this backend.
        hidden: (B, L, M) float32.
        state: before; needs no gradient.
    """
    mixer = block.mixer
    out, conv, ssm = _Block.apply(
        hidden.contiguous(),
        state.conv,
        state.ssm,
        block.norm.eps,
        block.norm.weight,
        mixer.in_proj.weight,
        mixer.in_proj.bias,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
        mixer.out_proj.weight,
        mixer.out_proj.bias,
    )
    return out, LayerState(conv, ssm)
