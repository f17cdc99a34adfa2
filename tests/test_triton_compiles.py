"""Every Triton kernel becomes machine code for an H100, with the arguments that its callers give it.

The interpreter takes Python that the compiler refuses. No GPU is needed: nothing is run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = Path(__file__).parent / "compile_kernels.py"
KERNELS = {
    "conv_kernels.forward_kernel", "conv_kernels.weight_gradient_kernel", "conv_kernels.input_gradient_kernel",
    "norm_kernels.forward_kernel", "norm_kernels.backward_kernel", "step_kernels.conv_step_kernel",
    "gated_norm_kernels.forward_kernel", "gated_norm_kernels.gradient_kernel",
    "step_kernels.scan_step_kernel", "step_block_kernels.x_proj_kernel", "step_block_kernels.scan_kernel",
    "step_quantized_kernels.int8_kernel", "step_quantized_kernels.int4_kernel", "step_quantized_kernels.sum_kernel",
    "step_quantized_kernels.int8_row_kernel", "step_quantized_kernels.int4_row_kernel",
    "step_quantized_kernels.widen_int8_kernel", "step_quantized_kernels.widen_int4_kernel",
    "step_mamba2_kernels.ssd_kernel",
    "step_mamba2_kernels.ssd_step_kernel",
    "ssd_steps.steps_kernel", "ssd_states.sweep_kernel", "ssd_states.carry_kernel", "ssd_forward.output_kernel",
    "ssd_backward.inputs_kernel", "ssd_backward.vectors_kernel", "scan_forward.advance_kernel",
    "scan_forward.output_kernel", "scan_carry.carry_kernel", "scan_adjoint.adjoint_kernel",
    "scan_backward.gradient_kernel",
}  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(line.split(" ") for line in done.stdout.splitlines())
    assert found.keys() == KERNELS
    assert all(int(size) > 1000 for size in found.values()), "machine code"
