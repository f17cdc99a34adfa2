"""The GPU kernels of the MLX backend, run on the CPU under sanitizers, against a float64 recurrence.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution, H heads, P head_dim.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import metal_ssd
import ml_dtypes
import numpy as np
import pytest
import reference
from metal_cases import (
    CONVOLUTIONS,
    SCANS,
    Case,
    compare,
    convolution_values,
    expected,
    flags_of,
    probes,
    run,
    scan_values,
)
from metal_harness import MISSING, Harness
from metal_ssd import SSDS
from tolerances import assert_close

pytest.importorskip("mlx.core")

import mlx.core as mx
from mambax_mlx.kernels import convolution, launch, scan, ssd

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


ALL = [("scan", case) for case in SCANS] + [("convolution", case) for case in CONVOLUTIONS]
ALL += [("ssd", case) for case in SSDS]
CASES = pytest.mark.parametrize(("kind", "case"), ALL, ids=[f"{kind}-{case}" for kind, case in ALL])
EVERYTHING = SCANS[0]


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    """Where compiled kernels are kept from one run of the tests to the next."""
    return request.config.cache.mkdir("mambax-gpu-kernels")


def values_of(kind: str, case: Any) -> dict[str, np.ndarray]:
    values = {"scan": scan_values, "convolution": convolution_values, "ssd": metal_ssd.values_of}
    return values[kind](case)


@cache
def wanted(kind: str, case: Any) -> dict[str, np.ndarray]:
    values = values_of(kind, case)
    return metal_ssd.expected(values, case) if kind == "ssd" else expected(kind, values, case)


def call(kind: str, harness: Harness, case: Any) -> dict[str, np.ndarray]:
    op, options = {
        "scan": (scan.selective_scan, {"delta_softplus": case.softplus}),
        "convolution": (convolution.causal_conv1d, {"activation": "silu" if case.softplus else None}),
        "ssd": (ssd.ssd, metal_ssd.options_of(case) if kind == "ssd" else {}),
    }[kind]
    return run(partial(op, harness), values_of(kind, case), case, **options)


def check(kind: str, harness: Harness, case: Any) -> dict[str, np.ndarray]:
    got = call(kind, harness, case)
    compare(got, wanted(kind, case), values_of(kind, case), case)
    return got


@CASES
def test_kernels(folder, kind, case):
    """Outputs, states and gradients; and no bit depends on the order in which threads run, or on strides."""
    got = check(kind, Harness(folder), case)
    again = call(kind, Harness(folder, backwards=True, spread=False), case)
    for name, array in got.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.parametrize(("kind", "case"), [("scan", SCANS[0]), ("convolution", CONVOLUTIONS[1]), ("ssd", SSDS[1])])
def test_the_cuda_dialect(folder, kind, case):
    check(kind, Harness(folder, "cuda"), case)


def test_every_kernel_is_launched(folder):
    """By a scan of several chunks, one of a step, a convolution, and Mamba-2's scan, with their gradients."""
    harness = Harness(folder)
    for kind, case in (("scan", SCANS[0]), ("scan", SCANS[7]), ("convolution", CONVOLUTIONS[0]), ("ssd", SSDS[0])):
        call(kind, harness, case)
    assert {one.kernel for one in harness.launched} == set(launch.KERNELS)


def test_whole_rows_where_channels_fill_the_gpu(folder, monkeypatch):
    monkeypatch.setattr(scan, "ENOUGH_THREADS", 1)
    harness = Harness(folder)
    check("scan", harness, EVERYTHING)
    assert harness.launched[0].kernel == "scan_output"
    assert harness.launched[0].template["CHUNK"] == 0


def test_whole_rows_where_heads_fill_the_gpu(folder, monkeypatch):
    monkeypatch.setattr(ssd, "ENOUGH_THREADS", 1)
    harness = Harness(folder)
    check("ssd", harness, SSDS[2])
    assert harness.launched[0].kernel == "ssd_output"
    assert harness.launched[0].template["CHUNK"] == 0


def test_strong_decays_and_large_inputs_of_mamba_2(folder):
    """The gradients of dt and A, found step by step from differences, keep their digits where little is left."""
    case = SSDS[0]
    values = dict(values_of("ssd", case))
    values["A"] = values["A"] * np.array([0.01, 1, 30, 300], np.float32)
    values["dt"] = values["dt"] + np.array([0, 4, 2, 4], np.float32)
    values["x"] = values["x"] * np.where(np.arange(case.length) % 40 > 30, 1e3, 1)[:, None, None].astype(np.float32)
    got = run(partial(ssd.ssd, Harness(folder), **metal_ssd.options_of(case)), values, case)
    compare(got, metal_ssd.expected(values, case), values, case)


def test_broadcast_and_sliced_inputs(folder):
    """An input with a stride of zero, and halves of one projection, as the model passes them."""
    values = {name: mx.array(x) for name, x in scan_values(Case(2, 20, 3, 16)).items()}
    both = mx.concatenate([values["u"], values["z"]], axis=-1)
    values["u"], values["z"] = both[..., :3], both[..., 3:]
    values["B"] = mx.broadcast_to(values["B"][:1], values["B"].shape)
    y, final = scan.selective_scan(Harness(folder, spread=False), **values, delta_softplus=True)
    want = reference.scan(**{name: np.array(x) for name, x in values.items()}, delta_softplus=True)
    assert_close(np.array(y), want[0])
    assert_close(np.array(final), want[1])


# --- errors that must be seen -------------------------------------------------------------------------------------

PLANTED = (
    ("scan", SCANS[0], "scan_output", "t0 < end;", "t0 < end - 1;"),
    ("scan", SCANS[0], "scan_chunk", "i = REVERSE ? TILE - 1 - k : k", "i = REVERSE ? k : k"),
    ("scan", SCANS[0], "scan_chunk", "(REVERSE ? number + 1 : number)", "(REVERSE ? number + 0 : number)"),
    ("scan", SCANS[0], "scan_combine", "if (k + 1 < chunks)", "if (k + 2 < chunks)"),
    ("scan", SCANS[8], "scan_step", "n * B_strides[2]", "(n > 0 ? n - 1 : n) * B_strides[2]"),
    ("scan", SCANS[0], "scan_backward", "for (int k = 0; k < GROUPS", "for (int k = 1; k < GROUPS"),
    ("scan", SCANS[0], "scan_backward", "tile == k && tile != tiles - 1", "tile == k + 1 && tile != tiles - 1"),
    ("scan", SCANS[4], "scan_backward", "bool adds = base !=", "bool adds = base - 1 !="),
    ("convolution", CONVOLUTIONS[0], "conv_forward", "int place = start - 1;", "int place = start - 2;"),
    ("convolution", CONVOLUTIONS[0], "conv_backward", "beyond < K - 1", "beyond < K - 2"),
    ("convolution", CONVOLUTIONS[1], "conv_backward", "k >= K - known", "k >= K - 1 - known"),
    ("ssd", SSDS[0], "ssd_output", "t0 < end; t0 += TILE", "t0 < end - 1; t0 += TILE"),
    ("ssd", SSDS[0], "ssd_chunk", "i = REVERSE ? TILE - 1 - j : j", "i = j"),
    ("ssd", SSDS[2], "ssd_chunk", "chunk * CHUNK;", "chunk * CHUNK + 1;"),
    ("ssd", SSDS[0], "scan_combine", "A[ONE_DECAY ? channel : index]", "A[0]"),
    ("ssd", SSDS[0], "ssd_gradient", "for (int k = 0; k < GROUPS", "for (int k = 1; k < GROUPS"),
    ("ssd", SSDS[3], "ssd_gradient", "bool adds = number != share", "bool adds = number - 1 != share"),
    ("ssd", SSDS[0], "ssd_gradient", "chunk + (REVERSE ? 1 : 0)", "chunk + (REVERSE ? 0 : 0)"),
    ("ssd", SSDS[0], "ssd_decay", "int t = end - 1; t >= start", "int t = end - 1; t > start"),
)


def planted(kernel: str, right: str, wrong: str) -> Any:
    """Puts an error in the place of what stands once in a kernel."""

    def edit(name: str, body: str) -> str:
        if name != kernel:
            return body
        assert body.count(right) == 1, f"{right!r} stands {body.count(right)} times in {kernel}"
        return body.replace(right, wrong)

    return edit


@pytest.mark.parametrize(
    ("kind", "case", "kernel", "right", "wrong"), PLANTED, ids=[f"{one[0]}-{one[2]}" for one in PLANTED]
)
def test_a_planted_error_is_caught(folder, kind, case, kernel, right, wrong):
    with pytest.raises(AssertionError):
        check(kind, Harness(folder, edit=planted(kernel, right, wrong)), case)


def test_every_kernel_has_a_planted_error():
    assert {one[2] for one in PLANTED} == set(launch.KERNELS)


def test_reading_outside_an_array_is_caught(folder):
    edit = planted("conv_forward", "window[K - 1] = float(x_row[t *", "window[K - 1] = float(x_row[(t + 1) *")
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        check("convolution", Harness(folder, edit=edit, spread=False), CONVOLUTIONS[3])


def test_leaving_the_threadgroup_memory_is_caught(folder):
    edit = planted("scan_output", "i < TILE * WIDE; i += THREADS", "i <= TILE * WIDE; i += THREADS")
    with pytest.raises(RuntimeError, match="outside threadgroup memory"):
        check("scan", Harness(folder, edit=edit), EVERYTHING)


def test_a_missing_barrier_is_caught(folder):
    """Whether the threads that write the tile run before those that read it depends on their order."""

    def edit(name: str, body: str) -> str:
        before, barrier, after = body.rpartition("  threadgroup_barrier(mem_flags::mem_threadgroup);\n")
        return before + after if name == "scan_output" and barrier else body

    results = []
    for backwards in (False, True):
        got = call("scan", Harness(folder, edit=edit, backwards=backwards), EVERYTHING)
        results.append(got["y"])
    assert not np.array_equal(*results)


def test_a_barrier_that_some_threads_miss_is_caught(folder):
    edit = planted("scan_combine", "const int row =", "if (thread_position_in_threadgroup.x < 32) "
                   "threadgroup_barrier(mem_flags::mem_threadgroup);\nconst int row =")  # fmt: skip
    with pytest.raises(RuntimeError, match=r"do not meet|end while others wait"):
        check("scan", Harness(folder, edit=edit), EVERYTHING)


# --- the harness and the reference themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_of_the_harness_round_as_they_should(folder, dtype):
    """A convolution one wide with a weight of one writes what it reads, rounded."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(3000) * np.exp(rng.uniform(-20, 12, 3000))).astype(np.float32)
    narrow = getattr(ml_dtypes, dtype) if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore"):
        near = x[:1000].astype(narrow).astype(np.float32)  # exact, then one float32 up: rounds back
        x[:1000] = np.nextafter(near, np.float32(np.inf), dtype=np.float32)
    x[1000:2000] = np.arange(1000) + (2048 if dtype == "float16" else 256)  # halfway between two
    x[2000:2003] = np.inf, -np.inf, 0
    wide = mx.array(x)[None, :, None]
    template = {"T": getattr(mx, dtype), "K": 1, "SPAN": 64, "THREADS": 32, "SILU": False, "STEPS": 0}
    template |= {"HAS_BIAS": False, "HAS_STATE": False}
    one = mx.ones((1, 1, 1))
    outputs = {"y": (wide.shape, getattr(mx, dtype)), "final_state": ((1, 1, 1), getattr(mx, dtype))}
    inputs = {"x": wide, "weight": one, "bias": one, "steps": wide, "state": one}
    got = Harness(folder)(launch.Call("conv_forward", inputs, outputs, template, (1, 47, 1), 32))["y"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.array(got.astype(mx.float32))[0, :, 0], np.float32(x.astype(narrow)))


@pytest.mark.parametrize("flags", ["", "mask", "boundaries"])
@pytest.mark.parametrize("kind", ["scan", "convolution"])
def test_the_gradients_of_the_reference_are_its_slopes(kind, flags):
    case = Case(2, 7, 2, 3, flags=flags)
    values = {name: np.float64(x) for name, x in values_of(kind, case).items()}
    values = {name: np.nan_to_num(x, nan=0.5) for name, x in values.items()}
    want = expected(kind, values, case)
    dy, dfinal = probes(case, want["y"], want["final state"])

    def loss() -> float:
        out = expected(kind, values, case)
        return float((out["y"] * dy).sum() + (out["final state"] * dfinal).sum())

    for name, array in values.items():
        slopes = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept, ends = array[index], []
            for step in (1e-5, -1e-5):
                array[index] = kept + step
                ends.append(loss())
            array[index] = kept
            slopes[index] = (ends[0] - ends[1]) / 2e-5
        if np.any(slopes):
            assert_close(want[name], slopes, what=name, tolerance=1e-6)
    independent = reference.scan if kind == "scan" else reference.convolution
    if flags != "boundaries":
        options: Any = {"delta_softplus": True} if kind == "scan" else {}
        y, final = independent(**values, **flags_of(case), **options)
        real = flags_of(case).get("mask", np.ones((2, 7), bool))
        assert_close(want["y"][real], y[real], "float64")
        assert_close(want["final state"], final, "float64")
