"""What single blocks remember of the tokens they have read: one named tuple of arrays for each kind of mixer.

Dimensions: B batch, K d_conv, C channels of the convolution, D d_inner, N d_state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mambax.backend import Array


class LayerState(NamedTuple):
    """The state of a state-space mixer.

    Attributes:
        conv: (B, K-1, C) the last inputs of the convolution, in the dtype of the activations.
        ssm: (B, D, N) the state of the recurrence, float32.
    """

    conv: Array
    ssm: Array


class AttentionState(NamedTuple):
    """The state of an attention mixer; the only one that grows with the tokens.

    Attributes:
        key, value: (B, H, T, P) of every position so far, keys with their rotary embedding, in the dtype of the
            activations.
        number: (B, T) int64, which sequence of a packed row each position belongs to, counted from 0; -1 for a
            position that does not exist.
    """

    key: Array
    value: Array
    number: Array


class NoState(NamedTuple):
    """The state of a block that remembers nothing, such as an MLP."""


KINDS: tuple[type[Any], ...] = (LayerState, AttentionState, NoState)
"""Every kind of layer state that a file may hold; no two have the same fields."""


def of_fields(fields: dict[str, Any]) -> Any:
    """The layer state that has exactly these fields.

    Raises:
        KeyError: when there is none.
    """
    return {frozenset(kind._fields): kind for kind in KINDS}[frozenset(fields)](**fields)
