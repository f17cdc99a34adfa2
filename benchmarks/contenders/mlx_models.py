"""Language models on MLX, by mambax and by mlx-lm, from the same weights on the same device.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.contenders.language_models import Mambax
from benchmarks.contenders.peer_models import MlxLm
from benchmarks.shapes import folder_of, read_shape

GROUP = 64
"""Inputs to a scale of quantised weights, as mlx-lm has it unless told otherwise."""


class OnMlx:
    """A model of one package on MLX's device.

    Args:
        package: ``"mambax"`` or ``"mlx-lm"``.
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
            self.runner.model = mambax.load(place, backend="mlx", **options)
            self.logits: Callable[[Any], Any] = lambda ids: self.runner.model(ids).logits
        elif package == "mlx-lm":
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
        """A job of kind prefill (length), decode (batch, steps) or training (batch, length)."""
        rng = np.random.default_rng(0)
        if job["kind"] == "prefill":
            ids = rng.integers(0, self.vocabulary, job["length"])
            read = self.runner.read if isinstance(self.runner, Mambax) else self.runner.prefill
            return Task(lambda: _drop(read(ids)), parts=job["length"], check=self._figures)
        if job["kind"] == "decode":
            step = self.runner.decoder(rng.integers(0, self.vocabulary, (job["batch"], 16)))
            return Task(lambda: step(job["steps"]), parts=job["steps"], check=self._figures)
        return self._training(rng.integers(0, self.vocabulary, (job["batch"], job["length"] + 1)))

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
