"""The GPU kernels of the MLX backend on a real GPU: Apple's by Metal, NVIDIA's by CUDA. Skipped where none is.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution, H heads, P head_dim, G groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import metal_ssd
import numpy as np
import pytest
from metal_cases import (
    CONVOLUTIONS,
    SCANS,
    Case,
    compare,
    convolution_values,
    expected,
    run,
    scan_values,
)

pytest.importorskip("mlx.core")

import mlx.core as mx
from mambax_mlx.kernels import convolution, launch, scan, ssd

DIALECTS = [
    pytest.param(
        name,
        marks=[mark, pytest.mark.skipif(bool(launch.missing(name)), reason=f"{name}: {launch.missing(name)}")],
    )
    for name, mark in (("metal", pytest.mark.metal), ("cuda", pytest.mark.gpu))
]
ON_GPU = pytest.mark.parametrize("dialect", DIALECTS)
LARGE_SSD = metal_ssd.Case(2, 1100, 24, 64, 1, 128, "bfloat16", "mask")
LARGE = (Case(2, 2100, 300, 16, "bfloat16", "mask"), Case(1, 5000, 200, 16), Case(16, 300, 600, 16))


def check_scan(dialect: str, case: Case) -> dict[str, np.ndarray]:
    values = scan_values(case)
    op = partial(scan.selective_scan, getattr(launch, dialect), delta_softplus=case.softplus)
    got = run(op, values, case)
    compare(got, expected("scan", values, case), values, case)
    return got


@ON_GPU
@pytest.mark.parametrize("case", [*SCANS, *LARGE], ids=str)
def test_scan(dialect, case):
    """Whole and in parts of a row, with every gradient; and the same bits again."""
    got = check_scan(dialect, case)
    for name, array in check_scan(dialect, case).items():
        np.testing.assert_array_equal(array, got[name], err_msg=name)


@ON_GPU
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(dialect, case):
    values = convolution_values(case)
    op = partial(convolution.causal_conv1d, getattr(launch, dialect), activation="silu" if case.softplus else None)
    compare(run(op, values, case), expected("convolution", values, case), values, case)


@ON_GPU
@pytest.mark.parametrize("case", [*metal_ssd.SSDS, LARGE_SSD], ids=str)
def test_ssd(dialect, case):
    values = metal_ssd.values_of(case)
    op = partial(ssd.ssd, getattr(launch, dialect), **metal_ssd.options_of(case))
    got = run(op, values, case)
    compare(got, metal_ssd.expected(values, case), values, case)
    for name, array in run(op, values, case).items():
        np.testing.assert_array_equal(array, got[name], err_msg=name)


@ON_GPU
def test_compiled_gradients(dialect):
    case = Case(2, 200, 40, 16)
    values = {name: mx.array(x) for name, x in scan_values(case).items()}

    def loss(values: Any) -> Any:
        y, final = scan.selective_scan(getattr(launch, dialect), **values, delta_softplus=True)
        return (y * y).sum() + (final * final).sum()

    want = mx.grad(loss)(values)
    for function in (mx.compile(mx.grad(loss)), mx.grad(mx.compile(loss))):
        got = function(values)
        for name, array in want.items():
            assert mx.allclose(got[name], array, rtol=1e-4, atol=1e-5), name


@ON_GPU
def test_slices_are_read_where_they_lie(dialect):
    case = Case(1, 100, 24, 16)
    values = {name: mx.array(x) for name, x in scan_values(case).items()}
    both = mx.concatenate([values["u"], values["z"]], axis=-1)
    op = partial(scan.selective_scan, getattr(launch, dialect), delta_softplus=True)
    want = op(**values)[0]
    got = op(**(values | {"u": both[..., :24], "z": both[..., 24:]}))[0]
    assert mx.array_equal(got, want)
