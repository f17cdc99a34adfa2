"""Compiles the kernels for compute capability 9.0 by calling what launches them, and prints each with its size.

A stand-in for the GPU's driver answers what the launcher asks, and launching stops at the compiled kernel. Run by
test_triton_compiles.py in a process of its own, because Triton is interpreted in those of the other tests.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


class NoDriver:
    """A GPU of which no more is asked than what it is."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


SHARED = 227 << 10
"""Bytes of shared memory that a program of an H100 can have."""

sizes: dict[str, int] = {}
run = jit.JITFunction.run


def compile_only(self: Any, *arguments: Any, **options: Any) -> Any:
    made = run(self, *arguments, **{**options, "warmup": True})
    name = f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}"
    if made.metadata.shared > SHARED:
        raise ValueError(f"{name} takes {made.metadata.shared} bytes of shared memory; expected at most {SHARED}")
    sizes[name] = max(sizes.get(name, 0), len(made.asm["cubin"]))
    return made


def launch_ssd() -> None:
    """Mamba-2's scan in one segment and in several, products of each precision, with and without each option."""
    from mambax_torch.kernels import ssd_ops

    one, many, heads = (1, 1), (2, 8), 160
    for dtype, length, (batch, groups), width, states, options in (
        (torch.bfloat16, 200, many, 64, 128, {"mask": torch.ones(2, 200) > 0}),
        (torch.bfloat16, 2000, one, 128, 256, {"boundaries": torch.ones(1, 2000) > 0, "dt_limit": (0.1, 1.0)}),
        (torch.float32, 100, one, 64, 128, {}),
        (torch.float16, 100, one, 80, 100, {}),
    ):
        x = torch.zeros(batch, length, heads, width, dtype=dtype, requires_grad=True)
        B, C = (torch.zeros(batch, length, groups, states, dtype=dtype) for _ in range(2))
        vector = torch.zeros(heads)
        if options:
            options |= {"D": vector, "dt_bias": vector, "dt_softplus": True}
            options["initial_state"] = torch.zeros(batch, heads, width, states, requires_grad=True)
        ssd_ops.ssd(x, x[..., 0], vector, B, C, **options)[0].sum().backward()


def launch_everything() -> None:
    """Each kernel with and without each of its options, in the dtypes of a model in bfloat16."""
    from mambax_torch import cuda_quantized
    from mambax_torch.kernels import conv, norm, step, step_block

    narrow, B, L, D = torch.bfloat16, 2, 64, 256
    x = torch.zeros(B, L, 2 * D, dtype=narrow)[..., :D].requires_grad_()
    weight, bias = torch.zeros(D, 1, 4, requires_grad=True), torch.zeros(D)
    state, flags = torch.zeros(B, 3, D, dtype=narrow, requires_grad=True), torch.ones(B, L, dtype=torch.bool)
    for marks in ({}, {"mask": flags}, {"boundaries": flags}):
        conv.causal_conv1d(x, weight, bias, initial_state=state, **marks)[0].sum().backward()
    conv.causal_conv1d(x[:1], weight, activation=None)[0].sum().backward()
    rows, stream = torch.zeros(7, 2048, dtype=narrow, requires_grad=True), torch.zeros(7, 2048, requires_grad=True)
    for scale, residual in ((rows[0].detach(), stream), (stream[0].detach(), None)):
        y, total = norm.rms_norm(rows, scale, 1e-5, residual)
        (y.float() + total.float()).sum().backward()
    with torch.no_grad():
        for batch in (1, 2):
            one = x[:batch, :1]
            step.conv_step(one[:, 0], weight, bias, state[:batch])
            step.scan_step(
                one, one, torch.zeros(D, 16), one[..., :16], one[..., 16:32], bias, z=one, delta_bias=bias,
                delta_softplus=True, initial_state=torch.zeros(batch, D, 16),
            )  # fmt: skip
        for batch, kept in ((1, bias), (2, None)):
            xz, taps = torch.zeros(batch, 2 * D, dtype=narrow), weight.detach().to(narrow)
            held = (torch.zeros(batch, 3, D, dtype=narrow), torch.zeros(batch, D, 16))
            step_block.mixed(
                xz, taps, None if kept is None else kept.to(narrow), torch.zeros(16 + 32, D, dtype=narrow),
                torch.zeros(D, 16, dtype=narrow), kept, torch.zeros(D, 16), bias, held, held,
            )  # fmt: skip
        eight, four = torch.zeros(D, 300, dtype=torch.int8), torch.zeros(D, 192, dtype=torch.uint8)
        for values in (torch.zeros(1, 300, dtype=narrow), torch.zeros(64, 300)):
            cuda_quantized._few(values, eight, bias, bias, 300)
            for group in (32, 64):
                cuda_quantized._few(values, four, torch.zeros(D, 384 // group, dtype=narrow), None, 300)


if __name__ == "__main__":
    driver.set_active(NoDriver())
    jit.JITFunction.run = compile_only
    launch_everything()
    launch_ssd()
    for name, size in sorted(sizes.items()):
        print(name, size)
