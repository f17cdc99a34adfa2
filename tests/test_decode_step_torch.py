"""The fused step of one token in PyTorch: hooks, gradients, modes, transforms and adapters are not passed by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decode_steps import MODELS, assert_same, at_once, given, one_by_one
from harness import token_ids
from tolerances import FORWARD, assert_close

from mambax import get_backend

torch = pytest.importorskip("torch")


@pytest.fixture(params=sorted(MODELS))
def torch_model(request: pytest.FixtureRequest) -> Any:
    """One of each kind of block."""
    return MODELS[request.param](get_backend("torch"))


def step_of(model: Any, **options: Any) -> Any:
    nn = get_backend("torch")
    return at_once(nn, model.backbone.layers, *given(nn, model), **options)


def test_hooks_are_called(torch_model):
    assert step_of(torch_model) is not None
    seen: list[str] = []
    mixer = torch_model.backbone.layers[1].mixer
    for module in (mixer, mixer.in_proj, torch_model.backbone.layers[0]):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: seen.append("called"))
            before = len(seen)
            assert step_of(torch_model) is None
            torch_model(token_ids(1, 1))
            assert len(seen) > before
            handle.remove()
            assert step_of(torch_model) is not None
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert step_of(torch_model) is None
    finally:
        handle.remove()


def test_gradients_are_recorded(torch_model):
    nn = get_backend("torch")
    hidden, states = given(nn, torch_model)
    layers = torch_model.backbone.layers
    assert nn.decode_step(layers, hidden, states) is None  # the weights want gradients
    output = torch_model(token_ids(1, 1), torch_model(token_ids(1, 3)).state)
    assert output.logits.requires_grad
    torch_model.requires_grad_(False)
    assert nn.decode_step(layers, hidden, states) is not None
    assert nn.decode_step(layers, hidden.detach().requires_grad_(), states) is None
    wanting = type(states[0])(states[0].conv, states[0].ssm.clone().requires_grad_())
    assert nn.decode_step(layers, hidden, (wanting, *states[1:])) is None


def test_autocast_modes_and_transforms_are_not_passed_by(torch_model):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Dispatching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    nn = get_backend("torch")
    hidden, states = given(nn, torch_model)
    for context in (torch.autocast("cpu", torch.bfloat16), Seeing(), Dispatching()):
        with context:
            assert at_once(nn, torch_model.backbone.layers, hidden, states) is None
    assert at_once(nn, torch_model.backbone.layers, hidden, states) is not None


def test_swapped_memory_parametrised_and_adapted_layers(torch_model):
    from torch.nn.utils import parametrize

    nn = get_backend("torch")
    hidden, states = given(nn, torch_model)
    layers = torch_model.backbone.layers
    mixer = layers[1].mixer
    at_once(nn, layers, hidden, states)
    mixer.D.data = mixer.D.data * 3
    assert_same(nn, at_once(nn, layers, hidden, states), one_by_one(nn, layers, hidden, states), FORWARD["float32"])
    mixer.out_proj.weight.data = mixer.out_proj.weight.data.t().contiguous().t()
    assert at_once(nn, layers, hidden, states) is None
    mixer.out_proj.weight.data = mixer.out_proj.weight.data.contiguous()
    assert at_once(nn, layers, hidden, states) is not None

    class Doubled(torch.nn.Module):
        def forward(self, weight: Any) -> Any:
            return weight * 2

    parametrize.register_parametrization(mixer.in_proj, "weight", Doubled())
    assert at_once(nn, layers, hidden, states) is None
    torch_model(token_ids(1, 1))


def test_low_rank_adapters_are_used(torch_model):
    peft = pytest.importorskip("peft")
    ids = token_ids(1, 4)
    config = peft.LoraConfig(target_modules=["in_proj", "out_proj"], r=2, init_lora_weights=False)
    with torch.no_grad():
        step_of(torch_model)
        plain = torch_model(ids[:, 3:], torch_model(ids[:, :3]).state).logits
        adapted = peft.inject_adapter_in_model(config, torch_model)
        assert step_of(adapted) is None
        got = adapted(ids[:, 3:], adapted(ids[:, :3]).state).logits
        want = adapted(ids).logits[:, 3:]
    assert_close(got.numpy(), want.numpy())
    assert not np.allclose(got.numpy(), plain.numpy(), rtol=1e-3)
