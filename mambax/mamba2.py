"""The mixer of Mamba-2.

Dimensions: B batch, L length, M d_model, D d_inner = H P, H heads, P head_dim, G groups, N d_state, K d_conv,
C channels of the convolution = D + 2 G N.
"""

from __future__ import annotations

from typing import ClassVar

from mambax.backend import Array, Backend, Ops
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import LayerState, check_layer_state
from mambax.options import Mamba2Options
from mambax.scan import at_least_float32, scaled


def gated_rms_norm(
    nn: Ops, y: Array, z: Array, weight: Array, groups: int, eps: float, *, norm_first: bool = False
) -> Array:
    """``rms(y * silu(z)) * weight``, the mean square taken over each of ``groups`` equal parts.

    Args:
        nn: the backend whose arrays these are.
        y, z: (B, L, D).
        weight: (D,).
        groups: how many parts.
        eps: added to the mean square.
        norm_first: ``rms(y) * weight * silu(z)`` instead.

    Returns:
        (B, L, D) in the dtype of the weight; statistics in float32.

    Source: ``RMSNormGated`` of mamba_ssm with ``norm_before_gate=False``, which is what every public model has, and
    with ``norm_before_gate=True``.
    """
    batch, length, width = y.shape
    y, gate = at_least_float32(nn, y), nn.silu(at_least_float32(nn, z))
    parts = (y if norm_first else y * gate).reshape(batch, length, groups, width // groups)
    scale = (nn.sum(parts * parts, axis=-1) / (width // groups) + eps)[..., None] ** -0.5
    normed = (parts * scale).reshape(batch, length, width)
    if norm_first:
        return nn.astype(normed * at_least_float32(nn, weight) * gate, weight.dtype)
    return nn.astype(normed, weight.dtype) * weight


class Mamba2Mixer:
    """The state-space mixer of Mamba-2 (Dao and Gu 2024, section 7; ``Mamba2`` in mamba_ssm).

    Args:
        config: the model's configuration; its ``mamba2`` has this mixer's sizes.
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
        if config.mamba2 is None:
            raise ValueError("layer_types has 'mamba2', but mamba2 is None; expected its options")
        options: Mamba2Options = config.mamba2
        self.config, self.options, self.layer_idx = config, options, layer_idx
        D, C, H = options.d_inner, options.conv_channels, options.n_heads
        if projections:
            zeros = init.full((D + C + H,), 0.0) if options.use_bias else None
            self.in_proj = nn.Linear(init.linear(D + C + H, config.d_model), zeros)
        bound = options.d_conv**-0.5
        self.conv1d = nn.CausalConv1d(
            init.uniform((C, 1, options.d_conv), bound),
            init.uniform((C,), bound) if options.use_conv_bias else None,
        )
        self.dt_bias = nn.Parameter(init.dt_bias(config, H))
        self.A_log = nn.Parameter(init.A_log_of_heads(H))
        self.D = nn.Parameter(init.full((H,), 1.0))
        if options.gated_norm != "none":
            self.norm = nn.RMSNorm(init.full((D,), 1.0), options.norm_epsilon)
        if projections:
            zeros = init.full((config.d_model,), 0.0) if options.use_out_bias else None
            self.out_proj = nn.Linear(init.out_proj(config, D), zeros)

    def forward(
        self,
        hidden: Array,
        state: LayerState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, LayerState]:
        """Mix along the sequence; arguments and results as of :meth:`mambax.blocks.MambaMixer.forward`."""
        if state is not None:
            batch, options = hidden.shape[0], self.options
            conv = (batch, options.d_conv - 1, options.conv_channels)
            ssm = (batch, options.n_heads, options.head_dim, options.d_state)
            check_layer_state(state, self.layer_idx, conv, ssm)
        y, after = self.mix(self.in_proj(hidden), state, mask, boundaries)
        return self.out_proj(y), after

    def mix(
        self, projected: Array, state: LayerState | None, mask: Array | None, boundaries: Array | None
    ) -> tuple[Array, LayerState]:
        """What is between the projections: (B, L, D + C + H) to (B, L, D); arguments as of :meth:`forward`."""
        nn, options = self.nn, self.options
        batch, length, _ = projected.shape
        D, C, H = options.d_inner, options.conv_channels, options.n_heads
        groups = (options.n_groups, options.d_state)
        projected = self._scaled(projected)
        z, xBC, dt = projected[..., :D], projected[..., D : D + C], projected[..., D + C :]
        xBC, conv = self.conv1d(xBC, None if state is None else state.conv, mask, boundaries)
        B, C_ = xBC[..., D : D + groups[0] * groups[1]], xBC[..., D + groups[0] * groups[1] :]
        y, ssm = nn.ssd(
            xBC[..., :D].reshape(batch, length, H, options.head_dim),
            dt,
            -nn.exp(at_least_float32(nn, self.A_log)),
            B.reshape(batch, length, *groups),
            C_.reshape(batch, length, *groups),
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=options.dt_limit,
            initial_state=None if state is None else state.ssm,
            mask=mask,
            boundaries=boundaries,
            impl=self.config.scan,
        )
        return self._gated(y.reshape(batch, length, D), z), LayerState(conv, ssm)

    def _scaled(self, projected: Array) -> Array:
        """The output of ``in_proj`` with a factor on each of its parts, where any is not 1."""
        options = self.options
        factors = options.part_multipliers
        if factors == (1.0,) * len(factors):
            return projected
        width = options.n_groups * options.d_state
        parts, start = [], 0
        for size, factor in zip((options.d_inner,) * 2 + (width,) * 2 + (options.n_heads,), factors, strict=True):
            parts.append(scaled(self.nn, projected[..., start : start + size], factor))
            start += size
        return self.nn.concat(parts, axis=-1)

    def _gated(self, y: Array, z: Array) -> Array:
        """y (B, L, D) with its gate z, and normed where the options say so."""
        nn, options = self.nn, self.options
        if options.gated_norm == "none":
            return nn.astype(at_least_float32(nn, y) * nn.silu(at_least_float32(nn, z)), y.dtype)
        weight, groups, eps = self.norm.weight, options.n_groups, options.norm_epsilon
        if options.gated_norm == "norm_first":
            return gated_rms_norm(nn, y, z, weight, groups, eps, norm_first=True)
        return nn.gated_rms_norm(y, z, weight, groups, eps)

    def init_state(self, batch: int) -> LayerState:
        """The state before the first position: zeros, (batch, K-1, C) and (batch, H, P, N)."""
        nn, options, weight = self.nn, self.options, self.conv1d.weight
        conv = nn.zeros((batch, options.d_conv - 1, options.conv_channels), weight.dtype, like=weight)
        dtype = nn.float64 if weight.dtype == nn.float64 else nn.float32
        shape = (batch, options.n_heads, options.head_dim, options.d_state)
        return LayerState(conv, nn.zeros(shape, dtype, like=weight))
