"""Damaged and hostile safetensors files: each refused, and the message says what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_checkpoints import NORM, folder, refused, weights

__all__ = ["folder", "weights"]  # fixtures of the tests here


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(path: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file with a header of our choice."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    refused(
        folder, "model.safetensors", "is truncated", f"expected {len(content)} bytes", "download or write it again"
    )
    path.write_bytes(content[:5])
    refused(folder, "5 bytes; expected a safetensors file")


def test_trailing_bytes(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    refused(folder, "bytes that belong to no tensor")


@pytest.mark.parametrize("size", [2**63, 2**40, 17 * 2**20])
def test_absurd_header_length(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    refused(folder, f"a header of {size} bytes is announced", "download or write it again")


def test_git_lfs_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_bytes(pointer)
    refused(folder, "Git LFS pointer", "git lfs pull")


def by_offset(header: dict[str, Any]) -> list[str]:
    tensors = [name for name in header if name != "__metadata__"]
    return sorted(tensors, key=lambda name: header[name]["data_offsets"])


def overlap(header: dict[str, Any]) -> None:
    last, before = by_offset(header)[:-3:-1]
    size = header[last]["data_offsets"][1] - header[last]["data_offsets"][0]
    end = header[before]["data_offsets"][1] - 4
    header[last]["data_offsets"] = [end, end + size]


def hole(header: dict[str, Any]) -> None:
    del header[by_offset(header)[1]]


def change(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].update({field: value})


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (overlap, "overlaps the tensor before it"),
        (hole, "leaves a hole of "),
        (change("shape", [-40]), "expected whole numbers from 0 up"),
        (change("shape", [40.0]), "expected whole numbers from 0 up"),
        (change("shape", [True]), "expected whole numbers from 0 up"),
        (change("shape", "40"), "expected whole numbers from 0 up"),
        (change("shape", [2**40, 2**40]), f"needs {2**82} bytes"),
        (change("shape", [41]), "needs 164 bytes"),
        (change("dtype", "F33"), "has dtype 'F33'; expected one of F64, F32"),
        (change("dtype", ["F32"]), "expected one of F64, F32"),
        (change("data_offsets", [0]), "has data_offsets [0]"),
        (change("data_offsets", [160, 0]), "has data_offsets [160, 0]"),
        (change("colour", "red"), "needs exactly dtype, shape and data_offsets"),
        (lambda header: header.update({NORM: 3}), "needs exactly dtype, shape and data_offsets"),
        (lambda header: header.update({"a\nb": header.pop(NORM)}), "is not the name of a tensor"),
        (lambda header: header.update(__metadata__={"format": 1}), "__metadata__ is not an object of strings"),
    ],
)
def test_header(folder: Path, spoil: Callable[[dict[str, Any]], None], fragment: str) -> None:
    path = folder / "model.safetensors"
    header, data = split(path)
    spoil(header)
    join(path, header, data)
    refused(folder, str(path), fragment)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"[1, 2]", "expected a JSON object"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' comes twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_header_that_is_not_an_object(folder: Path, text: bytes, fragment: str) -> None:
    join(folder / "model.safetensors", text, b"")
    refused(folder, "model.safetensors, header", fragment)
