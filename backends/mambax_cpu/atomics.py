"""Atomic reads and writes of int64 values in memory that several threads share, for kernels."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir

from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import intrinsic
from mambax_cpu.kernel_types import declared

integers = types.CPointer(types.int64)
"""The type of an address of int64 values."""

_PAUSE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "amd64": ("llvm.x86.sse2.pause", ()),
    "arm64": ("llvm.aarch64.hint", (ir.Constant(ir.IntType(32), 1),)),
    "aarch64": ("llvm.aarch64.hint", (ir.Constant(ir.IntType(32), 1),)),
}


@intrinsic
def load_acquire(typing_context: Any, base: Any, index: Any) -> Any:
    """base[index]; what its writer wrote before :func:`store_release` is seen by all that follows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", 8)

    return types.int64(integers, types.int64), generate


@intrinsic
def store_release(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """base[index] = value, after everything before it has been written."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], builder.gep(args[0], [args[1]]), "release", 8)
        return context.get_dummy_value()

    return types.void(integers, types.int64, types.int64), generate


@intrinsic
def add(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """base[index] += value in one operation; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "acq_rel")

    return types.int64(integers, types.int64, types.int64), generate


@intrinsic
def exchange_if(typing_context: Any, base: Any, index: Any, expected: Any, value: Any) -> Any:
    """base[index] = value if it is `expected`, in one operation; whether it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.gep(args[0], [args[1]])
        result = builder.cmpxchg(address, args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(integers, types.int64, types.int64, types.int64), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this thread waits for another; nothing on processors that have no such hint."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, values = _PAUSE.get(platform.machine().lower(), ("", ()))
        if name:
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            builder.call(declared(builder.module, name, kind), values)
        return context.get_dummy_value()

    return types.void(), generate
