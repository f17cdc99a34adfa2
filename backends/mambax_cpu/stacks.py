"""What a stack of blocks of a framework is to the kernels of :mod:`mambax_cpu.step`, all of them Mamba-1, and of
:mod:`mambax_cpu.mamba2_step`, all of them Mamba-2.

Blocks are known by their structure, which is the same in every framework whose arrays lie in host memory: nothing
here imports one.

Dimensions: M d_model, D d_inner, N d_state, K d_conv, R dt_rank. H heads, C channels of the convolution of Mamba-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from mambax_cpu.chain import Weights
from mambax_cpu.mamba2_step import Mamba2Sizes, Mamba2Stack, Mamba2Weights, mamba2_supported
from mambax_cpu.step import BlockWeights, Sizes, Stack, supported

_REPLACED = frozenset({"forward", "_compiled_call_impl"})
"""Attributes of an instance that take the place of what its class computes."""


class Classes(NamedTuple):
    """The classes of a framework that the kernels compute."""

    block: type
    mixer: type
    mamba2_mixer: type
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
) -> Stack | Mamba2Stack | None:
    """The blocks for the kernels; None where one of them is anything else than they compute.

    Args:
        blocks: at least one.
        classes: those that the kernels compute; no subclass of them.
        homes: modules with the definitions of their ``forward``; that of a patched class is from elsewhere.
        given: of the dtype of the small weights, what takes the arrays.
    """
    first = blocks[0]
    mamba2 = type(getattr(first, "mixer", None)) is classes.mamba2_mixer
    is_known = _is_known_mamba2 if mamba2 else _is_known
    if not all(is_known(block, classes, homes) for block in blocks):
        return None
    if any(block.residual_in_fp32 != first.residual_in_fp32 for block in blocks):
        return None
    taken = given(first.norm.weight.dtype)
    if mamba2:
        return _mamba2_stack(blocks, taken)
    config = first.mixer.config
    sizes = Sizes(config.d_model, config.d_inner, config.d_state, config.d_conv, int(config.dt_rank))
    weights = [_weights(block, sizes, taken) for block in blocks]
    return Stack(sizes, taken.narrow, weights) if taken.fit and supported(taken.narrow, weights) else None


def _is_known(block: Any, classes: Classes, homes: Sequence[str]) -> bool:
    """Whether a block consists of these classes, called through their own ``forward``, and has no option that the
    kernels do not know."""
    if type(block) is not classes.block or type(block.mixer) is not classes.mixer:
        return False
    mixer = block.mixer
    linears = mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj
    return (
        mixer.config.dt_b_c_norm == "none"
        and type(mixer.dt_proj) is classes.linear
        and mixer.x_proj.bias is None
        and _is_plain(block, (mixer.conv1d, *linears), linears, classes, homes)
    )


def _is_known_mamba2(block: Any, classes: Classes, homes: Sequence[str]) -> bool:
    """As :func:`_is_known`."""
    if type(block) is not classes.block or type(block.mixer) is not classes.mamba2_mixer:
        return False
    mixer, options = block.mixer, block.mixer.options
    linears = mixer.in_proj, mixer.out_proj
    norms = () if options.gated_norm == "none" else (mixer.norm,)
    return (
        options.gated_norm in ("gate_first", "none")
        and options.part_multipliers == (1.0,) * len(options.part_multipliers)
        and all(type(norm) is classes.norm for norm in norms)
        and _is_plain(block, (mixer.conv1d, *norms, *linears), linears, classes, homes)
    )


def _is_plain(
    block: Any, parts: Sequence[Any], linears: Sequence[Any], classes: Classes, homes: Sequence[str]
) -> bool:
    """What has to be true of a block and of the parts of its mixer, whichever it has."""
    mixer = block.mixer
    every = block, mixer, block.norm, *parts
    return (
        mixer.config.scan in ("auto", "cpu")
        and block.residual_multiplier == 1
        and type(block.norm) is classes.norm
        and type(mixer.conv1d) is classes.conv
        and all(type(linear) in (classes.linear, classes.quantized) for linear in linears)
        and not any(vars(part).keys() & _REPLACED for part in every)
        and all(type(part).forward.__module__ in homes for part in every)
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


def _mamba2_stack(blocks: Sequence[Any], given: Given) -> Mamba2Stack | None:
    first = blocks[0].mixer
    options = first.options
    if any(block.mixer.options != options for block in blocks):
        return None
    sizes = Mamba2Sizes(
        first.config.d_model, options.n_heads, options.head_dim, options.n_groups, options.d_state, options.d_conv
    )
    weights = [_mamba2_weights(block, sizes, given) for block in blocks]
    if not (given.fit and mamba2_supported(given.narrow, weights)):
        return None
    low, high = options.dt_limit
    return Mamba2Stack(sizes, (low if low > 0 else -math.inf, high), given.narrow, weights)


def _mamba2_weights(block: Any, sizes: Mamba2Sizes, given: Given) -> Mamba2Weights:
    mixer, options = block.mixer, block.mixer.options
    M, H, D, C, K = sizes.model, sizes.heads, sizes.inner, sizes.convolved, sizes.width
    gated = options.gated_norm == "gate_first"
    return Mamba2Weights(
        norm=given.vector(block.norm.weight, (M,)),
        epsilon=block.norm.eps,
        in_proj=given.matrix(mixer.in_proj, (D + C + H, M)),
        in_bias=given.vector(mixer.in_proj.bias, (D + C + H,)),
        conv=given.vector(mixer.conv1d.weight, (C, 1, K)),
        conv_bias=given.vector(mixer.conv1d.bias, (C,)),
        dt_bias=given.vector(mixer.dt_bias, (H,), wide=True),
        A_log=given.vector(mixer.A_log, (H,), wide=True),
        D=given.vector(mixer.D, (H,), wide=True),
        gated_norm=given.vector(mixer.norm.weight, (D,)) if gated else 0,
        gated_epsilon=options.norm_epsilon,
        out_proj=given.matrix(mixer.out_proj, (M, D)),
        out_bias=given.vector(mixer.out_proj.bias, (M,)),
    )
