"""The commands that write the pages of the benchmarks say how they are used, and refuse what is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("name", "stem"), [("report", "cpu"), ("mlx_report", "mlx")])
def test_help_and_unknown_results(name: str, stem: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)

    shown = run("--help")
    assert shown.returncode == 0, shown.stderr
    assert f"usage: python -m benchmarks.{name}" in shown.stdout
    assert f"{stem} unless named" in re.sub(r"\s+", " ", shown.stdout)
    refused = run("no-such-results")
    assert refused.returncode == 1
    assert re.search(r"no-such-results\.json does not exist; run python -m benchmarks\.", refused.stderr)
