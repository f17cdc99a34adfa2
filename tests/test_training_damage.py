"""A run whose files were damaged between two starts: what is wrong is named, with what to do; nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import WITH_GRADIENTS, backend_params
from tokenizers import Tokenizer as Backend
from tokenizers import models
from training_runs import TEXT, trainer

import mambax
from mambax.training import setup
from mambax.training.recipe import parse

BACKEND = next((name for name in WITH_GRADIENTS if name in backend_params(WITH_GRADIENTS)), "")
pytestmark = pytest.mark.skipif(not BACKEND, reason="needs torch or mlx")
SHORT: dict[str, Any] = {"steps": 4, "save_every": 2}
LAST = Path("run") / "checkpoints" / "step-00000004"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps and its data."""
    folder = tmp_path_factory.mktemp("finished")
    trainer(BACKEND, folder / "run", folder, **SHORT).train()
    return folder


def changed(**values: Any) -> Callable[[Path], None]:
    """Damage of ``training.json``; a value of ``...`` takes its key away."""

    def damage(folder: Path) -> None:
        path = folder / LAST / "training.json"
        info = json.loads(path.read_text("utf-8")) | values
        path.write_text(json.dumps({key: value for key, value in info.items() if value is not ...}), "utf-8")

    return damage


def in_front(line: bytes) -> Callable[[Path], None]:
    """Damage of the log."""

    def damage(folder: Path) -> None:
        path = folder / "run" / "log.jsonl"
        path.write_bytes(line + b"\n" + path.read_bytes())

    return damage


def in_the_way(folder: Path) -> None:
    (folder / "run" / "log.csv").unlink()
    (folder / "run" / "log.csv").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(config=...), "config is missing; expected dict.*delete this folder"),
        (changed(step="four"), "step is 'four'; expected int.*delete this folder"),
        (changed(states=None), "states is None; expected int or dict.*delete this folder"),
        (changed(best={"step": 3}), "an evaluation is .*delete this folder"),
        (lambda folder: (folder / LAST / "state-0.safetensors").unlink(), "state-0.safetensors is missing"),
        (lambda folder: (folder / LAST / "state-1.safetensors").write_bytes(b""), "not the state that was saved"),
        (in_front(b"\0\0\0"), r"log\.jsonl, line 1: expected a record of a step.*delete the line"),
        (in_front(b"[1]"), r"log\.jsonl, line 1: expected a record of a step, found '\[1\]'"),
        (in_the_way, "log.csv: .*; training stopped after step 4; the last good checkpoint.*Put that right"),
    ],
)
def test_damage_is_named(finished: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    damage(tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "copy" / "run" / "checkpoints").rglob("*.*")}
    with pytest.raises((ValueError, OSError), match=message):
        trainer(BACKEND, tmp_path / "copy" / "run", tmp_path / "copy", **SHORT).train(resume=True)
    for path, content in before.items():
        assert path.read_bytes() == content


def test_a_log_of_another_version_goes_on(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    in_front(b'{"step": 1, "colour": 3}')(tmp_path / "copy")
    assert trainer(BACKEND, tmp_path / "copy" / "run", tmp_path / "copy", **SHORT).train(resume=True).step == 4


def test_nothing_is_made_where_there_is_nothing_to_resume(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer(BACKEND, tmp_path / "nothing", finished, **SHORT).train(resume=True)
    assert not (tmp_path / "nothing").exists()


# --- tokens ------------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, **model: Any) -> Any:
    text = folder / "text.txt"
    text.write_text(TEXT, "utf-8")
    return parse(
        {
            "run": str(folder / "run"), "backend": BACKEND, "model": model or {"d_model": 8, "n_layer": 1},
            "data": {"train": str(text), "tokenizer": "bytes", "length": 16},
            "training": {"steps": 1, "batch_size": 2},
        }, "here",
    )  # fmt: skip


def test_tokens_that_are_damaged(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    setup.build(setup.check(recipe))
    data = tmp_path / "run" / "data"
    tokens = (data / "train" / "tokens.bin").read_bytes()
    (data / "source.json").write_text("{", "utf-8")
    killed = tmp_path / "run" / ".data.01234567.tmp"
    killed.mkdir()
    setup.build(setup.check(recipe))
    assert (data / "train" / "tokens.bin").read_bytes() == tokens
    assert not killed.exists()
    header = data / "train" / "dataset.json"
    header.write_text(json.dumps(json.loads(header.read_text("utf-8")) | {"tokens": "many"}), "utf-8")
    with pytest.raises(
        ValueError, match=r"tokens is 'many'; expected a whole number.*Delete .*data: it is made again"
    ):
        setup.build(setup.check(recipe))


# --- models that cannot be trained further -----------------------------------------------------------------------


def test_models_that_cannot_be_trained_on_text(tmp_path: Path) -> None:
    config = mambax.MambaLMConfig(d_model=32, n_layer=1, vocab_size=120)
    model = mambax.from_config(config, backend="numpy")
    letters = {character: i for i, character in enumerate(sorted(set(TEXT)))}
    model.tokenizer = mambax.Tokenizer(Backend(models.BPE({**letters, "q": 130}, [])))
    model.save_pretrained(tmp_path / "model")
    recipe = recipe_of(tmp_path, pretrained=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="has the token 130 of its tokenizer, and the model knows 120 tokens"):
        setup.build(setup.check(recipe))
    model.tokenizer = mambax.Tokenizer(Backend(models.BPE({**letters, "q": 70000}, [])))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"gives the token 70000, .* expected ids up to 65535"):
        setup.build(setup.check(recipe))
    assert not (tmp_path / "run").exists()
    mambax.load(tmp_path / "model", backend="numpy", quantize="int8").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is quantised; expected weights in floating point"):
        setup.check(recipe)
    classes = mambax.MambaClassificationConfig(d_model=32, n_layer=1, vocab_size=120, num_labels=2)
    mambax.from_config(classes, backend="numpy").save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="expected a MambaForCausalLM to train on text"):
        setup.check(recipe_of(tmp_path, pretrained=str(tmp_path / "classes")))
