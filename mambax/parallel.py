"""A state-space mixer and attention side by side, as a mixer.

Dimensions: B batch, L length, M d_model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mambax.backend import Array, Backend
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import AttentionState, LayerState, ParallelState
from mambax.options import ParallelOptions
from mambax.scan import scaled


class ParallelMixer:
    """The sum of a Mamba-2 mixer and of attention over the same input, with a factor on each end of either.

    Args:
        config: the model's configuration; its ``mamba2`` and ``attention`` have the sizes of the two, its
            ``parallel`` the factors.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: ``FalconH1DecoderLayer`` of transformers.
    """

    nn: ClassVar[Backend]
    ssm_cls: ClassVar[Any]
    attention_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        init = init or Initializer()
        self.options = config.parallel or ParallelOptions()
        self.mamba = self.ssm_cls(config, layer_idx, init=init)
        self.self_attn = self.attention_cls(config, layer_idx, init=init)

    def forward(
        self,
        hidden: Array,
        state: ParallelState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, ParallelState]:
        """Mix along the sequence; arguments and results as of :meth:`mambax.blocks.MambaMixer.forward`."""
        options = self.options
        ssm_state, attention_state = None, None
        if state is not None:
            ssm_state = LayerState(state.conv, state.ssm)
            attention_state = AttentionState(state.key, state.value, state.number)
        given = scaled(self.nn, hidden, options.ssm_in_multiplier)
        mixed, ssm_state = self.mamba(given, ssm_state, mask, boundaries)
        given = scaled(self.nn, hidden, options.attention_in_multiplier)
        attended, attention_state = self.self_attn(given, attention_state, mask, boundaries)
        mixed = scaled(self.nn, mixed, options.ssm_out_multiplier)
        attended = scaled(self.nn, attended, options.attention_out_multiplier)
        return mixed + attended, ParallelState(*ssm_state, *attention_state)

    def init_state(self, batch: int) -> ParallelState:
        """The state before the first position: that of either mixer."""
        return ParallelState(*self.mamba.init_state(batch), *self.self_attn.init_state(batch))
