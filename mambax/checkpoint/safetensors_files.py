"""Safetensors files: a strict reader and an atomic writer.

The format is eight bytes of header length, a JSON header and the data
(https://github.com/huggingface/safetensors#format). Other readers accept holes, trailing bytes, negative sizes and
duplicate keys; here each of them is an error, since each means that the file is not what its writer meant.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mambax.checkpoint.json_files import parse_object
from mambax.checkpoint.mapping import AVAILABLE, MappedFile, identity_of
from mambax.checkpoint.tensors import TensorInfo, check_not_pointer, read_range

HEADER_LIMIT = 16 * 2**20
"""Bytes. A Mamba model of 64 blocks needs about 80 thousand."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The dtypes of the format by their names in it."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY = {"dtype", "shape", "data_offsets"}
_AGAIN = "the file is damaged or not safetensors; download or write it again"


class SafetensorsFile:
    """A safetensors file, its whole header checked on construction.

    Args:
        path: the file.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_not_pointer(path)
        self.mapped: MappedFile | None = None
        self._identity = identity_of(path)
        header, start, size = _read_header(path)
        self.metadata = _check_metadata(header.pop("__metadata__", {}), path)
        spans: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            self.tensors[name], spans[name] = _check_entry(name, entry, path)
        end = 0
        for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
            if begin != end:
                kind = "overlaps the tensor before it" if begin < end else f"leaves a hole of {begin - end} bytes"
                raise ValueError(f"{path}: tensor {name!r} starts at {begin}, expected {end}; it {kind}; {_AGAIN}")
            end = stop
        if start + end != size:
            kind = "is truncated" if size < start + end else "has bytes that belong to no tensor"
            raise ValueError(
                f"{path}: the file {kind}: expected {start + end} bytes, found {size}; download or write it again"
            )
        self._offsets = {name: start + begin for name, (begin, _) in spans.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor of this name, read now into an array of its own."""
        return read_range(self.path, self._offsets[name], self.tensors[name])

    def view(self, name: str) -> np.ndarray | None:
        """The tensor of this name where it lies in the file; None where it has to be read.

        Raises:
            ValueError: when the file is not the one whose header was read.
        """
        offset, info = self._offsets[name], self.tensors[name]
        if not AVAILABLE or offset % info.dtype.itemsize or not info.nbytes:
            return None
        if self.mapped is None:
            try:
                self.mapped = MappedFile(self.path, self._identity)
            except OSError:  # not every file system can; what is read is the same
                return None
        return self.mapped.array(offset, info)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the data start, size of the file); all in bytes."""
    size = path.stat().st_size
    if size < 10:
        raise ValueError(f"{path}: {size} bytes; expected a safetensors file of at least 10; {_AGAIN}")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(HEADER_LIMIT, size - 8):
            limit = f"at most {HEADER_LIMIT}, within a file of {size}"
            raise ValueError(f"{path}: a header of {length} bytes is announced; expected {limit}; {_AGAIN}")
        text = file.read(length)
    return parse_object(text, f"{path}, header"), 8 + length, size


def _check_metadata(metadata: object, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ is not an object of strings; {_AGAIN}")
    return metadata


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_entry(name: str, entry: object, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    if not name or len(name) > 1024 or not name.isprintable():
        raise ValueError(f"{path}: {name[:80]!r} is not the name of a tensor; {_AGAIN}")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise ValueError(f"{path}: tensor {name!r} needs exactly dtype, shape and data_offsets; {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"{path}: tensor {name!r} has dtype {str(dtype)[:80]!r}; expected one of {known}")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or len(value) > 16 or not all(map(_is_size, value)):
            raise ValueError(
                f"{path}: tensor {name!r} has {field} {str(value)[:80]}; expected whole numbers from 0 up; {_AGAIN}"
            )
    info = TensorInfo(DTYPES[dtype], tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(
            f"{path}: tensor {name!r}, {info}, needs {info.nbytes} bytes, but has data_offsets {offsets}; {_AGAIN}"
        )
    return info, (offsets[0], offsets[1])


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write a file that appears under its name complete or not at all.

    Args:
        path: the file; one that exists is replaced at the end.
        tensors: name -> dtype and shape of what is written.
        read: gives the values of a name; called for one after another, so that they need not all be in memory.
        metadata: strings by name, kept in the header.

    Raises:
        ValueError: when a value has not the announced dtype and shape.
        OSError: when the file cannot be written; what was there is untouched.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        info = tensors[name]
        begin, end = end, end + info.nbytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)

    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                array, info = read(name), tensors[name]
                if array.dtype != info.dtype or array.shape != info.shape:
                    raise ValueError(f"{name}: expected {info}, found {array.dtype.name} {list(array.shape)}")
                if math.prod(info.shape):
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
