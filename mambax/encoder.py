"""The stack of blocks between the embeddings and the head, defined once for every backend.

Dimensions: B batch, L length, M d_model.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from mambax.backend import Array, Backend
from mambax.config import MambaConfig
from mambax.init import Initializer
from mambax.inputs import as_boundaries, as_mask, check_batch, check_hidden
from mambax.state import InferenceParams


class EncoderOutput(NamedTuple):
    """hidden_states (B, L, M) after the final norm, and the state after the last position."""

    hidden_states: Array
    state: InferenceParams


class MambaEncoder:
    """A stack of residual blocks and a final norm: (B, L, M) in, (B, L, M) out, no vocabulary.

    Args:
        config: the model's configuration.
        mixer_cls: what builds the mixer of each block, called as ``MambaMixer(config, layer_idx, init=init)``;
            the backend's MambaMixer when None.
        init: where initial weights come from; seed 0 when None.

    Set ``gradient_checkpointing`` to True to keep, for the gradient, only the inputs of each block and to compute
    the rest of it again: less memory for more time.
    """

    nn: ClassVar[Backend]
    gradient_checkpointing: bool = False
    block_cls: ClassVar[Any]
    shared_cls: ClassVar[Any]
    state_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, *, mixer_cls: Any = None, init: Initializer | None = None) -> None:
        super().__init__()
        init = init or Initializer()
        self.config = config
        self.layers = self.nn.ModuleList(
            [self.block_cls(config, i, mixer_cls=mixer_cls, init=init) for i in range(config.n_layer)]
        )
        shared = 0 if config.shared is None else config.shared.n_blocks
        made = [self.shared_cls(config, number, init=init) for number in range(shared)]
        self.shared_blocks = self.nn.ModuleList(made) if made else None
        self.norm_f = self.nn.RMSNorm(init.full((config.d_model,), 1.0), config.norm_epsilon)

    def forward(
        self,
        hidden: Array,
        state: InferenceParams | None = None,
        mask: Array | None = None,
        *,
        segment_ids: Array | None = None,
        boundaries: Array | None = None,
    ) -> EncoderOutput:
        """Run every block.

        Args:
            hidden: (B, L, M) inputs.
            state: what an earlier call returned, or None at the start of a sequence.
            mask: (B, L) bool, False where a position does not exist; None when all do. Outputs at such
                positions are to be ignored.
            segment_ids: (B, L) whole numbers, for rows that pack several sequences: a sequence begins where the
                number changes, and nothing from before it reaches it. The first one continues ``state``.
            boundaries: (B, L) bool, the same in other words: True where a sequence begins. At the first position
                it drops ``state``, as a window into longer rows may need.

        Returns:
            The hidden states, and the state of the last sequence of each row.

        Raises:
            ValueError: when the shapes of the arguments do not fit this model or each other, and when two of
                mask, segment_ids and boundaries are given.
        """
        nn = self.nn
        mask = None if mask is None else as_mask(nn, mask, hidden)
        check_hidden(self.config, hidden, mask)
        boundaries = as_boundaries(nn, segment_ids, boundaries, mask, hidden)
        if state is not None and not self.config.causal:
            raise ValueError(
                "state: expected None, since this model reads sequences from their end too and cannot continue "
                "one; give it whole sequences"
            )
        if state is None:
            state = self.init_state(hidden.shape[0])
        if not isinstance(state, InferenceParams):
            raise ValueError(f"state: expected InferenceParams, found {type(state).__name__}; is it the mask?")
        state.check(nn.name, len(self.layers) + len(self._places), hidden.shape[0])
        stepped = None
        if mask is None and boundaries is None and not self._places and not self.gradient_checkpointing:
            stepped = nn.decode_step(self.layers, hidden, state.layers)
        if stepped is None:
            stepped = self._through_blocks(hidden, state.layers, mask, boundaries)
        hidden, layers = stepped
        seen = self._tokens_seen(state.tokens_seen, hidden.shape[1], mask, boundaries)
        return EncoderOutput(self.norm_f(hidden), self.state_cls(layers, seen))

    def _through_blocks(
        self, hidden: Array, states: tuple[Any, ...], mask: Array | None, boundaries: Array | None
    ) -> tuple[Array, tuple[Any, ...]]:
        """(B, L, M) after the last block, and the states after; those of uses of shared blocks are the last."""
        original, places, after = hidden, self._places, list(states)
        packed = () if boundaries is None else (boundaries,)
        for i, layer in enumerate(self.layers):
            extra = packed
            if i in places and self.shared_blocks is not None:
                use, count = places.index(i), len(self.shared_blocks)
                place = len(self.layers) + use
                inputs = hidden, original, use // count, states[place], mask, *packed
                added, after[place] = self._run(self.shared_blocks[use % count])(*inputs)
                extra = boundaries, added
            hidden, after[i] = self._run(layer)(hidden, states[i], mask, *extra)
        return hidden, tuple(after)

    def _run(self, module: Any) -> Any:
        """The module, as a function that computes its intermediate results again for the gradient if wanted."""
        return self.nn.recomputed(module) if self.gradient_checkpointing else module

    @property
    def _places(self) -> tuple[int, ...]:
        return () if self.config.shared is None else self.config.shared.places

    def _tokens_seen(self, before: Array, length: int, mask: Array | None, boundaries: Array | None) -> Array:
        """How many tokens the state after these positions stands for, (B,) int64."""
        nn = self.nn
        if mask is not None:
            return before + nn.sum(nn.astype(mask, nn.int64), axis=1)
        if boundaries is None:
            return before + length
        begun = nn.astype(boundaries, nn.int64) * (nn.arange(length, like=before) + 1)  # place, from 1, or 0
        last = nn.max(begun, axis=1)  # (B,)
        return nn.where(last > 0, length + 1 - last, before + length)

    def init_state(self, batch: int = 1) -> InferenceParams:
        """The state before the first token, for ``batch`` rows.

        Raises:
            ValueError: for a batch that is not a whole number from 0 up.
        """
        check_batch(batch)
        layers = [layer.mixer.init_state(batch) for layer in self.layers]
        if self.shared_blocks is not None:
            count = len(self.shared_blocks)
            layers += [self.shared_blocks[use % count].init_state(batch) for use in range(len(self._places))]
        return self.state_cls(tuple(layers), self.nn.zeros((batch,), self.nn.int64, like=self.norm_f.weight))
