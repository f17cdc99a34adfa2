"""The README is true: every Python block runs, in order, and every command exists.

The blocks run as they are written, in an empty folder beside a copy of ``models``. One thing is replaced: there is
no network, so ``huggingface_hub.hf_hub_download`` hands out files of a tiny random checkpoint under the repository
names that the README uses.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

import mambax
from mambax.registry import is_installed

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tinyshakespeare"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub with the repositories of the README: a model in the original layout, and the tokenizer of its kind."""
    import torch

    folder = tmp_path / "hub"
    repo = folder / "state-spaces" / "mamba-130m"
    repo.mkdir(parents=True)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (repo / "config.json").write_text(json.dumps(config), encoding="utf-8")
    like = mambax.from_config(mambax.MambaLMConfig(d_model=16, n_layer=2, vocab_size=50280), backend="torch")
    weights = {name.replace("embeddings", "embedding"): value for name, value in like.state_dict().items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, repo / "pytorch_model.bin")
    shutil.copytree(MODEL, folder / "EleutherAI" / "gpt-neox-20b")

    def download(repo_id: str, filename: str, **options: Any) -> str:
        path = folder / repo_id / filename
        if not path.is_file():
            raise errors.EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


@pytest.mark.skipif(not (is_installed("torch") and is_installed("mlx")), reason="the README uses torch and mlx")
def test_python_blocks_run_in_order(
    hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    printed = []
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
        printed.append(capsys.readouterr().out)
    on_torch, on_mlx = (text.rpartition("\n<class")[0] for text in printed[:2])
    assert on_torch == on_mlx
    assert len(on_torch) > 50
    assert (tmp_path / "romeo.safetensors").is_file()
    assert json.loads((tmp_path / "to-be" / "config.json").read_text(encoding="utf-8"))["model_type"] == "mamba"
    losses = [float(text) for text in printed if re.fullmatch(r"\d+\.\d\d\n", text)]
    assert len(losses) == 2
    assert max(losses) < 3.0  # of 5.5 at the start


def test_the_two_versions_differ_in_one_word() -> None:
    on_torch, on_mlx = blocks("python")[:2]
    assert on_torch.replace('"torch"', '"mlx"') == on_mlx
    assert sum(1 for line in on_torch.splitlines() if line) == 8


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def test_commands_are_of_known_kinds() -> None:
    assert {command[0] for command in commands()} == {"make", "pip", "mambax"}


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "make"], ids=" ".join)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_targets_exist(command: list[str]) -> None:
    subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "pip"], ids=" ".join)
def test_extras_exist(command: list[str]) -> None:
    match = re.fullmatch(r"\.(?:\[(\w+)\])?", command[-1])
    assert match is not None
    extras = importlib.metadata.metadata("mambax").get_all("Provides-Extra") or []
    assert match[1] is None or match[1] in extras


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "mambax"], ids=" ".join)
def test_mambax_commands_exist(command: list[str]) -> None:
    script = shutil.which("mambax", path=sysconfig.get_path("scripts"))
    assert script is not None
    wide = os.environ | {"COLUMNS": "200"}  # so that no option is broken over two lines
    run = subprocess.run([script, command[1], "--help"], capture_output=True, text=True, timeout=60, env=wide)
    assert run.returncode == 0, run.stderr
    for option in command:
        assert not option.startswith("--") or re.search(rf"{option}\b", run.stdout), option
