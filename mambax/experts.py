"""Mixtures of experts beside the state-space mixers of a hybrid model. They keep no state.

Dimensions: B batch, L length, M d_model, E experts, K experts of a token, T = B L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from mambax.backend import Array, Backend, Ops
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import NoState
from mambax.mlp import Product, gated, required_mlp
from mambax.scan import at_least_float32

Formula = Callable[[Product, Array], Array]
"""What an expert computes, given the products with its weights, and its input."""


class ExpertWeights:
    """The weights (E, out, in) of one linear layer of all experts."""

    nn: ClassVar[Backend]

    def __init__(self, experts: int, n_out: int, n_in: int, init: Initializer) -> None:
        super().__init__()
        self.weight = self.nn.Parameter(init.uniform((experts, n_out, n_in), n_in**-0.5))


Parts = Mapping[str, "Sequence[Any] | ExpertWeights"]
"""The linear layers of all experts, by the name that a :data:`Formula` has for them."""


def _times(x: Array, weight: Array) -> Array:
    return x @ weight.swapaxes(-1, -2)


def products_of(nn: Ops, parts: Parts, times: Callable[[Array, Array], Array] = _times) -> list[Product]:
    """The products with the weights of each expert.

    Args:
        nn: the backend whose arrays these are.
        parts: the linear layers of all experts.
        times: the product of x (..., in) with the weight (out, in) of one of :class:`ExpertWeights`.
    """
    layers: dict[str, Sequence[Any]] = {}

    def with_weight(weight: Array, x: Array) -> Array:
        return times(x, weight)

    for name, part in parts.items():
        stacked = isinstance(part, ExpertWeights)
        layers[name] = [partial(with_weight, w) for w in nn.unstack(part.weight, axis=0)] if stacked else part
    count = len(next(iter(layers.values())))

    def product(number: int, name: str, x: Array) -> Array:
        return layers[name][number](x)

    return [partial(product, number) for number in range(count)]


def by_expert(chosen: np.ndarray, experts: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The pairs of a token and an expert in the order of the experts.

    Args:
        chosen: (T, K), the experts of each token.
        experts: E.

    Returns:
        (T K,) the places of the pairs in ``chosen``, those of an expert in the order of the tokens; and of each
        expert where its pairs begin and end.
    """
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(experts + 1)).tolist()
    return order, list(pairwise(bounds))


def mixture(nn: Ops, parts: Parts, formula: Formula, x: Array, chosen: Array, ratings: Array) -> Array:
    """The sum over the experts that each token chose of what they compute of it, times their ratings.

    Here every expert computes every token: what the backends' own are held against, and what they do where the
    choice cannot be looked at, as inside a compiled function.

    Args:
        nn: the backend whose arrays these are.
        parts: the linear layers of the experts.
        formula: what an expert does with them.
        x: (T, M).
        chosen: (T, K) int, the numbers of the experts of each token, no two equal.
        ratings: (T, K), in the dtype of x.

    Returns:
        (T, M) in the dtype of x.

    Source: Shazeer et al. 2017, equation 1.
    """
    total = None
    for number, product in enumerate(products_of(nn, parts)):
        rating = nn.sum(nn.where(chosen == number, ratings, 0.0), axis=-1)  # (T,)
        part = formula(product, x) * rating[:, None]
        total = part if total is None else total + part
    return total


def top(nn: Ops, scores: Array, count: int) -> Array:
    """The numbers of the ``count`` largest of the last axis, the largest first; no gradient flows through it."""
    return nn.argsort(-nn.stop_gradient(scores), axis=-1)[..., :count]


def softmax(nn: Ops, x: Array) -> Array:
    """Softmax over the last axis."""
    e = nn.exp(x - nn.max(x, axis=-1)[..., None])
    return e / nn.sum(e, axis=-1)[..., None]


class MoEMixer:
    """A mixture of gated MLPs: each position through the ``n_experts_per_token`` that its router rates best.

    The ratings are the softmax over all experts, not normalised over those chosen.

    Args:
        config: the model's configuration; its ``mlp`` has the sizes of this block and of its experts.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: ``JambaSparseMoeBlock`` of transformers.
    """

    nn: ClassVar[Backend]
    expert_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        self.options = options = required_mlp(config, "moe")
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
        """(B, L, M) to (B, L, M); what is padding or packed makes no difference here."""
        nn = self.nn
        x = hidden.reshape(-1, hidden.shape[-1])  # (T, M)
        logits = at_least_float32(nn, self.router(x))  # (T, E)
        chosen = top(nn, logits, self.options.n_experts_per_token)
        ratings = nn.take_along_axis(softmax(nn, logits), chosen, axis=-1)
        first = self.experts[0]
        y = nn.mixture(parts_of(self.experts), first.through, x, chosen, nn.astype(ratings, x.dtype))
        return y.reshape(hidden.shape), NoState()

    def init_state(self, batch: int) -> NoState:
        """Nothing is remembered."""
        return NoState()


def parts_of(experts: Sequence[Any]) -> Parts:
    """The linear layers of experts that are :class:`mambax.mlp.MLPMixer`."""
    names = ("gate_proj", "up_proj", "down_proj") if experts[0].options.gated else ("up_proj", "down_proj")
    return {name: [getattr(expert, name) for expert in experts] for name in names}


class FusedExperts:
    """A mixture of gated MLPs whose ratings are the softmax over the experts chosen.

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
        self.options = options = required_mlp(config, "shared_moe")
        E, M, width = options.n_experts, config.d_model, options.d_intermediate
        self.input_linear = self.weights_cls(E, 2 * width, M, init)
        self.output_linear = self.weights_cls(E, M, width, init)
        self.router = self.router_cls(E, M, init)

    def forward(self, hidden: Array) -> Array:
        """(B, L, M) to (B, L, M)."""
        nn = self.nn
        x = hidden.reshape(-1, hidden.shape[-1])  # (T, M)
        logits = at_least_float32(nn, self.router(x))  # (T, E)
        chosen = top(nn, logits, self.options.n_experts_per_token)
        ratings = nn.astype(softmax(nn, nn.take_along_axis(logits, chosen, axis=-1)), x.dtype)
        parts = {"input": self.input_linear, "output": self.output_linear}
        return nn.mixture(parts, self._through, x, chosen, ratings).reshape(hidden.shape)

    def _through(self, product: Product, x: Array) -> Array:
        return product("output", gated(self.nn, product("input", x)))


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
        options = required_mlp(config, "shared_moe")
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
