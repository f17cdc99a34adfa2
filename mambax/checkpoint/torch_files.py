"""``pytorch_model.bin`` without torch: the zip format (torch 1.6 and later) and the legacy one before it.

Either is a pickle that describes tensors over storages, and the storages' elements. The pickle is read by
:mod:`mambax.checkpoint.restricted_pickle`; here every storage is located in the file, and every tensor checked to
lie within its storage, before anything is allocated.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from mambax.checkpoint import restricted_pickle
from mambax.checkpoint.restricted_pickle import StorageRef, TensorRef
from mambax.checkpoint.tensors import TensorInfo, check_not_pointer, read_range

PICKLE_LIMIT = 16 * 2**20
"""Bytes. The pickle of a Mamba model of 64 blocks has about 100 thousand."""

DTYPES: dict[str, np.dtype] = dict(
    zip(
        restricted_pickle.STORAGES,
        map(
            np.dtype,
            (
                np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int32, np.int16, np.int8,
                np.uint8, np.bool_,
            ),
        ),
        strict=True,
    )
)  # fmt: skip
"""What the storages of each class hold."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
_AGAIN = "the file is damaged; download it again"
_BLOCK = 2**20


@dataclass(frozen=True)
class _Record:
    """Where a storage lies in the file: offset and nbytes, and its checksum where the format has one."""

    offset: int
    nbytes: int
    crc: int | None = None


@dataclass(frozen=True)
class _View:
    """A tensor over a record, checked: offset and strides in elements."""

    record: _Record
    offset: int
    strides: tuple[int, ...]
    extent: int  # elements from the first to the last, both included
    dense: bool  # they lie one after another, in the order of the tensor


class TorchFile:
    """A file written by ``torch.save(state_dict)``, checked on construction.

    Args:
        path: the file.

    Raises:
        ValueError: naming the file, and the tensor or the name that is refused. Nothing in the file is run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_not_pointer(path)
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            state, records = _read_zip(path)
        elif start[:1] == b"\x80":
            state, records = _read_legacy(path)
        else:
            raise ValueError(f"{path}: not a file of torch.save: expected a zip or a pickle; download it again")
        self.tensors: dict[str, TensorInfo] = {}
        self._views: dict[str, _View] = {}
        for name, ref in state.items():
            self.tensors[name], self._views[name] = _check_tensor(name, ref, records, path)
        self._verified: set[int] = set()

    mapped = None

    def view(self, name: str) -> None:
        """None: such a file has to be read, since its checksums would be looked at no more."""

    def read(self, name: str) -> np.ndarray:
        """The tensor of this name, read now into an array of its own.

        Raises:
            ValueError: when the data do not match their checksum.
        """
        info, view = self.tensors[name], self._views[name]
        whole = view.offset == 0 and view.extent * info.dtype.itemsize == view.record.nbytes
        if not whole:
            self._verify(view.record)
        start = view.record.offset + view.offset * info.dtype.itemsize
        flat = read_range(self.path, start, TensorInfo(info.dtype, (view.extent,)))
        if whole and view.record.crc is not None:
            _compare(zlib.crc32(flat.view(np.uint8).data), view.record, self.path)
        if view.dense:
            return flat.reshape(info.shape)
        strides = tuple(stride * info.dtype.itemsize for stride in view.strides)
        return np.lib.stride_tricks.as_strided(flat, info.shape, strides).copy()

    def _verify(self, record: _Record) -> None:
        """Compare a record that several tensors share with its checksum, once, in little memory."""
        if record.crc is None or record.offset in self._verified:
            return
        crc, left = 0, record.nbytes
        with self.path.open("rb") as file:
            file.seek(record.offset)
            while left and (block := file.read(min(left, _BLOCK))):
                crc, left = zlib.crc32(block, crc), left - len(block)
        _compare(crc, record, self.path)
        self._verified.add(record.offset)


def _tensor_refs(value: object, path: Path) -> dict[str, TensorRef]:
    """What was unpickled, if it is a dictionary of tensors."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found {type(value).__name__}")
    for name, ref in value.items():
        if not isinstance(ref, TensorRef):
            raise ValueError(
                f"{path}: {name[:80]!r} is no tensor but {type(ref).__name__}; expected the plain state_dict() of "
                "a model, without optimizer or trainer state around it"
            )
    return value


def _read_zip(path: Path) -> tuple[dict[str, TensorRef], dict[str, _Record]]:
    """Every tensor by name and every storage by key."""
    records = _zip_records(path)
    pickles = [name for name in records if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickles) != 1 or records[pickles[0]].nbytes > PICKLE_LIMIT:
        raise ValueError(f"{path}: expected one data.pkl of at most {PICKLE_LIMIT} bytes in the zip; {_AGAIN}")
    prefix = pickles[0].removesuffix("data.pkl")
    order = records.get(prefix + "byteorder")
    if order is not None and (order.nbytes > 16 or _content(path, order) != b"little"):
        raise ValueError(f"{path}: written on a big-endian machine, which is not supported")
    value, _ = restricted_pickle.load(_content(path, records[pickles[0]]), 0, str(path))
    data = prefix + "data/"
    storages = {name.removeprefix(data): record for name, record in records.items() if name.startswith(data)}
    return _tensor_refs(value, path), storages


def _zip_records(path: Path) -> dict[str, _Record]:
    """Where each entry of a zip lies; only the directory is read by zipfile.

    Compressed, encrypted and overlapping entries, which torch never writes, are refused.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
        raise ValueError(f"{path}: truncated, or not a file of torch.save ({error}); {_AGAIN}") from error
    records: dict[str, _Record] = {}
    end = 0
    with path.open("rb") as file:
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not stored or entry.flag_bits & 0x1:
                raise ValueError(f"{path}: {entry.filename!r} is compressed or encrypted; save the weights again")
            file.seek(max(entry.header_offset, 0))
            header = file.read(30)
            if entry.header_offset < end or entry.filename in records or header[:4] != b"PK\x03\x04":
                raise ValueError(f"{path}: {entry.filename!r} is not where the zip says, or is twice; {_AGAIN}")
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30].ljust(4, b"\0")))
            records[entry.filename] = _Record(start, entry.file_size, entry.CRC)
            end = start + entry.file_size
    if end > path.stat().st_size:
        raise ValueError(f"{path}: the zip is truncated; {_AGAIN}")
    return records


def _content(path: Path, record: _Record) -> bytes:
    """The bytes of a record, which match its checksum."""
    content = read_range(path, record.offset, TensorInfo(np.dtype(np.uint8), (record.nbytes,))).tobytes()
    _compare(zlib.crc32(content), record, path)
    return content


def _compare(crc: int, record: _Record, path: Path) -> None:
    if crc != record.crc:
        raise ValueError(f"{path}: the data at byte {record.offset} do not match their checksum; {_AGAIN}")


def _read_legacy(path: Path) -> tuple[dict[str, TensorRef], dict[str, _Record]]:
    """Every tensor by name and every storage by key: five pickles, then size and elements of each storage."""
    size, where = path.stat().st_size, str(path)
    with path.open("rb") as file:
        head = file.read(PICKLE_LIMIT)
    magic, at = restricted_pickle.load(head, 0, where)
    if magic != LEGACY_MAGIC:
        raise ValueError(f"{path}: a pickle, but not one of torch.save; expected its magic number first")
    version, at = restricted_pickle.load(head, at, where)
    if version != LEGACY_VERSION:
        raise ValueError(f"{path}: legacy format version {version!r}; expected {LEGACY_VERSION}")
    system, at = restricted_pickle.load(head, at, where)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(f"{path}: written on a big-endian machine, which is not supported")
    value, at = restricted_pickle.load(head, at, where)
    keys, at = restricted_pickle.load(head, at, where)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{path}: the list of storages is not a list of names; {_AGAIN}")

    state = _tensor_refs(value, path)
    refs = {ref.storage.key: ref.storage for ref in state.values()}
    records: dict[str, _Record] = {}
    with path.open("rb") as file:
        for key in keys:
            file.seek(at)
            count = file.read(8)
            numel = struct.unpack("<q", count)[0] if len(count) == 8 else -1
            if key not in refs or key in records or numel != refs[key].numel:
                raise ValueError(
                    f"{path}: truncated, or storage {key[:80]!r} at byte {at} is not what the tensors use; {_AGAIN}"
                )
            records[key] = _Record(at + 8, numel * DTYPES[refs[key].kind].itemsize)
            at = records[key].offset + records[key].nbytes
    if at != size:
        raise ValueError(f"{path}: expected {at} bytes, found {size}: truncated or damaged; download it again")
    return state, records


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of an array whose elements lie one after another."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _counts(value: object) -> tuple[int, ...] | None:
    """value if it is a tuple of whole numbers from 0 up, as a shape or strides are."""
    if not isinstance(value, tuple) or len(value) > 16:
        return None
    return value if all(type(item) is int and 0 <= item < 2**63 for item in value) else None


def _check_tensor(name: str, ref: TensorRef, records: dict[str, _Record], path: Path) -> tuple[TensorInfo, _View]:
    """Check that a tensor lies within its storage and has no more elements than that."""
    shape, strides, offsets, storage = _counts(ref.shape), _counts(ref.strides), _counts((ref.offset,)), ref.storage
    if shape is None or strides is None or offsets is None or len(shape) != len(strides):
        raise ValueError(f"{path}: tensor {name!r}: shape, strides or offset are no whole numbers from 0; {_AGAIN}")
    info, (offset,) = TensorInfo(DTYPES[storage.kind], shape), offsets
    record = _check_storage(name, storage, records, path)
    numel = math.prod(shape)
    steps = [(size, step) for size, step in zip(shape, strides, strict=True) if size > 1 and numel]
    extent = 1 + sum((size - 1) * step for size, step in steps) if numel else 0
    repeats = numel > extent or any(step == 0 for _, step in steps)
    if repeats or offset + extent > storage.numel:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {list(shape)}, strides {list(strides)} and offset {offset} does not "
            f"fit its storage of {storage.numel} elements, or uses some twice; save a contiguous copy of it"
        )
    dense = all(
        size <= 1 or step == expected
        for size, step, expected in zip(shape, strides, _contiguous(shape), strict=True)
    )
    return info, _View(record, offset, strides, extent, dense or not numel)


def _check_storage(name: str, storage: StorageRef, records: dict[str, _Record], path: Path) -> _Record:
    record = records.get(storage.key)
    if record is None:
        raise ValueError(f"{path}: tensor {name!r}: its data {storage.key[:80]!r} are not in the file; {_AGAIN}")
    expected = storage.numel * DTYPES[storage.kind].itemsize
    if record.nbytes != expected:
        raise ValueError(
            f"{path}: tensor {name!r}: its storage has {record.nbytes} bytes, expected {expected}; {_AGAIN}"
        )
    return record
