"""Memory of this process: now, and at its peak."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes of memory that this process occupies now."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The most bytes that it has occupied, since :func:`reset_peak` where that works, else since it started."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> bool:
    """Let the peak start again from here; whether it did (on Linux it does, elsewhere there is no means)."""
    if not _CLEAR.exists():
        return False
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def release() -> None:
    """Give memory that is no longer used back to the system, so that it is not counted for what comes next."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)
