"""Training in MLX in several processes, as ``mlx.launch`` starts them.

Each process has the whole model and some of the rows of every batch.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from mambax.state import InferenceParams
from mambax.training.batches import Batch
from mambax.training.config import TrainingConfig
from mambax.training.engine import Part
from mambax.training.processes import Processes
from mambax_mlx import training

_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""One of them is set in a process that was started with others."""


def engine_class(config: TrainingConfig) -> type[training.Engine]:
    """The engine for as many processes as there are.

    Raises:
        ValueError: for a model that is to be sharded.
    """
    if config.distributed == "fsdp":
        raise ValueError(
            "training.distributed is 'fsdp', which PyTorch alone has; use backend='torch', or distributed='ddp', "
            "with which every process of MLX has the whole model"
        )
    return Engine if _several() else training.Engine


def _several() -> bool:
    return any(name in os.environ for name in _LAUNCHED) and mx.distributed.init().size() > 1


def own_device(device: str) -> str:
    """The device of this process."""
    return device


def join(device: str) -> Processes:
    """Meet the processes that ``mlx.launch`` started with this one."""
    if not _several():
        return Processes()
    group = mx.distributed.init()

    def wait() -> None:
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))

    return Processes(group.rank(), group.size(), wait)


class Engine(training.Engine):
    """See :class:`mambax.training.engine.Engine`; gradients are added up after the last part.

    Raises:
        ValueError: for a batch of fewer rows than processes.
    """

    def __init__(self, model: Any, config: TrainingConfig, decayed: Collection[str]) -> None:
        super().__init__(model, config, decayed)
        self.group = mx.distributed.init()
        self.process, self.processes = self.group.rank(), self.group.size()
        if config.batch_size < self.processes:
            raise ValueError(
                f"batch_size is {config.batch_size}; expected at least a row for each process, {self.processes}"
            )
        mine = float(self.process == 0)  # the weights of process 0, in every process
        self.weights = {n: mx.distributed.all_sum(w * mine, group=self.group) for n, w in self.weights.items()}
        self._hold(self.weights)
        mx.eval(self.weights)

    def accumulate(self, batch: Batch, divisor: float, state: InferenceParams | None, *, last: bool = True) -> Part:
        """Add the gradients of a part of the rows of this process."""
        part = super().accumulate(batch, divisor / self.processes, state)  # the mean over processes comes after it
        return part._replace(loss=part.loss / self.processes)

    def reduce_gradients(self) -> None:
        """The gradients of all processes, in each."""
        flat: Any = tree_flatten(mlx.nn.average_gradients(self.gradients, self.group))
        self.gradients = dict(flat)
        mx.eval(self.gradients)

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """Each number summed over all processes, in float32."""
        total: Any = mx.distributed.all_sum(mx.array(list(values), mx.float32), group=self.group).tolist()
        return total
