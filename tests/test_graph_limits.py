"""Which steps are captured: the reasons against it, and that every step without one does on a GPU what a graph can
hold. Such a step runs here with tensors of CUDA that have no memory.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import family_cases
import graph_recorder
import pytest
from harness import TORCH_COMPILES, config_of

import mambax
from mambax import get_backend
from mambax.layer_states import GROWING
from mambax.options import Mamba2Options
from mambax.sampling import SamplingParams

torch = pytest.importorskip("torch")
graph = pytest.importorskip("mambax_torch.graph")
limits = pytest.importorskip("mambax_torch.graph_limits")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

nn = get_backend("torch")
CPU = torch.device("cpu")
EVERY_FILTER = SamplingParams(1.3, 0.9, 30, 0.9, 0.01)


def small(**changes: Any) -> Any:
    return nn.MambaForCausalLM(config_of(n_layer=2, **changes)).eval()


# --- every family --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(family_cases.CASES))
def test_of_every_family_it_is_known(case, tmp_path, monkeypatch):
    """Attention and mixtures of experts are named; whatever is not refused runs as a graph needs it."""
    family_cases.write(case, tmp_path)
    model = mambax.load(tmp_path, backend="torch", device="cpu")
    layers = model.init_state(1).layers
    grows = any(field in GROWING for layer in layers for field in layer._fields)
    reason = limits.why_not_model(model, CPU)
    if grows or "experts" in case:
        assert "keys and values grow" in reason or "mixture of experts" in reason
        with pytest.raises((RuntimeError, graph_recorder.Refused)):
            run_without_memory(model, monkeypatch)
    else:
        assert reason == ""
        run_without_memory(model, monkeypatch)


MAMBA2 = Mamba2Options(n_heads=4, head_dim=16, d_state=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("params", [SamplingParams(), EVERY_FILTER], ids=["greedy", "every filter"])
def test_a_step_is_one_that_a_graph_can_hold(monkeypatch, dtype, params):
    model = small(layer_types=("mamba", "mamba2"), mamba2=MAMBA2).to(getattr(torch, dtype))
    seen = run_without_memory(model, monkeypatch, params)
    assert any(name.startswith("mambax::triton") for name in seen) == (dtype != "float64")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_step_over_quantised_weights_is_one_too(monkeypatch, kind):
    model = nn.quantize(small(tie_embeddings=True), kind)
    assert limits.why_not_model(model, CPU) == ""
    seen = run_without_memory(model, monkeypatch)
    assert {"mambax::quantized_linear", "mambax::quantized_rows"} <= set(seen)


class Driverless(TorchFunctionMode):
    """Takes parts and copies of tensors without asking for the driver of their device, as PyTorch's own does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.data_ptr:
            return args[0].untyped_storage()._cdata  # as good as an address
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if Ellipsis in index:
            place = index.index(Ellipsis)
            whole = x.dim() - sum(i is not None and i is not Ellipsis for i in index)
            index = (*index[:place], *[slice(None)] * whole, *index[place + 1 :])
        axis = 0
        for part in index:
            if part is None:
                x, axis = x.unsqueeze(axis), axis + 1
            elif isinstance(part, int):
                x = x.select(axis, part)
            else:
                begin, end, step = part.indices(x.shape[axis])
                x, axis = torch.ops.aten.slice(x, axis, begin, end, step), axis + 1
        return x


class Watched(TorchDispatchMode):
    """Refuses what a capture would; keeps the names of what was run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        graph_recorder.check(name, args)
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in graph_recorder.tensors_in(args, kwargs, result)}
        if devices - {"cuda"}:
            raise graph_recorder.Refused(f"{name} is of {devices}")
        self.names.append(name)
        return result


def run_without_memory(model: Any, monkeypatch: pytest.MonkeyPatch, params: Any = EVERY_FILTER) -> list[str]:
    """Both steps of a StepGraph over buffers of CUDA without memory; the names of the operations."""
    from mambax_torch.kernels import devices, tuning

    monkeypatch.setattr(devices, "_too_old", lambda index: "")
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for path, held in nn.parameters(model).items():
            nn.set_parameters(model, {path: torch.empty(held.shape, dtype=held.dtype, device="cuda")})
        steps = graph.StepGraph.__new__(graph.StepGraph)
        steps.model, steps.params = weakref.ref(model), params
        steps._states = [model.init_state(2), model.init_state(2)]
        steps._tokens = [torch.zeros(2, dtype=torch.int64, device="cuda") for _ in range(2)]
        steps._uniform = torch.zeros((2, 1), device="cuda")
        penalised = params.repetition_penalty != 1
        shape = (2, model.config.vocab_size)
        steps._seen = torch.zeros(shape, dtype=torch.bool, device="cuda") if penalised else None
        with Driverless(), Watched() as watched:
            for now in (0, 1):
                steps._step(now)
    return watched.names


@pytest.mark.parametrize("plant", [lambda: torch.zeros(2, 1), lambda: torch.tensor([[1.0], [1.0]])])
def test_what_comes_from_the_host_is_seen(monkeypatch, plant):
    sample = graph.sample

    def planted(ops: Any, logits: Any, uniform: Any, *others: Any) -> Any:
        return sample(ops, logits, uniform * plant().to("cuda"), *others)

    monkeypatch.setattr(graph, "sample", planted)
    with pytest.raises((graph_recorder.Refused, RuntimeError), match=r"cpu|host memory"):
        run_without_memory(small(), monkeypatch)


# --- the model, and what goes on around it -------------------------------------------------------------------


def test_the_device_comes_first():
    model = small()
    assert "NVIDIA GPU" in graph.why_not_graph(model, model.init_state(1).tokens_seen)
    assert graph.stepper(model, SamplingParams(), model.init_state(1), 1000) is None
    assert limits.why_not_model(model, CPU) == ""
    assert "is on meta and the state on cpu" in limits.why_not_model(small().to("meta"), CPU)


def changed_mixer(model: Any) -> None:
    class Mixer(type(model.backbone.layers[0].mixer)):
        pass

    model.backbone.layers[0].mixer.__class__ = Mixer


def with_forward(model: Any) -> None:
    norm = model.backbone.norm_f
    norm.forward = lambda x: type(norm).forward(norm, x)


def with_hook(model: Any) -> None:
    model.backbone.layers[1].register_forward_hook(lambda *given: None)


def with_parametrization(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.backbone.layers[0].mixer.in_proj)


def compiled(model: Any) -> None:
    model.backbone.layers[0].compile()


def compiled_part(model: Any) -> None:
    model.backbone.layers[1].mixer = torch.compile(model.backbone.layers[1].mixer)


def with_subclass(model: Any) -> None:
    class Scaled(torch.Tensor):
        pass

    weight = model.lm_head.weight.detach().as_subclass(Scaled)
    model.lm_head.weight = torch.nn.Parameter(weight)


REFUSALS = {
    changed_mixer: r"layers\.0\.mixer is a .*Mixer, which may do",
    with_forward: r"norm_f has a forward of its user's",
    with_hook: r"layers\.1 has forward hooks",
    with_parametrization: r"in_proj is a ParametrizedLinear",
    compiled: r"layers\.0 is compiled",
    compiled_part: r"layers\.1\.mixer is a OptimizedModule",
    with_subclass: r"lm_head\.weight is a Scaled",
}


@TORCH_COMPILES
@pytest.mark.parametrize("change", REFUSALS)
def test_models_that_a_graph_might_not_repeat(change):
    model = small()
    assert limits.why_not_model(model, CPU) == ""
    change(model)
    assert re.search(REFUSALS[change], limits.why_not_model(model, CPU))


def test_a_patched_class_is_seen(monkeypatch):
    model, forward = small(), nn.RMSNorm.forward
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: forward(self, x))
    assert "has a forward of its user's" in limits.why_not_model(model, CPU)


def test_what_goes_on_around_the_model():
    assert limits._why_not_here() == ""
    with torch.autocast("cuda", dtype=torch.bfloat16) if torch.cuda.is_available() else autocast_on_cuda():
        assert "autocast" in limits._why_not_here()
    with Driverless():
        assert "mode" in limits._why_not_here()
    with Watched():
        assert "mode" in limits._why_not_here()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        assert "hooks" in limits._why_not_here()
    finally:
        hook.remove()
    with torch.device("cpu"):  # which says where new tensors go, and nothing else
        assert limits._why_not_here() == ""
    inside: list[str] = []
    torch.func.vmap(lambda x: (inside.append(limits._why_not_here()), x)[1])(torch.zeros(2))
    assert "torch.func" in inside[0]


@contextmanager
def autocast_on_cuda() -> Iterator[None]:
    """On, where there is no GPU for torch.autocast to ask about."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
