"""The blocks of a Mamba-1 model: the mixer and the residual block around it.

Each class is a definition: it names no framework. A backend binds it to its own ``Module`` base and sets ``nn``,
one line each (``backends/mambax_torch/models.py``).

Dimensions: B batch, L length, D d_inner, M d_model, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mambax.backend import Array, Backend, Ops
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import LayerState, check_layer_state
from mambax.scan import at_least_float32, scaled


def rms(nn: Ops, x: Array, eps: float) -> Array:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, in float32 and back in the dtype of x: no weight."""
    wide = at_least_float32(nn, x)
    return nn.astype(wide * (nn.sum(wide * wide, axis=-1) / x.shape[-1] + eps)[..., None] ** -0.5, x.dtype)


def time_steps(dt_proj: Any, dt: Array) -> tuple[Array, Array | None]:
    """See :meth:`mambax.backend.Backend.time_steps`: ``dt_proj(dt)``, with no bias left to add."""
    return dt_proj(dt), None


def mix(
    mixer: Any, xz: Array, A: Array, state: LayerState | None, mask: Array | None, boundaries: Array | None
) -> None:
    """See :meth:`mambax.backend.Backend.mix`: None, whatever it is, so that the definition does it."""


class MambaMixer:
    """The selective state-space mixer of Mamba-1 (Gu and Dao 2023, figure 3; ``Mamba`` in mamba_ssm).

    Args:
        config: the model's configuration.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.
        projections: whether it has ``in_proj`` and ``out_proj``; without them, :meth:`mix` is all there is.
    """

    nn: ClassVar[Backend]

    def __init__(
        self,
        config: MambaConfig,
        layer_idx: int = 0,
        *,
        init: Initializer | None = None,
        projections: bool = True,
    ) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        D, N, R = config.d_inner, config.d_state, int(config.dt_rank)
        self.config = config
        self.layer_idx = layer_idx
        if projections:
            self.in_proj = nn.Linear(
                init.linear(2 * D, config.d_model), init.full((2 * D,), 0.0) if config.use_bias else None
            )
        self.conv1d = nn.CausalConv1d(
            init.conv_weight(config), init.conv_bias(config) if config.use_conv_bias else None
        )
        self.x_proj = nn.Linear(init.linear(R + 2 * N, D), None)
        self.dt_proj = nn.Linear(init.dt_weight(config), init.dt_bias(config, D))
        if config.dt_b_c_norm == "learned":
            eps = config.dt_b_c_norm_epsilon
            self.dt_layernorm = nn.RMSNorm(init.full((R,), 1.0), eps)
            self.b_layernorm = nn.RMSNorm(init.full((N,), 1.0), eps)
            self.c_layernorm = nn.RMSNorm(init.full((N,), 1.0), eps)
        self.A_log = nn.Parameter(init.A_log(config))  # (D, N)
        self.D = nn.Parameter(init.full((D,), 1.0))  # (D,)
        if projections:
            self.out_proj = nn.Linear(
                init.out_proj(config, D), init.full((config.d_model,), 0.0) if config.use_bias else None
            )

    def forward(
        self,
        hidden: Array,
        state: LayerState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, LayerState]:
        """Mix along the sequence.

        Args:
            hidden: (B, L, M).
            state: what an earlier call returned, or None at the start of a sequence.
            mask: (B, L) bool, False where a position does not exist; None when all do.
            boundaries: (B, L) bool, True where a new sequence begins in a packed row; None when none does.

        Returns:
            (B, L, M), and the state after the last position.

        Raises:
            ValueError: for a state of other sizes, and for a mask together with boundaries.
        """
        if state is not None:
            batch, D = hidden.shape[0], self.config.d_inner
            needed = (batch, self.config.d_conv - 1, D), (batch, D, self.config.d_state)
            check_layer_state(state, self.layer_idx, *needed)
        y, after = self.mix(self.in_proj(hidden), state, mask, boundaries)
        return self.out_proj(y), after

    def mix(
        self, xz: Array, state: LayerState | None, mask: Array | None, boundaries: Array | None
    ) -> tuple[Array, LayerState]:
        """What is between the projections: (B, L, 2D) to (B, L, D); arguments as of :meth:`forward`."""
        nn, D, N = self.nn, self.config.d_inner, self.config.d_state
        rank = int(self.config.dt_rank)
        A = -nn.exp(at_least_float32(nn, self.A_log))
        if (mixed := nn.mix(self, xz, A, state, mask, boundaries)) is not None:
            return mixed
        x, z = xz[..., :D], xz[..., D:]
        x, conv = self.conv1d(x, None if state is None else state.conv, mask, boundaries)  # (B, L, D)
        dbc = self.x_proj(x)  # (B, L, R + 2N)
        dt, B, C = self._normed(dbc[..., :rank], dbc[..., rank : rank + N], dbc[..., rank + N :])
        delta, delta_bias = nn.time_steps(self.dt_proj, dt)
        y, ssm = nn.selective_scan(
            x,
            delta,
            A,
            B,
            C,
            self.D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            mask=mask,
            boundaries=boundaries,
            impl=self.config.scan,
        )
        return y, LayerState(conv, ssm)

    def _normed(self, dt: Array, B: Array, C: Array) -> tuple[Array, Array, Array]:
        """dt (B, L, R), B and C (B, L, N) after their RMSNorms, where the family has any."""
        nn, config = self.nn, self.config
        if config.dt_b_c_norm == "learned":
            return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        if config.dt_b_c_norm == "weightless":
            eps = config.dt_b_c_norm_epsilon
            return rms(nn, dt, eps), rms(nn, B, eps), rms(nn, C, eps)
        return dt, B, C

    def init_state(self, batch: int) -> LayerState:
        """The state before the first position: zeros, (batch, K-1, D) and (batch, D, N)."""
        nn, config = self.nn, self.config
        weight = self.conv1d.weight
        conv = nn.zeros((batch, config.d_conv - 1, config.d_inner), weight.dtype, like=weight)
        dtype = nn.float64 if weight.dtype == nn.float64 else nn.float32
        return LayerState(conv, nn.zeros((batch, config.d_inner, config.d_state), dtype, like=weight))


class Block:
    """``hidden + mixer(norm(hidden))``, the residual stream in float32 when so configured.

    Args:
        config: the model's configuration.
        layer_idx: the block's number.
        mixer_cls: what builds the mixer, called as :class:`MambaMixer` is; when None, the one of :attr:`mixers`
            that ``config.layer_types`` names.
        init: where initial weights come from; seed 0 when None.
    """

    nn: ClassVar[Backend]
    mixers: ClassVar[Mapping[str, Any]]
    """Kind of mixer, as in ``config.layer_types`` -> its class on this backend. All have the same ``forward``:
    (hidden, state, mask, boundaries) to (mixed, state after); one that remembers nothing returns NoState()."""

    def __init__(
        self,
        config: MambaConfig,
        layer_idx: int = 0,
        *,
        mixer_cls: Any = None,
        init: Initializer | None = None,
    ) -> None:
        super().__init__()
        init = init or Initializer()
        self.residual_in_fp32 = config.residual_in_fp32
        self.residual_multiplier = config.residual_multiplier
        self.norm = self.nn.RMSNorm(init.full((config.d_model,), 1.0), config.norm_epsilon)
        self.mixer = (mixer_cls or self._named(config.layer_kinds[layer_idx]))(config, layer_idx, init=init)

    def _named(self, kind: str) -> Any:
        if kind not in self.mixers:
            raise ValueError(
                f"layer_types: unknown mixer {kind!r}; expected one of {', '.join(map(repr, self.mixers))}"
            )
        return self.mixers[kind]

    def forward(
        self,
        hidden: Array,
        state: LayerState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
        added: Array | None = None,
    ) -> tuple[Array, LayerState]:
        """(B, L, M) to (B, L, M) and the state after the last position; arguments as of the mixer.

        ``added`` (B, L, M) is added to what the mixer reads, before its norm, and not to the residual stream.
        """
        packed = () if boundaries is None else (boundaries,)  # a mixer of one's own need not know packed rows
        read = hidden if added is None else hidden + self.nn.astype(added, hidden.dtype)
        mixed, after = self.mixer(self.norm(read), state, mask, *packed)
        if self.residual_in_fp32:
            hidden = at_least_float32(self.nn, hidden)
        mixed = scaled(self.nn, mixed, self.residual_multiplier)
        return hidden + self.nn.astype(mixed, hidden.dtype), after
