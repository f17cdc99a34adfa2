"""``mambax info`` of every family: what it says of the state and of memory is what a model takes."""

from __future__ import annotations

from pathlib import Path

import family_cases
import pytest
from harness import run, token_ids
from typer.testing import CliRunner

import mambax
from mambax.checkpoint.json_files import read_object
from mambax.checkpoint.layouts import read_config
from mambax.cli.app import app
from mambax.cli.info import kv_bytes, state_bytes


@pytest.mark.parametrize("case", sorted(family_cases.CASES))
def test_the_state_grows_as_it_says(case, tmp_path):
    family_cases.write(case, tmp_path)
    raw = read_object(tmp_path / "config.json")
    described = read_config(raw, case)
    for dtype in ("float32", "bfloat16"):
        model = mambax.load(tmp_path, backend="numpy", dtype=dtype)
        sizes = [model.init_state(1).get_cache_info().bytes]
        state = None
        for length in (5, 12):
            state = run(model, token_ids(1, length, family_cases.VOCABULARY), state)[1]
            sizes.append(state.get_cache_info().bytes)
        assert sizes[0] == state_bytes(described, dtype)
        growth = kv_bytes(described, dtype)
        assert sizes == [sizes[0], sizes[0] + 5 * growth, sizes[0] + 17 * growth]
        assert (growth > 0) == any("key_state" in name for name in state.arrays())


def rows_of(case: str, folder: Path) -> dict[str, str]:
    family_cases.write(case, folder)
    result = CliRunner().invoke(app, ["info", str(folder)])
    assert result.exit_code == 0, result.output
    return {
        label.strip(): value.strip()
        for label, _, value in (line.partition("  ") for line in result.output.splitlines())
    }


def test_options_inside_options_have_rows_of_their_own(tmp_path):
    rows = rows_of("nemotron_h-experts-groups-latent", tmp_path)
    assert rows["mlp.sigmoid_moe.d_expert"] == "20"
    assert rows["mlp.sigmoid_moe.normalised"] == "False"
    assert "mlp.sigmoid_moe" not in rows
    assert not any(value.endswith("...") for label, value in rows.items() if label.startswith("mlp"))


def test_memory_of_a_hybrid_grows_and_that_of_a_pure_model_does_not(tmp_path):
    rows = rows_of("bamba", tmp_path / "hybrid")
    assert rows["family"] == "Bamba"
    assert rows["memory to run, bfloat16"].endswith(f"and {rows['KV cache per token, bfloat16']} for each token")
    rows = rows_of("mamba2", tmp_path / "pure")
    assert rows["KV cache per token, float32"] == "0 B"
    assert "for each token" not in rows["memory to run, float32"]
