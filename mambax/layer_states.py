"""What single blocks remember of the tokens they have read: one named tuple of arrays for each kind of mixer.

Dimensions: B batch, K d_conv, C channels of the convolution, D d_inner, N d_state, H heads of keys and values,
P head_dim, T positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mambax.backend import Array


class LayerState(NamedTuple):
    """The state of a state-space mixer.

    Attributes:
        conv: (B, K-1, C) the last inputs of the convolution, in the dtype of the activations.
        ssm: (B, D, N) the state of the recurrence, or (B, heads, D / heads, N) in Mamba-2; float32.
    """

    conv: Array
    ssm: Array


def check_layer_state(state: LayerState, layer_idx: int, conv: tuple[int, ...], ssm: tuple[int, ...]) -> None:
    """Refuse the state of another model or of other rows.

    Args:
        state: of a mixer.
        layer_idx: the block's number, for the message.
        conv, ssm: the shapes that are needed.

    Raises:
        ValueError: with the shapes found and needed.
    """
    found = tuple(state.conv.shape), tuple(state.ssm.shape)
    if found != (conv, ssm):
        raise ValueError(
            f"state: conv_state and ssm_state of layer {layer_idx} are {found[0]} and {found[1]}, but this model "
            f"and input need {conv} and {ssm}; use the state of the same model and rows"
        )


class AttentionState(NamedTuple):
    """The state of an attention mixer; it grows with the tokens, as no state without attention does.

    Attributes:
        key, value: (B, H, T, P) of every position so far, keys with their rotary embedding, in the dtype of the
            activations.
        number: (B, T) int64, which sequence of a packed row each position belongs to, counted from 0; -1 for a
            position that does not exist.
    """

    key: Array
    value: Array
    number: Array


class ConvolvedAttentionState(NamedTuple):
    """The state of an attention mixer with a convolution before it.

    Attributes:
        key, value, number: as of :class:`AttentionState`; keys and values are those after the convolution.
        conv: (B, K-1, C) the last inputs of the convolution, in the dtype of the activations.
    """

    key: Array
    value: Array
    number: Array
    conv: Array


class ParallelState(NamedTuple):
    """The state of a state-space mixer and of an attention mixer beside it.

    Attributes:
        conv, ssm: as of :class:`LayerState`.
        key, value, number: as of :class:`AttentionState`.
    """

    conv: Array
    ssm: Array
    key: Array
    value: Array
    number: Array


class NoState(NamedTuple):
    """The state of a block that remembers nothing, such as an MLP."""


GROWING = {"key": 2, "value": 2, "number": 1}
"""Fields that grow with the tokens -> the axis along which they do."""

KINDS: tuple[type[Any], ...] = (LayerState, AttentionState, ConvolvedAttentionState, ParallelState, NoState)
"""Every kind of layer state that a file may hold, each before those with more arrays; all have other fields."""


def of_fields(fields: dict[str, Any]) -> Any:
    """The layer state that has exactly these fields.

    Raises:
        KeyError: when there is none.
    """
    return {frozenset(kind._fields): kind for kind in KINDS}[frozenset(fields)](**fields)
