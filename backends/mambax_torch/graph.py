"""The step from one token to the next, captured once in a CUDA graph over buffers of its own.

There are two sets of buffers and two graphs: each reads the state and tokens of one set and writes those of the
other, so that a state stays what it was while the next step runs. What a caller was given is a view of a set; if it
is still held when the set is to be written again, it gets memory of its own before. So states remain values.

Sampling is part of the graph; its uniform numbers are copied into a buffer before each step. Tokens are copied to
the host behind each step, where they are read while the next one runs.

Of each model, :data:`KEPT` graphs are kept for the next generations, as long as the model is. A graph holds two
states of its batch, and as much memory as one step takes; the weights it reads are the model's own.

Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambax.sampling import SamplingParams, sample
from mambax_torch import ops
from mambax_torch.graph_capture import Replayed, capture, in_turn
from mambax_torch.graph_limits import Layout, layout_of, tensors_of, why_not_graph


class StepGraph:
    """Buffers for one batch, and the two graphs over them: a :class:`mambax.backend.Stepper`.

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
        self.device: torch.device = state.tokens_seen.device
        self.busy = False
        self.ended: Callable[[StepGraph], None] | None = None  # called at the end of a generation
        self._now = 0  # the set that holds the present state
        batch, shape = state.batch, (state.batch, model.config.vocab_size)
        pinned = self.device.type == "cuda"
        here: dict[str, Any] = {"device": self.device}
        host: dict[str, Any] = {"device": "cpu", "pin_memory": pinned}
        self._streams: list[torch.cuda.Stream | None] = []  # that the buffers have been used on
        self._views: list[weakref.ref[Any] | None] = [None, None]
        self._weights: list[Tensor] = []  # while a generation runs, whatever becomes of the model
        with in_turn(self.device) as stream, torch.inference_mode(False), torch.no_grad():
            self._streams.append(stream)
            self._states = [_copy(state), _copy(state)]
            self._tokens = [torch.zeros(batch, dtype=torch.int64, **here) for _ in range(2)]
            self._uniform = torch.zeros((batch, 1), dtype=torch.float32, **here)
            self._host_uniforms = [torch.zeros((batch, 1), dtype=torch.float32, **host) for _ in range(2)]
            self._host_tokens = [torch.zeros(batch, dtype=torch.int64, **host) for _ in range(2)]
            penalised = params.repetition_penalty != 1.0
            self._seen = torch.zeros(shape, dtype=torch.bool, **here) if penalised else None
            self._done = [torch.cuda.Event() for _ in range(2)] if pinned else None
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
        _move(_arrays(output.state), after)
        tokens = sample(ops, output.logits[:, -1], self._uniform, self.params, self._seen)
        self._tokens[1 - now].copy_(tokens)
        if self._seen is not None:
            vocabulary = torch.arange(self._seen.shape[1], device=tokens.device)
            self._seen.logical_or_(vocabulary == tokens[:, None])

    def _capture(self) -> Sequence[Replayed]:
        return capture([partial(self._step, now) for now in (0, 1)], self.device)

    # --- a generation ----------------------------------------------------------------------------------------

    def begin(self, state: Any, tokens: Tensor, seen: Tensor | None) -> tuple[Tensor, Any]:
        """Start from a state and the tokens (B,) that it has not read; returns views of both.

        ``seen`` (B, V) bool is what the repetition penalty applies to.
        """
        if self._seen is not None and seen is None:
            raise ValueError("StepGraph: a repetition penalty needs `seen`, (B, V) bool; found None")
        model = self.model()
        self.busy = True
        with in_turn(self.device) as stream, torch.inference_mode(False), torch.no_grad():
            self._is_used_on(stream)
            self._weights = [] if model is None else [tensor.detach() for tensor in tensors_of(model)]
            self._release_views()
            now = self._now = 0
            for ours, theirs in zip(_arrays(self._states[now]), _arrays(state), strict=True):
                ours.copy_(theirs)
            self._tokens[now].copy_(tokens)
            if self._seen is not None and seen is not None:
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
        if self._done is not None:
            self._done[after].synchronize()  # of the step before the last: its host buffers are free then
        with in_turn(self.device) as stream, torch.inference_mode(False), torch.no_grad():
            self._is_used_on(stream)
            self._own_memory(after)
            if self.params.temperature > 0:
                self._host_uniforms[after].copy_(torch.from_numpy(uniform))
                self._uniform.copy_(self._host_uniforms[after], non_blocking=True)
            if self._graphs is None:
                self._step(now)
            else:
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
        try:
            with in_turn(self.device) as stream, torch.inference_mode(False), torch.no_grad():
                self._is_used_on(stream)
                self._release_views()
                return tokens.clone()
        finally:
            self._weights = []
            self.busy = False
            if self.ended is not None:
                self.ended(self)

    def _send_tokens(self, number: int) -> None:
        self._host_tokens[number].copy_(self._tokens[number], non_blocking=True)
        if self._done is not None:
            self._done[number].record()

    def _is_used_on(self, stream: torch.cuda.Stream | None) -> None:
        """Keep the buffers' memory, once they are let go of, until this stream is done with it too."""
        if stream is None or stream in self._streams:
            return
        self._streams.append(stream)
        buffers = [array for state in self._states for array in _arrays(state)]
        for buffer in (*buffers, *self._tokens, self._uniform, *([] if self._seen is None else [self._seen])):
            buffer.record_stream(stream)

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


def _move(arrays: list[Tensor], places: list[Tensor]) -> None:
    """Copy arrays to their places, those of a dtype together; what was made there stays."""
    moved: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for array, place in zip(arrays, places, strict=True):
        if array.shape != place.shape or array.dtype != place.dtype:
            raise RuntimeError(
                f"a step from a state of {place.dtype} {tuple(place.shape)} gave one of {array.dtype} "
                f"{tuple(array.shape)}; expected the same, which is all that a graph can hold"
            )
        if array.numel() and array.data_ptr() != place.data_ptr():
            to, of = moved.setdefault(array.dtype, ([], []))
            to.append(place)
            of.append(array)
    for to, of in moved.values():
        torch._foreach_copy_(to, of)  # pyright: ignore[reportPrivateImportUsage]


# --- for each model, the graphs that were captured -----------------------------------------------------------

KEPT = 2
"""Graphs that are kept for a model, those used last, beside those in use."""

LEAST = 24
"""Steps from which on capturing should pay: it runs four, and records two."""

_idle: weakref.WeakKeyDictionary[torch.nn.Module, list[StepGraph]] = weakref.WeakKeyDictionary()
_failed: weakref.WeakKeyDictionary[torch.nn.Module, list[Layout]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
"""Of both."""


def stepper(
    model: Any, params: SamplingParams, state: Any, steps: int = LEAST, *, capture: bool | None = None
) -> StepGraph | None:
    """The captured step of a model for this batch, from earlier where it still fits; None where it cannot be, and
    where it would not pay. :func:`mambax_torch.graph_limits.why_not_graph` says why it cannot.

    It is the caller's until it calls ``end``. Where capturing fails, there is a warning, and None.

    Args:
        model: a causal language model.
        params: how to choose tokens.
        state: the state to decode from, for its sizes and dtypes.
        steps: how many are to come, at most.
        capture: False for steps without graphs, on any device; for tests.
    """
    if steps < 1 or (capture is None and why_not_graph(model, state.tokens_seen)):
        return None
    layout = layout_of(model, params, state)
    with _lock:
        found = _taken(model, layout)
        if found is None and (steps < LEAST or layout in _failed.get(model, ())):
            return None
        if found is None:
            del _idle[model][: max(0, len(_idle[model]) + 1 - KEPT)]  # before the next is made
    made = found or _made(model, params, state, layout, capture=capture is None or capture)
    if made is not None:
        made.busy, made.ended = True, _give_back
    return made


def _taken(model: Any, layout: Layout) -> StepGraph | None:
    """A graph that fits, from those kept. Lets go of those whose weights are gone."""
    kept = [graph for graph in _idle.get(model, ()) if graph.layout.weights == layout.weights]
    found = next((graph for graph in kept if graph.layout == layout), None)
    _idle[model] = [graph for graph in kept if graph is not found]
    return found


def _give_back(graph: StepGraph) -> None:
    """Keep a graph for other generations, and no more than :data:`KEPT`."""
    model = graph.model()
    if model is None:
        return
    with _lock:
        kept = [*_idle.get(model, ()), graph]
        _idle[model] = kept[-KEPT:]


def _made(model: Any, params: SamplingParams, state: Any, layout: Layout, *, capture: bool) -> StepGraph | None:
    """A new graph; None after a warning where it cannot be made, which is not tried again."""
    try:
        return StepGraph(model, params, state, capture=capture)
    except RuntimeError as error:  # what PyTorch, CUDA and a lack of memory raise
        warnings.warn(
            f"decoding goes on without a CUDA graph, token by token: capturing a step for {state.batch} row(s) "
            f"failed with {type(error).__name__}: {error}",
            stacklevel=2,
        )
    with _lock:
        _failed.setdefault(model, []).append(layout)
    return None
