"""Repositories on the hub, without a network: what is asked for, and what is said when it is not there."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from checkpoint_writers import write_hf, write_original
from harness import config_of, rounded, weights_of
from huggingface_hub import errors

import mambax
from mambax.checkpoint.loading import ORIGINAL_TOKENIZER

CONFIG = config_of(n_layer=1, tie_embeddings=True, vocab_size=104)
COMMIT = "0123456789abcdef" * 2 + "01234567"
TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"to": 0, "be": 1}, "unk_token": "to"}}'


class Hub:
    """``hf_hub_download`` over folders ``root/owner/name/snapshots/<commit>``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str, str | None]] = []

    def folder(self, name: str) -> Path:
        return self.root / name / "snapshots" / COMMIT

    def download(self, repo: str, file: str, *, revision: str | None = None, local_files_only: bool = False) -> str:
        self.asked.append((repo, file, revision))
        if not self.folder(repo).is_dir():
            raise errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache.\nMore")
        path = self.folder(repo) / file
        if not path.is_file():
            raise errors.EntryNotFoundError("404")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return rounded(weights_of(CONFIG), "float32")


def test_only_the_files_that_are_needed_of_one_commit(hub: Hub, weights: dict[str, np.ndarray]) -> None:
    folder = write_hf(hub.folder("owner/name"), CONFIG, weights, shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"not asked for")
    (folder / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    model = mambax.load("owner/name", backend="numpy", revision="main")
    assert model.tokenizer.encode("be to be") == [0]
    assert hub.asked[0] == ("owner/name", "config.json", "main")
    assert {revision for _, _, revision in hub.asked[1:]} == {COMMIT}
    files = [file for _, file, _ in hub.asked]
    assert len(files) == len(set(files))
    assert not any(file.endswith(".bin") for file in files)
    assert {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} < set(files)


def test_a_file_that_is_missing_in_the_repository(hub: Hub, weights: dict[str, np.ndarray]) -> None:
    folder = write_hf(hub.folder("owner/name"), CONFIG, weights)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"owner/name: no weights; expected .*the repository does not have it"
    ):
        mambax.load("owner/name", backend="numpy")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"owner/name: no config.json; expected"):
        mambax.load("owner/name", backend="numpy")


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("Cannot reach the hub\nin many words"),
        errors.OfflineModeIsEnabled("offline mode is enabled"),
        ConnectionResetError("connection reset"),
        errors.HTTPError("Name or service not known"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConnectionError) as caught:
        mambax.load("owner/name", backend="numpy")
    message = str(caught.value)
    assert message.startswith("owner/name: this repository cannot be reached on the hub (")
    assert str(error).splitlines()[0] in message
    assert "Check the spelling and the network" in message
    assert "pass a local folder" in message


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("RepositoryNotFoundError", "no such repository on the hub, and no such folder here. Check the spelling"),
        ("RevisionNotFoundError", "no such repository on the hub"),
        ("GatedRepoError", "access to this repository must be granted"),
    ],
)
def test_a_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch, kind: str, fragment: str) -> None:
    response: Any = SimpleNamespace(headers={}, request=None)

    def fail(*_: object, **__: object) -> None:
        raise getattr(errors, kind)("404", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=fragment):
        mambax.load("owner/name", backend="numpy")


def cached(root: Path, name: str) -> Path:
    """An empty snapshot in a cache as huggingface_hub keeps it."""
    repo = root / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def test_the_cache_of_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, np.ndarray]
) -> None:
    """Whose files are symlinks that leave the snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = cached(tmp_path / "cache", "owner/name")
    for file in write_hf(tmp_path / "files", CONFIG, weights, shards=2).iterdir():
        blob = snapshot.parents[1] / "blobs" / file.name
        file.rename(blob)
        try:
            (snapshot / file.name).symlink_to(blob)
        except OSError:
            pytest.skip("symlinks cannot be made here")
    model = mambax.load("owner/name", backend="numpy", local_files_only=True)
    np.testing.assert_array_equal(model.backbone.norm_f.weight, weights["backbone.norm_f.weight"])
    with pytest.raises(FileNotFoundError, match=r"owner/other: this repository is not in the local cache"):
        mambax.load("owner/other", backend="numpy", local_files_only=True)
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard model-00001-of-00002.safetensors is missing.*local cache"):
        mambax.load("owner/name", backend="numpy", local_files_only=True)


@pytest.mark.parametrize("there", [True, False])
def test_original_models_get_the_tokenizer_they_were_trained_with(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    config = config_of(d_model=2, dt_rank=1, n_layer=1, tie_embeddings=True, vocab_size=50280)
    folder = write_original(tmp_path / "mamba", config, rounded(weights_of(config), "float32"), vocab_size=50277)
    if there:
        hub.folder(ORIGINAL_TOKENIZER).mkdir(parents=True)
        (hub.folder(ORIGINAL_TOKENIZER) / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "mambax"):
        model = mambax.load(folder, backend="numpy")
    assert hub.asked[0][:2] == (ORIGINAL_TOKENIZER, "tokenizer.json")
    assert (model.tokenizer is not None) == there
    assert there == (not caplog.records)
    assert there or "set model.tokenizer = mambax.Tokenizer.from_pretrained(folder)" in caplog.text
    assert there or "EleutherAI/gpt-neox-20b" in caplog.text


def test_other_vocabularies_do_not_ask_for_it(hub: Hub, tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    assert mambax.load(write_original(tmp_path, CONFIG, weights, vocab_size=101), backend="numpy").tokenizer is None
    assert hub.asked == []
