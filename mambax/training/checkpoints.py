"""Checkpoints of a run: folders ``step-00000200`` that appear complete or not at all.

Each is a checkpoint in Hugging Face layout, which :func:`mambax.load` and transformers open (of a model with
adapters, those alone, in PEFT's layout; of one that is spread over processes, its shards, see
:mod:`mambax.training.gathering`), with what training needs beside it: ``optimizer.safetensors`` (moments and
random states), ``state-<i>.safetensors`` (the recurrent state of each part of a batch, where it is carried on;
``state-<process>-<i>.safetensors`` of further processes) and ``training.json``, which lists these states with their
digests. It is written beside its place, flushed to the disk and renamed, so that a process killed at any moment
leaves the one before.
"""

from __future__ import annotations

import hashlib
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
from mambax.training.together import Together
from mambax.training.whole import unreadable

INFO = "training.json"
_FORMAT = {"format": "mambax-training", "version": 1}
_NOTHING = type(None)
_NEEDED: dict[str, tuple[type, ...]] = {
    "step": (int,), "states": (int, dict), "config": (dict,), "data": (str,), "backend": (str,), "tokens": (int,),
    "seconds": (int, float), "best": (dict, _NOTHING), "evaluation": (dict, _NOTHING),
}  # fmt: skip
"""What there must be in ``training.json``, and of which types."""
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
            ProcessFailed: when another process raised one of these.
        """
        target = self.path(step)
        token = secrets.token_hex(4) if engine.processes == 1 else "0" * 8  # one folder for all processes
        staging = self.folder / f".{target.name}.{token}.tmp"
        try:
            with Together(engine, "making the folder of a checkpoint"):
                if engine.process == 0:
                    shutil.rmtree(staging, ignore_errors=True)
                    staging.mkdir(parents=True)
            with Together(engine, "writing a checkpoint"):
                for i, state in enumerate(states):
                    state.save(staging / _state_file(engine.process, i))
                engine.save(staging)
            names = _state_files(engine, len(states))
            with Together(engine, "writing a checkpoint"):
                if engine.process == 0:
                    digests = {name: _digest(staging / name) for name in names}
                    (staging / INFO).write_bytes(dump_object(_FORMAT | {"step": step, "states": digests} | info))
                    _flush(staging)
                    staging.replace(target)
                    _flush_folder(self.folder)
        finally:
            if engine.process == 0:
                shutil.rmtree(staging, ignore_errors=True)
        return target

    def read(self, path: Path, process: int = 0) -> Saved:
        """Read what a checkpoint says, and where the states of a process are; :meth:`Engine.load` reads the rest.

        Raises:
            ValueError: when it is damaged or not complete, saying how to go back to another one.
        """
        try:
            info = read_object(path / INFO)
            if {key: info.get(key) for key in _FORMAT} != _FORMAT:
                raise ValueError(f"{path / INFO}: expected {_FORMAT}")
            for name, kinds in _NEEDED.items():
                if not isinstance(info.get(name, ...), kinds):
                    found = repr(info[name]) if name in info else "missing"
                    expected = " or ".join(kind.__name__ for kind in kinds)
                    raise ValueError(f"{path / INFO}: {name} is {found}; expected {expected}")
            states = _check_states(path, info["states"], process)
        except (ValueError, OSError) as error:
            raise unreadable(path, error) from error
        return Saved(info, states)

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


def _state_files(engine: Engine, own: int) -> list[str]:
    """The names of the states of all processes, of which each says how many it has."""
    counts = [float(own if number == engine.process else 0) for number in range(engine.processes)]
    totals = engine.sum_over_processes(counts)
    return [_state_file(number, i) for number, count in enumerate(totals) for i in range(int(count))]


def _check_states(path: Path, listed: int | dict[str, str], process: int) -> tuple[Path, ...]:
    """Where the states of a process are, after all that a checkpoint lists were found, and its own were whole.

    Args:
        path: the checkpoint.
        listed: digests by file; of a checkpoint from before there were any, how many states process 0 had.
        process: of which the states are.

    Raises:
        ValueError: for a state that is missing, and one with another content.
    """
    if isinstance(listed, int):
        count = listed if process == 0 else len(list(path.glob(f"state-{process}-*.safetensors")))
        return tuple(path / _state_file(process, i) for i in range(count))
    found = {file.name for file in path.glob("state-*.safetensors")}
    if missing := sorted(listed.keys() - found):
        raise ValueError(
            f"expected the states that its rows carry on, {len(listed)} files state-*.safetensors, found "
            f"{len(listed) - len(missing)} of them: {missing[0]} is missing; copy all files of the checkpoint, to "
            "a folder that all processes see"
        )
    own = tuple(path / name for i in range(len(listed)) if (name := _state_file(process, i)) in listed)
    for file in own:
        if _digest(file) != listed[file.name]:
            raise ValueError(f"{file.name} is not the state that was saved: its content has another digest")
    return own


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


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
