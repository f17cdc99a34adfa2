"""How a model is trained: one frozen dataclass, validated on construction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mambax.training import fields
from mambax.training.schedules import SCHEDULES, Schedule


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimiser, its schedule, and what is written when.

    Args:
        steps: optimiser steps in all.
        batch_size: rows that one step sees, over all processes.
        micro_batch_size: rows that are in memory together; gradients of the parts of a batch add up to those of the
            whole. All rows when None.
        micro_length: tokens of a row that are in memory together: longer rows are read in windows, one after
            another, with the state carried on and their gradients added up. The loss is that of whole rows; the
            gradient leaves out what flows through the state from window to window (truncated backpropagation
            through time). Whole rows when None.
        learning_rate: the highest.
        schedule: ``"cosine"``, ``"wsd"`` (warm-up, stable, decay) or ``"constant"``; see
            :class:`mambax.training.schedules.Schedule`.
        warmup_steps: steps of linear growth at the start; a tenth of all and at most 100 when None.
        min_ratio: the last learning rate over the highest.
        decay_fraction: of the steps, the part in which ``"wsd"`` decays.
        beta1, beta2, epsilon, weight_decay: of AdamW.
        no_decay: patterns of parameter paths (``fnmatch``) that do not decay, beside those that never do; see
            :mod:`mambax.training.groups`.
        clip_norm: gradients are scaled down to this global norm; 0 for as they are.
        precision: ``"float32"``, or ``"bfloat16"`` to compute in bfloat16 over float32 weights.
        distributed: of several processes, as ``torchrun`` and ``mlx.launch`` start them: ``"ddp"`` for the whole
            model in each, ``"fsdp"`` for a share of it in each (PyTorch's FSDP2).
        gradient_checkpointing: compute each block again for its gradient, instead of keeping what it computed.
        seed: of the initial weights and of the order of the data.
        log_every, eval_every, save_every: steps between lines of the log, evaluations and checkpoints; 0 for none
            but at the end.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    steps: int = fields.whole(1000, 1)
    batch_size: int = fields.whole(16, 1)
    micro_batch_size: int | None = fields.whole(None, 1, optional=True)
    micro_length: int | None = fields.whole(None, 1, optional=True)
    learning_rate: float = fields.number(1e-3, 0, 1e3)
    schedule: str = fields.choice("cosine", *SCHEDULES)
    warmup_steps: int | None = fields.whole(None, 0, optional=True)
    min_ratio: float = fields.number(0.1, 0, 1)
    decay_fraction: float = fields.number(0.2, 0, 1)
    beta1: float = fields.number(0.9, 0, 1 - 1e-9)
    beta2: float = fields.number(0.95, 0, 1 - 1e-9)
    epsilon: float = fields.number(1e-8, 0, 1)
    weight_decay: float = fields.number(0.1, 0, 1e3)
    no_decay: tuple[str, ...] = fields.texts()
    clip_norm: float = fields.number(1.0, 0, 1e9)
    precision: str = fields.choice("float32", "float32", "bfloat16")
    distributed: str = fields.choice("ddp", "ddp", "fsdp")
    gradient_checkpointing: bool = fields.flag(False)
    seed: int = fields.whole(0, 0)
    log_every: int = fields.whole(10, 0)
    eval_every: int = fields.whole(200, 0)
    save_every: int = fields.whole(200, 0)

    def __post_init__(self) -> None:
        if isinstance(self.no_decay, list):
            object.__setattr__(self, "no_decay", tuple(self.no_decay))
        fields.check(self)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(100, self.steps // 10))
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"TrainingConfig.micro_batch_size is {self.micro_batch_size}; expected at most batch_size, "
                f"{self.batch_size}"
            )
        self.make_schedule()

    def make_schedule(self) -> Schedule:
        """The learning rate of each step."""
        return Schedule(
            kind=self.schedule,
            peak=self.learning_rate,
            steps=self.steps,
            warmup=self.warmup_steps or 0,
            min_ratio=self.min_ratio,
            decay_fraction=self.decay_fraction,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; ``TrainingConfig(**config.to_dict()) == config``."""
        return dataclasses.asdict(self)


HARMLESS = frozenset({"log_every", "eval_every", "save_every"})
"""Fields that change nothing in what is computed, so that a run may be resumed with other values."""
