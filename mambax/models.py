"""Heads and whole models around the encoder, defined once for every backend.

Parameter paths are those of Hugging Face checkpoints (``backbone.layers.0.mixer.in_proj.weight``, ...).

Dimensions: B batch, L length, M d_model, V vocabulary, P pooled size.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, NamedTuple

from mambax.backend import Array, Backend
from mambax.checkpoint.mixin import CheckpointMixin
from mambax.config import POOLINGS, MambaClassificationConfig, MambaLMConfig, Pooling
from mambax.encoder import EncoderOutput
from mambax.generation import GenerationMixin
from mambax.init import Initializer
from mambax.inputs import as_boundaries, as_mask, as_token_ids
from mambax.pooling import last_positions, pool, pooled_size
from mambax.scan import at_least_float32, scaled
from mambax.state import InferenceParams
from mambax.training import losses


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
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, Integral) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep!r}; expected 0 for all positions, or how many")
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
