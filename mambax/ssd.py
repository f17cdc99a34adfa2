r"""The scan of Mamba-2, state-space duality, over the ops of a backend: readable, differentiable, tested.

The recurrence (Dao and Gu 2024, section 3; ``mamba_chunk_scan_combined`` of mamba_ssm), for each head::

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T
    y[t] = h[t] C[t] + D x[t]

has one decay for a whole head, so that the outputs of a chunk are a masked product of matrices, as in attention.
Two algorithms are here:

``sequential``
    One step after another: the definition.
``chunked``
    Matrix products inside chunks of ``CHUNK`` steps, the state between them (the paper's listing 1). The decays
    from step s to step t are exponentials of sums over the steps between, each summed by itself under a mask: the
    difference of two running sums would lose digits where a step forgets everything.

Dimensions: B batch, L length, T chunk length, H heads, P head_dim, G groups, R heads of a group, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable

from mambax.backend import Array, Ops
from mambax.scan import algorithm_named, at_least_float32, own, refuse_mask_with_boundaries

CHUNK = 64
"""Steps of a chunk. The products inside it cost T^2 for each head, those with the state N P for each step."""

Chunk = Callable[[Ops, Array, Array, Array, Array, Array, Array, "Array | None"], "tuple[Array, Array]"]
"""(nn, x (B,T,G,R,P), dt (B,T,G,R), log_a (B,T,G,R), B (B,T,G,N), C (B,T,G,N), h (B,G,R,P,N), begins (B,T) bool or
None) -> y (B,T,G,R,P) without the skip, and the state after."""


def ssd(
    nn: Ops,
    x: Array,  # (B, L, H, P)
    dt: Array,  # (B, L, H)
    A: Array,  # (H,)
    B: Array,  # (B, L, G, N)
    C: Array,  # (B, L, G, N)
    D: Array | None = None,  # (H,)
    *,
    dt_bias: Array | None = None,  # (H,)
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Array | None = None,  # (B, H, P, N)
    mask: Array | None = None,  # (B, L) bool
    boundaries: Array | None = None,  # (B, L) bool
    algorithm: str = "chunked",
) -> tuple[Array, Array]:
    """The scan of Mamba-2 by one of :data:`ALGORITHMS`.

    Args:
        nn: the backend whose arrays these are.
        x: (B, L, H, P) input of each head.
        dt: (B, L, H) time steps, before ``dt_bias``, softplus and ``dt_limit``, which come in this order.
        A: (H,) decay of each head, negative.
        B, C: (B, L, G, N) input and output vectors; head h takes those of group ``h // (H / G)``.
        D: (H,) skip weights, or None.
        dt_bias: (H,) added to dt, or None.
        dt_softplus: put dt through softplus, after the bias.
        dt_limit: smallest and largest time step.
        initial_state: (B, H, P, N) state before the first step; zero when None.
        mask: (B, L) bool; where False the step leaves the state as it was, and its output is to be ignored.
        boundaries: (B, L) bool; where True a new sequence begins, which nothing from before it reaches. Not
            together with a mask.
        algorithm: a name in :data:`ALGORITHMS`.

    Returns:
        y (B, L, H, P) in the dtype of x, and the final state (B, H, P, N) in float32 (float64 if x is float64).
        All arithmetic is done in that precision.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and an unknown algorithm.

    Source: Dao and Gu 2024; ``mamba_chunk_scan_combined`` of mamba_ssm, with a mask added.
    """
    check_shapes(x, B, dt=dt, A=A, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state, mask=mask,
                 boundaries=boundaries)  # fmt: skip
    refuse_mask_with_boundaries("ssd", mask, boundaries)
    function = algorithm_named("ssd", algorithm, ALGORITHMS)
    batch, length, heads, width = x.shape
    groups, states = B.shape[2], B.shape[3]
    split = (groups, heads // groups)  # G, R
    out_dtype = x.dtype
    x, dt, A = at_least_float32(nn, x), at_least_float32(nn, dt), at_least_float32(nn, A)
    B, C = at_least_float32(nn, B), at_least_float32(nn, C)
    if dt_bias is not None:
        dt = dt + at_least_float32(nn, dt_bias)
    if dt_softplus:
        dt = nn.softplus(dt)
    dt = _limited(nn, dt, dt_limit)
    if mask is not None:
        exists = nn.astype(mask, nn.bool_)
        dt = nn.where(exists[..., None], dt, 0.0)
        x = nn.where(exists[..., None, None], x, 0.0)
        B = nn.where(exists[..., None, None], B, 0.0)  # zero times whatever stands at a masked step must be zero
    log_a = (dt * A).reshape(batch, length, *split)
    dt = dt.reshape(batch, length, *split)
    grouped = x.reshape(batch, length, *split, width)
    if initial_state is None:
        h = nn.zeros((batch, *split, width, states), x.dtype, like=x)
    else:
        h = nn.astype(initial_state, x.dtype).reshape(batch, *split, width, states)

    outputs = []
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        begins = None if boundaries is None else nn.astype(boundaries[:, part], nn.bool_)
        y, h = function(nn, grouped[:, part], dt[:, part], log_a[:, part], B[:, part], C[:, part], h, begins)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else nn.concat(outputs, axis=1)
    y = y.reshape(batch, length, heads, width)
    if D is not None:
        y = y + x * at_least_float32(nn, D)[:, None]
    return nn.astype(y, out_dtype), own(nn, h.reshape(batch, heads, width, states))


def check_shapes(x: Array, B: Array, **others: Array | None) -> None:
    """Refuse operands that a framework might broadcast without a word.

    Args:
        x, B: arrays of any framework, as of :func:`ssd`.
        others: the other arrays of :func:`ssd` by their names; those that are None are not there.

    Raises:
        ValueError: naming the array, its shape and the one expected.
    """
    if len(x.shape) != 4 or len(B.shape) != 4:
        raise ValueError(f"ssd: x must be (B, L, H, P) and B (B, L, G, N), found {x.shape} and {B.shape}")
    batch, length, heads, width = x.shape
    groups, states = B.shape[2], B.shape[3]
    if heads % groups:
        raise ValueError(f"ssd: {heads} heads cannot be shared by {groups} groups; expected a divisor of the heads")
    expected = {
        "B": (batch, length, groups, states), "C": (batch, length, groups, states), "dt": (batch, length, heads),
        "A": (heads,), "D": (heads,), "dt_bias": (heads,), "initial_state": (batch, heads, width, states),
        "mask": (batch, length), "boundaries": (batch, length),
    }  # fmt: skip
    for name, array in {"B": B, **others}.items():
        if array is not None and tuple(array.shape) != expected[name]:
            raise ValueError(f"ssd: {name} is {tuple(array.shape)}; expected {expected[name]}")


def _limited(nn: Ops, dt: Array, limit: tuple[float, float]) -> Array:
    low, high = limit
    dt = nn.maximum(dt, low) if low > 0 else dt
    return -nn.maximum(-dt, -high) if high < float("inf") else dt


def sequential(
    nn: Ops, x: Array, dt: Array, log_a: Array, B: Array, C: Array, h: Array, begins: Array | None
) -> tuple[Array, Array]:
    """One step after another. Shapes as in :data:`Chunk`."""
    a = nn.exp(log_a)
    if begins is not None:
        a = nn.where(~begins[..., None, None], a, 0.0)
    dtx = x * dt[..., None]
    outputs = []
    for a_t, x_t, B_t, C_t in zip(*(nn.unstack(array, axis=1) for array in (a, dtx, B, C)), strict=True):
        h = a_t[..., None, None] * h + x_t[..., None] * B_t[:, :, None, None]
        outputs.append((h @ C_t[:, :, None, :, None])[..., 0])  # (B, G, R, P)
    return nn.stack(outputs, axis=1), h


def chunked(
    nn: Ops, x: Array, dt: Array, log_a: Array, B: Array, C: Array, h: Array, begins: Array | None
) -> tuple[Array, Array]:
    """Matrix products over the whole chunk. Shapes as in :data:`Chunk`."""
    length = x.shape[1]
    steps = nn.arange(length, like=x)
    causal = steps[:, None] >= steps[None, :]  # (T, T), [t, s]
    after = steps[:, None] > steps[None, :]
    log_a = log_a.swapaxes(1, 2).swapaxes(2, 3)  # (B, G, R, T)
    # sums of log_a over s+1..t: for every s, those of the steps after s
    sums = nn.cumulative_sum(nn.where(after, log_a[..., None], 0.0), axis=-2)  # (B, G, R, T, T)
    total = nn.cumulative_sum(log_a, axis=-1)  # (B, G, R, T)
    from_start = nn.exp(total)
    if begins is not None:
        number = nn.cumulative_sum(nn.astype(begins, nn.int64), axis=1)  # (B, T)
        causal = (causal & (number[:, :, None] == number[:, None, :]))[:, None, None]
        from_start = nn.where((number == 0)[:, None, None], from_start, 0.0)
    decay = nn.where(causal, nn.exp(nn.where(causal, sums, 0.0)), 0.0)  # (B, G, R, T, T)

    dtx = (x * dt[..., None]).swapaxes(1, 2).swapaxes(2, 3)  # (B, G, R, T, P)
    B, C = B.swapaxes(1, 2)[:, :, None], C.swapaxes(1, 2)[:, :, None]  # (B, G, 1, T, N)
    inside = ((C @ B.swapaxes(-1, -2)) * decay) @ dtx  # (B, G, R, T, P)
    before = (C @ h.swapaxes(-1, -2)) * from_start[..., None]
    to_end = decay[..., -1, :, None]  # (B, G, R, T, 1): what is left of each step at the end
    h = from_start[..., -1, None, None] * h + (dtx * to_end).swapaxes(-1, -2) @ B
    return (inside + before).swapaxes(2, 3).swapaxes(1, 2), h


ALGORITHMS: dict[str, Chunk] = {"sequential": sequential, "chunked": chunked}
"""Name -> what runs a chunk."""
