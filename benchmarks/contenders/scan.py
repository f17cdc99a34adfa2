"""The selective scan by mambax, and by others: as transformers loops over tokens, by mambapy, and in C.

Dimensions: B batch (1), L length, D channels, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.contenders import c_library
from benchmarks.contenders.scan_inputs import Inputs, errors, inputs


def _inputs(job: Job) -> Inputs:
    return inputs(job["length"], job["channels"], job["states"], backward=job["backward"])


class Mambax:
    """The scan of a backend of mambax.

    Args:
        backend: its name.
        impl: name of the implementation.
    """

    def __init__(self, backend: str, impl: str) -> None:
        from mambax import get_backend

        if backend == "mlx":
            mx = optional("mlx.core", "mlx")
            mx.set_default_device(mx.cpu)
        self.nn = get_backend(backend)
        self.impl = impl
        reason = self.nn.scan_implementations().get(impl, f"backend {backend} has no scan {impl!r}")
        if reason:
            raise Unavailable(reason)

    def prepare(self, job: Job) -> Task:
        """A job of kind forward or backward (forward and backward)."""
        if job["backward"] and self.nn.name == "numpy":
            return self._numpy_gradient(job)
        if job["backward"] and self.nn.name != "torch":
            raise Unavailable(f"gradients of the {self.nn.name} backend are not measured here")
        if self.nn.name == "torch":
            return torch_task(job, self._scan)
        given = _inputs(job)
        arrays = [self.nn.from_numpy(x) for x in given[:8]]
        held: list[Any] = []

        def run() -> None:
            y, state = self._scan(*arrays)
            self.nn.evaluate(y, state)
            held[:] = [y]

        return Task(run, check=lambda: errors(given, self.nn.to_numpy(held[0]), None))

    def _scan(self, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
        return self.nn.selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, impl=self.impl
        )

    def _numpy_gradient(self, job: Job) -> Task:
        if self.impl != "cpu":
            raise Unavailable("the numpy backend has a gradient in its fused kernels alone")
        from mambax_cpu import scan as fused

        given = _inputs(job)
        held: list[np.ndarray] = []

        def run() -> None:
            arguments = fused.arguments(*given[:6], z=given.z, delta_bias=given.delta_bias, delta_softplus=True)
            y, _, saved = fused.forward(arguments, save=True)
            assert saved is not None
            held[:] = [y, fused.backward(arguments, saved, given.dy).u]

        return Task(run, check=lambda: errors(given, held[0], held[1]))


def torch_task(job: Job, scan: Callable[..., tuple[Any, Any]]) -> Task:
    """A scan of tensors, with its gradient with respect to all of its arguments if the job says so."""
    import torch

    given = _inputs(job)
    tensors = [torch.from_numpy(x) for x in given[:8]]
    held: list[Any] = []

    def forward() -> None:
        with torch.no_grad():
            held[:] = [scan(*tensors)[0]]

    def both() -> None:
        for tensor in tensors:
            tensor.grad = None
        y = scan(*tensors)[0]
        y.backward(dy)
        held[:] = [y.detach()]

    def check() -> dict[str, float]:
        gradient = tensors[0].grad
        return errors(given, held[0].numpy(), None if gradient is None else gradient.numpy())

    if not job["backward"]:
        return Task(forward, check=check)
    dy = torch.from_numpy(given.dy)
    for tensor in tensors:
        tensor.requires_grad_()
    return Task(both, check=check)


class TorchLoop:
    """torch operations in a loop over tokens, as transformers runs where its kernels are missing."""

    def prepare(self, job: Job) -> Task:
        """A job of kind forward or backward."""
        torch = optional("torch", "torch")
        functional = torch.nn.functional

        def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
            delta = functional.softplus(delta + bias)[..., None]  # (1, L, D, 1)
            decay, change = torch.exp(delta * A), delta * B[:, :, None] * u[..., None]  # (1, L, D, N)
            h = torch.zeros_like(decay[:, 0])
            outputs = []
            for t in range(u.shape[1]):
                h = decay[:, t] * h + change[:, t]
                outputs.append((h @ C[:, t, :, None])[..., 0])
            return (torch.stack(outputs, dim=1) + D * u) * functional.silu(z), h

        return torch_task(job, scan)


class Mambapy:
    """mambapy's parallel scan, with what its block does before and after it."""

    def __init__(self) -> None:
        optional("torch", "torch")
        self.pscan = optional("mambapy.pscan", "mambapy").pscan

    def prepare(self, job: Job) -> Task:
        """A job of kind forward or backward."""
        import torch
        from torch.nn import functional

        def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
            delta = functional.softplus(delta + bias)[..., None]
            states = self.pscan(torch.exp(delta * A), delta * B[:, :, None] * u[..., None])  # (1, L, D, N)
            return ((states @ C[..., None])[..., 0] + D * u) * functional.silu(z), states[:, -1]

        return torch_task(job, scan)


class CLoop:
    """The same loop in C, built here, on as many threads as the others.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self.library = c_library.build()
        self.threads = threads

    def prepare(self, job: Job) -> Task:
        """A job of kind forward."""
        channels, states = job["channels"], job["states"]
        if job["backward"]:
            raise Unavailable("the loop in C has no gradient")
        if states > c_library.MOST_STATES:
            raise Unavailable(f"the loop in C takes at most {c_library.MOST_STATES} states")
        given = _inputs(job)
        y = np.full_like(given.u, np.nan)
        arrays = (*given[:8], y)  # which part keeps alive
        blocks = -(-channels // c_library.LANES)
        bounds = [min(channels, blocks * i // self.threads * c_library.LANES) for i in range(self.threads + 1)]
        pool = ThreadPoolExecutor(self.threads)

        def part(i: int) -> None:  # ctypes releases the GIL
            pointers = [array.ctypes.data for array in arrays]
            self.library.scan(*pointers, job["length"], channels, states, bounds[i], bounds[i + 1])

        def run() -> None:
            list(pool.map(part, range(self.threads)))

        return Task(run, check=lambda: errors(given, y, None))
