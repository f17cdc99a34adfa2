"""Object code of kernels kept on disk, so that each is compiled once per machine.

The name of a file is a digest of all that its contents depend on: the text of the files that the kernel is made
of, the versions of Python and LLVM, and the processor. So an edit or an upgrade makes another file, two
processes at once write the same, and nothing has to be told apart or deleted by hand. What was not used for
:data:`DAYS` days goes when something new comes.

It is machine code that will be run: a file is used only if its contents are those that were written, and if the
file and its folder belong to this user and nobody else may write to them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mambax_cpu.native_code import processor

try:
    from _blake2 import blake2b  # hashlib's; but hashlib brings OpenSSL along, megabytes at every start
except ImportError:
    from hashlib import blake2b

DAYS = 60
"""After so many days without use a file is deleted."""

_MAGIC = b"mambax kernel 1\n"
_SIZE = 32  # of a digest, in bytes
_HEAD = len(_MAGIC) + _SIZE
_SUFFIX = ".kernel"
_DAY = 24 * 60 * 60.0
_IMPORT = re.compile(
    r"^[ \t]*(?:from (mambax[\w.]*) import (\([^)]*\)|[^\n]*)|import (mambax[\w.]*))", re.MULTILINE
)

_BINARY = getattr(os, "O_BINARY", 0)  # Windows alone has it

_log = logging.getLogger("mambax")


def cache_folder() -> Path:
    """``MAMBAX_CACHE_DIR`` where that is set, else a place in the user's folder for caches.

    Raises:
        RuntimeError: when the user has no home.
    """
    if named := os.environ.get("MAMBAX_CACHE_DIR"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "mambax"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mambax"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mambax"


def folder() -> Path:
    """Where the files are, in :func:`cache_folder`."""
    return cache_folder() / "kernels"


def read(key: str) -> bytes | None:
    """The object code of this key; None when there is none that may be used."""
    try:
        path = folder() / (key + _SUFFIX)
        if _problem(path.parent):
            return None
        with path.open("rb") as file:
            if _foreign(os.fstat(file.fileno())):
                return None
            contents = file.read()
            if time.time() - os.fstat(file.fileno()).st_mtime > _DAY:
                os.utime(path)
    except (OSError, RuntimeError):  # most often: it is not there
        return None
    head, code = contents[:_HEAD], contents[_HEAD:]
    return code if head == _MAGIC + _digest(key, code) else None


def write(key: str, code: bytes) -> None:
    """Keep object code. Where that cannot be, a warning says why, and this process goes on with what it has."""
    try:
        place = folder()
        path, temporary = place / (key + _SUFFIX), place / f".{os.urandom(8).hex()}.tmp"
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if problem := _problem(place):
            raise PermissionError(f"{place}: {problem}")
        _remove_old(place)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o600), "wb") as file:
                file.write(_MAGIC + _digest(key, code) + code)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        _warn(str(error))


@cache
def _warn(problem: str) -> None:
    """Once for each problem."""
    _log.warning("mambax: compiled kernels cannot be kept for the next start: %s", problem)


def _digest(key: str, code: bytes) -> bytes:
    return blake2b(key.encode() + code, digest_size=_SIZE).digest()


def _problem(place: Path) -> str:
    """Why nothing in a folder may be used; empty when it may. A folder that is not there has no problem."""
    try:
        found = place.stat()
    except OSError:
        return ""
    if _foreign(found):
        return "machine code would be run from there, but it is not this user's alone; chmod go-w, or chown it"
    return ""


def _foreign(found: os.stat_result) -> bool:
    """Whether somebody else may write to a file or a folder. Windows keeps a user's folders from others itself."""
    if sys.platform == "win32":
        return False
    return found.st_uid != os.geteuid() or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _remove_old(place: Path) -> None:
    """Delete what was not used for long."""
    limit = time.time() - DAYS * _DAY
    for path in [*place.glob(f"*{_SUFFIX}"), *place.glob(".*.tmp")]:
        with suppress(OSError):  # another process may have done so
            if path.stat().st_mtime < limit:
                path.unlink()


# --- keys -----------------------------------------------------------------------------------------------------


def key(module: str, name: str, kinds: str) -> str:
    """The digest of what the code of a kernel depends on.

    Args:
        module, name: where it is.
        kinds: of its arguments, as in :mod:`mambax_cpu.compilation`.
    """
    digest = blake2b(digest_size=_SIZE)
    for part in (*_environment(), module, name, kinds, *sources(module)):
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()


@cache
def _environment() -> tuple[str, ...]:
    """All that is not the kernel's own text."""
    return sys.version, version("llvmlite"), processor()


@cache
def sources(module: str) -> tuple[str, ...]:
    """Names and texts of a module and of all modules of ours that it imports, as they were when first asked for."""
    return _with_imports(module, _first_text)


def unchanged(module: str) -> bool:
    """Whether :func:`sources` is what is on disk."""
    return sources(module) == _with_imports(module, _text)


def text(module: str) -> str:
    """The text of a module of ours, as it was when first asked for."""
    return _first_text(module)


def _with_imports(module: str, read_text: Callable[[str], str]) -> tuple[str, ...]:
    texts: dict[str, str] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in texts:
            texts[current] = read_text(current)
            waiting += _imported(texts[current])
    return tuple(part for name in sorted(texts) for part in (name, texts[name]))


def _text(module: str) -> str:
    loader = getattr(importlib.util.find_spec(module), "loader", None)
    text = None if loader is None else loader.get_source(module)
    if text is None:
        raise ImportError(f"{module}: its source is needed to compile the CPU kernels; install mambax with it")
    return text


_first_text = cache(_text)


@cache
def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _imported(text: str) -> Iterator[str]:
    """The modules of ours that a module imports, from within functions too."""
    for parent, names, plain in _IMPORT.findall(text):
        yield parent or plain
        if parent in ("mambax", "mambax_cpu"):
            for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?\s*(?:,|$)", re.sub(r"#[^\n]*|[()]", "", names)):
                if _is_module(f"{parent}.{name}"):
                    yield f"{parent}.{name}"
