"""Mamba-1 as a float64 recurrence in plain NumPy: one row, one token, one layer at a time.

Written from the paper (Gu and Dao 2023, section 3) and docs on the file format alone; it shares no line with
mambax. It is slow, has no batching and no chunks, and keeps a sequence's past as lists: what it computes can
be read off the page. Weights are a dict under Hugging Face's names, and every size is read off their shapes.

Dimensions: B batch, L length, D d_inner, M d_model, N d_state, K d_conv, R dt_rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Weights = dict[str, np.ndarray]


@dataclass
class RowState:
    """What one row remembers: for each layer the past inputs of the convolution, (K-1, D), and h, (D, N)."""

    past: list[np.ndarray]
    h: list[np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def scan(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, initial_state=None, mask=None
):
    """The selective scan with its epilogue, signature as of the seam; outputs at masked positions are NaN."""
    batch, length, channels = u.shape
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    y = np.full(u.shape, np.nan)
    final = np.full((batch, channels, A.shape[1]), np.nan)
    for row in range(batch):
        h = np.zeros(A.shape) if initial_state is None else np.asarray(initial_state[row], np.float64)
        for t in range(length):
            if mask is not None and not mask[row, t]:
                continue
            dt = delta[row, t] if delta_bias is None else delta[row, t] + np.asarray(delta_bias, np.float64)
            dt = softplus(dt) if delta_softplus else dt
            h = np.exp(dt[:, None] * A) * h + (dt * u[row, t])[:, None] * B[row, t][None, :]
            out = h @ C[row, t]
            if D is not None:
                out = out + np.asarray(D, np.float64) * u[row, t]
            y[row, t] = out if z is None else out * silu(np.asarray(z[row, t], np.float64))
        final[row] = h
    return y, final


def convolution(x, weight, bias=None, *, initial_state=None, mask=None, activation="silu"):
    """The causal convolution, signature as of the seam; outputs at masked positions are NaN."""
    batch, length, channels = x.shape
    taps = np.asarray(weight, np.float64)[:, 0]  # (D, K)
    past = taps.shape[1] - 1
    y = np.full(x.shape, np.nan)
    final = np.full((batch, past, channels), np.nan)
    first = np.zeros((batch, past, channels)) if initial_state is None else np.asarray(initial_state, np.float64)
    for row in range(batch):
        seen = list(first[row])
        for t in range(length):
            if mask is not None and not mask[row, t]:
                continue
            seen.append(np.asarray(x[row, t], np.float64))
            out = np.zeros(channels) if bias is None else np.asarray(bias, np.float64)
            for k in range(past + 1):
                out = out + taps[:, k] * seen[len(seen) - 1 - past + k]
            y[row, t] = silu(out) if activation == "silu" else out
        for k in range(past):
            final[row, k] = seen[len(seen) - past + k]
    return y, final


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).sum() / x.size + eps) * weight


def mixer_step(weights: Weights, prefix: str, x: np.ndarray, past: np.ndarray, h: np.ndarray):
    """One token, (M,), through one mixer -> (M,), the next past (K-1, D), the next h (D, N)."""
    zero = np.zeros(1)
    A = -np.exp(weights[prefix + "A_log"])
    channels, n = A.shape
    rank = weights[prefix + "dt_proj.weight"].shape[1]
    xz = weights[prefix + "in_proj.weight"] @ x + weights.get(prefix + "in_proj.bias", zero)
    x, z = xz[:channels], xz[channels:]
    window = np.concatenate([past, x[None]])  # (K, D)
    taps = weights[prefix + "conv1d.weight"][:, 0]  # (D, K)
    x = silu((window.T * taps).sum(1) + weights.get(prefix + "conv1d.bias", zero))
    dbc = weights[prefix + "x_proj.weight"] @ x
    dt, B, C = dbc[:rank], dbc[rank : rank + n], dbc[rank + n :]
    dt = softplus(weights[prefix + "dt_proj.weight"] @ dt + weights[prefix + "dt_proj.bias"])
    h = np.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B
    y = (h @ C + weights[prefix + "D"] * x) * silu(z)
    return weights[prefix + "out_proj.weight"] @ y + weights.get(prefix + "out_proj.bias", zero), window[1:], h


def layer_count(weights: Weights) -> int:
    return sum(name.endswith("mixer.A_log") for name in weights)


def start(weights: Weights) -> RowState:
    """The state of a row before its first token."""
    past, h = [], []
    for i in range(layer_count(weights)):
        prefix = f"backbone.layers.{i}.mixer."
        channels, _, width = weights[prefix + "conv1d.weight"].shape
        past.append(np.zeros((width - 1, channels)))
        h.append(np.zeros(weights[prefix + "A_log"].shape))
    return RowState(past, h)


def encode_row(weights: Weights, ids, state: RowState | None = None, eps: float = 1e-5):
    """Token ids (L,) of one row -> hidden states after the final norm (L, M), and the state after them."""
    state = state or start(weights)
    past, h = list(state.past), list(state.h)
    hidden = []
    for token in ids:
        x = weights["backbone.embeddings.weight"][token]
        for i in range(layer_count(weights)):
            prefix = f"backbone.layers.{i}."
            normed = rms_norm(x, weights[prefix + "norm.weight"], eps)
            mixed, past[i], h[i] = mixer_step(weights, prefix + "mixer.", normed, past[i], h[i])
            x = x + mixed
        hidden.append(rms_norm(x, weights["backbone.norm_f.weight"], eps))
    return np.array(hidden).reshape(len(ids), -1), RowState(past, h)


def logits_row(weights: Weights, ids, state: RowState | None = None, eps: float = 1e-5):
    """Token ids (L,) of one row -> logits (L, V), and the state after them."""
    hidden, state = encode_row(weights, ids, state, eps)
    return hidden @ weights.get("lm_head.weight", weights["backbone.embeddings.weight"]).T, state


def logits(weights: Weights, ids, eps: float = 1e-5) -> np.ndarray:
    """Token ids (B, L) -> logits (B, L, V)."""
    return np.stack([logits_row(weights, row, eps=eps)[0] for row in ids])


def random_weights(
    *,
    d_model: int,
    n_layer: int,
    vocab_size: int,
    d_inner: int,
    d_state: int = 16,
    d_conv: int = 4,
    dt_rank: int = 1,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    tie_embeddings: bool = True,
    seed: int = 0,
) -> Weights:
    """Weights under which every part of the model matters: nothing is zero or one, decays run from 0.1 to 0.99.

    Fresh initial weights would hide errors: their state hardly reaches the logits. float64 values that are
    exact in float32, so that rounding weights is no part of a comparison.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32).astype(np.float64)

    def around(center: float, size: int, scale: float) -> np.ndarray:
        return (center + normal(size, scale=scale)).astype(np.float32).astype(np.float64)

    weights = {"backbone.embeddings.weight": normal(vocab_size, d_model, scale=1.0)}
    for i in range(n_layer):
        prefix = f"backbone.layers.{i}."
        weights[prefix + "norm.weight"] = around(1, d_model, 0.2)
        prefix += "mixer."
        weights[prefix + "in_proj.weight"] = normal(2 * d_inner, d_model, scale=d_model**-0.5)
        weights[prefix + "conv1d.weight"] = normal(d_inner, 1, d_conv, scale=d_conv**-0.5)
        weights[prefix + "x_proj.weight"] = normal(dt_rank + 2 * d_state, d_inner, scale=1.5 * d_inner**-0.5)
        weights[prefix + "dt_proj.weight"] = normal(d_inner, dt_rank, scale=dt_rank**-0.5)
        weights[prefix + "dt_proj.bias"] = around(-2, d_inner, 1.0)
        weights[prefix + "A_log"] = normal(d_inner, d_state, scale=0.5)
        weights[prefix + "D"] = normal(d_inner, scale=1.0)
        weights[prefix + "out_proj.weight"] = normal(d_model, d_inner, scale=d_inner**-0.5)
        if use_conv_bias:
            weights[prefix + "conv1d.bias"] = normal(d_inner, scale=0.5)
        if use_bias:
            weights[prefix + "in_proj.bias"] = normal(2 * d_inner, scale=0.5)
            weights[prefix + "out_proj.bias"] = normal(d_model, scale=0.5)
    weights["backbone.norm_f.weight"] = around(1, d_model, 0.2)
    if not tie_embeddings:
        weights["lm_head.weight"] = normal(vocab_size, d_model, scale=d_model**-0.5)
    return weights
