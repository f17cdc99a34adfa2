"""A prompt through a stack of Mamba-1 blocks in one call of a kernel.

Between the phases threads wait in a loop, some microseconds. Work that Python hands out takes them ten times as
long to begin, and while Python prepares it nobody works.

Dimensions: B rows, L length, M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mambax_cpu import prompt_table as field
from mambax_cpu.addresses import array_at
from mambax_cpu.block import copied
from mambax_cpu.buffers import narrow_room
from mambax_cpu.chain import perform, table_of
from mambax_cpu.compilation import KernelFile
from mambax_cpu.native_code import processor
from mambax_cpu.step import Stack
from mambax_cpu.stepping import States
from mambax_cpu.tiles import ADDED, CONV_STEPS, NARROW, STRIP, WIDE, WIDTH, prompt_scratch

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""What narrow values may be."""

_WIDTH = 4
"""The K that there is a kernel for."""

_LONGEST = 3200
"""Words of a sum, at most: a strip of such weights fits into the second cache."""

_CACHED = 300_000
"""Bytes of weights that a thread works on at a time, to stay in the second cache beside some rows of x."""

_SHORTEST = 64
"""Rows that make copying a strip of weights worth while."""

_PIECES = 4
"""Tasks for each thread, where there are enough columns and rows for that many."""

_SPARE = 8
"""Rows that a tile may read after the last."""

_NORM_ROWS = 16
"""Rows of a task of the norm."""

_kernels = KernelFile("mambax_cpu.prompt_kernels")


def supported(stack: Stack) -> bool:
    """Whether there is a kernel for these sizes and precisions."""
    M, D, N, K, R = stack.sizes
    kinds = {matrix.kind for block in stack.blocks for matrix in (block.in_proj, block.x_proj, block.out_proj)}
    if K != _WIDTH or kinds != {stack.narrow} or stack.narrow not in DTYPES:
        return False
    selected = (R + 2 * N,) if stack.narrow == "float32" else (R, 2 * N)
    if max(M, D) > _unit(stack.narrow) * _LONGEST or any(size % WIDTH for size in (M, D, *selected)):
        return False
    return N % 2 == 0 and (stack.narrow == "float32" or multiplies_pairs())


@cache
def multiplies_pairs() -> bool:
    """Whether this processor adds products of pairs of bfloat16, sixteen at a time, and has nothing faster.

    Some have units for whole tiles of bfloat16 (AMX), which PyTorch's products use and these do not.
    """
    features = processor().replace(" ", ",").split(",")
    return "+avx512bf16" in features and "+amx-bf16" not in features


def _unit(narrow: str) -> int:
    """Values to a word."""
    return 4 // DTYPES[narrow].itemsize


class _Part(NamedTuple):
    """Columns of a product: of x_proj there may be two kinds."""

    name: str  # of the phase
    skipped: int  # outputs before them
    outputs: int
    out: np.ndarray
    form: int


def read(stack: Stack, hidden: np.ndarray, before: States, after: States, threads: int) -> np.ndarray:
    """See :func:`mambax_cpu.prefill.read`; the stack is :func:`supported`."""
    M, D, N, _, R = stack.sizes
    batch, length, _ = hidden.shape
    rows, dtype, unit = batch * length, DTYPES[stack.narrow], _unit(stack.narrow)
    result = copied(hidden)
    normed, xz, u, y = (narrow_room(dtype, rows, count) for count in (M, 2 * D, D, D))
    wide = dtype == np.float32
    if wide:  # dt, B and C of a row side by side
        dt = bc = narrow_room(dtype, rows + _SPARE, R + 2 * N)
        b = _address(bc) + 4 * R
        parts = [_Part("x_proj", 0, R + 2 * N, bc, WIDE)]
    else:
        dt, bc = narrow_room(dtype, rows + _SPARE, R), narrow_room(np.dtype(np.float32), rows, 2 * N)
        b = _address(bc)
        parts = [_Part("dt", 0, R, dt, NARROW), _Part("bc", R, 2 * N, bc, WIDE)]
    inner = _product(normed, xz, 2 * D, M // unit, WIDE if wide else NARROW, threads)
    selected = {part.name: _product(u, part.out, part.outputs, D // unit, part.form, threads) for part in parts}
    outer = _product(y, result, M, D // unit, ADDED, threads)
    phases = {
        "norm": {
            field.OPERATION: field.NORM,
            field.TASKS: math.ceil(rows / _NORM_ROWS),
            field.SIZE: _NORM_ROWS,
            field.ROWS: rows,
            field.X: _address(result),
            field.OUT: _address(normed),
            field.INPUTS: M,
        },
        "in_proj": inner,
        "conv": {
            field.OPERATION: field.CONVOLVE,
            field.TASKS: batch * math.ceil(length / CONV_STEPS),
            field.X: _address(xz),
            field.X_ROW: 2 * D,
            field.OUT: _address(u),
            field.LENGTH: length,
            field.CHANNELS: D,
        },
        **selected,
        "recur": {
            field.OPERATION: field.RECUR,
            field.TASKS: batch * math.ceil(D / STRIP),
            field.U: _address(u),
            field.Z: _address(xz) + D * dtype.itemsize,
            field.Z_ROW: 2 * D,
            field.X: _address(dt),
            field.X_ROW: dt.shape[1] // unit,
            field.INPUTS: R // unit,
            field.B: b,
            field.C: b + 4 * N,
            field.BC_ROW: bc.shape[1],
            field.OUT: _address(y),
            field.LENGTH: length,
            field.CHANNELS: D,
            field.STATES: N,
        },
        "out_proj": outer,
    }
    convolutions = _convolutions(stack)
    epsilons = np.array([block.epsilon for block in stack.blocks], np.float32)
    table = _filled(phases, parts, stack, convolutions, epsilons, before, after)
    products = [(phase[field.SIZE], phase[field.INPUTS]) for phase in (inner, outer, *selected.values())]
    perform(stack.narrow, table, threads, prompt_scratch(N, R // unit, products), _kernels)
    return result


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]


def _product(x: np.ndarray, out: np.ndarray, outputs: int, inputs: int, form: int, threads: int) -> dict[int, int]:
    """The fields of a product that are the same in every block; `inputs` are words."""
    rows, strips = math.prod(x.shape[:-1]), math.ceil(outputs / STRIP)
    group = max(1, min(_CACHED // (4 * STRIP * inputs), strips // (_PIECES * threads)))
    groups = math.ceil(strips / group)
    splits = 1 if threads == 1 else max(1, min(math.ceil(_PIECES * threads / groups), rows // _SHORTEST))
    return {
        field.OPERATION: field.PRODUCT,
        field.TASKS: groups * splits,
        field.SIZE: group,
        field.SPLITS: splits,
        field.ROWS: rows,
        field.X: _address(x),
        field.X_ROW: inputs,
        field.INPUTS: inputs,
        field.OUT: _address(out),
        field.OUT_ROW: outputs,
        field.OUTPUTS: outputs,
        field.FORM: form,
    }


def _convolutions(stack: Stack) -> np.ndarray:
    """What the convolutions take, (blocks, K + 1, D) float32: the weights of the steps, then the bias."""
    D, K, dtype = stack.sizes.channels, stack.sizes.width, DTYPES[stack.narrow]
    held = np.zeros((len(stack.blocks), K + 1, D), np.float32)
    for own, block in zip(held, stack.blocks, strict=True):
        own[:K] = array_at(block.conv, (D, K), dtype).T
        if block.conv_bias:
            own[K] = array_at(block.conv_bias, (D,), dtype)
    return held


def _filled(
    phases: dict[str, dict[int, int]],
    parts: Sequence[_Part],
    stack: Stack,
    convolutions: np.ndarray,
    epsilons: np.ndarray,
    before: States,
    after: States,
) -> np.ndarray:
    """The table: the phases of a block again and again, with the addresses that differ."""
    count, each = len(stack.blocks), len(phases)
    table = np.tile(table_of(list(phases.values())), (count, 1))
    place = {name: number for number, name in enumerate(phases)}

    def fill(phase: str, column: int, values: Sequence[int] | np.ndarray) -> None:
        table[place[phase] :: each, column] = values

    own = stack.blocks
    fill("norm", field.WEIGHT, [block.norm for block in own])
    fill("norm", field.EPSILON, _address(epsilons) + epsilons.strides[0] * np.arange(count))
    fill("in_proj", field.WEIGHT, [block.in_proj.address for block in own])
    fill("in_proj", field.BIAS, [block.in_bias for block in own])
    fill("conv", field.CONV, _address(convolutions) + convolutions.strides[0] * np.arange(count))
    fill("conv", field.STATE, before.conv)
    fill("conv", field.NEW_STATE, after.conv)
    for part in parts:
        skipped = part.skipped * stack.sizes.channels * DTYPES[stack.narrow].itemsize
        fill(part.name, field.WEIGHT, [block.x_proj.address + skipped for block in own])
    fill("recur", field.WEIGHT, [block.dt_proj for block in own])
    fill("recur", field.BIAS, [block.dt_bias for block in own])
    fill("recur", field.A_LOG, [block.A_log for block in own])
    fill("recur", field.SKIP, [block.D for block in own])
    fill("recur", field.STATE, before.ssm)
    fill("recur", field.NEW_STATE, after.ssm)
    fill("out_proj", field.WEIGHT, [block.out_proj.address for block in own])
    fill("out_proj", field.BIAS, [block.out_bias for block in own])
    return table
