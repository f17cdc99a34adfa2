"""Language models on MLX, by mambax and by mlx-lm, from the same weights on the same device.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.contenders.language_models import Mambax
from benchmarks.contenders.peer_models import MlxLm
from benchmarks.shapes import folder_of, read_shape
from mambax.generation import PREFILL_CHUNK

GROUP = 64
"""Inputs to a scale of quantised weights, as mlx-lm has it unless told otherwise."""

THEIR_CHUNK = 2048
"""Tokens of a prompt that mlx-lm reads at once, ``prefill_step_size``, unless told otherwise."""

LARGEST_GRAPH = 4096
"""Tokens beyond which a graph is not written out to be counted, which is recursive in MLX."""


class OnMlx:
    """A model of one package on MLX's device.

    Args:
        package: ``"mambax"``, ``"mlx-lm"``, or ``"mlx-lm, one call"``, which reads a long prompt in one piece.
        folder: what :mod:`benchmarks.weights` wrote.
        dtype: of the weights.
        bits: of quantised weights; None for weights of the dtype.
        device: ``"cpu"`` or ``"gpu"``.
    """

    def __init__(self, package: str, folder: str, dtype: str, bits: int | None = None, device: str = "cpu") -> None:
        self.mx, self.nn = optional("mlx.core", "mlx"), optional("mlx.nn", "mlx")
        self.mx.set_default_device(getattr(self.mx, device))
        self.vocabulary = read_shape(Path(folder))["vocab_size"]
        place = folder_of(Path(folder), dtype)
        self.runner: Any
        if package == "mambax":
            import mambax

            self.runner = Mambax.__new__(Mambax)  # over a model that is loaded here, on this device
            options: dict[str, Any] = {} if bits is None else {"quantize": bits, "group_size": self._group(folder)}
            self.runner.model, self.runner.compiled = mambax.load(place, backend="mlx", **options), None
            self.logits: Callable[[Any], Any] = lambda ids: self.runner.model(ids).logits
        elif package in ("mlx-lm", "mlx-lm, one call"):
            self.whole = package != "mlx-lm"
            self.runner = MlxLm.__new__(MlxLm)
            self.runner.mx = self.mx
            self.runner.model, _ = optional("mlx_lm.utils", "mlx-lm").load_model(place)
            if bits is not None:
                group = self._group(folder)

                def fits(path: str, layer: Any) -> bool:
                    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % group == 0

                self.nn.quantize(self.runner.model, group_size=group, bits=bits, class_predicate=fits)
                self.mx.eval(self.runner.model.parameters())
            self.logits = self.runner.model
        else:
            raise Unavailable(f"no model of {package} on MLX")

    def _group(self, folder: str) -> int:
        return GROUP if read_shape(Path(folder))["d_model"] % GROUP == 0 else 32

    def prepare(self, job: Job) -> Task:
        """A job of kind prefill or long (length), decode (batch, steps) or training (batch, length)."""
        rng = np.random.default_rng(0)
        if job["kind"] == "long":
            return self._long(rng.integers(0, self.vocabulary, job["length"]))
        if job["kind"] == "prefill":
            ids = rng.integers(0, self.vocabulary, job["length"])
            read = self.runner.read if isinstance(self.runner, Mambax) else self.runner.prefill
            # half a minute for mlx-lm: the tiny form of the job has warmed up
            return Task(lambda: _drop(read(ids)), parts=job["length"], check=self._figures, warm_up=False)
        if job["kind"] == "decode":
            step = self.runner.decoder(rng.integers(0, self.vocabulary, (job["batch"], 16)))
            return Task(lambda: step(job["steps"]), parts=job["steps"], check=self._figures)
        return self._training(rng.integers(0, self.vocabulary, (job["batch"], job["length"] + 1)))

    def _long(self, ids: np.ndarray) -> Task:
        """A long prompt: the memory that MLX held beyond what was there, and the graph of its first piece."""
        mx = self.mx
        ours = isinstance(self.runner, Mambax)
        whole = not ours and self.whole
        piece = PREFILL_CHUNK if ours else len(ids) if whole else THEIR_CHUNK
        figures: dict[str, float] = {}

        def run() -> None:
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            if ours:
                self.runner.read(ids)
            elif whole:
                self.runner.prefill(ids)
            else:
                self._in_chunks(ids)
            figures["beyond"] = mx.get_peak_memory() - before

        def check() -> dict[str, float]:
            if min(piece, len(ids)) <= LARGEST_GRAPH:
                figures["graph"] = self._graph(ids[:piece])
            return figures

        return Task(run, parts=len(ids), check=check, warm_up=False)

    def _in_chunks(self, ids: np.ndarray) -> None:
        """As mlx-lm's ``generate_step`` reads a prompt."""
        mx, tokens = self.mx, self.mx.array(ids)
        cache = self.runner.model.make_cache()
        for start in range(0, len(ids) - 1, THEIR_CHUNK):
            end = min(start + THEIR_CHUNK, len(ids) - 1)
            self.runner.model(tokens[start:end][None], cache=cache)
            mx.eval([c.state for c in cache])
            mx.clear_cache()
        mx.eval(self.runner.model(tokens[-1:][None], cache=cache))

    def _graph(self, ids: np.ndarray) -> int:
        """Operations and arrays that wait to be computed when a model has read these tokens."""
        text = io.StringIO()
        if isinstance(self.runner, Mambax):
            with self.runner.model.nn.no_grad():
                output = self.runner.model(ids[None], logits_to_keep=1)
            waiting = [output.logits, *(array for layer in output.state.layers for array in layer)]
        else:
            cache = self.runner.model.make_cache()
            waiting = [self.runner.model(self.mx.array(ids)[None], cache=cache)]
            waiting += [array for c in cache for array in c.state if isinstance(array, self.mx.array)]
        self.mx.export_to_dot(text, *waiting)
        return text.getvalue().count("[label")

    def _figures(self) -> dict[str, float]:
        return {"weights": self.runner.parameter_bytes(), "mlx_peak": self.mx.get_peak_memory()}

    def _training(self, ids: np.ndarray) -> Task:
        """A step: cross-entropy of the next token, gradients, AdamW."""
        mx, nn = self.mx, self.nn
        model, tokens = self.runner.model, mx.array(ids)
        optimizer = optional("mlx.optimizers", "mlx").AdamW(learning_rate=1e-4)

        def loss(model: Any) -> Any:
            return nn.losses.cross_entropy(self.logits(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

        step = nn.value_and_grad(model, loss)

        def run() -> None:
            value, gradients = step(model)
            optimizer.update(model, gradients)
            mx.eval(value, model.parameters(), optimizer.state)

        return Task(run, check=self._figures)


def _drop(result: Any) -> None:
    """Nothing, of a result that is not looked at."""
