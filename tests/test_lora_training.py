"""Adapters in the training loop, and the example that fine-tunes with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import WITH_GRADIENTS, backend_params, run
from tolerances import assert_close
from training_runs import MODEL, TEXT, Losses, config, tokens

import mambax
from mambax.adapters import add_lora, load_adapter
from mambax.training import Trainer, Windows

ROOT = Path(__file__).parent.parent
TRAINED = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))


def trainer(backend: str, folder: Path, losses: Losses, **changes: object) -> Trainer:
    model = mambax.from_config(mambax.MambaLMConfig(**MODEL), backend=backend, seed=0)
    add_lora(model, ["in_proj", "x_proj", "dt_proj", "out_proj"], rank=2)
    data = Windows(tokens(folder), 9, 4)
    made = config(learning_rate=3e-2, eval_every=0, **changes)
    return Trainer(model, data, made, folder / "run", observers=[losses])


@TRAINED
def test_only_the_adapters_learn_and_a_resumed_run_is_the_same(tmp_path, backend):
    whole, parts = Losses(), Losses()
    made = trainer(backend, tmp_path / "whole", whole)
    before = {n: made.model.nn.to_numpy(a).copy() for n, a in made.model.nn.parameters(made.model).items()}
    summary = made.train()
    for name, array in made.model.nn.parameters(made.model).items():
        same = np.array_equal(made.model.nn.to_numpy(array), before[name])
        assert same != (".lora_" in name), name
    assert min(whole.values()) < whole[1] - 0.02
    assert {path.name for path in summary.checkpoint.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "training.json",
    }  # fmt: skip

    class Stop(Exception):
        pass

    def stop(kind: str, record: dict) -> None:
        if kind == "step" and record["step"] == 7:
            raise Stop

    first = trainer(backend, tmp_path / "parts", parts)
    first.observers = (*first.observers, stop)
    with pytest.raises(Stop):
        first.train()
    again = trainer(backend, tmp_path / "parts", parts)
    again.train(resume=True)
    assert dict(parts) == dict(whole)

    plain = mambax.from_config(mambax.MambaLMConfig(**MODEL), backend="numpy", seed=0)
    loaded = load_adapter(plain, tmp_path / "whole" / "run" / "adapter")
    ids = np.arange(12)[None]
    assert_close(run(loaded, ids)[0], run(made.model, ids)[0])


@TRAINED
def test_the_example(tmp_path, backend):
    (tmp_path / "text.txt").write_text(TEXT * 4, "utf-8", newline="\n")
    command = [sys.executable, str(ROOT / "examples" / "finetune_lora.py"), str(tmp_path / "text.txt")]
    command += [str(tmp_path / "run"), "--model", str(ROOT / "models" / "tinyshakespeare"), "--backend", backend]
    options = ["--steps", "6", "--batch", "4", "--length", "24", "--rank", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "weights learn" in done.stdout
    assert "nats per character" in done.stdout
    merged = mambax.load(tmp_path / "run" / "merged", backend="numpy")
    base = mambax.load(ROOT / "models" / "tinyshakespeare", backend="numpy")
    adapted = load_adapter(base, tmp_path / "run" / "adapter")
    ids = np.arange(20)[None]
    assert_close(run(merged, ids)[0], run(adapted, ids)[0])
