"""Recurrent states in files: safetensors, the same for every backend.

``tokens_seen`` (B,) int64; for each block i that keeps a state its arrays ``layers.i.<field>_state``, as
``layers.i.conv_state`` (B, K-1, D) and ``layers.i.ssm_state`` (B, D, N); see :mod:`mambax.layer_states`. The number
of blocks is in the metadata.

Dimensions: B batch, K d_conv, D d_inner, N d_state.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mambax.checkpoint.safetensors_files import SafetensorsFile, write_safetensors
from mambax.checkpoint.tensors import FLOATS, TensorInfo, is_finite
from mambax.layer_states import KINDS

FORMAT = "mambax-state"
VERSION = "1"


_NAME = re.compile(r"layers\.(0|[1-9]\d{0,4})\.([a-z]+)_state")

Shapes = dict[str, tuple[int, ...]]
"""Array name -> shape without its first axis, which is the batch."""


def write_state(path: Path, arrays: Mapping[str, np.ndarray], count: int) -> None:
    """Write the arrays of a state of ``count`` blocks; the file appears complete or not at all.

    Raises:
        ValueError: when a value is not finite.
        IsADirectoryError: when it is the path of a folder.
        OSError: when the file cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file to write, found a folder; add a name to it")
    for name, array in arrays.items():
        if array.dtype in FLOATS.values() and not is_finite(array):
            raise ValueError(f"{name} of the state has values that are NaN or infinite; the state was not saved")
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "version": VERSION, "layers": str(count)}
    write_safetensors(path, infos, lambda name: arrays[name], metadata)


def read_state(
    path: Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Read the arrays of a state, in the dtypes in which they were saved, and how many blocks it is of.

    Args:
        path: a file of :func:`write_state`.
        expected: the shapes, by array name, of a state of the model that is to go on from it, of any batch; checked
            before anything is read. None for any model.

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
    count = _check(file)
    if expected is not None:
        needed: Shapes = {name: shape[1:] for name, shape in expected.items()}
        found: Shapes = {name: info.shape[1:] for name, info in file.tensors.items()}
        if found.keys() != needed.keys() or not all(fits(found[name], needed[name]) for name in needed):
            raise ValueError(
                f"{path}: a state of {_summary(found)}; this model needs {_summary(needed)}; load it with the "
                "model it is of"
            )
    arrays = {name: file.read(name) for name in file.tensors}
    for name, array in arrays.items():
        least = 0 if name == "tokens_seen" else -1
        if not (array.min(initial=0) >= least if array.dtype == np.int64 else is_finite(array)):
            raise ValueError(f"{path}: {name} has values that no model produces (NaN, infinite or negative counts)")
    return arrays, count


def fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether an array of a state has the shape of a fresh one's. An axis that is 0 in a fresh state grows."""
    return len(shape) == len(expected) and all(e in (n, 0) for n, e in zip(shape, expected, strict=True))


def _summary(shapes: Shapes) -> str:
    """How many arrays of each kind and shape, in words."""
    counts = Counter((name.rpartition(".")[2], shape) for name, shape in shapes.items() if name != "tokens_seen")
    return ", ".join(f"{count} x {field} {list(shape)}" for (field, shape), count in counts.items())


def _check(file: SafetensorsFile) -> int:
    """Refuse a state that is not complete, or whose arrays do not agree with each other; return its blocks."""
    layers: dict[int, dict[str, TensorInfo]] = {}
    for name, info in file.tensors.items():
        named = _NAME.fullmatch(name)
        if named is not None:
            layers.setdefault(int(named[1]), {})[named[2]] = info
        elif name != "tokens_seen":
            raise _odd(file, name)
    if "tokens_seen" not in file.tensors:
        raise _odd(file, "tokens_seen")
    named_count = file.metadata.get("layers", "")
    count = int(named_count) if named_count.isdecimal() and len(named_count) < 6 else max(layers, default=0) + 1
    if max(layers, default=-1) >= count:
        raise _odd(file, f"layers.{max(layers)}.{min(layers[max(layers)])}_state")
    for i in sorted(layers):
        fields = layers[i].keys()
        kind = max(KINDS, key=lambda kind: len(fields & set(kind._fields)))  # the one that it is most like
        if fields != set(kind._fields):
            raise _odd(file, f"layers.{i}.{min(fields ^ set(kind._fields))}_state")
    _check_agreement(file, file.tensors["tokens_seen"], layers)
    return count


def _odd(file: SafetensorsFile, name: str) -> ValueError:
    return ValueError(f"{file.path}: {name!r} is missing or unexpected in a state; save the state again")


def _check_agreement(file: SafetensorsFile, seen: TensorInfo, layers: Mapping[int, dict[str, TensorInfo]]) -> None:
    """Refuse arrays of different batches, dtypes or sizes."""
    first: dict[tuple[tuple[str, int], ...], int] = {}  # kind of state: fields and ranks -> the first layer of it
    for i in sorted(layers):
        fields = layers[i]
        number = first.setdefault(tuple((field, len(fields[field].shape)) for field in sorted(fields)), i)
        if number == i and not _belong(seen, fields):
            arrays = ", ".join(f"{field}_state {info}" for field, info in fields.items())
            raise ValueError(
                f"{file.path}: tokens_seen {seen} and layers.{i} with {arrays} do not belong together; expected "
                "int64 [B], float conv_state [B, d_conv - 1, channels], ssm_state [B, d_inner, d_state] or [B, "
                "heads, head_dim, d_state]; save the state again"
            )
        for field, info in fields.items():
            if info != layers[number][field]:
                raise ValueError(
                    f"{file.path}: layers.{i}.{field}_state is {info}, expected {layers[number][field]} as in "
                    f"layer {number}"
                )


def _belong(seen: TensorInfo, fields: Mapping[str, TensorInfo]) -> bool:
    if (
        seen.dtype != np.int64
        or len(seen.shape) != 1
        or any(info.shape[:1] != seen.shape for info in fields.values())
    ):
        return False
    floats = {name: info for name, info in fields.items() if name != "number"}
    if {info.dtype for info in floats.values()} - set(FLOATS.values()):
        return False
    if "number" in fields:
        key, value, number = (fields[name] for name in ("key", "value", "number"))
        shaped = len(key.shape) == 4 and key == value and number.shape == (key.shape[0], key.shape[2])
        if not shaped or number.dtype != np.int64:
            return False
    if "conv" in fields and len(fields["conv"].shape) != 3:
        return False
    if "ssm" not in fields:
        return True
    conv, ssm = fields["conv"].shape, fields["ssm"].shape
    heads = len(ssm) == 4 and ssm[1] * ssm[2] <= conv[-1]  # Mamba-2: the convolution is over B and C too
    return heads or (len(ssm) == 3 and conv[2] == ssm[1])
