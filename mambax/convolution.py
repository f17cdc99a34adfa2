"""The causal depthwise convolution over the ops of a backend, with state and mask.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from mambax.backend import Array, Ops
from mambax.scan import at_least_float32, own, refuse_mask_with_boundaries


def causal_conv1d(
    nn: Ops,
    x: Array,  # (B, L, D)
    weight: Array,  # (D, 1, K)
    bias: Array | None = None,  # (D,)
    *,
    initial_state: Array | None = None,  # (B, K-1, D)
    mask: Array | None = None,  # (B, L) bool
    boundaries: Array | None = None,  # (B, L) bool
    activation: str | None = "silu",
) -> tuple[Array, Array]:
    """``y[t] = act(bias + sum_k weight[k] x[t - (K-1) + k])``, each channel by itself.

    Args:
        nn: the backend whose arrays these are.
        x: (B, L, D) input.
        weight: (D, 1, K).
        bias: (D,) or None.
        initial_state: (B, K-1, D), the inputs before x; zeros when None.
        mask: (B, L) bool. Positions where it is False do not exist: the others see each other as neighbours,
            the state skips them, and their output is ``act(bias)`` at most, to be ignored.
        boundaries: (B, L) bool; where True a new sequence begins: inputs from before it count as zero from there
            on, in the final state too. Not together with a mask.
        activation: ``"silu"`` or None.

    Returns:
        y (B, L, D) in the dtype of x, computed in float32, and the final state (B, K-1, D) in the dtype of x:
        the last K-1 inputs that exist.

    Raises:
        ValueError: for another activation, and for a mask together with boundaries.

    Source: ``causal_conv1d_ref`` of the causal-conv1d package; mask, boundaries, initial and final state added.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; expected 'silu' or None")
    refuse_mask_with_boundaries("causal_conv1d", mask, boundaries)
    batch, length, channels = x.shape
    past = weight.shape[2] - 1
    if initial_state is None:
        initial_state = nn.zeros((batch, past, channels), x.dtype, like=x)
    full = nn.concat([nn.astype(initial_state, x.dtype), x], axis=1)  # (B, K-1+L, D)
    if boundaries is not None:
        begun = nn.cumulative_sum(nn.astype(nn.astype(boundaries, nn.bool_), nn.int64), axis=1)  # (B, L)
        number = nn.concat(
            [nn.zeros((batch, past), nn.int64, like=x), begun], axis=1
        )  # of the sequence, (B, K-1+L)
        y = _convolve(nn, full, weight, bias, activation, number)
        final = nn.where((number[:, length:] == begun[:, -1:])[..., None], full[:, length:], 0.0)
        return nn.astype(y, x.dtype), own(nn, final)
    if mask is None:
        y = _convolve(nn, full, weight, bias, activation)
        return nn.astype(y, x.dtype), own(nn, full[:, length:])

    mask = nn.astype(mask, nn.bool_)
    real = nn.concat([nn.astype(nn.zeros((batch, past), x.dtype, like=x) + 1, nn.bool_), mask], axis=1)
    steps = nn.arange(past + length, like=x)
    order = nn.argsort(nn.where(real, steps, steps + (past + length)), axis=1)  # those that exist come first
    full = nn.take_along_axis(full, _rows(nn, order, channels), axis=1)
    y = _convolve(nn, full, weight, bias, activation)  # of the packed inputs
    count = nn.cumulative_sum(nn.astype(mask, nn.int64), axis=1)  # (B, L) how many exist up to here
    back = nn.where(count > 0, count - 1, 0)
    y = nn.take_along_axis(y, _rows(nn, back, channels), axis=1)
    last = count[:, -1:] + nn.arange(past, like=x)  # (B, K-1)
    return nn.astype(y, x.dtype), nn.take_along_axis(full, _rows(nn, last, channels), axis=1)


def _rows(nn: Ops, indices: Array, channels: int) -> Array:
    """(B, T) row numbers as the (B, T, D) indices that take whole rows."""
    return indices[..., None] + nn.zeros((1, 1, channels), nn.int64, like=indices)


def _convolve(
    nn: Ops, full: Array, weight: Array, bias: Array | None, activation: str | None, number: Array | None = None
) -> Array:
    """Valid convolution of (B, K-1+L, D) along axis 1 -> (B, L, D), in float32.

    Where ``number`` (B, K-1+L) is given, an input reaches only outputs of the same number.
    """
    full, weight = at_least_float32(nn, full), at_least_float32(nn, weight)
    width = weight.shape[2]
    length = full.shape[1] - (width - 1)

    def tap(k: int) -> Array:
        inputs = full[:, k : k + length]
        if number is None:
            return inputs
        return nn.where((number[:, k : k + length] == number[:, width - 1 :])[..., None], inputs, 0.0)

    y = tap(0) * weight[:, 0, 0]
    for k in range(1, width):
        y = y + tap(k) * weight[:, 0, k]
    if bias is not None:
        y = y + at_least_float32(nn, bias)
    return nn.silu(y) if activation == "silu" else y
