"""The learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate as a function of the step, with nothing to save.

    All grow linearly over the first ``warmup`` steps, from ``peak / warmup`` at step 0 to the peak. Then

    ``"cosine"`` falls along half a cosine, to ``min_ratio * peak`` at the last step (Loshchilov and Hutter 2016);
    ``"wsd"`` stays, and falls along a straight line in the last ``decay_fraction`` of the steps, to the same value
    (Hu et al. 2024, section 4.1);
    ``"constant"`` stays.

    Args:
        kind: one of these.
        peak: the highest learning rate.
        steps: how many there are.
        warmup: steps of growth, fewer than ``steps``.
        min_ratio: the last learning rate over the highest.
        decay_fraction: of ``"wsd"``.

    Raises:
        ValueError: for another kind, and a warm-up that takes all steps.
    """

    kind: str
    peak: float
    steps: int
    warmup: int = 0
    min_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule is {self.kind!r}; expected one of {', '.join(map(repr, SCHEDULES))}")
        if self.warmup >= self.steps and self.warmup > 0:
            raise ValueError(f"warmup_steps is {self.warmup}; expected fewer than the {self.steps} steps in all")

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * self._height(step))

    def _height(self, step: int) -> float:
        """From 1 down to 0 at the last step."""
        if self.kind == "constant":
            return 1.0
        if self.kind == "cosine":
            first, last = self.warmup, self.steps - 1
            return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, last - first)))
        falling = max(1, round(self.decay_fraction * self.steps)) if self.decay_fraction else 0
        return min(1.0, (self.steps - 1 - step) / falling) if falling else 1.0
