"""``mambax doctor``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import mambax
from mambax.backend import Backend
from mambax.registry import backend_names, default_backend, get_backend, install_command, is_installed

TOLERANCE = 1e-5
"""Relative error, in norm, that a float32 scan may have."""

BATCH, LENGTH, CHANNELS, STATE = 2, 67, 32, 16
HEADS = 4
OPS = ("selective_scan", "ssd")
"""What has several implementations: the scans of Mamba-1 and of Mamba-2."""


class Check(NamedTuple):
    """How an implementation of an op did: its error against the reference, or why there is none."""

    backend: str
    device: str
    op: str
    implementation: str
    error: float | None
    reason: str = ""
    failed: bool = False


def doctor() -> bool:
    """Print what works here and what to install for the rest. Returns whether all that should work does."""
    from rich.console import Console
    from rich.markup import escape

    out = Console(highlight=False, soft_wrap=True)
    out.print(f"mambax {mambax.__version__}, Python {platform.python_version()}, {_system()}", markup=False)
    well = True
    for name in sorted(backend_names(), key=lambda n: (n != "numpy", n)):
        out.print()
        if not is_installed(name):
            out.print(f"[bold]{name}[/bold]  [yellow]not installed[/yellow]: {escape(install_command(name))}")
            continue
        backend, problem = _open(name)
        if backend is None:
            well = False
            out.print(f"[bold]{name}[/bold]  [bold red]does not start[/bold red]")
            out.print(f"  {problem}", markup=False)
            continue
        devices = ", ".join(backend.devices())
        out.print(f"[bold]{name}[/bold]  {backend.version()}  devices: {devices}")
        for what, how in backend.describe().items():
            out.print(f"  {what:<21}", end="")
            out.print(how, markup=False)
        for check in checks(backend):
            well &= not check.failed
            _show(out, check)
    automatic = default_backend()
    backend, _ = _open(automatic)
    where = f" on {backend.devices()[0]}" if backend is not None else ""
    out.print(f"\nWithout backend=..., mambax takes [bold]{automatic}[/bold]{where}.")
    return well


def checks(backend: Backend) -> Iterator[Check]:
    """Run every implementation of the scans on every device of a backend, and compare it with the float64
    reference."""
    available = {"selective_scan": backend.scan_implementations(), "ssd": backend.ssd_implementations()}
    inputs = {"selective_scan": _inputs(), "ssd": _inputs_of_ssd()}
    reference = get_backend("numpy")
    want = {op: [np.asarray(x) for x in getattr(reference, op)(**_cast(inputs[op], np.float64))] for op in OPS}
    for device in backend.devices():
        for op in OPS:
            for name, reason in {"auto": "", **available[op]}.items():
                about = (backend.name, device, op, name)
                if reason:
                    yield Check(*about, None, reason)
                    continue
                try:
                    error = _error(backend, device, op, name, inputs[op], want[op])
                except ValueError as refusal:  # a device or an implementation that says that it cannot
                    yield Check(*about, None, str(refusal))
                except Exception as failure:  # whatever else a backend or its drivers raise is to be found out
                    yield Check(*about, None, f"{type(failure).__name__}: {failure}", failed=True)
                else:
                    yield Check(*about, error, failed=not error <= TOLERANCE)


def _error(nn: Backend, device: str, op: str, name: str, inputs: dict[str, Any], want: list[np.ndarray]) -> float:
    """Largest relative error of the final state and of the output, where the mask says that there is one."""
    arrays = {
        key: nn.from_numpy(value, device=device) if isinstance(value, np.ndarray) else value
        for key, value in _cast(inputs, np.float32).items()
    }
    with nn.no_grad():
        got = [nn.to_numpy(array).astype(np.float64) for array in getattr(nn, op)(**arrays, impl=name)]
    pairs = [(got[0][inputs["mask"]], want[0][inputs["mask"]]), (got[1], want[1])]
    return max(float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in pairs)


def _inputs() -> dict[str, Any]:
    """Arguments of the selective scan with everything in use."""
    rng = np.random.default_rng(0)
    shapes = {
        "u": (BATCH, LENGTH, CHANNELS), "delta": (BATCH, LENGTH, CHANNELS), "A": (CHANNELS, STATE),
        "B": (BATCH, LENGTH, STATE), "C": (BATCH, LENGTH, STATE), "D": (CHANNELS,),
        "z": (BATCH, LENGTH, CHANNELS), "delta_bias": (CHANNELS,), "initial_state": (BATCH, CHANNELS, STATE),
    }  # fmt: skip
    inputs: dict[str, Any] = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["A"] = -np.exp(inputs["A"])
    return inputs | {"mask": _mask(), "delta_softplus": True}


def _inputs_of_ssd() -> dict[str, Any]:
    """Arguments of the scan of Mamba-2 with everything in use; heads in two groups."""
    rng = np.random.default_rng(1)
    shapes = {
        "x": (BATCH, LENGTH, HEADS, CHANNELS), "dt": (BATCH, LENGTH, HEADS), "A": (HEADS,),
        "B": (BATCH, LENGTH, 2, STATE), "C": (BATCH, LENGTH, 2, STATE), "D": (HEADS,), "dt_bias": (HEADS,),
        "initial_state": (BATCH, HEADS, CHANNELS, STATE),
    }  # fmt: skip
    inputs: dict[str, Any] = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["A"] = -np.exp(inputs["A"])
    return inputs | {"mask": _mask(), "dt_softplus": True, "dt_limit": (0.01, 2.0)}


def _mask() -> np.ndarray:
    """The second row begins with padding."""
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1, :5] = False
    return mask


def _cast(inputs: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The inputs with their numbers in a dtype."""
    floats = {name: isinstance(x, np.ndarray) and x.dtype != bool for name, x in inputs.items()}
    return {name: x.astype(dtype) if floats[name] else x for name, x in inputs.items()}


def _open(name: str) -> tuple[Backend | None, str]:
    """The backend, or what went wrong with it: a library that is there but does not load."""
    try:
        return get_backend(name), ""
    except Exception as failure:  # whatever a framework raises when it is imported is what is to be found out
        return None, f"{type(failure).__name__}: {failure}"


def _show(out: Any, check: Check) -> None:
    label = f"  {check.device:<6} {check.op:<15} {check.implementation:<14}"
    if check.error is None:
        style, word = ("bold red", "fails") if check.failed else ("yellow", "not here")
        out.print(label, style="", end="")
        out.print(word, style=style, end="")
        out.print(f": {check.reason}", markup=False)
        return
    style, word = ("bold red", "WRONG") if check.failed else ("green", "works")
    out.print(label, end="")
    out.print(word, style=style, end="")
    out.print(f", error {check.error:.1e}")


def _system() -> str:
    names = {"darwin": f"macOS {platform.mac_ver()[0]}", "win32": f"Windows {platform.release()}"}
    return f"{names.get(sys.platform, f'{platform.system()} {platform.release()}')} {platform.machine()}"
