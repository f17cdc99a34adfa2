"""The machine in the place of a GPU's driver: Triton compiles for a GPU as ever, and launches come here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.cache import get_cache_manager

from ptx.machine import Program
from ptx.memory import Global


class Launcher:
    """One compiled kernel, as Triton launches it."""

    def __init__(self, src: Any, metadata: Any):
        names = src.fn.arg_names
        constants = {names[place[0]] if isinstance(place, tuple) else place for place in src.constants}
        self.kinds = {
            name: kind for name, kind in src.signature.items() if kind != "constexpr" and name not in constants
        }
        self.names, self.metadata = list(src.signature), metadata
        file = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        with open(str(file), encoding="utf-8") as text:
            self.program = Program(text.read())

    def __call__(self, *given: Any) -> None:
        """Of what Triton hands over, the first three are the grid, and the last are the arguments."""
        arguments = dict(zip(self.names, given[len(given) - len(self.names) :], strict=True))
        parameters = list(self.program.kernel.parameters.items())
        values: dict[str, Any] = {name: np.uint64(0) for name, _ in parameters}  # Triton adds some of its own
        storages = []
        for (parameter, size), (name, kind) in zip(parameters, self.kinds.items(), strict=False):
            x = arguments[name]
            if isinstance(x, torch.Tensor):
                storages.append((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))
                values[parameter] = np.uint64(x.data_ptr())
            elif kind == "fp32":
                values[parameter] = np.float32(x).view(np.uint32)
            else:
                values[parameter] = np.dtype(f"i{size}").type(x)
        self.program.launch(given[:3], 32 * self.metadata.num_warps, self.metadata.shared, values, Global(storages))


class Utils:
    """What Triton asks of a driver's library."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Handles, registers, spilled bytes and the most threads of a block, none of which matters here."""
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        """There is none."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of an H100, as far as Triton asks."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """A GPU that is not there."""

    launcher_cls = Launcher
    utils = Utils()

    def __init__(self, capability: tuple[int, int]):
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one alone."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self.capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """From here on kernels take tensors in host memory and run on the machine, compiled for a GPU of this compute
    capability. No machine code is made of them."""
    from mambax_cpu.object_files import cache_folder
    from mambax_torch.kernels import devices

    folder = Path(os.environ.get("TRITON_CACHE_DIR") or cache_folder())
    os.environ["TRITON_CACHE_DIR"] = str(folder / "ptx")  # a GPU must never find kernels without machine code
    CUDABackend.make_cubin = lambda *_: b""
    triton.runtime.driver.set_active(Driver(capability))
    devices.take_host_memory()
