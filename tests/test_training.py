"""The training loop: what it computes, what it writes, and what is left when it is stopped."""

from __future__ import annotations

import errno
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import training_runs
from harness import WITH_GRADIENTS, assert_states_equal, backend_params, build, config_of, token_ids, weights_of
from tolerances import assert_close, relative_error
from training_runs import Losses, config, tokens, trainer

import mambax
from mambax import MambaClassificationConfig, get_backend
from mambax.training import (
    Batch,
    Documents,
    LabelledRows,
    NotFinite,
    Progress,
    Schedule,
    Stream,
    Trainer,
    Windows,
    evaluate,
)
from mambax.training.engine import make_engine
from mambax.training.evaluation import continued
from mambax.training.groups import decayed_names
from mambax.training.logs import read_log

BACKENDS = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
CHILD = Path(training_runs.__file__)


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: model.nn.to_numpy(array).copy() for name, array in model.nn.parameters(model).items()}


def losses_of(backend: str, folder: Path, *, resume: bool = False, **changes: Any) -> Losses:
    """Loss by step of a run that is not killed."""
    found = Losses()
    trainer(backend, folder / "run", folder, observers=(found,), **changes).train(resume=resume)
    return found


def logged(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run) if "loss" in record}


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


@pytest.mark.skipif(len(backend_params(WITH_GRADIENTS)) < 2, reason="needs torch and mlx")
def test_torch_and_mlx_learn_alike(tmp_path):
    """The loss of every one of 200 steps, float32."""
    options = {"steps": 200, "eval_every": 0, "save_every": 0, "micro_batch_size": None}
    torch, mlx = (losses_of(name, tmp_path / name, **options) for name in WITH_GRADIENTS)
    assert torch[200] < 0.7 * torch[1]
    for step, want in torch.items():
        assert mlx[step] == pytest.approx(want, rel=1e-3), step


# --- evaluation --------------------------------------------------------------------------------------------------


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


# --- what is written, and resuming -------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path):
    kinds = []
    run = trainer("torch", tmp_path / "run", tmp_path, observers=(lambda kind, record: kinds.append(kind),))
    summary = run.train()
    assert (summary.step, summary.interrupted, summary.best_step) == (12, False, 12)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} >= {"checkpoints", "log.jsonl", "log.csv", "loss.png", "model"}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000012"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = list(read_log(folder))
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 13))
    assert [record["step"] for record in records if "validation_loss" in record] == [5, 10, 12]
    assert len((folder / "log.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(records)
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("step") == 12
    for path in (summary.checkpoint, summary.model):
        model = mambax.load(path, backend="torch")
        for name, array in weights(run.model).items():
            np.testing.assert_array_equal(weights(model)[name], array)


def test_the_best_checkpoint_and_the_last_are_kept(tmp_path):
    """At a learning rate that ruins the model, the best one comes early."""
    made = {"learning_rate": 0.5, "clip_norm": 0.0, "warmup_steps": 11, "eval_every": 1, "save_every": 3}
    run = trainer("torch", tmp_path / "run", tmp_path, **made)
    summary = run.train()
    assert summary.best is not None
    assert summary.best_step is not None
    assert summary.best_step < 12
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{summary.best_step:08}", "step-00000012"]
    best = mambax.load(summary.model, backend="torch")
    engine = make_engine(best, config())
    assert evaluate(engine, run.validation).loss == pytest.approx(summary.best.loss, rel=1e-6)


@BACKENDS
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_gives_the_same_losses_to_the_last_bit(tmp_path, backend, precision):
    want = losses_of(backend, tmp_path / "whole", precision=precision)

    class Stop(Exception):
        pass

    def stop(kind: str, record: Any) -> None:
        if kind == "step" and record["step"] in stops:
            stops.remove(record["step"])
            raise Stop

    stops = {3, 7, 11}
    for _ in range(3):
        run = trainer(backend, tmp_path / "run", tmp_path, observers=(stop,), precision=precision)
        with pytest.raises(Stop):
            run.train(resume=run.checkpoints.latest() is not None)
    run = trainer(backend, tmp_path / "run", tmp_path, precision=precision)
    run.train(resume=True)
    assert logged(tmp_path / "run") == dict(want)
    whole = {record["step"]: record for record in read_log(tmp_path / "whole" / "run") if "loss" not in record}
    again = {record["step"]: record for record in read_log(tmp_path / "run") if "loss" not in record}
    assert again == whole


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("backend", "kills"),
    [
        pytest.param("torch", ["write2", "step9"], id="torch"),
        pytest.param("mlx", ["write1", "step5", "write3", "write2"], id="mlx"),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, backend, kills):
    if backend not in [p for p in backend_params(WITH_GRADIENTS) if isinstance(p, str)]:
        pytest.skip("its framework is not installed")
    want = losses_of(backend, tmp_path / "whole")
    command = [sys.executable, str(CHILD), backend, str(tmp_path), "12"]
    for kill in kills:
        child = subprocess.run([*command, kill], capture_output=True, text=True, timeout=120)
        assert child.returncode == -signal.SIGKILL, child.stderr
        for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
            mambax.load(path, backend="numpy")
    run = trainer(backend, tmp_path / "run", tmp_path)
    run.train(resume=run.checkpoints.latest() is not None)
    assert logged(tmp_path / "run") == dict(want)
    steps = [record["step"] for record in read_log(tmp_path / "run") if "loss" in record]
    assert steps == list(range(1, 13))  # what was logged after the last checkpoint is gone, not there twice
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(".")]


@BACKENDS
def test_ctrl_c_saves(tmp_path, backend):
    def press(kind: str, record: Any) -> None:
        if kind == "step" and record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    summary = trainer(backend, tmp_path / "run", tmp_path, observers=(press,)).train()
    assert (summary.step, summary.interrupted, summary.model) == (3, True, None)
    assert summary.checkpoint.name == "step-00000003"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer(backend, tmp_path / "run", tmp_path).train(resume=True)
    assert logged(tmp_path / "run") == dict(losses_of(backend, tmp_path / "whole"))


@BACKENDS
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, backend):
    run = trainer(backend, tmp_path / "run", tmp_path)
    batch, nn = run.data.batch, run.model.nn
    before: list[dict[str, np.ndarray]] = []

    def spoil(step: int) -> Batch:
        if step == 5:
            before.append(weights(run.model))
            name = "backbone.norm_f.weight"
            broken = before[0][name].copy()
            broken[0] = np.nan
            if backend == "torch":
                run.model.backbone.norm_f.weight.data[0] = math.nan
            else:
                run.engine.weights[name] = nn.from_numpy(broken)
        return batch(step)

    run.data.batch = spoil
    message = r"step 5: the loss is nan \(rows 0 to 2 of its batch\).*step-00000005.*learning_rate"
    with pytest.raises(NotFinite, match=message):
        run.train()
    saved = mambax.load(tmp_path / "run" / "checkpoints" / "step-00000005", backend="numpy")
    for name, array in weights(saved).items():
        np.testing.assert_array_equal(array, before[0][name])


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = trainer("torch", tmp_path / "run", tmp_path)
    saved = run.engine.save_model

    def fail(folder: Path) -> None:
        saved(folder)
        if run.step > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(run.engine, "save_model", fail)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    trainer("torch", tmp_path / "run", tmp_path).train(resume=True)
    assert logged(tmp_path / "run") == dict(losses_of("torch", tmp_path / "whole"))


def test_a_run_is_resumed_as_it_was_or_not_at_all(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer("torch", folder, tmp_path).train(resume=True)
    trainer("torch", folder, tmp_path).train()
    with pytest.raises(ValueError, match="has a run already, up to step-00000012; resume it"):
        trainer("torch", folder, tmp_path).train()
    with pytest.raises(ValueError, match=r"learning_rate: 0\.005 in the checkpoint, 0\.004 now"):
        trainer("torch", folder, tmp_path, learning_rate=0.004).train(resume=True)
    with pytest.raises(ValueError, match="data: 'reading "):
        trainer("torch", folder, tmp_path, batch_size=3).train(resume=True)
    trainer("torch", folder, tmp_path, log_every=7, save_every=5).train(resume=True)
    path = folder / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"step-00000012: this checkpoint cannot be read.*delete this folder"):
        trainer("torch", folder, tmp_path).train(resume=True)


@pytest.mark.skipif(len(backend_params(WITH_GRADIENTS)) < 2, reason="needs torch and mlx")
def test_moments_have_the_same_names_everywhere(tmp_path):
    found = {}
    for backend in WITH_GRADIENTS:
        run = trainer(backend, tmp_path / backend, tmp_path, steps=2, eval_every=0)
        run.train()
        arrays = run.engine.arrays()
        found[backend] = {n: a.shape for n, a in arrays.items() if not n.startswith("random")}
    assert found["torch"] == found["mlx"]


def test_windows_that_do_not_carry_state(tmp_path):
    made = mambax.from_config(mambax.MambaLMConfig(**training_runs.MODEL), backend="torch")
    data = Windows(tokens(tmp_path), 9, 4, separate=True)
    summary = Trainer(made, data, config(steps=3), tmp_path / "run").train()
    assert summary.evaluation is None
    assert not list(summary.checkpoint.glob("state-*"))


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    trainer("torch", tmp_path / "run", tmp_path, observers=(Progress(6),)).train()
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("step 6/12  loss ") and "tokens/s" in line for line in lines) == 1
    assert any("validation loss" in line and "bits per byte" in line for line in lines)
    assert lines[-1].startswith("loss curve: ")
    Progress(6, quiet=True)("step", {})


def test_matplotlib_is_optional(tmp_path, monkeypatch, capsys):
    find = curve_module().importlib.util.find_spec
    monkeypatch.setattr(
        curve_module().importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    trainer("torch", tmp_path / "run", tmp_path, observers=(Progress(),)).train()
    assert "no loss.png: it needs matplotlib (pip install matplotlib)" in capsys.readouterr().err


def curve_module() -> Any:
    from mambax.training import curve

    return curve
