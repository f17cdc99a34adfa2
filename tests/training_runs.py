"""Small runs that the tests of training share, and that a child process repeats to be killed in.

python training_runs.py BACKEND FOLDER STEPS [where to be killed, or where the disk is full]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import mambax
from mambax.training import Reading, Stream, TokenDataset, Trainer, TrainingConfig, checkpoints, vocabularies
from mambax.training import write_tokens as write
from mambax.training.logs import read_log

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 12
MODEL: dict[str, Any] = {"d_model": 8, "n_layer": 2, "d_state": 4, "d_conv": 3, "dt_rank": 2, "vocab_size": 128}


def tokens(folder: Path, name: str = "tokens", text: str = TEXT) -> TokenDataset:
    """The text as bytes, in two documents."""
    if (folder / name).exists():
        return TokenDataset(folder / name)
    half = len(text) // 2
    return write([[text[:half]], [text[half:]]], vocabularies.byte_tokenizer(), folder / name)


def config(**changes: Any) -> TrainingConfig:
    """A short run that writes often."""
    fields: dict[str, Any] = {
        "steps": 12, "batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 1,
        "log_every": 1, "eval_every": 5, "save_every": 2,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


class Losses(dict[int, float]):
    """An observer: loss by step."""

    def __call__(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind == "step":
            self[record["step"]] = record["loss"]


def trainer(backend: str, run: Path, data: Path, *, observers: tuple[Any, ...] = (), **changes: Any) -> Trainer:
    """A trainer on readers that carry their state, in two parts."""
    made = config(**({"micro_batch_size": 3} | changes))
    model = mambax.from_config(mambax.MambaLMConfig(**MODEL), backend=backend, seed=made.seed)
    reading = Reading(tokens(data), 9, made.batch_size, restart=0.2, seed=made.seed)
    validation = Stream(tokens(data, "held out", TEXT[:100]), 30, 2)
    return Trainer(model, reading, made, run, validation=validation, observers=observers)


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: model.nn.to_numpy(array).copy() for name, array in model.nn.parameters(model).items()}


def losses_of(backend: str, folder: Path, *, resume: bool = False, **changes: Any) -> Losses:
    """Loss by step of a run that is not killed."""
    found = Losses()
    trainer(backend, folder / "run", folder, observers=(found,), **changes).train(resume=resume)
    return found


def logged(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run) if "loss" in record}


def kill_in_a_write(number: int) -> None:
    """Kill this process in the middle of its ``number``-th checkpoint."""
    flush, written = checkpoints._flush, [0]

    def flush_or_die(folder: Path) -> None:
        written[0] += 1
        if written[0] == number:
            os.truncate(folder / "model.safetensors", 100)
            os.kill(os.getpid(), signal.SIGKILL)
        flush(folder)

    checkpoints._flush = flush_or_die


def fill_the_disk(size: int) -> None:
    """Let no file of this process grow beyond a size: the system refuses to write, in the middle of a file."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main() -> None:
    backend, folder, steps, *where = sys.argv[1:]
    if where and where[0].startswith("write"):
        kill_in_a_write(int(where[0].removeprefix("write")))

    def kill_in_a_step(kind: str, record: Mapping[str, Any]) -> None:
        if kind == "step" and where and where[0] == f"step{record['step']}":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "step" and where and where[0] == f"full{record['step']}":
            fill_the_disk(5000)
        if kind in ("start", "step") and where and where[0] == "tell":
            print(kind, flush=True)

    run = Path(folder) / "run"
    changes = {key: json.loads(value) for key, _, value in (text.partition("=") for text in where) if value}
    made = trainer(backend, run, Path(folder), observers=(kill_in_a_step,), steps=int(steps), **changes)
    made.train(resume=made.checkpoints.latest() is not None)


if __name__ == "__main__":
    main()
