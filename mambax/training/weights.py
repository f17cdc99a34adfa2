"""The weights in a checkpoint of a run: the whole model, or of one with adapters those alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mambax.adapters.adding import own_names
from mambax.adapters.files import CONFIG, WEIGHTS, by_parameter, save_adapter
from mambax.checkpoint.layouts import checkpoint_name


def is_saved(model: Any, name: str) -> bool:
    """Whether the parameter at a path is in a checkpoint of the model."""
    return model.adapter is None or name in own_names(model)


def write_weights(model: Any, folder: Path) -> None:
    """Write what training changes: a checkpoint in Hugging Face layout, or the adapters in PEFT's."""
    if model.adapter is None:
        model.save_pretrained(folder)
    else:
        save_adapter(model, folder)


def by_path(model: Any, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by their paths in the model; those that it does not know keep their names."""
    if model.adapter is not None:
        return by_parameter(model, weights)
    paths = {checkpoint_name(path, model.config): path for path in model.nn.parameters(model)}
    return {paths.get(name, name): array for name, array in weights.items()}


def copy_adapter(source: Path, target: Path) -> Path:
    """Put the adapters of a checkpoint where they are easy to find."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(source / name, target / name)
    return target
