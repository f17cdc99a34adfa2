"""Blocks as one operation with a gradient of their own: the same as their operations one by one, and as float64.

Dimensions: B batch, L length, M d_model, D d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import build, config_of, token_ids, weights_of
from tolerances import GRADIENT, assert_close

from mambax import get_backend

torch = pytest.importorskip("torch")

SHAPES: list[dict[str, Any]] = [
    {"use_bias": True},
    {"d_conv": 1, "d_state": 33, "dt_rank": 17, "use_conv_bias": False, "use_bias": False},
    {"d_model": 72, "d_state": 16, "d_conv": 4, "dt_rank": 48},
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, and the products of the kernels count as fast."""
    from mambax_cpu import block, block_gradient, convolution, norm, norm_gradient, products, scan

    def room(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    def narrow_room(dtype: Any, *shape: int) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    for module in (block, block_gradient, convolution, norm, norm_gradient, products, scan):
        for name, poison in (("room", room), ("narrow_room", narrow_room)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, poison)
    monkeypatch.setattr(products, "is_fast", lambda: True)


@pytest.fixture
def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every block that is run as one operation."""
    from mambax_torch import block_ops

    run, seen = block_ops.run, []
    monkeypatch.setattr(block_ops, "run", lambda *args: seen.append(args[0]) or run(*args))
    return seen


def model_of(dtype: str = "float32", **shape: Any) -> Any:
    config = config_of(**shape)
    return build(get_backend("torch"), config, weights_of(config), dtype)


def gradients(model: Any, batch: int, length: int, *, of_state: bool = True) -> dict[str, np.ndarray]:
    """Of a loss that weighs every logit and every number of the final state, from a state that is not zero."""
    ids = token_ids(batch, length + 5)
    rng = np.random.default_rng(3)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        state = model(ids[:, :5]).state
    output = model(ids[:, 5:], state)
    loss = (output.logits * torch.from_numpy(rng.standard_normal(output.logits.shape))).sum()
    for array in (array for layer in output.state.layers for array in layer):
        probe = torch.from_numpy(rng.standard_normal(tuple(array.shape)))
        loss = loss + ((array * probe).sum() if of_state else 0)
    loss.backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 37), (3, 66), (12, 3)])
def test_against_float64(shape, batch, length, blocks_run):
    got = gradients(model_of(**shape), batch, length)
    assert len(blocks_run) == 3
    want = gradients(model_of("float64", **shape), batch, length)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], tolerance=GRADIENT["float32"] / 5, what=name)


def test_without_a_gradient_of_the_state(blocks_run):
    got = gradients(model_of(), 2, 40, of_state=False)
    assert len(blocks_run) == 3
    for name, want in gradients(model_of("float64"), 2, 40, of_state=False).items():
        assert_close(got[name], want, tolerance=GRADIENT["float32"] / 5, what=name)


def test_of_the_state_alone(blocks_run):
    model, exact = model_of(), model_of("float64")
    for each in (model, exact):
        state = each(token_ids(2, 40)).state
        state.layers[1].ssm.sum().backward()
    assert len(blocks_run) == 3
    mixer, wanted = model.backbone.layers[1].mixer, exact.backbone.layers[1].mixer
    assert_close(mixer.in_proj.weight.grad, wanted.in_proj.weight.grad, tolerance=GRADIENT["float32"])
    assert not mixer.out_proj.weight.grad.any()
    assert model.backbone.layers[2].mixer.in_proj.weight.grad is None


def test_frozen_weights_get_none(blocks_run):
    model, exact = model_of(), model_of("float64")
    for each in (model, exact):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("layers.1" in name and "x_proj" not in name)
    got, want = gradients(model, 2, 40), gradients(exact, 2, 40)
    assert len(blocks_run) == 3
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], tolerance=GRADIENT["float32"], what=name)


def test_threads_change_no_bit():
    from mambax_cpu import block
    from mambax_cpu.block_gradient import backward

    rng = np.random.default_rng(4)
    B, L, M, D, N, K, R = 2, 70, 96, 192, 16, 4, 6
    shapes = {
        "norm": (M,), "in_proj": (2 * D, M), "in_bias": (2 * D,), "conv": (D, 1, K), "conv_bias": (D,),
        "x_proj": (R + 2 * N, D), "dt_proj": (D, R), "dt_bias": (D,), "A_log": (D, N), "D": (D,),
        "out_proj": (M, D), "out_bias": (M,),
    }  # fmt: skip

    def normal(*shape: int) -> np.ndarray:
        return 0.2 * rng.standard_normal(shape, np.float32)

    given = block.Parameters(1e-5, **{name: normal(*shape) for name, shape in shapes.items()})
    hidden, dout, state = normal(B, L, M), normal(B, L, M), block.State(normal(B, K - 1, D), normal(B, D, N))
    found = []
    for threads in (1, 2, 5):
        out = hidden.copy()
        after, kept = block.forward(given, out, state, keep=True, threads=threads)
        assert kept is not None
        found.append([out, *after, *backward(given, hidden, state, kept, dout, after, threads=threads)])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_weights_changed_in_between_are_noticed(blocks_run):
    model = model_of()
    loss = model(token_ids(1, 40)).logits.sum()
    assert blocks_run
    with torch.no_grad():
        model.backbone.layers[1].mixer.D.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_once_only(blocks_run):
    model = model_of()
    loss = model(token_ids(1, 40)).logits.square().sum()
    assert blocks_run
    weight = model.backbone.layers[0].mixer.in_proj.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_what_is_left_to_the_operations(blocks_run):
    model = model_of()
    model(token_ids(2, 16))  # few rows
    model(token_ids(1, 40), mask=np.ones((1, 40), bool))
    model_of(d_conv=5)(token_ids(40, 3))  # fewer tokens than the convolution looks back
    with torch.autocast("cpu", torch.bfloat16):
        model(token_ids(1, 40))
    handle = model.backbone.layers[1].mixer.register_forward_hook(lambda *args: None)
    model(token_ids(1, 40))
    handle.remove()
    state = model(token_ids(1, 10)).state  # which wants gradients
    model(token_ids(1, 40), state)
    model_of("bfloat16")(token_ids(1, 40))
    model_of("float64")(token_ids(1, 40))
    assert not blocks_run
    model(token_ids(1, 40))
    assert len(blocks_run) == 3


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_gradients_are_called(blocks_run, kind):
    model, seen = model_of(), []
    model(token_ids(1, 40))
    assert len(blocks_run) == 3
    for module in (model.backbone.layers[0], model.backbone.layers[1].mixer.x_proj):
        handle = getattr(module, kind)(lambda *args: seen.append(args[0]))
        model(token_ids(1, 40)).logits.sum().backward()
        assert seen.pop() is module
        handle.remove()
    assert len(blocks_run) == 3


def test_less_is_kept_for_the_gradient(monkeypatch):
    from mambax_cpu import products

    def kept(fast: bool) -> int:
        monkeypatch.setattr(products, "is_fast", lambda: fast)
        sizes: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(ids)
        del output
        return sum(sizes.values())

    model, ids = model_of(d_model=64, n_layer=4), token_ids(2, 256)
    assert kept(True) < 0.65 * kept(False)
