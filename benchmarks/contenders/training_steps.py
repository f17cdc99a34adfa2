"""A whole training step on torch as each package's own trainer takes it, and what a step keeps for its gradient.

All models are new ones of one shape; nothing is read from files. float32.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.contenders.peer_models import mambapy_model


def _tokens(job: Job, vocab_size: int) -> np.ndarray:
    """(B, L + 1)."""
    return np.random.default_rng(2).integers(1, vocab_size, (job["batch"], job["length"] + 1))


class Mambax:
    """A step of :class:`mambax.training.Trainer`: its engine, its losses, its clipping.

    Args:
        shape: fields of :class:`mambax.MambaLMConfig`.
        whole: take the loss from the logits of all positions at once, instead of chunk by chunk.
        checkpointing: compute each block again for its gradient.
    """

    def __init__(self, shape: dict[str, Any], whole: bool = False, checkpointing: bool = False) -> None:
        self.torch = optional("torch", "torch")
        import mambax
        from mambax.training import TrainingConfig
        from mambax.training.engine import make_engine

        self.whole = whole
        self.config = mambax.MambaLMConfig(**shape)
        self.model = mambax.from_config(self.config, backend="torch", seed=0)
        self.engine = make_engine(self.model, TrainingConfig(gradient_checkpointing=checkpointing))

    def prepare(self, job: Job) -> Task:
        """A job of kind training (batch, length)."""
        from mambax.training import Batch

        ids = _tokens(job, self.config.vocab_size)
        batch = Batch(input_ids=ids[:, :-1], shift_labels=ids[:, 1:])
        losses: list[float] = []
        kept: list[int] = []

        def gradients() -> float:
            if not self.whole:
                return self.engine.accumulate(batch, batch.items, None).loss
            logits = self.model(batch.input_ids).logits.flatten(0, 1)
            loss = self.torch.nn.functional.cross_entropy(logits, self.torch.from_numpy(ids[:, 1:].flatten()))
            loss.backward()
            return float(loss.detach())

        def run() -> None:
            losses.append(gradients())
            self.engine.clip_gradients(1.0)
            self.engine.update(1e-4)

        def check() -> dict[str, float]:
            kept.append(self._kept(batch))
            return {"first_loss": losses[0], "last_loss": losses[-1], "kept": float(kept[0])}

        return Task(run, check=check)

    def _kept(self, batch: Any) -> int:
        """Bytes that the forward pass keeps for the gradient, weights aside: each piece of memory once."""
        found: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def keep(tensor: Any) -> Any:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in weights:
                found[memory.data_ptr()] = memory.nbytes()
            return tensor

        with self.torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = self.model(batch.input_ids, shift_labels=batch.shift_labels)
        total = sum(found.values())
        del output
        return total


class Transformers:
    """``transformers.Trainer`` on ``MambaForCausalLM``, its own loss and optimiser; a step by its own callbacks.

    Args:
        shape: fields of :class:`mambax.MambaLMConfig`.
        checkpointing: its ``gradient_checkpointing``.
    """

    def __init__(self, shape: dict[str, Any], checkpointing: bool = False) -> None:
        self.torch = optional("torch", "torch")
        optional("accelerate", "accelerate")  # which its Trainer needs
        self.transformers = optional("transformers", "transformers")
        names = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size"}
        config = self.transformers.MambaConfig(**{names[name]: value for name, value in shape.items()})
        self.model = self.transformers.MambaForCausalLM(config)
        self.checkpointing, self.vocab_size = checkpointing, shape["vocab_size"]

    def prepare(self, job: Job) -> Task:
        """A job of kind training (batch, length)."""
        rows = self.torch.from_numpy(_tokens(job, self.vocab_size)[:, :-1].copy())
        data = [{"input_ids": row, "labels": row} for row in rows]
        losses: list[float] = []
        times: list[float] = []

        class Clock(self.transformers.TrainerCallback):
            def on_step_begin(self, *given: Any, **named: Any) -> None:
                times.append(time.perf_counter())

            def on_step_end(self, *given: Any, **named: Any) -> None:
                times.append(time.perf_counter())

        def run() -> float:
            times.clear()
            with tempfile.TemporaryDirectory() as folder:
                arguments = self.transformers.TrainingArguments(
                    output_dir=folder, per_device_train_batch_size=job["batch"], max_steps=1, learning_rate=1e-4,
                    report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
                    gradient_checkpointing=self.checkpointing, max_grad_norm=1.0,
                )  # fmt: skip
                trainer = self.transformers.Trainer(
                    model=self.model, args=arguments, train_dataset=data, callbacks=[Clock()]
                )
                losses.append(float(trainer.train().training_loss))
            return times[1] - times[0]

        return Task(run, check=lambda: {"first_loss": losses[0], "last_loss": losses[-1]})


class Mambapy:
    """mambapy, which has no trainer: the loop that its repository shows, with AdamW and clipping.

    Args:
        shape: fields of :class:`mambax.MambaLMConfig`.
    """

    def __init__(self, shape: dict[str, Any]) -> None:
        self.torch = optional("torch", "torch")
        import mambax

        config = mambax.MambaLMConfig(**shape)
        if config.mamba2 is not None:
            raise Unavailable("mambapy's language model is of Mamba-1")
        self.vocab_size = config.vocab_size
        self.model = mambapy_model(config.to_dict()).train()
        self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def prepare(self, job: Job) -> Task:
        """A job of kind training (batch, length)."""
        torch = self.torch
        ids = torch.from_numpy(_tokens(job, self.vocab_size))
        losses: list[float] = []

        def run() -> None:
            logits = self.model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            losses.append(float(loss.detach()))

        return Task(run, check=lambda: {"first_loss": losses[0], "last_loss": losses[-1]})
