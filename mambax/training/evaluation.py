"""How good a model is on data that it does not learn from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mambax.state import InferenceParams
from mambax.training.batches import Batch, EvaluationData
from mambax.training.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        loss: nats for each target of a language model; the mean over rows of a classifier.
        accuracy: the fraction of targets, rows or labels that is right; None for regression.
        items: targets, or rows.
        perplexity: ``exp(loss)``, of language models alone, where it is a float.
        bits_per_byte: of UTF-8 text: ``loss / ln 2`` times tokens per byte; of language models over text.
        nats_per_character: the loss times tokens per character; of language models over text.
    """

    loss: float
    accuracy: float | None
    items: int
    perplexity: float | None = None
    bits_per_byte: float | None = None
    nats_per_character: float | None = None

    def record(self) -> dict[str, float]:
        """The numbers that there are, by the names of the log."""
        return {f"validation_{name}": value for name, value in vars(self).items() if value is not None}


def evaluate(engine: Engine, data: EvaluationData) -> Evaluation:
    """Go through the data once, in each process.

    Raises:
        ValueError: for data without a target.
    """
    losses, right, items = 0.0, 0.0, 0
    state: InferenceParams | None = None
    language = False
    for batch in data.batches():
        language = batch.shift_labels is not None
        part = engine.evaluate(batch, 1.0, continued(engine.model, batch, state))
        state = part.state if data.carries_state else None
        losses += part.loss
        right += part.accuracy * batch.items if batch.items else 0.0
        items += batch.items
    if items == 0:
        raise ValueError("the validation data have no targets; expected at least one")
    loss = losses / items
    if not language:
        return Evaluation(loss, known(right / items), items)
    per_byte, per_character = data.bytes_per_token, data.characters_per_token
    return Evaluation(
        loss,
        known(right / items),
        items,
        perplexity=math.exp(loss) if loss < 700 else None,
        bits_per_byte=loss / math.log(2) / per_byte if per_byte else None,
        nats_per_character=loss / per_character if per_character else None,
    )


def known(value: float) -> float | None:
    """A number; None for NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def continued(model: Any, batch: Batch, state: InferenceParams | None) -> InferenceParams | None:
    """The state that the rows of a batch go on from: empty where a row is fresh."""
    if state is None or batch.fresh is None or not batch.fresh.any():
        return state
    fresh = model.nn.from_numpy(np.ascontiguousarray(batch.fresh), like=state.tokens_seen)
    return model.init_state(batch.rows).where(fresh, state)
