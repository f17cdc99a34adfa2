"""The loop in C, built on this machine when it has a compiler.

``CC`` names another compiler than ``cc``, ``gcc`` or ``clang``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.contender import Unavailable

SOURCE = Path(__file__).resolve().parent.parent / "scan_loop.c"
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
LANES = 16
MOST_STATES = 256


def compiler() -> str:
    """The command of a C compiler.

    Raises:
        Unavailable: when there is none.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise Unavailable(f"no C compiler here (looked for {', '.join(names)}; CC=... names another)")


@cache
def build() -> ctypes.CDLL:
    """The compiled functions ``scan`` and ``exponentials``.

    Raises:
        Unavailable: without a compiler, or when it cannot build the file.
    """
    command = compiler()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = Path(folder) / "scan_loop.so"
        built = subprocess.run(
            [command, *FLAGS, "-o", str(target), str(SOURCE)], capture_output=True, text=True, check=False
        )
        if built.returncode:
            last = (built.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"{Path(command).name} {' '.join(FLAGS)} failed: {last}")
        library = ctypes.CDLL(str(target))
    library.scan.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 5
    library.scan.restype = None
    library.exponentials.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.exponentials.restype = None
    return library
