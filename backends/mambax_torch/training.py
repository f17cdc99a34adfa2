"""Training in PyTorch: ``torch.optim.AdamW``, autocast, one process.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambax.state import InferenceParams
from mambax.training.batches import Batch
from mambax.training.config import TrainingConfig
from mambax.training.engine import Part
from mambax.training.matching import check_arrays
from mambax.training.process_memory import peak_resident_bytes
from mambax.training.weights import is_saved, write_weights
from mambax.training.whole import export_whole, load_whole, save_whole
from mambax_torch import ops


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by path; a shared one under one of them."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


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
        for parameter in model.parameters():  # into memory of torch's own, alike in every process
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self.device = next(iter(model.parameters())).device
        self.batch_size, self.precision = config.batch_size, config.precision
        self.module = self.wrapped(model)
        self.parameters = trainable(model)
        model.backbone.gradient_checkpointing = config.gradient_checkpointing
        groups = [
            {"params": [p for n, p in self.parameters.items() if (n in decayed) is decay], "weight_decay": rate}
            for decay, rate in ((True, config.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
        )

    def wrapped(self, model: Any) -> Any:
        """What is called: the model itself in one process."""
        return model

    def accumulate(self, batch: Batch, divisor: float, state: InferenceParams | None, *, last: bool = True) -> Part:
        """Add the gradients of a part of the batch."""
        self.model.train()
        output = self._run(batch, divisor, state)
        output.loss.backward()
        return _part(output)

    @torch.no_grad()
    def evaluate(self, batch: Batch, divisor: float, state: InferenceParams | None) -> Part:
        """The loss of a batch."""
        self.model.eval()
        return _part(self._run(batch, divisor, state))

    def _run(self, batch: Batch, divisor: float, state: InferenceParams | None) -> Any:
        narrow = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            return self.module(**batch.arguments(), state=state, num_items_in_batch=divisor)

    def reduce_gradients(self) -> None:
        """Nothing to add up in one process."""

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """The values themselves, in one process."""
        return list(values)

    def clip_gradients(self, max_norm: float) -> float:
        """Clip to the global norm; the norm before."""
        return float(self.clipped(max_norm))

    def clipped(self, max_norm: float) -> Tensor:
        """The same, in the framework."""
        for parameter in self.parameters.values():
            if parameter.grad is None:  # nothing reached it: zero, as in MLX
                parameter.grad = torch.zeros_like(parameter)
        limit = max_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def update(self, learning_rate: float) -> None:
        """One step of AdamW."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def arrays(self) -> dict[str, np.ndarray]:
        """Moments by path, the number of steps, and torch's random states."""
        found, steps = self.random_states(), 0
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter)
            if state:
                found[f"first.{name}"] = ops.to_numpy(state["exp_avg"])
                found[f"second.{name}"] = ops.to_numpy(state["exp_avg_sq"])
                steps = int(state["step"])
        return found | {"step": np.array(steps, np.int64)}

    def random_states(self) -> dict[str, np.ndarray]:
        """Of torch, on the host and on the device."""
        found = {"random.torch": torch.get_rng_state().numpy()}
        if self.device.type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        return found

    def take_random_states(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set what :meth:`random_states` gave."""
        if "random.torch" in arrays:
            torch.set_rng_state(ops.from_numpy(arrays["random.torch"]).clone())
        if "random.cuda" in arrays and self.device.type == "cuda":
            torch.cuda.set_rng_state(ops.from_numpy(arrays["random.cuda"]).clone(), self.device)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
        """Copy weights and moments into place."""
        held = {name: value for name, value in all_parameters(self.model).items() if is_saved(self.model, name)}
        check_arrays({name: tuple(p.shape) for name, p in held.items()}, weights, "weights")
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        started = int(arrays.get("step", np.array(0))) > 0
        moments = {f"{kind}.{name}": shape for name, shape in shapes.items() for kind in ("first", "second")}
        rest = {name: array for name, array in arrays.items() if name.startswith(("first.", "second."))}
        check_arrays(moments if started else {}, rest, "moments of AdamW")
        for name, parameter in held.items():
            parameter.copy_(ops.from_numpy(weights[name]))
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items() if started else ():
            first, second = (torch.empty_like(parameter) for _ in range(2))
            first.copy_(ops.from_numpy(arrays[f"first.{name}"]))
            second.copy_(ops.from_numpy(arrays[f"second.{name}"]))
            step = torch.tensor(float(arrays["step"]), dtype=torch.float32)
            self.optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.take_random_states(arrays)

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
        """The highest number of bytes allocated on the device; of the process on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return peak_resident_bytes()


def all_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter by path, a shared one under one of them."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _part(output: Any) -> Part:
    accuracy = math.nan if output.accuracy is None else float(output.accuracy)
    return Part(float(output.loss.detach()), accuracy, output.state.detach())
