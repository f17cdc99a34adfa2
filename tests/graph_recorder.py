"""A recorder with the rules of a CUDA graph, for tensors in host memory: what was recorded runs again on the same
tensors, without any Python of the function that was recorded.

Recording refuses what capturing refuses: values that the host looks at, shapes that depend on values, constants
that come from host memory, and tensors that nobody promised to keep.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

REFUSED = {
    "aten::_local_scalar_dense": "the host looks at a value",
    "aten::is_nonzero": "the host looks at a value",
    "aten::equal": "the host looks at values",
    "aten::nonzero": "the shape depends on values",
    "aten::masked_select": "the shape depends on values",
    "aten::bincount": "the shape depends on values",
    "aten::unique_consecutive": "the shape depends on values",
    "aten::_unique2": "the shape depends on values",
    "aten::repeat_interleave": "the shape depends on values",
    "aten::lift_fresh": "a constant comes from host memory",
}


class Refused(RuntimeError):
    """What capturing would fail with."""


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def places_of(tensors: Iterable[Tensor]) -> set[int]:
    """Where the memory of tensors begins."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


class Recording:
    """What a function did to tensors.

    Args:
        lasting: tensors that are there before and after, each time it runs again: weights and buffers.
        pool: memory of results, which other recordings may use as well between two runs of this one.
    """

    def __init__(self, lasting: Iterable[Tensor], pool: list[Tensor]) -> None:
        self.lasting = places_of(lasting)
        self.made: set[int] = set()
        self.pool = pool
        self.calls: list[tuple[Callable[[], Any], list[Tensor]]] = []  # and the results that it makes anew

    def launch(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """Run something and record it."""
        given = tensors_in(args, kwargs)
        known = self.lasting | self.made
        if strangers := [t for t in given if t.numel() and t.untyped_storage().data_ptr() not in known]:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise Refused(f"{name} reads {shapes}, made outside of the recording and kept by nobody")
        result = run(*args, **kwargs)
        results, taken = tensors_in(result), places_of(given) | self.lasting
        fresh = [t for t in results if t.numel() and t.untyped_storage().data_ptr() not in taken]
        self.made |= places_of(fresh)
        self.pool.extend(fresh)
        places = [any(t is f for f in fresh) for t in results]

        def again() -> None:
            found = tensors_in(run(*args, **kwargs))
            for place, mine, new in zip(results, places, found, strict=True):
                if name in ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"):
                    spoil(place)
                elif mine or (place.numel() and place.data_ptr() != new.data_ptr()):
                    place.copy_(new)

        self.calls.append((again, results))
        return result

    def replay(self) -> None:
        """Do it again."""
        with torch.no_grad():
            for tensor in self.pool:
                spoil(tensor)
            for again, _ in self.calls:
                again()


def spoil(tensor: Tensor) -> None:
    """Write what is not to be read."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


class Recorder(TorchDispatchMode):
    """Records every operation of PyTorch."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        check(name, args)
        return self.recording.launch(func, args, kwargs or {}, name)


def check(name: str, args: Sequence[Any]) -> None:
    """Refuse what a capture would.

    Raises:
        Refused: with the reason.
    """
    if name in REFUSED:
        raise Refused(f"{name}: {REFUSED[name]}")
    if name in ("aten::index", "aten::index_put_", "aten::index_put"):
        indices = tensors_in(args[1])
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise Refused(f"{name}: the shape depends on values")


_recording = threading.local()  # what the launches of kernels go to, as `now`


class Launched:
    """A Triton kernel whose launches are recorded as they are, on the same tensors.

    Args:
        kernel: the kernel, in Triton's interpreter.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        def launch(*args: Any, **kwargs: Any) -> None:
            recording = getattr(_recording, "now", None)
            if recording is None:
                run(*args, **kwargs)
            else:
                recording.launch(run, args, kwargs, f"kernel {self.kernel.__name__}")

        return launch


def capture(functions: Sequence[Callable[[], None]], device: torch.device) -> list[Recording]:
    """In the place of :func:`mambax_torch.graph_capture.capture`, for the steps of a StepGraph."""
    for function in (*functions, *functions):
        function()
    pool: list[Tensor] = []
    recordings = []
    for function in functions:
        recording = Recording(lasting_of(function), pool)
        _recording.now = recording
        try:
            with Recorder(recording):
                function()
        finally:
            _recording.now = None
        recordings.append(recording)
    return recordings


def lasting_of(function: Any) -> list[Tensor]:
    """The buffers of a step graph, whose `_step` this is a part of, and the weights of its model."""
    steps = function.func.__self__
    states = [array for state in steps._states for array in state.arrays().values()]
    seen = [] if steps._seen is None else [steps._seen]
    model = steps.model()
    return [*states, *steps._tokens, steps._uniform, *seen, *model.parameters(), *model.buffers()]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be computed by kernels for host memory, which PyTorch does not see."""
    from mambax_torch import duality, fused, layers, ops, step

    for module in (duality, fused, layers, step):
        monkeypatch.setattr(module, "why_not_cpu_kernels", lambda x: "as on a GPU")
    monkeypatch.setattr(ops, "_best_read_in_place", lambda x: False)
