"""One token through a stack of blocks at once: the same as block by block, whatever stands in the stack.

Dimensions: B batch, D d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harness import backend_params, build, config_of, token_ids, weights_of
from tolerances import FORWARD, assert_close

from mambax import MambaConfig, get_backend
from mambax.registry import is_installed

FUSED = backend_params(("numpy", "torch"))
TORCH = pytest.mark.skipif(not is_installed("torch"), reason="torch is not installed")
SHAPES: list[dict[str, Any]] = [
    {},
    {"d_conv": 1, "d_state": 33, "dt_rank": 17, "use_conv_bias": False, "use_bias": False},
    {"d_model": 72, "d_state": 16, "d_conv": 4, "dt_rank": 48, "residual_in_fp32": False},
]


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Any:
    """Each backend that has kernels for the step."""
    return get_backend(request.param)


def given(nn: Any, model: Any, batch: int = 2) -> tuple[Any, Any]:
    """Hidden states (B, 1, M) of a next token, and the states before it."""
    ids = token_ids(batch, 5)
    with nn.no_grad():
        state = model(ids[:, :4]).state
        hidden = model.backbone.embeddings(nn.from_numpy(ids[:, 4:]))
    return hidden, state.layers


def one_by_one(nn: Any, layers: Any, hidden: Any, states: Any) -> tuple[Any, list[Any]]:
    """What the step is to give."""
    after = []
    with nn.no_grad():
        for layer, state in zip(layers, states, strict=True):
            hidden, state = layer(hidden, state)
            after.append(state)
    return hidden, after


def at_once(nn: Any, layers: Any, hidden: Any, states: Any) -> Any:
    with nn.no_grad():
        return nn.decode_step(layers, hidden, states)


def assert_same(nn: Any, got: Any, want: Any, tolerance: float) -> None:
    """Hidden states and states, each layer by itself, of the same dtypes."""
    pairs = [(got[0], want[0])]
    for ours, theirs in zip(got[1], want[1], strict=True):
        pairs += list(zip(ours, theirs, strict=True))
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert_close(nn.to_numpy(a), nn.to_numpy(b), tolerance=tolerance)


def values(nn: Any, result: Any) -> list[np.ndarray]:
    """All arrays of a step's result, copied."""
    return [nn.to_numpy(a).copy() for a in (result[0], *(array for state in result[1] for array in state))]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN."""
    empty = np.empty

    def poison(shape: Any, dtype: Any = float, **options: Any) -> np.ndarray:
        array = empty(shape, dtype, **options)
        if array.dtype.kind in "fV":
            array[...] = np.nan
        return array

    monkeypatch.setattr(np, "empty", poison)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_against_blocks_one_by_one_and_float64(fused, shape, batch, poisoned):
    config = config_of(**shape)
    weights = weights_of(config)
    model, exact = build(fused, config, weights), build(get_backend("numpy"), config, weights, "float64")
    hidden, states = given(fused, model, batch)
    got = at_once(fused, model.backbone.layers, hidden, states)
    assert got is not None
    want = one_by_one(fused, model.backbone.layers, hidden, states)
    assert_same(fused, got, want, FORWARD["float32"])
    numpy = get_backend("numpy")
    wide = [type(s)(*(np.float64(fused.to_numpy(array)) for array in s)) for s in states]
    want = one_by_one(numpy, exact.backbone.layers, np.float64(fused.to_numpy(hidden)), wide)
    for a, b in zip(values(fused, got), values(numpy, want), strict=True):
        assert_close(a, b, tolerance=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_every_kind_of_weights(fused, dtype, quantize):
    model = build(fused, config_of(d_model=80, d_state=16, dt_rank=20), dtype=dtype)
    if quantize is not None:
        fused.quantize(model, quantize)
    for batch in (1, 5):
        hidden, states = given(fused, model, batch)
        got = at_once(fused, model.backbone.layers, hidden, states)
        assert got is not None
        assert_same(fused, got, one_by_one(fused, model.backbone.layers, hidden, states), FORWARD[dtype])


def test_every_backend_has_it_or_says_no(nn):
    model = build(nn, config_of())
    hidden, states = given(nn, model)
    got = at_once(nn, model.backbone.layers, hidden, states)
    if got is not None:
        assert_same(nn, got, one_by_one(nn, model.backbone.layers, hidden, states), FORWARD["float32"])


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_threads_change_no_bit(quantize, monkeypatch):
    nn = get_backend("numpy")
    model = build(nn, config_of(d_model=200, dt_rank=12))
    if quantize is not None:
        nn.quantize(model, quantize)
    hidden, states = given(nn, model, 3)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        results += [values(nn, at_once(nn, model.backbone.layers, hidden, states)) for _ in range(5)]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_helpers_that_never_come(monkeypatch):
    from mambax_cpu import threads

    nn = get_backend("numpy")
    model = build(nn, config_of())
    hidden, states = given(nn, model)
    want = values(nn, at_once(nn, model.backbone.layers, hidden, states))
    monkeypatch.setattr(threads, "_helper", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    for a, b in zip(values(nn, at_once(nn, model.backbone.layers, hidden, states)), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_states_are_values(fused):
    """What was given is not written to, and what was returned holds on its own."""
    model = build(fused, config_of())
    hidden, states = given(fused, model)
    before = [fused.to_numpy(array).copy() for state in states for array in state]
    first = at_once(fused, model.backbone.layers, hidden, states)
    kept = values(fused, first)
    second = at_once(fused, model.backbone.layers, hidden, first[1])
    again = at_once(fused, model.backbone.layers, hidden, states)
    for array, was in zip([array for state in states for array in state], before, strict=True):
        np.testing.assert_array_equal(fused.to_numpy(array), was)
    for result in (first, again):
        for a, b in zip(values(fused, result), kept, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(values(fused, second)[2], kept[2])
    mixed = [first[1][0], *states[1:]]  # some of the last step's, some not
    assert_same(
        fused,
        at_once(fused, model.backbone.layers, hidden, mixed),
        one_by_one(fused, model.backbone.layers, hidden, mixed),
        FORWARD["float32"],
    )


def test_changed_weights_are_seen(fused):
    model = build(fused, config_of())
    hidden, states = given(fused, model)
    layers = model.backbone.layers
    at_once(fused, layers, hidden, states)

    def check() -> None:
        got = at_once(fused, layers, hidden, states)
        assert got is not None
        assert_same(fused, got, one_by_one(fused, layers, hidden, states), FORWARD["float32"])

    with fused.no_grad():
        layers[1].mixer.A_log[...] = layers[1].mixer.A_log * 1.5  # in place
    check()
    path = "backbone.layers.1.mixer.in_proj.weight"
    new = np.random.default_rng(5).standard_normal(tuple(layers[1].mixer.in_proj.weight.shape))
    fused.set_parameters(model, {path: fused.from_numpy(new.astype(np.float32))})
    check()
    layers[0].mixer, layers[2].mixer = layers[2].mixer, layers[0].mixer
    check()
    layers[0].norm.eps = 0.5
    check()
    fused.quantize(model, "int8")
    check()


def test_copies_and_pickles_of_a_model_are_their_own(fused):
    model = build(fused, config_of())
    hidden, states = given(fused, model)
    want = values(fused, at_once(fused, model.backbone.layers, hidden, states))
    twin, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with fused.no_grad():
        model.backbone.layers[0].mixer.D[...] = 7.0
    for other in (twin, stored):
        for a, b in zip(values(fused, at_once(fused, other.backbone.layers, hidden, states)), want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_nothing_is_kept_alive(fused):
    model = build(fused, config_of())
    hidden, states = given(fused, model)
    result = at_once(fused, model.backbone.layers, hidden, states)
    state = weakref.ref(result[1][0].ssm)
    del result
    gc.collect()
    assert state() is None
    mixer = model.backbone.layers[1].mixer
    replaced, new = weakref.ref(mixer.D), fused.from_numpy(np.ones(80, np.float32))
    fused.set_parameters(mixer, {"D": new})
    del mixer
    gc.collect()
    assert replaced() is None
    block, weight = (weakref.ref(x) for x in (model.backbone.layers[0], model.backbone.layers[0].mixer.D))
    del model
    gc.collect()
    assert block() is None
    assert weight() is None


def test_many_threads_with_one_model(fused):
    model = build(fused, config_of(d_model=120))
    cases = [(*given(fused, model, 1 + i % 3),) for i in range(6)]
    wants = [values(fused, at_once(fused, model.backbone.layers, *case)) for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            got = values(fused, at_once(fused, model.backbone.layers, *cases[i]))
            if not all(map(np.array_equal, got, wants[i])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# --- where the blocks have to be called ----------------------------------------------------------------------


def changes_of_numpy(nn: Any) -> dict[str, Callable[[Any], None]]:
    """What a user may do to a model, by name."""

    class Mixer(nn.MambaMixer):
        def forward(self, *args: Any) -> Any:
            mixed, state = super().forward(*args)
            return mixed * 2, state

    def own_mixer(model: Any) -> None:
        model.backbone.layers[1].mixer.__class__ = Mixer

    def forward_of_an_instance(model: Any) -> None:
        norm = model.backbone.layers[2].norm
        norm.forward = lambda x, inner=norm.forward: inner(x) * 2

    def narrow_A(model: Any) -> None:
        mixer = model.backbone.layers[0].mixer
        nn.set_parameters(mixer, {"A_log": nn.astype(mixer.A_log, nn.dtype("float16"))})

    def named_scan(model: Any) -> None:
        mixer = model.backbone.layers[1].mixer
        mixer.config = dataclasses.replace(mixer.config, scan="sequential")

    return {f.__name__: f for f in (own_mixer, forward_of_an_instance, narrow_A, named_scan)}


@pytest.mark.parametrize("change", sorted(changes_of_numpy(get_backend("numpy"))))
def test_a_changed_model_is_called_block_by_block(fused, change):
    model = build(fused, config_of())
    hidden, states = given(fused, model)
    assert at_once(fused, model.backbone.layers, hidden, states) is not None
    changes_of_numpy(fused)[change](model)
    assert at_once(fused, model.backbone.layers, hidden, states) is None
    with fused.no_grad():
        model(token_ids(2, 1), model(token_ids(2, 4)).state)  # which works all the same


def test_a_patched_class_is_called(fused, monkeypatch):
    model = build(fused, config_of())
    hidden, states = given(fused, model)
    assert at_once(fused, model.backbone.layers, hidden, states) is not None
    monkeypatch.setattr(fused.RMSNorm, "forward", lambda self, x: x)
    assert at_once(fused, model.backbone.layers, hidden, states) is None


def test_other_inputs_are_left_to_the_blocks(fused):
    nn, model = fused, build(fused, config_of())
    hidden, states = given(nn, model)
    layers = model.backbone.layers
    two = nn.concat([hidden, hidden], axis=1)
    assert at_once(nn, layers, two, states) is None
    assert at_once(nn, layers, nn.astype(hidden, nn.float64), states) is None
    conv, ssm = states[1]
    for other in (type(states[1])(conv, ssm[:1]), type(states[1])(nn.astype(conv, nn.dtype("float16")), ssm)):
        assert at_once(nn, layers, hidden, (states[0], other, states[2])) is None
    many = np.zeros((33, 1, 40), np.float32)
    assert at_once(nn, layers, nn.from_numpy(many), model.init_state(33).layers) is None
    plain = model(token_ids(2, 1), model(token_ids(2, 4)).state)
    masked = model(token_ids(2, 1), model(token_ids(2, 4)).state, np.ones((2, 1), bool))
    with nn.no_grad():
        assert_close(nn.to_numpy(masked.logits.detach() if nn.name == "torch" else masked.logits),
                     nn.to_numpy(plain.logits.detach() if nn.name == "torch" else plain.logits))  # fmt: skip


def test_float64_goes_block_by_block():
    nn = get_backend("numpy")
    model = build(nn, config_of(), dtype="float64")
    hidden, states = given(nn, model)
    assert at_once(nn, model.backbone.layers, hidden, states) is None


@pytest.mark.parametrize("changes", [{"dt_b_c_norm": "weightless"}, {"residual_multiplier": 0.5}])
def test_options_that_the_kernels_do_not_know(fused, changes):
    model = build(fused, config_of(**changes))
    hidden, states = given(fused, model)
    assert at_once(fused, model.backbone.layers, hidden, states) is None


def test_who_adds_a_field_to_the_configuration_looks_here():
    """A field that changes what a block computes has to be known to ``decode_step`` of every backend: there, blocks
    that are not as the kernels know them are left to the ordinary path. Then add it here."""
    known = {
        "d_model", "n_layer", "d_state", "d_conv", "expand", "dt_rank", "use_bias", "use_conv_bias",
        "norm_epsilon", "residual_in_fp32", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
        "rescale_prenorm_residual", "scan", "dt_b_c_norm", "dt_b_c_norm_epsilon", "residual_multiplier",
        "layer_types", "mamba2", "attention", "mlp", "parallel", "shared", "family",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(MambaConfig)} == known


# --- PyTorch ---------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_model() -> Any:
    pytest.importorskip("torch")
    return build(get_backend("torch"), config_of())


def step_of(model: Any, **options: Any) -> Any:
    nn = get_backend("torch")
    return at_once(nn, model.backbone.layers, *given(nn, model), **options)


@TORCH
def test_hooks_are_called(torch_model):
    import torch

    assert step_of(torch_model) is not None
    seen: list[str] = []
    mixer = torch_model.backbone.layers[1].mixer
    for module in (mixer, mixer.x_proj, torch_model.backbone.layers[0]):
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


@TORCH
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


@TORCH
def test_autocast_modes_and_transforms_are_not_passed_by(torch_model):
    import torch
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


@TORCH
def test_swapped_memory_parametrised_and_adapted_layers(torch_model):
    import torch
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


@TORCH
def test_low_rank_adapters_are_used(torch_model):
    peft = pytest.importorskip("peft")
    ids = token_ids(1, 4)
    import torch

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
