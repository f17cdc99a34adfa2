"""A mixture of experts whose ratings are independent of each other, beside an MLP that every position goes through.

Dimensions: B batch, L length, M d_model, E experts, K experts of a token, G groups of experts, T = B L tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mambax.backend import Array, Backend
from mambax.config import MambaConfig
from mambax.experts import parts_of, top
from mambax.init import Initializer
from mambax.layer_states import NoState
from mambax.mlp import required_mlp
from mambax.options import MLPOptions, SigmoidMoEOptions
from mambax.scan import at_least_float32


class SigmoidRouter:
    """Rates experts by the sigmoid of a product, and chooses those whose rating plus a bias is largest.

    Args:
        options: the sizes.
        d_model: M.
        init: where initial weights come from. The bias begins as zeros; no gradient reaches it.

    Source: ``NemotronHTopkRouter`` of transformers; Wang et al. 2024, "Auxiliary-loss-free load balancing".
    """

    nn: ClassVar[Backend]

    def __init__(self, options: MLPOptions, d_model: int, init: Initializer) -> None:
        super().__init__()
        if options.sigmoid_moe is None:
            raise ValueError("layer_types has 'sigmoid_moe', but mlp.sigmoid_moe is None; expected its options")
        self.options: SigmoidMoEOptions = options.sigmoid_moe
        self.count = options.n_experts_per_token
        self.weight = self.nn.Parameter(init.linear(options.n_experts, d_model))  # (E, M)
        self.e_score_correction_bias = self.nn.Parameter(init.full((options.n_experts,), 0.0))  # (E,)

    def forward(self, x: Array) -> tuple[Array, Array]:
        """(T, M) to the numbers of the experts of each token (T, K) and their ratings (T, K) float32."""
        nn, options = self.nn, self.options
        logits = at_least_float32(nn, x) @ at_least_float32(nn, self.weight).swapaxes(-1, -2)  # (T, E)
        ratings = nn.exp(-nn.softplus(-logits))  # the sigmoid, without overflow
        scores = nn.stop_gradient(ratings + at_least_float32(nn, self.e_score_correction_bias))
        if options.n_groups_per_token < options.n_groups:
            scores = self._within_groups(scores)
        chosen = top(nn, scores, self.count)
        ratings = nn.take_along_axis(ratings, chosen, axis=-1)
        if options.normalised:
            ratings = ratings / (nn.sum(ratings, axis=-1)[..., None] + 1e-20)
        return chosen, ratings * options.scale

    def _within_groups(self, scores: Array) -> Array:
        """The scores (T, E), minus infinity outside of the groups whose two best experts have the largest sums."""
        nn, options = self.nn, self.options
        grouped = scores.reshape(scores.shape[0], options.n_groups, -1)
        best = nn.sort(grouped, axis=-1)[..., -2:]  # (T, G, 2)
        rank = nn.argsort(nn.argsort(-nn.sum(best, axis=-1), axis=-1), axis=-1)  # (T, G)
        kept = (rank < options.n_groups_per_token)[..., None]
        return nn.where(kept, grouped, -float("inf")).reshape(scores.shape)


class SigmoidMoEMixer:
    """Each position through an MLP and, beside it, through the experts that its router chooses.

    Args:
        config: the model's configuration; its ``mlp`` has the sizes, ``d_shared`` that of the MLP of all positions.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: ``NemotronHMoE`` of transformers.
    """

    nn: ClassVar[Backend]
    expert_cls: ClassVar[Any]
    router_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init, M = self.nn, init or Initializer(), config.d_model
        options = required_mlp(config, "sigmoid_moe")
        if options.n_experts < 1 or options.d_shared < 1:
            raise ValueError(
                f"layer_types has 'sigmoid_moe', but mlp.n_experts is {options.n_experts} and mlp.d_shared "
                f"{options.d_shared}; expected at least 1 each"
            )
        self.gate = self.router_cls(options, M, init)
        sizes: SigmoidMoEOptions = self.gate.options

        def latent(n_out: int, n_in: int) -> Any:
            return nn.Linear(init.linear(n_out, n_in), init.full((n_out,), 0.0) if options.use_bias else None)

        self.fc1_latent_proj = latent(sizes.d_latent, M) if sizes.d_latent else None
        self.fc2_latent_proj = latent(M, sizes.d_latent) if sizes.d_latent else None
        own: dict[str, Any] = {"d_model": sizes.d_latent or M, "d_intermediate": sizes.d_expert, "use_bias": False}
        self.experts = nn.ModuleList(
            [self.expert_cls(config, layer_idx, init=init, **own) for _ in range(options.n_experts)]
        )
        self.shared_experts = self.expert_cls(config, layer_idx, init=init, d_intermediate=options.d_shared)

    def forward(
        self,
        hidden: Array,
        state: NoState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, NoState]:
        """(B, L, M) to (B, L, M); what is padding or packed makes no difference here."""
        nn = self.nn
        x = hidden.reshape(-1, hidden.shape[-1])  # (T, M)
        chosen, ratings = self.gate(x)
        if self.fc1_latent_proj is not None:
            x = self.fc1_latent_proj(x)
        ratings = nn.astype(ratings, x.dtype)
        y = nn.mixture(parts_of(self.experts), self.experts[0].through, x, chosen, ratings)
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        return y.reshape(hidden.shape) + self.shared_experts(hidden)[0], NoState()

    def init_state(self, batch: int) -> NoState:
        """Nothing is remembered."""
        return NoState()
