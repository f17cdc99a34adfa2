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
    unknown = set(self.do_not_specialize) - set(self.arg_names)
    if unknown:
        raise ValueError(f"{self.__name__} is not to be specialized for {unknown}, which are no arguments of it")
    made = run(self, *arguments, **{**options, "warmup": True})
    name = f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}"
    if made.metadata.shared > SHARED:
        raise ValueError(f"{name} takes {made.metadata.shared} bytes of shared memory; expected at most {SHARED}")
    sizes[name] = max(sizes.get(name, 0), len(made.asm["cubin"]))
    return made


def launch_scan() -> None:
    """The selective scan in several segments: each dtype, mixed as under autocast, small and large states."""
    from mambax_torch.kernels import scan_ops

    narrow, wide, flags = torch.bfloat16, torch.float32, torch.ones(1, 300) > 0
    for of_u, of_delta, states, options in (
        (narrow, narrow, 16, {"boundaries": flags}),
        (narrow, wide, 64, {}),
        (wide, wide, 5, {"mask": flags}),
        (torch.float16, torch.float16, 128, {}),
    ):
        channels = 40
        u = torch.zeros(1, 300, 2 * channels, dtype=of_u)[..., :channels].requires_grad_()
        B = torch.zeros(1, 300, states, dtype=of_u)
        if states != 128:
            options |= {"z": u, "D": torch.zeros(channels), "delta_bias": torch.zeros(channels)}
            options |= {"delta_softplus": True, "initial_state": torch.zeros(1, channels, states)}
        delta, A = torch.zeros(1, 300, channels, dtype=of_delta), torch.zeros(channels, states)
        scan_ops.selective_scan(u, delta, A, B, B, **options)[0].sum().backward()


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


def launch_mamba2_step() -> None:
    """One token through a mixer of Mamba-2 with each option: the sizes of models, and sizes that are one."""
    from mambax_torch.kernels import step_mamba2

    from mambax.options import Mamba2Options

    for batch, dtype, options, biased in (
        (1, torch.bfloat16, Mamba2Options(n_heads=80, n_groups=8, dt_limit=(0.1, 1.0)), True),
        (64, torch.bfloat16, Mamba2Options(n_heads=24, gated_norm="norm_first"), True),
        (2, torch.float16, Mamba2Options(n_heads=7, head_dim=50, d_state=100, d_conv=3, gated_norm="none"), False),
        (1, torch.float32, Mamba2Options(n_heads=1, head_dim=1, d_state=1, d_conv=1), False),
    ):
        D, C, heads = options.d_inner, options.conv_channels, torch.zeros(options.n_heads)
        norm = None if options.gated_norm == "none" else torch.zeros(D, dtype=dtype)
        projected, taps = torch.zeros(batch, D + C + len(heads)), torch.zeros(C, 1, options.d_conv)
        past = torch.zeros(batch, options.d_conv - 1, C, dtype=dtype)
        held = torch.zeros(batch, options.n_heads, options.head_dim, options.d_state)
        step_mamba2.mixed(
            options, projected.to(dtype), taps.to(dtype), torch.zeros(C, dtype=dtype) if biased else None,
            heads, heads, heads, norm, (past, held), (past, held),
        )  # fmt: skip
        x, dt = held[:, None, :, :, 0].to(dtype), heads.expand(batch, 1, -1).to(dtype)
        B = torch.zeros(batch, 1, options.n_groups, options.d_state, dtype=dtype)
        every: dict[str, Any] = {"D": heads, "dt_bias": heads, "dt_softplus": True, "initial_state": held}
        step_mamba2.ssd_step(x, dt, heads, B, B, **(every if biased else {}), dt_limit=options.dt_limit)


def launch_everything() -> None:
    """Each kernel with and without each of its options, in the dtypes of a model in bfloat16."""
    from mambax_torch import cuda_quantized
    from mambax_torch.kernels import conv, gated_norm, norm, step, step_block

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
        groups = 1 if residual is None else 8
        gated_norm.gated_norm(stream[None], rows[None], scale, groups, 1e-5).sum().backward()
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
        for rows, outputs, dtype in ((1, D, narrow), (9, D, narrow), (9, 40, narrow), (64, 40, torch.float32)):
            values, few = torch.zeros(rows, 1300, dtype=dtype), bias[:outputs]
            eight, four = (
                torch.zeros(outputs, n, dtype=kind) for n, kind in ((1300, torch.int8), (704, torch.uint8))
            )
            cuda_quantized.few_rows(values, eight, few, few, 1300)
            cuda_quantized.dequantized(eight, few, 1300, dtype)
            for group in (32, 64):
                scales = torch.zeros(outputs, 1408 // group, dtype=narrow)
                cuda_quantized.few_rows(values, four, scales, None, 1300)
                cuda_quantized.dequantized(four, scales, 1300, dtype)


if __name__ == "__main__":
    driver.set_active(NoDriver())
    jit.JITFunction.run = compile_only
    launch_everything()
    launch_scan()
    launch_ssd()
    launch_mamba2_step()
    for name, size in sorted(sizes.items()):
        print(name, size)
