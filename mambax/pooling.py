"""From the hidden states of a sequence to one vector.

Dimensions: B batch, L length, M d_model, P pooled size.
"""

from __future__ import annotations

import numpy as np

from mambax.backend import Array, Backend
from mambax.config import MambaConfig, Pooling
from mambax.inputs import as_mask
from mambax.scan import at_least_float32
from mambax.state import InferenceParams


def pooled_size(config: MambaConfig, pooling: Pooling) -> int:
    """P, the number of features that a pooling gives.

    Raises:
        ValueError: for ``"state"`` where the last block keeps no state of Mamba-1.
    """
    if pooling == "state" and config.layer_kinds[-1] != "mamba":
        raise ValueError(
            f"pooling 'state' needs 'mamba' as the last of layer_types, found {config.layer_kinds[-1]!r}"
        )
    if pooling == "state" and config.shared is not None:
        raise ValueError("pooling 'state' needs a model without shared blocks; use 'last' or 'mean'")
    return config.d_inner * config.d_state if pooling == "state" else config.d_model


def pool(nn: Backend, hidden: Array, state: InferenceParams, mask: Array | None, pooling: Pooling) -> Array:
    """One vector per row.

    Args:
        nn: the backend whose arrays these are.
        hidden: (B, L, M).
        state: the state after the last position.
        mask: (B, L) bool or None; a row needs at least one True for ``"last"`` and ``"mean"``.
        pooling: see :class:`MambaForFeatureExtraction`.

    Returns:
        (B, P) float32. Each row is what it would be without its padding.

    Raises:
        ValueError: for a mask from the host that leaves a row with no position for ``"last"`` and ``"mean"``.
    """
    batch, length, _ = hidden.shape
    hidden = at_least_float32(nn, hidden)
    if pooling == "state":
        ssm = state.layers[-1].ssm
        return ssm.reshape(batch, ssm.shape[1] * ssm.shape[2])
    if mask is None:
        return hidden[:, -1] if pooling == "last" else nn.sum(hidden, axis=1) / length
    if isinstance(mask, (list, tuple, np.ndarray)) and not np.asarray(mask).any(axis=1).all():
        row = int(np.argmin(np.asarray(mask).any(axis=1)))
        raise ValueError(f"mask: row {row} has no position that exists; pooling {pooling!r} expects at least one")
    real = as_mask(nn, mask, hidden)
    if pooling == "mean":
        total = nn.sum(nn.where(real[..., None], hidden, 0.0), axis=1)
        return total / nn.astype(nn.sum(nn.astype(real, nn.int64), axis=1), total.dtype)[:, None]
    return last_positions(nn, hidden, real, 1)[:, 0]


def last_positions(nn: Backend, hidden: Array, mask: Array | None, count: int) -> Array:
    """The last positions that exist in each row, as if its padding were on the left.

    Args:
        nn: the backend whose arrays these are.
        hidden: (B, L, M).
        mask: (B, L) bool or None.
        count: how many, at least 1; all when there are fewer.

    Returns:
        (B, min(count, L), M). A row with fewer that exist has padding before them.
    """
    _, length, width = hidden.shape
    if mask is None:
        return hidden[:, -count:]
    steps = nn.arange(length, like=hidden)
    order = nn.argsort(nn.where(as_mask(nn, mask, hidden), steps, steps - length), axis=1)[:, -count:]
    index = order[..., None] + nn.zeros((1, 1, width), nn.int64, like=hidden)
    return nn.take_along_axis(hidden, index, axis=1)
