"""The causal depthwise convolution by GPU kernels, differentiable.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from mambax.scan import refuse_mask_with_boundaries
from mambax_mlx.kernels.launch import Call, Launch
from mambax_mlx.kernels.layout import FLOATS, MOST_CHUNKS
from mambax_mlx.kernels.scan import EVERY, MASKED, PACKED, once_differentiable

Arrays = Mapping[str, mx.array]

WIDEST = 8
SPAN = 64
"""Steps of a thread. It reads the K - 1 before them again, and backwards those after them."""

THREADS = 128


def refusal(x: mx.array, weight: mx.array, *others: mx.array | None) -> str:
    """Why the kernels cannot take these arguments; "" if they can."""
    if x.ndim != 3 or weight.ndim != 3:
        return f"x is {x.shape} and weight is {weight.shape}; the GPU kernels expect (B, L, D) and (D, 1, K)"
    if weight.shape[2] > WIDEST:
        return f"the convolution is {weight.shape[2]} wide; the GPU kernels hold at most {WIDEST}"
    if 0 in x.shape or 0 in weight.shape:
        return f"x is {x.shape} and weight is {weight.shape}; the GPU kernels expect no size to be zero"
    steps = MOST_CHUNKS * SPAN
    if x.shape[1] > steps or x.shape[0] > MOST_CHUNKS:
        return f"x is {x.shape}; the GPU kernels take at most {MOST_CHUNKS} rows of {steps} steps in one call"
    for array in (x, weight, *others):
        if array is not None and array.dtype not in FLOATS:
            return f"found an array of {array.dtype}; the GPU kernels expect float32, float16 or bfloat16"
    return ""


def causal_conv1d(
    launch: Launch,
    x: mx.array,  # (B, L, D)
    weight: mx.array,  # (D, 1, K)
    bias: mx.array | None = None,  # (D,)
    *,
    initial_state: mx.array | None = None,  # (B, K-1, D)
    mask: mx.array | None = None,  # (B, L) bool
    boundaries: mx.array | None = None,  # (B, L) bool
    activation: str | None = "silu",
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.convolution.causal_conv1d` by GPU kernels, lazy, differentiable (once), in ``mx.compile`` too.

    The output at a masked position is zero, and no gradient comes from it. x may have any strides.

    Raises:
        ValueError: for another activation, a shape that does not fit, a mask together with boundaries, and sizes
            and dtypes that the kernels do not have: see :func:`refusal`.
        NotImplementedError: under ``mx.vmap``, ``mx.jvp`` and in second derivatives.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; expected 'silu' or None")
    refuse_mask_with_boundaries("causal_conv1d", mask, boundaries)
    _check_shapes(x, weight, bias=bias, initial_state=initial_state, mask=mask, boundaries=boundaries)
    reason = refusal(x, weight, bias, initial_state)
    if reason:
        raise ValueError(f"causal_conv1d: {reason}")
    arrays = {"x": x, "weight": weight}
    if bias is not None:
        arrays["bias"] = bias
    if initial_state is not None and weight.shape[2] > 1:
        arrays["initial_state"] = initial_state
    if mask is not None:
        arrays |= _neighbours(mask.astype(mx.bool_))
    elif boundaries is not None:
        arrays["steps"] = boundaries.astype(mx.bool_)
    kind = MASKED if mask is not None else PACKED if boundaries is not None else EVERY
    convolution = Convolution(launch, activation == "silu", kind)

    def run(*given: mx.array) -> tuple[mx.array, mx.array]:
        return convolution.forward(dict(zip(arrays, given, strict=True)))

    def gradient(*given: mx.array) -> tuple[mx.array, ...]:
        named = dict(zip(arrays, given, strict=False))
        found = convolution.backward(named, *given[len(arrays) :])
        return tuple(found[name].astype(array.dtype) for name, array in named.items())

    y, final = once_differentiable(run, gradient)(*arrays.values())
    return y, final


def _check_shapes(x: mx.array, weight: mx.array, **others: mx.array | None) -> None:
    if x.ndim != 3 or weight.ndim != 3 or tuple(weight.shape[:2]) != (x.shape[-1], 1):
        raise ValueError(
            f"causal_conv1d: x must be (B, L, D) and weight (D, 1, K), found {x.shape}, {weight.shape}"
        )
    batch, length, channels = x.shape
    expected = {
        "bias": (channels,), "initial_state": (batch, weight.shape[2] - 1, channels),
        "mask": (batch, length), "boundaries": (batch, length),
    }  # fmt: skip
    for name, array in others.items():
        if array is not None and tuple(array.shape) != expected[name]:
            raise ValueError(f"causal_conv1d: {name} is {tuple(array.shape)}; expected {expected[name]}")


def _neighbours(mask: mx.array) -> dict[str, mx.array]:
    """Of each position, the latest up to it that exists, or -1, and the first from it on, or L. (B, L) int32"""
    length = mask.shape[1]
    positions = mx.arange(length, dtype=mx.int32)
    return {
        "steps": mx.cummax(mx.where(mask, positions, -1), axis=1),
        "next": mx.cummin(mx.where(mask, positions, length), axis=1, reverse=True),
    }


class Convolution(NamedTuple):
    """The two passes of the convolution. ``silu`` and ``kind`` (of the flags ``steps``) hold for both."""

    launch: Launch
    silu: bool
    kind: int

    def forward(self, a: Arrays) -> tuple[mx.array, mx.array]:
        """y and the final state."""
        x, past = a["x"], a["weight"].shape[2] - 1
        batch, _, channels = x.shape
        outputs = {"y": (x.shape, x.dtype), "final_state": ((batch, max(past, 1), channels), x.dtype)}
        results = self._launch("conv_forward", a, outputs, {})
        return results["y"], results["final_state"][:, :past]

    def backward(self, a: Arrays, dy: mx.array, dfinal: mx.array) -> dict[str, mx.array]:
        """The gradient of every argument, in float32 where it is a sum."""
        x, width = a["x"], a["weight"].shape[2]
        batch, length, channels = x.shape
        spans = -(-length // SPAN)
        outputs = {
            "dx": (x.shape, x.dtype),
            "dweight": ((batch, spans, channels, width), mx.float32),
            "dbias": ((batch, spans, channels), mx.float32),
            "dinitial_state": ((batch, max(width - 1, 1), channels), x.dtype),
        }
        more = {"next": a.get("next", x), "dy": dy, "dfinal": mx.contiguous(dfinal) if width > 1 else x}
        found = self._launch("conv_backward", a, outputs, more)
        return {
            "x": found["dx"],
            "weight": mx.sum(found["dweight"], (0, 1))[:, None],
            "bias": mx.sum(found["dbias"], (0, 1)),
            "initial_state": found["dinitial_state"],
            **{name: mx.zeros_like(a[name]) for name in ("steps", "next") if name in a},
        }

    def _launch(self, kernel: str, a: Arrays, outputs: dict[str, Any], more: Arrays) -> dict[str, mx.array]:
        """A kernel that takes all arguments. One that is left out is some other array, never read."""
        x, weight = a["x"], mx.contiguous(a["weight"])
        batch, length, channels = x.shape
        inputs = {
            "x": x, "weight": weight, "bias": mx.contiguous(a.get("bias", weight)), "steps": a.get("steps", x),
            "state": mx.contiguous(a["initial_state"].astype(x.dtype)) if "initial_state" in a else weight, **more,
        }  # fmt: skip
        template = {
            "T": x.dtype, "K": weight.shape[2], "SPAN": SPAN, "THREADS": THREADS, "SILU": self.silu,
            "STEPS": self.kind, "HAS_BIAS": "bias" in a, "HAS_STATE": "initial_state" in a,
        }  # fmt: skip
        groups = (-(-channels // THREADS), -(-length // SPAN), batch)
        return self.launch(Call(kernel, inputs, outputs, template, groups, THREADS))
