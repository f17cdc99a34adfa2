"""What a checkpoint says of its run, and whether a run is the same one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambax.training.batches import TrainingData
from mambax.training.config import HARMLESS, TrainingConfig
from mambax.training.engine import Engine
from mambax.training.evaluation import Evaluation
from mambax.training.whole import unreadable

Evaluated = tuple[int, Evaluation]
"""After how many steps, and what was found."""


def identity(config: TrainingConfig, data: TrainingData, engine: Engine) -> dict[str, Any]:
    """What decides the losses of a run, as plain values."""
    return {
        "config": {name: list(v) if isinstance(v, tuple) else v for name, v in config.to_dict().items()},
        "data": data.fingerprint(),
        "backend": engine.model.nn.name,
        "processes": engine.processes,
    }


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], data: TrainingData, path: Path) -> None:
    """Refuse a checkpoint of another run.

    Args:
        saved: what the checkpoint says.
        now: :func:`identity` of this run.
        data: of this run.
        path: of the checkpoint.

    Raises:
        ValueError: with all that differs.
    """
    # a field that there was not when the checkpoint was written has its default, as the run then had
    old, new = TrainingConfig(steps=now["config"]["steps"]).to_dict() | saved["config"], now["config"]
    different = [
        f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if key not in HARMLESS and old.get(key) != new.get(key)
    ]
    different += [
        f"{name}: {saved[name]!r} in the checkpoint, {now[name]!r} now"
        for name in ("data", "backend")
        if saved[name] != now[name]
    ]
    before, processes = saved.get("processes", 1), now["processes"]
    if data.carries_state and before != processes:
        different.append(f"processes: {before} in the checkpoint, {processes} now, and their rows carry states")
    if different:
        raise ValueError(
            f"{path}: not resumed, because the run would not be the same one:\n  "
            + "\n  ".join(different)
            + "\nUse the values of the checkpoint, or begin another run in another folder"
        )


def to_plain(evaluated: Evaluated | None) -> dict[str, Any] | None:
    """An evaluation as a checkpoint has it."""
    return None if evaluated is None else {"step": evaluated[0], **vars(evaluated[1])}


def from_plain(numbers: Mapping[str, Any] | None, path: Path) -> Evaluated | None:
    """What :func:`to_plain` gave, from a checkpoint.

    Raises:
        ValueError: when it is something else.
    """
    if numbers is None:
        return None
    try:
        return numbers["step"], Evaluation(**{name: value for name, value in numbers.items() if name != "step"})
    except (KeyError, TypeError) as error:
        raise unreadable(path, f"an evaluation is {dict(numbers)}") from error
