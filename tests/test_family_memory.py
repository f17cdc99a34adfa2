"""The benchmark of the memory of every family: its shapes can be built, and a run leaves its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mambax.families import FAMILIES

pytest.importorskip("psutil")
pytest.importorskip("benchmarks", reason="needs the source tree")

from benchmarks import families, family_shapes, results
from benchmarks.harness import Case, Entry, summary


def test_every_family_has_a_shape() -> None:
    found = {name: family_shapes.config_of(shape) for name, shape in family_shapes.FAMILIES.items()}
    written = {name for name, family in FAMILIES.items() if not family.written_as}
    assert {config.family for config in found.values()} == written
    for name, shape in family_shapes.FAMILIES.items():
        kinds = set(found[name].layer_kinds)
        assert shape.flat == (kinds <= {"mamba", "mamba2"} and found[name].shared is None), name
    assert not found["bidirectional"].causal


def test_a_dry_run_writes_its_results(tmp_path: Path) -> None:
    arguments = [
        "--dry-run",
        "--only",
        "mamba2",
        "--backends",
        "numpy",
        "--threads",
        "1",
        "--results",
        str(tmp_path),
    ]
    assert families.main(arguments) == 0
    part = results.load(tmp_path / "memory.json")["mamba2"]
    (entry,) = part.cases[0].entries
    assert entry.status == "ok", entry.reason
    assert 0 < entry.figures["weights"] < entry.figures["loading"]
    assert entry.figures["state_24"] == entry.figures["state_40"] > 0
    page = (tmp_path / "memory.md").read_text(encoding="utf-8")
    assert "| mamba2 | numpy |" in page
    assert "python -m benchmarks.families --threads 1 --backends numpy --only mamba2 --dry-run" in page
    assert str(tmp_path) not in page


def part_of(name: str, flat: bool, last: float) -> results.Part:
    """Results of made-up figures."""
    figures = {"before": 3e6, "weights": 1e6, "loading": 2e6, "prompt_8": 4e6, "prompt_16": last, "state_16": 5e5}
    entries = [
        Entry("mambax numpy", "ok", "", summary([1.0]), figures),
        Entry("mambax torch", "skipped", "no | torch"),
    ]
    machine: dict[str, Any] = {"cpu": "none", "processors": 2, "memory_bytes": 1 << 30, "vector": "", "system": ""}
    cases = [Case(name, {"kind": "memory", "prompts": [[8, 2], [16, 1]]}, entries)]
    return results.Part(
        name, "full", "command", "today", machine, {}, 2, {"of": name, "flat": flat}, {}, cases, 1.0
    )


def test_what_grows_where_it_should_not_stands_out() -> None:
    parts = {"a": part_of("a", True, 5e6), "b": part_of("b", True, 4e6), "c": part_of("c", False, 6e6)}
    lines = families.table(parts)
    assert "| a | numpy | 3 | 1 | 2 | 4 | 5 | **1.250** | 0.5 |" in lines
    assert "| b | numpy | 3 | 1 | 2 | 4 | 4 | 1.000 | 0.5 |" in lines
    assert "| c | numpy | 3 | 1 | 2 | 4 | 6 | 1.500 | 0.5 |" in lines
    assert any("skipped: no \\| torch" in line and line.count("|") == lines[0].count("|") + 1 for line in lines)


def test_the_results_are_put_into_the_documentation(tmp_path: Path) -> None:
    page, parts = tmp_path / "page.md", {"a": part_of("a", True, 5e6)}
    text = families.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    families.update_page(parts, page)
    families.update_page(parts, page)
    found = page.read_text(encoding="utf-8")
    assert found.count("| a | numpy |") == 1
    assert found.partition(families.BEGIN)[0] == text.partition(families.BEGIN)[0]
    assert found.partition(families.END)[2] == text.partition(families.END)[2]
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the lines"):
        families.update_page(parts, page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mambo"], "--only has 'mambo'"),
        (["--backends", "jax"], "--backends has 'jax'"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_bad_arguments_run_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        families.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
