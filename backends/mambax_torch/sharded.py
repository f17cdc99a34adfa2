"""Training in PyTorch with a model that is spread over processes: FSDP2, ``torch.distributed.fsdp.fully_shard``.

Each process keeps a share of every weight, of its gradient and of its moments. The weights of a block are gathered
when the block is computed, forward or backward, and freed after it. The rows of a batch are shared out as in
:mod:`mambax_torch.distributed`.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import atexit
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mambax.checkpoint.matching import KEPT_IN_FLOAT32
from mambax.checkpoint.safetensors_files import SafetensorsFile
from mambax.state import InferenceParams
from mambax.training.batches import Batch
from mambax.training.engine import Part
from mambax.training.gathering import SHARDS, save_gathered, write_beside
from mambax.training.whole import OPTIMIZER, unreadable, write_arrays
from mambax_torch import distributed, ops, training
from mambax_torch.fused import weights_are_freed
from mambax_torch.layers import Linear

_WEIGHT, _FIRST, _SECOND = "weight.", "first.", "second."

_CONTENTS = ".metadata"
"""The file of the shards that says what they hold; PyTorch pickles it."""

_OF_PICKLES = (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError)
"""What reading a damaged pickle raises, beside ValueError."""


class Engine(distributed.Engine):
    """See :class:`mambax.training.engine.Engine`; gradients are added up and shared out during the backward pass.

    With ``precision="bfloat16"``, the weights of the large products of a block are gathered in bfloat16; all others
    (norms, convolutions, ``dt_proj``, ``A_log``, ``D``, the table and the head) in float32, as gradients are added
    up. Computed is what autocast computes in one process.

    On the CPU, the kernels of :mod:`mambax_cpu` are not used: see :data:`mambax_torch.fused.weights_are_freed`.

    Raises:
        ValueError: for a batch of fewer rows than processes, a model on another GPU than this process's, and one
            with adapters or with blocks that share parameters.
    """

    def wrapped(self, model: Any) -> Any:
        """The model, sharded in place, with the weights of process 0."""
        _check(model)
        self.meet()
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size is {self.batch_size}; with FSDP2 all processes compute together, each as many rows: "
                f"expected a multiple of {self.processes}"
            )
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        mesh = init_device_mesh(self.device.type, (self.processes,))
        atexit.register(_let_go, mesh)
        wide = MixedPrecisionPolicy(cast_forward_inputs=False)  # states stay in float32
        narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in model.backbone.layers:
            products = _products(block) if self.precision == "bfloat16" else []
            if products:
                fully_shard(products, mesh=mesh, mp_policy=narrow)
            fully_shard(block, mesh=mesh, mp_policy=wide)
        module = fully_shard(model, mesh=mesh, mp_policy=wide)
        self.shares = dict(model.named_parameters())  # all of them; while a block is computed, it has others
        return module

    def accumulate(self, batch: Batch, divisor: float, state: InferenceParams | None, *, last: bool = True) -> Part:
        """Add the gradients of a part of the rows of this process."""
        self.module.set_requires_gradient_sync(last)
        with _freed():
            # FSDP2 divides by the number of processes
            part = training.Engine.accumulate(self, batch, divisor / self.processes, state)
        return part._replace(loss=part.loss / self.processes)

    def evaluate(self, batch: Batch, divisor: float, state: InferenceParams | None) -> Part:
        """The loss of a batch, the same one in every process."""
        with _freed():
            part = super().evaluate(batch, divisor, state)
        self.module.reshard()  # the root's weights, which FSDP2 keeps for a backward pass
        return part

    def clip_gradients(self, max_norm: float) -> float:
        """Clip to the global norm; the norm before."""
        norm: Any = self.clipped(max_norm)
        return float(norm.full_tensor())

    # --- checkpoints -----------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write this process's share with ``torch.distributed.checkpoint``; process 0 writes the rest too.

        Raises:
            ValueError: for weights that are not finite.
            OSError: when it cannot be written.
        """
        held = self._held(self._moments())
        bad = [name for name, share in held.items() if not bool(torch.isfinite(_local(share)).all())]
        if self.sum_over_processes([len(bad)])[0]:
            name = bad[0] if bad else "a share of another process"
            raise ValueError(f"{name} is NaN or infinite, so that no checkpoint was written")
        with _quietly(), _as_os_error(folder):
            save_shards(held, checkpoint_id=folder / SHARDS)
        if self.process == 0:
            write_beside(self.model, folder)
            steps = max((int(state["step"]) for state in self._moments().values()), default=0)
            write_arrays(folder / OPTIMIZER, self.random_states() | {"step": np.array(steps, np.int64)})

    def load(self, folder: Path) -> None:
        """Take back this process's share of what any number of processes wrote.

        Raises:
            ValueError: when it is damaged, or of another model.
        """
        try:
            file = SafetensorsFile(folder / OPTIMIZER)
            arrays = {name: file.read(name) for name in file.tensors}
        except (ValueError, OSError) as error:
            raise unreadable(folder, error) from error
        names = set(_contents(folder))
        steps = int(arrays["step"])
        moments = {
            name: {kind: torch.zeros_like(p) for kind in ("exp_avg", "exp_avg_sq")}
            for name, p in self.parameters.items()
        }
        held = self._held(moments if steps else {})
        if different := sorted(held.keys() ^ names):
            raise ValueError(f"{folder}: {different[0]} is not in both; is it a checkpoint of this model?")
        try:
            with _quietly(), _as_os_error(folder):
                load_shards(held, checkpoint_id=folder / SHARDS)
        except OSError as error:
            raise unreadable(folder, error) from error
        self.optimizer.state.clear()
        for name, pair in moments.items() if steps else ():
            step = torch.tensor(float(steps), dtype=torch.float32)
            self.optimizer.state[self.parameters[name]] = {"step": step, **pair}
        self.take_random_states(arrays)

    def export(self, checkpoint: Path, folder: Path) -> None:
        """Write the model in a checkpoint in Hugging Face layout: process 0 gathers it."""
        weights = read_weights(checkpoint, wanted=self.process == 0)
        if self.process == 0:
            save_gathered(checkpoint, weights, folder)

    def _held(self, moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        """Shares of this process, by the names in the files: what is saved, and what is loaded in place."""
        held: dict[str, Any] = {_WEIGHT + name: p.data for name, p in self.shares.items()}
        for name, pair in moments.items():
            held[_FIRST + name], held[_SECOND + name] = pair["exp_avg"], pair["exp_avg_sq"]
        return held

    def _moments(self) -> dict[str, Any]:
        return {name: state for name, p in self.parameters.items() if (state := self.optimizer.state.get(p))}


def read_weights(folder: Path, *, wanted: bool = True) -> dict[str, np.ndarray]:
    """The weights that :meth:`Engine.save` wrote, whole, by path.

    Args:
        folder: the checkpoint.
        wanted: whether this process wants them. Where processes have met, all of them call this together.

    Raises:
        FileNotFoundError: when it is not a sharded checkpoint.
        ValueError: when it is damaged.
    """
    shards = folder / SHARDS
    if not (shards / _CONTENTS).is_file():
        raise FileNotFoundError(
            f"{shards}: no such checkpoint; expected the folder of a run with distributed='fsdp'"
        )
    tensors = {}
    for name, info in _contents(folder).items():
        if wanted and name.startswith(_WEIGHT) and isinstance(info, TensorStorageMetadata):
            tensors[name] = torch.empty(info.size, dtype=info.properties.dtype)
    try:
        with _quietly(), _as_os_error(folder):
            load_shards(tensors, checkpoint_id=shards)
    except OSError as error:
        raise unreadable(folder, error) from error
    return {name.removeprefix(_WEIGHT): ops.to_numpy(tensor) for name, tensor in tensors.items()}


def _contents(folder: Path) -> dict[str, Any]:
    """What the shards of a checkpoint say that they hold, by name.

    Raises:
        ValueError: when that cannot be read.
    """
    try:
        return FileSystemReader(folder / SHARDS).read_metadata().state_dict_metadata
    except (OSError, ValueError, *_OF_PICKLES) as error:
        raise unreadable(folder, f"{SHARDS}/{_CONTENTS}: {error or type(error).__name__}") from error


def _let_go(mesh: DeviceMesh) -> None:
    """Drop the process group of a mesh, at the end: see :func:`mambax_torch.distributed.join`.

    PyTorch remembers what an operation on a DTensor gives, and with it the mesh, for as long as the process lives;
    in newer releases, the mesh has the group itself.
    """
    getattr(mesh, "_pg_registry", {}).clear()


def _check(model: Any) -> None:
    """Refuse what FSDP2 cannot train, or not alike."""
    if model.adapter is not None:
        raise ValueError(
            "the model has adapters, which are small; train them with distributed='ddp', and quantise the model if "
            "it does not fit"
        )
    names: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            raise ValueError(
                f"{name} and {names[parameter]} are one parameter; FSDP2 shards blocks that share none. Train with "
                "distributed='ddp'"
            )
        names[parameter] = name


def _products(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The linear layers of a block whose weights may be rounded: all but those with a sensitive bias."""
    found = []
    for path, module in block.named_modules():
        sensitive = f".{path}.bias".endswith(KEPT_IN_FLOAT32)
        if isinstance(module, Linear) and not sensitive:
            found.append(module)
    return found


def _local(share: Tensor) -> Tensor:
    return share.to_local() if isinstance(share, DTensor) else share


@contextmanager
def _freed() -> Iterator[None]:
    """Within it, nothing looks at weights through NumPy."""
    token = weights_are_freed.set(True)
    try:
        yield
    finally:
        weights_are_freed.reset(token)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the remark that there is one process alone, and what PyTorch says to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _as_os_error(folder: Path) -> Iterator[None]:
    """What went wrong in any process, as an error of the file system."""
    try:
        yield
    except CheckpointException as error:
        process, (first, _) = next(iter(error.failures.items()))
        number = first.errno if isinstance(first, OSError) else None
        text = f"{folder}: process {process}: {first}"
        raise (OSError(number, text) if number else OSError(text)) from error
