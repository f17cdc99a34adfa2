"""Evaluation, and classifiers in the training loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import training_runs
from harness import WITH_GRADIENTS, assert_states_equal, backend_params, build, config_of, token_ids, weights_of
from training_runs import config

import mambax
from mambax import MambaClassificationConfig, get_backend
from mambax.training import (
    Batch,
    LabelledRows,
    Stream,
    Trainer,
    evaluate,
)
from mambax.training.engine import make_engine
from mambax.training.evaluation import continued

BACKENDS = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))


@BACKENDS
@pytest.mark.parametrize("rows", [1, 3])
def test_evaluation_by_hand(tmp_path, backend, rows):
    made = config_of(vocab_size=128)
    values = weights_of(made)
    engine = make_engine(build(get_backend(backend), made, values), config())
    text = "né" * 20
    dataset = training_runs.write([[text]], training_runs.vocabularies.byte_tokenizer(), tmp_path / "tokens")
    ids = np.minimum(dataset.tokens, 127).astype(np.uint16)
    dataset.tokens = ids
    dataset.text_bytes = 90  # as if a token stood for a byte and a half
    share = -(-(len(ids) - 1) // rows)
    total, right = 0.0, 0
    for start in range(0, len(ids) - 1, share):
        part = ids[start : start + share + 1]
        logits, _ = reference.logits_row(values, part[:-1])
        likely = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        total -= likely[np.arange(len(part) - 1), part[1:]].sum()
        right += (logits.argmax(1) == part[1:]).sum()
    found = evaluate(engine, Stream(dataset, 7, rows))
    assert found.items == len(ids) - 1 == 59
    assert found.loss == pytest.approx(total / 59, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / 59), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(total / 59 / math.log(2) * 60 / 90, rel=1e-5)
    assert found.nats_per_character == pytest.approx(total / 59 * 60 / 40, rel=1e-5)
    assert found.accuracy == pytest.approx(right / 59)


@BACKENDS
@pytest.mark.parametrize("kind", ["single", "several", "numbers"])
def test_a_classifier_learns(tmp_path, backend, kind):
    """Whether the first token was odd, read from the state after the others."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 20, rng.integers(2, 6)) for _ in range(64)]
    odd = np.array([int(row[0] % 2) for row in sequences])
    labels = {"single": odd, "several": np.stack([odd, 1 - odd], 1).astype(np.float32), "numbers": odd * 2.0 - 1}
    count = {"single": 2, "several": 2, "numbers": 1}[kind]
    made = MambaClassificationConfig(**(training_runs.MODEL | {"num_labels": count, "pooling": "last"}))
    data = LabelledRows(sequences, labels[kind], 16)
    options = {"steps": 45, "batch_size": 16, "micro_batch_size": 10, "learning_rate": 3e-2, "eval_every": 30}
    run = Trainer(mambax.from_config(made, backend=backend), data, config(**options), tmp_path, validation=data)
    summary = run.train()
    assert summary.evaluation is not None
    assert summary.evaluation.loss < (0.3 if kind == "numbers" else 0.25)
    assert summary.evaluation.perplexity is None
    assert kind == "numbers" or (summary.evaluation.accuracy or 0) > 0.9
    assert mambax.load(tmp_path / "model", backend="numpy").config.num_labels == count


@BACKENDS
def test_a_fresh_row_begins_with_an_empty_state(backend):
    model = build(get_backend(backend), config_of())
    state = model(token_ids(3, 4)).state.detach()
    batch = Batch(input_ids=token_ids(3, 2), shift_labels=token_ids(3, 2), fresh=np.array([False, True, False]))
    found, empty = continued(model, batch, state), model.init_state(3)
    assert found is not None
    assert_states_equal(found.select([0, 2]), state.select([0, 2]))
    assert_states_equal(found.select(1), empty.select(1))
    assert continued(model, batch, None) is None
