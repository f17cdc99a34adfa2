"""The memory of this process."""

from __future__ import annotations

import sys


def peak_resident_bytes() -> int | None:
    """The most memory that this process has had at once, in bytes; None where the system does not say (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
