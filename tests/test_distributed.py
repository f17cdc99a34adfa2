"""Training in two processes on this machine: the losses of one, in DistributedDataParallel and over MLX's ring."""

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
from harness import WITH_GRADIENTS, backend_params
from tolerances import assert_close
from training_runs import TEXT, tokens

import mambax

CHILD = str(Path(distributed_runs.__file__))
BOTH = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and the ring are tried on Linux and macOS")


def run(backend: str, processes: int, *arguments: str) -> None:
    """A run of distributed_runs.py."""
    launch = [sys.executable]
    if processes > 1 and backend == "torch":
        launch += ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}",
                   "--master-addr=127.0.0.1", f"--master-port={_port()}"]  # fmt: skip
    elif processes > 1:
        script = Path(sysconfig.get_path("scripts")) / "mlx.launch"
        launch = [sys.executable, str(script), "-n", str(processes), "--backend", "ring", "--starting-port",
                  str(_port()), "--env", f"EXPECTED={processes}", "--python", sys.executable]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EXPECTED": str(processes)}
    command = [*launch, CHILD, backend, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def losses(folder: Path, name: str) -> list[float]:
    return list(json.loads((folder / f"{name}.json").read_text("utf-8")).values())


@BOTH
def test_two_processes_learn_as_one_does(tmp_path, backend):
    tokens(tmp_path)
    tokens(tmp_path, "held out", TEXT[:100])
    run(backend, 1, str(tmp_path), "one", "8")
    run(backend, 2, str(tmp_path), "two", "8")
    one, two = losses(tmp_path, "one"), losses(tmp_path, "two")
    assert len(one) == len(two) == 8
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert one[-1] < one[0] - 0.05
    models = [mambax.load(tmp_path / name / "model", backend="numpy") for name in ("one", "two")]
    first, second = (model.nn.parameters(model) for model in models)
    for name, array in first.items():
        assert_close(
            second[name], array, what=name, tolerance=1e-3
        )  # Adam enlarges rounding where gradients vanish


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
