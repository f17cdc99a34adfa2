"""Damaged, hostile and mistaken checkpoints: each refused, nothing run, and the message says what to do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import hf_config, original_config, save_safetensors, write_config, write_hf, write_original
from harness import config_of, rounded, weights_of

import mambax
from mambax.checkpoint.torch_files import TorchFile

CONFIG = config_of(n_layer=1, vocab_size=24, tie_embeddings=True)
NORM = "backbone.norm_f.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return rounded(weights_of(CONFIG), "float32")


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    """A checkpoint that is good until a test spoils it."""
    return write_hf(tmp_path / "model", CONFIG, weights)


def refused(folder: Path, *fragments: str, error: type[Exception] = ValueError) -> str:
    """Loading raises, and the message holds these texts."""
    with pytest.raises(error) as caught:
        mambax.load(folder, backend="numpy")
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    return str(caught.value)


def test_the_unspoilt_checkpoint_loads(folder: Path) -> None:
    mambax.load(folder, backend="numpy")


# --- safetensors ------------------------------------------------------------------------------------------------


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(path: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file with a header of our choice."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    refused(
        folder, "model.safetensors", "is truncated", f"expected {len(content)} bytes", "download or write it again"
    )
    path.write_bytes(content[:5])
    refused(folder, "5 bytes; expected a safetensors file")


def test_trailing_bytes(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    refused(folder, "bytes that belong to no tensor")


@pytest.mark.parametrize("size", [2**63, 2**40, 17 * 2**20])
def test_absurd_header_length(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    refused(folder, f"a header of {size} bytes is announced", "download or write it again")


def test_git_lfs_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_bytes(pointer)
    refused(folder, "Git LFS pointer", "git lfs pull")


def by_offset(header: dict[str, Any]) -> list[str]:
    tensors = [name for name in header if name != "__metadata__"]
    return sorted(tensors, key=lambda name: header[name]["data_offsets"])


def overlap(header: dict[str, Any]) -> None:
    last, before = by_offset(header)[:-3:-1]
    size = header[last]["data_offsets"][1] - header[last]["data_offsets"][0]
    end = header[before]["data_offsets"][1] - 4
    header[last]["data_offsets"] = [end, end + size]


def hole(header: dict[str, Any]) -> None:
    del header[by_offset(header)[1]]


def change(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].update({field: value})


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (overlap, "overlaps the tensor before it"),
        (hole, "leaves a hole of "),
        (change("shape", [-40]), "expected whole numbers from 0 up"),
        (change("shape", [40.0]), "expected whole numbers from 0 up"),
        (change("shape", [True]), "expected whole numbers from 0 up"),
        (change("shape", "40"), "expected whole numbers from 0 up"),
        (change("shape", [2**40, 2**40]), f"needs {2**82} bytes"),
        (change("shape", [41]), "needs 164 bytes"),
        (change("dtype", "F33"), "has dtype 'F33'; expected one of F64, F32"),
        (change("dtype", ["F32"]), "expected one of F64, F32"),
        (change("data_offsets", [0]), "has data_offsets [0]"),
        (change("data_offsets", [160, 0]), "has data_offsets [160, 0]"),
        (change("colour", "red"), "needs exactly dtype, shape and data_offsets"),
        (lambda header: header.update({NORM: 3}), "needs exactly dtype, shape and data_offsets"),
        (lambda header: header.update({"a\nb": header.pop(NORM)}), "is not the name of a tensor"),
        (lambda header: header.update(__metadata__={"format": 1}), "__metadata__ is not an object of strings"),
    ],
)
def test_header(folder: Path, spoil: Callable[[dict[str, Any]], None], fragment: str) -> None:
    path = folder / "model.safetensors"
    header, data = split(path)
    spoil(header)
    join(path, header, data)
    refused(folder, str(path), fragment)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"[1, 2]", "expected a JSON object"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' comes twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_header_that_is_not_an_object(folder: Path, text: bytes, fragment: str) -> None:
    join(folder / "model.safetensors", text, b"")
    refused(folder, "model.safetensors, header", fragment)


# --- names, shapes, dtypes and values ---------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_all_listed(folder: Path, weights: dict[str, np.ndarray]) -> None:
    spoilt = {name: array for name, array in weights.items() if name != NORM}
    spoilt["backbone.layers.0.mixer.D"] = np.zeros(79, np.float32)
    spoilt["backbone.layers.1.mixer.D"] = np.zeros(80, np.float32)
    spoilt["backbone.layers.0.norm.weight"] = np.zeros(40, np.int8)
    save_safetensors(folder / "model.safetensors", spoilt)
    refused(
        folder,
        f"1 missing: {NORM} [40]",
        "1 unexpected: backbone.layers.1.mixer.D [80]",
        "1 of another shape: backbone.layers.0.mixer.D: expected [80], found [79]",
        "1 of another dtype: backbone.layers.0.norm.weight: expected a float dtype, found int8",
        "Is it the config.json of these weights",
    )


def test_a_long_list_is_cut(folder: Path) -> None:
    write_config(folder, hf_config(CONFIG, num_hidden_layers=4000))
    assert len(refused(folder, "missing: backbone.layers.1.", "more")) < 2000


def test_a_convolution_that_is_neither_layout(folder: Path, weights: dict[str, np.ndarray]) -> None:
    name = "backbone.layers.0.mixer.conv1d.weight"
    save_safetensors(folder / "model.safetensors", weights | {name: weights[name].reshape(3, 1, 80)})
    refused(folder, f"{name}: expected [80, 1, 3], found [3, 1, 80]")


def test_the_same_parameter_twice(folder: Path, weights: dict[str, np.ndarray]) -> None:
    table = weights["backbone.embeddings.weight"]
    save_safetensors(folder / "model.safetensors", weights | {"backbone.embedding.weight": table})
    refused(folder, "1 unexpected: backbone.embedding")


def test_an_untied_head_that_is_missing(folder: Path) -> None:
    write_config(folder, hf_config(CONFIG, tie_word_embeddings=False))
    refused(folder, "1 missing: lm_head.weight [24, 40]", "set tie_word_embeddings to true")


def test_a_tied_head_that_differs(folder: Path, weights: dict[str, np.ndarray]) -> None:
    head = weights["backbone.embeddings.weight"].copy()
    head[-1, -1] += 1e-3
    save_safetensors(folder / "model.safetensors", weights | {"lm_head.weight": head})
    refused(folder, "lm_head.weight differs from backbone.embeddings.weight", "tie_word_embeddings")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_finite_are_named(
    folder: Path, weights: dict[str, np.ndarray], dtype: str, value: float
) -> None:
    spoilt = rounded(weights, dtype)
    name = "backbone.layers.0.mixer.in_proj.weight"
    spoilt[name].flat[-1] = value
    save_safetensors(folder / "model.safetensors", spoilt)
    refused(folder, f"{name} has weights that are NaN or infinite", "earlier checkpoint")


def test_values_too_large_for_the_dtype_asked_for(folder: Path, weights: dict[str, np.ndarray]) -> None:
    save_safetensors(folder / "model.safetensors", weights | {NORM: np.full(40, 1e6, np.float32)})
    with pytest.raises(ValueError, match=rf"{NORM} has values too large for float16 .*load with dtype='bfloat16'"):
        mambax.load(folder, backend="numpy", dtype="float16")


# --- the folder and the index -----------------------------------------------------------------------------------


def test_empty_folder(tmp_path: Path) -> None:
    refused(
        tmp_path, "no config.json; expected a folder with config.json and weights; found nothing", error=OSError
    )


def test_no_such_folder_and_a_file(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder", error=FileNotFoundError)
    refused(
        folder / "model.safetensors",
        "expected a folder with config.json and weights, found a file",
        error=NotADirectoryError,
    )
    for name in ("./nowhere", "a/b/c", "model"):
        with pytest.raises(FileNotFoundError, match=r"no such folder; expected a folder .*, or a repository"):
            mambax.load(name, backend="numpy")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights; expected model.safetensors or pytorch_model.bin", "config.json", error=OSError)


@pytest.fixture
def sharded(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    return write_hf(tmp_path / "sharded", CONFIG, weights, shards=2)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "shard model-00002-of-00002.safetensors is missing", "download", error=FileNotFoundError)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..\\b.safetensors", "C:b.safetensors",
     "..", "", ".hidden.safetensors", "model.pkl", "a\0.safetensors", 7, None],
)  # fmt: skip
def test_shard_name_that_leaves_the_folder(sharded: Path, name: Any) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"][NORM] = name
    path.write_text(json.dumps(index), encoding="utf-8")
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded.parent / "secret.safetensors")
    refused(sharded, "is not the name of a shard; expected a plain file name")


def test_index_that_does_not_fit_its_shards(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["weight_map"][NORM]
    path.write_text(json.dumps(index), encoding="utf-8")
    refused(sharded, f"does not fit model.safetensors.index.json: '{NORM}' is in the shard alone")
    path.write_text("{}", encoding="utf-8")
    refused(sharded, "weight_map is missing")


# --- config.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "not valid JSON"),
        ("hidden_size: 40", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "model_type"),
    ],
)
def test_config_that_is_none(folder: Path, text: str, fragment: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, "config.json", fragment)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 10**9, 2**70, "40", 40.5, True, [40], {"__float__": "Infinity"}])
def test_sizes_that_are_none(folder: Path, field: str, value: Any) -> None:
    write_config(folder, hf_config(CONFIG, **{field: value}, intermediate_size=...))
    refused(folder, f"config.json: {field}: MambaLMConfig.", "expected a whole number from 1 to ")


@pytest.mark.parametrize("value", [0, -80, 10**9, "80", 80.0, True])
def test_inner_sizes_that_are_none(folder: Path, value: Any) -> None:
    write_config(folder, hf_config(CONFIG, intermediate_size=value))
    refused(folder, f"intermediate_size is {value!r}; expected a whole number")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"hidden_size": ...}, ["hidden_size is missing"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        (
            {"model_type": "llama"},
            ["model_type 'llama' is not supported", "supported are model_type 'mamba'", "state-spaces layout"],
        ),
        ({"model_type": "falcon_mamba"}, ["architectures ['MambaForCausalLM'] is not supported", "Falcon-Mamba"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "supported are"]),
        ({"architectures": "MambaForCausalLM"}, ["is not supported; supported are"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'; only 'silu' or 'swish' is supported"]),
        ({"quantization_config": {"bits": 4}}, ["quantised checkpoints are not supported"]),
        ({"d_model": 41}, ["hidden_size is 40, but d_model is 41"]),
        ({"layer_norm_epsilon": -1}, ["layer_norm_epsilon: MambaLMConfig.norm_epsilon is -1", "a number from 0"]),
        ({"time_step_rank": "full"}, ["time_step_rank", "'auto' or a whole number"]),
        ({"eos_token_id": 24}, ["eos_token_id", "token ids from 0 to 23"]),
        ({"architectures": ["MambaForSequenceClassification"], "num_labels": 2}, ["pooling is None", "'last'"]),
    ],
)
def test_config_of_another_model(folder: Path, changes: dict[str, Any], fragments: list[str]) -> None:
    write_config(folder, hf_config(CONFIG, **changes))
    refused(folder, "config.json", *fragments)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg with layer 'Mamba3'; supported are"),
        ({"ssm_cfg": {"headdim": 64, "ngroups": 1}}, "headdim, ngroups is not a Mamba-1 model"),
        ({"ssm_cfg": [1]}, "ssm_cfg is [1]; expected an object"),
        ({"rms_norm": False}, "rms_norm is False; only True is supported"),
        ({"attn_layer_idx": [1]}, "attention and MLP blocks are not supported"),
        ({"attn_cfg": {"num_heads": 2}}, "attention and MLP blocks are not supported"),
        ({"d_intermediate": 80}, "attention and MLP blocks are not supported"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0; expected a whole number from 1"),
        ({"d_model": "forty"}, "d_model: MambaLMConfig.d_model is 'forty'"),
        ({"n_layer": ...}, "neither model_type nor d_model and n_layer"),
    ],
)
def test_original_config_of_another_model(folder: Path, changes: dict[str, Any], fragment: str) -> None:
    write_config(folder, original_config(CONFIG, 24, **changes))
    refused(folder, "config.json", fragment)


# --- pytorch_model.bin ------------------------------------------------------------------------------------------


class Evil:
    """What a pickle can do: run a command while it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def zip_of(path: Path, data_pkl: bytes, records: dict[str, bytes] | None = None) -> None:
    """A file in torch's zip format with a pickle of our choice."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)


@pytest.fixture
def binary(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    """An original checkpoint that is good until a test spoils it."""
    return write_original(tmp_path / "binary", CONFIG, weights, vocab_size=24)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_would_run_code(binary: Path, tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "it ran"
    payload = pickle.dumps(OrderedDict(weight=Evil(target)), protocol=protocol)
    pickle.loads(payload)
    assert target.is_dir(), "the pickle is harmless, so that the test shows nothing"
    target.rmdir()
    module = os.mkdir.__module__
    zip_of(binary / "pytorch_model.bin", payload)
    refused(binary, f"refused: the pickle asks for '{module}.mkdir'", "Nothing of it was run", "safetensors")
    if protocol >= 2:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        (binary / "pytorch_model.bin").write_bytes(magic + payload)
        refused(binary, f"refused: the pickle asks for '{module}.mkdir'")
        (binary / "pytorch_model.bin").write_bytes(payload)
        refused(binary, f"refused: the pickle asks for '{module}.mkdir'")
    assert not target.exists()


@pytest.mark.parametrize(
    ("payload", "fragment"),
    [
        (b"\x80\x02cbuiltins\neval\n.", "asks for 'builtins.eval'"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "asks for 'torch.storage._load_from_bytes'"),
        (b"\x80\x02ctorch\nload\n.", "asks for 'torch.load'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses the instruction NEWOBJ"),
        (b"\x80\x02(ios\nsystem\n.", "uses the instruction INST"),
        (b"\x80\x02\x82\x01.", "uses the instruction EXT1"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "applies BUILD to collections.OrderedDict"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls an object of type str"),
        (b"\x80\x02}))s.", "has a dictionary key that is an object of type tuple"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "with other arguments than torch.save writes"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "refers to something that is not a storage"),
        (b"\x80\x02e.", "the pickle is damaged"),
        (b"\x80\x02.", "the pickle is damaged"),
        (b"\x80\x02h\x05.", "the pickle is damaged"),
        (b"\x80\x02}", "the pickle is damaged"),
        (b"", "the pickle is damaged"),
        (b"\x80\x02]q\x00h\x00a.", "expected a dictionary of tensors, found list"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "'a' is no tensor but int"),
        (
            b"\x80\x02}X\x05\x00\x00\x00model}s.",
            "'model' is no tensor but dict",
        ),
    ],
)
def test_other_pickles(binary: Path, payload: bytes, fragment: str) -> None:
    zip_of(binary / "pytorch_model.bin", payload)
    refused(binary, "pytorch_model.bin", fragment)


def tensor_pickle(numel: Any, offset: Any, shape: Any, strides: Any) -> bytes:
    """A dictionary of one float32 tensor over storage "0", with numbers of our choice."""
    parts = [b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("]
    parts += [b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"]
    parts += [pickle.dumps(numel, 2)[2:-1], b"tQ"]
    parts += [pickle.dumps(value, 2)[2:-1] for value in (offset, shape, strides)]
    return b"".join(parts) + b"\x89}tRs."


def test_a_tensor_of_a_pickle_of_ours_is_read(tmp_path: Path) -> None:
    path, data = tmp_path / "a.bin", np.arange(8, dtype=np.float32)
    zip_of(path, tensor_pickle(8, 1, (2, 3), (1, 2)), {"0": data.tobytes()})
    np.testing.assert_array_equal(TorchFile(path).read("a"), [[1, 3, 5], [2, 4, 6]])


@pytest.mark.parametrize(
    ("numbers", "fragment"),
    [
        ((8, 0, (10**12,), (0,)), "does not fit its storage of 8 elements"),
        ((8, 0, (10**6, 10**6), (0, 0)), "does not fit its storage of 8 elements"),
        ((8, 0, (2, 2), (0, 1)), "uses some twice; save a contiguous copy"),
        ((8, 0, (4, 4), (1, 1)), "uses some twice; save a contiguous copy"),
        ((8, 0, (9,), (1,)), "does not fit its storage of 8 elements"),
        ((8, 5, (4,), (1,)), "offset 5 does not fit its storage of 8 elements"),
        ((8, 0, (2, 2), (7, 1)), "does not fit its storage of 8 elements"),
        ((8, -1, (4,), (1,)), "no whole numbers from 0"),
        ((8, 0, (-4,), (1,)), "no whole numbers from 0"),
        ((8, 0, (4,), (-1,)), "no whole numbers from 0"),
        ((8, 0, (4.0,), (1,)), "no whole numbers from 0"),
        ((8, 0, (4,), (1, 1)), "no whole numbers from 0"),
        ((8, 0, 4, 1), "no whole numbers from 0"),
        ((8, 0, (2**70,), (1,)), "no whole numbers from 0"),
        ((10**12, 0, (10**12,), (1,)), "its storage has 32 bytes, expected 4000000000000"),
        ((-8, 0, (4,), (1,)), "a storage without a name or a size"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(binary: Path, numbers: Any, fragment: str) -> None:
    zip_of(binary / "pytorch_model.bin", tensor_pickle(*numbers), {"0": bytes(32)})
    refused(binary, "pytorch_model.bin: ", fragment)


def test_a_storage_that_is_missing(binary: Path) -> None:
    zip_of(binary / "pytorch_model.bin", tensor_pickle(8, 0, (8,), (1,)))
    refused(binary, "its data '0' are not in the file", "download it again")


def test_compressed_records(binary: Path) -> None:
    path = binary / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    refused(binary, "is compressed or encrypted")


def test_data_that_do_not_match_their_checksum(binary: Path, weights: dict[str, np.ndarray]) -> None:
    path = binary / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    at = content.index(weights[NORM].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    refused(binary, "do not match their checksum", "download it again")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_binary(binary: Path, weights: dict[str, np.ndarray], legacy: bool) -> None:
    write_original(binary, CONFIG, weights, vocab_size=24, legacy=legacy)
    path = binary / "pytorch_model.bin"
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100, 3):
        path.write_bytes(content[:size])
        refused(binary, "pytorch_model.bin", "download")
    path.write_bytes(content + b"\0")
    if legacy:
        refused(binary, f"expected {len(content)} bytes, found {len(content) + 1}")


def test_neither_zip_nor_pickle(binary: Path) -> None:
    (binary / "pytorch_model.bin").write_bytes(b"<html>not found</html>")
    refused(binary, "not a file of torch.save")


def test_a_trainer_checkpoint(binary: Path) -> None:
    torch = pytest.importorskip("torch")
    for content in ({"model": {"a": torch.zeros(2)}}, {"epoch": 3}, [torch.zeros(2)]):
        for new in (True, False):
            torch.save(content, binary / "pytorch_model.bin", _use_new_zipfile_serialization=new)
            refused(binary, "pytorch_model.bin", "expected ")


def test_nan_in_a_binary(binary: Path, weights: dict[str, np.ndarray]) -> None:
    spoilt = weights | {NORM: np.full(40, np.nan, np.float32)}
    write_original(binary, CONFIG, spoilt, vocab_size=24)
    refused(binary, f"{NORM} has weights that are NaN or infinite")
