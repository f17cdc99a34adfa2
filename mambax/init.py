"""Initial weights, drawn in NumPy: one seed gives the same weights on every backend.

The scheme is the official package's (``Mamba.__init__`` and ``_init_weights`` of mamba_ssm): linear weights
uniform in ``± fan_in^-1/2``, embeddings N(0, 0.02), S4D-real A, D of ones, time steps log-uniform through the
inverse softplus, ``out_proj`` divided by ``sqrt(n_layer)``.

Dimensions: D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mambax.config import MambaConfig


@dataclass(frozen=True)
class Placeholder:
    """The shape of a parameter whose values arrive later, from a checkpoint. Takes no memory."""

    shape: tuple[int, ...]


Initial = np.ndarray | Placeholder
"""What a layer is built from: float32 values, or the promise of some."""


def check_seed(seed: Any) -> None:
    """Refuse what is neither a whole number from 0 nor None.

    Raises:
        ValueError: naming the seed.
    """
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if seed is not None and not (whole and seed >= 0):
        raise ValueError(f"seed is {seed!r}; expected a whole number from 0, or None")


class Initializer:
    """Draws initial weights, in the order in which the layers are built.

    Args:
        seed: the seed, or None to draw nothing and hand out :class:`Placeholder` shapes (used by the loader).

    Raises:
        ValueError: for a seed that is not a whole number from 0.
    """

    def __init__(self, seed: int | None = 0) -> None:
        check_seed(seed)
        self._rng = None if seed is None else np.random.default_rng(seed)

    def uniform(self, shape: tuple[int, ...], bound: float) -> Initial:
        """float32 values of ``shape``, uniform in ``[-bound, bound)``."""
        if self._rng is None:
            return Placeholder(shape)
        return self._rng.random(shape, dtype=np.float32) * np.float32(2 * bound) - np.float32(bound)

    def normal(self, shape: tuple[int, ...], std: float) -> Initial:
        """float32 values of ``shape`` from N(0, std²)."""
        if self._rng is None:
            return Placeholder(shape)
        return self._rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def full(self, shape: tuple[int, ...], value: float) -> Initial:
        """float32 values of ``shape``, all equal to ``value``."""
        return Placeholder(shape) if self._rng is None else np.full(shape, value, np.float32)

    def linear(self, out_features: int, in_features: int) -> Initial:
        """(out_features, in_features), the default of ``torch.nn.Linear``."""
        return self.uniform((out_features, in_features), in_features**-0.5)

    def conv_weight(self, config: MambaConfig) -> Initial:
        """(D, 1, K), the default of a depthwise ``torch.nn.Conv1d``."""
        return self.uniform((config.d_inner, 1, config.d_conv), config.d_conv**-0.5)

    def conv_bias(self, config: MambaConfig) -> Initial:
        """(D,), the default of a depthwise ``torch.nn.Conv1d``."""
        return self.uniform((config.d_inner,), config.d_conv**-0.5)

    def A_log(self, config: MambaConfig) -> Initial:
        """(D, N): ``log(1..N)`` in every channel, the S4D-real initialisation."""
        shape = (config.d_inner, config.d_state)
        if self._rng is None:
            return Placeholder(shape)
        row = np.log(np.arange(1, config.d_state + 1, dtype=np.float64)).astype(np.float32)
        return np.tile(row, (config.d_inner, 1))

    def dt_weight(self, config: MambaConfig) -> Initial:
        """(D, R): uniform in, or constantly, ``R^-1/2 * dt_scale``."""
        rank = int(config.dt_rank)
        bound = rank**-0.5 * config.dt_scale
        shape = (config.d_inner, rank)
        return self.full(shape, bound) if config.dt_init == "constant" else self.uniform(shape, bound)

    def A_log_of_heads(self, heads: int) -> Initial:
        """(heads,): the logarithm of values uniform in [1, 16), as the official Mamba-2 has it."""
        if self._rng is None:
            return Placeholder((heads,))
        return np.log(self._rng.uniform(1, 16, heads)).astype(np.float32)

    def dt_bias(self, config: MambaConfig, count: int) -> Initial:
        """(count,): such that ``softplus(bias)`` is log-uniform in [dt_min, dt_max], not below the floor."""
        if self._rng is None:
            return Placeholder((count,))
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = np.exp(low + (high - low) * self._rng.random(count))
        dt = np.maximum(dt, config.dt_init_floor)
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)

    def out_proj(self, config: MambaConfig, d_inner: int) -> Initial:
        """(d_model, d_inner): the default of a linear layer, divided by ``sqrt(n_layer)`` if so configured."""
        bound = d_inner**-0.5
        if config.rescale_prenorm_residual:
            bound /= math.sqrt(config.n_layer)
        return self.uniform((config.d_model, d_inner), bound)
