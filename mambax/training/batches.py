"""What a model is trained on: one batch for each step.

Data are functions of the step: ``data.batch(step)`` gives the same batch whenever it is asked, so that a run that
goes on from step 1000 sees what it would have seen, and there is no position to save.

Dimensions: B batch, L length, C num_labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mambax.training.losses import IGNORE


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that one optimiser step sees, in NumPy.

    Args:
        input_ids: (B, L) int64.
        shift_labels: (B, L) int64, the token to predict at each position, or IGNORE; of language models.
        labels: (B,) or (B, C), of classifiers.
        mask: (B, L) bool, False at padding; None without any.
        boundaries: (B, L) bool, True where another text begins; None without any.
        fresh: (B,) bool, the rows that do not continue the row of the last batch; of data that carry the state.
    """

    input_ids: np.ndarray
    shift_labels: np.ndarray | None = None
    labels: np.ndarray | None = None
    mask: np.ndarray | None = None
    boundaries: np.ndarray | None = None
    fresh: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.shift_labels is None) == (self.labels is None):
            raise ValueError("Batch: expected shift_labels for a language model, or labels for a classifier")

    @property
    def rows(self) -> int:
        """B."""
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """L."""
        return self.input_ids.shape[1]

    @property
    def items(self) -> int:
        """How many losses are summed: targets of a language model, rows (with a label) of a classifier."""
        if self.shift_labels is not None:
            return int((self.shift_labels != IGNORE).sum())
        labels = np.asarray(self.labels)
        single = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
        return int((labels != IGNORE).sum()) if single else len(labels)

    @property
    def tokens(self) -> int:
        """Positions that exist."""
        return int(self.input_ids.size if self.mask is None else self.mask.sum())

    def part(self, start: int, stop: int) -> Batch:
        """Some of the rows."""
        arrays: dict[str, Any] = {
            name: None if array is None else array[start:stop] for name, array in vars(self).items()
        }
        return Batch(**arrays)

    def window(self, start: int, stop: int) -> Batch:
        """Some of the positions of every row, of language models; a later window continues the one before it.

        Raises:
            ValueError: for a classifier, whose rows have one label each.
        """
        if self.labels is not None:
            raise ValueError("rows with labels are read whole; expected micro_length to be none for a classifier")
        arrays: dict[str, Any] = {
            name: None if array is None else array[:, start:stop]
            for name, array in vars(self).items()
            if name != "fresh"
        }
        return Batch(**arrays, fresh=None if start else self.fresh)

    def arguments(self) -> dict[str, Any]:
        """What a model is called with, beside the state."""
        return {name: array for name, array in vars(self).items() if name != "fresh" and array is not None}


class TrainingData(Protocol):
    """Batches to train on, as a function of the step."""

    carries_state: bool  # whether each row goes on where the same row of the last batch ended

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; always the same one."""
        ...

    def fingerprint(self) -> str:
        """Text that is different for different batches; a run is resumed on the same data alone."""
        ...


class EvaluationData(Protocol):
    """Batches that are gone through once, in order."""

    carries_state: bool
    bytes_per_token: float | None  # UTF-8 bytes of text to a token; None where that has no meaning
    characters_per_token: float | None

    def batches(self) -> Iterator[Batch]:
        """All of them."""
        ...
