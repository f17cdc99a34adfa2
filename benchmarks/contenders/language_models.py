"""Language models: prefill and decoding, by mambax and by others, from the same random weights.

A contender of this kind is a :class:`Runner`; :class:`Model` turns jobs into its calls.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import memory
from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.shapes import PROMPT, REFERENCE, folder_of, read_shape


class Runner(Protocol):
    """A language model with its weights."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits (V,) after the last of the token ids (L,), read from an empty state."""
        ...

    def decoder(self, prompts: np.ndarray) -> Callable[[int], None]:
        """What decodes so many more tokens of each row at each call, greedily, after prompts (B, L)."""
        ...

    def parameter_bytes(self) -> int:
        """Memory of the weights."""
        ...


class Model:
    """A runner as a contender.

    Args:
        runner: name of a runner of :data:`RUNNERS`.
        folder: what :mod:`benchmarks.weights` wrote.
        options: the runner's own.
    """

    def __init__(self, runner: str, folder: str, **options: Any) -> None:
        self.folder = Path(folder)
        self.vocabulary = read_shape(self.folder)["vocab_size"]
        self.runner: Runner = RUNNERS[runner](self.folder, **options)

    def prepare(self, job: Job) -> Task:
        """A job of kind prefill (length), decode (batch, steps), flat (batch, steps in so many windows) or reach
        (steps of a window after so many tokens, for each of the positions).

        With compare=False, the logits of a prefill are not compared with the reference, which is another length.
        """
        rng = np.random.default_rng(0)
        if job["kind"] == "reach":
            return self._reach(job)
        if job["kind"] == "prefill":
            ids = rng.integers(0, self.vocabulary, job["length"])
            read = self.runner.read if isinstance(self.runner, Mambax) else self.runner.prefill
            check = self._check if job.get("compare", True) else self._bytes
            return Task(lambda: _drop(read(ids)), parts=job["length"], check=check)
        step = self.runner.decoder(rng.integers(0, self.vocabulary, (job["batch"], 16)))
        if job["kind"] == "decode":
            return Task(lambda: step(job["steps"]), parts=job["steps"], check=self._bytes)
        return self._flat(job, step)

    def _bytes(self) -> dict[str, float]:
        return {"weights": self.runner.parameter_bytes()}

    def _check(self) -> dict[str, float]:
        """The distance of its logits from those of the reference, in float32."""
        want = np.load(self.folder / REFERENCE).astype(np.float64)
        ids = np.random.default_rng(1).integers(0, self.vocabulary, PROMPT)
        got = self.runner.prefill(ids).astype(np.float64)[: len(want)]
        return self._bytes() | {"error": float(np.linalg.norm(got - want) / np.linalg.norm(want))}

    def _flat(self, job: Job, step: Callable[[int], None]) -> Task:
        import time

        window = job["steps"] // job["windows"]
        figures: dict[str, float] = {}

        def run() -> None:
            step(min(window, 200))
            for i in range(job["windows"]):
                start = time.perf_counter()
                step(window)
                took = (time.perf_counter() - start) / window
                memory.release()
                if i == 0:
                    figures.update(first_step=took, first_resident=memory.resident())
                figures.update(last_step=took, last_resident=memory.resident())

        return Task(run, parts=job["steps"], check=lambda: figures, warm_up=False)

    def _reach(self, job: Job) -> Task:
        """Steps after prompts of several lengths, which are read as prompts are, and not step by step.

        A prompt of two chunks comes first: what a chunk works in is kept from then on, whatever follows.
        """
        import time

        from mambax.generation import PREFILL_CHUNK

        window, positions = job["window"], job["positions"]
        figures: dict[str, float] = {}

        def run() -> float:
            spent = 0.0
            self.runner.decoder(np.zeros((1, 2 * PREFILL_CHUNK), np.int64))(1)
            for position in positions:
                rng = np.random.default_rng(position)
                step = self.runner.decoder(rng.integers(0, self.vocabulary, (1, position)))
                step(window)  # and the prompt before
                samples = []
                for _ in range(window):
                    start = time.perf_counter()
                    step(1)
                    samples.append(time.perf_counter() - start)
                took, spent = float(np.median(samples)), spent + sum(samples)
                memory.release()
                if position == positions[0]:
                    figures.update(first_step=took, first_resident=memory.resident())
                figures.update({f"step_after_{position}": took}, last_step=took, last_resident=memory.resident())
            return spent

        return Task(run, parts=window * len(positions), check=lambda: figures, warm_up=False)


class Mambax:
    """mambax through its public interface.

    Args:
        folder: what :mod:`benchmarks.weights` wrote.
        backend: name of the backend.
        dtype: of the weights.
        quantize: ``"int8"``, ``"int4"`` or None.
        compiled: whether prompts are read through the backend's compiler of whole models.
    """

    def __init__(
        self, folder: Path, backend: str, dtype: str, quantize: str | None = None, compiled: bool = False
    ) -> None:
        import mambax

        if backend == "mlx":
            mx = optional("mlx.core", "mlx")
            mx.set_default_device(mx.cpu)
        options: dict[str, Any] = {"backend": backend, "device": "cpu", "dtype": dtype}
        if quantize is not None:
            if "quantize" not in inspect.signature(mambax.load).parameters:
                raise Unavailable(f"mambax.load has no quantize={quantize!r} in this version")
            options["quantize"] = quantize
        try:
            self.model = mambax.load(folder_of(folder, dtype), **options)
        except ImportError as error:
            raise Unavailable(str(error)) from error
        self.compiled = self.model.nn.compile(self.model) if compiled else None

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """In one call of the model, head of the last position only."""
        nn, model = self.model.nn, self.model if self.compiled is None else self.compiled
        with nn.no_grad():
            return nn.to_numpy(model(nn.from_numpy(ids[None]), logits_to_keep=1).logits)[0, -1]

    def read(self, ids: np.ndarray) -> None:
        """As a user does: generate one token; or call what was compiled."""
        if self.compiled is not None:
            self.prefill(ids)
        else:
            self.model.generate(ids, max_new_tokens=1, eos=())

    def decoder(self, prompts: np.ndarray) -> Callable[[int], None]:
        """The stream of generate_streaming, sampling and all."""
        stream = self.model.generate_streaming(
            [list(row) for row in prompts.tolist()], max_new_tokens=1 << 30, eos=()
        )

        def step(count: int) -> None:
            for _ in range(count * len(prompts)):
                next(stream)

        return step

    def parameter_bytes(self) -> int:
        """All arrays that the backend calls parameters."""
        return sum(int(array.nbytes) for array in self.model.nn.parameters(self.model).values())


def _drop(result: Any) -> None:
    """Nothing, of a result that is not looked at."""


def _runners() -> dict[str, Callable[..., Runner]]:
    from benchmarks.contenders import llama_cpp_models, peer_models

    return {
        "mambax": Mambax,
        "transformers": peer_models.Transformers,
        "mambapy": peer_models.Mambapy,
        "mlx-lm": peer_models.MlxLm,
        "llama.cpp": llama_cpp_models.LlamaCpp,
    }


RUNNERS = _runners()
"""The runners by name. Making one imports what it needs."""
