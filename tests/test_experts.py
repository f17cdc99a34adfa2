"""Mixtures of experts: what each backend makes of them against every expert computing every token; gradients.

Dimensions: M d_model, W d_intermediate, E experts, K experts of a token, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import pytest
from harness import WITH_GRADIENTS, backend_params, run, token_ids
from test_families import gradients_of
from tolerances import GRADIENT, assert_close

import mambax
from mambax import experts
from mambax.checkpoint.json_files import read_object
from mambax.checkpoint.layouts import read_config
from mambax.families import named
from mambax.init import Initializer
from mambax.options import MLPOptions, SigmoidMoEOptions

BACKENDS = pytest.mark.parametrize("backend", backend_params())
GRADIENTS = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
STACKED = pytest.mark.parametrize("stacked", [False, True])
E, M, W, K = 7, 12, 20, 3


def layers_of(nn: Any, stacked: bool) -> Any:
    """The two linear layers of E experts, as modules or as one array each."""
    rng, shapes = np.random.default_rng(1), {"up": (W, M), "down": (M, W)}
    weights = {name: rng.standard_normal((E, *shape), np.float32) / 4 for name, shape in shapes.items()}
    if not stacked:
        return {name: [nn.Linear(one.copy(), None) for one in array] for name, array in weights.items()}
    parts = {name: nn.models.ExpertWeights(E, *shape, Initializer(None)) for name, shape in shapes.items()}
    for name, part in parts.items():
        nn.set_parameters(part, {"weight": nn.from_numpy(weights[name])})
    return parts


def inputs(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (T, M), the experts (T, K), of which the last is never among them, and their ratings (T, K)."""
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(E - 1)[:K] for _ in range(tokens)])
    return rng.standard_normal((tokens, M), np.float32), chosen, rng.random((tokens, K), np.float32)


def formula_of(nn: Any, rows: list[int]) -> Callable[..., Any]:
    def formula(product: Any, x: Any) -> Any:
        rows.append(x.shape[0])
        return product("down", nn.silu(product("up", x)))

    return formula


@pytest.mark.parametrize("tokens", [1, 5, 40])
@STACKED
@BACKENDS
def test_only_the_experts_that_were_chosen_compute(backend, stacked, tokens):
    nn = mambax.get_backend(backend)
    parts, rows = layers_of(nn, stacked), []
    arrays = [nn.from_numpy(array) for array in inputs(tokens)]
    with nn.no_grad():
        got = nn.mixture(parts, formula_of(nn, rows), *arrays)
        want = experts.mixture(nn, parts, formula_of(nn, []), *arrays)
    assert_close(nn.to_numpy(got), nn.to_numpy(want))
    assert sum(rows) == tokens * K


@STACKED
@BACKENDS
def test_no_tokens_at_all(backend, stacked):
    nn = mambax.get_backend(backend)
    x, chosen, ratings = (array[:0] for array in inputs(1))
    arrays = [nn.from_numpy(array) for array in (x, chosen, ratings)]
    with nn.no_grad():
        got = nn.mixture(layers_of(nn, stacked), formula_of(nn, []), *arrays)
    assert (tuple(got.shape), got.dtype) == ((0, M), nn.float32)


@pytest.mark.parametrize("tokens", [1, 40])  # of which 40 are enough to be sorted
def test_mlx_gathers_weights_that_lie_in_one_array(tokens):
    pytest.importorskip("mlx")
    import mlx.core as mx
    from mambax_mlx.experts import gathered

    nn = mambax.get_backend("mlx")
    parts, arrays = layers_of(nn, True), [nn.from_numpy(array) for array in inputs(tokens)]
    names = ("up", "down")

    def loss(mixture: Callable[..., Any]) -> Callable[..., Any]:
        def of(weights: list[mx.array], x: mx.array, ratings: mx.array) -> mx.array:
            y = mixture(dict(zip(names, weights, strict=True)), formula_of(nn, []), x, arrays[1], ratings)
            return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum()

        return of

    def dense(weights: dict[str, mx.array], *rest: Any) -> mx.array:
        held = layers_of(nn, True)
        for name, weight in weights.items():
            held[name].weight = weight
        return experts.mixture(nn, held, *rest)

    given = [parts[name].weight for name in names], arrays[0], arrays[2]
    got, want = (mx.value_and_grad(loss(mixture), argnums=(0, 1, 2))(*given) for mixture in (gathered, dense))
    assert_close(np.array(got[0]), np.array(want[0]))
    for one, other in zip((*got[1][0], *got[1][1:]), (*want[1][0], *want[1][1:]), strict=True):
        assert_close(np.array(one), np.array(other), tolerance=GRADIENT["float32"])


@STACKED
def test_gradients_of_torch_are_those_of_every_expert_computing(stacked):
    import torch

    nn = mambax.get_backend("torch")
    found = []
    for mixture in (nn.mixture, lambda *given: experts.mixture(nn, *given)):
        parts = layers_of(nn, stacked)
        x, chosen, ratings = (torch.from_numpy(array) for array in inputs(9))
        x.requires_grad_()
        ratings.requires_grad_()
        y = mixture(parts, formula_of(nn, []), x, chosen, ratings)
        (y * torch.cos(torch.arange(y.numel()).reshape(y.shape))).sum().backward()
        modules = [part for given in parts.values() for part in (given if isinstance(given, list) else [given])]
        found.append([x.grad, ratings.grad, *(module.weight.grad for module in modules)])
    for got, want in zip(*found, strict=True):
        assert got is not None  # of an expert that nobody chose, zeros
        if want.any():
            assert_close(got.numpy(), want.numpy(), tolerance=GRADIENT["float32"])
        else:
            assert not got.any()


def test_inside_a_compiled_function_of_torch_every_expert_computes(monkeypatch):
    import torch

    nn = mambax.get_backend("torch")
    parts, rows = layers_of(nn, False), []
    arrays = [torch.from_numpy(array) for array in inputs(5)]
    want = nn.mixture(parts, formula_of(nn, []), *arrays)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(nn.mixture(parts, formula_of(nn, rows), *arrays).detach().numpy(), want.detach().numpy())
    assert rows == [5] * E


def test_where_mlx_cannot_be_asked_for_the_choice():
    """Inside ``mx.vmap``, which answers as ``mx.compile`` does and takes less time."""
    mx = pytest.importorskip("mlx.core")
    nn = mambax.get_backend("mlx")
    parts, arrays = layers_of(nn, False), [mx.array(array) for array in inputs(5)]
    want = nn.mixture(parts, formula_of(nn, []), *arrays)
    got = mx.vmap(lambda *given: nn.mixture(parts, formula_of(nn, []), *given))(*(a[None] for a in arrays))
    assert_close(np.array(got)[0], np.array(want))


OF_GRANITE = {
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}

# --- families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["jamba", "granite", "nemotron_h-experts", "nemotron_h-experts-groups-latent"])
@GRADIENTS
def test_gradients_of_experts_are_those_of_transformers(case, backend, tmp_path):
    """Which transformers keeps stacked, and test_families.py therefore leaves out; recomputed ones as well."""
    import torch

    theirs = family_cases.write(case, tmp_path)
    ids = token_ids(2, 21, family_cases.VOCABULARY)
    probe = np.random.default_rng(0).standard_normal((2, 21, theirs.config.vocab_size)).astype(np.float32)
    (theirs(torch.from_numpy(ids), use_cache=False).logits.float() * torch.from_numpy(probe)).sum().backward()
    for recomputed in (False, True):
        model = mambax.load(tmp_path, backend=backend)
        model.backbone.gradient_checkpointing = recomputed
        got, family = gradients_of(model, ids, probe), named(str(model.config.family))
        for path, parameter in theirs.named_parameters():
            if "experts" in path or "router" in path:
                gradient = gradient_of(got, family.to_parameter(path, model.config), len(parameter))
                assert_close(gradient, parameter.grad.numpy(), tolerance=GRADIENT["float32"], what=path)


def gradient_of(got: dict[str, np.ndarray], name: str, count: int) -> np.ndarray:
    """Our gradient for a parameter that the model of transformers calls so; its files name it as we do."""
    for theirs, ours in OF_GRANITE.items():
        if "block_sparse_moe" in name and name.endswith(theirs):
            return got[name.removesuffix(theirs) + ours]
    if name in got:
        return got[name]
    head, _, last = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    stacked = [np.stack([got[f"{head}.{i}.{part}.weight"] for i in range(count)]) for part in parts]
    return np.concatenate(stacked, 1)


def config_of(case: str, folder: Path) -> dict[str, Any]:
    """The ``config.json`` that transformers writes for a case."""
    pytest.importorskip("transformers")
    family_cases.CASES[case]().config.save_pretrained(folder)
    return read_object(folder / "config.json")


@BACKENDS
def test_the_bias_of_a_router_stays_in_float32(backend, tmp_path):
    family_cases.write("nemotron_h-experts", tmp_path)
    model = mambax.load(tmp_path, backend=backend, dtype="bfloat16")
    nn, parameters = model.nn, model.nn.parameters(model)
    assert parameters["backbone.layers.1.mixer.gate.e_score_correction_bias"].dtype == nn.float32
    assert parameters["backbone.layers.1.mixer.gate.weight"].dtype == nn.dtype("bfloat16")
    assert np.isfinite(run(model, token_ids(2, 30, family_cases.VOCABULARY))[0]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_shared_experts": 2}, "n_shared_experts is 2; only 1 is supported"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1; only 0 or None is supported"),
        ({"n_group": 5}, r"sigmoid_moe is .*expected groups of two experts or more that divide n_experts \(12\)"),
        ({"n_group": 12}, "expected groups of two experts or more"),
        ({"num_experts_per_tok": 7}, r"at least n_experts_per_token \(7\) in those chosen"),
        ({"topk_group": 5}, "n_groups_per_token is 5"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; only True or False is supported"),
        ({"moe_latent_size": -3}, "d_latent is -3"),
        ({"routed_scaling_factor": "big"}, "scale is 'big'"),
        ({"layers_block_type": ["mamba", "moo"]}, "supported are .*'moe'"),
    ],
)
def test_values_of_nemotron_h_that_are_refused(tmp_path, changes, message):
    raw = config_of("nemotron_h-experts-groups-latent", tmp_path)
    read_config(raw, "config.json")
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_config(raw | changes, "config.json")


def test_the_pattern_of_older_files_has_a_letter_for_experts(tmp_path):
    raw = config_of("nemotron_h-experts", tmp_path)
    want = read_config(raw, "config.json").config
    del raw["layers_block_type"]
    assert read_config(raw | {"hybrid_override_pattern": "ME*E-"}, "config.json").config == want


def test_a_block_of_experts_needs_its_options():
    config = mambax.MambaLMConfig(d_model=24, n_layer=1, vocab_size=50, layer_types=("sigmoid_moe",))
    for mlp, message in (
        (None, "mlp is None"),
        (MLPOptions(d_intermediate=9), "mlp.sigmoid_moe is None|mlp.n_experts is 0"),
        (MLPOptions(d_intermediate=9, n_experts=4, n_experts_per_token=1, d_shared=3), "mlp.sigmoid_moe is None"),
        (
            MLPOptions(
                d_intermediate=9, n_experts=4, n_experts_per_token=1, sigmoid_moe=SigmoidMoEOptions(d_expert=5)
            ),
            "mlp.d_shared 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mambax.from_config(dataclasses.replace(config, mlp=mlp), backend="numpy")
