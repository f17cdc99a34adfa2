"""Blocks of attention and an MLP that are used at several places of a model, with one set of weights.

Each use reads the hidden state beside the embeddings and has low-rank adapters and a cache of its own. What it
gives is added to what the next block's mixer reads, not to the residual stream.

Dimensions: B batch, L length, M d_model, I d_intermediate, R adapter_rank, H P width of all heads together.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mambax.attention import attend, check_state, empty_state, required_options
from mambax.backend import Array, Backend
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import AttentionState
from mambax.mlp import activated, required_mlp
from mambax.options import AttentionOptions, SharedOptions


def required_shared(config: MambaConfig) -> SharedOptions:
    """Where the shared blocks of a model are used.

    Raises:
        ValueError: when the configuration has none.
    """
    if config.shared is None:
        raise ValueError("a shared block needs the configuration's shared, which is None; expected its options")
    return config.shared


def uses_of(options: SharedOptions, number: int) -> int:
    """How often a shared block is used."""
    return len(options.places[number :: options.n_blocks])


class Adapter:
    """``up(down(x))``: what one use adds to a product of all uses.

    Args:
        n_out, rank, n_in: widths.
        init: where initial weights come from. ``up`` begins with zeros, as in LoRA.
    """

    nn: ClassVar[Backend]

    def __init__(self, n_out: int, rank: int, n_in: int, init: Initializer) -> None:
        super().__init__()
        self.down = self.nn.Linear(init.linear(rank, n_in), None)
        self.up = self.nn.Linear(init.full((n_out, rank), 0.0), None)

    def forward(self, x: Array) -> Array:
        """(..., n_in) to (..., n_out)."""
        return self.up(self.down(x))


class SharedAttention:
    """Causal attention over inputs of 2 M; see :func:`mambax.attention.attend`.

    Args:
        config: the model's configuration; its ``attention`` and ``shared`` have the sizes.
        uses: how often it is used.
        init: where initial weights come from.
    """

    nn: ClassVar[Backend]
    adapter_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, uses: int, init: Initializer) -> None:
        super().__init__()
        nn, shared = self.nn, required_shared(config)
        self.options: AttentionOptions = required_options(config, "shared")
        if self.options.d_conv:
            raise ValueError(f"attention.d_conv is {self.options.d_conv}; expected 0 in a model with shared blocks")
        width, d_input = self.options.head_dim, 2 * config.d_model
        widths = [heads * width for heads in (self.options.n_heads, *[self.options.n_kv_heads] * 2)]

        def linear(n_out: int) -> Any:
            return nn.Linear(
                init.linear(n_out, d_input), init.full((n_out,), 0.0) if self.options.use_bias else None
            )

        def adapters(n_out: int) -> Any:
            rank = shared.adapter_rank if shared.adapts_attention else 0
            made = [self.adapter_cls(n_out, rank, d_input, init) for _ in range(uses if rank else 0)]
            return nn.ModuleList(made) if made else None

        self.q_proj, self.k_proj, self.v_proj = map(linear, widths)
        self.q_adapters, self.k_adapters, self.v_adapters = map(adapters, widths)
        bias = init.full((config.d_model,), 0.0) if self.options.use_out_bias else None
        self.o_proj = nn.Linear(init.out_proj(config, widths[0]), bias)

    def forward(
        self,
        x: Array,
        use: int,
        state: AttentionState | None,
        mask: Array | None,
        boundaries: Array | None,
    ) -> tuple[Array, AttentionState]:
        """(B, L, 2 M) to (B, L, M), and the state after the last position."""
        batch = x.shape[0]
        state = self.init_state(batch) if state is None else state
        check_state(self.options, state, batch, use)
        parts = (
            (self.q_proj, self.q_adapters), (self.k_proj, self.k_adapters), (self.v_proj, self.v_adapters)
        )  # fmt: skip
        q, k, v = (of_all(x) if own is None else of_all(x) + own[use](x) for of_all, own in parts)
        y, after = attend(self.nn, self.options, q, k, v, state, mask, boundaries)
        return self.o_proj(y), after

    def init_state(self, batch: int) -> AttentionState:
        """The state of one use before the first position."""
        return empty_state(self.nn, self.options, batch, self.k_proj.weight)


class SharedMLP:
    """``down(act(a) * b)`` with a and b the halves of one product, to which each use adds its adapter's.

    Args:
        config: the model's configuration; its ``mlp`` and ``shared`` have the sizes.
        uses: how often it is used.
        init: where initial weights come from.
    """

    nn: ClassVar[Backend]
    adapter_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, uses: int, init: Initializer) -> None:
        super().__init__()
        nn, rank, M = self.nn, required_shared(config).adapter_rank, config.d_model
        self.options = options = required_mlp(config, "shared")
        width, bias = options.d_intermediate, options.use_bias
        zeros = init.full((2 * width,), 0.0) if bias else None
        self.gate_up_proj = nn.Linear(init.linear(2 * width, M), zeros)
        made = [self.adapter_cls(2 * width, rank, M, init) for _ in range(uses if rank else 0)]
        self.adapters = nn.ModuleList(made) if made else None
        self.down_proj = nn.Linear(init.out_proj(config, width), init.full((M,), 0.0) if bias else None)

    def forward(self, x: Array, use: int) -> Array:
        """(B, L, M) to (B, L, M)."""
        both, width = self.gate_up_proj(x), self.options.d_intermediate
        if self.adapters is not None:
            both = both + self.adapters[use](x)
        return self.down_proj(activated(self.nn, both[..., :width], self.options.activation) * both[..., width:])


class SharedBlock:
    """``output(mlp(norm(attention(norm([hidden, original])))))``, without a residual stream of its own.

    Args:
        config: the model's configuration.
        number: of this block among those that are shared.
        init: where initial weights come from; seed 0 when None.

    Source: ``Zamba2HybridLayer`` of transformers; Glorioso et al. 2024, figure 2.
    """

    nn: ClassVar[Backend]
    attention_cls: ClassVar[Any]
    mlp_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, number: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init, M = self.nn, init or Initializer(), config.d_model
        uses = uses_of(required_shared(config), number)
        self.norm = nn.RMSNorm(init.full((2 * M,), 1.0), config.norm_epsilon)
        self.attention = self.attention_cls(config, uses, init)
        self.mlp_norm = nn.RMSNorm(init.full((M,), 1.0), config.norm_epsilon)
        self.mlp = self.mlp_cls(config, uses, init)
        self.outputs = nn.ModuleList([nn.Linear(init.linear(M, M), None) for _ in range(uses)])

    def forward(
        self,
        hidden: Array,
        original: Array,
        use: int,
        state: AttentionState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, AttentionState]:
        """What one use adds to the input of the next mixer.

        Args:
            hidden: (B, L, M), the residual stream.
            original: (B, L, M), the embeddings with which it began.
            use: which of this block's uses, from 0.
            state: of this use; None at the start of a sequence.
            mask, boundaries: as of :meth:`mambax.blocks.MambaMixer.forward`.

        Returns:
            (B, L, M), and the state of this use after the last position.

        Raises:
            ValueError: for a state of other sizes, and for a mask together with boundaries.
        """
        both = self.nn.concat([hidden, self.nn.astype(original, hidden.dtype)], axis=-1)  # (B, L, 2 M)
        mixed, after = self.attention(self.norm(both), use, state, mask, boundaries)
        return self.outputs[use](self.mlp(self.mlp_norm(mixed), use)), after

    def init_state(self, batch: int) -> AttentionState:
        """The state of one use before the first position."""
        return self.attention.init_state(batch)
