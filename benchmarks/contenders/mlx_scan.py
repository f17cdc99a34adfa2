"""The selective scan on MLX, by mambax's op and by a loop over tokens, on the same inputs.

Dimensions: B batch (1), L length, D channels, N d_state.
"""

from __future__ import annotations

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
        """A job of kind forward: length, channels, states."""
        mx = self.mx
        given = inputs(job["length"], job["channels"], job["states"], backward=False)
        arrays = [mx.array(x) for x in given[:8]]
        mx.eval(arrays)
        held: list[Any] = []

        def run() -> None:
            y, state = self.scan(*arrays)
            mx.eval(y, state)
            held[:] = [y]

        return Task(run, check=lambda: errors(given, np.array(held[0]), None))

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
