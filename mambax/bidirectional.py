"""Mixers that read a sequence in both directions: for encoders, which see it whole, not for language models.

Dimensions: B batch, L length, M d_model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mambax.backend import Array, Backend
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.layer_states import NoState


class BidirectionalMixer:
    """The sum of a mixer over the sequence and of another one over the sequence from its end.

    Each direction has its own convolution, recurrence and time steps. When tied, both share ``in_proj`` and
    ``out_proj``, which are then computed once for both.

    Args:
        config: the model's configuration.
        layer_idx: the block's number.
        init: where initial weights come from; seed 0 when None.

    Source: BiMamba, Schiff et al. 2024 ("Caduceus"), section 3.1, whose parameter names these are; tied, it is
    also the block of Zhu et al. 2024 ("Vision Mamba"), algorithm 1.
    """

    nn: ClassVar[Backend]
    direction_cls: ClassVar[Any]
    """The mixer of each direction: one with ``mix`` between its projections."""
    tied: ClassVar[bool]

    def __init__(self, config: MambaConfig, layer_idx: int = 0, *, init: Initializer | None = None) -> None:
        super().__init__()
        init = init or Initializer()
        self.layer_idx = layer_idx
        self.mamba_fwd = self.direction_cls(config, layer_idx, init=init)
        self.mamba_rev = self.direction_cls(config, layer_idx, init=init, projections=not self.tied)

    def forward(
        self,
        hidden: Array,
        state: NoState | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
    ) -> tuple[Array, NoState]:
        """Mix along the sequence, both ways.

        Args:
            hidden: (B, L, M), whole sequences.
            state: nothing; a sequence that is read from its end too cannot be continued.
            mask, boundaries: as of :meth:`mambax.blocks.MambaMixer.forward`.

        Returns:
            (B, L, M), and no state.
        """
        nn, ahead, back = self.nn, self.mamba_fwd, self.mamba_rev
        order = hidden.shape[1] - 1 - nn.arange(hidden.shape[1], like=hidden)
        ends = None
        if boundaries is not None:  # from its end, a sequence begins where the next one begins after it
            ends = nn.concat([boundaries[:, 1:], boundaries[:, :1]], axis=1)[:, order]
        mask_back = None if mask is None else mask[:, order]
        projected = ahead.in_proj(hidden)
        y, _ = ahead.mix(projected, None, mask, boundaries)
        other = projected if self.tied else back.in_proj(hidden)
        y_back, _ = back.mix(other[:, order], None, mask_back, ends)
        if self.tied:
            return ahead.out_proj(y + y_back[:, order]), NoState()
        return ahead.out_proj(y) + back.out_proj(y_back)[:, order], NoState()

    def init_state(self, batch: int) -> NoState:
        """The state of a mixer that keeps none."""
        return NoState()
