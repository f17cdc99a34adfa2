"""What a run writes, and what is left when it is stopped: by a person, a signal, a full disk or its own numbers."""

from __future__ import annotations

import errno
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_runs
from harness import WITH_GRADIENTS, backend_params, installed
from training_runs import config, logged, losses_of, tokens, trainer, weights

import mambax
from mambax.training import (
    Batch,
    NotFinite,
    Progress,
    Trainer,
    Windows,
    checkpoints,
    evaluate,
)
from mambax.training.engine import make_engine
from mambax.training.logs import read_log

BACKENDS = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
CHILD = Path(training_runs.__file__)


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
    if backend not in installed(WITH_GRADIENTS):
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


def test_folders_within_a_checkpoint_reach_the_disk_too(tmp_path, monkeypatch):
    """As the shards of a model that is spread over processes."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.distcp").write_bytes(b"some")
    flushed = []
    monkeypatch.setattr(checkpoints, "_flush_folder", flushed.append)
    checkpoints._flush(tmp_path)
    assert flushed == [tmp_path / "shards", tmp_path]


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path):
    """The system itself refuses to write more, within the moments of AdamW."""
    command = [sys.executable, str(CHILD), "torch", str(tmp_path), "12", "full7"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 1
    said = child.stderr.splitlines()[-1]
    for part in ("File too large", "after step 8", "step-00000006", "Make room", "--resume"):
        assert part in said, said
    folder = tmp_path / "run" / "checkpoints"
    assert {path.name for path in folder.iterdir()} <= {"step-00000005", "step-00000006"}  # nothing half-written
    mambax.load(folder / "step-00000006", backend="numpy")
    trainer("torch", tmp_path / "run", tmp_path).train(resume=True)
    assert logged(tmp_path / "run") == dict(losses_of("torch", tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@BACKENDS
def test_ten_kills_at_any_moment(tmp_path, backend):
    """Within steps, evaluations and writes of checkpoints; after each, every checkpoint can be read."""
    changes = {"steps": 60, "save_every": 1, "eval_every": 3}
    want = losses_of(backend, tmp_path / "whole", **changes)
    options = [f"{name}={value}" for name, value in changes.items() if name != "steps"]
    command = [sys.executable, str(CHILD), backend, str(tmp_path), "60", "tell", *options]
    rng, unfinished = np.random.default_rng(0), 0
    for _ in range(10):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "start\n"
        for _ in range(rng.integers(1, 5)):
            before = time.perf_counter()
            assert child.stdout.readline() == "step\n"
        time.sleep(rng.uniform(0, time.perf_counter() - before))
        child.kill()
        child.wait(60)
        child.stdout.close()
        paths = list((tmp_path / "run" / "checkpoints").glob("step-*"))
        unfinished += bool(list((tmp_path / "run" / "checkpoints").glob(".step-*.tmp")))
        for path in paths:
            mambax.load(path, backend="numpy")
    run = trainer(backend, tmp_path / "run", tmp_path, **changes)
    latest = run.checkpoints.latest()
    assert latest is not None
    assert latest.name != "step-00000060"  # it was killed before its end
    assert unfinished  # and in the middle of writing, at least once
    run.train(resume=True)
    assert logged(tmp_path / "run") == dict(want)


def test_a_checkpoint_from_before_a_field_of_the_configuration(tmp_path):
    """It is that of a run with the default."""
    trainer("torch", tmp_path / "run", tmp_path, steps=4).train()
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / "training.json"
    info = json.loads(path.read_text("utf-8"))
    for name in ("distributed", "micro_length"):
        del info["config"][name]
    path.write_text(json.dumps(info), "utf-8")
    trainer("torch", tmp_path / "run", tmp_path, steps=4).train(resume=True)
    with pytest.raises(ValueError, match="micro_length: None in the checkpoint, 3 now"):
        trainer("torch", tmp_path / "run", tmp_path, steps=4, micro_length=3).train(resume=True)


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


@pytest.mark.skipif(len(installed(WITH_GRADIENTS)) < 2, reason="needs torch and mlx")
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
