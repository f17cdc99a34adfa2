r"""The selective scan in MLX's own operations, over many tokens at a time: it runs wherever MLX does.

A chunk of 256 steps is cut into 16 blocks of 16. All blocks are walked at once from a zero state::

    h'[t] = a[t] h'[t-1] + b[t]        P[t] = a[t] P[t-1],  P = 1 before the block

then the state H before each block follows from the ends of those before it, and ``h[t] = h'[t] + P[t] H``. There
are only products of decays, none of which exceeds 1 where A is negative, so nothing overflows; a step that begins a
sequence has a decay of zero. The number of operations depends on the number of chunks, not on that of tokens.

On the way back one chunk after another is computed again: what it computes on the way, (B, 256, D, N) a few times
over, is not kept, and training holds one state for each chunk.

Dimensions: B batch, L length, D d_inner, N d_state, S blocks, T steps of a block.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mambax.scan import CHUNK, at_least_float32, check_shapes, refuse_mask_with_boundaries
from mambax_mlx import ops

BLOCK = 16
"""Steps of a block: 16 of them make a chunk. Measured on one core, 8 and 32 take half as long again."""


def selective_scan(
    u: mx.array,  # (B, L, D)
    delta: mx.array,  # (B, L, D)
    A: mx.array,  # (D, N)
    B: mx.array,  # (B, L, N)
    C: mx.array,  # (B, L, N)
    D: mx.array | None = None,  # (D,)
    *,
    z: mx.array | None = None,  # (B, L, D)
    delta_bias: mx.array | None = None,  # (D,)
    delta_softplus: bool = False,
    initial_state: mx.array | None = None,  # (B, D, N)
    mask: mx.array | None = None,  # (B, L) bool
    boundaries: mx.array | None = None,  # (B, L) bool
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.scan.selective_scan` by chunks, differentiable and inside ``mx.compile`` and ``mx.vmap``.

    Raises:
        ValueError: for a shape that does not fit, and for a mask together with boundaries.
    """
    check_shapes(
        u, A, delta=delta, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state, mask=mask,
        boundaries=boundaries,
    )  # fmt: skip
    refuse_mask_with_boundaries("selective_scan", mask, boundaries)
    batch, length, channels = u.shape
    wide, A, B, C = (at_least_float32(ops, x) for x in (u, A, B, C))
    delta = _time_steps(delta, delta_bias, delta_softplus)
    if mask is not None:
        exists = mask.astype(mx.bool_)[..., None]  # (B, L, 1)
        delta, wide, B = (mx.where(exists, x, 0.0) for x in (delta, wide, B))  # zero times NaN would be NaN
    if initial_state is None:
        h = mx.zeros((batch, channels, A.shape[1]), mx.float32)
    else:
        h = initial_state.astype(mx.float32)
    rows = [delta, delta * wide, B, C]
    if boundaries is not None:
        rows.append(~boundaries.astype(mx.bool_)[..., None])  # (B, L, 1)
    outputs = []
    ends = list(range(CHUNK, length, CHUNK))
    for parts in zip(*(mx.split(x, ends, axis=1) for x in rows), strict=True):  # a slice's gradient is as long as x
        y, h = _checkpointed(A, h, *parts)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    if D is not None:
        y = y + wide * at_least_float32(ops, D)
    if z is not None:
        y = y * ops.silu(at_least_float32(ops, z))
    # MLX may compute a product in the memory of a factor, here a part of the blocks of a chunk, which the state
    # would then keep. Taking rows has memory of its own.
    return y.astype(u.dtype), mx.take(h, mx.arange(batch), axis=0)


def _time_steps(delta: mx.array, bias: mx.array | None, softplus: bool) -> mx.array:
    delta = at_least_float32(ops, delta)
    if bias is not None:
        delta = delta + at_least_float32(ops, bias)
    return ops.softplus(delta) if softplus else delta


def _chunk(
    A: mx.array,  # (D, N)
    h: mx.array,  # (B, D, N)
    delta: mx.array,  # (B, L, D)
    inputs: mx.array,  # (B, L, D), delta u
    B: mx.array,  # (B, L, N)
    C: mx.array,  # (B, L, N)
    goes_on: mx.array | None = None,  # (B, L, 1) bool: False where a sequence begins
) -> tuple[mx.array, mx.array]:
    """C . h at every step of a chunk, (B, L, D), and the state after it, (B, D, N)."""
    batch, length, channels = delta.shape
    steps = min(BLOCK, length)
    deltas, inputs_, Bs, Cs = (_by_step(x, steps) for x in (delta, inputs, B, C))
    on: list[Any] = [None] * steps if goes_on is None else _by_step(goes_on, steps, fill=True)
    local, decays = [], []  # h' and P, (B, S, D, N) each
    for dt, x, b, kept in zip(deltas, inputs_, Bs, on, strict=True):
        a = mx.exp(dt[..., None] * A)
        if kept is not None:
            a = mx.where(kept[..., None], a, 0.0)
        b = x[..., None] * b[:, :, None]
        local.append(a * local[-1] + b if local else b)
        decays.append(a * decays[-1] if decays else a)
    before = []
    for decay, end in zip(ops.unstack(decays[-1], 1), ops.unstack(local[-1], 1), strict=True):
        before.append(h)
        h = decay * h + end
    carried = mx.stack(before, axis=1)  # (B, S, D, N)
    outputs = [
        ((part + decay * carried) @ c[..., None])[..., 0]  # (B, S, D)
        for part, decay, c in zip(local, decays, Cs, strict=True)
    ]
    return mx.stack(outputs, axis=2).reshape(batch, -1, channels)[:, :length], h


def _by_step(x: mx.array, steps: int, *, fill: bool = False) -> list[mx.array]:
    """(B, L, F) as T arrays (B, S, F), the t-th of which has step t of every block; missing steps are `fill`.

    A step with a delta and an input of zero leaves the state as it is.
    """
    batch, length, features = x.shape
    missing = -length % steps
    if missing:
        x = mx.concatenate([x, mx.full((batch, missing, features), fill, x.dtype)], axis=1)
    return list(ops.unstack(x.reshape(batch, -1, steps, features), 2))


_checkpointed: Any = mx.custom_function(_chunk)


@_checkpointed.vjp
def _backward(arrays: Any, cotangents: Any, _: Any) -> list[mx.array]:
    """The gradients of a chunk, computed from its arguments alone.

    ``mx.checkpoint`` lets every chunk compute its forward pass again at once. Here it waits for the gradient of the
    chunk after it, and the chunk before it waits for all of its gradients, so that only one is in memory.
    """
    _, gradients = mx.vjp(_chunk, mx.depends(list(arrays), list(cotangents)), list(cotangents))
    return mx.depends(gradients, gradients)
