"""MLPs and mixtures of experts beside the state-space mixers of a hybrid model. They keep no state.

Dimensions: B batch, L length, M d_model, I d_intermediate, E experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mambax.backend import Array, Backend
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import NoState
from mambax.options import MLPOptions
from mambax.scan import at_least_float32


def _options(config: MambaConfig, kind: str) -> MLPOptions:
    if config.mlp is None:
        raise ValueError(f"layer_types has {kind!r}, but mlp is None; expected its options")
    return config.mlp


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
        nn, chosen = self.nn, self.options.n_experts_per_token
        logits = at_least_float32(nn, self.router(hidden))  # (B, L, E)
        ratings = nn.exp(logits - nn.max(logits, axis=-1)[..., None])
        ratings = ratings / nn.sum(ratings, axis=-1)[..., None]
        # the place of each expert in the order of its rating, equal ones by number
        order = nn.argsort(nn.argsort(-nn.stop_gradient(ratings), axis=-1), axis=-1)
        ratings = nn.astype(nn.where(order < chosen, ratings, 0.0), hidden.dtype)
        total = None
        for number, expert in enumerate(self.experts):
            part = expert(hidden)[0] * ratings[..., number : number + 1]
            total = part if total is None else total + part
        return total, NoState()

    def init_state(self, batch: int) -> NoState:
        """Nothing is remembered."""
        return NoState()
