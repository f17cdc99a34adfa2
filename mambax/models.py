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
from mambax.inputs import as_mask, as_token_ids, check_hidden
from mambax.pooling import last_positions, pool, pooled_size
from mambax.scan import at_least_float32
from mambax.state import InferenceParams


class EncoderOutput(NamedTuple):
    """hidden_states (B, L, M) after the final norm, and the state after the last position."""

    hidden_states: Array
    state: InferenceParams


class CausalLMOutput(NamedTuple):
    """logits (B, L, V) float32, and the state after the last position."""

    logits: Array
    state: InferenceParams


class SequenceClassifierOutput(NamedTuple):
    """logits (B, num_labels) float32, and the state after the last position."""

    logits: Array
    state: InferenceParams


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
    """

    nn: ClassVar[Backend]
    block_cls: ClassVar[Any]
    state_cls: ClassVar[Any]

    def __init__(self, config: MambaConfig, *, mixer_cls: Any = None, init: Initializer | None = None) -> None:
        super().__init__()
        init = init or Initializer()
        self.config = config
        self.layers = self.nn.ModuleList(
            [self.block_cls(config, i, mixer_cls=mixer_cls, init=init) for i in range(config.n_layer)]
        )
        self.norm_f = self.nn.RMSNorm(init.full((config.d_model,), 1.0), config.norm_epsilon)

    def forward(
        self, hidden: Array, state: InferenceParams | None = None, mask: Array | None = None
    ) -> EncoderOutput:
        """Run every block.

        Args:
            hidden: (B, L, M) inputs.
            state: what an earlier call returned, or None at the start of a sequence.
            mask: (B, L) bool, False where a position does not exist; None when all do. Outputs at such
                positions are to be ignored.

        Raises:
            ValueError: when the shapes of hidden, state and mask do not fit this model or each other.
        """
        nn = self.nn
        mask = None if mask is None else as_mask(nn, mask, hidden)
        check_hidden(self.config, hidden, mask)
        if state is None:
            state = self.init_state(hidden.shape[0])
        if not isinstance(state, InferenceParams):
            raise ValueError(f"state: expected InferenceParams, found {type(state).__name__}; is it the mask?")
        state.check(nn.name, len(self.layers), hidden.shape[0])
        layers = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            hidden, layer_state = layer(hidden, layer_state, mask)
            layers.append(layer_state)
        if mask is None:
            seen = state.tokens_seen + hidden.shape[1]
        else:
            seen = state.tokens_seen + nn.sum(nn.astype(mask, nn.int64), axis=1)
        return EncoderOutput(self.norm_f(hidden), self.state_cls(tuple(layers), seen))

    def init_state(self, batch: int = 1) -> InferenceParams:
        """The state before the first token, for ``batch`` rows."""
        layers = tuple(layer.mixer.init_state(batch) for layer in self.layers)
        return self.state_cls(layers, self.nn.zeros((batch,), self.nn.int64, like=self.norm_f.weight))


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
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits of the token after each position.

        Args:
            input_ids: (B, L) token ids: an integer array of the framework or of NumPy, or nested lists. An array
                of the framework is not checked, so as not to wait for the device: an id outside the vocabulary is
                an IndexError in PyTorch on the CPU and gives NaN in MLX.
            state: what an earlier call returned, or None at the start of a text. Any number of tokens may follow.
            mask: (B, L) bool, False at padding, on either side; None when there is none.
            logits_to_keep: compute logits only for that many last positions that exist; 0 for all positions.

        Returns:
            logits (B, L or logits_to_keep, V) in float32, and the state after the last position.

        Raises:
            ValueError: for ids outside the vocabulary, and for shapes that do not fit.
        """
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; expected 0 for all positions, or how many")
        hidden, state = _embed_and_encode(self.backbone, input_ids, state, mask)
        if logits_to_keep:
            hidden = last_positions(self.nn, hidden, mask, logits_to_keep)
        logits = self.backbone.embeddings.as_linear(hidden) if self.lm_head is None else self.lm_head(hidden)
        return CausalLMOutput(at_least_float32(self.nn, logits), state)

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
        self, input_ids: Array, state: InferenceParams | None = None, mask: Array | None = None
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) of token ids (B, L); arguments as of :meth:`MambaForCausalLM.forward`."""
        nn = self.nn
        hidden, state = _embed_and_encode(self.backbone, input_ids, state, mask)
        pooled = pool(nn, hidden, state, mask, self.config.pooling)
        logits = self.score(nn.astype(pooled, self.score.bias.dtype))  # a quantised weight is of whole numbers
        return SequenceClassifierOutput(at_least_float32(nn, logits), state)

    def init_state(self, batch: int = 1) -> InferenceParams:
        """The state before the first token, for ``batch`` rows."""
        return self.backbone.init_state(batch)


def _embed_and_encode(
    backbone: Any, input_ids: Array, state: InferenceParams | None, mask: Array | None
) -> EncoderOutput:
    table = backbone.embeddings.weight
    ids = as_token_ids(backbone.nn, input_ids, backbone.config.vocab_size, table)
    return backbone(backbone.embeddings(ids), state, mask)
