"""Loading a model, for the memory that it takes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contender import Job, Task, optional
from benchmarks.shapes import folder_of


class Loading:
    """``mambax.load`` of float32 weights. Its ``working`` memory is what loading takes, the weights included.

    Args:
        folder: what :mod:`benchmarks.weights` wrote.
        backend: name of the backend.
    """

    def __init__(self, folder: str, backend: str) -> None:
        self.folder = folder_of(Path(folder), "float32")
        self.backend = backend
        if backend != "numpy":
            optional({"torch": "torch", "mlx": "mlx.core"}[backend], backend)

    def prepare(self, job: Job) -> Task:
        """Every job is the same: load the weights and read each of them."""
        import mambax

        found: dict[str, float] = {}

        def run() -> None:
            model = mambax.load(self.folder, backend=self.backend, device="cpu")
            values = model.nn.parameters(model).values()
            model.nn.evaluate(*values)
            found["weights"] = sum(int(array.nbytes) for array in values)
            for array in values:  # what is mapped is in memory once it is read
                model.nn.to_numpy(array).max()

        return Task(run, check=lambda: found, warm_up=False)
