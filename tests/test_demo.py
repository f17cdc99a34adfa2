"""The demo: streams on each backend, and notices when they differ."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mambax
from mambax.registry import is_installed

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
INSTALLED = [name for name in ("numpy", "torch", "mlx") if is_installed(name)]


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("demo")


def test_every_backend_gives_the_same_text(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([*INSTALLED, "--tokens", "60"]) == 0
    out = capsys.readouterr().out
    assert out.count("60 tokens") == len(INSTALLED)
    assert len(INSTALLED) == 1 or f"same text on {len(INSTALLED)} backends" in out


@pytest.mark.skipif(len(INSTALLED) < 2, reason="needs two backends")
def test_a_difference_is_an_error(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = mambax.load

    def load_with_a_fault(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        if model.nn.name != "numpy":
            path = "backbone.norm_f.weight"
            model.nn.set_parameters(model, {path: 0.5 * model.nn.parameters(model)[path]})
        return model

    monkeypatch.setattr(mambax, "load", load_with_a_fault)
    assert demo.main([*INSTALLED[:2], "--tokens", "60"]) == 1
    captured = capsys.readouterr()
    assert f"{INSTALLED[1]} differs from numpy after" in captured.err
    assert "same text" not in captured.out


def test_the_first_difference_is_shown(demo: ModuleType) -> None:
    assert demo.disagreement({"numpy": "abc", "torch": "abc"}) == ""
    assert "torch differs from numpy after 1 characters: 'xc', not 'bc'" in demo.disagreement(
        {"numpy": "abc", "torch": "axc"}
    )
    assert "after 2 characters: '', not 'c'" in demo.disagreement({"numpy": "abc", "torch": "ab"})
