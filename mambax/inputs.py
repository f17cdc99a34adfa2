"""What a model is given, checked: token ids, hidden states, masks.

Dimensions: B batch, L length, M d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mambax.backend import Array, Backend
from mambax.config import MambaConfig

_WHOLE = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")


def as_mask(nn: Backend, mask: Array, like: Array) -> Array:
    """A mask given as an array of the framework, of NumPy or as nested lists, as (B, L) bool beside ``like``.

    Raises:
        ValueError: for values other than True and False, 1 and 0: an additive mask means the opposite.
    """
    if isinstance(mask, (list, tuple, np.ndarray)):
        values = _rectangular("mask", mask)
        whole = np.issubdtype(values.dtype, np.integer) and np.isin(values, (0, 1)).all()
        if values.dtype != np.bool_ and not whole:
            raise ValueError(f"mask: expected True and False, or 1 and 0; found {values.dtype} values")
        return nn.from_numpy(values.astype(bool), like=like)
    if not has_dtype(mask, [nn.bool_]) and not is_whole(nn, mask):
        raise ValueError(f"mask: expected True and False, or 1 and 0; found {_kind(mask)}; {_given_as(nn)}")
    return nn.astype(mask, nn.bool_)


def as_token_ids(nn: Backend, input_ids: Array, vocab_size: int, like: Array) -> Array:
    """Token ids as a (B, L) array of the framework beside ``like``; those that come from the host are checked.

    Raises:
        ValueError: for ids outside the vocabulary, not whole numbers, or not (B, L) with L of at least 1.
    """
    if isinstance(input_ids, str):
        raise ValueError("input_ids: expected token ids, found text; use model.tokenizer.encode or model.generate")
    if isinstance(input_ids, (list, tuple, np.ndarray)):
        ids = _rectangular("input_ids", input_ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"input_ids: expected whole numbers, found {ids.dtype}; tokenize text first")
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            bad = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise ValueError(
                f"input_ids: token id {bad} is outside the vocabulary of {vocab_size}; expected 0 to "
                f"{vocab_size - 1}. Was the text tokenized with this model's tokenizer?"
            )
        input_ids = nn.from_numpy(ids.astype(np.int64), like=like)
    elif not is_whole(nn, input_ids):
        raise ValueError(f"input_ids: expected whole numbers, found {_kind(input_ids)}; {_given_as(nn)}")
    elif not has_dtype(input_ids, (nn.int64, nn.dtype("int32"))):
        input_ids = nn.astype(input_ids, nn.int64)  # PyTorch looks nothing up by narrower ones
    if len(input_ids.shape) != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: expected shape (batch, length) with at least one token, found {tuple(input_ids.shape)}"
        )
    return input_ids


def check_batch(batch: int) -> None:
    """Refuse a number of rows that is not a whole number from 0 up.

    Raises:
        ValueError: naming it.
    """
    if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 0:
        raise ValueError(f"batch is {batch!r}; expected a whole number of rows, at least 0")


def _rectangular(name: str, rows: Any) -> np.ndarray:
    """Nested lists as an array of NumPy."""
    try:
        return np.asarray(rows)
    except ValueError as error:
        raise ValueError(
            f"{name}: rows differ in length; pad them to one length, and let a mask say what is padding"
        ) from error


def has_dtype(array: Any, dtypes: Iterable[Any]) -> bool:
    """Whether something is an array of one of these dtypes, which those of another framework are not."""
    dtype = getattr(array, "dtype", None)  # NumPy's do not compare with those of others
    return any(type(known) is type(dtype) and known == dtype for known in dtypes)


def is_whole(nn: Backend, array: Any) -> bool:
    """Whether something is an array of the framework, of whole numbers."""
    return has_dtype(array, map(nn.dtype, _WHOLE))


def _kind(array: Any) -> str:
    """What an argument is, for messages."""
    return str(getattr(array, "dtype", None) or type(array).__name__)


def _given_as(nn: Backend) -> str:
    return f"give an array of the {nn.name} backend or of NumPy, or nested lists"


def check_hidden(config: MambaConfig, hidden: Array, mask: Array | None) -> None:
    """Refuse hidden states that are not (B, L, M) with L of at least 1, and a mask that is not (B, L).

    Raises:
        ValueError: with the shape expected and the one found.
    """
    shape = tuple(hidden.shape)
    if len(shape) != 3 or shape[1] == 0 or shape[2] != config.d_model:
        raise ValueError(f"inputs: expected (batch, length of at least 1, d_model {config.d_model}), found {shape}")
    if mask is not None and tuple(mask.shape) != shape[:2]:
        raise ValueError(f"mask: expected (batch, length) = {shape[:2]}, found {tuple(mask.shape)}")


def as_boundaries(
    nn: Backend, segment_ids: Array | None, boundaries: Array | None, mask: Array | None, like: Array
) -> Array | None:
    """Where the sequences of packed rows begin, (B, L) bool beside ``like``; None when nothing is packed.

    Args:
        nn: the backend.
        segment_ids: (B, L) whole numbers, the same number along each sequence of a row, or None. A sequence begins
            where the number changes; at the first position the sequence of the state goes on.
        boundaries: (B, L) bool, True where a sequence begins, or None; the first position counts too.
        mask: the mask given beside them, or None.
        like: an array of L positions, (B, L, ...), on whose device to put them.

    Raises:
        ValueError: when two of the three are given, and for shapes or values that do not fit.
    """
    if segment_ids is None and boundaries is None:
        return None
    if mask is not None or (segment_ids is not None and boundaries is not None):
        names = ("segment_ids", "boundaries", "mask")
        given = [name for name, x in zip(names, (segment_ids, boundaries, mask), strict=True) if x is not None]
        raise ValueError(
            f"found {' and '.join(given)}; expected one of them. In packed rows, let the padding be a segment of "
            "its own"
        )
    return _begins(nn, boundaries, like) if segment_ids is None else _changes(nn, segment_ids, like)


def _begins(nn: Backend, boundaries: Array, like: Array) -> Array:
    if isinstance(boundaries, (list, tuple, np.ndarray)):
        boundaries = _rectangular("boundaries", boundaries)
        if boundaries.dtype == np.bool_:
            boundaries = nn.from_numpy(boundaries, like=like)
    if not has_dtype(boundaries, [nn.bool_]):
        raise ValueError(f"boundaries: expected True and False, found {_kind(boundaries)} values; {_given_as(nn)}")
    _check_positions("boundaries", boundaries, like)
    return boundaries


def _changes(nn: Backend, segment_ids: Array, like: Array) -> Array:
    if isinstance(segment_ids, (list, tuple, np.ndarray)):
        numbers = _rectangular("segment_ids", segment_ids)
        if not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(f"segment_ids: expected whole numbers, found {numbers.dtype} values")
        segment_ids = nn.from_numpy(numbers.astype(np.int64), like=like)
    elif not is_whole(nn, segment_ids):
        raise ValueError(f"segment_ids: expected whole numbers, found {_kind(segment_ids)}; {_given_as(nn)}")
    _check_positions("segment_ids", segment_ids, like)
    first = nn.astype(segment_ids[:, :1] * 0, nn.bool_)
    return nn.concat([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def _check_positions(name: str, array: Array, like: Array) -> None:
    if tuple(array.shape) != tuple(like.shape[:2]):
        raise ValueError(f"{name}: expected (batch, length) = {tuple(like.shape[:2])}, found {tuple(array.shape)}")


def segment_ids_from_lengths(lengths: Sequence[int]) -> np.ndarray:
    """(1, L) int64 segment ids of sequences of the given lengths packed into one row of L = sum(lengths).

    Of ``cu_seqlens`` (0 and the running sums of the lengths) the lengths are ``numpy.diff(cu_seqlens)``.

    Raises:
        ValueError: for no length, or one below 1.
    """
    if len(lengths) == 0 or min(lengths) < 1:
        raise ValueError(f"lengths: expected at least one, each 1 or more; found {list(lengths)}")
    return np.repeat(np.arange(len(lengths)), np.asarray(lengths))[None]
