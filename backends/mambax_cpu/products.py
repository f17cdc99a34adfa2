"""Matrix products of many rows over NumPy arrays, in float32: by the kernels of this package, or by NumPy.

NumPy's wheels bring a library for products that may not know the processor, and then reaches half of its rate;
with it come threads that are not those of the other kernels. Which is faster is measured once per process.

Dimensions: M rows, N columns, K inner.
"""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from mambax_cpu.buffers import room
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, kernel_ready, refuse_float64
from mambax_cpu.threads import default_threads, run
from mambax_cpu.tiles import BLOCK, STRIP, WIDTH, product_scratch

_kernels = KernelFile("mambax_cpu.product_kernels")

_SMALL = 1 << 18
"""Products (M N K) below which waking another thread costs more than it saves."""

_LARGE = 1 << 21
"""Products from which on the choice matters."""

_CACHED = 400_000
"""Bytes of b that a thread works on at a time: they are to stay in the second cache, beside some rows of a."""

_SHORTEST = 128
"""Rows that make copying a strip of b worth while."""

_PIECES = 4
"""Tasks for each thread, where there are enough columns and rows for that many."""

_LEAST_ROUNDS = 5
_ROUNDS = 50
"""Of a comparison; it ends as soon as ours is the faster one, which other work at that moment may hide for long."""

_NOT_SLOWER = 1.1


def product(
    a: np.ndarray,
    b: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    out: np.ndarray | None = None,
    add: bool = False,
    threads: int | None = None,
) -> np.ndarray:
    """a b^T + bias, (M, N) float32, the same bits whatever the number of threads.

    Args:
        a: (M, K) float32 or narrower.
        b: (N, K) float32 or narrower.
        bias: (N,) or None.
        out: (M, N) float32 with contiguous rows, which is written; a new array when None.
        add: add the product to what `out` holds, instead; without a bias.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.

    Raises:
        ValueError: for shapes that do not fit, float64, and `add` without `out` or with a bias.
    """
    if add and (out is None or bias is not None):
        raise ValueError("product: add=True needs an out to add to, and takes no bias; add the bias to out before")
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"product: a must be (M, K) and b (N, K), found {a.shape} and {b.shape}")
    (rows, inner), columns = a.shape, b.shape[0]
    check_shape("product", "b", b, (columns, inner))
    check_shape("product", "bias", bias, (columns,))
    check_shape("product", "out", out, (rows, columns))
    refuse_float64("product", a)
    refuse_float64("product", b)
    if out is None:
        out = room(rows, columns)
    elif out.dtype != np.float32 or (columns > 1 and out.strides[1] != 4):
        raise ValueError(f"product: out must be float32 with contiguous rows, found {out.dtype} {out.strides}")
    if inner == 0:
        if not add:
            out[:] = 0 if bias is None else bias
        return out
    small = rows * columns * inner < _SMALL
    threads = 1 if small else (default_threads() if threads is None else threads)
    a, b, bias = _with_contiguous_rows(a, threads), _with_a_contiguous_axis(b), kernel_ready(bias)
    group, splits = _division(rows, columns, inner, threads)
    addresses = [0 if x is None else x.__array_interface__["data"][0] for x in (a, b, out, bias)]
    strides = [stride // 4 for x in (a, b, out) for stride in x.strides]

    def work(first: int, last: int) -> None:
        scratch = room(product_scratch(group, inner))
        _kernels.multiply(
            addresses[0], strides[0], addresses[1], strides[2], strides[3], addresses[2], strides[4], addresses[3],
            int(add), rows, columns, inner, group, splits, first, last, scratch,
        )  # fmt: skip

    run(work, -(-columns // (STRIP * group)) * splits, threads)
    return out


def _division(rows: int, columns: int, inner: int, threads: int) -> tuple[int, int]:
    """How many strips a task takes, and into how many ranges the rows are cut."""
    strips = -(-columns // STRIP)
    group = max(1, _CACHED // (4 * STRIP * min(inner, BLOCK)))
    group = max(1, min(group, strips // (_PIECES * threads)))
    splits = -(-_PIECES * threads // -(-strips // group)) if threads > 1 else 1
    return group, max(1, min(splits, rows // _SHORTEST))


def _with_contiguous_rows(a: np.ndarray, threads: int) -> np.ndarray:
    rows, columns = a.shape
    ready = a.dtype == np.float32 and a.flags.aligned
    if not ready or a.strides[1] == 4 or a.strides[0] != 4 or a.strides[1] % 4:
        return kernel_ready(a)
    copy = room(rows, columns)
    source, target = (x.__array_interface__["data"][0] for x in (a, copy))
    stride = a.strides[1] // 4

    def work(first: int, last: int) -> None:
        _kernels.transpose(source, stride, target, rows, columns, first, last)

    run(work, -(-rows // WIDTH), threads)
    return copy


def _with_a_contiguous_axis(b: np.ndarray) -> np.ndarray:
    flat = b.dtype == np.float32 and b.flags.aligned and b.strides[0] == 4 and b.strides[1] % 4 == 0
    return b if flat else kernel_ready(b)


@cache
def is_fast() -> bool:
    """Whether :func:`product` is at least about as fast here as NumPy's product; measured by the first call."""
    a, b = np.full((256, 512), 0.5, np.float32), np.full((768, 512), 0.5, np.float32)
    out = np.empty((256, 768), np.float32)
    ours = theirs = float("inf")
    for done in range(_ROUNDS):
        if done >= _LEAST_ROUNDS and ours < _NOT_SLOWER * theirs:
            return True
        start = time.perf_counter()
        np.matmul(a, b.T, out=out)
        middle = time.perf_counter()
        product(a, b, out=out)
        ours, theirs = min(ours, time.perf_counter() - middle), min(theirs, middle - start)
    return ours < _NOT_SLOWER * theirs


def fastest(
    a: np.ndarray,
    b: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """a b^T + bias of float32 arrays by :func:`product` or by NumPy, whichever is faster on this machine."""
    if a.size * b.shape[0] >= _LARGE and is_fast():
        return product(a, b, bias, out=out, threads=threads)
    result = np.matmul(a, b.T, out=out)
    if bias is not None:
        result += bias
    return result
