"""Ways to cut a long row of tokens into batches.

============  =================================================  ===============  ==================================
class         a row of a batch is                                its state        documents
============  =================================================  ===============  ==================================
Windows       any window of the text, all once in each epoch     starts at zero   follow each other, or are separate
Reading       the window after that of the last batch            is carried on    follow each other, or are separate
Documents     one document, or a piece of it, padded             starts at zero   one to a row
Stream        for evaluation: the text once, in order            is carried on    follow each other, or are separate
============  =================================================  ===============  ==================================

Separate documents are packed: the state is set back where one begins (``boundaries``), and none ends with the first
token of the next one as a target.

Dimensions: B batch, L length, T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from mambax.training.batches import Batch
from mambax.training.losses import IGNORE
from mambax.training.token_files import TokenDataset


def _windows(dataset: TokenDataset, starts: np.ndarray, length: int, separate: bool) -> Batch:
    """A batch of the tokens from each start on, around the end of the text, with their targets."""
    total = len(dataset)
    places = (starts[:, None] + np.arange(length + 1)) % total  # (B, L + 1)
    ids = dataset.tokens[places].astype(np.int64)
    targets, boundaries = ids[:, 1:], None
    if separate:
        begins = _begins(dataset, places)
        targets = np.where(begins[:, 1:], IGNORE, targets)
        boundaries = begins[:, :-1]
    return Batch(input_ids=ids[:, :-1], shift_labels=targets, boundaries=boundaries)


def _begins(dataset: TokenDataset, places: np.ndarray) -> np.ndarray:
    """Whether a document begins at each place."""
    ended = np.minimum(np.searchsorted(dataset.ends, places), len(dataset.ends) - 1)
    return (places == 0) | (dataset.ends[ended] == places)


def _check_length(dataset: TokenDataset, length: int, needed: int) -> None:
    if len(dataset) < needed:
        raise ValueError(
            f"{dataset.folder}: the text has {len(dataset)} tokens; expected at least {needed} for rows of length "
            f"{length} and their targets: use more text, or a smaller length"
        )


class Windows:
    """Windows of the text in an order that is another in each epoch, cut at other places.

    Args:
        dataset: the tokens.
        length: L.
        batch_size: B.
        seed: of the order.
        separate: keep documents apart.

    Raises:
        ValueError: for a text shorter than a window and its last target.
    """

    carries_state = False

    def __init__(
        self, dataset: TokenDataset, length: int, batch_size: int, *, seed: int = 0, separate: bool = False
    ) -> None:
        _check_length(dataset, length, length + 1)
        self.dataset, self.length, self.batch_size = dataset, length, batch_size
        self.seed, self.separate = seed, separate
        whole = (len(dataset) - 1) // length
        self.count = whole - 1 if whole >= 8 else whole  # one fewer, so that the first can begin anywhere in L
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        rows = step * self.batch_size + np.arange(self.batch_size)
        starts = [self._order(int(row) // self.count)[int(row) % self.count] for row in rows]
        return _windows(self.dataset, np.array(starts), self.length, self.separate)

    def _order(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in order."""
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, epoch])
            first = rng.integers(len(self.dataset) - self.count * self.length)
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = first + self.length * rng.permutation(self.count)
        return self._orders[epoch]

    def fingerprint(self) -> str:
        """What decides the batches."""
        return f"windows {self.dataset.digest} {self.length} {self.batch_size} {self.seed} {self.separate}"


class Reading:
    """Readers at different places of the text. Each reads on where it stopped, with the state it had there.

    So a model learns to use a state that is much older than one window (truncated backpropagation through time).

    Args:
        dataset: the tokens.
        length: L.
        batch_size: B, the number of readers.
        restart: the chance of each reader, at each step, to go to another place with an empty state.
        seed: of the places.
        separate: keep documents apart.

    Raises:
        ValueError: for a text shorter than a window and its last target.
    """

    carries_state = True

    def __init__(
        self,
        dataset: TokenDataset,
        length: int,
        batch_size: int,
        *,
        restart: float = 0.05,
        seed: int = 0,
        separate: bool = False,
    ) -> None:
        _check_length(dataset, length, length + 1)
        if not 0 <= restart <= 1:
            raise ValueError(f"restart is {restart}; expected a probability from 0 to 1")
        self.dataset, self.length, self.batch_size = dataset, length, batch_size
        self.restart, self.seed, self.separate = restart, seed, separate
        self._readers = [_Reader([seed, row], len(dataset), restart) for row in range(batch_size)]

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        since, starts = zip(*(reader.at(step) for reader in self._readers), strict=True)
        places = np.array(starts) + np.array(since) * self.length
        batch = _windows(self.dataset, places, self.length, self.separate)
        return Batch(**{**vars(batch), "fresh": np.array(since) == 0})

    def fingerprint(self) -> str:
        """What decides the batches."""
        options = f"{self.length} {self.batch_size} {self.restart} {self.seed} {self.separate}"
        return f"reading {self.dataset.digest} {options}"


class _Reader:
    """When a reader goes elsewhere, and where to: drawn once, in order."""

    def __init__(self, seed: list[int], total: int, restart: float) -> None:
        self.rng, self.total, self.restart = np.random.default_rng(seed), total, restart
        self.steps, self.places = [0], [int(self.rng.integers(total))]
        self.known = self._stay()  # the step at which the next one comes

    def _stay(self) -> int:
        return int(self.rng.geometric(self.restart)) if self.restart else 2**62

    def at(self, step: int) -> tuple[int, int]:
        """(steps since it came to where it is, place where it began there)."""
        while self.known <= step:
            self.steps.append(self.known)
            self.places.append(int(self.rng.integers(self.total)))
            self.known += self._stay()
        i = bisect_right(self.steps, step) - 1
        return step - self.steps[i], self.places[i]


class Documents:
    """One document to a row, in an order that is another in each epoch; longer ones in pieces of L, shorter padded.

    Args:
        dataset: the tokens.
        length: L, the longest row.
        batch_size: B.
        seed: of the order.

    Raises:
        ValueError: when no document has two tokens.
    """

    carries_state = False

    def __init__(self, dataset: TokenDataset, length: int, batch_size: int, *, seed: int = 0) -> None:
        self.dataset, self.length, self.batch_size, self.seed = dataset, length, batch_size, seed
        ends = np.asarray(dataset.ends)
        self._starts = np.concatenate([[0], ends[:-1]])
        pieces = np.maximum(0, -(-(ends - self._starts - 1) // length))  # a piece of L has L targets
        self._until = np.cumsum(pieces)
        self.count = int(self._until[-1]) if len(ends) else 0
        if self.count == 0:
            raise ValueError(f"{dataset.folder}: no document has two tokens; there is nothing to predict")
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        rows = step * self.batch_size + np.arange(self.batch_size)
        return padded([self._piece(int(row)) for row in rows])

    def _piece(self, row: int) -> np.ndarray:
        epoch, i = divmod(row, self.count)
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        number = int(self._orders[epoch][i])
        document = int(np.searchsorted(self._until, number, side="right"))
        within = number - (int(self._until[document - 1]) if document else 0)
        start = int(self._starts[document]) + within * self.length
        return self.dataset.tokens[start : min(start + self.length + 1, int(self.dataset.ends[document]))]

    def fingerprint(self) -> str:
        """What decides the batches."""
        return f"documents {self.dataset.digest} {self.length} {self.batch_size} {self.seed}"


def padded(rows: list[np.ndarray]) -> Batch:
    """Rows of tokens of different lengths, each without its last one, with their targets; padded on the right."""
    length = max(len(row) for row in rows) - 1
    ids = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), IGNORE, np.int64)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        n = len(row) - 1
        ids[i, :n], targets[i, :n], mask[i, :n] = row[:-1], row[1:], True
    return Batch(input_ids=ids, shift_labels=targets, mask=None if mask.all() else mask)


class Stream:
    """The whole text once: cut into B rows of the same length, read from left to right with the state carried on.

    Every token but the first is predicted exactly once.

    Args:
        dataset: the tokens.
        length: L, positions of a batch.
        rows: B, at most one to two tokens.
        separate: keep documents apart.

    Raises:
        ValueError: for a text of fewer than two tokens.
    """

    carries_state = True

    def __init__(self, dataset: TokenDataset, length: int, rows: int = 1, *, separate: bool = False) -> None:
        _check_length(dataset, 1, 2)
        self.dataset, self.length, self.separate = dataset, length, separate
        self.rows = min(rows, len(dataset) - 1)
        self.bytes_per_token: float | None = dataset.text_bytes / len(dataset)
        self.characters_per_token: float | None = dataset.characters / len(dataset)

    def batches(self) -> Iterator[Batch]:
        """All of them."""
        last = len(self.dataset) - 1  # positions that have a target
        share = -(-last // self.rows)
        starts = np.arange(self.rows) * share
        stops = np.minimum(starts + share, last)
        for done in range(0, share, self.length):
            length = min(self.length, share - done)
            batch = _windows(self.dataset, starts + done, length, self.separate)
            beyond = starts[:, None] + done + np.arange(length) >= stops[:, None]
            targets = np.where(beyond, IGNORE, np.asarray(batch.shift_labels))
            fresh = np.full(self.rows, done == 0)
            yield Batch(**{**vars(batch), "shift_labels": targets, "fresh": fresh})
