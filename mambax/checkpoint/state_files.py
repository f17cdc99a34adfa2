"""Recurrent states in files: safetensors, the same for every backend.

``tokens_seen`` (B,) int64; for each block i ``layers.i.conv_state`` (B, K-1, D) and ``layers.i.ssm_state``
(B, D, N).

Dimensions: B batch, K d_conv, D d_inner, N d_state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mambax.checkpoint.safetensors_files import SafetensorsFile, write_safetensors
from mambax.checkpoint.tensors import FLOATS, TensorInfo, is_finite

FORMAT = "mambax-state"
VERSION = "1"


class StateShape(NamedTuple):
    """What two states, or a state and a model, must have in common. d_past is d_conv - 1."""

    layers: int
    d_past: int
    d_inner: int
    d_state: int

    def __str__(self) -> str:
        return f"{self.layers} layers, d_conv {self.d_past + 1}, d_inner {self.d_inner}, d_state {self.d_state}"


def write_state(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a state; the file appears complete or not at all.

    Raises:
        ValueError: when a value is not finite.
        OSError: when the file cannot be written.
    """
    for name, array in arrays.items():
        if array.dtype in FLOATS.values() and not is_finite(array):
            raise ValueError(f"{name} of the state has values that are NaN or infinite; the state was not saved")
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, infos, lambda name: arrays[name], {"format": FORMAT, "version": VERSION})


def read_state(path: Path, expected: StateShape | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of a state, in the dtypes in which they were saved.

    Args:
        path: a file of :func:`write_state`.
        expected: what the state must fit, checked before anything is read; None for any.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a state, or not one that fits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a state written by state.save(path)")
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a state of mambax; expected a file written by state.save(path)")
    version = file.metadata.get("version", "none")
    if version != VERSION:
        raise ValueError(
            f"{path}: state format {version[:20]!r}; this mambax reads {VERSION!r}; update mambax, or save the "
            "state again"
        )
    found = _check(file)
    if expected is not None and found != expected:
        raise ValueError(
            f"{path}: a state of {found}; this model needs {expected}; load it with the model it is of"
        )
    arrays = {name: file.read(name) for name in file.tensors}
    for name, array in arrays.items():
        if not (array.min(initial=0) >= 0 if name == "tokens_seen" else is_finite(array)):
            raise ValueError(f"{path}: {name} has values that no model produces (NaN, infinite or negative counts)")
    return arrays


def _check(file: SafetensorsFile) -> StateShape:
    """The shape of a state whose tensors are complete and agree with each other."""
    tensors = file.tensors
    layers = sum(name.endswith(".conv_state") for name in tensors)
    names = {f"layers.{i}.{kind}" for i in range(layers) for kind in ("conv_state", "ssm_state")} | {"tokens_seen"}
    if layers < 1 or names != tensors.keys():
        first = min(names ^ tensors.keys(), default="layers.0.conv_state")
        raise ValueError(f"{file.path}: {first!r} is missing or unexpected in a state; save the state again")
    seen, conv, ssm = tensors["tokens_seen"], tensors["layers.0.conv_state"], tensors["layers.0.ssm_state"]
    shapes = len(seen.shape) == 1 and len(conv.shape) == 3 and len(ssm.shape) == 3
    shapes = shapes and conv.shape[0] == ssm.shape[0] == seen.shape[0] and conv.shape[2] == ssm.shape[1]
    if not shapes or seen.dtype != np.int64 or {conv.dtype, ssm.dtype} - set(FLOATS.values()):
        raise ValueError(
            f"{file.path}: tokens_seen {seen}, conv_state {conv} and ssm_state {ssm} do not belong together; "
            "expected int64 [B], float [B, d_conv - 1, d_inner], float [B, d_inner, d_state]; save the state again"
        )
    for name, info in tensors.items():
        first = {"conv_state": conv, "ssm_state": ssm}.get(name.rpartition(".")[2], seen)
        if info != first:
            raise ValueError(f"{file.path}: {name} is {info}, expected {first} as in the first layer")
    return StateShape(layers, conv.shape[1], conv.shape[2], ssm.shape[2])
