"""Training in PyTorch in several processes, as ``torchrun`` starts them: DistributedDataParallel.

Each process has the whole model and some of the rows of every batch; in :mod:`mambax_torch.sharded`, a share of it.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mambax.state import InferenceParams
from mambax.training.batches import Batch
from mambax.training.config import TrainingConfig
from mambax.training.engine import Part
from mambax.training.processes import Processes
from mambax_torch import training


def engine_class(config: TrainingConfig) -> type[training.Engine]:
    """The engine for as many processes as there are.

    Raises:
        ValueError: for a model that is to be sharded over a single process.
    """
    several = _count() > 1
    if config.distributed == "fsdp":
        if not several:
            raise ValueError(
                "training.distributed is 'fsdp', which spreads a model over processes, but there is only this one; "
                "start several, as with torchrun --nproc-per-node=2 -m -- mambax.cli train ..., or train with "
                "distributed='ddp'"
            )
        from mambax_torch import sharded

        return sharded.Engine
    return Engine if several else training.Engine


def _count() -> int:
    """How many processes there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """The device of this process: of several GPUs, the one whose number torchrun gives it."""
    return f"cuda:{_own_gpu()}" if device == "cuda" and _count() > 1 else device


def _own_gpu() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: str) -> Processes:
    """Meet the processes that torchrun started with this one.

    Args:
        device: of this process.
    """
    if _count() == 1:
        return Processes()
    if not dist.is_initialized():
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(device)
        # its functions have the group as a default, if there is one when it is imported, and so for ever
        importlib.import_module("torch.distributed.nn.functional")
        # the others wait while process 0 makes tokens of a text, for longer than collectives may take as a rule
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size(), dist.barrier)


_engines: WeakSet[Engine] = WeakSet()
"""Those that met other processes."""


def _leave() -> None:
    """End the threads of the process group, while there is an interpreter.

    A thread of gloo may still have to let go of the tensors of a collective that is done, for which it takes the
    interpreter's lock. Before Python 3.14, one that does so while the interpreter is taken down aborts the process.
    The threads end with the last reference to the group.
    """
    while _engines:
        _engines.pop().module = None  # DistributedDataParallel holds the group
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine(training.Engine):
    """See :class:`mambax.training.engine.Engine`; gradients are added up while the last part goes backward.

    Raises:
        ValueError: for a batch of fewer rows than processes, and a model on another GPU than this process's.
    """

    def wrapped(self, model: Any) -> Any:
        """The model in DistributedDataParallel, with the weights of process 0 in every process."""
        self.meet()
        return DistributedDataParallel(model)

    def meet(self) -> None:
        """Find the other processes."""
        own = _own_gpu()
        if self.device.type == "cuda" and self.device.index != own:
            raise ValueError(
                f"the model is on {self.device}, but this process has GPU {own}; load it with device='cuda:{own}', "
                "the number that torchrun gives in LOCAL_RANK"
            )
        self.process, self.processes, _ = join(str(self.device))
        _engines.add(self)
        if self.batch_size < self.processes:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected at least a row for each process, {self.processes}"
            )

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
