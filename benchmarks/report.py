"""Results as Markdown and plots, and in the documentation.

``python -m benchmarks.report [STEM]`` makes them again from the JSON. STEM is a file of ``benchmarks/results``
without its ending: ``cpu`` unless named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.goals import Goal, goals
from benchmarks.harness import Case, Entry
from benchmarks.results import Part, best, bound, load, ours

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
STEM = "cpu"


def duration(seconds: float | None) -> str:
    """A time with three digits and its unit."""
    if seconds is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e9:.3g} ns"


def memory(value: float | None) -> str:
    """A number of bytes in MB."""
    return "" if value is None else f"{value / 1e6:,.0f}"


def goals_table(found: list[Goal]) -> list[str]:
    """The goals and what was found."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    lines = ["| goal | found | should be | reached |", "| --- | ---: | ---: | --- |"]
    for goal in found:
        sign = {">=": "at least", "<=": "at most"}[goal.bound[0]]
        figure = "" if goal.found is None else f"{goal.found:.3g}"
        lines.append(f"| {goal.about} | {figure} | {sign} {goal.bound[1]:.3g} | {words[goal.reached]} |")
    return lines


def title(case: Case) -> str:
    """A heading for a case: its name and sizes."""
    job = case.job
    named = {"length": "L", "channels": "D", "states": "N", "batch": "batch", "steps": "steps"}
    sizes = [f"{short} {job[key]}" for key, short in named.items() if key in job]
    if job["kind"] == "decode":
        sizes = [f"batch {job['batch']}"]
    kind = {"backward": "forward and backward"}.get(job["kind"], job["kind"])
    words = [
        case.name,
        *([kind] if kind not in case.name else []),
        *([job["precision"]] if "precision" in job else []),
    ]
    return ", ".join([*words, *sizes])


def case_table(case: Case, part: Part) -> list[str]:
    """One case: a row for each contender."""
    first = ours(case) or best(case.entries)
    per_second = "tok/s" if case.job["kind"] in ("prefill", "decode") else "per s"
    lines = [
        f"| | median | quartiles | least | {per_second} | times the best of mambax | of the limit "
        "| working MB | peak MB | error | first run |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in case.entries:
        if entry.median is None:
            reason = entry.reason.replace("|", "\\|")
            lines.append(f"| {entry.label} | {entry.status}: {reason} | | | | | | | | | |")
            continue
        lines.append(_row(case, part, entry, first))
    return lines


def _row(case: Case, part: Part, entry: Entry, first: Entry | None) -> str:
    s, f = entry.seconds, entry.figures
    least = bound(case, entry, part)
    ratio = entry.median / first.median if entry.median and first and first.median else None
    errors = [f[key] for key in ("error", "gradient_error") if key in f]
    cells = [
        entry.label,
        duration(entry.median),
        f"{duration(s['q1'])} to {duration(s['q3'])}",
        duration(s["min"]),
        f"{case.job.get('batch', 1) / s['median']:,.4g}"
        if case.job["kind"] == "decode"
        else f"{1 / s['median']:,.4g}",
        "" if ratio is None else f"{ratio:.2f}",
        "" if least is None or not entry.median else f"{100 * least / entry.median:.0f} %",
        memory(f.get("working")),
        memory(f.get("peak")),
        ", ".join(f"{error:.1e}" for error in errors),
        duration(f.get("first") or None),
    ]
    return "| " + " | ".join(cells) + " |"


def provenance(part: Part) -> str:
    """Where, when and with what a part was measured."""
    m = part.machine
    load = "" if m.get("load_before") is None else f", load before {m['load_before']:.1f}"
    machine = (
        f"{m['cpu']}, {m['processors']} processors, {part.threads} threads, {m['memory_bytes'] / 2**30:.0f} GiB"
    )
    versions = ", ".join(f"{name} {version}" for name, version in part.versions.items())
    return (
        f"`{part.command}` on {part.date}: {machine}, {m['vector']}, {m['system']}{load}; "
        f"{part.elapsed_s:.0f} s. {versions}."
    )


def limits_line(part: Part) -> str:
    """The limits of the run that a part belongs to."""
    words = {
        "read": "reads {:.3g} GB/s", "copy": "copies {:.3g} GB/s", "float32": "float32 products {:.3g} GFLOP/s",
        "bfloat16": "bfloat16 products {:.3g} GFLOP/s", "exponentials": "{:.3g} thousand million exponentials/s",
    }  # fmt: skip
    found = [text.format(part.limits[name] / 1e9) for name, text in words.items() if name in part.limits]
    return "Limits of the machine in that run: " + ", ".join(found) + "."


def markdown(parts: dict[str, Part], stem: str = STEM) -> str:
    """The whole report."""
    lines = ["# CPU benchmarks", "", "Medians; written by `benchmarks/report.py`, not by hand.", ""]
    found = goals(parts)
    if found:
        lines += ["## Goals", "", *goals_table(found), ""]
    for name, part in parts.items():
        lines += [f"## {name}", "", provenance(part), ""]
        if part.limits:
            lines += [limits_line(part), ""]
        for case in part.cases:
            lines += [f"### {title(case)}", "", *case_table(case, part), ""]
    for picture in pictures(stem):
        lines += [f"![{picture.stem}]({picture.name})", ""]
    return "\n".join(lines)


FIGURES = ("scan", "models")
"""The plots that :func:`benchmarks.plots.draw` makes."""


def pictures(stem: str, folder: Path = RESULTS) -> list[Path]:
    """The plots that exist for a stem."""
    return [path for name in FIGURES if (path := folder / f"{stem}-{name}.png").is_file()]


def write(parts: dict[str, Part], folder: Path, stem: str) -> list[Path]:
    """Write the Markdown and the plots beside the JSON; return their paths."""
    from benchmarks import plots

    drawn = plots.draw(parts, folder, stem)
    page = folder / f"{stem}.md"
    page.write_text(markdown(parts, stem), encoding="utf-8", newline="\n")
    return [page, *drawn]


def update_page(parts: dict[str, Part], page: Path = PAGE) -> None:
    """Put the goals, the machine and the plots between the marks of the documentation's page.

    Raises:
        ValueError: when the page has lost its marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}; put them where the results belong")
    last = max(parts.values(), key=lambda part: part.date)
    lines = [provenance(last), "", limits_line(last), "", *goals_table(goals(parts)), ""]
    lines += [f"![{picture.stem}](../benchmarks/results/{picture.name})\n" for picture in pictures(STEM)]
    lines += [f"Every case: [{STEM}.md](../benchmarks/results/{STEM}.md)."]
    page.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + after, encoding="utf-8", newline="\n")


def stem_of(program: str, about: str, default: str) -> str:
    """The results that the command line names, without the ending of their file."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    text = f"a file of benchmarks/results without its ending; {default} unless named"
    parser.add_argument("stem", nargs="?", default=default, help=text)
    return parser.parse_args().stem


def main() -> None:
    """Redraw everything from the JSON."""
    stem = stem_of("python -m benchmarks.report", "Write tables and plots again from the JSON.", STEM)
    path = RESULTS / f"{stem}.json"
    parts = load(path)
    if not parts:
        raise SystemExit(f"{path} does not exist; run python -m benchmarks.cpu first")
    for written in write(parts, RESULTS, stem):
        print(written)
    if stem == STEM:
        update_page(parts)
        print(PAGE)


if __name__ == "__main__":
    main()
