"""Runs the GPU kernels of the MLX backend on the CPU, as C++ behind headers that supply Metal's and CUDA's names.

:class:`Harness` is a ``Launch`` of :mod:`mambax_mlx.kernels.launch`: put in its place, the fused ops run as they do
on a GPU, down to the last launch. It takes the text that MLX would compile (``metal_text.py``) and compiles it with
the address and undefined-behaviour sanitizers (``tests/metal/runner.cpp``). Inputs that a kernel takes with strides
get unusual ones, in a block of memory that holds nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from metal_text import ATTRIBUTES, CUDA_TYPES, FOLDER, METAL_TYPES, cuda_text, infos, metal_text, short

FLAGS = [
    "-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-ftrivial-auto-var-init=pattern", "-ffp-contract=off", "-w",
]  # fmt: skip
COMPILER = shutil.which("g++") or shutil.which("clang++")
MISSING = (
    "no C++ compiler (g++ or clang++) is found" if COMPILER is None
    else "the harness needs ucontext.h, which Windows has not" if sys.platform == "win32" else ""
)  # fmt: skip

VALUES = {
    "simdgroup_index_in_threadgroup": "harness::in_group().x / 32",
    "thread_index_in_simdgroup": "harness::lane()",
    "thread_position_in_threadgroup": "harness::in_group()",
    "threadgroup_position_in_grid": "harness::group()",
    "threadgroups_per_grid": "harness::groups()",
}
"""What the harness passes for the attributes of a Metal signature."""


def program(call: Any, dialect: str, edit: Callable[[str], str]) -> str:
    """The C++ program that runs a kernel: MLX's text, and a main function that calls it."""
    from mambax_mlx.kernels import launch

    header, body = launch.source(call.kernel, dialect)
    header += "\n#undef SHARED\n#define SHARED(type, name, count) static harness::Shared<type, count> name\n"
    body = edit(body)
    pointers: list[str] = []

    def pointer(kind: str) -> str:
        pointers.append(kind)
        return f"({kind})addresses[{len(pointers) - 1}]"

    types = METAL_TYPES if dialect == "metal" else CUDA_TYPES
    arguments = []
    for key, x in call.inputs.items():
        arguments.append(pointer(f"const {types[short(x.dtype)]}*"))
        for what in infos(body, key):
            if dialect == "metal":
                arguments.append(pointer({"shape": "const int*", "strides": "const int64_t*"}[what]))
            else:
                arguments.append("*" + pointer(f"const mlx::core::cu::{what.capitalize()}*"))
    arguments += [pointer(f"{types[short(dtype)]}*") for _, dtype in call.outputs.values()]
    if dialect == "metal":
        arguments += [VALUES[key] for key in ATTRIBUTES if key in body]
        chosen = ", ".join(str(int(x)) if isinstance(x, int) else types[short(x)] for x in call.template.values())
        text = metal_text(call, "it", header, body)
        text = text[: text.rindex("\ntemplate [[host_name")]  # an explicit instantiation in clang's dialect
        function = f"{text.split('[[kernel]] void ')[1].split('(')[0]}<{chosen}>"
    else:
        text, function = cuda_text(call, "it", header, body), "mlx::core::cu::custom_kernel_it"
    lambda_ = f"[](char** addresses) {{ {function}({', '.join(arguments)}); }}"
    return f'#include "{dialect}.h"\n{text}\nint main() {{ return harness::serve({lambda_}); }}\n'


class Harness:
    """Launches kernels on the CPU.

    Args:
        folder: where compiled programs are kept, by a hash of their text.
        dialect: "metal" or "cuda".
        edit: changes a kernel's body before it is compiled, to plant an error.
        backwards: run the last thread first.
        spread: give strided inputs unusual strides.
    """

    def __init__(
        self,
        folder: Path,
        dialect: str = "metal",
        *,
        edit: Callable[[str, str], str] = lambda _, body: body,
        backwards: bool = False,
        spread: bool = True,
    ) -> None:
        self.folder, self.dialect, self.edit = folder, dialect, edit
        self.backwards, self.spread = backwards, spread
        self.launched: list[Any] = []

    def __call__(self, call: Any) -> dict[str, Any]:
        """Run a call; a test gets what MLX would return."""
        from mambax_mlx.kernels import launch

        self.launched.append(call)
        assert call.threads % 32 == 0
        assert call.kernel in launch.KERNELS
        _, body = launch.source(call.kernel, self.dialect)
        body = self.edit(call.kernel, body)
        text = program(call, self.dialect, lambda _: body)
        rng = np.random.default_rng(len(self.launched))
        parts: list[bytes] = []
        for key, x in call.inputs.items():
            array, what = to_numpy(x), infos(body, key)
            array = spread(array, rng) if self.spread and "strides" in what else np.ascontiguousarray(array)
            parts.append(block(array))
            width = len(array.shape) if self.dialect == "metal" else 10
            for kind in what:
                numbers = array.shape if kind == "shape" else [s // array.itemsize for s in array.strides]
                dtype = np.int32 if kind == "shape" else np.int64
                data = np.array([*numbers, *[0] * (width - len(numbers))], dtype).tobytes()
                parts.append(np.array([0, len(data), 0], np.int64).tobytes() + data)
        shapes = [(shape, np.dtype(numpy_dtype(dtype))) for shape, dtype in call.outputs.values()]
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes]
        parts += [np.array([1, size, 0], np.int64).tobytes() for size in sizes]
        if self.dialect == "metal":
            assert len(parts) <= 31, f"{call.kernel} takes {len(parts)} buffers; Metal has 31"
        head = np.array([len(parts), call.threads, self.backwards, *call.groups], np.int32).tobytes()
        done = subprocess.run(
            [self._program(text)], input=head + b"".join(parts), capture_output=True, check=False, timeout=120
        )
        if done.returncode or len(done.stdout) != sum(sizes):
            raise RuntimeError(f"{call.kernel} failed ({done.returncode}):\n{done.stderr.decode()[:4000]}")
        results, place = {}, 0
        for key, (shape, dtype), size in zip(call.outputs, shapes, sizes, strict=True):
            results[key] = to_mlx(np.frombuffer(done.stdout[place : place + size], dtype).reshape(shape))
            place += size
        return results

    def _program(self, text: str) -> Path:
        """The program of this text, compiled if that has not been done before."""
        headers = b"".join((FOLDER / name).read_bytes() for name in ("runner.h", f"{self.dialect}.h"))
        runner = self._built((FOLDER / "runner.cpp").read_bytes(), headers, ["-std=c++17", "-O1", "-c"], [])
        return self._built(text.encode(), headers, [*FLAGS], ["-x", "none", str(runner)])

    def _built(self, text: bytes, headers: bytes, options: list[str], more: list[str]) -> Path:
        flags = [str(COMPILER), *options, "-I", str(FOLDER)]
        path = self.folder / hashlib.sha256(" ".join([*flags, *more]).encode() + headers + text).hexdigest()[:24]
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")  # another process may be at the same
            command = [*flags, "-o", str(part), "-x", "c++", "-", *more]
            done = subprocess.run(command, input=text, capture_output=True, check=False, timeout=120)
            if done.returncode:
                raise RuntimeError(f"a kernel does not compile:\n{done.stderr.decode()[:4000]}")
            part.replace(path)
        return path


# --- arrays ------------------------------------------------------------------------------------------------------


def numpy_dtype(dtype: Any) -> Any:
    return ml_dtypes.bfloat16 if short(dtype) == "bfloat16" else short(dtype)


def to_numpy(x: Any) -> np.ndarray:
    import mlx.core as mx

    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(x)


def to_mlx(array: np.ndarray) -> Any:
    import mlx.core as mx

    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def spread(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same values with unusual strides: axes in another order, gaps, one axis the other way around."""
    order = rng.permutation(array.ndim)
    steps = [int(rng.integers(1, 3)) for _ in order]
    room = np.full([array.shape[axis] * step + 1 for axis, step in zip(order, steps, strict=True)], -1, np.int8)
    room = np.repeat(room[..., None], array.itemsize, -1).view(array.dtype)[..., 0] if array.itemsize > 1 else room
    room = room.view(array.dtype)
    view = room[tuple(slice(0, array.shape[a] * s, s) for a, s in zip(order, steps, strict=True))]
    view = view.transpose(np.argsort(order))
    axis = int(rng.integers(array.ndim))
    view = np.flip(view, axis)
    view[...] = array
    return view


def block(array: np.ndarray) -> bytes:
    """An input in a launch: exactly the bytes from its first to its last element, and where element 0 is."""
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    before = -sum(min(0, r) for r in reach)
    size = before + sum(max(0, r) for r in reach) + array.itemsize if array.size else 0
    flat = np.lib.stride_tricks.as_strided(
        array[tuple(slice(-1, None) if r < 0 else slice(0, 1) for r in reach)].view(np.uint8), (size,), (1,)
    ) if size else np.zeros(0, np.uint8)  # fmt: skip
    return np.array([0, size, before], np.int64).tobytes() + flat.tobytes()
