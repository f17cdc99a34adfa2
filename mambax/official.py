"""What the official package has beside its Mamba mixers, with its parameter names: attention, and a gated MLP.

Dimensions: B batch, L length, M d_model, H heads of queries, G heads of keys and values, P head_dim, K d_conv,
C channels of the convolution = (H + 2 G) P, I d_intermediate.
"""

from __future__ import annotations

from typing import ClassVar

from mambax.attention import attend, check_state, empty_state, required_options
from mambax.backend import Array, Backend
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import AttentionState, ConvolvedAttentionState, NoState
from mambax.mlp import required_mlp


class MHAMixer:
    """Causal attention whose queries, keys and values are one product, perhaps with a causal convolution over them.

    The convolution is over each channel of queries, keys and values by itself, without an activation, and before
    rotary embeddings; its past is a part of the state.

    Args:
        config: the model's configuration; its ``attention`` has this mixer's sizes.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: ``MHA`` of mamba_ssm. Its cache keeps the outputs of the convolution of a prompt where the inputs are
    needed, so that the first tokens after a prompt come out otherwise than from one call; here they do not.
    """

    nn: ClassVar[Backend]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        options = required_options(config, "mha")
        self.config, self.options, self.layer_idx = config, options, layer_idx
        M, width = config.d_model, options.head_dim
        C = self.channels = (options.n_heads + 2 * options.n_kv_heads) * width
        bias = init.full((C,), 0.0) if options.use_bias else None
        self.in_proj = nn.Linear(init.linear(C, M), bias)
        if options.d_conv:
            bound = options.d_conv**-0.5
            weight, bias = init.uniform((C, 1, options.d_conv), bound), init.uniform((C,), bound)
            self.conv1d = nn.CausalConv1d(weight, bias)
        bias = init.full((M,), 0.0) if options.use_out_bias else None
        self.out_proj = nn.Linear(init.out_proj(config, options.n_heads * width), bias)

    def forward(
        self,
        hidden: Array,
        state: AttentionState | ConvolvedAttentionState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, AttentionState | ConvolvedAttentionState]:
        """Mix along the sequence; arguments and results as of :meth:`mambax.blocks.MambaMixer.forward`."""
        options, batch = self.options, hidden.shape[0]
        state = self.init_state(batch) if state is None else state
        seen = AttentionState(state.key, state.value, state.number)
        check_state(options, seen, batch, self.layer_idx)
        qkv, conv = self.in_proj(hidden), None  # (B, L, C)
        if options.d_conv:
            qkv, conv = self._convolved(qkv, state, mask, boundaries)
        ends = options.n_heads * options.head_dim, (options.n_heads + options.n_kv_heads) * options.head_dim
        q, k, v = qkv[..., : ends[0]], qkv[..., ends[0] : ends[1]], qkv[..., ends[1] :]
        y, after = attend(self.nn, options, q, k, v, seen, mask, boundaries)
        return self.out_proj(y), after if conv is None else ConvolvedAttentionState(*after, conv)

    def _convolved(
        self,
        qkv: Array,
        state: AttentionState | ConvolvedAttentionState,
        mask: Array | None,
        boundaries: Array | None,
    ) -> tuple[Array, Array]:
        """(B, L, C) after the convolution, and its last K-1 inputs."""
        past = state.conv if isinstance(state, ConvolvedAttentionState) else None
        needed = (qkv.shape[0], self.options.d_conv - 1, self.channels)
        if past is None or tuple(past.shape) != needed:
            found = None if past is None else tuple(past.shape)
            raise ValueError(
                f"state: conv_state of layer {self.layer_idx} is {found}, but this model and input need {needed}; "
                "use the state of the same model and rows"
            )
        conv1d = self.conv1d
        return self.nn.causal_conv1d(  # not the layer itself, which goes on to SiLU
            qkv,
            conv1d.weight,
            conv1d.bias,
            initial_state=past,
            mask=mask,
            boundaries=boundaries,
            activation=None,
        )

    def init_state(self, batch: int) -> AttentionState | ConvolvedAttentionState:
        """The state before the first position: no position at all, and zeros (batch, K-1, C) of the convolution."""
        nn, options = self.nn, self.options
        if not options.d_conv:
            return empty_state(nn, options, batch, self.in_proj.weight)
        weight = self.conv1d.weight
        conv = nn.zeros((batch, options.d_conv - 1, self.channels), weight.dtype, like=weight)
        return ConvolvedAttentionState(*empty_state(nn, options, batch, weight), conv)


class GatedMLPMixer:
    """``fc2(a * silu(b))`` with a and b the halves of ``fc1``: each position by itself.

    Args:
        config: the model's configuration; its ``mlp`` has this block's sizes.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: ``GatedMLP`` of mamba_ssm.
    """

    nn: ClassVar[Backend]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        nn, init = self.nn, init or Initializer()
        self.options = options = required_mlp(config, "gated_mlp")
        self.fc1 = nn.Linear(init.linear(2 * options.d_intermediate, config.d_model), None)
        self.fc2 = nn.Linear(init.out_proj(config, options.d_intermediate), None)

    def forward(
        self,
        hidden: Array,
        state: NoState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, NoState]:
        """(B, L, M) to (B, L, M); what is padding or packed makes no difference here."""
        both, width = self.fc1(hidden), self.options.d_intermediate
        return self.fc2(both[..., :width] * self.nn.silu(both[..., width:])), NoState()

    def init_state(self, batch: int) -> NoState:
        """Nothing is remembered."""
        return NoState()
