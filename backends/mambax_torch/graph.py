"""The step from one token to the next, captured once in a CUDA graph over buffers of its own.

There are two sets of buffers and two graphs: each reads the state and tokens of one set and writes those of the
other, so that a state stays what it was while the next step runs. What a caller was given is a view of a set; if it
is still held when the set is to be written again, it gets memory of its own before. So states remain values.

Sampling is part of the graph; its uniform numbers are copied into a buffer before each step. Tokens are copied to
the host behind each step, where they are read while the next one runs.

Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambax.sampling import SamplingParams, sample
from mambax_torch import ops


def why_not_graph(model: torch.nn.Module, like: Tensor) -> str:
    """Why the steps of a model, from a state on the device of `like`, cannot be captured; empty when they can."""
    if like.device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the state is on {like.device}"
    if torch.version.hip is not None:
        return "PyTorch was built for AMD GPUs, where this was never tried"
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "something else is being compiled or captured"
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] not in ("mambax_torch", "torch"):
            return f"{name} is a {type(module).__qualname__}, which may do what a graph cannot repeat"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has forward hooks, which a graph would not call"
    if any(tensor.device != like.device for tensor in (*model.parameters(), *model.buffers())):
        return f"not all weights are on {like.device}"
    return ""


def layout_of(model: torch.nn.Module, params: SamplingParams, state: Any) -> Hashable:
    """What a captured step depends on: it serves as long as this is the same."""
    arrays = tuple((name, tuple(a.shape), a.dtype, a.device) for name, a in state.arrays().items())
    weights = tuple((t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers()))
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return arrays, params, weights, autocast, model.training


class StepGraph:
    """Buffers for one batch, and the two graphs over them.

    Args:
        model: a causal language model; it is not kept alive.
        params: how to choose tokens.
        state: a state of the sizes and dtypes that are to be decoded from; its values do not matter.
        capture: False runs the same steps without graphs, on any device: for tests.
    """

    def __init__(self, model: Any, params: SamplingParams, state: Any, *, capture: bool = True) -> None:
        self.model = weakref.ref(model)
        self.params = params
        self.layout = layout_of(model, params, state)
        self.busy = False
        self._now = 0  # the set that holds the present state
        like = state.tokens_seen
        batch = like.shape[0]
        pinned = like.device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad():
            self._states = [_copy(state), _copy(state)]
            self._tokens = [torch.zeros(batch, dtype=torch.int64, device=like.device) for _ in range(2)]
            self._uniform = torch.zeros((batch, 1), dtype=torch.float32, device=like.device)
            self._host_uniforms = [torch.zeros((batch, 1), pin_memory=pinned) for _ in range(2)]
            self._host_tokens = [torch.zeros(batch, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
            shape = (batch, model.config.vocab_size)
            penalised = params.repetition_penalty != 1.0
            self._seen = torch.zeros(shape, dtype=torch.bool, device=like.device) if penalised else None
            self._done = [torch.cuda.Event() for _ in range(2)] if pinned else None
            self._views: list[weakref.ref[Any] | None] = [None, None]
            self._graphs = self._capture() if capture else None

    # --- one step --------------------------------------------------------------------------------------------

    def _step(self, now: int) -> None:
        """Read the tokens of a set, let its state read them, write state and next tokens to the other set."""
        from mambax_torch.kernels.step_targets import written_into

        model = self.model()
        if model is None:
            raise RuntimeError("the model of this step is gone; expected whoever decodes to hold it")
        before, after = _arrays(self._states[now]), _arrays(self._states[1 - now])
        with written_into(zip(before, after, strict=True)):
            output = model(self._tokens[now].clamp(min=0)[:, None], self._states[now], logits_to_keep=1)
        new = _arrays(output.state)
        moved = [(a, b) for a, b in zip(after, new, strict=True) if a.data_ptr() != b.data_ptr() and a.numel()]
        if moved:
            ours, theirs = ([pair[i] for pair in moved] for i in (0, 1))
            torch._foreach_copy_(ours, theirs)  # pyright: ignore[reportPrivateImportUsage]
        tokens = sample(ops, output.logits[:, -1], self._uniform, self.params, self._seen)
        self._tokens[1 - now].copy_(tokens)
        if self._seen is not None:
            vocabulary = torch.arange(self._seen.shape[1], device=tokens.device)
            self._seen.logical_or_(vocabulary == tokens[:, None])

    def _capture(self) -> list[torch.cuda.CUDAGraph]:
        """Both graphs, in one pool of memory: they never run at the same time."""
        device = self._uniform.device
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # whatever compiles or allocates once does it here
                for now in (0, 1, 0, 1):
                    self._step(now)
            torch.cuda.current_stream().wait_stream(aside)
            for now, graph in enumerate(graphs):
                pool = graphs[0].pool() if now else None
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self._step(now)
        return graphs

    # --- a generation ----------------------------------------------------------------------------------------

    def begin(self, state: Any, tokens: Tensor, seen: Tensor | None) -> tuple[Tensor, Any]:
        """Start from a state and the tokens (B,) that it has not read; returns views of both.

        ``seen`` (B, V) bool is what the repetition penalty applies to.
        """
        self.busy = True
        self._release_views()
        now = self._now = 0
        with torch.inference_mode(False), torch.no_grad():
            for ours, theirs in zip(_arrays(self._states[now]), _arrays(state), strict=True):
                ours.copy_(theirs)
            self._tokens[now].copy_(tokens)
            if self._seen is not None:
                if seen is None:
                    raise ValueError("StepGraph: a repetition penalty needs `seen`, (B, V) bool; found None")
                self._seen.copy_(seen)
            self._send_tokens(now)
        return self._tokens[now], self._view(now)

    def advance(self, uniform: np.ndarray) -> tuple[Tensor, Any]:
        """Launch the next step with uniform numbers (B, 1) float32; does not wait for it.

        Returns:
            The new tokens (B,), for :meth:`read`, and the state that has read those before them. The state is a
            value; the tokens are overwritten by the step after the next.
        """
        now, after = self._now, 1 - self._now
        self._own_memory(after)
        if self._done is not None:
            self._done[after].synchronize()  # of the step before the last: its host buffers are free then
        with torch.inference_mode(False), torch.no_grad():
            self._host_uniforms[after].copy_(torch.from_numpy(uniform))
            self._uniform.copy_(self._host_uniforms[after], non_blocking=True)
            if self._graphs is None:
                self._step(now)
            else:
                with torch.cuda.device(self._uniform.device):
                    self._graphs[now].replay()
            self._send_tokens(after)
        self._now = after
        return self._tokens[after], self._view(after)

    def read(self, tokens: Tensor) -> np.ndarray:
        """Tokens on the host. Of those from :meth:`begin` or :meth:`advance`, it waits for their step alone."""
        number = next((i for i, held in enumerate(self._tokens) if held is tokens), None)
        if number is None:
            return ops.to_numpy(tokens)
        if self._done is not None:
            self._done[number].synchronize()
        return self._host_tokens[number].numpy().copy()

    def end(self, tokens: Tensor) -> Tensor:
        """End the generation: states still held, and these tokens, get memory of their own. Returns the tokens."""
        self._release_views()
        self.busy = False
        return tokens.clone()

    def _send_tokens(self, number: int) -> None:
        self._host_tokens[number].copy_(self._tokens[number], non_blocking=True)
        if self._done is not None:
            with torch.cuda.device(self._uniform.device):
                self._done[number].record()

    def _view(self, number: int) -> Any:
        state = self._states[number]
        view = type(state)(state.layers, state.tokens_seen)
        self._views[number] = weakref.ref(view)
        return view

    def _own_memory(self, number: int) -> None:
        """Give a view of a set that is still held memory of its own."""
        held = self._views[number]
        view = None if held is None else held()
        if view is not None:
            own = _copy(view)
            view.layers, view.tokens_seen = own.layers, own.tokens_seen
        self._views[number] = None

    def _release_views(self) -> None:
        for number in (0, 1):
            self._own_memory(number)


def _arrays(state: Any) -> list[Tensor]:
    return [*(array for layer in state.layers for array in layer), state.tokens_seen]


def _copy(state: Any) -> Any:
    """The state in memory of its own, contiguous."""
    contiguous = torch.contiguous_format
    layers = tuple(type(layer)(*(a.clone(memory_format=contiguous) for a in layer)) for layer in state.layers)
    return type(state)(layers, state.tokens_seen.clone())


# --- for each model, the graphs that were captured -----------------------------------------------------------

KEPT = 2
"""Graphs that are kept for a model, those used last."""

_captured: weakref.WeakKeyDictionary[torch.nn.Module, list[StepGraph]] = weakref.WeakKeyDictionary()


def stepper(model: Any, params: SamplingParams, state: Any, *, capture: bool | None = None) -> StepGraph | None:
    """The captured step of a model for this batch, from earlier where it still fits; None where it cannot be.

    :func:`why_not_graph` says why. The caller starts it with ``begin`` and ends it with ``end``.

    Args:
        model: a causal language model.
        params: how to choose tokens.
        state: the state to decode from, for its sizes and dtypes.
        capture: False for steps without graphs, on any device; for tests.
    """
    if capture is None and why_not_graph(model, state.tokens_seen):
        return None
    kept = _captured.setdefault(model, [])
    layout = layout_of(model, params, state)
    for graph in kept:
        if graph.layout == layout and not graph.busy:
            kept.remove(graph)
            kept.append(graph)
            return graph
    del kept[: max(0, len(kept) - KEPT + 1)]  # before the next is made: each holds two states
    graph = StepGraph(model, params, state, capture=capture is None or capture)
    kept.append(graph)
    return graph
