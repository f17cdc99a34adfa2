"""The selective scan on MLX, by mambax's op and by a loop over tokens, on the same inputs.

Dimensions: B batch (1), L length, D channels, N d_state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.contenders.scan_inputs import errors, inputs


class ScanOnMlx:
    """The scan on MLX's device.

    Args:
        package: ``"mambax"``: the op that a model takes there. ``"mlx-lm"``: the operations of one step of its
            ``mamba.py``, in a loop as there, but without the two projections that it has inside the loop.
        device: ``"cpu"`` or ``"gpu"``.
    """

    def __init__(self, package: str, device: str) -> None:
        self.mx, self.nn = optional("mlx.core", "mlx"), optional("mlx.nn", "mlx")
        self.mx.set_default_device(getattr(self.mx, device))
        if package not in ("mambax", "mlx-lm"):
            raise Unavailable(f"no scan of {package} on MLX")
        self.scan: Any = self._op if package == "mambax" else self._loop

    def prepare(self, job: Job) -> Task:
        """A job of kind forward or backward (all gradients): length, channels, states."""
        mx = self.mx
        given = inputs(job["length"], job["channels"], job["states"], backward=job["backward"])
        arrays, dy = [mx.array(x) for x in given[:8]], mx.array(given.dy)
        mx.eval(arrays, dy)
        held: list[Any] = []

        def forward() -> None:
            y, state = self.scan(*arrays)
            mx.eval(y, state)
            held[:] = [y]

        def backward() -> None:
            (y,), gradients = mx.vjp(lambda *all_: [self.scan(*all_)[0]], arrays, [dy])
            mx.eval(y, gradients)
            held[:] = [y, gradients[0]]

        run = backward if job["backward"] else forward
        return Task(run, check=lambda: errors(given, *_pair(map(np.array, held))))

    def _op(self, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
        import mambax

        op = mambax.get_backend("mlx").selective_scan
        return op(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)

    def _loop(self, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
        mx, nn = self.mx, self.nn
        outputs, state = [], None
        for t in range(u.shape[1]):
            x, dt = u[:, t], nn.softplus(delta[:, t] + bias)
            new = mx.expand_dims(dt * x, -1) * mx.expand_dims(B[:, t], 1)  # (1, D, N)
            state = new if state is None else new + state * mx.exp(mx.expand_dims(dt, -1) * A)
            outputs.append((state @ mx.expand_dims(C[:, t], -1)).squeeze(2) + D * x)
        return nn.silu(z) * mx.stack(outputs, axis=1), state


class TritonScan:
    """The scan of mambax's torch backend by its Triton kernels, on an NVIDIA GPU."""

    def __init__(self) -> None:
        self.torch = optional("torch", "torch")
        if not self.torch.cuda.is_available():
            raise Unavailable("torch finds no NVIDIA GPU")

    def prepare(self, job: Job) -> Task:
        """A job of kind forward or backward (all gradients)."""
        import mambax

        torch, op = self.torch, mambax.get_backend("torch").selective_scan
        given = inputs(job["length"], job["channels"], job["states"], backward=job["backward"])
        tensors = [torch.from_numpy(x).cuda().requires_grad_(job["backward"]) for x in given[:8]]
        dy = torch.from_numpy(given.dy).cuda()
        held: list[Any] = []

        def run() -> None:
            u, delta, A, B, C, D, z, bias = tensors
            y, _ = op(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, impl="triton")
            gradients = torch.autograd.grad(y, tensors, dy)[:1] if job["backward"] else ()
            torch.cuda.synchronize()
            held[:] = [y.detach(), *gradients]

        return Task(run, check=lambda: errors(given, *_pair(x.cpu().numpy() for x in held)))


def _pair(arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """The output and, if there is one, the gradient."""
    first, *more = arrays
    return first, more[0] if more else None
