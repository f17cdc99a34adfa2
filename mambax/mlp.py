"""MLPs beside the state-space mixers of a hybrid model. They keep no state.

Dimensions: B batch, L length, M d_model, I d_intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from mambax.backend import Array, Backend, Ops
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import NoState
from mambax.options import MLPOptions
from mambax.scan import scaled

Product = Callable[[str, Array], Array]
"""(name of a linear layer, its input) to its output."""


_PLAIN = {"gated": True, "gate_multiplier": 1, "out_multiplier": 1}
_FIXED: dict[str, dict[str, Any]] = {
    "shared": _PLAIN,
    "shared_moe": _PLAIN | {"activation": "silu", "use_bias": False},
    "gated_mlp": _PLAIN | {"activation": "silu", "use_bias": False},
}
"""Kind of block -> the options that it knows in one way alone."""


def required_mlp(config: MambaConfig, kind: str) -> MLPOptions:
    """The sizes of the MLPs of a model that has some.

    Args:
        config: the model's configuration.
        kind: of the block that needs them, a name in ``config.layer_types``; ``"shared"`` for a shared block.

    Raises:
        ValueError: when the configuration has none, or one that such a block does not know.
    """
    if config.mlp is None:
        raise ValueError(f"layer_types has {kind!r}, but mlp is None; expected its options")
    for name, known in _FIXED.get(kind, {}).items():
        found = getattr(config.mlp, name)
        if found != known:
            raise ValueError(f"mlp.{name} is {found!r}; expected {known!r}, which is all that {kind!r} blocks know")
    return config.mlp


def activated(nn: Ops, x: Array, activation: str) -> Array:
    """x through one of the activations of :class:`mambax.options.MLPOptions`."""
    if activation == "silu":
        return nn.silu(x)
    if activation == "gelu":
        return nn.gelu(x)
    positive = nn.maximum(x, 0.0)
    return positive * positive


class MLPMixer:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate: each position by itself.

    Args:
        config: the model's configuration; its ``mlp`` has this block's sizes.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.
        d_model, d_intermediate, use_bias: where they are not those of the configuration.

    Source: Shazeer 2020 for the gated form.
    """

    nn: ClassVar[Backend]

    def __init__(
        self,
        config: MambaConfig,
        layer_idx: int = 0,
        *,
        init: Initializer | None = None,
        d_model: int | None = None,
        d_intermediate: int | None = None,
        use_bias: bool | None = None,
    ) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        self.options = options = required_mlp(config, "mlp")
        M, width = d_model or config.d_model, d_intermediate or options.d_intermediate
        biased = options.use_bias if use_bias is None else use_bias

        def linear(n_out: int, n_in: int) -> Any:
            return nn.Linear(init.linear(n_out, n_in), init.full((n_out,), 0.0) if biased else None)

        if options.gated:
            self.gate_proj = linear(width, M)
        self.up_proj = linear(width, M)
        down = init.linear(M, width) if d_model else init.out_proj(config, width)
        self.down_proj = nn.Linear(down, init.full((M,), 0.0) if biased else None)

    def forward(
        self,
        hidden: Array,
        state: NoState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, NoState]:
        """(B, L, M) to (B, L, M); what is padding or packed makes no difference here."""
        return self.through(lambda layer, x: getattr(self, layer)(x), hidden), NoState()

    def through(self, product: Product, x: Array) -> Array:
        """What the block computes, given the products with its weights or with those of another of its kind."""
        nn, options = self.nn, self.options
        if options.gated:
            gate = scaled(nn, product("gate_proj", x), options.gate_multiplier)
            y = product("down_proj", activated(nn, gate, options.activation) * product("up_proj", x))
        else:
            y = product("down_proj", activated(nn, product("up_proj", x), options.activation))
        return scaled(nn, y, options.out_multiplier)

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
        return self.output_linear(gated(self.nn, self.input_linear(hidden)))


def gated(nn: Ops, x: Array) -> Array:
    """``silu(a) * b`` with a and b the halves of the last axis."""
    width = x.shape[-1] // 2
    return nn.silu(x[..., :width]) * x[..., width:]
