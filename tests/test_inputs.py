"""What a model is given: masks, positions to keep, arrays of the framework, numbers of NumPy, wrong types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import assert_close

import mambax

CONFIG = mambax.MambaLMConfig(d_model=24, n_layer=2, vocab_size=50)
IDS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0]])
RIGHT = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)


@pytest.fixture(scope="module", params=["numpy", "torch", "mlx"])
def model(request: pytest.FixtureRequest) -> Any:
    return mambax.from_config(CONFIG, backend=request.param)


def numbers(model: Any, array: Any) -> np.ndarray:
    return model.nn.to_numpy(array)


def test_the_last_logits_of_a_row_padded_on_the_right_are_those_of_its_last_token(model: Any) -> None:
    kept = numbers(model, model(IDS, mask=RIGHT, logits_to_keep=2).logits)
    alone = numbers(model, model(IDS[1:, :3]).logits)
    whole = numbers(model, model(IDS[:1]).logits)
    assert_close(kept[1], alone[0, 1:], "float32")
    assert_close(kept[0], whole[0, 4:], "float32")
    last_column = numbers(model, model(IDS, mask=RIGHT).logits)[1, -1]
    assert np.linalg.norm(last_column - alone[0, -1]) > 1e-2  # what a slice would have taken


def test_more_positions_to_keep_than_there_are_gives_all(model: Any) -> None:
    assert tuple(model(IDS, mask=RIGHT, logits_to_keep=99).logits.shape) == (2, 6, 50)


def test_a_negative_number_of_positions_to_keep_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="logits_to_keep is -1"):
        model(IDS, logits_to_keep=-1)


@pytest.mark.parametrize("native", [False, True])
def test_an_additive_mask_is_refused(model: Any, native: bool) -> None:
    mask: Any = np.where(RIGHT, 0, -np.inf).astype(np.float32)
    if native:
        mask = model.nn.from_numpy(mask)
    with pytest.raises(ValueError, match="expected True and False, or 1 and 0"):
        model(IDS, mask=mask)


def test_a_mask_of_other_whole_numbers_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="expected True and False, or 1 and 0"):
        model(IDS, mask=RIGHT * 2)


@pytest.mark.parametrize("native", [False, True])
def test_a_mask_of_ones_and_zeros_is_a_mask(model: Any, native: bool) -> None:
    mask: Any = RIGHT.astype(np.int64)
    if native:
        mask = model.nn.from_numpy(mask)
    assert model(IDS, mask=mask).state.get_cache_info().tokens_seen == (6, 3)


@pytest.mark.parametrize("operand", ["delta", "B", "D", "mask"])
@pytest.mark.parametrize("impl", ["sequential", "pscan"])
def test_operands_of_the_scan_are_not_broadcast(model: Any, operand: str, impl: str) -> None:
    nn, f = model.nn, np.float32
    given = {
        "u": np.ones((1, 4, 3), f), "delta": np.ones((1, 4, 3), f), "A": -np.ones((3, 2), f),
        "B": np.ones((1, 4, 2), f), "C": np.ones((1, 4, 2), f), "D": np.ones(3, f), "mask": np.ones((1, 4), bool),
    }  # fmt: skip
    given[operand] = given[operand][..., :1]
    arrays = {name: nn.from_numpy(array) for name, array in given.items()}
    with pytest.raises(ValueError, match=f"selective_scan: {operand} is"):
        nn.selective_scan(**arrays, impl=impl)


def test_prompts_may_be_arrays_of_the_framework(model: Any) -> None:
    want = model.generate(IDS[0], max_new_tokens=5).tokens
    assert model.generate(model.nn.from_numpy(IDS[0]), max_new_tokens=5).tokens == want
    batch = model.generate(model.nn.from_numpy(IDS[:1]), max_new_tokens=5)
    assert [row.tokens for row in batch] == [want]
    rows = model.generate([model.nn.from_numpy(IDS[0]), [7, 8]], max_new_tokens=5)
    assert rows[0].tokens == want


@pytest.mark.parametrize("prompt", [None, 3, 1.5])
def test_a_prompt_of_another_type_is_refused(model: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match="expected text, a sequence of token ids"):
        model.generate(prompt)


def test_text_and_masks_in_the_wrong_place_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.generate"):
        model("To be")
    with pytest.raises(ValueError, match="is it the mask"):
        model(IDS, RIGHT)
    first = model.generate([1, 2], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"found Generation; pass its \.state"):
        model.generate([3], state=first)


def test_a_home_folder_is_found(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    model.save_pretrained("~/model")
    model(IDS).state.save("~/state.safetensors")
    assert (tmp_path / "model" / "config.json").exists()
    assert model.load_state("~/state.safetensors").batch == 2


def test_numbers_may_be_numpys(model: Any) -> None:
    config = mambax.MambaLMConfig(d_model=np.int64(24), n_layer=np.int32(2), vocab_size=50, expand=np.float32(2))
    assert config == CONFIG
    assert type(config.d_model) is int
    options: dict[str, Any] = {"top_k": np.int64(5), "temperature": np.float32(0.8), "seed": 1, "max_new_tokens": 5}
    plain: dict[str, Any] = options | {"top_k": 5, "temperature": float(np.float32(0.8))}
    assert model.generate([1], **options).tokens == model.generate([1], **plain).tokens
    state = model(IDS).state
    assert state.select(np.int64(1)).batch == 1
    with pytest.raises(ValueError, match="rows are"):
        state.select(True)


def test_quantising_with_mlxs_defaults_leaves_layers_that_do_not_divide() -> None:
    nn = pytest.importorskip("mlx.nn")
    model = mambax.from_config(mambax.MambaLMConfig(d_model=192, n_layer=1, vocab_size=64), backend="mlx")
    nn.quantize(model)  # dt_proj is 12 wide, and the groups have 64
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer.in_proj, nn.QuantizedLinear)
    assert isinstance(mixer.dt_proj, nn.Linear)
    assert np.isfinite(np.array(model([[1, 2, 3]]).logits)).all()
