"""Model configurations: frozen dataclasses, validated on construction.

The field names are those of the Mamba paper and its official package (``d_model``, ``n_layer``, ...). How
they are spelled in a ``config.json`` is known to :mod:`mambax.families` alone.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

Pooling = Literal["last", "mean", "state"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "state")


def _fail(config: object, field: str, value: object, allowed: str) -> None:
    raise ValueError(f"{type(config).__name__}.{field} is {value!r}; expected {allowed}")


def _check_int(config: object, field: str, low: int, high: int) -> None:
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        _fail(config, field, value, f"a whole number from {low} to {high}")
    object.__setattr__(config, field, int(value))  # a NumPy integer too, which JSON does not know


def _check_float(config: object, field: str, low: float, high: float) -> None:
    value = getattr(config, field)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= float(value) <= high:
        _fail(config, field, value, f"a number from {low:g} to {high:g}")
    if not isinstance(value, (int, float)):
        object.__setattr__(config, field, float(value))


def _check_bool(config: object, *fields: str) -> None:
    for field in fields:
        if not isinstance(getattr(config, field), bool):
            _fail(config, field, getattr(config, field), "True or False")


def _check_choice(config: object, field: str, choices: tuple[str, ...]) -> None:
    if getattr(config, field) not in choices:
        _fail(config, field, getattr(config, field), "one of " + ", ".join(map(repr, choices)))


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
        _check_int(self, "n_heads", 1, 2**20)
        _check_int(self, "head_dim", 1, 2**16)
        _check_int(self, "d_state", 1, 4096)
        _check_int(self, "n_groups", 1, self.n_heads)
        if self.n_heads % self.n_groups:
            _fail(self, "n_groups", self.n_groups, f"a divisor of n_heads ({self.n_heads})")
        _check_int(self, "d_conv", 1, 64)
        limit = self.dt_limit if isinstance(self.dt_limit, (tuple, list)) else ()
        numbers = all(isinstance(x, Real) and not isinstance(x, bool) for x in limit)
        if len(limit) != 2 or not numbers or not 0 <= limit[0] < limit[1]:
            _fail(self, "dt_limit", self.dt_limit, "two numbers from 0, the smaller first")
        object.__setattr__(self, "dt_limit", (float(limit[0]), float(limit[1])))
        _check_bool(self, "use_bias", "use_conv_bias")
        _check_float(self, "norm_epsilon", 0, 1)

    @property
    def d_inner(self) -> int:
        """Width of the state-space branch, ``n_heads * head_dim``."""
        return self.n_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state


def _check_options(config: object, field: str, options: type[Any]) -> None:
    """Make options of a plain dict, as a file has them."""
    value = getattr(config, field)
    if isinstance(value, dict):
        known = {item.name for item in dataclasses.fields(options)}
        if not value.keys() <= known:
            _fail(config, field, sorted(value.keys() - known), f"fields of {options.__name__}")
        object.__setattr__(config, field, options(**value))
    elif value is not None and not isinstance(value, options):
        _fail(config, field, value, f"{options.__name__} or None")


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """The core of a model: a stack of residual blocks, selective state-space ones at first, without a vocabulary.

    Args:
        d_model: width of the residual stream.
        n_layer: number of blocks.
        d_state: N, the size of the state of each channel.
        d_conv: K, the width of the causal convolution.
        expand: ``d_inner / d_model``; may be fractional as long as ``expand * d_model`` is whole.
        dt_rank: rank of the projection to delta; ``"auto"`` is ``ceil(d_model / 16)`` and is replaced by that
            number on construction.
        use_bias: biases in ``in_proj`` and ``out_proj``.
        use_conv_bias: a bias in the convolution.
        norm_epsilon: added to the mean square in RMSNorm.
        residual_in_fp32: keep the residual stream in float32 when the weights are narrower.
        dt_min, dt_max: range of the initial time steps, drawn log-uniformly.
        dt_init: ``"random"`` or ``"constant"`` initialisation of ``dt_proj.weight``.
        dt_scale: factor on the initial ``dt_proj.weight``.
        dt_init_floor: smallest initial time step.
        rescale_prenorm_residual: divide the initial ``out_proj.weight`` by ``sqrt(n_layer)``.
        dt_b_c_norm: an RMSNorm of each of the time step (in rank space), B and C: ``"none"``, ``"weightless"``
            (Falcon-Mamba) or ``"learned"``, with a weight each (Jamba).
        dt_b_c_norm_epsilon: added to the mean square in these.
        layer_types: the kind of mixer of each block, n_layer names of ``Block.mixers``; ``"mamba"`` everywhere
            when None.
        mamba2: the sizes of the blocks of kind ``"mamba2"``; None where there are none.
        family: the family of checkpoints as which the model is written, a name of :data:`mambax.families.FAMILIES`;
            when None, ``"mamba"`` for a model that Mamba-1 checkpoints can describe, else ``"mambax"``.
        scan: name of the selective-scan implementation, or ``"auto"``; not a property of the weights, so it is
            not saved with them.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Source: ``MambaConfig`` and ``Mamba.__init__`` of the official package; Gu and Dao 2023, section 3.
    """

    d_model: int
    n_layer: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | Literal["auto"] = "auto"
    use_bias: bool = False
    use_conv_bias: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    rescale_prenorm_residual: bool = True
    dt_b_c_norm: Literal["none", "weightless", "learned"] = "none"
    dt_b_c_norm_epsilon: float = 1e-6
    layer_types: tuple[str, ...] | None = None
    mamba2: Mamba2Options | None = None
    family: str | None = None
    scan: str = "auto"

    def __post_init__(self) -> None:
        _check_int(self, "d_model", 1, 2**17)
        _check_int(self, "n_layer", 1, 4096)
        _check_int(self, "d_state", 1, 4096)
        _check_int(self, "d_conv", 1, 64)
        _check_float(self, "expand", 1 / self.d_model, 64)
        inner = self.expand * self.d_model
        if abs(inner - round(inner)) > 1e-6:
            _fail(self, "expand", self.expand, f"a number that times d_model ({self.d_model}) is whole")
        if self.dt_rank == "auto":
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        if isinstance(self.dt_rank, str):
            _fail(self, "dt_rank", self.dt_rank, f"'auto' or a whole number from 1 to {self.d_inner}")
        _check_int(self, "dt_rank", 1, self.d_inner)
        _check_bool(self, "use_bias", "use_conv_bias", "residual_in_fp32", "rescale_prenorm_residual")
        _check_float(self, "norm_epsilon", 0, 1)
        _check_float(self, "dt_min", 1e-12, 1e3)
        _check_float(self, "dt_max", self.dt_min, 1e3)
        _check_float(self, "dt_scale", 0, 1e6)
        _check_float(self, "dt_init_floor", 0, 1e3)
        _check_choice(self, "dt_init", ("random", "constant"))
        _check_choice(self, "dt_b_c_norm", ("none", "weightless", "learned"))
        _check_float(self, "dt_b_c_norm_epsilon", 0, 1)
        _check_options(self, "mamba2", Mamba2Options)
        self._check_layer_types()
        if self.family is None:
            plain = set(self.layer_kinds) == {"mamba"} and self.dt_b_c_norm == "none"
            object.__setattr__(self, "family", "mamba" if plain else "mambax")
        if not isinstance(self.family, str):
            _fail(self, "family", self.family, "the name of a family of checkpoints, or None")
        if not isinstance(self.scan, str):
            _fail(self, "scan", self.scan, "the name of a scan implementation, or 'auto'")

    def _check_layer_types(self) -> None:
        if self.layer_types is None:
            return
        kinds = self.layer_types if isinstance(self.layer_types, (tuple, list)) else ()
        if len(kinds) != self.n_layer or not all(isinstance(kind, str) for kind in kinds):
            _fail(self, "layer_types", self.layer_types, f"n_layer ({self.n_layer}) names of mixers, or None")
        object.__setattr__(self, "layer_types", tuple(kinds))

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of mixer of each block, n_layer of them."""
        return ("mamba",) * self.n_layer if self.layer_types is None else self.layer_types

    @property
    def d_inner(self) -> int:
        """Width of the state-space branch, ``expand * d_model``."""
        return round(self.expand * self.d_model)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as plain values; ``type(config)(**config.to_dict()) == config``."""
        return dataclasses.asdict(self)


BaseMambaConfig = MambaConfig
"""Another name of the core configuration."""


@dataclass(frozen=True, kw_only=True)
class MambaLMConfig(MambaConfig):
    """A language model: the core, a table of ``vocab_size`` embeddings and a head.

    Args:
        vocab_size: rows of the embedding table and of the head, padding rows included.
        tie_embeddings: the head is the embedding table.
        bos_token_id, pad_token_id: token ids, or None.
        eos_token_id: the token id that ends a text, or several of them, or None.
    """

    vocab_size: int
    tie_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "vocab_size", 1, 2**24)
        _check_bool(self, "tie_embeddings")
        for field in ("bos_token_id", "pad_token_id"):
            if getattr(self, field) is not None:
                _check_int(self, field, 0, self.vocab_size - 1)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for token in self.eos_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                _fail(self, "eos_token_id", token, f"token ids from 0 to {self.vocab_size - 1}, or None")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """``eos_token_id`` as a tuple, empty when there is none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


@dataclass(frozen=True, kw_only=True)
class MambaClassificationConfig(MambaLMConfig):
    """A sequence classifier over tokens: the core, the embeddings, a pooling and a linear head.

    Args:
        num_labels: number of classes.
        pooling: what the head sees of a sequence. ``"last"``: the hidden state at the last real token;
            ``"mean"``: the mean over the real tokens; ``"state"``: the final state of the last block, flattened.
    """

    num_labels: int
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "num_labels", 1, 2**24)
        _check_choice(self, "pooling", POOLINGS)
