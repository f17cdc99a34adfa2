"""The sizes of the mixers other than Mamba-1's: one frozen dataclass each, validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

from mambax.fields import check_bool, check_choice, check_float, check_int, check_options, fail

_LARGEST = 1e6
"""Of the factors, either sign."""


def _is_multiplier(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and -_LARGEST <= float(value) <= _LARGEST


def _check_multipliers(options: object, *names: str) -> None:
    for field in names:
        check_float(options, field, -_LARGEST, _LARGEST)


@dataclass(frozen=True, kw_only=True)
class Mamba2Options:
    """The sizes of a model's Mamba-2 mixers: ``layer_types`` ``"mamba2"``, ``"bimamba2"`` and ``"parallel"``.

    Args:
        n_heads: H, number of heads.
        head_dim: P, channels of a head; ``d_inner`` is ``n_heads * head_dim``.
        d_state: N, the size of the state of each channel.
        n_groups: G, groups of heads that share B and C and, in the gated norm, a mean square; divides n_heads.
        d_conv: K, the width of the causal convolution.
        dt_limit: smallest and largest time step.
        use_bias: a bias in ``in_proj``, and in ``out_proj`` where ``use_out_bias`` is None.
        use_out_bias: a bias in ``out_proj``; as ``use_bias`` when None, by which it is replaced on construction.
        use_conv_bias: a bias in the convolution.
        norm_epsilon: added to the mean square in the gated norm.
        gated_norm: what is done with y and its gate z before ``out_proj``: ``"gate_first"`` for
            ``rms(y * silu(z))``, ``"norm_first"`` for ``rms(y) * silu(z)``, ``"none"`` for ``y * silu(z)``.
        part_multipliers: factors on the five parts of the output of ``in_proj``: z, x, B, C and dt.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: ``Mamba2.__init__`` of mamba_ssm; Dao and Gu 2024, section 7; ``FalconH1Mixer`` of transformers for the
    norms and the factors.
    """

    n_heads: int
    head_dim: int = 64
    d_state: int = 128
    n_groups: int = 1
    d_conv: int = 4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    use_bias: bool = False
    use_out_bias: bool | None = None
    use_conv_bias: bool = True
    norm_epsilon: float = 1e-5
    gated_norm: Literal["gate_first", "norm_first", "none"] = "gate_first"
    part_multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)

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
        if self.use_out_bias is None:
            object.__setattr__(self, "use_out_bias", self.use_bias)
        check_bool(self, "use_bias", "use_out_bias", "use_conv_bias")
        check_float(self, "norm_epsilon", 0, 1)
        check_choice(self, "gated_norm", ("gate_first", "norm_first", "none"))
        parts: Any = self.part_multipliers
        if not isinstance(parts, (tuple, list)) or len(parts) != 5 or not all(map(_is_multiplier, parts)):
            fail(self, "part_multipliers", parts, "five numbers from -1e+06 to 1e+06")
        object.__setattr__(self, "part_multipliers", tuple(map(float, parts)))

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
    """The sizes of a model's attention: ``layer_types`` ``"attention"``, ``"mha"``, ``"parallel"``; shared blocks.

    Args:
        n_heads: heads of the queries.
        head_dim: channels of a head.
        n_kv_heads: heads of the keys and values, each shared by ``n_heads / n_kv_heads`` heads of queries.
        use_bias: biases in ``q_proj``, ``k_proj`` and ``v_proj``, or in the ``in_proj`` of ``"mha"``, and after
            attention where ``use_out_bias`` is None.
        use_out_bias: a bias in ``o_proj`` or ``out_proj``; as ``use_bias`` when None, by which it is replaced on
            construction.
        rope_theta: base of rotary position embeddings; None for no positions at all.
        rope_dim: channels of a head that turn, the first ones; all when None.
        scale: factor on the products of queries and keys; ``head_dim ** -0.5`` when None.
        d_conv: K, the width of a causal convolution of queries, keys and values, in ``"mha"`` alone; 0 for none.
        key_multiplier: factor on the keys.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries); Su et al. 2021 (rotary embeddings).
    """

    n_heads: int
    head_dim: int
    n_kv_heads: int
    use_bias: bool = False
    use_out_bias: bool | None = None
    rope_theta: float | None = None
    rope_dim: int | None = None
    scale: float | None = None
    d_conv: int = 0
    key_multiplier: float = 1.0

    def __post_init__(self) -> None:
        check_int(self, "n_heads", 1, 2**16)
        check_int(self, "head_dim", 1, 2**16)
        check_int(self, "n_kv_heads", 1, self.n_heads)
        if self.n_heads % self.n_kv_heads:
            fail(self, "n_kv_heads", self.n_kv_heads, f"a divisor of n_heads ({self.n_heads})")
        if self.use_out_bias is None:
            object.__setattr__(self, "use_out_bias", self.use_bias)
        check_bool(self, "use_bias", "use_out_bias")
        if self.rope_theta is not None:
            check_float(self, "rope_theta", 1, 1e12)
        if self.rope_dim is None:
            object.__setattr__(self, "rope_dim", self.head_dim if self.rope_theta is not None else 0)
        check_int(self, "rope_dim", 0, self.head_dim)
        if int(self.rope_dim or 0) % 2:
            fail(self, "rope_dim", self.rope_dim, "an even number")
        if self.scale is not None:
            check_float(self, "scale", 0, 1e6)
        check_int(self, "d_conv", 0, 64)
        _check_multipliers(self, "key_multiplier")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """The factors of a model's parallel mixers, those of ``layer_types`` ``"parallel"``.

    Args:
        ssm_in_multiplier, attention_in_multiplier: on what the state-space mixer and attention are given.
        ssm_out_multiplier, attention_out_multiplier: on what they give, before the two are added.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: ``FalconH1DecoderLayer`` of transformers.
    """

    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0

    def __post_init__(self) -> None:
        _check_multipliers(self, *(field.name for field in fields(self)))


@dataclass(frozen=True, kw_only=True)
class SigmoidMoEOptions:
    """How a ``"sigmoid_moe"`` block rates and builds its experts; how many there are is in :class:`MLPOptions`.

    Args:
        d_expert: width of an expert between its two products.
        d_latent: width to which its input is projected first, and its output from it; 0 for neither.
        n_groups: equal groups of experts; a token chooses within the ``n_groups_per_token`` best of them.
        n_groups_per_token: how many; all of them when it is n_groups.
        normalised: whether the ratings of a token are divided by their sum.
        scale: factor on the ratings.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: ``NemotronHMoE`` of transformers.
    """

    d_expert: int
    d_latent: int = 0
    n_groups: int = 1
    n_groups_per_token: int = 1
    normalised: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_int(self, "d_expert", 1, 2**24)
        check_int(self, "d_latent", 0, 2**17)
        check_int(self, "n_groups", 1, 2**16)
        check_int(self, "n_groups_per_token", 1, self.n_groups)
        check_bool(self, "normalised")
        check_float(self, "scale", 0, _LARGEST)


@dataclass(frozen=True, kw_only=True)
class MLPOptions:
    """The sizes of a model's MLPs and experts: ``layer_types`` ``"mlp"``, ``"moe"`` and the others of their like.

    ``"gated_mlp"`` and ``"shared_moe"`` know SiLU with a gate, without biases and factors, alone.

    Args:
        d_intermediate: width between the two products.
        activation: ``"silu"``, ``"gelu"`` (exact) or ``"relu2"`` (the square of ``relu``).
        gated: whether a second product, put through the activation, gates the first (Shazeer 2020).
        use_bias: biases in the products.
        gate_multiplier: factor on the gate, before its activation.
        out_multiplier: factor on what the block gives.
        d_shared: width of the MLP that every position goes through in a ``"shared_moe"`` or ``"sigmoid_moe"``
            block; 0 where there is none.
        n_experts: experts of a block that has some; 0 where there are none.
        n_experts_per_token: how many of them each token goes through.
        sigmoid_moe: more about ``"sigmoid_moe"`` blocks; None where there are none.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    d_intermediate: int
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    gate_multiplier: float = 1.0
    out_multiplier: float = 1.0
    d_shared: int = 0
    n_experts: int = 0
    n_experts_per_token: int = 0
    sigmoid_moe: SigmoidMoEOptions | None = None

    def __post_init__(self) -> None:
        check_int(self, "d_intermediate", 1, 2**24)
        check_choice(self, "activation", ("silu", "gelu", "relu2"))
        check_bool(self, "gated", "use_bias")
        _check_multipliers(self, "gate_multiplier", "out_multiplier")
        check_int(self, "d_shared", 0, 2**24)
        check_int(self, "n_experts", 0, 2**16)
        check_int(self, "n_experts_per_token", 1 if self.n_experts else 0, self.n_experts)
        check_options(self, "sigmoid_moe", SigmoidMoEOptions)
        if self.sigmoid_moe is not None:
            self._check_groups(self.sigmoid_moe.n_groups, self.sigmoid_moe.n_groups_per_token)

    def _check_groups(self, groups: int, chosen: int) -> None:
        size = self.n_experts // groups
        if self.n_experts % groups or (groups > 1 and size < 2) or self.n_experts_per_token > chosen * size:
            fail(
                self, "sigmoid_moe", self.sigmoid_moe,
                f"groups of two experts or more that divide n_experts ({self.n_experts}), and at least "
                f"n_experts_per_token ({self.n_experts_per_token}) in those chosen",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """Where the blocks are used that have one set of weights for several places; see :mod:`mambax.shared_blocks`.

    Args:
        places: numbers of the blocks before which one is used, in ascending order.
        n_blocks: how many there are, used in turn: the first at the first place, and so on.
        adapter_rank: of the adapters that each use adds to the first product of the MLP; 0 for none.
        adapts_attention: whether it adds such to the queries, keys and values too.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: Glorioso et al. 2024, "The Zamba2 suite".
    """

    places: tuple[int, ...]
    n_blocks: int = 1
    adapter_rank: int = 0
    adapts_attention: bool = False

    def __post_init__(self) -> None:
        given: Any = self.places
        places = tuple(given) if isinstance(given, (tuple, list)) else ()
        whole = all(type(place) is int and place >= 0 for place in places)
        if not places or not whole or list(places) != sorted(set(places)):
            fail(self, "places", given, "numbers of blocks, in ascending order")
        object.__setattr__(self, "places", places)
        check_int(self, "n_blocks", 1, len(places))
        check_int(self, "adapter_rank", 0, 2**16)
        check_bool(self, "adapts_attention")
        if self.adapts_attention and not self.adapter_rank:
            fail(self, "adapter_rank", 0, "at least 1 where attention has adapters")
