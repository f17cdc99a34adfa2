"""One training step on torch: forward, cross-entropy of the next token, backward, AdamW. float32.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.contenders.peer_models import mambapy_model
from benchmarks.shapes import folder_of, read_shape


class Training:
    """A model of one package with its optimiser.

    Args:
        package: ``"mambax"``, ``"transformers"`` or ``"mambapy"``. The first two start from the same weights.
        folder: what :mod:`benchmarks.weights` wrote.
        scan: the implementation of the scan, for mambax.
    """

    def __init__(self, package: str, folder: str, scan: str = "auto") -> None:
        self.torch = optional("torch", "torch")
        self.shape = read_shape(Path(folder))
        checkpoint = folder_of(Path(folder), "float32")
        self.logits: Callable[[Any], Any]
        if package == "mambax":
            import mambax

            model = mambax.load(checkpoint, backend="torch", device="cpu", scan=scan)
            self.logits = lambda ids: model(ids).logits
        elif package == "transformers":
            model = optional("transformers", "transformers").MambaForCausalLM.from_pretrained(checkpoint)
            self.logits = lambda ids: model(ids).logits
        elif package == "mambapy":
            model = mambapy_model(self.shape)
            self.logits = model
        else:
            raise Unavailable(f"no training step of {package}")
        self.model = model.train()
        self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def prepare(self, job: Job) -> Task:
        """A job of kind training (batch, length)."""
        torch = self.torch
        ids = np.random.default_rng(2).integers(1, self.shape["vocab_size"], (job["batch"], job["length"] + 1))
        given, target = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        losses: list[float] = []

        def run() -> None:
            loss = torch.nn.functional.cross_entropy(self.logits(given).flatten(0, 1), target.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss))

        return Task(run, check=lambda: {"first_loss": losses[0], "last_loss": losses[-1]})
