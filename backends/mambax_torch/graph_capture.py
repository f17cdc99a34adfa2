"""Capturing steps in CUDA graphs, and the order of work on buffers that several may use."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch


class Replayed(Protocol):
    """Work that was captured."""

    def replay(self) -> None: ...  # queue it on the current stream


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which this device's steps are captured, one for all: there are not many."""
    return torch.cuda.Stream(device)


def _forget_workspaces() -> None:
    """Let cuBLAS ask for new scratch memory, up to 32 MiB for each stream.

    What a graph uses must be asked for while it is captured, so that it is the graph's as long as there is one; and
    must be forgotten then, or it would be given to others and never freed. PyTorch's compiler does the same.
    """
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is not None:  # as it is in every PyTorch that was built for CUDA
        forget()


def capture(steps: Sequence[Callable[[], None]], device: torch.device) -> Sequence[Replayed]:
    """Capture each step in a CUDA graph; they share one pool of memory, and must never run at the same time.

    The steps are run before, so that all that compiles, loads or is allocated once does so then. What they compute
    then means nothing.

    Args:
        steps: what to capture. Nothing that one computes may be read by another, except from memory that was there
            before.
        device: a CUDA device, the current one of the caller or not.
    """
    collects = gc.isenabled()
    with torch.cuda.device(device):
        stream, before = _aside(device), torch.cuda.current_stream()
        graphs = [torch.cuda.CUDAGraph() for _ in steps]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):  # around torch.cuda.graph too, which stays on it if capturing fails
            for step in (*steps, *steps):
                step()
            _forget_workspaces()
            gc.disable()  # what is collected may give back memory or events, which a capture does not survive
            try:
                for step, graph in zip(steps, graphs, strict=True):
                    pool = None if graph is graphs[0] else graphs[0].pool()
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        step()
            finally:
                if collects:
                    gc.enable()
                _forget_workspaces()
        before.wait_stream(stream)
    return graphs


class _Turn:
    """Of a device: whose turn it is, and the stream and end of the work before."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # whatever ends a generation may do so in the middle of a step of another
        self.stream: torch.cuda.Stream | None = None
        self.end = torch.cuda.Event()


@cache
def _turn_of(device: torch.device) -> _Turn:
    return _Turn()


@contextmanager
def in_turn(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Within, what is queued on the current stream runs after all that was queued so before, by whatever thread.

    On one stream it would anyway; this holds where callers use several, one generation after another.

    Returns:
        The current stream of the device; None where it has none.
    """
    if device.type != "cuda":
        yield None
        return
    turn = _turn_of(device)
    with turn.lock, torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        if turn.stream is not None and turn.stream != stream:
            stream.wait_event(turn.end)
        turn.stream = stream
        try:
            yield stream
        finally:
            turn.end.record(stream)
