"""What the machine can do at most: memory, matrix products, exponentials.

Each contender is one way of getting at a limit; the limit is the best of them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mambax_cpu.compilation import KernelFile

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.contenders import c_library


def _on_threads(count: int, work: Callable[[int], Any]) -> Callable[[], None]:
    """A function that does work(0) to work(count - 1), each on a thread of its own."""
    pool = ThreadPoolExecutor(count)

    def run() -> None:
        list(pool.map(work, range(count)))

    return run


class Memory:
    """Reading, or copying, float32 arrays that no cache holds, one slice per thread. One run is job["bytes"] moved.

    Args:
        way: ``"kernel"`` sums in a compiled loop, ``"dot"`` with the BLAS of NumPy, ``"copy"`` copies with NumPy.
        threads: how many.
    """

    def __init__(self, way: str, threads: int) -> None:
        self.way = way
        self.threads = threads

    def prepare(self, job: Job) -> Task:
        """A job of kind read or copy; job["bytes"] counts what is read and what is written."""
        if (self.way == "copy") != (job["kind"] == "copy"):
            raise Unavailable(f"{self.way} is not a way to {job['kind']}")
        count = job["bytes"] // 4 // (2 if self.way == "copy" else 1) // self.threads
        slices = [np.ones(count, np.float32) for _ in range(self.threads)]
        if self.way == "copy":
            targets = [np.zeros(count, np.float32) for _ in range(self.threads)]
            return Task(_on_threads(self.threads, lambda i: np.copyto(targets[i], slices[i])))
        if self.way == "dot":
            return Task(_on_threads(self.threads, lambda i: np.dot(slices[i], slices[i])))
        sums = [np.empty(1, np.float32) for _ in range(self.threads)]
        add_up = KernelFile("benchmarks.contenders.sum_kernel").add_up
        return Task(_on_threads(self.threads, lambda i: add_up(slices[i], count, sums[i])))


class Products:
    """The product of two square matrices. One run is 2 n³ floating-point operations.

    Args:
        library: ``"numpy"``, ``"torch"`` (its linear layer) or ``"torch packed"`` (the same through oneDNN with the
            weight laid out for it).
        dtype: ``"float32"`` or ``"bfloat16"``.
    """

    def __init__(self, library: str, dtype: str) -> None:
        self.library = library
        self.dtype = dtype

    def prepare(self, job: Job) -> Task:
        """A job of kind product with the side n of the matrices in job["side"]."""
        side = job["side"]
        return Task(product(self.library, self.dtype, side, side, side))


def product(library: str, dtype: str, rows: int, inner: int, columns: int) -> Callable[[], None]:
    """x (rows, inner) times a weight (columns, inner) transposed, with a library; random values.

    Raises:
        Unavailable: when the library is missing or cannot do this.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, inner), np.float32)
    weight = rng.standard_normal((columns, inner), np.float32)
    if library == "numpy":
        if dtype != "float32":
            raise Unavailable(f"NumPy has no product of {dtype}")
        out = np.empty((rows, columns), np.float32)
        return lambda: _discard(np.matmul(x, weight.T, out=out))
    torch = optional("torch", "torch")
    wide = getattr(torch, dtype)
    a, b = torch.from_numpy(x).to(wide), torch.from_numpy(weight).to(wide)
    if library == "torch":
        linear = torch.nn.functional.linear
        return lambda: _discard(linear(a, b))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(b, rows)
        pointwise = torch.ops.mkldnn._linear_pointwise
        pointwise(a, packed, None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        raise Unavailable(f"torch has no packed products of oneDNN here: {str(error)[:120]}") from error
    return lambda: _discard(pointwise(a, packed, None, "none", [], ""))


def _discard(result: Any) -> None:
    """Drop a result, so that a measured call returns none."""


class Exponentials:
    """e^x of float32 values from -20 to 0 that stay in the cache. One run is job["count"] of them.

    Args:
        way: ``"numpy"``, ``"torch"`` or ``"C"`` (the polynomial of the loop in C).
        threads: how many.
    """

    def __init__(self, way: str, threads: int) -> None:
        self.way = way
        self.threads = threads

    def prepare(self, job: Job) -> Task:
        """A job of kind exponentials."""
        block = 1 << 14
        repeats = max(1, job["count"] // block // self.threads)
        x = [np.linspace(-20, 0, block, dtype=np.float32) for _ in range(self.threads)]
        y = [np.empty_like(part) for part in x]
        if self.way == "C":
            library = c_library.build()

            def once(i: int) -> None:
                library.exponentials(x[i].ctypes.data, y[i].ctypes.data, block)
        elif self.way == "torch":
            torch = optional("torch", "torch")
            pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(x, y, strict=True)]

            def once(i: int) -> None:
                torch.exp(pairs[i][0], out=pairs[i][1])
        else:

            def once(i: int) -> None:
                np.exp(x[i], out=y[i])

        def work(i: int) -> None:
            for _ in range(repeats):
                once(i)

        return Task(_on_threads(self.threads, work))
