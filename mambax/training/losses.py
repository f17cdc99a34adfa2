"""Losses and accuracies, written once over the seam.

The cross-entropy of a language model goes through the positions in chunks: logits of a chunk are computed, reduced
to one number and thrown away, and computed again for the gradient. Logits of all positions, (tokens x V), which for
a large vocabulary take more memory than the rest of the model, are never there.

Dimensions: B batch, L length, M d_model, V vocabulary, R rows of a chunk, C num_labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from mambax.backend import Array, Backend
from mambax.scan import at_least_float32

IGNORE = -100
"""The label of a position that is no target, as in PyTorch and Hugging Face."""

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PROBLEM_TYPES: tuple[ProblemType, ...] = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
"""Hugging Face's names."""

_CHUNK_LOGITS = 2**22  # numbers; 16 MiB in float32
_FEWEST_ROWS = 64  # fewer make products that no machine is good at


class Loss(NamedTuple):
    """loss () float32 (float64 for float64 logits); accuracy () of the same dtype, None where it has no meaning."""

    loss: Array
    accuracy: Array | None


def chunk_rows(vocab_size: int) -> int:
    """R, the positions whose logits are in memory together."""
    return max(_FEWEST_ROWS, _CHUNK_LOGITS // vocab_size)


def cross_entropy(
    nn: Backend,
    module: Any,
    head: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    vocab_size: int,
    *,
    divisor: float | None = None,
    rows: int | None = None,
) -> Loss:
    """Mean negative log-likelihood of targets, with the logits of a few rows at a time.

    Args:
        nn: the backend whose arrays these are.
        module: the module whose parameters ``head`` uses.
        head: hidden states (R, M) to logits (R, V).
        hidden: (B, L, M).
        targets: (B, L) whole numbers: the token after each position, or :data:`IGNORE`. One outside the vocabulary
            makes the loss NaN.
        vocab_size: V.
        divisor: what the summed loss is divided by; the number of targets when None, and then NaN without any.
        rows: R; see :func:`chunk_rows`.

    Returns:
        The loss in nats, from a float32 log-sum-exp, and the fraction of targets that have the largest logit.
    """
    batch, length, width = hidden.shape
    flat, targets = hidden.reshape(batch * length, width), targets.reshape(batch * length)

    def of_chunk(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = at_least_float32(nn, head(hidden))  # (R, V)
        return _summed(nn, logits, targets)

    rows = rows or chunk_rows(vocab_size)
    total, correct = nn.summed_over_chunks(module, of_chunk, (flat, targets), rows)
    count = nn.astype(nn.sum(nn.astype(targets != IGNORE, nn.int64), axis=0), total.dtype)
    return Loss(total / (count if divisor is None else divisor), nn.astype(correct, total.dtype) / count)


def _summed(nn: Backend, logits: Array, targets: Array) -> tuple[Array, Array]:
    """The summed negative log-likelihood of targets (R,) under logits (R, V), and how many are the likeliest."""
    top = nn.stop_gradient(nn.max(logits, axis=1))
    log_sum = nn.log(nn.sum(nn.exp(logits - top[:, None]), axis=1)) + top
    inside = (targets >= 0) & (targets < logits.shape[1])
    index = nn.where(inside, targets, targets * 0)
    chosen = nn.where(inside, nn.take_along_axis(logits, index[:, None], axis=1)[:, 0], float("nan"))
    wanted = targets != IGNORE
    loss = nn.sum(nn.where(wanted, log_sum - chosen, 0.0), axis=0)
    hit = wanted & (nn.argmax(nn.stop_gradient(logits), axis=1) == targets)
    return loss, nn.sum(nn.astype(hit, nn.int64), axis=0)


def token_targets(
    nn: Backend,
    labels: Array | None,
    shift_labels: Array | None,
    mask: Array | None,
    boundaries: Array | None,
    hidden: Array,
    vocab_size: int,
) -> Array:
    """The target of each position, (B, L) int64, from either form of labels.

    Args:
        nn: the backend.
        labels: (B, L), the token at each position, which is the target of the position before it; or None.
        shift_labels: (B, L), the target of each position; or None.
        mask: (B, L) bool or None. A position that does not exist has no target and is none.
        boundaries: (B, L) bool or None: where texts begin in packed rows. No text ends with the first token of the
            next one as a target. ``shift_labels`` are taken as they are.
        hidden: (B, L, M), on whose device to put them.
        vocab_size: V.

    Raises:
        ValueError: for labels that do not fit, both forms at once, and rows of one token with ``labels``.
    """
    if (labels is None) == (shift_labels is None):
        raise ValueError(
            "labels and shift_labels: found both; expected one of them: shift_labels are labels moved one place to "
            "the left, so that each stands where it is predicted"
        )
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    given = _whole_numbers(nn, name, given, vocab_size, hidden)
    if tuple(given.shape) != tuple(hidden.shape[:2]):
        raise ValueError(
            f"{name}: expected (batch, length) = {tuple(hidden.shape[:2])} as input_ids, found {tuple(given.shape)}"
        )
    if shift_labels is not None:
        return given if mask is None else nn.where(mask, given, given * 0 + IGNORE)
    if given.shape[1] < 2:
        raise ValueError("labels: rows of 1 token have nothing to predict; expected at least 2, or shift_labels")
    nothing = given[:, :1] * 0 + IGNORE
    targets = given[:, 1:]
    if mask is not None:
        targets = nn.where(mask[:, :-1] & mask[:, 1:], targets, targets * 0 + IGNORE)
    if boundaries is not None:
        targets = nn.where(boundaries[:, 1:], targets * 0 + IGNORE, targets)
    return nn.concat([targets, nothing], axis=1)


def _whole_numbers(nn: Backend, name: str, values: Array, high: int, like: Array) -> Array:
    """Labels as int64 beside ``like``; those that come from the host are checked to be below ``high``."""
    if isinstance(values, (list, tuple, int, np.ndarray, np.integer)):
        try:
            numbers = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{name}: rows differ in length; fill them up with {IGNORE}") from error
        if numbers.size == 0 or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(f"{name}: expected whole numbers, found {numbers.dtype} of shape {numbers.shape}")
        bad = numbers[((numbers < 0) | (numbers >= high)) & (numbers != IGNORE)]
        if bad.size:
            raise ValueError(f"{name}: found {bad[0]}; expected 0 to {high - 1}, or {IGNORE} for what is no target")
        return nn.from_numpy(numbers.astype(np.int64), like=like)
    return nn.astype(values, nn.int64)


def classification(
    nn: Backend,
    logits: Array,
    labels: Array,
    *,
    problem_type: ProblemType | None = None,
    divisor: float | None = None,
) -> Loss:
    """The loss of a classifier or a regressor.

    Args:
        nn: the backend.
        logits: (B, C) float32.
        labels: single label: (B,) whole numbers, :data:`IGNORE` for rows to leave out. Multi label: (B, C) of 0 and
            1. Regression: (B, C) floats, or (B,) where C is 1.
        problem_type: one of :data:`PROBLEM_TYPES`. When None, as Hugging Face decides: regression where C is 1,
            else a single label for whole numbers and several for floats.
        divisor: what the loss summed over rows is divided by; the number of rows (with a label) when None.

    Returns:
        The mean over rows of the cross-entropy, of the mean over labels of the binary cross-entropy, or of the mean
        squared error; and the fraction that is right of the rows or of the labels (None for regression).

    Raises:
        ValueError: for labels that do not fit, and an unknown problem type.
    """
    batch, count = logits.shape
    host = isinstance(labels, (list, tuple, int, float, np.ndarray))
    dtypes = (nn.float32, nn.float64, nn.dtype("float16"), nn.dtype("bfloat16"))
    floats = np.issubdtype(np.asarray(labels).dtype, np.floating) if host else labels.dtype in dtypes
    if problem_type is None:
        problem_type = PROBLEM_TYPES[2 if count == 1 else int(floats)]
    if problem_type not in PROBLEM_TYPES:
        names = ", ".join(map(repr, PROBLEM_TYPES))
        raise ValueError(f"problem_type is {problem_type!r}; expected one of {names}, or None")
    if problem_type == "single_label_classification":
        return _single_label(nn, logits, _whole_numbers(nn, "labels", labels, count, logits), divisor)
    if host:
        labels = nn.from_numpy(np.asarray(labels, np.float32), like=logits)
    wanted = nn.astype(labels, logits.dtype)
    if problem_type == "regression" and count == 1 and tuple(wanted.shape) == (batch,):
        wanted = wanted[:, None]
    _check_labels(wanted, (batch, count), problem_type)
    if problem_type == "regression":
        error = logits - wanted
        return Loss(nn.sum(nn.sum(error * error, axis=1), axis=0) / count / (divisor or batch), None)
    each = nn.softplus(logits) - logits * wanted  # -log sigmoid(x) for 1, -log sigmoid(-x) for 0
    right = nn.astype((logits > 0) == (wanted > 0.5), logits.dtype)
    mean = nn.sum(nn.sum(right, axis=1), axis=0) / (batch * count)
    return Loss(nn.sum(nn.sum(each, axis=1), axis=0) / count / (divisor or batch), mean)


def _single_label(nn: Backend, logits: Array, labels: Array, divisor: float | None) -> Loss:
    _check_labels(labels, (logits.shape[0],), "single_label_classification")
    total, correct = _summed(nn, logits, labels)
    count = nn.astype(nn.sum(nn.astype(labels != IGNORE, nn.int64), axis=0), logits.dtype)
    return Loss(total / (count if divisor is None else divisor), nn.astype(correct, logits.dtype) / count)


def _check_labels(labels: Array, expected: tuple[int, ...], problem_type: str) -> None:
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels: expected shape {expected} for {problem_type}, found {tuple(labels.shape)}")
