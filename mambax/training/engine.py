"""What the training loop asks of a framework, on one page.

An engine holds a model, the gradients of the batch at hand and the framework's own AdamW. The loop
(:mod:`mambax.training.trainer`) knows nothing else of either. A backend has an engine when it has a module
``training`` with a class ``Engine``; it is imported when something is trained.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mambax.state import InferenceParams
from mambax.training.batches import Batch
from mambax.training.config import TrainingConfig
from mambax.training.groups import decayed_names
from mambax.training.processes import distributed_module


class Part(NamedTuple):
    """What a part of a batch gave.

    Attributes:
        loss: its summed loss over the divisor, so that the parts of a batch add up to the loss of the batch.
        accuracy: of its targets; NaN where it has none.
        state: the state after it, without gradient.
    """

    loss: float
    accuracy: float
    state: InferenceParams


class Engine(Protocol):
    """Forward, backward and update in one framework, in one of ``processes`` processes."""

    model: Any  # the model as the user knows it, in float32
    process: int  # the number of this process, from 0
    processes: int

    def accumulate(self, batch: Batch, divisor: float, state: InferenceParams | None, *, last: bool = True) -> Part:
        """Add the gradients of the summed loss over ``divisor`` to those held.

        ``last`` is for the last part of a batch in this process, whose gradients may already be added up over all.
        """
        ...

    def evaluate(self, batch: Batch, divisor: float, state: InferenceParams | None) -> Part:
        """The same without gradients."""
        ...

    def reduce_gradients(self) -> None:
        """Add up the gradients of all processes; each then holds the sum."""
        ...

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """Each number summed over all processes."""
        ...

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients to a global norm of at most ``max_norm`` (0: leave them); the norm before."""
        ...

    def update(self, learning_rate: float) -> None:
        """One step of AdamW with the gradients held, which are then gone."""
        ...

    def save(self, folder: Path) -> None:
        """Write what the framework would need to go on exactly as now into a folder: called in every process."""
        ...

    def load(self, folder: Path) -> None:
        """Take back what :meth:`save` wrote, on the same framework: called in every process.

        Raises:
            ValueError: when it is damaged, saying how to go back to another one, or of another model.
        """
        ...

    def export(self, checkpoint: Path, folder: Path) -> None:
        """Write the model in a checkpoint, or its adapters, where a person finds it: called in every process."""
        ...

    def memory(self) -> int | None:
        """Bytes in use at the highest; of the device, or of the process on the CPU. None where that is unknown."""
        ...


class WholeEngine(Engine, Protocol):
    """An engine with the whole model in every process, whose files are those of :mod:`mambax.training.whole`."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What the framework would need to go on exactly as now, beside the weights: moments and random states.

        Names are ``first.<path>``, ``second.<path>`` and ``step`` on every framework, ``random.*`` on each its own.
        """
        ...

    def restore(self, weights: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
        """Take back weights and what :meth:`arrays` gave. Both are checked to be complete."""
        ...

    def save_model(self, folder: Path) -> None:
        """Write the weights: in Hugging Face layout; of a model with adapters those alone, in PEFT's."""
        ...


def engine_class(nn: Any, config: TrainingConfig) -> Any:
    """The engine of a backend, for the processes that there are.

    Raises:
        ValueError: when the backend has no gradients, and when it cannot be spread over processes as the
            configuration says.
    """
    name = f"{nn.__name__}.training"
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"the {nn.name} backend has no gradients, so that it cannot train; use backend='torch' or 'mlx'"
        )
    distributed = distributed_module(nn)
    if distributed is not None:
        return distributed.engine_class(config)
    if config.distributed == "fsdp":
        raise ValueError(f"training.distributed is 'fsdp', which the {nn.name} backend does not have; use 'torch'")
    return importlib.import_module(name).Engine


def make_engine(model: Any, config: TrainingConfig) -> Engine:
    """The engine of a model's backend.

    Raises:
        ValueError: when the backend has no gradients, when the model has parameters narrower than float32, when
            nothing in it can be trained, and when it cannot be spread over processes as the configuration says.
    """
    nn = model.nn
    engine = engine_class(nn, config)
    parameters = nn.parameters(model)
    training = importlib.import_module(f"{nn.__name__}.training")
    trained = training.trainable(model)
    for path, array in parameters.items():
        if (model.adapter is None or path in trained) and array.dtype != nn.float32:
            raise ValueError(
                f"{path} is {array.dtype}; weights are trained in float32: load the model with dtype='float32' "
                "and, to compute in bfloat16, train with precision='bfloat16'"
            )
    shapes = {path: tuple(array.shape) for path, array in trained.items()}
    if not shapes:
        raise ValueError("the model has no trainable parameters; is everything frozen?")
    return engine(model, config, decayed_names(shapes, config.no_decay))
