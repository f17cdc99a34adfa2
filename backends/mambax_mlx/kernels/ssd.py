"""The scan of Mamba-2 by GPU kernels, differentiable.

Forward it goes as the selective scan does: each chunk of 256 steps from a state of zero (``ssd_chunk``), the state
before each chunk (``scan_combine``), each chunk again from that state (``ssd_output``). Where rows and heads alone
fill the GPU, and for one token, the last of them goes through whole rows. Inside a chunk the states stand in
registers and are walked step by step: that takes about as many operations as the masked product of matrices, whose
advantage are the GPU's matrix units, which have no common name in Metal and CUDA.

Nothing is kept for the way back. In chunks of 64 steps the states before each of them and the gradients of the
states after each are found in the same way, then ``ssd_gradient`` goes through every chunk twice, forwards with the
states and backwards with their gradients, and ``ssd_decay`` puts its sums together.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from mambax.scan import refuse_mask_with_boundaries
from mambax.ssd import check_shapes
from mambax_mlx.kernels.launch import Call, Launch
from mambax_mlx.kernels.scan import ENOUGH_THREADS, EVERY, MASKED, PACKED, SHARES, once_differentiable
from mambax_mlx.kernels.ssd_plan import CHUNK, GRADIENT_CHUNK, ceil, plan, refusal

Arrays = Mapping[str, mx.array]

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
"""The arguments that have a gradient."""


def ssd(
    launch: Launch,
    x: mx.array,  # (B, L, H, P)
    dt: mx.array,  # (B, L, H)
    A: mx.array,  # (H,)
    B: mx.array,  # (B, L, G, N)
    C: mx.array,  # (B, L, G, N)
    D: mx.array | None = None,  # (H,)
    *,
    dt_bias: mx.array | None = None,  # (H,)
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: mx.array | None = None,  # (B, H, P, N)
    mask: mx.array | None = None,  # (B, L) bool
    boundaries: mx.array | None = None,  # (B, L) bool
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.ssd.ssd` by GPU kernels, lazy, differentiable (once), and inside ``mx.compile``.

    The output at a masked step is zero. Strides are free: only small arrays are copied, if not contiguous.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and sizes and dtypes that the
            kernels do not have: see :func:`refusal`.
        NotImplementedError: under ``mx.vmap``, ``mx.jvp`` and in second derivatives.
    """
    values = dict(zip(NAMES, (x, dt, A, B, C, D, dt_bias, initial_state), strict=True))
    check_shapes(**values, mask=mask, boundaries=boundaries)
    refuse_mask_with_boundaries("ssd", mask, boundaries)
    reason = refusal(x, B, *values.values())
    if reason:
        raise ValueError(f"ssd: {reason}")
    flags = mask if mask is not None else boundaries
    kind = EVERY if flags is None else MASKED if mask is not None else PACKED
    arrays = {name: array for name, array in values.items() if array is not None}
    if flags is not None:
        arrays["steps"] = flags.astype(mx.bool_)
    duality = Duality(launch, dt_softplus, dt_limit, kind)

    def run(*given: mx.array) -> tuple[mx.array, ...]:
        return duality.forward(dict(zip(arrays, given, strict=True)))

    def gradient(*given: mx.array) -> tuple[mx.array, ...]:
        named = dict(zip(arrays, given, strict=False))
        found = duality.backward(named, *given[len(arrays) :])
        return tuple(found[name].astype(array.dtype) for name, array in named.items())

    differentiable: Any = once_differentiable(run, gradient)
    y, final = differentiable(*arrays.values())
    return y, final


class Duality(NamedTuple):
    """The passes of the scan. ``softplus``, ``limit`` and ``kind``, of the flags ``steps``, hold for all."""

    launch: Launch
    softplus: bool
    limit: tuple[float, float]
    kind: int

    def forward(self, x: Arrays) -> tuple[mx.array, ...]:
        """y and the final state."""
        (batch, length, heads, width), states = x["x"].shape, x["B"].shape[3]
        own = plan(width, states, length)
        groups = heads * ceil(width, own.block)
        whole = length <= CHUNK or batch * groups * own.threads >= ENOUGH_THREADS
        chunks = 1 if whole else ceil(length, CHUNK)
        state = x.get("initial_state")
        if not whole:
            state = self._arriving(x, x["x"], x["B"], state, chunks - 1, CHUNK, reverse=False)
        inputs = {**self._rows(x), "B": x["B"], "C": x["C"], **self._small(x, state)}
        outputs = {"y": (x["x"].shape, x["x"].dtype), "final_state": ((batch, heads, width, states), mx.float32)}
        template = {
            "T": x["x"].dtype, **own.template, "CHUNK": 0 if whole else CHUNK, **self._flags(x),
            "HAS_D": "D" in x, "HAS_STATE": state is not None,
        }  # fmt: skip
        found = self.launch(Call("ssd_output", inputs, outputs, template, (groups, chunks, batch), own.threads))
        return found["y"], found["final_state"]

    def backward(self, x: Arrays, dy: mx.array, dfinal: mx.array) -> dict[str, mx.array]:
        """The gradient of every argument, in float32 where it is a sum.

        Args:
            x: the arguments.
            dy: (B, L, H, P). dfinal: (B, H, P, N).
        """
        chunks = ceil(x["x"].shape[1], GRADIENT_CHUNK)
        part = {"chunks": chunks, "chunk": GRADIENT_CHUNK}
        # (B, chunks + 1, H, P N): the state before each chunk and the last one, and the gradients of these
        states = self._arriving(x, x["x"], x["B"], x.get("initial_state"), reverse=False, **part)
        gradients = self._arriving(x, dy, x["C"], dfinal, reverse=True, **part)
        dC, outputs, skips, _ = self._sums(x, dy, states, reverse=False)
        dB, inputs, _, dx = self._sums(x, dy, gradients, reverse=True)
        ends = mx.sum(states[:, 1:] * gradients[:, 1:], axis=-1)  # (B, chunks, H)
        found = self._decay(x, ends, outputs, inputs)
        found |= {"x": dx, "B": dB, "C": dC, "D": mx.sum(skips, axis=(0, 1, 3))}
        found["initial_state"] = gradients[:, 0].reshape(dfinal.shape)
        return found | ({"steps": mx.zeros_like(x["steps"])} if "steps" in x else {})

    def _arriving(
        self,
        x: Arrays,
        inputs: mx.array,
        weights: mx.array,
        state: mx.array | None,
        chunks: int,
        chunk: int,
        *,
        reverse: bool,
    ) -> mx.array:
        """The state before each of so many chunks and after the last of them, (B, chunks + 1, H, P N).

        In reverse the gradients of these states. There may be more of the row, before it in reverse.
        """
        (batch, _, heads, width), states = x["x"].shape, weights.shape[3]
        own, A = plan(width, states), mx.contiguous(x["A"])
        small = {name: array for name, array in self._small(x, state).items() if name != "D"}
        state_given = small.pop("state")
        alone = self.launch(
            Call(
                "ssd_chunk",
                {**self._rows(x), "x": inputs, "W": weights, **small},
                {
                    "local_end": ((batch, chunks, heads, width * states), mx.float32),
                    "total": ((batch, chunks, heads), mx.float32),
                },
                {**own.template, "CHUNK": chunk, "REVERSE": reverse, **self._flags(x)},
                (heads * ceil(width, own.block), chunks, batch),
                own.threads,
            )
        )
        joined = self.launch(
            Call(
                "scan_combine",
                {**alone, "A": A, "state": state_given},
                {"arriving": ((batch, chunks + 1, heads, width * states), mx.float32)},
                {"THREADS": 128, "REVERSE": reverse, "HAS_STATE": state is not None, "ONE_DECAY": True},
                (ceil(heads * width * states, 128), 1, batch),
                128,
            )
        )
        return joined["arriving"]

    def _sums(self, x: Arrays, dy: mx.array, state: mx.array, *, reverse: bool) -> tuple[mx.array, ...]:
        """The gradient of C, or in reverse of B; the products of ``ssd_gradient``; dy x; and the gradient of x."""
        (batch, length, heads, width), (groups, states) = x["x"].shape, x["B"].shape[2:]
        own = plan(width, states, gradient=True)
        blocks = ceil(width, own.block)
        shares = min(heads // groups * blocks, max(1, SHARES // states))
        products = ((batch, length, heads, blocks), mx.float32)
        unused = ((1,), mx.float32)
        found = self.launch(
            Call(
                "ssd_gradient",
                {**self._rows(x), "B": x["B"], "C": x["C"], **self._small(x, state), "dy": dy},
                {
                    "dW": ((shares, batch, length, groups, states), mx.float32),
                    "product": products,
                    "skips": unused if reverse else products,
                    "dx": (x["x"].shape if reverse else (1,), x["x"].dtype),
                },
                {
                    "T": x["x"].dtype, **own.template, "CHUNK": GRADIENT_CHUNK, "REVERSE": reverse,
                    "HAS_D": "D" in x, **self._flags(x),
                },
                (groups * shares, ceil(length, GRADIENT_CHUNK), batch),
                own.threads,
            )
        )  # fmt: skip
        return mx.sum(found["dW"], axis=0), found["product"], found["skips"], found["dx"]

    def _decay(self, x: Arrays, ends: mx.array, outputs: mx.array, inputs: mx.array) -> dict[str, mx.array]:
        """The gradients of dt, its bias and A."""
        batch, length, heads = x["dt"].shape
        chunks = ends.shape[1]
        rows, small = self._rows(x), self._small(x, None)
        given = {name: rows[name] for name in ("dt", "steps")} | {
            name: small[name] for name in ("A", "dt_bias", "limits")
        }
        found = self.launch(
            Call(
                "ssd_decay",
                {**given, "ends": ends, "outputs": outputs, "inputs": inputs},
                {
                    "ddt": ((batch, length, heads), x["dt"].dtype),
                    "dA": ((batch, chunks, heads), mx.float32),
                    "ddt_bias": ((batch, chunks, heads), mx.float32),
                },
                {"T_DT": x["dt"].dtype, "THREADS": 32, "CHUNK": GRADIENT_CHUNK, **self._flags(x)},
                (ceil(heads, 32), chunks, batch),
                32,
            )
        )
        sums = {name: mx.sum(found[f"d{name}"], axis=(0, 1)) for name in ("A", "dt_bias")}
        return {"dt": found["ddt"], **sums}

    def _rows(self, x: Arrays) -> dict[str, mx.array]:
        """What is read with its strides. Flags that are left out are some other array, never read."""
        return {"x": x["x"], "dt": x["dt"], "steps": x.get("steps", x["dt"])}

    def _small(self, x: Arrays, state: mx.array | None) -> dict[str, mx.array]:
        """What is made contiguous; what is left out is some other array, never read."""
        A = mx.contiguous(x["A"])
        return {
            "A": A, "D": mx.contiguous(x.get("D", A)), "dt_bias": mx.contiguous(x.get("dt_bias", A)),
            "limits": mx.array(self.limit, mx.float32), "state": A if state is None else mx.contiguous(state),
        }  # fmt: skip

    def _flags(self, x: Arrays) -> dict[str, int | bool]:
        return {"SOFTPLUS": self.softplus, "STEPS": self.kind, "HAS_BIAS": "dt_bias" in x}
