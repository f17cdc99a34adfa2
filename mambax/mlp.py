"""MLPs and mixtures of experts beside the state-space mixers of a hybrid model. They keep no state.

Dimensions: B batch, L length, M d_model, I d_intermediate, E experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mambax.backend import Array, Backend, Ops
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import NoState
from mambax.options import MLPOptions
from mambax.scan import at_least_float32


def _options(config: MambaConfig, kind: str) -> MLPOptions:
    if config.mlp is None:
        raise ValueError(f"layer_types has {kind!r}, but mlp is None; expected its options")
    return config.mlp


def softmax(nn: Ops, x: Array) -> Array:
    """Softmax over the last axis."""
    e = nn.exp(x - nn.max(x, axis=-1)[..., None])
    return e / nn.sum(e, axis=-1)[..., None]


def _chosen(nn: Ops, logits: Array, count: int) -> Array:
    """1 at the ``count`` largest of the last axis, equal ones by their number, and 0 elsewhere; dtype of logits."""
    order = nn.argsort(nn.argsort(-nn.stop_gradient(logits), axis=-1), axis=-1)
    return nn.astype(order < count, logits.dtype)


class MLPMixer:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate: each position by itself.

    Args:
        config: the model's configuration; its ``mlp`` has this block's sizes.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: Shazeer 2020 for the gated form.
    """

    nn: ClassVar[Backend]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        self.options = options = _options(config, "mlp")
        M, width = config.d_model, options.d_intermediate

        def linear(n_out: int, n_in: int) -> Any:
            return nn.Linear(init.linear(n_out, n_in), init.full((n_out,), 0.0) if options.use_bias else None)

        if options.gated:
            self.gate_proj = linear(width, M)
        self.up_proj = linear(width, M)
        bias = init.full((M,), 0.0) if options.use_bias else None
        self.down_proj = nn.Linear(init.out_proj(config, width), bias)

    def forward(
        self,
        hidden: Array,
        state: NoState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, NoState]:
        """(B, L, M) to (B, L, M); what is padding or packed makes no difference here."""
        if self.options.gated:
            return self.down_proj(self._activated(self.gate_proj(hidden)) * self.up_proj(hidden)), NoState()
        return self.down_proj(self._activated(self.up_proj(hidden))), NoState()

    def _activated(self, x: Array) -> Array:
        if self.options.activation == "silu":
            return self.nn.silu(x)
        positive = self.nn.maximum(x, 0.0)
        return positive * positive

    def init_state(self, batch: int) -> NoState:
        """Nothing is remembered."""
        return NoState()


class MoEMixer:
    """A mixture of gated MLPs: each position through the ``n_experts_per_token`` that its router rates best.

    The ratings are the softmax over all experts, not normalised over those chosen. Every expert computes every
    position, and the ratings of those not chosen are zero.

    Args:
        config: the model's configuration; its ``mlp`` has the sizes of this block and of its experts.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: Shazeer et al. 2017; ``JambaSparseMoeBlock`` of transformers.
    """

    nn: ClassVar[Backend]
    expert_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        self.options = options = _options(config, "moe")
        if options.n_experts < 1:
            raise ValueError("layer_types has 'moe', but mlp.n_experts is 0; expected how many experts")
        self.router = nn.Linear(init.linear(options.n_experts, config.d_model), None)
        self.experts = nn.ModuleList(
            [self.expert_cls(config, layer_idx, init=init) for _ in range(options.n_experts)]
        )

    def forward(
        self,
        hidden: Array,
        state: NoState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, NoState]:
        """(B, L, M) to (B, L, M)."""
        logits = at_least_float32(self.nn, self.router(hidden))  # (B, L, E)
        ratings = softmax(self.nn, logits) * _chosen(self.nn, logits, self.options.n_experts_per_token)
        ratings = self.nn.astype(ratings, hidden.dtype)
        total = None
        for number, expert in enumerate(self.experts):
            part = expert(hidden)[0] * ratings[..., number : number + 1]
            total = part if total is None else total + part
        return total, NoState()

    def init_state(self, batch: int) -> NoState:
        """Nothing is remembered."""
        return NoState()


class FusedMLP:
    """``output(silu(a) * b)`` with a and b the halves of one product, as Granite names and lays them out.

    Args:
        d_model: M.
        width: of a and of b.
        init: where initial weights come from.
    """

    nn: ClassVar[Backend]

    def __init__(self, d_model: int, width: int, init: Initializer) -> None:
        super().__init__()
        self.input_linear = self.nn.Linear(init.linear(2 * width, d_model), None)
        self.output_linear = self.nn.Linear(init.linear(d_model, width), None)

    def forward(self, hidden: Array) -> Array:
        """(B, L, M) to (B, L, M)."""
        return self.output_linear(_gated(self.nn, self.input_linear(hidden)))


def _gated(nn: Ops, x: Array) -> Array:
    width = x.shape[-1] // 2
    return nn.silu(x[..., :width]) * x[..., width:]


class ExpertWeights:
    """The weights (E, out, in) of one linear layer of all experts."""

    nn: ClassVar[Backend]

    def __init__(self, experts: int, n_out: int, n_in: int, init: Initializer) -> None:
        super().__init__()
        self.weight = self.nn.Parameter(init.uniform((experts, n_out, n_in), n_in**-0.5))

    def forward(self, x: Array) -> Array:
        """(B, E or 1, L, in) to (B, E, L, out)."""
        return x @ self.weight.swapaxes(-1, -2)


class FusedExperts:
    """A mixture of gated MLPs whose ratings are the softmax over the experts chosen. Every expert computes every
    position, and the ratings of those not chosen are zero.

    Args:
        config: the model's configuration.
        init: where initial weights come from.

    Source: ``GraniteMoeHybridMoE`` of transformers.
    """

    nn: ClassVar[Backend]
    weights_cls: ClassVar[Any]
    router_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, init: Initializer) -> None:
        super().__init__()
        self.options = options = _options(config, "shared_moe")
        E, M, width = options.n_experts, config.d_model, options.d_intermediate
        self.input_linear = self.weights_cls(E, 2 * width, M, init)
        self.output_linear = self.weights_cls(E, M, width, init)
        self.router = self.router_cls(E, M, init)

    def forward(self, hidden: Array) -> Array:
        """(B, L, M) to (B, L, M)."""
        nn = self.nn
        logits = at_least_float32(nn, self.router(hidden))  # (B, L, E)
        chosen = nn.astype(_chosen(nn, logits, self.options.n_experts_per_token), nn.bool_)
        ratings = nn.astype(softmax(nn, nn.where(chosen, logits, -float("inf"))), hidden.dtype)
        parts = self.output_linear(_gated(nn, self.input_linear(hidden[:, None])))  # (B, E, L, M)
        return nn.sum(parts * ratings.swapaxes(1, 2)[..., None], axis=1)


class Router:
    """The linear layer that rates experts, one level down as Granite names it."""

    nn: ClassVar[Backend]

    def __init__(self, experts: int, d_model: int, init: Initializer) -> None:
        super().__init__()
        self.layer = self.nn.Linear(init.linear(experts, d_model), None)

    def forward(self, hidden: Array) -> Array:
        """(B, L, M) to (B, L, E)."""
        return self.layer(hidden)


class SharedMoEMixer:
    """An MLP that every position goes through and, where there are experts, a mixture of them beside it.

    Args:
        config: the model's configuration; its ``mlp`` has the sizes, ``d_shared`` that of the MLP of all positions.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: ``GraniteMoeHybridDecoderLayer`` of transformers.
    """

    nn: ClassVar[Backend]
    mlp_cls: ClassVar[Any]
    experts_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        init = init or Initializer()
        options = _options(config, "shared_moe")
        if options.d_shared < 1:
            raise ValueError("layer_types has 'shared_moe', but mlp.d_shared is 0; expected the width of its MLP")
        self.shared_mlp = self.mlp_cls(config.d_model, options.d_shared, init)
        self.block_sparse_moe = self.experts_cls(config, init) if options.n_experts else None

    def forward(
        self,
        hidden: Array,
        state: NoState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, NoState]:
        """(B, L, M) to (B, L, M); what is padding or packed makes no difference here."""
        shared = self.shared_mlp(hidden)
        return (shared if self.block_sparse_moe is None else self.block_sparse_moe(hidden) + shared), NoState()

    def init_state(self, batch: int) -> NoState:
        """Nothing is remembered."""
        return NoState()
