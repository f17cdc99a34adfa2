"""Attention beside the state-space mixers of a hybrid model, its cache a state like any other.

Dimensions: B batch, L length, M d_model, H heads of queries, G heads of keys and values, R = H / G, P head_dim,
T positions so far, those of this call included.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from mambax.backend import Array, Backend, Ops
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import AttentionState
from mambax.options import AttentionOptions
from mambax.scan import at_least_float32, refuse_mask_with_boundaries, scaled


def attention(nn: Ops, q: Array, k: Array, v: Array, visible: Array, scale: float) -> Array:
    """``softmax(scale q k^T) v`` over the positions that each query may see.

    Args:
        nn: the backend whose arrays these are.
        q: (B, H, L, P) queries.
        k, v: (B, G, T, P) keys and values; head h of the queries sees those of head ``h // (H / G)``.
        visible: (B, L, T) bool; at least one True for every query.
        scale: factor on the products.

    Returns:
        (B, H, L, P) in the dtype of q; computed in float32 (float64 if q is float64).

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for the shared heads.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    grouped = at_least_float32(nn, q).reshape(batch, groups, heads // groups, length, width)
    k, v = at_least_float32(nn, k)[:, :, None], at_least_float32(nn, v)[:, :, None]  # (B, G, 1, T, P)
    scores = nn.where(visible[:, None, None], (grouped * scale) @ k.swapaxes(-1, -2), -float("inf"))
    weights = nn.exp(scores - nn.max(scores, axis=-1)[..., None])  # (B, G, R, L, T)
    weights = weights / nn.sum(weights, axis=-1)[..., None]
    return nn.astype((weights @ v).reshape(batch, heads, length, width), q.dtype)


def rotate(nn: Backend, x: Array, position: Array, theta: float, width: int) -> Array:
    """Rotary position embedding of x (B, H, L, P) at positions (B, L), in float32 and back in the dtype of x.

    Of the first ``width`` channels, channel i of the first half turns with channel i of the second by
    ``position * theta ** (-2 i / width)``; the others stay as they are.

    Source: Su et al. 2021, in the order of channels of Llama and of every checkpoint read here.
    """
    half = width // 2
    wide = at_least_float32(nn, x)
    frequency = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    angle = nn.astype(position, wide.dtype)[:, None, :, None] * nn.astype(
        nn.from_numpy(frequency, like=x), wide.dtype
    )
    cos, sin = nn.cos(angle), nn.sin(angle)  # (B, 1, L, P / 2)
    first, second, rest = wide[..., :half], wide[..., half:width], wide[..., width:]
    turned = nn.concat([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return nn.astype(turned, x.dtype)


def attend(
    nn: Backend,
    options: AttentionOptions,
    q: Array,
    k: Array,
    v: Array,
    state: AttentionState,
    mask: Array | None,
    boundaries: Array | None,
) -> tuple[Array, AttentionState]:
    """Causal attention over the positions of a state and those of this call.

    Padding does not exist: no position sees it, and positions are counted without it. In packed rows, a position
    sees its own sequence alone.

    Args:
        nn: the backend whose arrays these are.
        options: the sizes.
        q: (B, L, H P) queries, their heads side by side.
        k, v: (B, L, G P) keys and values.
        state: what was seen before.
        mask, boundaries: (B, L) bool or None; see :meth:`mambax.blocks.MambaMixer.forward`.

    Returns:
        (B, L, H P), and the state after the last position.

    Raises:
        ValueError: for a mask together with boundaries.
    """
    refuse_mask_with_boundaries("attention", mask, boundaries)
    batch, length, _ = q.shape
    number = _numbers(nn, state.number, length, mask, boundaries)  # (B, T)
    own = number[:, -length:]
    past = number.shape[1] - length
    steps = nn.arange(number.shape[1], like=q)
    earlier = steps[None, None, :] <= (past + nn.arange(length, like=q))[None, :, None]  # (1, L, T)
    visible = (number[:, None, :] == own[:, :, None]) & earlier  # padding sees padding, which nobody reads
    q, k, v = (_heads(x, options.head_dim) for x in (q, k, v))
    k = scaled(nn, k, options.key_multiplier)
    if options.rope_theta is not None:
        position = nn.sum(nn.astype(visible, nn.int64), axis=-1) - 1  # in its own sequence, (B, L)
        turn = position, options.rope_theta, int(options.rope_dim or 0)
        q, k = rotate(nn, q, *turn), rotate(nn, k, *turn)
    key = nn.concat([nn.astype(state.key, k.dtype), k], axis=2)  # (B, G, T, P)
    value = nn.concat([nn.astype(state.value, v.dtype), v], axis=2)
    scale = options.head_dim**-0.5 if options.scale is None else options.scale
    y = nn.attention(q, key, value, visible, scale)  # (B, H, L, P)
    y = y.swapaxes(1, 2).reshape(batch, length, options.n_heads * options.head_dim)
    return y, AttentionState(key, value, number)


def _heads(x: Array, width: int) -> Array:
    """(B, L, H P) to (B, H, L, P)."""
    batch, length, channels = x.shape
    return x.reshape(batch, length, channels // width, width).swapaxes(1, 2)


def _numbers(nn: Backend, before: Array, length: int, mask: Array | None, boundaries: Array | None) -> Array:
    """The sequence number of every position so far, (B, T)."""
    last = nn.maximum(nn.max(before, axis=1), 0) if before.shape[1] else nn.sum(before, axis=1)  # (B,)
    steps = nn.zeros((before.shape[0], length), nn.int64, like=before)
    if boundaries is not None:
        steps = nn.cumulative_sum(nn.astype(boundaries, nn.int64), axis=1)
    new = steps + last[:, None]
    if mask is not None:
        new = nn.where(nn.astype(mask, nn.bool_), new, -1)
    return nn.concat([before, new], axis=1)


def check_state(options: AttentionOptions, state: AttentionState, batch: int, layer_idx: int) -> None:
    """Refuse the state of another model or of other rows.

    Raises:
        ValueError: with the shapes found and needed.
    """
    found = tuple(state.key.shape)
    needed = (batch, options.n_kv_heads, state.number.shape[1], options.head_dim)
    if found != needed or tuple(state.value.shape) != needed or state.number.shape[0] != batch:
        raise ValueError(
            f"state: key_state of layer {layer_idx} is {found}, but this model and input need {needed}; "
            "use the state of the same model and rows"
        )


def empty_state(nn: Backend, options: AttentionOptions, batch: int, weight: Array) -> AttentionState:
    """The state before the first position: no position at all; in the dtype of a weight, and beside it."""
    floats = [nn.dtype(name) for name in ("float16", "bfloat16")] + [nn.float32, nn.float64]
    dtype = weight.dtype if weight.dtype in floats else nn.float32  # a quantised weight is of whole numbers
    empty = nn.zeros((batch, options.n_kv_heads, 0, options.head_dim), dtype, like=weight)
    return AttentionState(empty, empty, nn.zeros((batch, 0), nn.int64, like=weight))


def required_options(config: MambaConfig, kind: str) -> AttentionOptions:
    """The sizes of attention in a model that has it.

    Raises:
        ValueError: when the configuration has none.
    """
    if config.attention is None:
        raise ValueError(f"layer_types has {kind!r}, but attention is None; expected its options")
    return config.attention


class AttentionMixer:
    """Causal attention with heads shared by groups of queries; see :func:`attend`.

    Args:
        config: the model's configuration; its ``attention`` has this mixer's sizes.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.
    """

    nn: ClassVar[Backend]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        options = required_options(config, "attention")
        if options.d_conv:
            raise ValueError(
                f"layer_types has 'attention', but attention.d_conv is {options.d_conv}; 'mha' alone takes it"
            )
        self.config, self.options, self.layer_idx = config, options, layer_idx
        M, width = config.d_model, options.head_dim

        def linear(n_out: int, n_in: int) -> Any:
            return nn.Linear(init.linear(n_out, n_in), init.full((n_out,), 0.0) if options.use_bias else None)

        self.q_proj = linear(options.n_heads * width, M)
        self.k_proj = linear(options.n_kv_heads * width, M)
        self.v_proj = linear(options.n_kv_heads * width, M)
        bias = init.full((M,), 0.0) if options.use_out_bias else None
        self.o_proj = nn.Linear(init.out_proj(config, options.n_heads * width), bias)

    def forward(
        self,
        hidden: Array,
        state: AttentionState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, AttentionState]:
        """Mix along the sequence; arguments and results as of :meth:`mambax.blocks.MambaMixer.forward`."""
        batch = hidden.shape[0]
        state = self.init_state(batch) if state is None else state
        check_state(self.options, state, batch, self.layer_idx)
        q, k, v = (layer(hidden) for layer in (self.q_proj, self.k_proj, self.v_proj))
        y, after = attend(self.nn, self.options, q, k, v, state, mask, boundaries)
        return self.o_proj(y), after

    def init_state(self, batch: int) -> AttentionState:
        """The state before the first position; see :func:`empty_state`."""
        return empty_state(self.nn, self.options, batch, self.k_proj.weight)
