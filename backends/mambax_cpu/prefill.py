"""Many tokens through a stack of Mamba-1 blocks, of which a stack knows the addresses of the weights.

Dimensions: B rows, L length, M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mambax_cpu import products, prompts
from mambax_cpu.addresses import array_at
from mambax_cpu.block import Parameters, State, copied, forward
from mambax_cpu.chain import Weights
from mambax_cpu.step import BlockWeights, Sizes, Stack
from mambax_cpu.stepping import States

_KINDS = ("float32", "int8", "int4")
_FLOAT32 = np.dtype(np.float32)


def supported(stack: Stack) -> bool:
    """Whether there are kernels: those of :mod:`mambax_cpu.prompts`, or those of :mod:`mambax_cpu.block` where all
    that is not quantised is float32. Other weights are for the framework's own products."""
    matrices = [matrix for block in stack.blocks for matrix in (block.in_proj, block.x_proj, block.out_proj)]
    plain = stack.narrow == "float32" and all(matrix.kind in _KINDS for matrix in matrices)
    return plain or prompts.supported(stack)


def chosen(stack: Any) -> Stack | None:
    """The stack, if it is to be read by :func:`read` on this machine."""
    if not isinstance(stack, Stack) or not supported(stack):
        return None
    return stack if stack.narrow != "float32" or products.is_fast() else None


def read(stack: Stack, hidden: np.ndarray, before: States, after: States, threads: int) -> np.ndarray:
    """Read tokens.

    Args:
        stack: :func:`supported`.
        hidden: (B, L, M) float32 or narrower.
        before: the states.
        after: where the states after the last token are to be written; none of those read.
        threads: how many may work; the result is the same whatever their number.

    Returns:
        (B, L, M) float32, its own memory.
    """
    if prompts.supported(stack):
        return prompts.read(stack, hidden, before, after, threads)
    _, D, N, K, _ = stack.sizes
    batch = len(hidden)
    shapes = (batch, K - 1, D), (batch, D, N)
    result = copied(hidden)
    for number, block in enumerate(stack.blocks):
        old, new = (
            State(*(_at(int(p[number]), s) for p, s in zip(x, shapes, strict=True))) for x in (before, after)
        )
        found, _ = forward(_parameters(stack.sizes, block), result, old, threads=threads)
        new.conv[...], new.ssm[...] = found
    return result


def _parameters(sizes: Sizes, block: BlockWeights) -> Parameters:
    M, D, N, K, R = sizes
    return Parameters(
        epsilon=block.epsilon,
        norm=_at(block.norm, (M,)),
        in_proj=_matrix(block.in_proj),
        in_bias=_optional(block.in_bias, 2 * D),
        conv=_at(block.conv, (D, 1, K)),
        conv_bias=_optional(block.conv_bias, D),
        x_proj=_matrix(block.x_proj),
        dt_proj=_at(block.dt_proj, (D, R)),
        dt_bias=_optional(block.dt_bias, D),
        A_log=_at(block.A_log, (D, N)),
        D=_at(block.D, (D,)),
        out_proj=_matrix(block.out_proj),
        out_bias=_optional(block.out_bias, M),
    )


def _matrix(weights: Weights) -> np.ndarray | Weights:
    return _at(weights.address, (weights.outputs, weights.inputs)) if weights.kind == "float32" else weights


def _optional(address: int, count: int) -> np.ndarray | None:
    return _at(address, (count,)) if address else None


def _at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    return array_at(address, shape, _FLOAT32)
