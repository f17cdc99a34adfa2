"""Handing kernel bodies to MLX: on Apple GPUs ``mx.fast.metal_kernel``, on NVIDIA's ``mx.fast.cuda_kernel``.

MLX writes the signature around a body: the inputs in order, after each its shape and strides where the body
mentions ``<name>_shape`` and ``<name>_strides``, the outputs, and the thread positions that it mentions. Inputs of
fewer than eight elements stand in Metal's constant address space, and the name that MLX gives to a kernel said
nothing of that, nor of the dtypes, before version 0.32: the names here do, so that no two kernels share one.

Inputs are passed with their strides. A slice, such as a half of a projection's output, is read where it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import mlx.core as mx

KERNELS = (
    "scan_output", "scan_chunk", "scan_combine", "scan_step", "scan_backward", "conv_forward", "conv_backward",
    "ssd_output", "ssd_chunk", "ssd_gradient", "ssd_decay",
)  # fmt: skip
DIALECTS = ("metal", "cuda")


class Call(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: one of :data:`KERNELS`.
        inputs: the arrays by the names that the body gives them, in order.
        outputs: shape and dtype of each result, by the same rule.
        template: compile-time constants: sizes, flags and dtypes.
        groups: the number of threadgroups in each of three directions.
        threads: threads of a threadgroup, a multiple of 32.
    """

    kernel: str
    inputs: Mapping[str, mx.array]
    outputs: Mapping[str, tuple[tuple[int, ...], mx.Dtype]]
    template: Mapping[str, int | bool | mx.Dtype]
    groups: tuple[int, int, int]
    threads: int


Launch = Callable[[Call], dict[str, mx.array]]
"""Runs a kernel: :func:`metal`, :func:`cuda`, or what a test puts in their place. The results by name."""


def missing(dialect: str) -> str:
    """Why the kernels cannot run here in a dialect; "" if they can."""
    there = {"metal": mx.metal.is_available, "cuda": mx.cuda.is_available}[dialect]()
    if not there:
        return {
            "metal": "it needs an Apple GPU, and MLX finds none",
            "cuda": "it needs an NVIDIA GPU and MLX's CUDA build (pip install 'mlx[cuda13]' or 'mlx[cuda12]')",
        }[dialect]
    if mx.default_device().type != mx.DeviceType.gpu:
        return "MLX's default device is 'cpu'; call mlx.core.set_default_device(mlx.core.gpu) first"
    return ""


def dialect() -> str:
    """The dialect of the kernels of MLX's default device; "" on the CPU."""
    return next((name for name in DIALECTS if not missing(name)), "")


@cache
def text(name: str) -> str:
    """A file of this package: a body or a header."""
    return files("mambax_mlx.kernels").joinpath(name).read_text(encoding="utf-8")


def source(kernel: str, dialect: str) -> tuple[str, str]:
    """(header, body) of a kernel in a dialect."""
    return text(f"{dialect}.h") + text("common.h"), text(f"{kernel}.metal")


def metal(call: Call) -> dict[str, mx.array]:
    """Launch a kernel on an Apple GPU."""
    return _run(call, "metal")


def cuda(call: Call) -> dict[str, mx.array]:
    """Launch a kernel on an NVIDIA GPU."""
    return _run(call, "cuda")


def signature(call: Call) -> str:
    """What MLX's text around a body depends on besides the template: dtypes, and inputs of few elements."""
    inputs = [f"{_short(x.dtype)}{'c' if x.size < 8 else ''}" for x in call.inputs.values()]
    return "_".join(inputs + [_short(dtype) for _, dtype in call.outputs.values()])


def _short(dtype: mx.Dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1].replace("float", "f").replace("bool", "b")


def _run(call: Call, dialect: str) -> dict[str, mx.array]:
    kernel = _kernel(dialect, call.kernel, signature(call), tuple(call.inputs), tuple(call.outputs))
    x, y, z = call.groups
    results = kernel(
        inputs=list(call.inputs.values()),
        template=list(call.template.items()),
        grid=(x * call.threads, y, z),
        threadgroup=(call.threads, 1, 1),
        output_shapes=[shape for shape, _ in call.outputs.values()],
        output_dtypes=[dtype for _, dtype in call.outputs.values()],
    )
    return dict(zip(call.outputs, results, strict=True))


@cache
def _kernel(dialect: str, kernel: str, signature: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    header, body = source(kernel, dialect)
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:8]  # compiled kernels are kept by name
    build = mx.fast.metal_kernel if dialect == "metal" else mx.fast.cuda_kernel
    return build(
        name=f"mambax_{kernel}_{digest}_{signature}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=header,
        ensure_row_contiguous=False,
    )
