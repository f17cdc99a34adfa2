"""The files of a checkpoint that one process writes: the model, and what its optimiser needs to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mambax.adapters.files import WEIGHTS as ADAPTER_WEIGHTS
from mambax.checkpoint.loading import load
from mambax.checkpoint.safetensors_files import SafetensorsFile, write_safetensors
from mambax.checkpoint.sources import open_source
from mambax.checkpoint.tensors import TensorInfo
from mambax.checkpoint.weights import open_weights
from mambax.training.engine import WholeEngine
from mambax.training.weights import by_path, copy_adapter

OPTIMIZER = "optimizer.safetensors"


def save_whole(engine: WholeEngine, folder: Path) -> None:
    """Write the model and the arrays of an engine; process 0 does.

    Raises:
        ValueError: for weights that are not finite.
        OSError: when a file cannot be written.
    """
    if engine.process == 0:
        engine.save_model(folder)
        write_arrays(folder / OPTIMIZER, engine.arrays())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name.

    Raises:
        OSError: when the file cannot be written.
    """
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, infos, lambda name: arrays[name], {})


def load_whole(engine: WholeEngine, folder: Path) -> None:
    """Give an engine back what :func:`save_whole` wrote.

    Raises:
        ValueError: when it is damaged, or of another model.
    """
    try:
        adapter = folder / ADAPTER_WEIGHTS
        files: Any = SafetensorsFile(adapter) if adapter.is_file() else None
        files = open_weights(open_source(folder)) if files is None else dict.fromkeys(files.tensors, files)
        weights = {name: file.read(name) for name, file in files.items()}
        optimizer = SafetensorsFile(folder / OPTIMIZER)
        arrays = {name: optimizer.read(name) for name in optimizer.tensors}
    except (ValueError, OSError) as error:
        raise unreadable(folder, error) from error
    engine.restore(by_path(engine.model, weights), arrays)


def export_whole(engine: WholeEngine, checkpoint: Path, folder: Path) -> None:
    """Write the model in a checkpoint in Hugging Face layout, or copy its adapters; process 0 does."""
    if engine.process:
        return
    if engine.model.adapter is not None:
        copy_adapter(checkpoint, folder)
    else:
        load(checkpoint, backend="numpy", dtype="float32").save_pretrained(folder)


def unreadable(folder: Path, error: BaseException | str) -> ValueError:
    """What to say of a damaged checkpoint, and of what is wrong with it."""
    return ValueError(
        f"{folder}: this checkpoint cannot be read: {error}. To go on from the one before, delete this folder"
    )
