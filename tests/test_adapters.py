"""Low-rank adapters: what they compute, what they train, their files, and PEFT's view of all that."""

from __future__ import annotations

import json
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import BACKENDS, WITH_GRADIENTS, backend_params, build, config_of, run, token_ids, weights_of
from tolerances import assert_close, relative_error

import mambax
from mambax import MambaClassificationConfig, get_backend
from mambax.adapters import add_lora, freeze, load_adapter, merge_adapter, save_adapter, unfreeze
from mambax.adapters.adding import own_names
from mambax.adapters.binding import bound
from mambax.checkpoint.safetensors_files import SafetensorsFile
from mambax.options import AttentionOptions, MLPOptions

PROJECTIONS = ["in_proj", "x_proj", "dt_proj", "out_proj"]
EVERYWHERE = pytest.mark.parametrize("backend", backend_params(BACKENDS))
TRAINED = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
PEFT_WARNS = pytest.mark.filterwarnings("ignore")  # of torch's and its own deprecated names


def model_of(backend: str, dtype: str = "float32", **changes: Any) -> Any:
    return build(get_backend(backend), config_of(**changes), dtype=dtype)


def arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: model.nn.to_numpy(array).copy() for name, array in model.nn.parameters(model).items()}


def scrambled(model: Any, size: float = 0.1) -> Any:
    """The model with random adapters, as if they had been trained."""
    nn, held, rng = model.nn, model.nn.parameters(model), np.random.default_rng(7)
    layers, trained = bound(model), bound(model).trainable(model)
    values = {
        name: nn.from_numpy((rng.standard_normal(held[name].shape) * size).astype(nn.to_numpy(held[name]).dtype))
        for name in sorted(own_names(model))
    }
    nn.set_parameters(model, values)
    layers.set_trainable(model, trained)
    return model


def adapted(backend: str, dtype: str = "float32", **changes: Any) -> Any:
    model = add_lora(model_of(backend, dtype, **changes), [*PROJECTIONS, "embeddings"], rank=3, **_tied(changes))
    return scrambled(model)


def _tied(changes: dict[str, Any]) -> dict[str, Any]:
    return {"tied_embeddings": True} if changes.get("tie_embeddings") else {}


def gradients(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean loss over ids as their own labels, of what is trained."""
    if model.nn.name == "torch":
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    import mlx.nn
    from mlx.utils import tree_flatten

    _, tree = mlx.nn.value_and_grad(model, lambda: model(ids, labels=ids).loss)()
    return {name: np.array(array) for name, array in tree_flatten(tree)}


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
    found = [
        arrays(add_lora(model_of(name), [*PROJECTIONS, "embeddings"], seed=5)) for name in _installed(BACKENDS)
    ]
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, array in found[0].items():
            np.testing.assert_array_equal(other[name], array)
    again = arrays(add_lora(model_of("numpy"), PROJECTIONS, seed=6))
    name = "backbone.layers.0.mixer.in_proj.lora_A.weight"
    assert not np.array_equal(again[name], found[0][name])
    assert abs(again[name]).max() <= 40**-0.5


def _installed(names: tuple[str, ...]) -> list[str]:
    return [name for name in backend_params(names) if isinstance(name, str)]


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
    if backend not in _installed(BACKENDS):
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


@pytest.mark.skipif(len(_installed(WITH_GRADIENTS)) < 2, reason="needs torch and mlx")
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


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", backend_params(BACKENDS))
@pytest.mark.parametrize("writes", backend_params(BACKENDS))
def test_one_folder_on_every_backend(tmp_path, writes, reads):
    model, ids = adapted(writes, tie_embeddings=True), token_ids(2, 9)
    save_adapter(model, tmp_path, base_model="someone/model")
    other = load_adapter(model_of(reads, tie_embeddings=True), tmp_path)
    assert other.adapter == model.adapter
    assert_close(run(other, ids)[0], run(model, ids)[0])
    for name in own_names(model):
        np.testing.assert_array_equal(arrays(other)[name], arrays(model)[name])
    assert not bound(other).trainable(other)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]


@TRAINED
def test_a_loaded_adapter_can_be_trained_further(tmp_path, backend):
    save_adapter(adapted(backend), tmp_path)
    model = load_adapter(model_of(backend), tmp_path, trainable=True)
    assert set(gradients(model, token_ids(1, 5))) == set(own_names(model))


@EVERYWHERE
def test_whole_modules_are_saved_with_the_adapters(tmp_path, backend):
    fields = {name: getattr(config_of(), name) for name in ("d_model", "n_layer", "vocab_size", "d_state")}
    made = MambaClassificationConfig(**fields, num_labels=3)
    model = mambax.from_config(made, backend=backend, seed=1)
    add_lora(model, ["x_proj"], rank=2, modules_to_save=["score"])
    scrambled(model)
    save_adapter(model, tmp_path)
    names = SafetensorsFile(tmp_path / "adapter_model.safetensors").tensors
    assert {"base_model.model.score.weight", "base_model.model.score.bias"} < set(names)
    other = load_adapter(mambax.from_config(made, backend=backend, seed=1), tmp_path, trainable=True)
    ids = token_ids(2, 6)
    with other.nn.no_grad():
        got, want = (m.nn.to_numpy(m(ids).logits) for m in (other, model))
    np.testing.assert_array_equal(got, want)
    if backend != "numpy":
        assert {"score.weight", "score.bias"} < set(bound(other).trainable(other))


def written(tmp_path: Any, config: dict[str, Any] | None = None, drop: str = "") -> Any:
    """A saved adapter, changed."""
    from safetensors.numpy import load_file, save_file

    save_adapter(adapted("numpy"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | (config or {})), "utf-8")
    values = load_file(tmp_path / "adapter_model.safetensors")
    save_file({n: a for n, a in values.items() if n != drop}, tmp_path / "adapter_model.safetensors")
    return tmp_path


FIRST = "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        ({"peft_type": "LOHA"}, "", "peft_type is 'LOHA'; expected 'LORA'"),
        ({"use_dora": True}, "", "use_dora is True, which is not supported"),
        ({"alpha_pattern": {"in_proj": 3}}, "", "alpha_pattern is"),
        ({"bias": "all"}, "", "bias is all"),
        ({"init_lora_weights": "pissa"}, "", "changes the weights of the model itself"),
        ({"r": 4}, "", r"the adapter of .* has .*, expected .*another r"),
        ({"r": True}, "", "r is True"),
        ({"lora_alpha": None}, "", "lora_alpha is None"),
        ({}, FIRST, r"the adapter of .*layers\.0\.mixer\.in_proj has"),
    ],
)
def test_adapters_that_are_not_ours_to_run(tmp_path, changes, drop, message):
    model = model_of("numpy")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, written(tmp_path, changes, drop))
    assert model.adapter is None
    assert arrays(model).keys() == arrays(model_of("numpy")).keys()


def test_adapters_of_another_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: no such file"):
        load_adapter(model_of("numpy"), tmp_path)
    folder = written(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.2\.mixer.*belongs to nothing in this model"):
        load_adapter(model_of("numpy", n_layer=2), folder)
    with pytest.raises(ValueError, match=r"is it one of another model"):
        load_adapter(model_of("numpy", d_model=44), folder)
    model = adapted("numpy")
    model.backbone.layers[0].mixer.in_proj.lora_A.weight[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite, so that the adapter was not saved"):
        save_adapter(model, folder)
    assert load_adapter(model_of("numpy"), folder).adapter is not None


# --- PEFT --------------------------------------------------------------------------------------------------------


@PEFT_WARNS
def test_peft_trains_the_torch_model(tmp_path):
    """out_proj included; generation and a merge see the adapter, and mambax reads what PEFT writes."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    ids = token_ids(2, 9)
    base = model_of("torch")
    plain = base.generate(ids[:1], max_new_tokens=20, temperature=0)[0].tokens
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=[*PROJECTIONS, "embeddings"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (3 * 4 + 1)
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0, name
    logits, _ = run(base, ids)
    tuned = base.generate(ids[:1], max_new_tokens=20, temperature=0)[0].tokens
    assert tuned != plain
    model.save_pretrained(tmp_path)
    for name in _installed(BACKENDS):
        ours = load_adapter(model_of(name), tmp_path)
        assert_close(run(ours, ids)[0], logits)
        assert ours.generate(ids[:1], max_new_tokens=20, temperature=0)[0].tokens == tuned
    model.merge_adapter()
    assert base.generate(ids[:1], max_new_tokens=20, temperature=0)[0].tokens == tuned


@PEFT_WARNS
@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_what_mambax_writes(tmp_path, tied):
    """Onto transformers' model of the same checkpoint, where PEFT itself refuses out_proj."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = model_of("numpy", tie_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    options = {"tied_embeddings": False} if tied else {}
    model = scrambled(add_lora(base, ["in_proj", "x_proj", "embeddings"], rank=3, rslora=True, **options))
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    ids = token_ids(2, 9)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    assert_close(run(model, ids)[0], want)


@PEFT_WARNS
def test_peft_reads_adapters_onto_the_torch_model(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = adapted("torch"), token_ids(2, 9)
    save_adapter(model, tmp_path)
    base = model_of("torch")
    peft.PeftModel.from_pretrained(base, tmp_path)
    assert_close(run(base, ids)[0], run(model, ids)[0])


def test_bfloat16_weights_have_float32_adapters():
    held = arrays(adapted("numpy", "bfloat16"))
    assert held["backbone.layers.0.mixer.in_proj.base_layer.weight"].dtype == ml_dtypes.bfloat16
    assert held["backbone.layers.0.mixer.in_proj.lora_A.weight"].dtype == np.float32
