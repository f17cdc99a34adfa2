"""Low-rank adapters: what they compute and what they train."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from adapter_cases import (
    EVERYWHERE,
    PROJECTIONS,
    TRAINED,
    adapted,
    arrays,
    gradients,
    model_of,
    scrambled,
)
from harness import (
    BACKENDS,
    WITH_GRADIENTS,
    backend_params,
    build,
    config_of,
    installed,
    run,
    token_ids,
    weights_of,
)
from tolerances import assert_close, relative_error

import mambax
from mambax import get_backend
from mambax.adapters import add_lora, freeze, merge_adapter, unfreeze
from mambax.adapters.adding import own_names
from mambax.adapters.binding import bound
from mambax.options import AttentionOptions, MLPOptions

# --- what is computed --------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_the_sum_of_the_weight_and_its_product(backend, tied):
    """Against a model of the reference whose weights have the products added by hand."""
    made = config_of(tie_embeddings=tied)
    model, values, ids = adapted(backend, tie_embeddings=tied), weights_of(made), token_ids(2, 9)
    held = arrays(model)
    for path in model.adapter.modules:
        name = f"{path}.lora_"
        if path.endswith("embeddings"):
            update = held[name + "embedding_A.weight"].astype(np.float64) @ held[name + "embedding_B.weight"].T
        else:
            update = held[name + "B.weight"].astype(np.float64) @ held[name + "A.weight"]
        values[f"{path}.weight"] = values[f"{path}.weight"] + 16 / 3 * update
    want, _ = run(build(get_backend("numpy"), made, values, "float64"), ids)
    got, _ = run(model, ids)
    assert_close(got, want, tolerance=2e-5)  # the sum of two products, each rounded


@EVERYWHERE
def test_a_new_adapter_changes_nothing(backend):
    model, ids = model_of(backend), token_ids(2, 9)
    before, _ = run(model, ids)
    add_lora(model, [*PROJECTIONS, "embeddings"])
    np.testing.assert_array_equal(run(model, ids)[0], before)


def test_initial_values_are_the_same_everywhere():
    found = [arrays(add_lora(model_of(name), [*PROJECTIONS, "embeddings"], seed=5)) for name in installed(BACKENDS)]
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, array in found[0].items():
            np.testing.assert_array_equal(other[name], array)
    again = arrays(add_lora(model_of("numpy"), PROJECTIONS, seed=6))
    name = "backbone.layers.0.mixer.in_proj.lora_A.weight"
    assert not np.array_equal(again[name], found[0][name])
    assert abs(again[name]).max() <= 40**-0.5


@EVERYWHERE
def test_decoding_does_not_pass_by_an_adapter(backend):
    """The fused step of a token computes the blocks without one."""
    base, model = model_of(backend), adapted(backend)
    ids = token_ids(1, 9)
    whole, _ = run(model, ids)
    _, state = run(model, ids[:, :-1])
    last, _ = run(model, ids[:, -1:], state)
    assert_close(last[:, 0], whole[:, -1])
    text = [m.generate(ids, max_new_tokens=20, temperature=0)[0].tokens for m in (base, model)]
    assert text[0] != text[1]
    merged = merge_adapter(model)
    assert model.generate(ids, max_new_tokens=20, temperature=0)[0].tokens == text[1]
    merged.unmerge()
    assert model.generate(ids, max_new_tokens=20, temperature=0)[0].tokens == text[1]


@EVERYWHERE
def test_an_adapter_put_in_between_two_tokens(backend):
    """What the step found out about the blocks before does not hold any more."""
    model, ids = model_of(backend), token_ids(1, 6)
    _, state = run(model, ids[:, :-1])
    plain, _ = run(model, ids[:, -1:], state)
    scrambled(add_lora(model, ["out_proj"], rank=2))
    changed, _ = run(model, ids[:, -1:], state)
    want, _ = run(model, np.repeat(ids[:, -1:], 1, 1), state, np.ones((1, 1), bool))  # a mask: block by block
    assert relative_error(changed, plain) > 0.01
    assert_close(changed, want)


@EVERYWHERE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_and_taking_out_again(backend, dtype):
    model, ids = adapted(backend, dtype, tie_embeddings=True), token_ids(2, 9)
    before, (logits, _) = arrays(model), run(model, ids)
    merged = merge_adapter(model)
    assert model.adapter is None
    assert arrays(model).keys() == arrays(model_of(backend, tie_embeddings=True)).keys()
    together, _ = run(model, ids)
    assert_close(together, logits, dtype, tolerance=1e-5 if dtype == "float32" else 0.08)  # rounded once more
    assert merged.unmerge() is model
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    np.testing.assert_array_equal(run(model, ids)[0], logits)
    with pytest.raises(ValueError, match="were taken out already"):
        merged.unmerge()


def test_a_merged_model_is_saved_as_any_other(tmp_path):
    model, ids = adapted("numpy"), token_ids(1, 7)
    logits, _ = run(model, ids)
    with pytest.raises(ValueError, match="adapters"):
        model.save_pretrained(tmp_path)
    merge_adapter(model)
    model.save_pretrained(tmp_path)
    assert_close(run(mambax.load(tmp_path, backend="numpy"), ids)[0], logits)


@pytest.mark.parametrize("backend", backend_params(BACKENDS))
def test_hybrids(backend):
    """Attention, its MLPs and the other mixers."""
    changes: dict[str, Any] = {
        "layer_types": ("mamba", "attention", "mlp"),
        "attention": AttentionOptions(n_heads=4, n_kv_heads=2, head_dim=6),
        "mlp": MLPOptions(d_intermediate=20),
    }
    model = get_backend(backend).MambaForCausalLM(config_of(**changes))
    ids = token_ids(2, 7)
    before, _ = run(model, ids)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    scrambled(add_lora(model, names, rank=2))
    assert {path.rpartition(".")[2] for path in model.adapter.modules} == set(names)
    logits, _ = run(model, ids)
    assert relative_error(logits, before) > 0.01
    merge_adapter(model)
    assert_close(run(model, ids)[0], logits)


@pytest.mark.parametrize(("backend", "kind"), [("numpy", "int8"), ("torch", "int4"), ("mlx", "int8")])
def test_quantised_weights_carry_adapters(backend, kind):
    if backend not in installed(BACKENDS):
        pytest.skip("its framework is not installed")
    base = model_of(backend, d_model=64, tie_embeddings=True)
    base.nn.quantize(base, kind)
    ids = token_ids(2, 9)
    plain, _ = run(base, ids)
    model = add_lora(base, [*PROJECTIONS, "embeddings"], rank=3, tied_embeddings=True)
    assert_close(run(model, ids)[0], plain)
    scrambled(model)
    assert relative_error(run(model, ids)[0], plain) > 0.01
    if backend != "numpy":
        found = gradients(model, ids)
        assert set(found) == set(own_names(model))
        assert all(np.abs(array).max() > 0 for array in found.values())
    with pytest.raises(ValueError, match=r"weights of .* are quantised.*without quantize"):
        merge_adapter(model)


# --- what is trained ---------------------------------------------------------------------------------------------


@TRAINED
def test_every_adapter_gets_a_gradient_and_nothing_else_does(backend):
    model = adapted(backend)
    found = gradients(model, token_ids(2, 9))
    assert set(found) == set(own_names(model))
    assert len(found) == 2 * (3 * 4 + 1)
    for name, array in found.items():
        assert np.abs(array).max() > 0, name


@pytest.mark.skipif(len(installed(WITH_GRADIENTS)) < 2, reason="needs torch and mlx")
def test_gradients_agree():
    found = [gradients(adapted(name, tie_embeddings=True), token_ids(2, 9)) for name in WITH_GRADIENTS]
    assert found[0].keys() == found[1].keys()
    for name, array in found[0].items():
        assert_close(found[1][name], array, what=name, tolerance=1e-4)


@TRAINED
def test_freezing_by_pattern(backend):
    model = model_of(backend)
    layers = bound(model)
    every = set(layers.trainable(model))
    frozen = freeze(model, ["backbone.layers.0.*", "*.embeddings.*"])
    assert frozen == sorted(n for n in every if n.startswith("backbone.layers.0.") or ".embeddings." in n)
    assert set(layers.trainable(model)) == every - set(frozen) == set(gradients(model, token_ids(1, 5)))
    assert unfreeze(model, "*.A_log") == sorted(n for n in every if n.endswith(".A_log"))
    assert set(layers.trainable(model)) - (every - set(frozen)) == {"backbone.layers.0.mixer.A_log"}
    with pytest.raises(ValueError, match=r"'embedding' matches no parameter.*such as backbone"):
        freeze(model, ["*.D", "embedding"])
    assert "backbone.layers.1.mixer.D" in layers.trainable(model)


def test_numpy_has_nothing_to_freeze():
    with pytest.raises(ValueError, match="no gradients"):
        freeze(model_of("numpy"), "*")


# --- which layers ------------------------------------------------------------------------------------------------


def test_targets():
    def chosen(targets: Any) -> list[str]:
        return list(add_lora(model_of("numpy"), targets, rank=1).adapter.modules)

    mixers = [f"backbone.layers.{i}.mixer" for i in range(3)]
    assert chosen(["out_proj"]) == [f"{mixer}.out_proj" for mixer in mixers]
    assert chosen(["mixer.x_proj", "backbone.layers.1.mixer.in_proj"]) == [
        "backbone.layers.0.mixer.x_proj", "backbone.layers.1.mixer.in_proj", "backbone.layers.1.mixer.x_proj",
        "backbone.layers.2.mixer.x_proj",
    ]  # fmt: skip
    assert chosen(r".*\.[12]\.mixer\.dt_proj") == [f"{mixer}.dt_proj" for mixer in mixers[1:]]
    assert chosen("all-linear") == sorted(f"{mixer}.{name}" for mixer in mixers for name in PROJECTIONS)
    assert chosen(["lm_head"]) == ["lm_head"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"'q_proj' is not in this model; .* are dt_proj, embeddings, in_proj"),
        ({"target_modules": ["in_proj", "conv1d"]}, r"'conv1d' is a CausalConv1d; the layers that can"),
        ({"target_modules": "in_proj"}, r"expression 'in_proj' matches no layer.*To name layers, pass a list"),
        ({"target_modules": "("}, r"not a regular expression"),
        ({"target_modules": []}, r"target_modules is empty"),
        ({"rank": 0}, r"rank is 0; expected a whole number from 1"),
        ({"alpha": 0}, r"alpha is 0; expected a number above 0"),
        ({"alpha": float("nan")}, r"alpha is nan"),
        ({"seed": -1}, r"seed is -1"),
        ({"modules_to_save": ["norms"]}, r"modules_to_save: 'norms' is not in this model; expected some of"),
        ({"modules_to_save": "norm"}, r"expected a list of names"),
        ({"target_modules": ["out_proj"], "modules_to_save": ["out_proj"]}, r"is a target of the adapters too"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = model_of("numpy")
    names = set(arrays(model))
    with pytest.raises(ValueError, match=message):
        add_lora(model, **arguments)
    assert set(arrays(model)) == names
    assert model.adapter is None


def test_a_tied_table_has_to_be_decided_about():
    model = model_of("numpy", tie_embeddings=True)
    with pytest.raises(ValueError, match=r"tied_embeddings=True for .* in both, or False for .* look-ups alone"):
        add_lora(model, ["embeddings"])
    scrambled(add_lora(model, ["embeddings"], tied_embeddings=False))
    with pytest.raises(ValueError, match="the table is the head too"):
        merge_adapter(model)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model)
    with pytest.raises(ValueError, match="has no adapters"):
        merge_adapter(model_of("numpy"))
