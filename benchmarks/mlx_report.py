"""The results of the MLX benchmark as Markdown, held against what mambax sets out to reach there.

``python -m benchmarks.mlx_report [STEM]`` writes the tables again from ``benchmarks/results/STEM.json``, and those
of "mlx", which it is unless named, into the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.goals import Goal
from benchmarks.harness import Case, Entry
from benchmarks.report import BEGIN, END, RESULTS, duration, goals_table, provenance, stem_of
from benchmarks.results import Part, load

PAGE = RESULTS.parent.parent / "docs" / "mlx-benchmarks.md"
STEM = "mlx"


def goals(parts: dict[str, Part]) -> list[Goal]:
    """Every goal that the parts say something about. The figures are ratios within one part."""
    found: list[Goal] = []
    for name, part in parts.items():
        for case in part.cases:
            found += _goals_of_case(name, case, parts)
    return [*found, *_flatness(parts)]


def _goals_of_case(name: str, case: Case, parts: dict[str, Part]) -> Iterator[Goal]:
    us, them = _ours(case), _theirs(case)
    faster = them.median / us.median if us and them and us.median and them.median else None
    kind, length = case.job["kind"], case.job.get("length")
    if kind == "forward" and length == 512:
        yield Goal("scan of 512 steps, times as fast as mlx-lm's loop", faster, (">=", 20.0))
    if name == "prefill float32" and length == 512:
        about = "prefill of 512, times as fast as mlx-lm"
        yield Goal(f"{about} (the bound: mlx-lm without its loop)", faster, (">=", _without_loop(case, parts)))
    if name in ("decode float32", "decode 4 bits"):
        yield Goal(f"{name}, times as fast as mlx-lm", faster, (">=", 1.0))


def _without_loop(case: Case, parts: dict[str, Part]) -> float:
    """How many times as fast mlx-lm's prefill would be if its loop over tokens took no time; 1 where unknown."""
    loops = [c for c in parts["scan"].cases if c.job["length"] == case.job["length"]] if "scan" in parts else []
    loop, whole = (_theirs(loops[0]) if loops else None), _theirs(case)
    if loop is None or whole is None or not loop.median or not whole.median:
        return 1.0
    share = loop.median * parts["prefill float32"].shape["n_layer"] / (whole.median * case.job["length"])
    return 1 / (1 - min(share, 0.99))


def _flatness(parts: dict[str, Part]) -> Iterator[Goal]:
    """Memory and graph of the longest prompt, of those of the shortest of at least a thousand tokens."""
    cases = [case for case in parts["memory"].cases if case.job["length"] >= 1000] if "memory" in parts else []
    ends = [entry for entry in (_ours(case) for case in cases) if entry]
    if len(cases) < 2 or len(ends) != len(cases):
        return
    between = f"from {cases[0].job['length']:,} to {cases[-1].job['length']:,} tokens"
    for figure, what in (("beyond", "memory of a prefill"), ("graph", "graph of a prefill")):
        first, last = (entry.figures.get(figure) for entry in (ends[0], ends[-1]))
        yield Goal(f"{what}, {between}, times", last / first if first and last else None, ("<=", 1.2))


def _ours(case: Case) -> Entry | None:
    return next((e for e in case.entries if e.label.startswith("mambax") and e.median), None)


def _theirs(case: Case) -> Entry | None:
    return next((e for e in case.entries if e.label.startswith("mlx-lm") and e.median), None)


def title(case: Case) -> str:
    """A heading: what, of how many tokens, in which precision."""
    job = case.job
    tokens = f"{job['length'] if 'length' in job else job['steps']:,} tokens"
    what = {
        "forward": "selective scan, forward",
        "backward": "selective scan, with gradients",
        "long": "a long prompt",
    }.get(job["kind"], job["kind"])
    return f"{what}, {tokens}, {job['precision']}" if "precision" in job else f"{what}, {tokens}"


def case_table(case: Case) -> list[str]:
    """A row for each contender; time for one token, or for one training step or scan."""
    job = case.job
    unit = {"training": "step", "forward": "scan", "backward": "scan"}.get(job["kind"], "token")
    figure = {"long": "beyond", "forward": "error", "backward": "gradient_error"}.get(job["kind"], "mlx_peak")
    names = {
        "beyond": "MLX beyond the weights, MB | graph",
        "error": "error",
        "gradient_error": "error of du",
        "mlx_peak": "MLX peak, MB",
    }
    lines = [f"#### {title(case)}", "", f"| | median per {unit} | least | {names[figure]} |"]
    lines.append("| --- | ---: | ---: | ---: |" + (" ---: |" if figure == "beyond" else ""))
    for entry in case.entries:
        if entry.status != "ok":
            reason = entry.reason.strip().splitlines()[-1].replace("|", "\\|") if entry.reason else ""
            lines.append(f"| {entry.label} | {entry.status}: {reason} | | |" + (" |" if figure == "beyond" else ""))
            continue
        value = entry.figures.get(figure)
        shown = "" if value is None else f"{value:.1e}" if "error" in figure else f"{value / 1e6:,.1f}"
        if figure == "beyond":
            graph = entry.figures.get("graph")
            shown += " | " if graph is None else f" | {graph:,.0f}"
        lines.append(f"| {entry.label} | {duration(entry.median)} | {duration(entry.seconds['min'])} | {shown} |")
    return [*lines, ""]


def tables(parts: dict[str, Part]) -> list[str]:
    """The goals, the machine and the versions, and every part with its command."""
    last = max(parts.values(), key=lambda part: part.date)
    about = "; ".join(f"{key}: {value}" for key, value in last.machine.items() if key.startswith("mlx "))
    lines = [*goals_table(goals(parts)), "", f"The last part: {provenance(last)}", "", f"{about}.", ""]
    for name, part in parts.items():
        lines += [f"### {name[0].upper()}{name[1:]}", "", f"`{part.command}`, {part.date}", ""]
        for case in part.cases:
            lines += case_table(case)
    return lines


def write(parts: dict[str, Part], folder: Path, stem: str) -> list[Path]:
    """Write the Markdown beside the JSON."""
    page = folder / f"{stem}.md"
    text = "\n".join(
        ["# MLX benchmarks", "", "Medians; written by `benchmarks/mlx_report.py`.", "", *tables(parts)]
    )
    page.write_text(text, encoding="utf-8", newline="\n")
    return [page]


def update_page(parts: dict[str, Part], page: Path = PAGE) -> None:
    """Put the tables between the marks of the documentation's page.

    Raises:
        ValueError: when the page has lost its marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}; put them where the results belong")
    lines = "\n".join(tables(parts))
    page.write_text(f"{before}{begin}\n{lines}{end}{after}", encoding="utf-8", newline="\n")


def main() -> None:
    """Write everything again from the JSON."""
    stem = stem_of("python -m benchmarks.mlx_report", "Write the tables again from the JSON.", STEM)
    parts = load(RESULTS / f"{stem}.json")
    if not parts:
        raise SystemExit(f"{RESULTS / stem}.json does not exist; run python -m benchmarks.mlx first")
    print(*write(parts, RESULTS, stem))
    if stem == STEM:
        update_page(parts)
        print(PAGE)


if __name__ == "__main__":
    main()
