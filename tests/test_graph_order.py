"""What happens in which order around captured steps: on a GPU that does everything as late as it may, and in the
calls by which steps are captured and take turns. There is no GPU: both stand on objects in its place.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import assert_states_close, build, config_of, token_ids

from mambax import get_backend

torch = pytest.importorskip("torch")
graph = pytest.importorskip("mambax_torch.graph")
graph_capture = pytest.importorskip("mambax_torch.graph_capture")
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

nn = get_backend("torch")
PROMPTS = [token_ids(1, n, seed=n)[0] for n in (3, 7, 5)]
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 15, "eos": (), "temperature": 1.0, "seed": 3, "repetition_penalty": 1.2
}  # fmt: skip


# --- a device that is late -----------------------------------------------------------------------------------


class Late:
    """A queue of work, which is done when somebody waits for it and not before."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []
        self.done = 0

    def until(self, number: int) -> None:
        while self.done < number:
            self.done += 1
            with torch.no_grad(), _disable_current_modes():
                self.work[self.done - 1]()

    def finish(self) -> None:
        self.until(len(self.work))


class LateEvent:
    """In the place of torch.cuda.Event."""

    def __init__(self, device: Late) -> None:
        self.device, self.number = device, 0

    def record(self) -> None:
        self.number = len(self.device.work)

    def synchronize(self) -> None:
        self.device.until(self.number)


class Queued(TorchDispatchMode):
    """Queues copies, but for those from host memory to host memory."""

    def __init__(self, device: Late, host: list[Any]) -> None:
        super().__init__()
        self.device, self.host = device, {tensor.data_ptr() for tensor in host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, rest = func._schema.name, kwargs or {}
        if name == "aten::clone":
            made = torch.full_like(args[0], -9, memory_format=torch.contiguous_format)
            self.device.work.append(lambda: made.copy_(args[0]))
            return made
        assert name in ("aten::copy_", "aten::detach", "aten::lift_fresh"), name
        to_host = args[0].data_ptr() in self.host
        waits = name == "aten::copy_" and (not to_host or len(args) > 2)  # to the host, if it says non_blocking
        if not waits:
            return func(*args, **rest)
        self.device.work.append(lambda: func(*args, **rest))
        return args[0]


class LateSteps(graph.StepGraph):
    """A StepGraph on such a device."""

    def __init__(self, device: Late, *given: Any, **options: Any) -> None:
        super().__init__(*given, capture=False)
        self.late = device
        self._done = [LateEvent(device) for _ in range(2)]

        def replay(now: int) -> None:
            device.work.append(partial(self._step, now))

        self._graphs = [SimpleNamespace(replay=partial(replay, now)) for now in (0, 1)]

    def _queued(self, method: str, *args: Any) -> Any:
        with Queued(self.late, [*self._host_tokens, *self._host_uniforms]):
            return getattr(graph.StepGraph, method)(self, *args)

    def begin(self, *args: Any) -> Any:
        return self._queued("begin", *args)

    def advance(self, *args: Any) -> Any:
        return self._queued("advance", *args)

    def end(self, *args: Any) -> Any:
        return self._queued("end", *args)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    """Generations run on it."""
    device = Late()
    made: dict[Any, Any] = {}

    def stepper(model: Any, params: Any, state: Any, steps: int) -> Any:
        key = model, params, state.batch
        if key not in made:
            made[key] = LateSteps(device, model, params, state)
        return made[key]

    monkeypatch.setattr(nn, "stepper", stepper)
    return device


def check(late: Late, model: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> bool:
    """Whether two generations one after the other, states included, are what they should be."""
    options = OPTIONS | changes
    with monkeypatch.context() as ordinary:
        ordinary.setattr(nn, "stepper", lambda *given: None)
        want = model.generate(PROMPTS, **options)
    rows = [model.generate(PROMPTS, **options) for _ in range(2)]
    late.finish()
    same = all([row.tokens for row in got] == [row.tokens for row in want] for got in rows)
    for got in rows if same else ():
        for row, other in zip(got, want, strict=True):
            assert_states_close(row.state, other.state)
    return same


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"max_new_tokens": 2}])
def test_nothing_is_read_before_it_is_there_or_written_before_it_was_read(late, monkeypatch, changes):
    assert check(late, build(nn, config_of(n_layer=2)), monkeypatch, **changes)


def test_the_host_is_a_step_ahead(late, monkeypatch):
    """When the tokens of a step are waited for, the next one has been launched, and is not waited for."""
    waiting: list[int] = []
    wait, read = LateEvent.synchronize, LateSteps.read
    monkeypatch.setattr(
        LateEvent, "synchronize", lambda self: (waiting.append(len(late.work) - self.number), wait(self))
    )

    def watched(self: Any, tokens: Any) -> Any:
        waiting.clear()
        found = read(self, tokens)
        assert waiting[0] >= 2  # the next step, and the copy of its tokens, at least
        assert len(late.work) > late.done
        return found

    monkeypatch.setattr(LateSteps, "read", watched)
    model = build(nn, config_of(n_layer=1))
    stream = model.generate_streaming(PROMPTS[0], max_new_tokens=10**6, eos=(), temperature=1.0)
    for _ in range(12):
        next(stream)
    monkeypatch.setattr(LateSteps, "read", read)
    stream.close()


@pytest.mark.parametrize("number", [0, 1], ids=["before host memory is used again", "before tokens are read"])
def test_a_wait_that_is_left_out_is_seen(late, monkeypatch, number):
    """Of the two waits, in advance and in read, that on the one alone leaves something wrong."""
    method = ("advance", "read")[number]
    original = getattr(graph.StepGraph, method)

    def without(self: Any, *args: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(LateEvent, "synchronize", lambda event: None)
            return original(self, *args)

    monkeypatch.setattr(graph.StepGraph, method, without)
    if method == "advance":  # read two steps at once, so that the wait for the tokens does not hide it
        steps, want = both_ways(late)
        assert steps != want
    else:
        assert not check(late, build(nn, config_of(n_layer=2)), monkeypatch)


def test_steps_that_nobody_reads(late):
    steps, want = both_ways(late)
    assert steps == want


def both_ways(late: Late) -> tuple[list[int], list[int]]:
    """The last of some tokens, by a late device whose host reads no others, and by one that is not late."""
    model = build(nn, config_of(n_layer=1))
    uniforms = np.random.default_rng(0).random((9, 3, 1), dtype=np.float32)
    params = graph.SamplingParams(temperature=1.0)
    found = []
    for steps in (
        LateSteps(late, model, params, model.init_state(3)),
        graph.StepGraph(model, params, model.init_state(3), capture=False),
    ):
        steps.begin(model.init_state(3), torch.zeros(3, dtype=torch.int64), None)
        for uniform in uniforms:
            tokens, _ = steps.advance(uniform)
        late.finish()
        found.append(steps.read(tokens).tolist())
    return found[0], found[1]


# --- how steps are captured ----------------------------------------------------------------------------------


class Cuda:
    """In the place of torch.cuda, as far as capturing asks for it; keeps what was done, and where."""

    def __init__(self) -> None:
        self.now = self.Stream("caller's")
        self.log: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name, self.waited = str(name), []

        def wait_stream(self, other: Any) -> None:
            self.waited.append(other.name)

        def wait_event(self, event: Any) -> None:
            self.waited.append(event.stream.name)

    class Event:
        stream: Any = None

        def record(self, stream: Any) -> None:
            self.stream = stream

    class CUDAGraph:
        def pool(self) -> tuple[str, int]:
            return "pool", id(self)

    def current_stream(self) -> Any:
        return self.now

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self.log.append(("device", str(device)))
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, made: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        with self.stream(stream):
            self.log.append(("capture", made, pool, stream.name))
            yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    stand_in = Cuda()
    forget = partial(stand_in.log.append, ("forget",))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", forget, raising=False)
    for made in (graph_capture._aside, graph_capture._turn_of):
        made.cache_clear()
    monkeypatch.setattr(graph_capture.torch, "cuda", stand_in)
    yield stand_in
    for made in (graph_capture._aside, graph_capture._turn_of):
        made.cache_clear()


DEVICE = torch.device("cuda", 1)


def test_steps_are_run_before_they_are_captured_on_one_stream_into_one_pool(cuda):
    caller = cuda.now
    done: list[Any] = []

    def step(number: int) -> None:
        done.append((number, cuda.now.name, gc.isenabled()))
        cuda.log.append(("step",))

    steps = [partial(step, number) for number in (0, 1)]
    first, second = graph_capture.capture(steps, DEVICE)
    warm = [(number, "cuda:1", True) for number in (0, 1, 0, 1)]
    assert done == [*warm, (0, "cuda:1", False), (1, "cuda:1", False)]
    captures = [entry[1:] for entry in cuda.log if entry[0] == "capture"]
    assert captures == [(first, None, "cuda:1"), (second, first.pool(), "cuda:1")]
    kinds = [entry[0] for entry in cuda.log]
    assert kinds == ["device", *["step"] * 4, "forget", "capture", "step", "capture", "step", "forget"]
    assert cuda.log[0] == ("device", "cuda:1")
    assert cuda.now is caller
    assert caller.waited == ["cuda:1"]
    assert graph_capture._aside(DEVICE).waited == [caller.name]
    assert gc.isenabled()


def test_a_capture_that_fails_leaves_the_callers_stream_and_collector(cuda):
    caller = cuda.now
    count = iter(range(10))

    def step() -> None:
        if next(count) == 4:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graph_capture.capture([step, step], DEVICE)
    assert cuda.now is caller
    assert gc.isenabled()


def test_work_from_several_streams_takes_turns(cuda):
    first, second = cuda.Stream("first"), cuda.Stream("second")
    for stream, waited in ((first, []), (first, []), (second, ["first"]), (first, ["second"])):
        cuda.now = stream
        with graph_capture.in_turn(DEVICE) as found, graph_capture.in_turn(DEVICE):  # one ends within another
            assert found is stream
            assert stream.waited == waited
    cuda.now = second
    with pytest.raises(ValueError), graph_capture.in_turn(DEVICE):
        raise ValueError("in the middle of it")
    cuda.now = first
    with graph_capture.in_turn(DEVICE):
        assert first.waited == ["second", "second"]
    with graph_capture.in_turn(torch.device("cpu")) as found:
        assert found is None
