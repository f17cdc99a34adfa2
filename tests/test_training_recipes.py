"""Recipes and ``mambax train``: nothing runs before everything that can be checked has been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_runs import TEXT
from typer.testing import CliRunner

import mambax
from mambax.cli.app import app
from mambax.registry import is_installed
from mambax.training import recipe as recipes
from mambax.training import setup
from mambax.training.logs import read_log
from mambax.training.recipe import parse, parse_assignment, read_file

ROOT = Path(__file__).resolve().parent.parent
BACKEND = next((name for name in ("mlx", "torch") if is_installed(name)), "")
needs_backend = pytest.mark.skipif(not BACKEND, reason="needs torch or mlx")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes((TEXT * 3).encode())
    return path


def values(text: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of seconds."""
    made: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "backend": BACKEND,
        "model": {"d_model": 8, "n_layer": 1, "d_state": 4},
        "data": {"train": [str(text)], "tokenizer": "bytes", "length": 16},
        "training": {"steps": 6, "batch_size": 2, "eval_every": 3, "save_every": 2, "log_every": 1},
    }
    for key, value in changes.items():
        recipes.set_value(made, key.replace("__", "."), value)
    return made


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.learning_rat", 1, "'training.learning_rat'; did you mean 'training.learning_rate'"),
        ("learning_rate", 1, "unknown key 'learning_rate'; did you mean 'training.learning_rate'"),
        ("training.length", 9, "did you mean 'data.length'"),
        ("trainning", {}, "did you mean 'training'"),
        ("model.vocab_size", 9, "unknown key 'model.vocab_size'; did you mean 'data.vocab_size'"),
        ("xyzzy", 1, "expected one of backend, data, device"),
        ("model", 3, r"\[model\] is 3; expected a table"),
        ("model.d_model", -1, "d_model is -1; expected a whole number"),
        ("model.pretrained", "x", "with nothing else"),
        ("data.train", [], "data.train is empty"),
        ("data.arrangement", "random", "'random'; expected one of 'reading', 'windows', 'documents'"),
        ("data.validation_fraction", 1, "validation_fraction is 1"),
        ("training.steps", "many", "steps is 'many'"),
        ("run", "", "run is ''; expected text"),
    ],
)
def test_bad_recipes(text, tmp_path, key, value, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        parse(values(text, tmp_path, **{key.replace(".", "__"): value}), "here")


def test_a_recipe_is_saved_and_read_again(text, tmp_path):
    recipe = parse(values(text, tmp_path), "here")
    recipe.save(tmp_path)
    assert parse(read_file(tmp_path / recipes.RECIPE), "there") == recipe
    assert recipe.training.warmup_steps == 0


def test_files_of_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="TOML or JSON"):
        read_file(tmp_path / "nothing.toml")
    for name, content, message in (
        ("a.yaml", "a: 1", r"\.toml or \.json"),
        ("a.json", "{", "not valid JSON"),
        ("a.toml", "a = ", "not valid TOML"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            read_file(tmp_path / name)


def test_the_shipped_recipe():
    recipe = parse(read_file(ROOT / "examples" / "tinyshakespeare.toml"), "tinyshakespeare.toml")
    assert (ROOT / recipe.data.train[0]).is_file()


def test_assignments():
    assert parse_assignment("training.steps=200") == ("training.steps", 200)
    assert parse_assignment('data.train=["a", "b"]') == ("data.train", ["a", "b"])
    assert parse_assignment("run=some/where=here") == ("run", "some/where=here")
    for text in ("training.steps", "=3"):
        with pytest.raises(ValueError, match=r"such as training\.steps=200"):
            parse_assignment(text)


# --- what is checked before anything runs ------------------------------------------------------------------------


@needs_backend
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.train", ["missing.txt"], r"missing\.txt: no such file"),
        ("data.length", 10**6, r"bytes of text; expected more than data\.length, 1000000"),
        ("data.tokenizer", "elsewhere", r"elsewhere: expected tokenizer\.json"),
        ("backend", "numpy", "no gradients.*'torch' or 'mlx'"),
        ("backend", "jax", "unknown backend 'jax'"),
        ("device", "abacus", "device is 'abacus'"),
        ("training.precision", "float8", "'float8'; expected one of 'float32', 'bfloat16'"),
        ("training.warmup_steps", 6, "warmup_steps is 6; expected fewer than the 6"),
    ],
)
def test_nothing_is_written_for_a_run_that_cannot_begin(text, tmp_path, key, value, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values(text, tmp_path, **{key.replace(".", "__"): value})), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    result = run(path)
    assert result.exit_code == 1
    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@needs_backend
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jsonl", json.dumps({"text": TEXT}) + "\n{bad}\n", r"text\.jsonl, line 2: not valid JSON"),
        (
            "text.jsonl",
            json.dumps({"body": TEXT}) + "\n",
            "expected an object with text under 'text', found 'body'",
        ),
        ("text.jsonl", json.dumps({"text": TEXT}) + "\n", "validation data: the texts are empty"),
        ("text.jsonl", "\n" * 99, "train data: the texts are empty"),
        ("text.txt", "\ud800" * 99, "expected UTF-8 text"),
        ("text.txt", "brown fox jumps so", "the text has 17 tokens; expected at least 18 for rows of length 17"),
    ],
)
def test_bad_text_leaves_nothing(tmp_path, name, content, message):
    """Neither a folder that was not there, nor those above it; what was there before stays."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    flags = ["--tokenizer", "bytes", "--length", 17, "--steps", 1, "-b", BACKEND]
    if "17 tokens" in message:
        flags += ["-s", "data.validation_fraction=0.01"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path / "runs" / "deep" / "run", tmp_path / "there"):
        result = run("--text", path, "--run", folder, *flags)
        assert result.exit_code == 1
        assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
        assert sorted(tmp_path.rglob("*")) == before


@needs_backend
def test_a_run_into_a_file_is_refused_before_anything_is_read(text, tmp_path):
    result = run("--text", text, "--run", text, "--dry-run", "-b", BACKEND)
    assert result.exit_code == 1
    assert "expected a folder to write to, found a file" in result.stderr


@needs_backend
def test_a_dry_run_writes_nothing(text, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / "run"
    result = run("--text", text, "--run", path, "--steps", 7, "-s", "training.clip_norm=0.5", "--dry-run")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["training"]["steps"] == 7
    assert shown["training"]["clip_norm"] == 0.5
    assert "nothing was run" in result.stderr
    assert "parameters" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


# --- whole runs --------------------------------------------------------------------------------------------------


@needs_backend
def test_a_run_from_flags_and_from_its_own_recipe(text, tmp_path):
    path, folder = tmp_path / "recipe.json", tmp_path / "run"
    path.write_text(json.dumps(values(text, tmp_path)), encoding="utf-8")
    result = run(path, "--seed", 3, "--quiet")
    assert result.exit_code == 0, result.stderr
    model = mambax.load(folder / "model", backend="numpy")
    assert model.config.vocab_size == 256
    assert model.tokenizer.encode("the") == list(b"the")
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "nats per character" in card
    assert "text.txt" in card
    again = run(folder / "recipe.json", "--run", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    losses = [[r["loss"] for r in read_log(f) if "loss" in r] for f in (folder, tmp_path / "again")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    refused = run(path)
    assert refused.exit_code == 1
    assert "has a run already; resume it" in refused.stderr
    assert run("--run", folder, "--resume", "-s", "training.seed=4").exit_code == 1


@needs_backend
@pytest.mark.parametrize("arrangement", ["windows", "documents", "reading"])
@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
def test_documents_in_json_lines(tmp_path, arrangement, tokenizer):
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({"body": f"{i} is a number. " * (1 + i % 3)}) for i in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    options = {"field": "body", "separate": "true", "arrangement": arrangement, "tokenizer": tokenizer,
               "validation_fraction": 0.3, "vocab_size": 270, "length": 12}  # fmt: skip
    flags = [part for key, value in options.items() for part in ("-s", f"data.{key}={value}")]
    small = ["--steps", 2, "--d-model", 8, "--n-layer", 1, "--batch-size", 2, "-b", BACKEND]
    result = run("--text", path, "--run", tmp_path / "run", *flags, *small)
    assert result.exit_code == 0, result.stderr
    model = mambax.load(tmp_path / "run" / "model", backend="numpy")
    assert model.config.eos_token_id == model.tokenizer.eos_token_ids[0]


@needs_backend
def test_training_a_model_further(text, tmp_path):
    first = values(text, tmp_path)
    setup.build(setup.check(parse(first, "first"))).train()
    more = values(text, tmp_path, run=str(tmp_path / "more"), model={"pretrained": str(tmp_path / "run" / "model")})
    trainer = setup.build(setup.check(parse(more, "more")))
    before = mambax.load(tmp_path / "run" / "model", backend=BACKEND)
    nn = before.nn
    for name, array in nn.parameters(before).items():
        assert (nn.to_numpy(array) == nn.to_numpy(nn.parameters(trainer.model)[name])).all()
    assert trainer.train().step == 6


@needs_backend
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_and_resume_at_the_command_line(text, tmp_path):
    made = values(text, tmp_path, training__steps=10**6, training__save_every=0, training__eval_every=0)
    made["training"]["schedule"] = "constant"
    path, folder = tmp_path / "recipe.json", tmp_path / "run"
    path.write_text(json.dumps(made), encoding="utf-8")
    command = [sys.executable, "-m", "mambax.cli", "train", str(path)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert child.stderr is not None
    seen = ""
    while "step 3/" not in seen:
        line = child.stderr.readline()
        assert line, seen
        seen += line
    os.kill(child.pid, signal.SIGINT)
    rest = child.communicate(timeout=60)[1]
    assert child.returncode == 130, rest
    assert f"go on with: mambax train --run {folder} --resume" in rest
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) >= 3


@needs_backend
def test_the_recipe_is_that_of_the_run_that_began_last(text, tmp_path):
    """One that ended before its first checkpoint begins anew, with what is now said."""
    folder = tmp_path / "run"
    setup.build(setup.check(parse(values(text, tmp_path, training__steps=5), "here")))
    setup.build(setup.check(parse(values(text, tmp_path), "here"))).train()
    assert read_file(folder / "recipe.json")["training"]["steps"] == 6
    assert run("--run", folder, "--resume").exit_code == 0


@needs_backend
def test_a_run_goes_on_with_the_text_that_it_began_with(text, tmp_path):
    folder = tmp_path / "run"
    recipe = parse(values(text, tmp_path), "here")
    setup.build(setup.check(recipe)).train()
    kept, content = text.read_bytes(), (folder / "data" / "train" / "tokens.bin").read_bytes()
    os.utime(text, (1, 1))
    assert run("--run", folder, "--resume").exit_code == 0
    for changed in (b"another " + kept, kept + b"!"):
        text.write_bytes(changed)
        refused = run("--run", folder, "--resume")
        assert refused.exit_code == 1
        assert "the text now gives other ones" in refused.stderr
        assert (folder / "data" / "train" / "tokens.bin").read_bytes() == content
        assert not list(folder.glob(".data*"))
    text.write_bytes(kept)
    assert run("--run", folder, "--resume").exit_code == 0


@needs_backend
def test_tokens_are_made_again_when_the_text_has_changed(text, tmp_path):
    recipe = parse(values(text, tmp_path), "here")
    folder = tmp_path / "run" / "data"
    setup.build(setup.check(recipe))
    before = (folder / "train" / "tokens.bin").stat().st_mtime_ns
    setup.build(setup.check(recipe))
    assert (folder / "train" / "tokens.bin").stat().st_mtime_ns == before
    text.write_text("other " * 100, encoding="utf-8")
    data: Any = setup.build(setup.check(recipe)).data
    assert data.dataset.tokens[:6].tobytes() == b"o\0t\0h\0e\0r\0 \0"
