"""Training in PyTorch in several processes, as ``torchrun`` starts them: DistributedDataParallel.

Each process has the whole model and some of the rows of every batch.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mambax.state import InferenceParams
from mambax.training.batches import Batch
from mambax.training.engine import Part
from mambax_torch import training


def engine_module() -> ModuleType:
    """This module in one of several processes, else :mod:`mambax_torch.training`."""
    if dist.is_available() and dist.is_initialized():
        several = dist.get_world_size() > 1
    else:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return sys.modules[__name__] if several else training


class Engine(training.Engine):
    """See :class:`mambax.training.engine.Engine`; gradients are added up while the last part goes backward.

    Raises:
        ValueError: for a batch of fewer rows than processes, and a model on another GPU than this process's.
    """

    def wrapped(self, model: Any) -> Any:
        """The model in DistributedDataParallel, with the weights of process 0 in every process."""
        on_gpu = self.device.type == "cuda"
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if on_gpu and self.device.index != own:
            raise ValueError(
                f"the model is on {self.device}, but this process has GPU {own}; load it with device='cuda:{own}', "
                "the number that torchrun gives in LOCAL_RANK"
            )
        if not dist.is_initialized():
            dist.init_process_group("nccl" if on_gpu else "gloo")
        self.process, self.processes = dist.get_rank(), dist.get_world_size()
        if self.batch_size < self.processes:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected at least a row for each process, {self.processes}"
            )
        return DistributedDataParallel(model)

    def accumulate(self, batch: Batch, divisor: float, state: InferenceParams | None, *, last: bool = True) -> Part:
        """Add the gradients of a part of the rows of this process."""
        with nullcontext() if last else self.module.no_sync():
            # DistributedDataParallel divides by the number of processes
            part = super().accumulate(batch, divisor / self.processes, state)
        return part._replace(loss=part.loss / self.processes)

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """Each number summed over all processes."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()
