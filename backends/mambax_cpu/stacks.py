"""What a stack of Mamba-1 blocks of a framework is to the kernels of :mod:`mambax_cpu.step`.

Blocks are known by their structure, which is the same in every framework whose arrays lie in host memory: nothing
here imports one.

Dimensions: M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from mambax_cpu.chain import Weights
from mambax_cpu.step import BlockWeights, Sizes, Stack, supported

_REPLACED = frozenset({"forward", "_compiled_call_impl"})
"""Attributes of an instance that take the place of what its class computes."""


class Classes(NamedTuple):
    """The classes of a framework that the kernels compute."""

    block: type
    mixer: type
    norm: type
    conv: type
    linear: type
    quantized: type

    def forwards(self) -> list[Any]:
        """What calling an object of each class runs."""
        return [cls.forward for cls in self]  # pyright: ignore[reportAttributeAccessIssue] each has it


class Given(Protocol):
    """Takes the arrays of a framework. A stack is one for the kernels where all that it took did fit."""

    narrow: str  # name of the precision of the small weights: "float32", "bfloat16" or "float16"
    fit: bool  # False from the first that has a shape, dtype or layout that the kernels do not take

    def vector(self, array: Any, shape: tuple[int, ...], *, wide: bool = False) -> int:
        """The address of an array, in the narrow precision or, if `wide`, float32; 0 for None."""
        ...

    def matrix(self, layer: Any, shape: tuple[int, int]) -> Weights:
        """The weight of a linear layer."""
        ...


def stack_of(
    blocks: Sequence[Any], classes: Classes, homes: Sequence[str], given: Callable[[Any], Given]
) -> Stack | None:
    """The blocks for the kernels; None where one of them is anything else than they compute.

    Args:
        blocks: at least one.
        classes: those that the kernels compute; no subclass of them.
        homes: modules with the definitions of their ``forward``; that of a patched class is from elsewhere.
        given: of the dtype of the small weights, what takes the arrays.
    """
    if not all(_is_known(block, classes, homes) for block in blocks):
        return None
    first = blocks[0]
    if any(block.residual_in_fp32 != first.residual_in_fp32 for block in blocks):
        return None
    config = first.mixer.config
    sizes = Sizes(config.d_model, config.d_inner, config.d_state, config.d_conv, int(config.dt_rank))
    taken = given(first.norm.weight.dtype)
    weights = [_weights(block, sizes, taken) for block in blocks]
    return Stack(sizes, taken.narrow, weights) if taken.fit and supported(taken.narrow, weights) else None


def _is_known(block: Any, classes: Classes, homes: Sequence[str]) -> bool:
    """Whether a block consists of these classes, called through their own ``forward``, and has no option that the
    kernels do not know."""
    if type(block) is not classes.block or type(block.mixer) is not classes.mixer:
        return False
    mixer = block.mixer
    linears = mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj
    parts = block, mixer, block.norm, mixer.conv1d, *linears
    return (
        mixer.config.scan in ("auto", "cpu")
        and mixer.config.dt_b_c_norm == "none"
        and block.residual_multiplier == 1
        and type(block.norm) is classes.norm
        and type(mixer.conv1d) is classes.conv
        and all(type(linear) in (classes.linear, classes.quantized) for linear in linears)
        and type(mixer.dt_proj) is classes.linear
        and mixer.x_proj.bias is None
        and not any(vars(part).keys() & _REPLACED for part in parts)
        and all(type(part).forward.__module__ in homes for part in parts)
    )


def _weights(block: Any, sizes: Sizes, given: Given) -> BlockWeights:
    mixer = block.mixer
    M, D, N, K, R = sizes
    return BlockWeights(
        norm=given.vector(block.norm.weight, (M,)),
        epsilon=block.norm.eps,
        in_proj=given.matrix(mixer.in_proj, (2 * D, M)),
        in_bias=given.vector(mixer.in_proj.bias, (2 * D,)),
        conv=given.vector(mixer.conv1d.weight, (D, 1, K)),
        conv_bias=given.vector(mixer.conv1d.bias, (D,)),
        x_proj=given.matrix(mixer.x_proj, (R + 2 * N, D)),
        dt_proj=given.vector(mixer.dt_proj.weight, (D, R)),
        dt_bias=given.vector(mixer.dt_proj.bias, (D,), wide=True),
        A_log=given.vector(mixer.A_log, (D, N), wide=True),
        D=given.vector(mixer.D, (D,), wide=True),
        out_proj=given.matrix(mixer.out_proj, (M, D)),
        out_bias=given.vector(mixer.out_proj.bias, (M,)),
    )
