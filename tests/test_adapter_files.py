"""The files of adapters, and PEFT's view of them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapter_cases import (
    EVERYWHERE,
    PEFT_WARNS,
    PROJECTIONS,
    TRAINED,
    adapted,
    arrays,
    gradients,
    model_of,
    scrambled,
)
from harness import BACKENDS, backend_params, config_of, installed, run, token_ids
from tolerances import assert_close

import mambax
from mambax import MambaClassificationConfig
from mambax.adapters import add_lora, load_adapter, save_adapter
from mambax.adapters.adding import own_names
from mambax.adapters.binding import bound
from mambax.checkpoint.safetensors_files import SafetensorsFile

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


def test_a_model_with_adapters_is_not_saved_without_them(tmp_path):
    with pytest.raises(ValueError, match=r"the model has adapters.*merge_adapter\(model\).*save_adapter"):
        adapted("numpy").save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


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
    for name in installed(BACKENDS):
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
