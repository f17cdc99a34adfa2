"""Training in MLX: ``mlx.optimizers.AdamW``, weights cast for the computation, one process.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mambax.checkpoint.matching import KEPT_IN_FLOAT32
from mambax.state import InferenceParams
from mambax.training.batches import Batch
from mambax.training.config import TrainingConfig
from mambax.training.engine import Part
from mambax.training.matching import check_arrays
from mambax.training.process_memory import peak_resident_bytes
from mambax.training.weights import is_saved, write_weights
from mambax.training.whole import export_whole, load_whole, save_whole
from mambax_mlx import ops
from mambax_mlx.module import parameters

Flat = dict[str, mx.array]


def trainable(model: mlx.nn.Module) -> Flat:
    """The parameters that are trained, by path."""
    flat: Any = tree_flatten(model.trainable_parameters())
    return dict(flat)


class Engine:
    """See :class:`mambax.training.engine.Engine`.

    Args:
        model: a model of this backend, in float32.
        config: how to train it.
        decayed: paths of the parameters that decay.
    """

    process, processes = 0, 1

    def __init__(self, model: Any, config: TrainingConfig, decayed: Collection[str]) -> None:
        self.model = model
        self.weights = trainable(model)
        self.gradients: Flat = {}
        self.kinds: list[Any] = []  # of the states of the layers, which gradients return as bare tuples
        self.precision = config.precision
        model.backbone.gradient_checkpointing = config.gradient_checkpointing
        names = frozenset(self.weights)
        self.groups = [
            (group, _adamw(config, rate))
            for group, rate in ((names & set(decayed), config.weight_decay), (names - set(decayed), 0.0))
            if group
        ]

    def accumulate(self, batch: Batch, divisor: float, state: InferenceParams | None, *, last: bool = True) -> Part:
        """Add the gradients of a part of the batch."""
        self.model.train()
        run = mx.value_and_grad(lambda weights: self._run(weights, batch, divisor, state))
        found, gradients = run(self.weights)
        held = self.gradients
        self.gradients = {n: held[n] + g for n, g in gradients.items()} if held else gradients
        self._hold(self.weights)
        return self._part(found, self.gradients)

    def evaluate(self, batch: Batch, divisor: float, state: InferenceParams | None) -> Part:
        """The loss of a batch."""
        self.model.eval()
        found = self._run(self.weights, batch, divisor, state)
        self._hold(self.weights)
        return self._part(found, {})

    def _run(self, weights: Flat, batch: Batch, divisor: float, state: InferenceParams | None) -> Any:
        """(loss, (accuracy or None, state of the layers, tokens seen)): arrays alone, as gradients need."""
        if self.precision == "bfloat16":
            weights = {
                name: array if name.endswith(KEPT_IN_FLOAT32) else array.astype(mx.bfloat16)
                for name, array in weights.items()
            }
        self._hold(weights)
        output = self.model(**batch.arguments(), state=state, num_items_in_batch=divisor)
        after = output.state.detach()
        self.kinds = [type(layer) for layer in after.layers]
        return output.loss, (output.accuracy, after.layers, after.tokens_seen)

    def _part(self, found: Any, gradients: Flat) -> Part:
        loss, (accuracy, layers, seen) = found
        mx.eval(loss, accuracy, layers, seen, gradients)
        named = tuple(kind(*layer) for kind, layer in zip(self.kinds, layers, strict=True))
        state = self.model.nn.InferenceParams(named, seen)
        return Part(loss.item(), math.nan if accuracy is None else accuracy.item(), state)

    def _hold(self, weights: Flat) -> None:
        self.model.update(tree_unflatten(list(weights.items())))

    def reduce_gradients(self) -> None:
        """Nothing to add up in one process."""

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """The values themselves, in one process."""
        return list(values)

    def clip_gradients(self, max_norm: float) -> float:
        """Clip to the global norm, as ``torch.nn.utils.clip_grad_norm_`` does; the norm before."""
        norm = mx.sqrt(sum((mx.sum(mx.square(g)) for g in self.gradients.values()), mx.array(0.0)))
        if max_norm:
            scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
            self.gradients = {name: g * scale for name, g in self.gradients.items()}
        return float(np.array(norm))

    def update(self, learning_rate: float) -> None:
        """One step of AdamW."""
        for names, optimizer in self.groups:
            optimizer.learning_rate = mx.array(learning_rate)
            gradients = {name: self.gradients[name] for name in sorted(names)}
            held = {name: self.weights[name] for name in sorted(names)}
            self.weights = self.weights | dict(optimizer.apply_gradients(gradients, held))
        self.gradients = {}
        self._hold(self.weights)
        mx.eval(self.weights, *(optimizer.state for _, optimizer in self.groups))

    def arrays(self) -> dict[str, np.ndarray]:
        """Moments by path, the number of steps, and MLX's random state."""
        found = {"random.mlx": np.array(_random_key(), np.uint32)}
        steps = 0
        for names, optimizer in self.groups:
            steps = _steps(optimizer)
            for name in names if steps else ():
                found[f"first.{name}"] = ops.to_numpy(optimizer.state[name]["m"])
                found[f"second.{name}"] = ops.to_numpy(optimizer.state[name]["v"])
        return found | {"step": np.array(steps, np.int64)}

    def restore(self, weights: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
        """Take weights and moments back."""
        held = {name: array for name, array in parameters(self.model).items() if is_saved(self.model, name)}
        check_arrays({name: tuple(array.shape) for name, array in held.items()}, weights, "weights")
        steps = int(arrays.get("step", np.array(0)))
        moments = {
            f"{kind}.{name}": tuple(array.shape)
            for name, array in self.weights.items()
            for kind in ("first", "second")
        }
        rest = {name: array for name, array in arrays.items() if name.startswith(("first.", "second."))}
        check_arrays(moments if steps else {}, rest, "moments of AdamW")
        self._hold({name: ops.from_numpy(array) for name, array in weights.items()})
        self.weights = trainable(self.model)
        for names, optimizer in self.groups:
            kept = {name: optimizer.state[name] for name in ("learning_rate",)}
            optimizer.state = kept | {"step": mx.array(steps, mx.uint64)}
            optimizer.init({name: self.weights[name] for name in sorted(names)})
            for name in names if steps else ():
                moments_of: Any = optimizer.state[name]
                moments_of["m"] = ops.from_numpy(arrays[f"first.{name}"])
                moments_of["v"] = ops.from_numpy(arrays[f"second.{name}"])
        if "random.mlx" in arrays:
            high, low = (int(word) for word in arrays["random.mlx"])
            mx.random.seed(high << 32 | low)
        mx.eval(self.weights)

    def save_model(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; of one with adapters, those alone."""
        write_weights(self.model, folder)

    def save(self, folder: Path) -> None:
        """Write everything from process 0."""
        save_whole(self, folder)

    def load(self, folder: Path) -> None:
        """Take it back, in every process."""
        load_whole(self, folder)

    def export(self, checkpoint: Path, folder: Path) -> None:
        """Write the model in a checkpoint for use, from process 0."""
        export_whole(self, checkpoint, folder)

    def memory(self) -> int | None:
        """The highest number of bytes that MLX held on a GPU; of the process on the CPU."""
        return peak_resident_bytes() if ops.devices()[0] == "cpu" else mx.get_peak_memory()


def _random_key() -> list[int]:
    """The two words of MLX's random state, which are also those of a seed."""
    state: Any = mx.random.state
    return state[0].tolist()


def _steps(optimizer: mlx.optimizers.AdamW) -> int:
    step: Any = optimizer.step
    return int(step.item())


def _adamw(config: TrainingConfig, weight_decay: float) -> mlx.optimizers.AdamW:
    return mlx.optimizers.AdamW(
        learning_rate=config.learning_rate,
        betas=[config.beta1, config.beta2],
        eps=config.epsilon,
        weight_decay=weight_decay,
        bias_correction=True,
    )
