"""What one optimiser step computes, over the engine of a framework.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from mambax.state import InferenceParams
from mambax.training.batches import Batch, TrainingData
from mambax.training.config import TrainingConfig
from mambax.training.engine import Engine
from mambax.training.evaluation import continued, known


class NotFinite(ArithmeticError):
    """A loss or a gradient that is NaN or infinite. Nothing was learnt from it."""


class _Bad(NamedTuple):
    """What was not finite, and the rows of the batch that it came from."""

    what: str
    value: float
    rows: range | None


class Steps:
    """Takes steps: the gradients of all parts of a batch, and an update.

    Of a batch, each process has a share of the rows. It goes through them ``micro_batch_size`` rows at a time, and
    through each of these ``micro_length`` tokens at a time, with the state carried on and the gradients added up.

    Args:
        engine: of a framework.
        data: what to learn from.
        config: how.
        last_good: what to say of the last checkpoint where a step is refused.
    """

    def __init__(
        self, engine: Engine, data: TrainingData, config: TrainingConfig, last_good: Callable[[], str]
    ) -> None:
        self.engine, self.data, self.config = engine, data, config
        self.states: list[InferenceParams] = []
        """Of each part of the rows of this process after the last step, where the data carry them."""
        self._last_good = last_good
        self._schedule = config.make_schedule()

    def take(self, step: int) -> tuple[dict[str, Any], int]:
        """Take a step, counted from 0.

        Returns:
            Its numbers as the log has them, and how many tokens it saw.

        Raises:
            NotFinite: in every process, when the loss or the gradient is NaN or infinite; before the update.
            ValueError: for a batch that cannot be cut into windows, or not be shared by the processes.
        """
        whole = self.data.batch(step)
        self._check_rows(step, whole.rows)
        engine, items = self.engine, max(1, whole.items)
        first = whole.rows * engine.process // engine.processes
        batch = whole.part(first, whole.rows * (engine.process + 1) // engine.processes)
        loss, right, bad = self._accumulate(step, batch, first, items)
        engine.reduce_gradients()
        loss, right = engine.sum_over_processes([loss, right])
        if not math.isfinite(loss):
            self._refuse(step, bad or _Bad("the loss", loss, None))
        norm = engine.clip_gradients(self.config.clip_norm)
        if not math.isfinite(norm):
            own = range(first, first + batch.rows) if engine.processes == 1 else range(whole.rows)
            self._refuse(step, _Bad("the norm of the gradient", norm, own))
        rate = self._schedule(step)
        engine.update(rate)
        numbers = {"loss": loss, "accuracy": known(right / items), "learning_rate": rate, "gradient_norm": norm}
        return numbers, whole.tokens

    def _accumulate(self, step: int, batch: Batch, first: int, items: int) -> tuple[float, float, _Bad | None]:
        """Loss and right answers of the rows of this process, whose gradients the engine then has."""
        engine, size = self.engine, self.config.micro_batch_size or batch.rows
        length = min(self.config.micro_length or batch.length, batch.length)
        states: list[InferenceParams] = []
        loss = right = 0.0
        bad: _Bad | None = None
        for i, start in enumerate(range(0, batch.rows, size)):
            rows = batch.part(start, min(start + size, batch.rows))
            state = continued(engine.model, rows, self.states[i]) if i < len(self.states) else None
            for place in range(0, rows.length, length):
                window = rows if length == rows.length else rows.window(place, place + length)
                last = start + size >= batch.rows and place + length >= rows.length
                part = engine.accumulate(window, items, state, last=last)
                if not math.isfinite(part.loss):
                    bad = bad or _Bad("the loss", part.loss, range(first + start, first + start + rows.rows))
                    if engine.processes == 1:
                        self._refuse(step, bad)
                state = part.state
                loss += part.loss
                right += part.accuracy * window.items if window.items else 0.0
            if self.data.carries_state and state is not None:
                states.append(state)
        self.states = states
        return loss, right, bad

    def _check_rows(self, step: int, rows: int) -> None:
        """Refuse, in every process alike, rows with which one would wait for ever for what another does not do."""
        expected, processes = self.config.batch_size, self.engine.processes
        if rows == 0 or (processes > 1 and rows != expected):
            raise ValueError(
                f"step {step}: the data gave a batch of {rows} rows; expected batch_size, {expected}, which "
                f"{processes} process(es) share. Give the data and the configuration the same batch_size"
            )

    def _refuse(self, step: int, bad: _Bad) -> None:
        where = (
            "rows of another process" if bad.rows is None else f"rows {bad.rows[0]} to {bad.rows[-1]} of its batch"
        )
        raise NotFinite(
            f"step {step}: {bad.what} is {bad.value} ({where}), so that "
            f"training stopped before the update; {self._last_good()}. Try a lower learning_rate, a longer "
            "warmup_steps or a smaller clip_norm, and look at the data of this step"
        )
