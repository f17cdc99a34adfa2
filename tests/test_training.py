"""Training: schedules, the optimiser, and what a step computes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import training_runs
from harness import WITH_GRADIENTS, backend_params, build, config_of, installed, token_ids
from tolerances import assert_close, relative_error
from training_runs import Losses, config, losses_of, trainer, weights

import mambax
from mambax import get_backend
from mambax.training import (
    Batch,
    Documents,
    Schedule,
    Trainer,
)
from mambax.training.engine import make_engine
from mambax.training.groups import decayed_names

BACKENDS = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))


# --- schedules, groups, configurations ---------------------------------------------------------------------------


def test_schedules_by_hand():
    cosine = Schedule(kind="cosine", peak=2.0, steps=11, warmup=2, min_ratio=0.1)
    half = 2 * (0.1 + 0.9 * 0.5)
    assert [cosine(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([1.0, 2.0, 2.0, half, 0.2])
    stable = Schedule(kind="wsd", peak=1.0, steps=10, warmup=0, min_ratio=0.0, decay_fraction=0.4)
    assert [stable(step) for step in range(10)] == pytest.approx([1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    constant = Schedule(kind="constant", peak=3.0, steps=5, warmup=1)
    assert [constant(step) for step in range(5)] == [3.0] * 5
    assert Schedule(kind="cosine", peak=1.0, steps=1)(0) == 1.0


def test_what_decays():
    model = get_backend("numpy").MambaForCausalLM(config_of(n_layer=1))
    shapes = {name: array.shape for name, array in model.nn.parameters(model).items()}
    mixer = "backbone.layers.0.mixer."
    matrices = {f"{mixer}{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")}
    assert decayed_names(shapes) == matrices | {"backbone.embeddings.weight", "lm_head.weight"}
    fewer = decayed_names(shapes, ["*embeddings*", "*.conv1d.*"])
    assert fewer == matrices - {mixer + "conv1d.weight"} | {"lm_head.weight"}
    with pytest.raises(ValueError, match=r"'embedding' matches no parameter.*backbone\."):
        decayed_names(shapes, ["embedding"])


@BACKENDS
def test_decay_reaches_the_right_parameters(backend):
    """At no gradient, AdamW only decays."""
    model = build(get_backend(backend), config_of(n_layer=1))
    engine = make_engine(model, config(weight_decay=0.5, clip_norm=0))
    before = weights(model)
    batch = Batch(input_ids=token_ids(2, 4), shift_labels=np.full((2, 4), -100))
    engine.accumulate(batch, 1.0, None)
    assert engine.clip_gradients(0) == 0
    engine.update(0.1)
    decayed = decayed_names({name: array.shape for name, array in before.items()})
    for name, array in weights(model).items():
        assert_close(array, before[name] * (1 - 0.05 if name in decayed else 1), what=name, tolerance=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; expected a whole number from 1"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected a number from 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"schedule": "linear"}, "'linear'; expected one of 'cosine', 'wsd', 'constant'"),
        ({"micro_batch_size": 5}, "micro_batch_size is 5; expected at most batch_size, 4"),
        ({"warmup_steps": 12}, "warmup_steps is 12; expected fewer than the 12 steps"),
        ({"gradient_checkpointing": 1}, "true or false"),
        ({"no_decay": "x"}, "a list of texts"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_models_that_cannot_be_trained():
    numpy = mambax.from_config(config_of(), backend="numpy")
    with pytest.raises(ValueError, match=r"numpy backend has no gradients.*'torch' or 'mlx'"):
        make_engine(numpy, config())
    narrow = build(get_backend("torch"), config_of(), dtype="bfloat16")
    with pytest.raises(ValueError, match=r"is torch\.bfloat16.*dtype='float32'.*precision='bfloat16'"):
        make_engine(narrow, config())
    frozen = build(get_backend("torch"), config_of())
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        make_engine(frozen, config())


# --- what is computed --------------------------------------------------------------------------------------------


@BACKENDS
def test_a_step_is_adamw_by_hand(backend):
    """Three steps of AdamW (Loshchilov and Hutter 2017, algorithm 2) with clipping, on gradients of the engine."""
    model = build(get_backend(backend), config_of(n_layer=1))
    made = config(weight_decay=0.2, clip_norm=0.05, beta1=0.8, beta2=0.9, epsilon=1e-4)
    engine = make_engine(model, made)
    x = {name: np.float64(array) for name, array in weights(model).items()}
    decayed = decayed_names({name: array.shape for name, array in x.items()})
    m, v = ({name: np.zeros(array.shape) for name, array in x.items()} for _ in range(2))
    for t in range(1, 4):
        ids = token_ids(2, 5, seed=t)
        g = {name: np.float64(array) for name, array in gradients(model, ids).items()}
        engine.accumulate(Batch(input_ids=ids, shift_labels=ids), 10, None)
        norm = math.sqrt(sum((array**2).sum() for array in g.values()))
        assert engine.clip_gradients(0.05) == pytest.approx(norm, rel=1e-5)
        engine.update(0.01 * t)
        for name in x:
            clipped = g[name] * 0.05 / norm
            m[name] = 0.8 * m[name] + 0.2 * clipped
            v[name] = 0.9 * v[name] + 0.1 * clipped**2
            step = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-4)
            x[name] = x[name] * (1 - 0.01 * t * (0.2 if name in decayed else 0)) - 0.01 * t * step
    for name, array in weights(model).items():
        assert_close(array, x[name], what=name, tolerance=1e-5)


def gradients(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean loss over ids as their own targets, by the framework."""
    if model.nn.name == "torch":
        import torch

        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(model(ids, shift_labels=ids).loss, parameters)
        return {name: array.numpy() for name, array in zip(names, found, strict=True)}
    import mlx.nn
    from mlx.utils import tree_flatten

    _, tree = mlx.nn.value_and_grad(model, lambda: model(ids, shift_labels=ids).loss)()
    return {name: np.array(array) for name, array in tree_flatten(tree)}


@BACKENDS
@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_a_batch_add_up_to_the_whole(tmp_path, backend, size):
    want = losses_of(backend, tmp_path / "whole", micro_batch_size=4, steps=4)
    got = losses_of(backend, tmp_path / "parts", micro_batch_size=size, steps=4)
    assert_close(list(got.values()), list(want.values()), tolerance=2e-6)
    assert list(want.values())[-1] < want[1] - 0.02


@BACKENDS
def test_windows_of_a_row_add_up_to_the_loss_of_the_row(tmp_path, backend):
    """The state goes on from window to window, and from the last one to the next batch."""
    still = {"steps": 3, "learning_rate": 0.0, "weight_decay": 0.0, "eval_every": 0, "save_every": 0}
    want, got = Losses(), Losses()
    whole = trainer(backend, tmp_path / "whole", tmp_path, observers=(want,), **still)
    parts = trainer(backend, tmp_path / "windows", tmp_path, observers=(got,), micro_length=4, **still)  # of 9
    whole.train()
    parts.train()
    assert_close(list(got.values()), list(want.values()), tolerance=2e-6)
    assert len(whole.steps.states) == len(parts.steps.states) == 2
    for one, other in zip(whole.steps.states, parts.steps.states, strict=True):
        for name, array in one.arrays().items():
            found = other.arrays()[name]
            assert_close(whole.model.nn.to_numpy(found), whole.model.nn.to_numpy(array), what=name)


def test_processes_that_would_not_meet_are_told(tmp_path):
    """Were their parts of a batch not as many, one process would wait for what another never does."""
    pytest.importorskip("torch")
    made = trainer("torch", tmp_path / "run", tmp_path)
    made.engine.processes = 2
    whole = made.data.batch(0)
    made.steps.data = SimpleNamespace(batch=lambda step: whole.part(0, 3), carries_state=True)
    with pytest.raises(ValueError, match=r"step 0: the data gave a batch of 3 rows; expected batch_size, 4"):
        made.steps.take(0)
    made.engine.processes = 1
    made.steps.data = SimpleNamespace(batch=lambda step: whole.part(0, 0), carries_state=True)
    with pytest.raises(ValueError, match="a batch of 0 rows"):
        made.steps.take(0)


def test_the_rows_of_a_classifier_are_not_cut():
    batch = Batch(input_ids=token_ids(2, 6), labels=np.array([0, 1]))
    with pytest.raises(ValueError, match="expected micro_length to be none for a classifier"):
        batch.window(0, 3)


@BACKENDS
def test_parts_with_unlike_numbers_of_targets(tmp_path, backend):
    """Documents of different lengths: a mean of means would be something else."""
    dataset = training_runs.write([["a" * n] for n in (3, 9, 4, 2, 7)], training_runs.vocabularies.byte_tokenizer(),
                                  tmp_path / "tokens")  # fmt: skip
    found = []
    for size in (None, 1):
        model = mambax.from_config(mambax.MambaLMConfig(**training_runs.MODEL), backend=backend)
        losses = Losses()
        run = Trainer(model, Documents(dataset, 6, 4), config(steps=4, micro_batch_size=size), tmp_path / str(size),
                      observers=[losses])  # fmt: skip
        run.train()
        found.append(list(losses.values()))
    assert_close(found[1], found[0], tolerance=2e-6)


@BACKENDS
def test_gradient_checkpointing_trains_the_same(tmp_path, backend):
    want = losses_of(backend, tmp_path / "kept", steps=6)
    got = losses_of(backend, tmp_path / "again", steps=6, gradient_checkpointing=True)
    assert_close(list(got.values()), list(want.values()), tolerance=2e-6)


@BACKENDS
def test_bfloat16_trains_over_float32_weights(tmp_path, backend):
    want = losses_of(backend, tmp_path / "wide", steps=25, learning_rate=2e-2, eval_every=0, save_every=0)
    made = {"steps": 25, "learning_rate": 2e-2, "eval_every": 0, "save_every": 0, "precision": "bfloat16"}
    run = trainer(backend, tmp_path / "narrow", tmp_path, observers=(narrow := Losses(),), **made)
    run.train()
    assert {array.dtype for array in weights(run.model).values()} == {np.dtype(np.float32)}
    assert relative_error(list(narrow.values()), list(want.values())) < 0.02
    assert narrow != want
    assert narrow[25] < narrow[1] - 0.5


@pytest.mark.skipif(len(installed(WITH_GRADIENTS)) < 2, reason="needs torch and mlx")
def test_torch_and_mlx_learn_alike(tmp_path):
    """The loss of every one of 200 steps, float32."""
    options = {"steps": 200, "eval_every": 0, "save_every": 0, "micro_batch_size": None}
    torch, mlx = (losses_of(name, tmp_path / name, **options) for name in WITH_GRADIENTS)
    assert torch[200] < 0.7 * torch[1]
    for step, want in torch.items():
        assert mlx[step] == pytest.approx(want, rel=1e-3), step
