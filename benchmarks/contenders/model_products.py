"""The matrix products of a language model alone: what its prefill can be at most, with a library.

Dimensions: L length.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.contender import Job, Task, Unavailable
from benchmarks.contenders.limits import product
from benchmarks.shapes import read_shape


class ModelProducts:
    """Every product of every layer, each with a weight of its own, and the head for one position.

    Args:
        folder: what :mod:`benchmarks.weights` wrote.
        library: as of :class:`benchmarks.contenders.limits.Products`.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """

    def __init__(self, folder: str, library: str, dtype: str) -> None:
        self.shape = read_shape(Path(folder))
        self.library = library
        self.dtype = dtype

    def prepare(self, job: Job) -> Task:
        """A job of kind prefill."""
        if job["kind"] != "prefill":
            raise Unavailable("products alone are compared with prefill")
        m = self.shape["d_model"]
        d, rank = round(self.shape["expand"] * m), self.shape["dt_rank"]
        layer = [(m, 2 * d), (d, rank + 2 * self.shape["d_state"]), (rank, d), (d, m)]
        calls = [
            product(self.library, self.dtype, job["length"], inner, columns)
            for _ in range(self.shape["n_layer"])
            for inner, columns in layer
        ]
        calls.append(product(self.library, self.dtype, 1, m, self.shape["vocab_size"]))

        def run() -> None:
            for call in calls:
                call()

        return Task(run, parts=job["length"])
