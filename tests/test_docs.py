"""The documentation: links lead somewhere, figures are drawn from the code, code blocks run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mambax import scan

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FIGURES = ROOT / "docs" / "figures"

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:mambax|backends|tests|examples|docs|models)/[\w./-]+)`")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


in_source_tree = pytest.mark.skipif(not (ROOT / "mambax").is_dir(), reason="the pages link to the source tree")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def broken(text: str, folder: Path) -> list[str]:
    """Links, relative to the folder, and paths in backticks that lead nowhere."""
    links = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    wrong = [target for target in links if target and not (folder / target).exists()]
    return wrong + [path for path in PATH.findall(text) if not (ROOT / path).exists()]


@pytest.fixture(scope="module")
def scan_figures() -> Iterator[ModuleType]:
    """The script that draws the figures, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FIGURES)
        yield importlib.import_module("scan_figures")


def test_there_are_pages() -> None:
    names = {name_of(page) for page in PAGES}
    assert {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/parallel-scan.md",
    } <= names


@in_source_tree
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    assert broken(page.read_text(encoding="utf-8"), page.parent) == []


@in_source_tree
def test_broken_links_are_seen() -> None:
    text = "[a](docs/nowhere.md), [b](https://example.org), [c](LICENSE#x), `mambax/nothing.py`, `mambax/scan.py`"
    assert broken(text, ROOT) == ["docs/nowhere.md", "mambax/nothing.py"]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent.name == "decisions" and p.name != "README.md"], ids=name_of
)
def test_decisions_are_dated_and_listed(page: Path) -> None:
    title, _, date, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert page.name.startswith(date + "-")
    assert f"[{title[2:]}]({page.name})" in (page.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "README.md"], ids=name_of)
def test_code_blocks_run(page: Path) -> None:
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, name_of(page), "exec"), names)


def test_figures_are_drawn(scan_figures: ModuleType, tmp_path: Path) -> None:
    drawn = scan_figures.draw(tmp_path, lengths=[8, 32], steps=[0.01, 1.0])
    assert all(path.stat().st_size > 10_000 for path in drawn)
    kept = {path.name: path.stat().st_size for path in FIGURES.glob("*.png")}
    assert sorted(kept) == sorted(path.name for path in drawn)
    assert max(kept.values()) < 200_000


def test_figures_show_what_the_scan_does(scan_figures: ModuleType) -> None:
    ledger, states = scan_figures.trace(scan.pscan, 8)
    assert scan_figures.levels(ledger.joins[1:]) == [
        [(0, 1), (2, 3), (4, 5), (6, 7)],
        [(1, 3), (5, 7)],
        [(3, 7)],
        [(3, 5)],
        [(1, 2), (3, 4), (5, 6)],
    ]
    assert [(state.first, state.last) for state in states] == [(-1, t) for t in range(8)]


def test_costs_in_the_text_are_those_counted(scan_figures: ModuleType) -> None:
    text = (ROOT / "docs" / "parallel-scan.md").read_text(encoding="utf-8")
    for label, recurrence in (
        ("`sequential`", scan.sequential),
        ("`pscan`", scan.pscan),
        ("doubling (Hillis and Steele 1986)", scan_figures.doubling),
    ):
        work, depth = scan_figures.cost(recurrence, 1024)
        assert f"| {label} | {work:,} | {depth:,} |" in text


def test_errors_are_as_the_text_says(scan_figures: ModuleType) -> None:
    short, long, coarse = (scan_figures.errors(*at) for at in ((64, 0.05), (2048, 0.05), (64, 5.0)))
    for name in ("sequential", "pscan"):
        assert long[name] < 2 * short[name] < 1e-6
        assert coarse[name] < short[name]
    assert long["logcumsumexp"] < 3 * short["logcumsumexp"]
    assert long["logcumsumexp, one chunk"] > 10 * short["logcumsumexp, one chunk"]
    assert coarse["logcumsumexp"] > 10 * short["logcumsumexp"]


def test_doubling_is_a_scan(scan_figures: ModuleType) -> None:
    log_a, b, h = scan_figures.inputs(37, 0.1)
    nn = scan_figures.mambax.get_backend("numpy")
    want = scan.sequential(nn, log_a, b, h)
    got = scan_figures.doubling(nn, nn.exp(log_a), b, h)
    assert abs(got - want).max() < 1e-12
