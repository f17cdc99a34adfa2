"""The seam: everything the model definition asks of an array framework, on one page.

A backend is an importable module (``mambax_numpy``, ``mambax_torch``, ``mambax_mlx``, or anyone's) that has the
attributes of :class:`Backend`. Array functions carry the names of the Python Array API standard where it has
one. Definitions may also use what all arrays share: ``shape``, ``dtype``, ``reshape``, basic indexing, arithmetic,
comparison, ``&``, ``|``, ``~`` and ``@``.

Dimensions: B batch, L length, D channels, N d_state, K d_conv, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from mambax.init import Initial

Array = Any
"""An array of the framework: ``numpy.ndarray``, ``torch.Tensor``, ``mlx.core.array``."""

Dtype = Any
"""A dtype object of the framework."""


class SelectiveScan(Protocol):
    """The fused selective scan; every named implementation has this signature (see :mod:`mambax.scan`)."""

    def __call__(
        self,
        u: Array,  # (B, L, D)
        delta: Array,  # (B, L, D)
        A: Array,  # (D, N)
        B: Array,  # (B, L, N)
        C: Array,  # (B, L, N)
        D: Array | None = None,  # (D,)
        *,
        z: Array | None = None,  # (B, L, D)
        delta_bias: Array | None = None,  # (D,)
        delta_softplus: bool = False,
        initial_state: Array | None = None,  # (B, D, N)
        mask: Array | None = None,  # (B, L) bool
        boundaries: Array | None = None,  # (B, L) bool: True where a new sequence begins; not with a mask
    ) -> tuple[Array, Array]: ...  # y (B, L, D) in the dtype of u, final state (B, D, N) float32


class Ops(Protocol):
    """The array functions. All that :mod:`mambax.scan` and :mod:`mambax.sampling` need."""

    # --- dtypes and creation ---------------------------------------------------------------------------------

    @property
    def float32(self) -> Dtype: ...

    @property
    def float64(self) -> Dtype: ...

    @property
    def int64(self) -> Dtype: ...

    @property
    def bool_(self) -> Dtype: ...

    def dtype(self, name: str) -> Dtype: ...  # "float32" | "float16" | "bfloat16" | "float64" | ...

    def zeros(self, shape: tuple[int, ...], dtype: Dtype, *, like: Array) -> Array: ...  # on the device of `like`

    def arange(self, stop: int, *, like: Array) -> Array: ...  # int64, (stop,)

    # --- array functions -------------------------------------------------------------------------------------

    def astype(self, x: Array, dtype: Dtype) -> Array: ...

    def concat(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def stack(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def unstack(self, x: Array, axis: int) -> Sequence[Array]: ...  # indexing each has a quadratic gradient

    def where(self, condition: Array, x: Array, y: Array | float) -> Array: ...

    def take_along_axis(self, x: Array, indices: Array, axis: int) -> Array: ...

    def exp(self, x: Array) -> Array: ...

    def log(self, x: Array) -> Array: ...

    def cos(self, x: Array) -> Array: ...

    def sin(self, x: Array) -> Array: ...

    def maximum(self, x: Array, y: float) -> Array: ...

    def sum(self, x: Array, axis: int) -> Array: ...

    def max(self, x: Array, axis: int) -> Array: ...

    def argmax(self, x: Array, axis: int) -> Array: ...

    def sort(self, x: Array, axis: int) -> Array: ...  # ascending

    def argsort(self, x: Array, axis: int) -> Array: ...  # ascending

    def cumulative_sum(self, x: Array, axis: int) -> Array: ...

    def cumulative_logsumexp(self, x: Array, axis: int) -> Array: ...

    def stop_gradient(self, x: Array) -> Array: ...  # x, from which no gradient flows back

    def softplus(self, x: Array) -> Array: ...  # exact for large and for very negative x

    def silu(self, x: Array) -> Array: ...

    def gelu(self, x: Array) -> Array: ...  # with the error function, which nothing else here gives

    def from_numpy(self, array: np.ndarray, *, like: Array | None = None, device: str | None = None) -> Array: ...

    # may share memory; bfloat16 comes and goes as ml_dtypes.bfloat16


class Stepper(Protocol):
    """The step from one token to the next, made ready for one batch; see :meth:`Backend.stepper`."""

    def begin(self, state: Any, tokens: Array, seen: Array | None) -> tuple[Array, Any]: ...

    # a state, the tokens (B,) it has not read and, with a repetition penalty, which tokens were seen, (B, V) bool,
    # to the tokens and the state that go on from there

    def advance(self, uniform: np.ndarray) -> tuple[Array, Any]: ...

    # let the state read the tokens, and choose the next by uniform numbers (B, 1) float32; does not wait. To the
    # next tokens, which the step after the next overwrites, and the state, which remains as it is

    def read(self, tokens: Array) -> np.ndarray: ...  # (B,) on the host; waits for the step that made them alone

    def end(self, tokens: Array) -> Array: ...  # these tokens, and states still held, outlive it from here on


class Backend(Ops, Protocol):
    """What a module must have to be a backend of mambax. Members are read-only."""

    # --- who it is -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str: ...  # "torch"

    def version(self) -> str: ...  # of the framework

    def devices(self) -> Sequence[str]: ...  # that work here, the preferred one first

    def scan_implementations(
        self,
    ) -> Mapping[str, str]: ...  # of selective_scan: name -> "" if it runs here, else why it does not

    def ssd_implementations(self) -> Mapping[str, str]: ...  # of ssd, in the same way

    def describe(self) -> Mapping[str, str]: ...  # the preferred device and what runs each op there, for people

    # --- structure -------------------------------------------------------------------------------------------

    @property
    def Module(self) -> type: ...  # base of every layer: attributes are parameters and children

    @property
    def ModuleList(self) -> Callable[[Sequence[Any]], Any]: ...

    @property
    def Parameter(self) -> Callable[[Initial], Array]: ...  # a trainable array; a Placeholder holds no values

    def parameters(self, module: Any) -> dict[str, Array]: ...  # by dotted path, trainable or not

    def set_parameters(self, module: Any, values: Mapping[str, Array]) -> None: ...  # replaces, no copy

    # --- layers, with the parameter names and shapes of Hugging Face checkpoints ------------------------------

    @property
    def Linear(self) -> Callable[..., Any]: ...

    # (weight (out, in), bias (out,) | None); x (..., in) -> (..., out). A float32 bias over narrower weights is
    # added in float32 and makes the output float32.

    @property
    def Embedding(self) -> Callable[..., Any]: ...  # (weight (V, D)); ids (B, L) -> (B, L, D); .as_linear(x)

    @property
    def RMSNorm(self) -> Callable[..., Any]: ...

    # (weight (D,), eps); statistics in float32, output in the dtype of the weight

    @property
    def CausalConv1d(self) -> Callable[..., Any]: ...

    # (weight (D, 1, K), bias (D,) | None); (x, initial_state, mask, boundaries) -> as the op causal_conv1d

    # --- the model's classes, bound to this backend ----------------------------------------------------------

    @property
    def MambaForCausalLM(self) -> Callable[..., Any]: ...

    @property
    def MambaForSequenceClassification(self) -> Callable[..., Any]: ...

    @property
    def MambaForFeatureExtraction(self) -> Callable[..., Any]: ...

    @property
    def InferenceParams(self) -> Callable[..., Any]: ...

    # --- quantised weights -----------------------------------------------------------------------------------

    def quantize(self, model: Any, kind: Any, group_size: int = 32) -> Any: ...  # in place; see mambax.quantization

    # kind: "int8" or "int4"; with MLX's packing also bits, or an Affine that names the layers (mambax.affine)

    # of placeholders, placeholders; `parameters` and `set_parameters` reach the arrays that take their place

    def why_not_quantized(self, device: str) -> str: ...  # why such layers cannot run there; empty when they can

    # --- fused ops -------------------------------------------------------------------------------------------

    def selective_scan(
        self,
        u: Array,
        delta: Array,
        A: Array,
        B: Array,
        C: Array,
        D: Array | None = None,
        *,
        z: Array | None = None,
        delta_bias: Array | None = None,
        delta_softplus: bool = False,
        initial_state: Array | None = None,
        mask: Array | None = None,
        boundaries: Array | None = None,
        impl: str = "auto",
    ) -> tuple[Array, Array]: ...  # SelectiveScan with a choice of implementation

    def causal_conv1d(
        self,
        x: Array,  # (B, L, D)
        weight: Array,  # (D, 1, K)
        bias: Array | None = None,  # (D,)
        *,
        initial_state: Array | None = None,  # (B, K-1, D): the K-1 inputs before x
        mask: Array | None = None,  # (B, L) bool: False positions do not exist
        boundaries: Array | None = None,  # (B, L) bool: True where a new sequence begins; not with a mask
        activation: str | None = "silu",
    ) -> tuple[Array, Array]: ...  # y (B, L, D), final state (B, K-1, D)

    def time_steps(
        self,
        dt_proj: Any,  # a Linear, or what a user has put in its place
        dt: Array,  # (B, L, R)
    ) -> tuple[Array, Array | None]: ...  # delta (B, L, D) and delta_bias (D,) or None, for selective_scan

    # dt_proj(dt) and None, or the product and the bias apart where the framework would round their sum

    def mix(
        self,
        mixer: Any,  # mambax.blocks.MambaMixer, or what a user has made of it
        xz: Array,  # (B, L, 2D)
        A: Array,  # (D, N)
        state: Any,  # as of MambaMixer.mix, which asks, and so are the rest and what is returned
        mask: Array | None,
        boundaries: Array | None,
    ) -> tuple[Array, Any] | None: ...

    # what is between the mixer's projections, the same within rounding as its definition computes, in less memory;
    # None where the definition is to do it: where nothing is gained, and where anything is not what mambax makes

    def decode_step(
        self, layers: Sequence[Any], hidden: Array, states: Sequence[Any]
    ) -> tuple[Array, tuple[Any, ...]] | None: ...

    # One token, or many, through a stack of blocks at once: hidden (B, L, M) and the states of the blocks, to
    # hidden (B, L, M) and the states after. The same, within rounding, as calling one block after the other, which
    # is what the caller does for None: where nothing is gained, and where anything in the stack is not what mambax
    # makes (another mixer, a hook, a gradient that is wanted, ...). The states may share one piece of memory.

    def stepper(self, model: Any, params: Any, state: Any, steps: int) -> Stepper | None: ...

    # What takes a language model from the state (InferenceParams) through so many steps at most, choosing tokens by
    # the SamplingParams: the same, within rounding, as calling model and mambax.sampling.sample each time, which is
    # what the caller does for None. It is the caller's from here until its `end`, which must be called.

    # --- gradients in less memory ----------------------------------------------------------------------------

    def recomputed(self, module: Any) -> Callable[..., Any]: ...

    # the module as a function of arrays, tuples of them and None, whose intermediate results are computed again
    # for the gradient instead of kept

    def summed_over_chunks(
        self, module: Any, function: Callable[..., tuple[Array, ...]], arrays: Sequence[Array], rows: int
    ) -> tuple[Array, ...]: ...

    # the sum of what function(*chunk) returns for each chunk of so many rows of the arrays, in both directions with
    # the intermediate results of one chunk at a time. Of parameters, it may use the module's.

    def ssd(
        self,
        x: Array,  # (B, L, H, P)
        dt: Array,  # (B, L, H)
        A: Array,  # (H,)
        B: Array,  # (B, L, G, N)
        C: Array,  # (B, L, G, N)
        D: Array | None = None,  # (H,)
        *,
        dt_bias: Array | None = None,  # (H,)
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        initial_state: Array | None = None,  # (B, H, P, N)
        mask: Array | None = None,  # (B, L) bool
        boundaries: Array | None = None,  # (B, L) bool
        impl: str = "auto",
    ) -> tuple[Array, Array]: ...  # y (B, L, H, P) in the dtype of x, final state (B, H, P, N) float32

    def gated_rms_norm(
        self,
        y: Array,  # (B, L, D)
        z: Array,  # (B, L, D)
        weight: Array,  # (D,)
        groups: int,
        eps: float,
    ) -> Array: ...  # (B, L, D) in the dtype of the weight; see mambax.mamba2.gated_rms_norm, the gate first

    def attention(
        self,
        q: Array,  # (B, H, L, P)
        k: Array,  # (B, G, T, P)
        v: Array,  # (B, G, T, P)
        visible: Array,  # (B, L, T) bool
        scale: float,
    ) -> Array: ...  # (B, H, L, P)

    def mixture(
        self,
        parts: Mapping[str, Any],
        formula: Callable[[Any, Array], Array],
        x: Array,  # (T, M)
        chosen: Array,  # (T, K) int
        ratings: Array,  # (T, K)
    ) -> Array: ...  # (T, M); a mixture of experts: see mambax.experts.mixture

    # --- the host edge ---------------------------------------------------------------------------------------

    def to_numpy(self, x: Array) -> np.ndarray: ...

    def no_grad(self) -> AbstractContextManager[Any]: ...

    def evaluate(self, *arrays: Array, wait: bool = True) -> None: ...  # start, or finish, what they depend on

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]: ...
