"""Many tokens through a stack of Mamba-1 blocks, of which a stack knows the addresses of the weights.

Dimensions: B rows, L length, M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.block import Parameters, State, copied, forward
from mambax_cpu.chain import Weights
from mambax_cpu.step import BlockWeights, Sizes, Stack, States

_KINDS = ("float32", "int8", "int4")


def supported(stack: Stack) -> bool:
    """Whether all that is not quantised is float32; narrower weights are for the framework's own products."""
    matrices = [matrix for block in stack.blocks for matrix in (block.in_proj, block.x_proj, block.out_proj)]
    return stack.narrow == "float32" and all(matrix.kind in _KINDS for matrix in matrices)


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


class _Memory:
    """What tells NumPy of float32 values at an address."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        typestr = np.dtype(np.float32).str
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": typestr, "version": 3}


def _at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values at an address, which the caller keeps."""
    return np.empty(shape, np.float32) if 0 in shape else np.asarray(_Memory(address, shape))
