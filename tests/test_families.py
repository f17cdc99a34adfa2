"""Every family against transformers: logits, text, files that go both ways; and the laws of the state.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import pytest
from harness import (
    WITH_GRADIENTS,
    assert_states_close,
    backend_params,
    installed,
    run,
    state_arrays,
    token_ids,
)
from tolerances import FORWARD, GRADIENT, assert_close, relative_error

import mambax
from mambax.checkpoint.layouts import read_config
from mambax.families import named
from mambax.options import Mamba2Options

CASES = pytest.mark.parametrize("case", sorted(family_cases.CASES))
BACKENDS = pytest.mark.parametrize("backend", backend_params())
LENGTHS = (1, 2, 5, 64, 257, 1000)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, model of transformers) of a case, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(case: str) -> tuple[Path, Any]:
        if case not in made:
            folder = tmp_path_factory.mktemp(case.replace("/", "-"))
            made[case] = folder, family_cases.write(case, folder)
        return made[case]

    return of


def logits_of(theirs: Any, ids: np.ndarray) -> np.ndarray:
    """Of a model whose weights do not change, computed once for all backends."""
    return _logits_of(theirs, ids.tobytes(), ids.shape).copy()


@functools.lru_cache(maxsize=128)
def _logits_of(theirs: Any, ids: bytes, shape: tuple[int, ...]) -> np.ndarray:
    import torch

    with torch.no_grad():
        numbers = torch.frombuffer(bytearray(ids), dtype=torch.int64).reshape(shape)
        return theirs(numbers, use_cache=False).logits.float().numpy()


@CASES
@BACKENDS
def test_logits_are_those_of_transformers(checkpoints, case, backend):
    folder, theirs = checkpoints(case)
    model = mambax.load(folder, backend=backend)
    for length in LENGTHS:
        ids = token_ids(2, length, family_cases.VOCABULARY)
        assert_close(run(model, ids)[0], logits_of(theirs, ids), what=f"length {length}")


@CASES
@BACKENDS
def test_greedy_text_is_that_of_transformers(checkpoints, case, backend):
    folder, theirs = checkpoints(case)
    prompt = token_ids(1, 9, family_cases.VOCABULARY)[0].tolist()
    got = mambax.load(folder, backend=backend).generate(prompt, max_new_tokens=64, eos=())
    assert got.tokens == greedy_tokens(theirs, tuple(prompt), 64)


@functools.lru_cache(maxsize=32)
def greedy_tokens(theirs: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    import torch

    with torch.no_grad():
        tokens = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
            use_cache=False,  # with its cache, Mamba-2 in transformers 5.23 forgets time_step_limit
        )  # fmt: skip
    return tokens[0, len(prompt) :].tolist()


@CASES
@BACKENDS
def test_transformers_reads_what_mambax_saves(checkpoints, case, backend, tmp_path):
    folder, theirs = checkpoints(case)
    mambax.load(folder, backend=backend).save_pretrained(tmp_path)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    saved, held = again.state_dict(), theirs.state_dict()
    assert saved.keys() == held.keys()
    for name, tensor in held.items():
        np.testing.assert_array_equal(saved[name].numpy(), tensor.numpy(), err_msg=name)
    ids = token_ids(2, 33, family_cases.VOCABULARY)
    assert_close(logits_of(again.eval(), ids), logits_of(theirs, ids))  # chunk_size, which may differ, rounds


@CASES
@BACKENDS
def test_one_call_is_any_split(checkpoints, case, backend):
    model = mambax.load(checkpoints(case)[0], backend=backend)
    ids = token_ids(2, 300, family_cases.VOCABULARY)
    whole, end = run(model, ids)
    for cuts in ((1, 2, 3, 50), (130, 256, 299)):
        state, parts = None, []
        for start, stop in zip((0, *cuts), (*cuts, 300), strict=True):
            logits, state = run(model, ids[:, start:stop], state)
            parts.append(logits)
        assert_close(np.concatenate(parts, 1), whole, what=f"cut at {cuts}")
        assert_states_close(state, end)


@CASES
@BACKENDS
def test_a_padded_row_is_that_row_alone(checkpoints, case, backend):
    """Left, right and in the middle, in a fresh text and in one that goes on from a state."""
    model = mambax.load(checkpoints(case)[0], backend=backend)
    ids = token_ids(3, 40, family_cases.VOCABULARY)
    mask = np.ones((3, 40), bool)
    mask[0, :13] = mask[1, 30:] = mask[2, 7:15] = False
    for continued in (False, True):
        state = run(model, token_ids(3, 11, family_cases.VOCABULARY))[1] if continued else None
        logits, _ = run(model, ids, state, mask)
        for row in range(3):
            own = None if state is None else state.select(row)
            alone, _ = run(model, ids[row : row + 1, mask[row]], own)
            assert_close(logits[row, mask[row]], alone[0], what=f"row {row}, continued: {continued}")


@CASES
@BACKENDS
def test_a_packed_row_is_its_texts_one_by_one(checkpoints, case, backend):
    model = mambax.load(checkpoints(case)[0], backend=backend)
    ids = token_ids(1, 60, family_cases.VOCABULARY)
    begins = np.zeros((1, 60), bool)
    begins[0, [3, 4, 41]] = True
    logits, _ = run(model, ids, boundaries=begins)
    for start, stop in ((0, 3), (3, 4), (4, 41), (41, 60)):
        assert_close(logits[:, start:stop], run(model, ids[:, start:stop])[0], what=f"text {start} to {stop}")


@CASES
def test_a_state_moves_between_backends(checkpoints, case, tmp_path):
    ids = token_ids(2, 50, family_cases.VOCABULARY)
    whole = logits_of(checkpoints(case)[1], ids)
    names = [name for name in ("torch", "mlx", "numpy") if name in mambax.backend_names()]
    state_file, start = tmp_path / "a.state", 0
    for name, stop in zip(names, (20, 35, 50), strict=False):
        model = mambax.load(checkpoints(case)[0], backend=name)
        state = model.load_state(state_file) if start else None
        logits, state = run(model, ids[:, start:stop], state)
        assert_close(logits, whole[:, start:stop], what=name)
        state.save(state_file)
        start = stop


@CASES
def test_gradients_of_torch_and_mlx_are_those_of_transformers(checkpoints, case):
    import torch

    folder, theirs = checkpoints(case)
    ids = token_ids(2, 21, family_cases.VOCABULARY)
    probe = np.random.default_rng(0).standard_normal((2, 21, theirs.config.vocab_size)).astype(np.float32)
    theirs.zero_grad()
    (theirs(torch.from_numpy(ids), use_cache=False).logits.float() * torch.from_numpy(probe)).sum().backward()
    want = {
        path: parameter.grad.numpy() for path, parameter in theirs.named_parameters() if parameter.grad is not None
    }
    for backend in installed(WITH_GRADIENTS):
        model = mambax.load(folder, backend=backend)
        got, family = gradients_of(model, ids, probe), named(str(model.config.family))
        for path, gradient in want.items():
            name = family.to_parameter(path, model.config)
            if not ("experts" in path or "router" in path):  # which the files of transformers name otherwise
                assert_close(got[name], gradient, tolerance=GRADIENT["float32"], what=f"{backend}: {name}")


def gradients_of(model: Any, ids: np.ndarray, probe: np.ndarray) -> dict[str, np.ndarray]:
    nn = model.nn
    if nn.name == "torch":
        (model(ids).logits * nn.from_numpy(probe)).sum().backward()
        return {name: array.grad.numpy() for name, array in nn.parameters(model).items() if array.grad is not None}
    import mlx.nn
    from mlx.utils import tree_flatten

    _, found = mlx.nn.value_and_grad(model, lambda: (model(ids).logits * nn.from_numpy(probe)).sum())()
    return {name: np.array(array) for name, array in tree_flatten(found)}


@CASES
@BACKENDS
def test_a_planted_error_is_caught(checkpoints, case, backend):
    """One per cent in one matrix of the first block."""
    folder, theirs = checkpoints(case)
    model = mambax.load(folder, backend=backend)
    nn, parameters = model.nn, model.nn.parameters(model)
    name = next(n for n, a in parameters.items() if "layers.0.mixer" in n and n.endswith("in_proj.weight"))
    nn.set_parameters(model, {name: nn.from_numpy(np.float32(1.01) * nn.to_numpy(parameters[name]))})
    ids = token_ids(2, 64, family_cases.VOCABULARY)
    assert relative_error(run(model, ids)[0], logits_of(theirs, ids)) > 10 * FORWARD["float32"]


@CASES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_has_the_arrays_that_its_file_is_named_by(checkpoints, case, dtype):
    model = mambax.load(checkpoints(case)[0], backend="numpy", dtype=dtype)
    arrays = state_arrays(run(model, token_ids(1, 5, family_cases.VOCABULARY))[1])
    fresh = state_arrays(model.init_state(1))
    assert arrays.keys() == fresh.keys()
    for name, array in arrays.items():
        assert array.dtype == fresh[name].dtype, name


# --- layouts that transformers does not write ---------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("legacy", [False, True])
def test_mamba2_in_the_original_layout(checkpoints, backend, legacy, tmp_path):
    import torch

    _, theirs = checkpoints("mamba2-codestral")
    raw, tensors = family_cases.original_mamba2(theirs)
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    model = mambax.load(tmp_path, backend=backend)
    assert model.config.vocab_size == 112  # 97 padded
    ids = token_ids(2, 70, family_cases.VOCABULARY)
    assert_close(run(model, ids)[0], logits_of(theirs, ids))
    check_saved_as_mamba2(model, theirs, tmp_path / "saved")


@BACKENDS
def test_codestral_in_the_layout_of_mistral(checkpoints, backend, tmp_path):
    from safetensors.torch import save_file

    _, theirs = checkpoints("mamba2-codestral")
    raw, tensors = family_cases.codestral(theirs)
    (tmp_path / "params.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "consolidated.safetensors"
    )
    model = mambax.load(tmp_path, backend=backend)
    ids = token_ids(2, 70, family_cases.VOCABULARY)
    assert_close(run(model, ids)[0], logits_of(theirs, ids))
    check_saved_as_mamba2(model, theirs, tmp_path / "saved")


def check_saved_as_mamba2(model: Any, theirs: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    again = type(theirs).from_pretrained(folder).eval()
    ids = token_ids(2, 33, family_cases.VOCABULARY)
    assert_close(logits_of(again, ids), logits_of(theirs, ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm is False; only True is supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate is True; only False"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "headdim is 48; expected a divisor of"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 4}}, "ssm_cfg with dt_rank is not a Mamba-2 model"),
        ({"attn_layer_idx": [1]}, "attn_cfg: causal is False; only True is supported"),
    ],
)
def test_original_mamba2_of_another_kind_is_refused(checkpoints, changes, message, tmp_path):
    raw, _ = family_cases.original_mamba2(checkpoints("mamba2-codestral")[1], **changes)
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        mambax.load(tmp_path, backend="numpy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_use_mlp": False}, "mamba_use_mlp is False; only True is supported"),
        ({"attn_layer_indices": [0]}, r"attn_layer_indices is \[0\]; only None is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' or 'swish' is supported"),
        ({"mamba_rms_norm": "yes"}, "mamba_rms_norm is 'yes'; only False or True is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling .* is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only 1.0"),
        ({"mamba_d_ssm": 57}, "mamba_d_ssm is 57, mamba_n_heads 8 and mamba_d_head 7; expected the first to be"),
        ({"mlp_multipliers": [1.0]}, r"mlp_multipliers is \[1.0\]; expected 2 numbers"),
        ({"ssm_multipliers": [1, 1, "a", 1, 1]}, "part_multipliers is .*; expected five numbers"),
        ({"ssm_in_multiplier": "a"}, "ssm_in_multiplier is 'a'; expected a number from"),
        ({"time_step_limit": [2, 1]}, "dt_limit is .*; expected two numbers from 0, the smaller first"),
    ],
)
def test_falcon_h1_of_another_kind_is_refused(checkpoints, changes, message):
    raw = json.loads((checkpoints("falcon_h1")[0] / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=f"the file: .*{message}"):
        read_config(raw | changes, "the file")


def test_falcon_h1_with_factors_in_its_weights_is_refused(checkpoints, tmp_path):
    """As mlx-lm writes it, which leaves the factors in config.json."""
    from safetensors.numpy import load_file, save_file

    folder = checkpoints("falcon_h1")[0]
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("conv1d.weight"):
            tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="laid out as mlx-lm does it, which multiplies"):
        mambax.load(tmp_path, backend="numpy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [2]}, r"attn_layer_idx is \[2\]; expected numbers of layers from 0 to 1"),
        ({"attn_layer_idx": [1, 1]}, "attn_layer_idx is .*; expected numbers of layers"),
        ({"d_intermediate": -1}, "d_intermediate is -1; expected a whole number from 0"),
        ({"attn_cfg": None}, "attn_cfg is None; expected an object"),
        ({"attn_cfg": {"num_heads": 6}}, "attn_cfg: causal is False; only True is supported"),
        ({"attn_cfg": {"causal": True}}, "attn_cfg: num_heads is None; expected a whole number from 1"),
        ({"attn_cfg": {"causal": True, "num_heads": 5}}, "num_heads is 5 without head_dim; expected a divisor"),
        ({"attn_cfg": {"causal": True, "num_heads": 6, "mlp_dim": 256}}, "mlp_dim is 256; only 0 is supported"),
        (
            {"attn_cfg": {"causal": True, "num_heads": 6, "rotary_emb_interleaved": True}},
            "rotary_emb_interleaved is True; only False is supported",
        ),
        ({"attn_cfg": {"causal": True, "num_heads": 6, "rotary_emb_dim": 5}}, "rope_dim is 5; expected an even"),
        ({"attn_cfg": {"causal": True, "window": 5}}, "attn_cfg with window is not of an MHA layer"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm is False; only True is supported"),
    ],
)
def test_mamba2_with_attention_of_another_kind_is_refused(checkpoints, changes, message):
    raw = json.loads((checkpoints("mamba2attn")[0] / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=f"the file: .*{message}"):
        read_config(raw | changes, "the file")


def test_a_hybrid_of_ones_own_is_saved_and_read(nn, tmp_path):
    """Mamba-1 and Mamba-2 in turn, which no published family has."""
    config = mambax.MambaLMConfig(
        d_model=32, n_layer=3, vocab_size=50, layer_types=("mamba", "mamba2", "mamba"),
        mamba2=Mamba2Options(n_heads=4, head_dim=16, d_state=8),
    )  # fmt: skip
    assert config.family == "mambax"
    model = mambax.from_config(config, backend=nn.name)
    ids = token_ids(2, 30, 50)
    logits, state = run(model, ids)
    first, half = run(model, ids[:, :11])
    assert_close(np.concatenate([first, run(model, ids[:, 11:], half)[0]], 1), logits)
    model.save_pretrained(tmp_path)
    again = mambax.load(tmp_path, backend=nn.name)
    assert again.config == config
    np.testing.assert_array_equal(run(again, ids)[0], logits)
    state.save(tmp_path / "a.state")
    assert_states_close(again.load_state(tmp_path / "a.state"), state)


def test_transformers_takes_new_weights_of_mamba2_as_they_are(tmp_path):
    """It divides them where the file says that they were divided when they were made."""
    import transformers

    config = mambax.MambaLMConfig(
        d_model=32, n_layer=3, vocab_size=50, layer_types=("mamba2",) * 3, family="mamba2",
        mamba2=Mamba2Options(n_heads=4, head_dim=16, d_state=8),
    )  # fmt: skip
    assert config.rescale_prenorm_residual
    model = mambax.from_config(config, backend="numpy")
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = token_ids(2, 30, 50)
    assert_close(logits_of(theirs, ids), run(model, ids)[0])
    assert mambax.load(tmp_path, backend="numpy").config == config


def test_a_family_that_cannot_hold_a_model_says_so(tmp_path):
    config = mambax.MambaLMConfig(d_model=32, n_layer=1, vocab_size=50, dt_b_c_norm="learned", family="mamba")
    with pytest.raises(ValueError, match="a Mamba-1 checkpoint cannot hold dt_b_c_norm = 'learned'"):
        mambax.from_config(config, backend="numpy").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_of_mixer():
    config = mambax.MambaLMConfig(d_model=32, n_layer=2, vocab_size=50, layer_types=("mamba", "mambo"))
    with pytest.raises(ValueError, match="unknown mixer 'mambo'; expected one of 'mamba', 'mamba2'"):
        mambax.from_config(config, backend="numpy")
