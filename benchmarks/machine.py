"""What is recorded beside the figures: the machine, the versions, the load, the command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = (
    "mambax", "numpy", "llvmlite", "ml_dtypes", "torch", "transformers", "mambapy", "mlx", "mlx-lm",
    "llama-cpp-python", "gguf",
)  # fmt: skip


def usable_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, object]:
    """CPU, cores, memory, system, and the load of the last minute, which should be about zero before a run."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False),
        "processors": usable_threads(),
        "vector": _vector(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "load_before": load,
    }


def versions() -> dict[str, str]:
    """Python, the packages that are installed, the compiler, and the commit of mambax where git knows it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    for compiler in filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        found["C compiler"] = _first_line([compiler, "--version"])
        break
    commit = _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    return found | ({"commit": commit} if commit else {})


def _cpu() -> str:
    """The model's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or platform.machine()


def _vector() -> str:
    """The widest vector instructions, where /proc/cpuinfo lists them."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")
    return " ".join(name for name in known if name in words)


def _first_line(command: list[str]) -> str:
    """What a command prints first; empty when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines and not done.returncode else ""
