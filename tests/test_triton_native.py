"""The Triton scans over several segments, intervals and blocks, with the tiles of a GPU. Needs one, or
the machine of tests/ptx, which takes half an hour for all.

In Triton's interpreter, test_triton_scan.py and test_triton_ssd.py do as much with small tiles.
Dimensions: B batch, L length, D channels, N d_state; H heads, P head_dim, G groups.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton_scan_cases as scans
from tolerances import GRADIENT, assert_close

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton_ssd_cases as ssds
from mambax_torch.kernels import devices, scan, ssd

pytestmark = pytest.mark.skipif(devices.interpreted(), reason="needs an NVIDIA GPU, or pytest --ptx")

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
SCANS = [
    (1, 70, 40, 16),
    (2, 300, 130, 16),
    (1, 1000, 70, 5),
    (1, 2051, 257, 16),
    (2, 700, 40, 64),
    (1, 260, 24, 128),
    (1, 300, 9, 256),
]
"""(B, L, D, N): several intervals of 64 or 128 steps, and lengths and channels that are no multiple of anything."""

SSDS = [
    (1, 70, 4, 32, 2, 16), (2, 200, 4, 64, 1, 128), (1, 1200, 6, 33, 2, 16), (1, 600, 8, 64, 2, 64),
    (1, 300, 16, 80, 1, 100), (1, 200, 16, 128, 1, 256),
]  # fmt: skip
"""(B, L, H, P, G, N): several chunks of 16 to 64 steps, and intervals of 512. The gradient of A is a sum over
time for each head, and with few heads may be what is left of terms that nearly cancel."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before."""

    def poison(*shape: int, like: Any, dtype: Any = torch.float32) -> Any:
        return torch.full(shape, float("nan"), dtype=dtype, device=like.device)

    monkeypatch.setattr(scan, "room", poison)
    monkeypatch.setattr(ssd, "room", poison)


def narrowed(values: dict[str, Any], names: tuple[str, ...], dtype: str) -> dict[str, Any]:
    """The values of which a model in this dtype has some in it."""
    return values | {name: values[name].to(getattr(torch, dtype)) for name in names}


def compare(
    got: tuple[dict[str, Any], dict[str, Any]], want: tuple[dict[str, Any], dict[str, Any]], dtype: str
) -> None:
    """Results within the tolerance of the dtype, gradients within that of gradients where it is float32."""
    for number, (found, right) in enumerate(zip(got, want, strict=True)):
        assert found.keys() == right.keys()
        limit = GRADIENT["float32"] if number and dtype == "float32" else 0.0
        for name, x in right.items():
            assert_close(found[name].double().cpu(), x.cpu(), dtype, what=name, tolerance=limit)


@DTYPES
@pytest.mark.parametrize("sizes", SCANS)
@scans.KINDS
def test_scan(sizes, dtype, kind):
    values = narrowed(scans.values_of(*sizes), ("u", "delta", "B", "C", "z"), dtype)
    values |= scans.flags_of(kind, *sizes[:2])
    got = scans.results(scans.triton_scan, scans.leaves(values), delta_softplus=True)
    compare(got, scans.expected(values, delta_softplus=True), dtype)


@DTYPES
@pytest.mark.parametrize("sizes", SSDS)
@scans.KINDS
def test_ssd(sizes, dtype, kind):
    values = narrowed(ssds.values_of(sizes), ("x", "dt", "B", "C"), dtype)
    values |= scans.flags_of(kind, *sizes[:2])
    got = ssds.results(ssds.triton_ssd, scans.leaves(values), dt_softplus=True)
    compare(got, ssds.expected(values, dt_softplus=True), dtype)
