"""Sequences of tokens with labels, for classifiers.

Dimensions: B batch, L length, C num_labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from mambax.training.batches import Batch


class LabelledRows:
    """Sequences in memory, to train on (in another order in each epoch) or to evaluate on (in their own).

    Args:
        sequences: the token ids of each, at least one.
        labels: (rows,) whole numbers, (rows,) floats or (rows, C) floats; see
            :func:`mambax.training.losses.classification`.
        batch_size: B.
        seed: of the order.

    Raises:
        ValueError: for no sequences, an empty one, and another number of labels.
    """

    carries_state = False
    bytes_per_token: float | None = None
    characters_per_token: float | None = None

    def __init__(
        self, sequences: Sequence[np.ndarray], labels: np.ndarray, batch_size: int, *, seed: int = 0
    ) -> None:
        if len(sequences) == 0 or min(map(len, sequences)) == 0:
            raise ValueError("sequences: expected at least one, each of at least one token")
        if len(labels) != len(sequences):
            raise ValueError(
                f"labels: expected one for each of the {len(sequences)} sequences, found {len(labels)}"
            )
        self.sequences, self.labels, self.batch_size, self.seed = sequences, np.asarray(labels), batch_size, seed

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        rows = step * self.batch_size + np.arange(self.batch_size)
        count = len(self.sequences)
        rngs = {epoch: np.random.default_rng([self.seed, epoch]) for epoch in (rows // count).tolist()}
        orders = {epoch: rng.permutation(count) for epoch, rng in rngs.items()}
        return self._rows([int(orders[row // count][row % count]) for row in rows.tolist()])

    def batches(self) -> Iterator[Batch]:
        """All of them once, in order."""
        for start in range(0, len(self.sequences), self.batch_size):
            yield self._rows(list(range(start, min(start + self.batch_size, len(self.sequences)))))

    def _rows(self, numbers: list[int]) -> Batch:
        length = max(len(self.sequences[i]) for i in numbers)
        ids = np.zeros((len(numbers), length), np.int64)
        mask = np.zeros((len(numbers), length), bool)
        for place, i in enumerate(numbers):
            n = len(self.sequences[i])
            ids[place, :n], mask[place, :n] = self.sequences[i], True
        return Batch(input_ids=ids, labels=self.labels[numbers], mask=None if mask.all() else mask)

    def fingerprint(self) -> str:
        """What decides the batches."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        for sequence in self.sequences:
            digest.update(np.asarray(sequence, np.int64).tobytes() + b"\0")
        return f"labelled {digest.hexdigest()} {self.batch_size} {self.seed}"
