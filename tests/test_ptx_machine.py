"""The machine that runs compiled kernels on the CPU: what it calculates, what it reports, and the kernels on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

from mambax_torch.kernels import devices
from ptx.machine import Program
from ptx.memory import Fault, Global

KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
	.reg .b32 %r<99>;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mad.lo.s32 %r3, %r2, 64, %r1;
	mad.wide.s32 %rd2, %r3, 4, %rd1;  // the thread's own number
	shl.b32 %r4, %r1, 2;              // its place in shared memory
BODY
	ret;
                                        // -- End function
}
"""


def run(body: str, given: np.ndarray, blocks: int = 1, threads: int = 64) -> np.ndarray:
    """What a kernel with this body makes of the array, in which each thread has a number of four bytes."""
    held = np.ascontiguousarray(given).copy()
    program = Program(KERNEL.replace("BODY", body))
    values = {"kernel_param_0": np.uint64(held.ctypes.data)}
    program.launch((blocks, 1, 1), threads, 512, values, Global([(held.ctypes.data, held.nbytes)]))
    return held


LOAD, STORE = "ld.global.b32 %r5, [ %rd2 + 0 ];", "st.global.b32 [ %rd2 + 0 ], { %r9 };"
NEIGHBOUR = "add.s32 %r6, %r1, 1; and.b32 %r6, %r6, 63; shl.b32 %r7, %r6, 2;"


# --- arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("add.s32 %r9, %r5, 7;", lambda x: x + 7),
        ("mul.lo.s32 %r9, %r5, %r5;", lambda x: x * x),
        ("mul.hi.s32 %r9, %r5, 1103515245;", lambda x: x * 1103515245 >> 32),
        ("div.s32 %r9, %r5, 7;", lambda x: int(x / 7)),
        ("rem.s32 %r9, %r5, 7;", lambda x: x - 7 * int(x / 7)),
        ("shl.b32 %r9, %r5, 40;", lambda x: 0),
        ("shr.s32 %r9, %r5, 40;", lambda x: -(x < 0)),
        ("shr.u32 %r9, %r5, 3;", lambda x: (x % 2**32) >> 3),
        ("bfe.s32 %r9, %r5, 4, 4;", lambda x: ((x >> 4) % 16 ^ 8) - 8),
        ("bfe.u32 %r9, %r5, 4, 4;", lambda x: (x >> 4) % 16),
        ("prmt.b32 %r9, %r5, 0, 0x0123;", lambda x: int.from_bytes((x % 2**32).to_bytes(4, "little"), "big")),
        ("setp.lt.s32 %p1, %r5, 0; selp.b32 %r9, 1, 2, %p1;", lambda x: 1 if x < 0 else 2),
        ("mov.b32 {%rs1, %rs2}, %r5; mov.b32 %r9, {%rs2, %rs1};", lambda x: (x % 2**32 >> 16) + (x % 2**16 << 16)),
        ("cvt.u16.u32 %rs1, %r5; cvt.s32.s16 %r9, %rs1;", lambda x: (x % 2**16 ^ 2**15) - 2**15),
        ("bfe.s32 %r9, %r5, 28, 8;", lambda x: x >> 28),
        ("min.relu.s32 %r9, %r5, 99;", lambda x: max(0, min(x, 99))),
        ("bfe.u32 %r9, %r5, 28, 8;", lambda x: x % 2**32 >> 28),
        ("prmt.b32 %r9, %r5, 0, 0xBBBB;", lambda x: -1 if x < 0 else 0),
        ("mul.wide.s32 %rd5, %r5, -3; shr.s64 %rd5, %rd5, 32; cvt.u32.u64 %r9, %rd5;", lambda x: -3 * x >> 32),
        ("setp.lt.s32 %p1, %r5, 0; and.b32 %r9, %r5, 0; @!%p1 mov.u32 %r9, 7;", lambda x: 0 if x < 0 else 7),
    ],
)
def test_whole_numbers(instruction: str, want: Any) -> None:
    given = np.random.default_rng(0).integers(-(2**31), 2**31, 64).astype(np.int32)
    expected = [want(x) for x in given.tolist()]
    found = run(LOAD + instruction + STORE, given)
    assert found.tolist() == [(x + 2**31) % 2**32 - 2**31 for x in expected]


@pytest.mark.parametrize(
    ("instruction", "source"),
    [("bfly.b32 %r9, %r1, 5, 31, -1;", lambda i: i ^ 5),
     ("idx.b32 %r9, %r1, 35, 31, -1;", lambda i: i - i % 32 + 3),
     ("up.b32 %r9, %r1, 3, 0, -1;", lambda i: i - 3 * (i % 32 >= 3)),
     ("down.b32 %r9, %r1, 3, 31, -1;", lambda i: i + 3 * (i % 32 < 29))],
)  # fmt: skip
def test_shuffles(instruction: str, source: Any) -> None:
    found = run(f"shfl.sync.{instruction}{STORE}", np.zeros(64, np.int32))
    assert found.tolist() == [source(i) for i in range(64)]


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("setp.lt.f32 %p1, %r5, 0f3F800000; selp.b32 %r9, 1, 0, %p1;", [0, 1, 0, 0]),
        ("setp.ltu.f32 %p1, %r5, 0f3F800000; selp.b32 %r9, 1, 0, %p1;", [1, 1, 0, 0]),
        ("setp.ne.f32 %p1, %r5, 0f3F800000; selp.b32 %r9, 1, 0, %p1;", [0, 1, 1, 1]),
        ("setp.neu.f32 %p1, %r5, 0f3F800000; selp.b32 %r9, 1, 0, %p1;", [1, 1, 1, 1]),
        ("max.f32 %r6, %r5, 0f40000000; cvt.rzi.s32.f32 %r9, %r6;", [2, 2, 2, 1000]),
        ("max.NaN.f32 %r6, %r5, 0f40000000; cvt.rzi.s32.f32 %r9, %r6;", [0, 2, 2, 1000]),
        ("cvt.rzi.s32.f32 %r9, %r5;", [0, -1, 1, 1000]),
        ("cvt.rmi.f32.f32 %r6, %r5; cvt.rzi.s32.f32 %r9, %r6;", [0, -2, 1, 1000]),
        ("cvt.rpi.s32.f32 %r9, %r5;", [0, -1, 2, 1001]),
        ("cvt.rni.s32.f32 %r9, %r5;", [0, -2, 2, 1000]),
    ],
)
def test_comparisons_and_whole_numbers_of_floats(instruction: str, want: list[int]) -> None:
    given = np.array([np.nan, -1.75, 1.75, 1000.5], np.float32).repeat(16)
    assert run(LOAD + instruction + STORE, given).view(np.int32)[::16].tolist() == want


@pytest.mark.parametrize(("kind", "columns"), [("bf16", 16), ("tf32", 8)])
def test_products_of_matrices(kind: str, columns: int) -> None:
    """Element (row, k) of A is in the lane, register and half that the tables of the PTX ISA say; ones times it."""
    each = 2 if kind == "bf16" else 1
    rng = np.random.default_rng(0)
    A = rng.integers(-8, 8, (16, columns)).astype(np.float32)
    lanes, body = np.arange(32), []
    packed = np.zeros((4, 32), np.uint32)
    for i in range(4):
        for j in range(each):
            bits = A[lanes // 4 + 8 * (i % 2), lanes % 4 * each + j + columns // 2 * (i // 2)].view(np.uint32)
            packed[i] |= bits if each == 1 else (bits >> 16) << np.uint32(16 * j)
    one = "0f3F800000" if kind == "tf32" else "0x3F803F80"
    body = [f"mov.b32 %r{20 + i}, {one};" for i in range(2)]
    body += [f"ld.global.b32 %r{10 + i}, [ %rd2 + {128 * i} ];" for i in range(4)]
    zeros = "mov.b32 %r30, 0;"
    product = f"mma.sync.aligned.m16n8k{columns}.row.col.f32.{kind}.{kind}.f32"
    body += [zeros, f"{product} {{%r40, %r41, %r42, %r43}}, {{%r10, %r11, %r12, %r13}}, {{%r20, %r21}}, "
             "{%r30, %r30, %r30, %r30}; bar.warp.sync -1;"]  # fmt: skip
    body += [f"st.global.b32 [ %rd2 + {128 * i} ], {{ %r{40 + i} }};" for i in range(4)]
    found = run(" ".join(body), packed.reshape(-1), threads=32).view(np.float32).reshape(4, 32)
    sums = A.sum(1)
    assert found.tolist() == [sums[lanes // 4 + 8 * (i // 2)].tolist() for i in range(4)]


@pytest.mark.parametrize(
    ("instruction", "want", "error"),
    [
        ("fma.rn.f32 %r9, %r5, 0f40490FDB, 0f3F800000;", lambda x: x * float(np.float32(np.pi)) + 1, 6e-8),
        ("ex2.approx.ftz.f32 %r9, %r5;", np.exp2, 1.9e-7),
        ("div.full.f32 %r9, 0f3F800000, %r5;", lambda x: 1 / x, 1.8e-7),
        ("cvt.rn.bf16.f32 %rs1, %r5; cvt.f32.bf16 %r9, %rs1;", lambda x: x, 2.0**-8),
        ("cvt.rn.f16x2.f32 %r6, %r5, %r5; mov.b32 {%rs1, _}, %r6; cvt.f32.f16 %r9, %rs1;", lambda x: x, 2.0**-11),
        ("cvt.rna.tf32.f32 %r9, %r5;", lambda x: x, 2.0**-11),
    ],
)
def test_floats(instruction: str, want: Any, error: float) -> None:
    given = np.random.default_rng(0).uniform(0.5, 20, 64).astype(np.float32)
    found, exact = run(LOAD + instruction + STORE, given).astype(np.float64), want(given.astype(np.float64))
    assert 0 < np.abs(found / exact - 1).max() <= error


# --- what is reported ---------------------------------------------------------------------------------------------


def test_neighbours_that_wait_for_each_other_and_those_that_do_not():
    given = np.arange(64, dtype=np.int32)
    body = f"{LOAD} st.shared.b32 [%r4], %r5; WAIT; {NEIGHBOUR} ld.shared.b32 %r9, [%r7]; {STORE}"
    assert run(body.replace("WAIT", "bar.sync 0"), given).tolist() == [*range(1, 64), 0]
    for wait in ("bar.warp.sync -1", "mov.u32 %r8, 0"):
        with pytest.raises(Fault, match="reads what was written by"):
            run(body.replace("WAIT", wait), given)
    assert run(body.replace("WAIT", "bar.warp.sync -1").replace("63", "31"), given[:32], threads=32)[0] == 1


def test_overwriting_what_others_still_read():
    given = np.arange(64, dtype=np.int32)
    body = f"{NEIGHBOUR} mad.wide.s32 %rd3, %r6, 4, %rd1; ld.global.b32 %r9, [ %rd3 + 0 ]; WAIT; {STORE}"
    assert run(body.replace("WAIT", "bar.sync 0"), given).tolist() == [*range(1, 64), 0]
    with pytest.raises(Fault, match="overwrites what is read by"):
        run(body.replace("WAIT", "bar.warp.sync -1"), given)


def test_blocks_that_touch_the_same_place():
    given = np.arange(64, dtype=np.int32)
    body = (
        "and.b32 %r9, %r1, 0; st.global.b32 [ %rd1 + 0 ], { %r9 }; bar.sync 0; st.global.b32 [ %rd1 + 0 ], { %r9 };"
    )
    assert run(body, given)[0] == 0
    with pytest.raises(Fault, match="overwrites what was written by"):  # no barrier is between blocks
        run(body, given, blocks=2)


READ, OVERWRITE = (
    "ld.global.b32 %r5, [ %rd1 + 0 ];",
    "setp.eq.b32 %p1, %r1, THREAD; @%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };",
)


@pytest.mark.parametrize("thread", [0, 31, 32, 63])
def test_whoever_overwrites_what_all_have_read_or_written_has_to_wait(thread: int) -> None:
    given, after = np.arange(64, dtype=np.int32), OVERWRITE.replace("THREAD", str(thread))
    zeros = "and.b32 %r9, %r1, 0; st.global.b32 [ %rd1 + 0 ], { %r9 };"
    for before, what in ((READ, "is read by"), (zeros, "was written by")):
        with pytest.raises(Fault, match=f"overwrites what {what}"):
            run(before + after, given)
        with pytest.raises(Fault, match=f"overwrites what {what}"):
            run(f"{before} bar.warp.sync -1; {after}", given)
        with pytest.raises(Fault, match=f"overwrites what {what}"):
            run(f"{before} bar.sync 0; {after}", given, blocks=2)
        assert run(f"{before} bar.sync 0; {after}", given)[0] == thread
        assert run(f"{before} bar.warp.sync -1; {after}", given[:32], threads=32)[0] == (
            thread if thread < 32 else 0
        )
        if thread < 32:
            with pytest.raises(Fault, match=f"overwrites what {what}"):
                run(before + after, given[:32], threads=32)


def test_products_of_shared_memory_need_a_fence_and_a_barrier():
    """wgmma of zeros, whose descriptor of no swizzling is 0: rows of 16 bytes from the start."""
    product = (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, %rd9, %rd9, 0, 1, 1, 0, 0;"
    )
    given = np.zeros(128, np.int32)
    body = f"mov.b64 %rd9, 0; mov.b32 %r9, 0; st.shared.b32 [%r4], %r9; BETWEEN {product}"
    assert not run(body.replace("BETWEEN", "fence.proxy.async.shared::cta; bar.sync 0;"), given, threads=128).any()
    with pytest.raises(Fault, match=r"without fence\.proxy\.async"):
        run(body.replace("BETWEEN", "bar.sync 0;"), given, threads=128)
    with pytest.raises(Fault, match="reads what was written by"):
        run(body.replace("BETWEEN", "fence.proxy.async.shared::cta; bar.warp.sync -1;"), given, threads=128)


def test_different_values_in_one_place():
    given = np.arange(64, dtype=np.int32)
    with pytest.raises(Fault, match="different values to one place"):
        run("st.global.b32 [ %rd1 + 0 ], { %r1 };", given)
    assert run("and.b32 %r9, %r1, 0; st.global.b32 [ %rd1 + 0 ], { %r9 };", given)[0] == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r5, [ %rd2 + 4 ];", "outside of every tensor"),
        ("ld.global.b32 %r5, [ %rd1 + -4 ];", "outside of every tensor"),
        ("ld.global.b32 %r5, [ %rd2 + 2 ];", "not aligned"),
        ("ld.global.v2.b32 {%r5, %r6}, [ %rd2 + 0 ];", "not aligned"),
        ("ld.shared.b32 %r5, [%r4+2];", "not aligned"),
        ("ld.shared.b32 %r5, [%r4+512];", "outside of its"),
        ("ld.shared.b32 %r5, [%r4+-4];", "outside of its"),
    ],
)
def test_places_that_are_not_there(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body, np.arange(64, dtype=np.int32))


def test_copies_that_have_not_arrived_and_shared_memory_that_nobody_wrote_hold_nan():
    given = np.arange(64, dtype=np.float32)
    body = "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 4, 4; cp.async.commit_group; WAIT "
    body += "ld.shared.b32 %r9, [%r4];"
    assert (run(body.replace("WAIT", "cp.async.wait_group 0;") + STORE, given) == given).all()
    assert np.isnan(run(body.replace("WAIT", "cp.async.wait_group 1;") + STORE, given)).all()
    assert not run(
        body.replace(", 4, 4;", ", 4, 0;").replace("WAIT", "cp.async.wait_group 0;") + STORE, given
    ).any()
    assert np.isnan(run("ld.shared.b32 %r9, [%r4];" + STORE, given)).all()


def test_what_it_does_not_know_is_refused():
    given = np.arange(64, dtype=np.int32)
    for body, message in (
        ("atom.global.add.u32 %r5, [%rd1], 1;", "atom.global.add.u32"),
        ("add.sat.f32 %r9, %r5, %r5;", "add.sat.f32"),
        ("fma.rm.f32 %r9, %r5, %r5, %r5;", "fma.rm.f32"),
        ("bar.sync 1, 32;", "bar.sync 1, 32"),
        ("setp.lt.s32 %p1, %r1, 7; @%p1 bra $L__end; mov.u32 %r5, 1;\n$L__end:\n", "part ways"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            run(body, given)
    with pytest.raises(ValueError, match=r"expected PTX with a .visible .entry"):
        Program("// nothing")


# --- Triton on it -------------------------------------------------------------------------------------------------

COMPILED = pytest.mark.skipif(devices.interpreted(), reason="needs pytest --ptx")


@COMPILED
def test_a_barrier_that_is_left_out_of_a_kernel_is_found(monkeypatch, tmp_path):
    """Where the convolution's step writes its state over itself: with few channels several warps hold the same."""
    import importlib.util

    import torch
    from mambax_torch.kernels import step

    if torch.cuda.is_available():
        pytest.skip("a GPU says nothing of it")
    weight, before, x = torch.randn(5, 1, 4), torch.randn(2, 3, 5), torch.randn(2, 5)
    right = torch.cat((before[:, 1:], x[:, None]), 1)
    step.conv_step_into(x, weight, None, before, before, "silu")
    assert torch.equal(before, right)
    file = tmp_path / "without_barriers.py"
    text = Path(step.KERNELS.__file__).read_text(encoding="utf-8")
    file.write_text(text.replace("tl.debug_barrier()", "pass"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("without_barriers", file)
    assert spec is not None
    assert spec.loader is not None
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    monkeypatch.setattr(step, "KERNELS", without)
    with pytest.raises(Fault, match="overwrites what is read by"):
        step.conv_step_into(x, weight, None, before, before, "silu")


SUITES = {
    "steps": (
        "test_ptx_machine.py test_triton_norm.py test_triton_conv.py test_triton_step.py "
        "test_triton_step_mamba2.py",
        "machine or outputs or step", 80,
    ),
    "scans": (
        "test_scan.py test_triton_native.py test_cuda_quantized.py",
        "(sizes0 and not plain and bfloat16) or (sizes0 and mask and float32) or test_products "
        "or torch-triton", 50,
    ),
}  # fmt: skip
"""Files, what is run of them so that each takes half a minute, and how many tests that is at least."""


@pytest.mark.slow
@pytest.mark.skipif(not devices.interpreted(), reason="runs in another process")
@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_of_the_kernels_pass_compiled(suite: str, tmp_path: Path) -> None:
    files, chosen, count = SUITES[suite]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--ptx",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        *files.split(),
    ]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= count
