"""A damaged or hostile pytorch_model.bin: each refused, nothing run, and the message says what to do."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_checkpoints import CONFIG, NORM, refused, weights
from checkpoint_writers import write_original

from mambax.checkpoint.torch_files import TorchFile

__all__ = ["weights"]  # fixtures of the tests here


class Evil:
    """What a pickle can do: run a command while it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def zip_of(path: Path, data_pkl: bytes, records: dict[str, bytes] | None = None) -> None:
    """A file in torch's zip format with a pickle of our choice."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)


@pytest.fixture
def binary(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    """An original checkpoint that is good until a test spoils it."""
    return write_original(tmp_path / "binary", CONFIG, weights, vocab_size=24)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_would_run_code(binary: Path, tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "it ran"
    payload = pickle.dumps(OrderedDict(weight=Evil(target)), protocol=protocol)
    pickle.loads(payload)
    assert target.is_dir(), "the pickle is harmless, so that the test shows nothing"
    target.rmdir()
    module = os.mkdir.__module__
    zip_of(binary / "pytorch_model.bin", payload)
    refused(binary, f"refused: the pickle asks for '{module}.mkdir'", "Nothing of it was run", "safetensors")
    if protocol >= 2:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        (binary / "pytorch_model.bin").write_bytes(magic + payload)
        refused(binary, f"refused: the pickle asks for '{module}.mkdir'")
        (binary / "pytorch_model.bin").write_bytes(payload)
        refused(binary, f"refused: the pickle asks for '{module}.mkdir'")
    assert not target.exists()


@pytest.mark.parametrize(
    ("payload", "fragment"),
    [
        (b"\x80\x02cbuiltins\neval\n.", "asks for 'builtins.eval'"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "asks for 'torch.storage._load_from_bytes'"),
        (b"\x80\x02ctorch\nload\n.", "asks for 'torch.load'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses the instruction NEWOBJ"),
        (b"\x80\x02(ios\nsystem\n.", "uses the instruction INST"),
        (b"\x80\x02\x82\x01.", "uses the instruction EXT1"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "applies BUILD to collections.OrderedDict"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls an object of type str"),
        (b"\x80\x02}))s.", "has a dictionary key that is an object of type tuple"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "with other arguments than torch.save writes"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "refers to something that is not a storage"),
        (b"\x80\x02e.", "the pickle is damaged"),
        (b"\x80\x02.", "the pickle is damaged"),
        (b"\x80\x02h\x05.", "the pickle is damaged"),
        (b"\x80\x02}", "the pickle is damaged"),
        (b"", "the pickle is damaged"),
        (b"\x80\x02]q\x00h\x00a.", "expected a dictionary of tensors, found list"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "'a' is no tensor but int"),
        (
            b"\x80\x02}X\x05\x00\x00\x00model}s.",
            "'model' is no tensor but dict",
        ),
    ],
)
def test_other_pickles(binary: Path, payload: bytes, fragment: str) -> None:
    zip_of(binary / "pytorch_model.bin", payload)
    refused(binary, "pytorch_model.bin", fragment)


def tensor_pickle(numel: Any, offset: Any, shape: Any, strides: Any) -> bytes:
    """A dictionary of one float32 tensor over storage "0", with numbers of our choice."""
    parts = [b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("]
    parts += [b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"]
    parts += [pickle.dumps(numel, 2)[2:-1], b"tQ"]
    parts += [pickle.dumps(value, 2)[2:-1] for value in (offset, shape, strides)]
    return b"".join(parts) + b"\x89}tRs."


def test_a_tensor_of_a_pickle_of_ours_is_read(tmp_path: Path) -> None:
    path, data = tmp_path / "a.bin", np.arange(8, dtype=np.float32)
    zip_of(path, tensor_pickle(8, 1, (2, 3), (1, 2)), {"0": data.tobytes()})
    np.testing.assert_array_equal(TorchFile(path).read("a"), [[1, 3, 5], [2, 4, 6]])


@pytest.mark.parametrize(
    ("numbers", "fragment"),
    [
        ((8, 0, (10**12,), (0,)), "does not fit its storage of 8 elements"),
        ((8, 0, (10**6, 10**6), (0, 0)), "does not fit its storage of 8 elements"),
        ((8, 0, (2, 2), (0, 1)), "uses some twice; save a contiguous copy"),
        ((8, 0, (4, 4), (1, 1)), "uses some twice; save a contiguous copy"),
        ((8, 0, (9,), (1,)), "does not fit its storage of 8 elements"),
        ((8, 5, (4,), (1,)), "offset 5 does not fit its storage of 8 elements"),
        ((8, 0, (2, 2), (7, 1)), "does not fit its storage of 8 elements"),
        ((8, -1, (4,), (1,)), "no whole numbers from 0"),
        ((8, 0, (-4,), (1,)), "no whole numbers from 0"),
        ((8, 0, (4,), (-1,)), "no whole numbers from 0"),
        ((8, 0, (4.0,), (1,)), "no whole numbers from 0"),
        ((8, 0, (4,), (1, 1)), "no whole numbers from 0"),
        ((8, 0, 4, 1), "no whole numbers from 0"),
        ((8, 0, (2**70,), (1,)), "no whole numbers from 0"),
        ((10**12, 0, (10**12,), (1,)), "its storage has 32 bytes, expected 4000000000000"),
        ((-8, 0, (4,), (1,)), "a storage without a name or a size"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(binary: Path, numbers: Any, fragment: str) -> None:
    zip_of(binary / "pytorch_model.bin", tensor_pickle(*numbers), {"0": bytes(32)})
    refused(binary, "pytorch_model.bin: ", fragment)


def test_a_storage_that_is_missing(binary: Path) -> None:
    zip_of(binary / "pytorch_model.bin", tensor_pickle(8, 0, (8,), (1,)))
    refused(binary, "its data '0' are not in the file", "download it again")


def test_compressed_records(binary: Path) -> None:
    path = binary / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    refused(binary, "is compressed or encrypted")


def test_data_that_do_not_match_their_checksum(binary: Path, weights: dict[str, np.ndarray]) -> None:
    path = binary / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    at = content.index(weights[NORM].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    refused(binary, "do not match their checksum", "download it again")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_binary(binary: Path, weights: dict[str, np.ndarray], legacy: bool) -> None:
    write_original(binary, CONFIG, weights, vocab_size=24, legacy=legacy)
    path = binary / "pytorch_model.bin"
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100, 3):
        path.write_bytes(content[:size])
        refused(binary, "pytorch_model.bin", "download")
    path.write_bytes(content + b"\0")
    if legacy:
        refused(binary, f"expected {len(content)} bytes, found {len(content) + 1}")


def test_neither_zip_nor_pickle(binary: Path) -> None:
    (binary / "pytorch_model.bin").write_bytes(b"<html>not found</html>")
    refused(binary, "not a file of torch.save")


def test_a_trainer_checkpoint(binary: Path) -> None:
    torch = pytest.importorskip("torch")
    for content in ({"model": {"a": torch.zeros(2)}}, {"epoch": 3}, [torch.zeros(2)]):
        for new in (True, False):
            torch.save(content, binary / "pytorch_model.bin", _use_new_zipfile_serialization=new)
            refused(binary, "pytorch_model.bin", "expected ")


def test_nan_in_a_binary(binary: Path, weights: dict[str, np.ndarray]) -> None:
    spoilt = weights | {NORM: np.full(40, np.nan, np.float32)}
    write_original(binary, CONFIG, spoilt, vocab_size=24)
    refused(binary, f"{NORM} has weights that are NaN or infinite")
