r"""Selective-scan algorithms over the ops of a backend: readable, differentiable, tested.

The recurrence (Gu and Dao 2023, equation 2 with the discretisation of ``selective_scan_ref`` in mamba_ssm)::

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = (C[t] . h[t] + D u[t]) * silu(z[t])

is linear in h, so that any associative way of combining its steps gives the same answer. Three are here:

``sequential``
    One step after another: the definition. L dependent steps, memory O(B D N) besides inputs and outputs.
``pscan``
    Work-efficient parallel scan (after Blelloch 1990): pairs of neighbouring steps are combined, the half-length
    sequence is scanned, the steps between are filled in. O(L) work, O(log L) depth, and only products of decays,
    so nothing can overflow.
``logcumsumexp``
    The scan as a cumulative sum of logarithms (Heinsen 2023), positive and negative terms apart. For study: it
    loses digits as the summed ``delta A`` grows, and where an input term is exactly zero its gradient is taken
    as zero.

All go through the sequence in chunks (``ALGORITHMS`` says how long), which bounds the memory of inference and the
sums that ``logcumsumexp`` has to subtract.

Dimensions: B batch, L length, T chunk length, D d_inner, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from mambax.backend import Array, Ops

CHUNK = 256
"""Steps that a parallel algorithm handles at once. A longer chunk means fewer calls and more memory."""

Recurrence = Callable[[Ops, Array, Array, Array, "Array | None"], Array]
"""(nn, log_a (B,T,D,N), b (B,T,D,N), h0 (B,D,N), begins (B,T) bool | None) -> every state (B,T,D,N) of
h[t] = exp(log_a[t]) h[t-1] + b[t], where h[t-1] counts as zero at a step that begins a sequence."""

Named = TypeVar("Named")


def at_least_float32(nn: Ops, x: Array) -> Array:
    """x in float64 if it is float64, else in float32: the precision in which the recurrence is computed."""
    return x if x.dtype in (nn.float32, nn.float64) else nn.astype(x, nn.float32)


def scaled(nn: Ops, x: Array, factor: float) -> Array:
    """x times a factor, in the dtype of x, which a plain product with a number may widen; x itself for 1."""
    return x if factor == 1 else nn.astype(x * factor, x.dtype)


def own(nn: Ops, part: Array) -> Array:
    """A copy of a part of an array. A state that kept the part itself would keep the whole array in memory."""
    return nn.astype(part * 1, part.dtype)


def selective_scan(
    nn: Ops,
    u: Array,  # (B, L, D)
    delta: Array,  # (B, L, D)
    A: Array,  # (D, N)
    B: Array,  # (B, L, N)
    C: Array,  # (B, L, N)
    D: Array | None = None,  # (D,)
    *,
    z: Array | None = None,  # (B, L, D)
    delta_bias: Array | None = None,  # (D,)
    delta_softplus: bool = False,
    initial_state: Array | None = None,  # (B, D, N)
    mask: Array | None = None,  # (B, L) bool
    boundaries: Array | None = None,  # (B, L) bool
    algorithm: str = "sequential",
) -> tuple[Array, Array]:
    """The selective scan with its whole epilogue, by one of :data:`ALGORITHMS`.

    Args:
        nn: the backend whose arrays these are.
        u: (B, L, D) input.
        delta: (B, L, D) time steps, before ``delta_bias`` and softplus.
        A: (D, N) state matrix, negative; the diagonal of each channel.
        B, C: (B, L, N) input and output vectors.
        D: (D,) skip weights, or None.
        z: (B, L, D) gate, or None.
        delta_bias: (D,) added to delta, or None.
        delta_softplus: put delta through softplus, after the bias.
        initial_state: (B, D, N) state before the first step; zero when None.
        mask: (B, L) bool; where False the step leaves the state as it was, and its output is to be ignored.
        boundaries: (B, L) bool; where True a new sequence begins, which nothing from before it reaches: the state
            before that step is zero, at the first step in place of the initial state. Not together with a mask.
        algorithm: a name in :data:`ALGORITHMS`.

    Returns:
        y (B, L, D) in the dtype of u, and the final state (B, D, N) in float32 (float64 if u is float64). All
        arithmetic is done in that precision.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and an unknown algorithm.

    Source: ``selective_scan_ref`` of mamba_ssm, with mask, boundaries, initial and final state added.
    """
    check_shapes(
        u, A, delta=delta, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state, mask=mask,
        boundaries=boundaries,
    )  # fmt: skip
    refuse_mask_with_boundaries("selective_scan", mask, boundaries)
    recurrence, chunk = algorithm_named("selective_scan", algorithm, ALGORITHMS)
    out_dtype = u.dtype
    u32, delta = at_least_float32(nn, u), at_least_float32(nn, delta)
    A, B, C = at_least_float32(nn, A), at_least_float32(nn, B), at_least_float32(nn, C)
    if delta_bias is not None:
        delta = delta + at_least_float32(nn, delta_bias)
    if delta_softplus:
        delta = nn.softplus(delta)
    if mask is not None:
        exists = nn.astype(mask, nn.bool_)[..., None]  # (B, L, 1)
        delta = nn.where(exists, delta, 0.0)
        u32 = nn.where(exists, u32, 0.0)
        B = nn.where(exists, B, 0.0)  # zero times whatever stands at a masked step must be zero
    batch, length, channels = u.shape
    h = initial_state
    h = nn.zeros((batch, channels, A.shape[1]), u32.dtype, like=u32) if h is None else nn.astype(h, u32.dtype)

    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        dt = delta[:, part, :, None]  # (B, T, D, 1)
        log_a = dt * A  # (B, T, D, N)
        b = dt * u32[:, part, :, None] * B[:, part, None, :]  # (B, T, D, N)
        begins = None if boundaries is None else nn.astype(boundaries[:, part], nn.bool_)
        states = recurrence(nn, log_a, b, h, begins)  # (B, T, D, N)
        outputs.append((states @ C[:, part, :, None])[..., 0])  # (B, T, D)
        h = states[:, -1]
    y = outputs[0] if len(outputs) == 1 else nn.concat(outputs, axis=1)
    if D is not None:
        y = y + u32 * at_least_float32(nn, D)
    if z is not None:
        y = y * nn.silu(at_least_float32(nn, z))
    return nn.astype(y, out_dtype), own(nn, h)


def check_shapes(u: Array, A: Array, **others: Array | None) -> None:
    """Refuse operands that a framework might broadcast without a word."""
    if len(u.shape) != 3 or len(A.shape) != 2:
        raise ValueError(f"selective_scan: u must be (B, L, D) and A (D, N), found {u.shape} and {A.shape}")
    batch, length, channels = u.shape
    states = A.shape[1]
    vector, rows = (batch, length, states), (batch, length, channels)
    expected = {
        "A": (channels, states), "delta": rows, "B": vector, "C": vector, "D": (channels,), "z": rows,
        "delta_bias": (channels,), "initial_state": (batch, channels, states), "mask": (batch, length),
        "boundaries": (batch, length),
    }  # fmt: skip
    for name, array in {"A": A, **others}.items():
        if array is not None and tuple(array.shape) != expected[name]:
            raise ValueError(f"selective_scan: {name} is {tuple(array.shape)}; expected {expected[name]}")


def refuse_mask_with_boundaries(function: str, mask: Array | None, boundaries: Array | None) -> None:
    """Refuse what would have two meanings: whether a masked position that begins a sequence begins it.

    Raises:
        ValueError: when both are given.
    """
    if mask is not None and boundaries is not None:
        raise ValueError(
            f"{function}: found a mask and boundaries; expected one of them. In packed rows, let the padding be a "
            "sequence of its own, or leave it out"
        )


def _decay(nn: Ops, log_a: Array, begins: Array | None) -> Array:
    """exp(log_a), and zero where a sequence begins. (B, T, D, N)"""
    a = nn.exp(log_a)
    return a if begins is None else nn.where(~begins[..., None, None], a, 0.0)


def sequential(nn: Ops, log_a: Array, b: Array, h: Array, begins: Array | None = None) -> Array:
    """One step after another. Shapes as in :data:`Recurrence`."""
    a = _decay(nn, log_a, begins)
    states = []
    for a_t, b_t in zip(nn.unstack(a, axis=1), nn.unstack(b, axis=1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return nn.stack(states, axis=1)


def pscan(nn: Ops, log_a: Array, b: Array, h: Array, begins: Array | None = None) -> Array:
    """Work-efficient parallel scan. Shapes as in :data:`Recurrence`."""
    a = _decay(nn, log_a, begins)
    first = a[:, :1] * h[:, None] + b[:, :1]
    b = nn.concat([first, b[:, 1:]], axis=1) if b.shape[1] > 1 else first
    return _odd_even(nn, a, b)


def _odd_even(nn: Ops, a: Array, b: Array) -> Array:
    """Every h[t] = a[t] h[t-1] + b[t] with h[-1] = 0, along axis 1: O(T) work in log2(T) levels."""
    length = a.shape[1]
    if length == 1:
        return b
    even, odd = slice(0, length - 1, 2), slice(1, None, 2)  # steps 2i and 2i+1, in pairs
    odd_states = _odd_even(nn, a[:, odd] * a[:, even], a[:, odd] * b[:, even] + b[:, odd])
    pairs = length // 2
    later = slice(2, None, 2)  # the even steps after the first, each of which follows an odd one
    before = odd_states[:, : (length - 1) // 2]
    even_states = nn.concat([b[:, :1], a[:, later] * before + b[:, later]], axis=1)
    both = nn.stack([even_states[:, :pairs], odd_states], axis=2)  # (B, T//2, 2, D, N)
    states = both.reshape(both.shape[0], 2 * pairs, *both.shape[3:])
    return states if length % 2 == 0 else nn.concat([states, even_states[:, pairs:]], axis=1)


def logcumsumexp(nn: Ops, log_a: Array, b: Array, h: Array, begins: Array | None = None) -> Array:
    """Scan by a cumulative sum of exponentials in log space. Shapes as in :data:`Recurrence`.

    With boundaries, every step sums over the terms of its own sequence: T terms for each of T steps.
    """
    tiny = 1e-37  # below it, an input term counts as zero
    total = nn.cumulative_sum(log_a, axis=1)  # log of the decay from before the chunk to step t

    def one_sign(b: Array, h: Array) -> Array:
        terms = nn.log(nn.maximum(b, tiny)) - total
        start = nn.log(nn.maximum(h, tiny))[:, None]
        terms = nn.concat([start, terms], axis=1)  # (B, 1+T, D, N)
        if begins is None:
            return nn.exp(total + nn.cumulative_logsumexp(terms, axis=1)[:, 1:])
        return _sums_by_sequence(nn, total, terms, begins)

    return one_sign(b, h) - one_sign(-b, -h)


def _sums_by_sequence(nn: Ops, total: Array, terms: Array, begins: Array) -> Array:
    """exp(total[t] + log of the sum of exp(terms[s])) over the terms s <= t of the sequence that t belongs to.

    total (B,T,D,N), terms (B,1+T,D,N) of which the first is the initial state's, begins (B,T) bool -> (B,T,D,N).
    """
    length = total.shape[1]
    number = nn.cumulative_sum(nn.astype(begins, nn.int64), axis=1)  # (B, T); the initial state belongs to 0
    of_term = nn.concat([number[:, :1] * 0, number], axis=1)  # (B, 1+T)
    steps = nn.arange(1 + length, like=total)
    mine = (of_term[:, None, :] == number[:, :, None]) & (steps[None, None, :] <= steps[None, 1:, None])
    scores = nn.where(mine[..., None, None], terms[:, None] + total[:, :, None], -float("inf"))  # (B,T,1+T,D,N)
    peak = nn.stop_gradient(nn.max(scores, axis=2))  # (B, T, D, N)
    return nn.exp(peak) * nn.sum(nn.exp(scores - peak[:, :, None]), axis=2)


ALGORITHMS: dict[str, tuple[Recurrence, int]] = {
    "sequential": (sequential, CHUNK),
    "pscan": (pscan, CHUNK),
    "logcumsumexp": (logcumsumexp, 32),
}
"""Name -> the recurrence and the chunk length in which it is used."""


def algorithm_named(op: str, name: str, algorithms: Mapping[str, Named]) -> Named:
    """The algorithm of an op that has this name.

    Raises:
        ValueError: for a name that none of them has, with those that there are.
    """
    if name not in algorithms:
        known = ", ".join(map(repr, algorithms))
        raise ValueError(f"{op}: unknown algorithm {name!r}; expected one of {known}")
    return algorithms[name]


def choose(impl: str, automatic: str, available: Mapping[str, str]) -> str:
    """The implementation to run.

    Args:
        impl: a name, or ``"auto"``.
        automatic: what ``"auto"`` stands for here.
        available: name -> "" when it runs here, else the reason why it does not.

    Raises:
        ValueError: for an unknown name, and for one that cannot run here, with the reason.
    """
    if impl == "auto":
        return automatic
    if impl not in available:
        raise ValueError(f"unknown scan implementation {impl!r}; expected 'auto' or one of: {', '.join(available)}")
    if available[impl]:
        raise ValueError(f"scan implementation {impl!r} cannot run here: {available[impl]}")
    return impl
