"""Decoding by captured steps: a recorder with the rules of a CUDA graph replays whole generations on the CPU, and
what they give is what ordinary decoding gives.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import family_cases
import graph_recorder
import pytest
from harness import assert_states_close, build, config_of, token_ids

import mambax
from mambax import get_backend
from mambax.options import Mamba2Options

torch = pytest.importorskip("torch")
graph = pytest.importorskip("mambax_torch.graph")
nn = get_backend("torch")
TRITON = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)

PROMPTS = [token_ids(1, n, seed=n)[0] for n in (3, 7)]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.6},
    "sampled": {"temperature": 1.0, "seed": 3},
    "every filter": {
        "temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 4
    },
}  # fmt: skip
CAPTURED = [name for name in sorted(family_cases.CASES) if name.split("-")[0] in ("falcon_mamba", "mamba2")]
MAMBA2 = Mamba2Options(n_heads=5, head_dim=6, d_state=7)
MODELS = {
    "mamba": config_of(n_layer=2),
    "mamba wide convolution": config_of(n_layer=1, d_conv=5, tie_embeddings=True, use_bias=False),
    "mamba d_conv 1": config_of(n_layer=1, d_conv=1),
    "mamba and mamba2": config_of(layer_types=("mamba2", "mamba", "mamba2"), mamba2=MAMBA2),
}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called, lets whatever is generated from then on be captured by the recorder."""
    graph_recorder.as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(graph, "LEAST", 1)

    def start() -> None:
        monkeypatch.setattr(graph, "capture", graph_recorder.capture)
        monkeypatch.setattr(nn, "stepper", partial(graph.stepper, capture=True))

    return start


def model_of(name: str, dtype: str = "float32") -> Any:
    """A model with random weights, in evaluation mode."""
    return nn.MambaForCausalLM(MODELS[name]).to(getattr(torch, dtype)).eval()


def check(model: Any, record: Any, **options: Any) -> None:
    """Generate without and with recordings, twice, and compare tokens and states."""
    given: dict[str, Any] = {"max_new_tokens": 12, "eos": (), **options}
    want = model.generate(PROMPTS, **given)
    record()
    for _ in range(2):
        got = model.generate(PROMPTS, **given)
        assert [row.tokens for row in got] == [row.tokens for row in want]
        for row, other in zip(got, want, strict=True):
            assert_states_close(row.state, other.state)
    (steps,) = graph._idle[model]
    assert all(isinstance(recording, graph_recorder.Recording) for recording in steps._graphs)
    assert not steps.busy


@pytest.mark.parametrize("options", OPTIONS)
def test_replayed_generations_are_ordinary_ones(record, options):
    check(build(nn, MODELS["mamba"]), record, **OPTIONS[options])


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_every_kind_of_model(record, name, dtype):
    check(model_of(name, dtype), record, **OPTIONS["sampled"])


@pytest.mark.parametrize("case", CAPTURED)
def test_of_every_family_that_can_be_captured(record, case, tmp_path):
    family_cases.write(case, tmp_path)
    check(mambax.load(tmp_path, backend="torch", device="cpu"), record, **OPTIONS["penalised"])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_of_quantised_weights(record, kind):
    check(nn.quantize(model_of("mamba"), kind), record, **OPTIONS["penalised"])


def test_of_adapters_put_on_and_merged(record):
    """What was captured before is not what is computed after."""
    from mambax.adapters import add_lora, merge_adapter

    model, options = model_of("mamba"), {"max_new_tokens": 12, "eos": (), **OPTIONS["greedy"]}
    record()
    base = [row.tokens for row in model.generate(PROMPTS, **options)]
    add_lora(model, ["in_proj", "out_proj"], rank=2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = [[row.tokens for row in model.generate(PROMPTS, **options)]]
    merged = merge_adapter(model)
    found.append([row.tokens for row in model.generate(PROMPTS, **options)])
    merged.unmerge()
    found.append([row.tokens for row in model.generate(PROMPTS, **options)])
    assert found[0] == found[1] == found[2]
    assert found[0] != base
    (steps,) = graph._idle[model]
    assert isinstance(steps._graphs[0], graph_recorder.Recording)


def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token by the Triton kernels of the whole stack, of which the recorder sees the launches alone."""
    from mambax_torch import graph_step
    from mambax_torch.kernels import (
        gated_norm_kernels,
        norm_kernels,
        step_block_kernels,
        step_kernels,
        step_mamba2_kernels,
    )

    for module, names in (
        (norm_kernels, ["forward_kernel"]),
        (step_block_kernels, ["x_proj_kernel", "scan_kernel"]),
        (step_kernels, ["conv_step_kernel", "scan_step_kernel"]),
        (step_mamba2_kernels, ["ssd_kernel"]),
        (gated_norm_kernels, ["forward_kernel"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, graph_recorder.Launched(getattr(module, name)))
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # or they would not be launched directly
    monkeypatch.setattr(nn, "decode_step", graph_step.decode_step)


@TRITON
@pytest.mark.parametrize("few_rows", [8, 1], ids=["two launches", "one by one"])
def test_of_the_kernels_of_a_stack(record, monkeypatch, few_rows):
    from mambax_torch.kernels import step_block

    model = nn.MambaForCausalLM(config_of(n_layer=2, d_model=20, d_state=3, dt_rank=3)).eval()
    options = {"eos": (), "max_new_tokens": 6, **OPTIONS["every filter"]}
    want = model.generate(PROMPTS, **options)
    launched(monkeypatch)
    monkeypatch.setattr(step_block, "FEW_ROWS", few_rows)
    record()
    got = model.generate(PROMPTS, **options)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    for row, other in zip(got, want, strict=True):
        assert_states_close(row.state, other.state)
    (steps,) = graph._idle[model]
    assert len(steps._graphs[0].calls) > 20


# --- on a GPU ------------------------------------------------------------------------------------------------

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("kind", ["", "int8", "int4"])
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_every_kind_on_a_gpu(monkeypatch, name, dtype, kind):
    """Captured without a warning, which would be an error here; in bfloat16, two products may round differently."""
    model = model_of(name, dtype).to("cuda")
    model = nn.quantize(model, kind) if kind else model
    options: dict[str, Any] = {"max_new_tokens": 40, "eos": (), **OPTIONS["every filter"]}
    with monkeypatch.context() as without:
        without.setattr(nn, "stepper", lambda *given: None)
        want = model.generate(PROMPTS, **options)
    for _ in range(2):
        got = model.generate(PROMPTS, **options)
        assert [len(row.tokens) for row in got] == [40, 40]
        assert dtype == "bfloat16" or [row.tokens for row in got] == [row.tokens for row in want]
    (steps,) = graph._idle[model]
    assert steps._graphs is not None


@pytest.mark.gpu
@ON_GPU
def test_the_memory_of_graphs_is_given_back():
    kept = []
    for _ in range(4):
        model = model_of("mamba and mamba2").to("cuda")
        for batch in (1, 2, 3):
            model.generate([[1, 2]] * batch, max_new_tokens=40, eos=())
        assert len(graph._idle[model]) == graph.KEPT
        del model
        gc.collect()
        torch.cuda.empty_cache()
        kept.append(torch.cuda.memory_reserved())
    assert kept[-1] <= kept[1]


# --- what the recorder would not let pass --------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, planted: Callable[[Any, int, int], None]) -> None:
    """Let each step be followed by something: of the StepGraph, the set that was read, and how many there were."""
    step, count = graph.StepGraph._step, itertools.count()

    def both(self: Any, now: int) -> None:
        step(self, now)
        planted(self, now, next(count))

    monkeypatch.setattr(graph.StepGraph, "_step", both)


def looks_at_a_value(steps: Any, now: int, count: int) -> None:
    if int(steps._tokens[1 - now][0]) < 0:
        raise ValueError("a token that is none")


def takes_a_constant(steps: Any, now: int, count: int) -> None:
    steps._tokens[1 - now].add_(torch.tensor([0, 0]))


def chooses_by_value(steps: Any, now: int, count: int) -> None:
    tokens = steps._tokens[1 - now]
    tokens[tokens < 0] = 0


def reads_what_an_earlier_step_made(steps: Any, now: int, count: int) -> None:
    if now == 1:
        steps._tokens[0].add_(steps.left)
    steps.left = steps._tokens[1 - now] * 0


REFUSED = [looks_at_a_value, takes_a_constant, chooses_by_value, reads_what_an_earlier_step_made]


@pytest.mark.parametrize("planted", REFUSED)
def test_what_cannot_be_captured_is_refused_and_decoding_goes_on(record, monkeypatch, planted):
    model = build(nn, MODELS["mamba"])
    want = model.generate(PROMPTS, eos=(), max_new_tokens=9)
    plant(monkeypatch, planted)
    record()
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*2 row\(s\) failed with Refused"):
        got = model.generate(PROMPTS, eos=(), max_new_tokens=9)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    again = model.generate(PROMPTS, eos=(), max_new_tokens=9)  # it is not tried again
    assert [row.tokens for row in again] == [row.tokens for row in want]


def bakes_in_a_number(steps: Any, now: int, count: int) -> None:
    steps._tokens[1 - now].add_(count % 5).remainder_(101)


def gives_a_fresh_buffer(steps: Any, now: int, count: int) -> None:
    steps._tokens[1 - now] = steps._tokens[1 - now] + 0


@pytest.mark.parametrize("planted", [bakes_in_a_number, gives_a_fresh_buffer])
def test_what_only_python_would_do_again_is_seen(record, monkeypatch, planted):
    """Run by Python each time, the step does as its author meant; replayed, it does not."""
    model, options = build(nn, MODELS["mamba"]), {"eos": (), "max_new_tokens": 9}
    plant(monkeypatch, planted)
    record()
    monkeypatch.setattr(nn, "stepper", partial(graph.stepper, capture=False))
    want = model.generate(PROMPTS, **options)
    graph._idle.clear()
    monkeypatch.setattr(nn, "stepper", partial(graph.stepper, capture=True))
    assert [row.tokens for row in model.generate(PROMPTS, **options)] != [row.tokens for row in want]
