"""Encoder, heads and whole models, defined once for every backend.

Parameter paths are those of Hugging Face checkpoints (``backbone.layers.0.mixer.in_proj.weight``, ...).

Dimensions: B batch, L length, M d_model, V vocabulary, P pooled size.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from mambax.backend import Array, Backend
from mambax.checkpoint.mixin import CheckpointMixin
from mambax.config import POOLINGS, MambaClassificationConfig, MambaConfig, MambaLMConfig, Pooling
from mambax.generation import GenerationMixin
from mambax.init import Initializer
from mambax.inputs import as_boundaries, as_mask, as_token_ids, check_hidden
from mambax.pooling import last_positions, pool, pooled_size
from mambax.scan import at_least_float32, scaled
from mambax.state import InferenceParams
from mambax.training import losses


class EncoderOutput(NamedTuple):
    """hidden_states (B, L, M) after the final norm, and the state after the last position."""

    hidden_states: Array
    state: InferenceParams


class CausalLMOutput(NamedTuple):
    """logits (B, L, V) float32, and the state after the last position; with labels, loss () and accuracy ()."""

    logits: Array
    state: InferenceParams
    loss: Array | None = None
    accuracy: Array | None = None


class SequenceClassifierOutput(NamedTuple):
    """logits (B, num_labels) float32, and the state after the last position; with labels, loss and accuracy ()."""

    logits: Array
    state: InferenceParams
    loss: Array | None = None
    accuracy: Array | None = None


class FeatureOutput(NamedTuple):
    """features (B, P) float32, and the state after the last position."""

    features: Array
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
        """The state before the first token, for ``batch`` rows."""
        layers = [layer.mixer.init_state(batch) for layer in self.layers]
        if self.shared_blocks is not None:
            count = len(self.shared_blocks)
            layers += [self.shared_blocks[use % count].init_state(batch) for use in range(len(self._places))]
        return self.state_cls(tuple(layers), self.nn.zeros((batch,), self.nn.int64, like=self.norm_f.weight))


class MambaEmbedding:
    """The table of token embeddings, (V, M): ids (B, L) to (B, L, M)."""

    def __init__(self, config: MambaLMConfig, *, init: Initializer | None = None) -> None:
        init = init or Initializer()
        table = init.normal((config.vocab_size, config.d_model), 0.02)
        super().__init__(table)  # pyright: ignore[reportCallIssue] bound over Embedding, which takes it


class MambaLMHead:
    """The head of an untied model, (V, M): hidden states (B, L, M) to logits (B, L, V)."""

    def __init__(self, config: MambaLMConfig, *, init: Initializer | None = None) -> None:
        init = init or Initializer()
        weight = init.linear(config.vocab_size, config.d_model)
        super().__init__(weight, None)  # pyright: ignore[reportCallIssue] bound over Linear, which takes them


class MambaClassificationHead:
    """Linear head of a classifier, (num_labels, P): pooled features (B, P) to logits (B, num_labels)."""

    def __init__(self, config: MambaClassificationConfig, *, init: Initializer | None = None) -> None:
        init = init or Initializer()
        size = pooled_size(config, config.pooling)
        weight, bias = init.linear(config.num_labels, size), init.full((config.num_labels,), 0.0)
        super().__init__(weight, bias)  # pyright: ignore[reportCallIssue] bound over Linear, which takes them


class MambaBackbone:
    """An encoder with a table of embeddings beside its blocks, as Hugging Face names them. Bound over MambaEncoder.

    Arguments as of :class:`MambaEncoder`.
    """

    embedding_cls: ClassVar[Any]

    def __init__(self, config: MambaLMConfig, *, mixer_cls: Any = None, init: Initializer | None = None) -> None:
        init = init or Initializer()
        encoder = {"mixer_cls": mixer_cls, "init": init}
        super().__init__(config, **encoder)  # pyright: ignore[reportCallIssue] bound over MambaEncoder
        self.embeddings = self.embedding_cls(config, init=init)


class MambaForCausalLM(CheckpointMixin, GenerationMixin):
    """A Mamba language model: embeddings, blocks, final norm, head.

    Args:
        config: the model's configuration.
        mixer_cls: what builds the mixer of each block; the backend's MambaMixer when None.
        init: where initial weights come from; seed 0 when None.
    """

    nn: ClassVar[Backend]
    config_cls: ClassVar[Any] = MambaLMConfig
    backbone_cls: ClassVar[Any]
    head_cls: ClassVar[Any]

    def __init__(self, config: MambaLMConfig, *, mixer_cls: Any = None, init: Initializer | None = None) -> None:
        super().__init__()
        init = init or Initializer()
        if not config.causal:
            raise ValueError(
                "layer_types: a language model cannot read from the end what it is to predict; expected no "
                "bidirectional mixer (use MambaForSequenceClassification or MambaForFeatureExtraction)"
            )
        self.config = config
        self.tokenizer = None
        self.backbone = self.backbone_cls(config, mixer_cls=mixer_cls, init=init)
        self.lm_head = None if config.tie_embeddings else self.head_cls(config, init=init)

    def forward(
        self,
        input_ids: Array,
        state: InferenceParams | None = None,
        mask: Array | None = None,
        *,
        segment_ids: Array | None = None,
        boundaries: Array | None = None,
        logits_to_keep: int = 0,
        labels: Array | None = None,
        shift_labels: Array | None = None,
        num_items_in_batch: float | None = None,
        return_logits: bool | None = None,
    ) -> CausalLMOutput:
        """Logits of the token after each position, and with labels the loss.

        Args:
            input_ids: (B, L) token ids: an integer array of the framework or of NumPy, or nested lists. An array
                of the framework is not checked, so as not to wait for the device: an id outside the vocabulary is
                an IndexError in PyTorch on the CPU and gives NaN in MLX.
            state: what an earlier call returned, or None at the start of a text. Any number of tokens may follow.
            mask: (B, L) bool, False at padding, on either side; None when there is none.
            segment_ids, boundaries: (B, L), for rows that pack several texts; as of :meth:`MambaEncoder.forward`.
            logits_to_keep: compute logits only for that many last positions that exist; 0 for all positions.
            labels: (B, L), commonly ``input_ids`` themselves, -100 where a token is not to be predicted. Each is
                the target of the position before it; across a boundary, and at padding, there is no target.
            shift_labels: (B, L), the same moved one place to the left: the target of each position, -100 for none.
            num_items_in_batch: what the summed loss is divided by, for a batch in several parts; the number of
                targets when None.
            return_logits: when False, ``logits`` are None, and never in memory: the loss goes through the positions
                in chunks. When None, that is so exactly when there are labels.

        Returns:
            logits (B, L or logits_to_keep, V) in float32, and the state after the last position. With labels, the
            mean negative log-likelihood of the targets in nats and the fraction that has the largest logit, both
            NaN where there is no target.

        Raises:
            ValueError: for ids and labels outside the vocabulary, and for shapes that do not fit.
        """
        nn = self.nn
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; expected 0 for all positions, or how many")
        with_loss = labels is not None or shift_labels is not None
        packed = {"segment_ids": segment_ids, "boundaries": boundaries}
        hidden, state = _embed_and_encode(self.backbone, input_ids, state, mask, **packed)
        hidden = scaled(nn, hidden, self.config.logits_multiplier)  # the head is linear: this scales the logits
        module: Any = self.backbone.embeddings if self.lm_head is None else self.lm_head
        head = module if self.lm_head is not None else module.as_linear
        loss = losses.Loss(None, None)
        if with_loss:
            exists = None if mask is None else as_mask(nn, mask, hidden)
            begins = as_boundaries(nn, segment_ids, boundaries, mask, hidden)
            size = self.config.vocab_size
            targets = losses.token_targets(nn, labels, shift_labels, exists, begins, hidden, size)
            loss = losses.cross_entropy(nn, module, head, hidden, targets, size, divisor=num_items_in_batch)
        if with_loss and not return_logits:
            return CausalLMOutput(None, state, *loss)
        if logits_to_keep:
            hidden = last_positions(nn, hidden, mask, logits_to_keep)
        return CausalLMOutput(at_least_float32(nn, head(hidden)), state, *loss)

    def init_state(self, batch: int = 1) -> InferenceParams:
        """The state before the first token, for ``batch`` rows."""
        return self.backbone.init_state(batch)


class MambaForFeatureExtraction(CheckpointMixin):
    """A Mamba model that turns a token sequence into one vector.

    Args:
        config: the model's configuration.
        pooling: ``"last"`` (the hidden state at the last real token, P = M), ``"mean"`` (over the real tokens,
            P = M) or ``"state"`` (the final state of the last block, flattened, P = d_inner * d_state).
        mixer_cls: what builds the mixer of each block; the backend's MambaMixer when None.
        init: where initial weights come from; seed 0 when None.
    """

    nn: ClassVar[Backend]
    config_cls: ClassVar[Any] = MambaLMConfig
    backbone_cls: ClassVar[Any]

    def __init__(
        self,
        config: MambaLMConfig,
        *,
        pooling: Pooling = "mean",
        mixer_cls: Any = None,
        init: Initializer | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(map(repr, POOLINGS))}")
        self.config = config
        self.tokenizer = None
        self.pooling: Pooling = pooling
        self.backbone = self.backbone_cls(config, mixer_cls=mixer_cls, init=init or Initializer())

    def forward(
        self, input_ids: Array, state: InferenceParams | None = None, mask: Array | None = None
    ) -> FeatureOutput:
        """Features (B, P) of token ids (B, L); arguments as of :meth:`MambaForCausalLM.forward`."""
        hidden, state = _embed_and_encode(self.backbone, input_ids, state, mask)
        return FeatureOutput(pool(self.nn, hidden, state, mask, self.pooling), state)

    def init_state(self, batch: int = 1) -> InferenceParams:
        """The state before the first token, for ``batch`` rows."""
        return self.backbone.init_state(batch)


class MambaForSequenceClassification(CheckpointMixin):
    """A Mamba model that puts a token sequence into one of ``num_labels`` classes.

    Args:
        config: the model's configuration.
        mixer_cls: what builds the mixer of each block; the backend's MambaMixer when None.
        init: where initial weights come from; seed 0 when None.
    """

    nn: ClassVar[Backend]
    config_cls: ClassVar[Any] = MambaClassificationConfig
    backbone_cls: ClassVar[Any]
    head_cls: ClassVar[Any]

    def __init__(
        self, config: MambaClassificationConfig, *, mixer_cls: Any = None, init: Initializer | None = None
    ) -> None:
        super().__init__()
        init = init or Initializer()
        self.config = config
        self.tokenizer = None
        self.backbone = self.backbone_cls(config, mixer_cls=mixer_cls, init=init)
        self.score = self.head_cls(config, init=init)

    def forward(
        self,
        input_ids: Array,
        state: InferenceParams | None = None,
        mask: Array | None = None,
        *,
        labels: Array | None = None,
        problem_type: losses.ProblemType | None = None,
        num_items_in_batch: float | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) of token ids (B, L), and with labels the loss.

        Args:
            input_ids, state, mask: as of :meth:`MambaForCausalLM.forward`.
            labels, problem_type: one label for each row, several, or numbers; see
                :func:`mambax.training.losses.classification`.
            num_items_in_batch: what the loss summed over rows is divided by; the number of rows when None.

        Raises:
            ValueError: for labels that do not fit, and as :meth:`MambaForCausalLM.forward`.
        """
        nn = self.nn
        hidden, state = _embed_and_encode(self.backbone, input_ids, state, mask)
        pooled = pool(nn, hidden, state, mask, self.config.pooling)
        logits = self.score(nn.astype(pooled, self.score.bias.dtype))  # a quantised weight is of whole numbers
        logits = at_least_float32(nn, logits)
        if labels is None:
            return SequenceClassifierOutput(logits, state)
        options: dict[str, Any] = {"problem_type": problem_type, "divisor": num_items_in_batch}
        return SequenceClassifierOutput(logits, state, *losses.classification(nn, logits, labels, **options))

    def init_state(self, batch: int = 1) -> InferenceParams:
        """The state before the first token, for ``batch`` rows."""
        return self.backbone.init_state(batch)


def _embed_and_encode(
    backbone: Any, input_ids: Array, state: InferenceParams | None, mask: Array | None, **packed: Array | None
) -> EncoderOutput:
    table = backbone.embeddings.weight
    ids = as_token_ids(backbone.nn, input_ids, backbone.config.vocab_size, table)
    hidden = scaled(backbone.nn, backbone.embeddings(ids), backbone.config.embedding_multiplier)
    return backbone(hidden, state, mask, **packed)
