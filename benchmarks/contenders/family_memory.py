"""What a model takes while it is loaded and while it reads prompts, one after the other in a process of its own."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks import memory
from benchmarks.contender import Job, Task, optional


def read(model: Any, length: int) -> tuple[float, Any]:
    """Read so many random tokens as a user does: generate one token, or give an encoder the whole sequence.

    Returns:
        Seconds, and a function that gives the state after them.
    """
    ids = np.random.default_rng(length).integers(0, model.config.vocab_size, length)
    start = time.perf_counter()
    if model.config.causal:
        generation = model.generate(ids, max_new_tokens=1, eos=())
        return time.perf_counter() - start, lambda: generation.state
    with model.nn.no_grad():
        output = model(model.nn.from_numpy(ids[None]))
        model.nn.to_numpy(output.logits)
    return time.perf_counter() - start, lambda: output.state


class FamilyMemory:
    """mambax as it loads a checkpoint and reads prompts.

    Args:
        folder: a checkpoint.
        backend: name of the backend.
    """

    def __init__(self, folder: str, backend: str) -> None:
        self.folder, self.backend = folder, backend
        if backend == "torch":
            optional("torch", "torch")
        if backend == "mlx":
            mx = optional("mlx.core", "mlx")
            mx.set_default_device(mx.cpu)

    def prepare(self, job: Job) -> Task:
        """The job has ``prompts``, pairs of a number of tokens and how often a prompt of so many is read.

        Figures: bytes of the weights; the most bytes of the process up to the end of loading, and of each prompt;
        those of the state after each. Its time is that of the last prompt.
        """
        import mambax

        found: dict[str, float] = {"before": memory.resident()}

        def run() -> float:
            model = mambax.load(self.folder, backend=self.backend, device="cpu")
            values = model.nn.parameters(model).values()
            found["weights"] = sum(int(array.nbytes) for array in values)
            for array in values:  # what is mapped is in memory once it is read
                model.nn.to_numpy(array).max()
            found["loading"] = memory.peak()
            seconds = 0.0
            for length, times in job["prompts"]:
                memory.release()
                memory.reset_peak()
                for _ in range(times - 1):
                    read(model, length)
                seconds, state_after = read(model, length)
                found[f"prompt_{length}"] = memory.peak()
                found[f"seconds_{length}"] = seconds
                arrays = state_after().arrays().values()
                found[f"state_{length}"] = sum(int(array.nbytes) for array in arrays)
            return seconds

        return Task(run, check=lambda: found, warm_up=False)
