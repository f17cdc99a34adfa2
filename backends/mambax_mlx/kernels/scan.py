"""The selective scan by GPU kernels, differentiable.

A row of more than one chunk goes through three kernels: every chunk from a state of zero (``scan_chunk``), the
state before every chunk (``scan_combine``), every chunk again from that state (``scan_output``). Where rows and
channels alone fill the GPU, the last of them goes through whole rows and the others are left out. The way back is
the same, of the gradient of the state, from the end, and then ``scan_backward``.

Between the passes live one state and one gradient for each chunk, N / 64 numbers per input.

Dimensions: B batch, L length, D d_inner, N d_state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from mambax.scan import check_shapes, refuse_mask_with_boundaries
from mambax_mlx.kernels.launch import Call, Launch
from mambax_mlx.kernels.layout import layout, refusal

Arrays = Mapping[str, mx.array]

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
"""The arguments that have a gradient."""

EVERY, MASKED, PACKED = range(3)
"""What the flags of the steps mean; ``Steps`` in common.h."""

ENOUGH_THREADS = 1 << 15
"""Threads that fill a GPU: about 800 on each of 40 cores. With fewer, time is divided among threads too."""

SHARES = 1024
"""Bound on N times the partial sums of the gradients of B and C, in numbers per step of a row."""


def selective_scan(
    launch: Launch,
    u: mx.array,  # (B, L, D)
    delta: mx.array,  # (B, L, D)
    A: mx.array,  # (D, N)
    B: mx.array,  # (B, L, N)
    C: mx.array,  # (B, L, N)
    D: mx.array | None = None,  # (D,)
    *,
    z: mx.array | None = None,  # (B, L, D)
    delta_bias: mx.array | None = None,  # (D,)
    delta_softplus: bool = False,
    initial_state: mx.array | None = None,  # (B, D, N)
    mask: mx.array | None = None,  # (B, L) bool
    boundaries: mx.array | None = None,  # (B, L) bool
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.scan.selective_scan` by GPU kernels, lazy, differentiable (once), and inside ``mx.compile``.

    The output at a masked step is zero. Strides are free: only small arrays are copied, if not contiguous.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and sizes and dtypes that the
            kernels do not have: see :func:`refusal`.
        NotImplementedError: under ``mx.vmap``, ``mx.jvp`` and in second derivatives.
    """
    values = dict(zip(NAMES, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    check_shapes(**values, mask=mask, boundaries=boundaries)
    refuse_mask_with_boundaries("selective_scan", mask, boundaries)
    reason = refusal(u, A, *values.values())
    if reason:
        raise ValueError(f"selective_scan: {reason}")
    flags = mask if mask is not None else boundaries
    kind = EVERY if flags is None else MASKED if mask is not None else PACKED
    arrays = {name: x for name, x in values.items() if x is not None}
    if flags is not None:
        arrays["steps"] = flags.astype(mx.bool_)
    scan = Scan(launch, delta_softplus, kind)

    def run(*given: mx.array) -> tuple[mx.array, ...]:
        return scan.forward(dict(zip(arrays, given, strict=True)))

    def gradient(*given: mx.array) -> tuple[mx.array, ...]:
        named = dict(zip(arrays, given, strict=False))
        dy, dfinal, *states = given[len(arrays) :]
        found = scan.backward(named, dy, dfinal, states[0] if states else None)
        return tuple(found[name].astype(x.dtype) for name, x in named.items())

    differentiable: Any = once_differentiable(run, gradient)
    y, final, *_ = differentiable(*arrays.values())
    return y, final


def once_differentiable(run: Any, gradient: Any) -> Any:
    """``run`` as a function of MLX whose gradient is ``gradient(*arguments, *the gradients of y and of the final
    state, *any further results of run)``."""
    differentiable: Any = mx.custom_function(run)
    of_gradient: Any = mx.custom_function(gradient)
    differentiable.vjp(lambda given, cotangents, results: of_gradient(*given, *cotangents[:2], *results[2:]))
    for function in (differentiable.jvp, differentiable.vmap, of_gradient.jvp, of_gradient.vjp, of_gradient.vmap):
        function(_refuse)
    return differentiable


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "the GPU kernels have first gradients in reverse mode, and a batch axis of their own in place of mx.vmap; "
        "for others use the scan implementation 'pscan' or 'chunked'"
    )


class Scan(NamedTuple):
    """The passes of the scan. ``softplus`` and ``kind`` (of the flags ``steps``) hold for all of them."""

    launch: Launch
    softplus: bool
    kind: int

    def forward(self, x: Arrays) -> tuple[mx.array, ...]:
        """y, the final state and, where there are several chunks, the state before each, (B, chunks, D, N)."""
        (batch, length, channels), states = x["u"].shape, x["A"].shape[1]
        plan = layout(states)
        outputs = {"y": (x["u"].shape, x["u"].dtype), "final_state": ((batch, channels, states), mx.float32)}
        if length == 1:
            results = self._launch("scan_step", x, outputs, state=x.get("initial_state"))
            return results["y"], results["final_state"]
        whole = length <= plan.chunk or batch * channels * plan.lanes >= ENOUGH_THREADS
        before = None if whole else self._before(x)
        results = self._launch(
            "scan_output", x, outputs, state=x.get("initial_state") if whole else before,
            chunks=1 if whole else _ceil(length, plan.chunk), CHUNK=0 if whole else plan.chunk, TILE=plan.tile,
        )  # fmt: skip
        return (results["y"], results["final_state"], *([] if before is None else [before]))

    def backward(self, x: Arrays, dy: mx.array, dfinal: mx.array, before: mx.array | None) -> dict[str, mx.array]:
        """The gradient of every argument, in float32 where it is a sum.

        Args:
            x: the arguments.
            dy: (B, L, D). dfinal: (B, D, N).
            before: (B, chunks, D, N), the state before each chunk, or None: then it is computed.
        """
        (batch, length, channels), states = x["u"].shape, x["A"].shape[1]
        plan = layout(states)
        chunks = _ceil(length, plan.chunk)
        after = dfinal
        if chunks > 1:
            before = self._before(x) if before is None else before
            after = self._after(x, dy, dfinal)
        else:
            before = x.get("initial_state")
        blocks = _ceil(channels, plan.backward // plan.lanes)
        shares = min(blocks, max(1, SHARES // states))
        gate, wide = x.get("z", x["u"]), mx.float32
        outputs = {
            "du": (x["u"].shape, x["u"].dtype),
            "ddelta": (x["u"].shape, x["delta"].dtype),
            "dz": (gate.shape if "z" in x else (1,), gate.dtype),
            "dB": ((shares, batch, length, states), wide),
            "dC": ((shares, batch, length, states), wide),
            "dA": ((batch, chunks, channels, states), wide),
            "dD": ((batch, chunks, channels), wide),
            "ddelta_bias": ((batch, chunks, channels), wide),
            "dinitial_state": ((batch, channels, states), wide),
        }
        found = self._launch(
            "scan_backward", x, outputs, state=before, more={"dstate": mx.contiguous(after), "dy": dy},
            chunks=chunks, groups=shares, threads=plan.backward, CHUNK=plan.chunk, TILE=plan.tile,
            T_DELTA=x["delta"].dtype, T_Z=gate.dtype,
        )  # fmt: skip
        sums = {"B": 0, "C": 0, "A": (0, 1), "D": (0, 1), "delta_bias": (0, 1)}
        gradients = {name: found[f"d{name}"] for name in (*NAMES, "steps") if f"d{name}" in found}
        gradients |= {name: mx.sum(gradients[name], axis) for name, axis in sums.items()}
        return gradients | ({"steps": mx.zeros_like(x["steps"])} if "steps" in x else {})

    def _before(self, x: Arrays) -> mx.array:
        """The state before every chunk, (B, chunks, D, N)."""
        return self._combine(x, x["u"], x["B"], x.get("initial_state"), reverse=False)

    def _after(self, x: Arrays, dy: mx.array, dfinal: mx.array) -> mx.array:
        """The gradient of the state after every chunk, (B, chunks, D, N)."""
        return self._combine(x, dy, x["C"], dfinal, reverse=True)

    def _combine(
        self, x: Arrays, inputs: mx.array, weights: mx.array, state: mx.array | None, *, reverse: bool
    ) -> mx.array:
        (batch, length, channels), states = x["u"].shape, x["A"].shape[1]
        plan = layout(states)
        chunks = _ceil(length, plan.chunk)
        template = {"HAS_Z": "z" in x, "HAS_BIAS": "delta_bias" in x, "SOFTPLUS": self.softplus, "STEPS": self.kind}
        A = mx.contiguous(x["A"])
        alone = self.launch(
            Call(
                "scan_chunk",
                {
                    "x": inputs, "delta": x["delta"], "A": A, "W": weights, "z": x.get("z", inputs),
                    "delta_bias": mx.contiguous(x.get("delta_bias", A)), "steps": x.get("steps", inputs),
                },
                {
                    "local_end": ((batch, chunks - 1, channels, states), mx.float32),
                    "total": ((batch, chunks - 1, channels), mx.float32),
                },
                {
                    "LANES": plan.lanes, "R": plan.held, "TILE": plan.tile, "CHUNK": plan.chunk,
                    "THREADS": plan.threads, "REVERSE": reverse, **template,
                },
                (_ceil(channels, plan.threads // plan.lanes), chunks - 1, batch),
                plan.threads,
            )
        )  # fmt: skip
        joined = self.launch(
            Call(
                "scan_combine",
                {**alone, "A": A, "state": A if state is None else mx.contiguous(state)},
                {"arriving": ((batch, chunks, channels, states), mx.float32)},
                {"THREADS": 128, "REVERSE": reverse, "HAS_STATE": state is not None, "ONE_DECAY": False},
                (_ceil(channels * states, 128), 1, batch),
                128,
            )
        )
        return joined["arriving"]

    def _launch(
        self,
        kernel: str,
        x: Arrays,
        outputs: dict[str, Any],
        *,
        state: mx.array | None,
        more: Arrays | None = None,
        chunks: int = 1,
        groups: int = 0,
        threads: int = 0,
        **template: Any,
    ) -> dict[str, mx.array]:
        """A kernel that takes all arguments of the scan. One that is left out is some other array, never read."""
        u, A = x["u"], mx.contiguous(x["A"])
        plan = layout(A.shape[1])
        threads = threads or plan.threads
        inputs = {
            "u": u, "delta": x["delta"], "A": A, "B": x["B"], "C": x["C"], "D": mx.contiguous(x.get("D", A)),
            "z": x.get("z", u), "delta_bias": mx.contiguous(x.get("delta_bias", A)), "steps": x.get("steps", u),
            "state": A if state is None else mx.contiguous(state), **(more or {}),
        }  # fmt: skip
        constants = {
            "T": u.dtype, "LANES": plan.lanes, "R": plan.held, "THREADS": threads, "SOFTPLUS": self.softplus,
            "STEPS": self.kind, "HAS_D": "D" in x, "HAS_Z": "z" in x, "HAS_BIAS": "delta_bias" in x,
            "HAS_STATE": state is not None, **template,
        }  # fmt: skip
        groups = groups or _ceil(u.shape[2], threads // plan.lanes)
        return self.launch(Call(kernel, inputs, outputs, constants, (groups, chunks, u.shape[0]), threads))


def _ceil(size: int, part: int) -> int:
    return -(-size // part)
