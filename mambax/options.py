"""The sizes of the mixers other than Mamba-1's: one frozen dataclass each, validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from mambax.fields import check_bool, check_choice, check_float, check_int, fail


@dataclass(frozen=True, kw_only=True)
class Mamba2Options:
    """The sizes of a model's Mamba-2 mixers, those of ``layer_types`` ``"mamba2"``.

    Args:
        n_heads: H, number of heads.
        head_dim: P, channels of a head; ``d_inner`` is ``n_heads * head_dim``.
        d_state: N, the size of the state of each channel.
        n_groups: G, groups of heads that share B and C and, in the gated norm, a mean square; divides n_heads.
        d_conv: K, the width of the causal convolution.
        dt_limit: smallest and largest time step.
        use_bias: biases in ``in_proj`` and ``out_proj``.
        use_conv_bias: a bias in the convolution.
        norm_epsilon: added to the mean square in the gated norm.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: ``Mamba2.__init__`` of mamba_ssm; Dao and Gu 2024, section 7.
    """

    n_heads: int
    head_dim: int = 64
    d_state: int = 128
    n_groups: int = 1
    d_conv: int = 4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    use_bias: bool = False
    use_conv_bias: bool = True
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_int(self, "n_heads", 1, 2**20)
        check_int(self, "head_dim", 1, 2**16)
        check_int(self, "d_state", 1, 4096)
        check_int(self, "n_groups", 1, self.n_heads)
        if self.n_heads % self.n_groups:
            fail(self, "n_groups", self.n_groups, f"a divisor of n_heads ({self.n_heads})")
        check_int(self, "d_conv", 1, 64)
        given: Any = self.dt_limit
        limit = list(given) if isinstance(given, (tuple, list)) else []
        numbers = all(isinstance(x, Real) and not isinstance(x, bool) for x in limit)
        if len(limit) != 2 or not numbers or not 0 <= limit[0] < limit[1]:
            fail(self, "dt_limit", self.dt_limit, "two numbers from 0, the smaller first")
        object.__setattr__(self, "dt_limit", (float(limit[0]), float(limit[1])))
        check_bool(self, "use_bias", "use_conv_bias")
        check_float(self, "norm_epsilon", 0, 1)

    @property
    def d_inner(self) -> int:
        """Width of the state-space branch, ``n_heads * head_dim``."""
        return self.n_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The sizes of a model's attention mixers, those of ``layer_types`` ``"attention"``.

    Args:
        n_heads: heads of the queries.
        head_dim: channels of a head.
        n_kv_heads: heads of the keys and values, each shared by ``n_heads / n_kv_heads`` heads of queries.
        use_bias: biases in ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
        rope_theta: base of rotary position embeddings; None for no positions at all.
        rope_dim: channels of a head that turn, the first ones; all when None.
        scale: factor on the products of queries and keys; ``head_dim ** -0.5`` when None.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries); Su et al. 2021 (rotary embeddings).
    """

    n_heads: int
    head_dim: int
    n_kv_heads: int
    use_bias: bool = False
    rope_theta: float | None = None
    rope_dim: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        check_int(self, "n_heads", 1, 2**16)
        check_int(self, "head_dim", 1, 2**16)
        check_int(self, "n_kv_heads", 1, self.n_heads)
        if self.n_heads % self.n_kv_heads:
            fail(self, "n_kv_heads", self.n_kv_heads, f"a divisor of n_heads ({self.n_heads})")
        check_bool(self, "use_bias")
        if self.rope_theta is not None:
            check_float(self, "rope_theta", 1, 1e12)
        if self.rope_dim is None:
            object.__setattr__(self, "rope_dim", self.head_dim if self.rope_theta is not None else 0)
        check_int(self, "rope_dim", 0, self.head_dim)
        if int(self.rope_dim or 0) % 2:
            fail(self, "rope_dim", self.rope_dim, "an even number")
        if self.scale is not None:
            check_float(self, "scale", 0, 1e6)


@dataclass(frozen=True, kw_only=True)
class MLPOptions:
    """The sizes of a model's MLPs, those of ``layer_types`` ``"mlp"`` and the experts of ``"moe"``.

    Args:
        d_intermediate: width between the two products.
        activation: ``"silu"`` or ``"relu2"`` (the square of ``relu``).
        gated: whether a second product, put through the activation, gates the first (Shazeer 2020).
        use_bias: biases in the products.
        d_shared: width of the MLP that every position goes through in a ``"shared_moe"`` block; 0 where there is
            none.
        n_experts: experts of a ``"moe"`` block; 0 where there are none.
        n_experts_per_token: how many of them each token goes through.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    d_intermediate: int
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    d_shared: int = 0
    n_experts: int = 0
    n_experts_per_token: int = 0

    def __post_init__(self) -> None:
        check_int(self, "d_intermediate", 1, 2**24)
        check_choice(self, "activation", ("silu", "relu2"))
        check_bool(self, "gated", "use_bias")
        check_int(self, "d_shared", 0, 2**24)
        check_int(self, "n_experts", 0, 2**16)
        check_int(self, "n_experts_per_token", 1 if self.n_experts else 0, self.n_experts)
