"""The paper estimate of the GPU kernels: one source for documentation and command, and figures that hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambax.cli import bench

pytest.importorskip("mlx.core")

from mambax_mlx.kernels import estimate, measured, ssd_plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu-kernels.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is in the source tree")
def test_the_documentation_has_the_estimate():
    """Written again with ``python tests/test_mlx_estimate.py``."""
    assert written(PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8")


def written(text: str) -> str:
    """A page with the estimate between its marks."""
    before, begin, rest = text.partition("<!-- estimate: begin -->\n")
    _, end, after = rest.partition("<!-- estimate: end -->")
    assert begin
    assert end
    return before + begin + estimate.markdown() + end + after


def test_the_command_prints_the_estimate_beside_what_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(measured, "LENGTH", 3)
    monkeypatch.setattr(measured, "ROWS", 2)
    found = measured.rates
    monkeypatch.setattr(measured, "rates", lambda: {name: 1e9 * rate for name, rate in found(seconds=0.0).items()})
    monkeypatch.setattr(bench, "SHAPE", {"d_model": 32, "n_layer": 1, "vocab_size": 96})
    bench.bench(None, ["mlx"], 3, 2, 1, {"device": None})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "bytes",
        "special",
        "other",
        *(word for chip in estimate.CHIPS for word in chip.name.split()),
        "here",
    ] in shown
    for row in estimate.rows()[1:]:
        words = " ".join(row).split()
        (line,) = (line for line in shown if line[: len(words)] == words)
        assert float(line[-1]) > 0
        assert len(line) == len(words) + 1


def test_every_kernel_of_the_estimate_is_measured():
    assert set(measured._works()) == {kernel.name for kernel in estimate.kernels()}


def test_the_figures_of_the_estimate_are_those_of_the_kernels():
    """Bytes counted by hand from the kernels' inputs and outputs, at other sizes than those of the table."""
    table = {kernel.name: kernel for kernel in estimate.kernels()}
    assert table["scan, whole rows"].bytes == 8  # u, delta, z and y
    assert table["scan, by chunks"].bytes == 8 + 4 + 4 * 4 * 16 / 64  # u and delta again, four accesses to a state
    assert table["scan, one token"].bytes == 8 + 4 * 16 * 3  # A, and the state both ways
    assert table["ssd, whole rows"].bytes == 4
    assert table["ssd, by chunks"].bytes == 6 + 4 * 4 * 128 / ssd_plan.CHUNK
    assert table["ssd, one token"].bytes == 4 + 4 * 128 * 2
    slow, fast = estimate.expected(table["scan, by chunks"], estimate.CHIPS[0])
    memory, arithmetic = 100e9 / 16, 128 * 10 * 1.4e9 / (4 * 40 + 224)
    assert fast == pytest.approx(arithmetic)
    assert slow == pytest.approx(memory * arithmetic / (memory + arithmetic))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
