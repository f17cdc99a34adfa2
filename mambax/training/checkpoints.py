"""Checkpoints of a run: folders ``step-00000200`` that appear complete or not at all.

Each is a checkpoint in Hugging Face layout, which :func:`mambax.load` and transformers open (of a model with
adapters, those alone, in PEFT's layout; of one that is spread over processes, its shards, see
:mod:`mambax.training.gathering`), with what training needs beside it: ``optimizer.safetensors`` (moments and
random states), ``state-<i>.safetensors`` (the recurrent state of each part of a batch, where it is carried on;
``state-<process>-<i>.safetensors`` of further processes) and ``training.json``. It is written beside its place,
flushed to the disk and renamed, so that a process killed at any moment leaves the one before.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambax.checkpoint.json_files import dump_object, read_object
from mambax.state import InferenceParams
from mambax.training.engine import Engine
from mambax.training.whole import unreadable

INFO = "training.json"
_FORMAT = {"format": "mambax-training", "version": 1}
_NAME = re.compile(r"step-(\d{8,})")
_STAGING = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}\.(tmp|old)")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself, and where the states of a process are."""

    info: dict[str, Any]
    states: tuple[Path, ...]


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: where they are; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Of the checkpoint after so many steps."""
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Those that are there, in order."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> Path | None:
        """The last one; None when there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def write(self, step: int, engine: Engine, states: Sequence[InferenceParams], info: dict[str, Any]) -> Path:
        """Write a checkpoint, from all processes.

        Raises:
            ValueError: for weights or states that are not finite.
            OSError: when it cannot be written. Those that are there stay as they are in either case.
        """
        target = self.path(step)
        token = secrets.token_hex(4) if engine.processes == 1 else "0" * 8  # one folder for all processes
        staging = self.folder / f".{target.name}.{token}.tmp"
        if engine.process:
            _write_share(staging, engine, states)
            _wait(engine)
            return target
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _write_share(staging, engine, states)
            (staging / INFO).write_bytes(dump_object(_FORMAT | {"step": step, "states": len(states)} | info))
            _flush(staging)
            staging.replace(target)
            _flush_folder(self.folder)
            _wait(engine)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def read(self, path: Path, process: int = 0) -> Saved:
        """Read what a checkpoint says, and where the states of a process are; :meth:`Engine.load` reads the rest.

        Raises:
            ValueError: when it is damaged, saying how to go back to another one.
        """
        try:
            info = read_object(path / INFO)
            if {key: info.get(key) for key in _FORMAT} != _FORMAT:
                raise ValueError(f"{path / INFO}: expected {_FORMAT}")
        except (ValueError, OSError) as error:
            raise unreadable(path, error) from error
        count = info["states"] if process == 0 else len(list(path.glob(f"state-{process}-*.safetensors")))
        return Saved(info, tuple(path / _state_file(process, i) for i in range(count)))

    def prune(self, keep: set[int]) -> None:
        """Delete all but some, and what killed processes left behind."""
        for step in self.steps():
            if step not in keep:
                # renamed first: a folder with the name of a checkpoint is a whole one
                old = self.folder / f".{self.path(step).name}.{secrets.token_hex(4)}.old"
                self.path(step).replace(old)
        for path in self.folder.glob(".step-*"):
            if _STAGING.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _state_file(process: int, part: int) -> str:
    return f"state-{process}-{part}.safetensors" if process else f"state-{part}.safetensors"


def _write_share(staging: Path, engine: Engine, states: Sequence[InferenceParams]) -> None:
    """What each process writes into the folder that process 0 has made; returns when all of it is there."""
    _wait(engine)
    for i, state in enumerate(states):
        state.save(staging / _state_file(engine.process, i))
    engine.save(staging)
    _wait(engine)


def _wait(engine: Engine) -> None:
    """For all processes to come here."""
    if engine.processes > 1:
        engine.sum_over_processes([0.0])


def _flush(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Windows has no such call, and does not need it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
