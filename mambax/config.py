"""Model configurations: frozen dataclasses, validated on construction.

The field names are those of the Mamba paper and its official package (``d_model``, ``n_layer``, ...). How
they are spelled in a ``config.json`` is known to :mod:`mambax.families` alone.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mambax.fields import check_bool, check_choice, check_float, check_int, check_options, fail
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions, ParallelOptions, SharedOptions

Pooling = Literal["last", "mean", "state"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "state")
SELECTIVE = frozenset({"mamba", "bimamba", "bimamba_tied"})
"""The kinds of mixers that have the selective scan of Mamba-1."""


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
            when None. ``"bimamba"`` and ``"bimamba2"`` read whole sequences, in both directions, and with
            ``"_tied"`` after their names they share the projections of the two.
        mamba2, attention, mlp: the sizes of the blocks of kind ``"mamba2"``, of ``"attention"`` or ``"mha"``, and
            of ``"mlp"``, ``"gated_mlp"``, ``"moe"``, ``"shared_moe"`` or ``"sigmoid_moe"``; None where there are
            none.
        parallel: the factors in blocks of kind ``"parallel"``, which have the sizes of ``mamba2`` and
            ``attention``; all 1 when None.
        shared: where blocks of attention and an MLP are used that have one set of weights for several places, of
            the sizes of ``attention`` and ``mlp``; None where there are none.
        residual_multiplier: factor on what each block adds to the residual stream.
        family: the family of checkpoints as which the model is written, a name of :data:`mambax.families.FAMILIES`;
            when None, ``"mamba"`` for a model that Mamba-1 checkpoints can describe, else ``"mambax"``.
        scan: name of the implementation of the selective scan, and of ``ssd`` in mixers of Mamba-2, or ``"auto"``;
            not a property of the weights, so it is not saved with them.

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
    attention: AttentionOptions | None = None
    mlp: MLPOptions | None = None
    parallel: ParallelOptions | None = None
    shared: SharedOptions | None = None
    residual_multiplier: float = 1.0
    family: str | None = None
    scan: str = "auto"

    def __post_init__(self) -> None:
        check_int(self, "d_model", 1, 2**17)
        check_int(self, "n_layer", 1, 4096)
        check_int(self, "d_state", 1, 4096)
        check_int(self, "d_conv", 1, 64)
        check_float(self, "expand", 1 / self.d_model, 64)
        inner = self.expand * self.d_model
        if abs(inner - round(inner)) > 1e-6:
            fail(self, "expand", self.expand, f"a number that times d_model ({self.d_model}) is whole")
        if self.dt_rank == "auto":
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        if isinstance(self.dt_rank, str):
            fail(self, "dt_rank", self.dt_rank, f"'auto' or a whole number from 1 to {self.d_inner}")
        check_int(self, "dt_rank", 1, self.d_inner)
        check_bool(self, "use_bias", "use_conv_bias", "residual_in_fp32", "rescale_prenorm_residual")
        check_float(self, "norm_epsilon", 0, 1)
        check_float(self, "dt_min", 1e-12, 1e3)
        check_float(self, "dt_max", self.dt_min, 1e3)
        check_float(self, "dt_scale", 0, 1e6)
        check_float(self, "dt_init_floor", 0, 1e3)
        check_choice(self, "dt_init", ("random", "constant"))
        check_choice(self, "dt_b_c_norm", ("none", "weightless", "learned"))
        check_float(self, "dt_b_c_norm_epsilon", 0, 1)
        check_options(self, "mamba2", Mamba2Options)
        check_options(self, "attention", AttentionOptions)
        check_options(self, "mlp", MLPOptions)
        check_options(self, "parallel", ParallelOptions)
        check_options(self, "shared", SharedOptions)
        if self.shared is not None and self.shared.places[-1] >= self.n_layer:
            fail(self, "shared.places", self.shared.places, f"numbers of blocks below n_layer ({self.n_layer})")
        check_float(self, "residual_multiplier", -1e6, 1e6)
        self._check_layer_types()
        if self.family is None:
            plain = set(self.layer_kinds) == {"mamba"} and self.dt_b_c_norm == "none" and self.unscaled
            object.__setattr__(self, "family", "mamba" if plain and self.shared is None else "mambax")
        if not isinstance(self.family, str):
            fail(self, "family", self.family, "the name of a family of checkpoints, or None")
        if not isinstance(self.scan, str):
            fail(self, "scan", self.scan, "the name of a scan implementation, or 'auto'")

    def _check_layer_types(self) -> None:
        if self.layer_types is None:
            return
        kinds = self.layer_types if isinstance(self.layer_types, (tuple, list)) else ()
        if len(kinds) != self.n_layer or not all(isinstance(kind, str) for kind in kinds):
            fail(self, "layer_types", self.layer_types, f"n_layer ({self.n_layer}) names of mixers, or None")
        object.__setattr__(self, "layer_types", tuple(kinds))

    @property
    def unscaled(self) -> bool:
        """Whether no factor is on the residual stream or at the ends of the model."""
        return self.residual_multiplier == 1

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of mixer of each block, n_layer of them."""
        return ("mamba",) * self.n_layer if self.layer_types is None else self.layer_types

    @property
    def causal(self) -> bool:
        """Whether what the model says of a position depends on no later one."""
        return not any(kind.startswith("bi") for kind in self.layer_kinds)

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
        embedding_multiplier: factor on the embeddings.
        logits_multiplier: factor on the logits.
        bos_token_id, pad_token_id: token ids, or None.
        eos_token_id: the token id that ends a text, or several of them, or None.
    """

    vocab_size: int
    tie_embeddings: bool = True
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_float(self, "embedding_multiplier", -1e6, 1e6)
        check_float(self, "logits_multiplier", -1e6, 1e6)
        super().__post_init__()
        check_int(self, "vocab_size", 1, 2**24)
        check_bool(self, "tie_embeddings")
        for field in ("bos_token_id", "pad_token_id"):
            if getattr(self, field) is not None:
                check_int(self, field, 0, self.vocab_size - 1)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for token in self.eos_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                fail(self, "eos_token_id", token, f"token ids from 0 to {self.vocab_size - 1}, or None")

    @property
    def unscaled(self) -> bool:
        """Whether no factor is on the residual stream or at the ends of the model."""
        return super().unscaled and self.embedding_multiplier == self.logits_multiplier == 1

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
        check_int(self, "num_labels", 1, 2**24)
        check_choice(self, "pooling", POOLINGS)
