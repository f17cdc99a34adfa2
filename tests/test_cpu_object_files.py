"""Compiled kernels on disk: who may use them, when they are made anew, and what a call of one accepts."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import kernel_cases
import numpy as np
import pytest
from mambax_cpu import compilation, object_files
from mambax_cpu.compilation import Kernel, KernelFile
from mambax_cpu.kernel_types import KernelError

KERNELS = """
from mambax_cpu.compilation import kernel
from mambax_cpu.simd import integers_at, pointer
from mambax_test_parts import (
    scaled,  # noqa: F401
)

@kernel
def total(table, first, last):
    values, result = integers_at(table.ctypes.data), 0
    for i in range(first, last):
        result += scaled(values[i])
    return result

@kernel
def fill(array, count, value):
    for i in range(count):
        pointer(array.ctypes.data)[i] = value

@kernel
def wrong():
    return 1.5
"""
PARTS = """
from mambax_cpu.compilation import part

@part
def scaled(x):
    return FACTOR * x
"""
VALUES = np.arange(5, dtype=np.int64)
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such owners and modes")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelFile]:
    """The kernels of a module of this test, with a cache of its own."""
    write(tmp_path, 3)
    monkeypatch.setenv("MAMBAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    yield KernelFile("mambax_test_kernels")
    forget()
    object_files._warn.cache_clear()


def write(folder: Path, factor: int) -> None:
    """The module; a number of its own, so that no two tests share code."""
    unique = f"# {folder}\n"
    (folder / "mambax_test_kernels.py").write_text(unique + KERNELS, encoding="utf-8")
    (folder / "mambax_test_parts.py").write_text(unique + PARTS.replace("FACTOR", str(factor)), encoding="utf-8")


def forget() -> None:
    """As in a new process, as far as the module and its text go."""
    for name in ("mambax_test_kernels", "mambax_test_parts"):
        sys.modules.pop(name, None)
    object_files.sources.cache_clear()
    object_files._first_text.cache_clear()


def files(folder: Path) -> list[Path]:
    """What is in the cache."""
    return sorted((folder / "cache" / "kernels").iterdir())


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that calls a kernel and says whether it was compiled."""
    code = (
        "import sys, numpy as np; from mambax_cpu.compilation import KernelFile\n"
        "result = KernelFile('mambax_test_kernels').total(np.arange(5), 1, 4)\n"
        "print(result, 'mambax_cpu.translation' in sys.modules)"
    )
    path = os.pathsep.join([str(folder), *sys.path])
    environment = os.environ | {"MAMBAX_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def answer(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip()


# --- keeping -------------------------------------------------------------------------------------------------


def test_processes_at_once_and_one_later(tmp_path: Path) -> None:
    write(tmp_path, 3)
    both = [start(tmp_path) for _ in range(2)]
    answers = sorted(answer(process) for process in both)
    assert answers[1] == "18 True"
    assert answers[0] in ("18 True", "18 False")  # by then the other may be done
    assert len(files(tmp_path)) == 1
    assert answer(start(tmp_path)) == "18 False"


def test_an_edit_of_any_file_that_it_is_made_of_makes_new_code(kernels: KernelFile, tmp_path: Path) -> None:
    assert kernels.total(VALUES, 0, 5) == 30
    write(tmp_path, 4)
    forget()
    assert KernelFile("mambax_test_kernels").total(VALUES, 0, 5) == 40
    assert len(files(tmp_path)) == 2


def test_what_the_kernels_of_this_package_are_made_of() -> None:
    names = set(object_files.sources("mambax_cpu.scan_forward")[::2])
    assert {f"mambax_cpu.{name}" for name in ("scan_forward", "memory", "simd", "tiles", "compilation")} <= names
    assert {"mambax_cpu.code_generation", "mambax_cpu.native_code"} <= names
    assert "mambax_cpu.conv_kernels" not in names
    assert "mambax.quantization" in object_files.sources("mambax_cpu.phases")


def test_what_a_text_imports() -> None:
    text = (
        "import mambax_cpu.simd\nfrom mambax_cpu import memory as m, nothing\nimport numpy\n"
        "from mambax_cpu import (\n    tiles,  # sizes, threads\n    scan_forward as s,\n)\n"
        "def f():\n    from mambax.scan import choose\n"
    )
    found = set(object_files._imported(text)) - {"mambax_cpu"}
    expected = {"simd", "memory", "tiles", "scan_forward"}
    assert found == {f"mambax_cpu.{name}" for name in expected} | {"mambax.scan"}


def test_code_of_a_file_that_was_edited_meanwhile_is_not_kept(kernels: KernelFile, tmp_path: Path) -> None:
    import mambax_test_kernels  # pyright: ignore[reportMissingImports]

    write(tmp_path, 5)
    assert mambax_test_kernels.total(VALUES, 0, 5) == 30  # what was imported
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed", "another", "older"])
def test_a_damaged_file_is_not_run_but_made_again(kernels: KernelFile, tmp_path: Path, damage: str) -> None:
    array = np.zeros(3, np.float32)
    kernels.fill(array, 3, 2.0)
    assert kernels.total(VALUES, 0, 5) == 30
    first, second = files(tmp_path)
    good = first.read_bytes()
    place = len(good) // 2
    first.write_bytes(
        {
            "empty": b"",
            "truncated": good[:-1],
            "changed": good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :],
            "another": second.read_bytes(),
            "older": good.replace(b"kernel 1", b"kernel 0", 1),
        }[damage]
    )
    assert object_files.read(first.stem) is None
    assert object_files.read(second.stem) is not None
    again = KernelFile("mambax_test_kernels")
    again.fill(array, 3, 4.0)
    assert again.total(VALUES, 0, 5) == 30
    assert array.tolist() == [4.0, 4.0, 4.0]
    assert object_files.read(first.stem) is not None
    assert files(tmp_path) == [first, second]


@POSIX
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_what_others_may_write_to_is_not_run(
    kernels: KernelFile, tmp_path: Path, whose: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernels.total(VALUES, 0, 5) == 30
    (file,) = files(tmp_path)
    (file if whose == "file" else file.parent).chmod(0o777)
    assert object_files.read(file.stem) is None
    with caplog.at_level(logging.WARNING):
        assert KernelFile("mambax_test_kernels").total(VALUES, 0, 5) == 30
    assert ("not this user's alone" in caplog.text) == (whose == "folder")
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_a_folder_to_write_to(
    kernels: KernelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    assert kernels.total(VALUES, 0, 5) == 30
    assert KernelFile("mambax_test_kernels").total(VALUES, 0, 5) == 30
    assert caplog.text.count("cannot be kept") == 1


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MAMBAX_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name, value in {"XDG_CACHE_HOME": tmp_path / "xdg", "LOCALAPPDATA": tmp_path / "local"}.items():
        monkeypatch.setenv(name, str(value))
    expected = {"linux": "xdg/mambax/kernels", "darwin": "Library/Caches/mambax/kernels"}
    for system, path in (expected | {"win32": "local/mambax/kernels"}).items():
        monkeypatch.setattr(sys, "platform", system)
        assert object_files.folder() == tmp_path / path


def test_what_was_not_used_for_long_goes(kernels: KernelFile, tmp_path: Path) -> None:
    kernels.total(VALUES, 0, 5)
    (file,) = files(tmp_path)
    ages = {"old.kernel": object_files.DAYS + 1, ".old.tmp": object_files.DAYS + 1, "recent.kernel": 3}
    for name, days in ages.items():
        (file.parent / name).touch()
        os.utime(file.parent / name, (time.time() - days * 86400,) * 2)
    os.utime(file, (time.time() - 2 * 86400,) * 2)
    assert object_files.read(file.stem) is not None
    assert time.time() - file.stat().st_mtime < 3600  # used now
    kernels.fill(np.zeros(1, np.float32), 1, 1.0)
    names = [path.name for path in files(tmp_path)]
    assert len(names) == 3
    assert {file.name, "recent.kernel"} < set(names)


# --- calling ---------------------------------------------------------------------------------------------------


def test_arguments(kernels: KernelFile) -> None:
    assert kernels.total(VALUES, np.int32(1), True) == 0
    assert kernels.total(VALUES, -1, -1) == 0  # -1 is what CPython reports errors by
    array = np.zeros(2, np.float32)
    assert kernels.fill(array, 2, -1.0) == 0
    assert array.tolist() == [-1.0, -1.0]
    kernels.fill(array, 2, 3)  # a whole number for a float
    assert array.tolist() == [3.0, 3.0]
    with pytest.raises(RuntimeError, match="total: expected 3 arguments"):
        kernels.total(VALUES, 1)
    for wrong in ((VALUES, 1.0, 2), (VALUES, VALUES, 2), (VALUES, None, 2), (1, 1, 2), (VALUES[::2], 0, 1)):
        with pytest.raises((TypeError, ValueError)):
            kernels.total(*wrong)
    with pytest.raises(OverflowError):
        kernels.total(VALUES, 0, 2**63)


def test_arguments_of_the_first_call(kernels: KernelFile) -> None:
    with pytest.raises(TypeError, match="found str"):
        kernels.total("text", 0, 1)
    assert kernels.total(VALUES, 0, 2) == 3


def test_a_call_keeps_nothing(kernels: KernelFile) -> None:
    array, number = np.arange(5), 10**6
    kernels.total(array, 0, 5)
    before = sys.getrefcount(array), sys.getrefcount(number)
    for _ in range(100):
        kernels.total(array, 0, 5)
        with pytest.raises(TypeError):
            kernels.total(array, "no", 5)
    assert (sys.getrefcount(array), sys.getrefcount(number)) == before
    array.resize(7, refcheck=False)  # refused while a buffer is held


def test_kernels_that_cannot_be(kernels: KernelFile) -> None:
    with pytest.raises(RuntimeError, match="returns a whole number or nothing, not float64"):
        kernels.wrong()
    with pytest.raises(AttributeError, match="has no kernel 'nothing'"):
        kernels.nothing()


def test_code_that_needs_more_than_a_process_has_is_refused() -> None:
    with pytest.raises(KernelError, match=r"line \d+: kernels may call parts and intrinsics alone, found np.zeros"):
        compilation._compiled(kernel_cases.allocates, "i", "mambax_test_allocates")
    with pytest.raises(RuntimeError, match="missing: kernels may call parts and intrinsics alone, found mambax_no"):
        compilation._compiled(kernel_cases.missing, "", "mambax_test_missing")


def test_a_line_when_compiling_takes_long(
    kernels: KernelFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "_SILENCE", 0.01)
    monkeypatch.setattr(compilation, "_spent", 0.0)
    assert isinstance(kernels.total, Kernel)
    kernels.total(VALUES, 0, 1)
    kernels.fill(np.zeros(1, np.float32), 1, 1.0)
    assert caplog.text.count("compiling the CPU kernels") == 1
