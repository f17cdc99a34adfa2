"""The text that MLX writes around the body of a GPU kernel, by its rules, and compilers that check it.

``test_metal_mlx.py`` compares the Metal text with MLX's own. The rules are those of
``mlx/backend/common/metal_kernel.cpp`` and ``mlx/backend/cuda/custom_kernel.cpp``.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "metal"
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint", "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3", "grid_origin": "uint3", "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint", "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint", "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint", "thread_index_in_quadgroup": "uint", "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint", "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3", "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3", "threads_per_grid": "uint3", "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}  # fmt: skip
"""What MLX adds to a Metal signature where the body mentions it (``mlx/backend/common/metal_kernel.cpp``)."""

METAL_TYPES = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "bool": "bool",
    "int32": "int32_t",
}
CUDA_TYPES = METAL_TYPES | {"float16": "__half", "bfloat16": "__nv_bfloat16"}


def short(dtype: Any) -> str:
    """ "float32" of ``mlx.core.float32``."""
    return str(dtype).rsplit(".", 1)[-1]


def infos(body: str, name: str) -> list[str]:
    """What of an input's layout MLX passes with it: of "shape", "strides" and "ndim" what the body mentions."""
    return [what for what in ("shape", "strides", "ndim") if f"{name}_{what}" in body]


def metal_text(call: Any, name: str, header: str, body: str) -> str:
    """The Metal source that MLX generates for a call of a kernel of this name."""

    def value(x: Any) -> str:
        return str(int(x)) if isinstance(x, int) else METAL_TYPES[short(x)]

    kinds = [
        "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "typename"
        for x in call.template.values()
    ]
    chosen = ", ".join(value(x) for x in call.template.values())
    function = f"custom_kernel_{name}_{'_' + chosen.replace(', ', '_')}"
    function += "".join(
        f"_{METAL_TYPES[short(x.dtype)]}{'c' if x.size < 8 else ''}" for x in call.inputs.values()
    ) + "".join(f"_{METAL_TYPES[short(dtype)]}" for _, dtype in call.outputs.values())
    lines, buffers = [], itertools.count()
    for key, x in call.inputs.items():
        space = "constant" if x.size < 8 else "device"
        lines.append(f"  const {space} {METAL_TYPES[short(x.dtype)]}* {key} [[buffer({next(buffers)})]]")
        types = {
            "shape": "const constant int*",
            "strides": "const constant int64_t*",
            "ndim": "const constant int&",
        }
        lines += [f"  {types[what]} {key}_{what} [[buffer({next(buffers)})]]" for what in infos(body, key)]
    for key, (_, dtype) in call.outputs.items():
        lines.append(f"  device {METAL_TYPES[short(dtype)]}* {key} [[buffer({next(buffers)})]]")
    lines += [f"  {kind} {key} [[{key}]]" for key, kind in ATTRIBUTES.items() if key in body]
    parameters = ", ".join(f"{kind} {key}" for kind, key in zip(kinds, call.template, strict=True))
    arguments = ",\n".join(lines)
    return (
        f"{header}template <{parameters}>\n[[kernel]] void {function}(\n{arguments}) {{\n{body}\n}}\n"
        f'\ntemplate [[host_name("{function}")]] [[kernel]] '
        f"decltype({function}<{chosen}>) {function}<{chosen}>;\n"
    )


def cuda_text(call: Any, name: str, header: str, body: str) -> str:
    """The CUDA source that MLX generates, without its own includes."""
    lines = []
    for key, x in call.inputs.items():
        lines.append(f"    const {CUDA_TYPES[short(x.dtype)]}* {key}")
        types = {"shape": "Shape", "strides": "Strides", "ndim": "int"}
        lines += [f"    const __grid_constant__ {types[what]} {key}_{what}" for what in infos(body, key)]
    lines += [f"    {CUDA_TYPES[short(dtype)]}* {key}" for key, (_, dtype) in call.outputs.items()]
    constants = ""
    for key, x in call.template.items():
        if isinstance(x, bool):
            constants += f"  constexpr bool {key} = {str(x).lower()};\n"
        elif isinstance(x, int):
            constants += f"  constexpr int {key} = {x};\n"
        else:
            constants += f"  using {key} = {CUDA_TYPES[short(x)]};\n"
    arguments = ",\n".join(lines)
    return (
        f"{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void custom_kernel_{name}(\n{arguments}) {{\n{constants}\n{body}\n}}\n\n"
        "} // namespace mlx::core::cu\n"
    )


def checked_by_clang(call: Any, clang: list[str]) -> None:
    """Compile MLX's text of a kernel as clang does it for Metal: address spaces apart, instantiated, not run.

    Raises:
        RuntimeError: with clang's message, when it does not compile.
    """
    from mambax_mlx.kernels import launch

    text = metal_text(call, "it", *launch.source(call.kernel, "metal"))
    text = '#include "metal.h"\n' + re.sub(r"template \[\[host_name.*\]\] decltype", "template decltype", text)
    flags = [
        "-std=c++17",
        "-DADDRESS_SPACES",
        "-fsyntax-only",
        "-Wno-unknown-attributes",
        "-Wno-ignored-attributes",
    ]
    command = [*clang, *flags, "-I", str(FOLDER), "-x", "c++", "-"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{call.kernel} does not compile:\n{done.stderr[:4000]}")


CUDA_PRELUDE = """
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
"""What of MLX's headers the generated CUDA source uses (``mlx/backend/cuda/device/utils.cuh``)."""


def compiled_by_nvcc(calls: list[Any], nvcc: str, output: Path) -> str:
    """The PTX of the kernels of some calls.

    Raises:
        RuntimeError: with nvcc's message, when one does not compile.
    """
    from mambax_mlx.kernels import launch

    text = CUDA_PRELUDE + launch.source(calls[0].kernel, "cuda")[0]
    for number, call in enumerate(calls):
        text += cuda_text(call, f"{call.kernel}_{number}", "", launch.source(call.kernel, "cuda")[1])
    source = output.with_suffix(".cu")
    source.write_text(text, encoding="utf-8")
    command = [nvcc, "-std=c++17", "-ptx", "-arch=sm_90", "-o", str(output), str(source)]
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=280)
    if done.returncode:
        raise RuntimeError(f"nvcc does not compile the kernels:\n{(done.stdout + done.stderr)[:4000]}")
    return output.read_text(encoding="utf-8")
