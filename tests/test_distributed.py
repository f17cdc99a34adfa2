"""Training in two processes on this machine: the losses of one, with DDP, FSDP2 and over MLX's ring."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import distributed_runs
import numpy as np
import pytest
from harness import BACKENDS, WITH_GRADIENTS, backend_params
from harness import run as forward
from tolerances import assert_close
from training_runs import TEXT, Losses, tokens, trainer, weights

import mambax
from mambax.registry import is_installed
from mambax.training import gather_checkpoint
from mambax.training.logs import read_log
from mambax.training.recipe import parse
from mambax.training.setup import check

SHARDED = 'distributed="fsdp"'
CHILD = str(Path(distributed_runs.__file__))
BOTH = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and the ring are tried on Linux and macOS")


def run(backend: str, processes: int, *arguments: str) -> None:
    """A run of distributed_runs.py."""
    launch(backend, processes, CHILD, backend, *arguments)


def launch(backend: str, processes: int, *arguments: str) -> str:
    """A script in processes that the launcher of a framework starts; what they say."""
    command = [sys.executable]
    if processes > 1 and backend == "torch":
        command += ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}",
                   "--master-addr=127.0.0.1", f"--master-port={_port()}"]  # fmt: skip
    elif processes > 1:
        script = Path(sysconfig.get_path("scripts")) / "mlx.launch"
        command = [sys.executable, str(script), "-n", str(processes), "--backend", "ring", "--starting-port",
                  str(_port()), "--env", f"EXPECTED={processes}", "--python", sys.executable]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EXPECTED": str(processes)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def losses(folder: Path, name: str) -> list[float]:
    return list(json.loads((folder / f"{name}.json").read_text("utf-8")).values())


def same_norms(folder: Path) -> None:
    """Of the gradients of the runs "one" and "two": Adam would hide a factor on them."""
    one, two = ([r["gradient_norm"] for r in read_log(folder / n) if "loss" in r] for n in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


@BOTH
def test_two_processes_learn_as_one_does(tmp_path, backend):
    tokens(tmp_path)
    tokens(tmp_path, "held out", TEXT[:100])
    run(backend, 1, str(tmp_path), "one", "8")
    run(backend, 2, str(tmp_path), "two", "8")
    one, two = losses(tmp_path, "one"), losses(tmp_path, "two")
    assert len(one) == len(two) == 8
    np.testing.assert_allclose(two, one, rtol=1e-4)
    same_norms(tmp_path)
    assert one[-1] < one[0] - 0.05
    models = [mambax.load(tmp_path / name / "model", backend="numpy") for name in ("one", "two")]
    first, second = (model.nn.parameters(model) for model in models)
    for name, array in first.items():
        assert_close(
            second[name], array, what=name, tolerance=1e-3
        )  # Adam enlarges rounding where gradients vanish


needs_torch = pytest.mark.skipif("torch" not in backend_params(("torch",)), reason="needs torch")


@needs_torch
def test_a_sharded_model_learns_as_a_whole_one(tmp_path):
    """FSDP2 over gloo; its checkpoint is gathered in one process, for every backend."""
    tokens(tmp_path)
    tokens(tmp_path, "held out", TEXT[:100])
    run("torch", 2, str(tmp_path), "two", "8", SHARDED)
    one = Losses()
    options = {"steps": 8, "warmup_steps": 1, "schedule": "constant", "micro_batch_size": 1}
    whole = trainer("torch", tmp_path / "one", tmp_path, observers=(one,), **options)
    whole.train()
    np.testing.assert_allclose(losses(tmp_path, "two"), list(one.values()), rtol=1e-4)
    same_norms(tmp_path)
    assert one[8] < one[1] - 0.05
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000008"
    assert {path.name for path in (checkpoint / "shards").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    gather_checkpoint(checkpoint, tmp_path / "gathered")
    ids, want = np.arange(12)[None], weights(whole.model)
    for backend in BACKENDS:
        for folder in (tmp_path / "two" / "model", tmp_path / "gathered"):
            if is_installed(backend):
                model = mambax.load(folder, backend=backend)
                for name, array in weights(model).items():
                    assert_close(array, want[name], what=name, tolerance=1e-3)  # as above
                assert_close(forward(model, ids)[0], forward(whole.model, ids)[0], tolerance=1e-3)
    with pytest.raises(ValueError, match=r"distributed: 'fsdp' in the checkpoint, 'ddp' now"):
        trainer("torch", tmp_path / "two", tmp_path, **options).train(resume=True)


@pytest.mark.slow
@needs_torch
def test_a_sharded_run_goes_on_to_the_last_bit(tmp_path):
    tokens(tmp_path)
    tokens(tmp_path, "held out", TEXT[:100])
    run("torch", 2, str(tmp_path), "whole", "8", SHARDED)
    run("torch", 2, str(tmp_path), "parts", "8", SHARDED, "stop")
    run("torch", 2, str(tmp_path), "parts", "8", SHARDED, "resume")
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


@pytest.mark.slow
@needs_torch
def test_a_sharded_model_computes_in_bfloat16_what_a_whole_one_does(tmp_path):
    """Weights that are gathered in bfloat16, and computed again; sensitive ones stay in float32."""
    tokens(tmp_path)
    tokens(tmp_path, "held out", TEXT[:100])
    narrow = 'precision="bfloat16"'
    run("torch", 1, str(tmp_path), "one", "8", narrow)
    run("torch", 2, str(tmp_path), "two", "8", narrow, SHARDED, "gradient_checkpointing=true")
    np.testing.assert_allclose(losses(tmp_path, "two"), losses(tmp_path, "one"), rtol=1e-4)


@pytest.mark.slow
@BOTH
def test_the_command_in_two_processes(tmp_path, backend):
    """As a person starts it: process 0 makes the tokens and writes, and both learn."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3, "utf-8", newline="\n")
    made = {
        "run": str(tmp_path / "run"), "backend": backend, "device": "cpu" if backend == "torch" else None,
        "model": {"d_model": 8, "n_layer": 1, "d_state": 4},
        "data": {"train": str(text), "tokenizer": "bytes", "length": 16, "validation_length": 64},
        "training": {"steps": 3, "batch_size": 2, "distributed": "fsdp" if backend == "torch" else "ddp"},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(made), "utf-8")
    script = tmp_path / "command.py"  # mlx.launch takes scripts alone
    script.write_text(
        f"import atexit, sys\n\nsys.path.append({str(Path(CHILD).parent)!r})\n\n"
        "from distributed_runs import no_threads_of_gloo\n\nfrom mambax.cli import main\n\n"
        "atexit.register(no_threads_of_gloo)\nmain()\n",
        "utf-8",
    )
    said = launch(backend, 2, str(script), "train", str(tmp_path / "recipe.json"))
    assert said.count("model: ") == 1  # process 0 alone speaks
    assert "(2 processes, " in said
    assert mambax.load(tmp_path / "run" / "model", backend="numpy").tokenizer is not None
    assert (tmp_path / "run" / "model" / "README.md").is_file()
    assert (
        len((tmp_path / "run" / "log.csv").read_text("utf-8").splitlines()) == 4
    )  # of steps 1 and 3, and evaluation


@pytest.mark.parametrize(
    ("backend", "changes", "environment", "message"),
    [
        ("torch", {"distributed": "fsdp"}, {}, "there is only this one.*torchrun --nproc-per-node=2"),
        ("mlx", {"distributed": "fsdp"}, {}, "which PyTorch alone has; use backend='torch', or distributed='ddp'"),
        ("mlx", {}, {"WORLD_SIZE": "2", "RANK": "0"}, "were started by torchrun; start them with mlx.launch"),
        ("torch", {}, {"MLX_RANK": "0"}, "were started by mlx.launch; start them with torchrun"),
    ],
)
def test_combinations_that_cannot_train(tmp_path, monkeypatch, backend, changes, environment, message):
    if not is_installed(backend):
        pytest.skip("its framework is not installed")
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    recipe = parse(
        {"run": str(tmp_path / "run"), "backend": backend, "data": {"train": str(tmp_path / "text.txt")},
         "training": changes}, "here",
    )  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check(recipe)
    assert not (tmp_path / "run").exists()


def test_only_the_folder_of_a_sharded_run_is_gathered(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError, match="expected the folder of a run with distributed='fsdp'"):
        gather_checkpoint(tmp_path, tmp_path / "model")


@pytest.mark.parametrize("damage", [b"", b"\x80\x04garbage", b"cnowhere\nNothing\n."])
def test_a_damaged_list_of_shards_is_named(tmp_path, damage):
    pytest.importorskip("torch")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".metadata").write_bytes(damage)
    with pytest.raises(ValueError, match=r"cannot be read: shards/\.metadata: .*delete this folder"):
        gather_checkpoint(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@BOTH
def test_a_stop_in_one_process_stops_both_and_the_run_goes_on(tmp_path, backend):
    tokens(tmp_path)
    tokens(tmp_path, "held out", TEXT[:100])
    run(backend, 2, str(tmp_path), "whole", "8")
    run(backend, 2, str(tmp_path), "parts", "8", "stop")
    assert len(losses(tmp_path, "parts")) == 4
    states = {path.name for path in (tmp_path / "parts" / "checkpoints" / "step-00000004").glob("state-*")}
    assert states == {f"state-{i}.safetensors" for i in ("0", "1", "1-0", "1-1")}
    run(backend, 2, str(tmp_path), "parts", "8", "resume")
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
