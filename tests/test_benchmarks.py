"""The benchmarks: every contender does every job, at tiny sizes; the harness survives what contenders do to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mambax_cpu.compilation import KernelFile

from mambax import MambaLMConfig, get_backend
from mambax.cli import bench
from mambax.registry import is_installed

pytest.importorskip("psutil")
pytest.importorskip("benchmarks", reason="needs the source tree")

from benchmarks import cpu, gguf_files, goals, report, results, weights
from benchmarks.contender import Spec, Unavailable
from benchmarks.contenders import scan_inputs
from benchmarks.harness import Case, Entry, Settings, compare, summary
from benchmarks.parts import PARTS, Context, Group
from benchmarks.plans import DRY_RUN, FULL
from benchmarks.processes import Failed, Process
from benchmarks.shapes import SHAPES, matrix_flops
from benchmarks.worker import Worker

NOWHERE = Path("weights")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 5e-2, "int4": 0.5}
"""Of the logits, by the precision of the weights. In int4, random weights are far off in every package."""

QUICK = Settings(threads=1, rounds=2, least=1, turn_s=0.0, pause_s=0.0)


def groups(folder: Path = NOWHERE) -> list[tuple[str, Group]]:
    """Every group of the dry run, under the name of its part."""
    context = Context(DRY_RUN, 1, folder, folder)
    return [(name, group) for name, make in PARTS.items() for group in make(context)]


def contenders() -> list[Any]:
    """(part, number of the group, label) of every contender, once for each group."""
    found = []
    for number, (part, group) in enumerate(groups()):
        kinds = {job["kind"] for job in group.jobs}
        for spec in group.specs:
            if not kinds & set(spec.kinds or kinds):
                continue
            if part != "start" or spec.label == "mambax numpy":  # each of these starts processes of its own
                found.append(pytest.param(number, spec.label, id=f"{part}-{number}-{spec.label.replace(' ', '-')}"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny shape."""
    root = tmp_path_factory.mktemp("weights")
    for shape in (DRY_RUN.model, DRY_RUN.mamba2):
        weights.write(root / shape, shape)
    path = root / DRY_RUN.model
    with contextlib.suppress(Unavailable):
        gguf_files.write(path)
    return path


@pytest.fixture
def same_device() -> Iterator[None]:
    """MLX's default device after a test is what it was before."""
    if not is_installed("mlx"):
        yield
        return
    import mlx.core as mx

    device = mx.default_device()
    yield
    mx.set_default_device(device)


@pytest.mark.parametrize("count", [0, 5, 16, 64, 1000])
def test_the_loop_that_reads_memory_adds_up_everything(count: int) -> None:
    add_up = KernelFile("benchmarks.contenders.sum_kernel").add_up
    for first in range(3):  # of a cache line, or not
        values, out = np.arange(first, first + count, dtype=np.float32), np.full(1, np.nan, np.float32)
        held = np.concatenate([np.full(first, np.nan, np.float32), values])
        add_up(held[first:], count, out)
        assert out[0] == values.sum(dtype=np.float64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("same_device")
@pytest.mark.parametrize(("number", "label"), contenders())
def test_every_contender_does_its_jobs(
    number: int, label: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # it takes long in a process that has loaded every framework
    _, group = groups(folder)[number]
    spec = next(spec for spec in group.specs if spec.label == label)
    worker = Worker()
    done = 0
    try:
        worker.open({"factory": spec.factory, "options": dict(spec.options)})
        for job in group.jobs:
            if spec.kinds and job["kind"] not in spec.kinds:
                continue
            worker.prepare({"job": json.loads(json.dumps(job))})
            samples = worker.turn({"seconds": 0.0, "most": 2})["samples"]
            check_figures(job, samples, worker.check({})["figures"])
            done += 1
    except Unavailable as reason:
        if not done:
            pytest.skip(str(reason))
    assert done


def check_figures(job: Any, samples: list[float], figures: dict[str, float]) -> None:
    """Times and memory are there, and whoever computes something computes the right thing."""
    assert samples
    assert min(samples) > 0
    assert figures["peak"] > 0
    assert figures["working"] >= 0
    if job["kind"] in ("forward", "backward"):
        assert figures["error"] < 1e-5
        assert (figures["gradient_error"] < 1e-5) if job["backward"] else "gradient_error" not in figures
    elif "error" in figures:
        assert figures["error"] < TOLERANCE[job["precision"]]
    if job["kind"] == "training":
        assert 0 < figures["first_loss"] < 100


def test_errors_of_the_scan_are_seen() -> None:
    given = scan_inputs.inputs(20, 12, 3, backward=True)
    y, du = (array[None].astype(np.float32) for array in scan_inputs.reference(given))
    assert max(scan_inputs.errors(given, y, du).values()) < 1e-7
    found = scan_inputs.errors(given, y * np.float32(1.01), np.roll(du, 1, axis=1))
    assert 0.009 < found["error"] < 0.011
    assert found["gradient_error"] > 0.1


def test_matrix_flops_are_those_of_the_weights() -> None:
    config = MambaLMConfig(**SHAPES["tiny"])
    parameters = get_backend("numpy").parameters(get_backend("numpy").MambaForCausalLM(config))
    layers = sum(array.size for name, array in parameters.items() if name.endswith("proj.weight"))
    head = parameters["backbone.embeddings.weight"].size
    assert matrix_flops(config.to_dict(), 7) == 2 * (7 * layers + head)


# --- the harness, with processes ---------------------------------------------------------------------------------

JOBS: list[dict[str, Any]] = [{"kind": "exponentials", "count": 1 << n, "size": 1 << n} for n in (15, 16)]
WELL = {"way": "numpy", "threads": 1}


def test_contenders_take_turns_and_a_crash_costs_no_other() -> None:
    specs = [
        Spec("one", "limits:Exponentials", WELL),
        Spec("crashes", "limits:Exponentials", {"way": "numpy", "threads": "many"}),
        Spec("cannot", "limits:Memory", {"way": "dot", "threads": 1}),
        Spec("two", "limits:Exponentials", WELL),
        Spec("elsewhere", "limits:Exponentials", WELL, kinds=("read",)),
    ]
    said: list[str] = []
    first, second = compare("case", specs, JOBS, QUICK, said.append)
    for case in (first, second):
        assert [entry.label for entry in case.entries] == ["one", "crashes", "cannot", "two"]
        assert [entry.status for entry in case.entries] == ["ok", "failed", "failed", "ok"]
        one = case.entries[0]
        assert one.seconds["count"] == 2
        assert one.seconds["min"] <= one.seconds["q1"] <= one.seconds["median"] <= one.seconds["max"]
        assert "TypeError" in case.entries[1].reason
        assert "KeyError" in case.entries[2].reason
        assert str(cpu.ROOT) not in case.entries[1].reason
    turns = [text.rpartition(" ")[2] for text in said if f" {JOBS[0]['count']}:" in text and "round" in text]
    assert [label for label in turns if label in ("one", "two")] == ["one", "two"] * 2


def test_what_would_take_too_long_is_not_tried() -> None:
    settings = dataclasses.replace(QUICK, call_s=1e-9)
    small, large = compare("case", [Spec("one", "limits:Exponentials", WELL)], JOBS, settings)
    assert small.entries[0].status == "ok"
    assert large.entries[0].status == "skipped"
    assert "would take about" in large.entries[0].reason


def test_what_needs_more_memory_than_there_is_is_not_tried() -> None:
    (case,) = compare("case", [Spec("one", "limits:Exponentials", WELL, needs=1 << 60)], JOBS[:1], QUICK)
    assert case.entries[0].status == "skipped"
    assert "GB are free" in case.entries[0].reason


def test_no_answer_ends_the_process() -> None:
    process = Process(Spec("one", "limits:Exponentials", WELL), 1)
    with pytest.raises(Failed, match="stopped after"):
        process.ask("open", 1e-6, factory="limits:Exponentials", options=WELL)
    with pytest.raises(Failed, match="has ended"):
        process.ask("open", 1.0, factory="limits:Exponentials", options=WELL)


# --- what becomes of the figures ---------------------------------------------------------------------------------


def entry(label: str, seconds: float, **figures: float) -> Entry:
    """A contender that took so long each time."""
    return Entry(label, "ok", "", summary([seconds] * 3), {"working": 1e6, "peak": 2e6, "error": 1e-7, **figures})


def part_of(name: str, cases: list[Case]) -> results.Part:
    """A part on a machine that reads 1 GB/s and multiplies at 1 GFLOP/s."""
    machine = {
        "cpu": "none",
        "processors": 2,
        "memory_bytes": 1 << 30,
        "vector": "",
        "system": "",
        "load_before": 0,
    }
    limits = {"read": 1e9, "copy": 1e9, "float32": 1e9, "bfloat16": 1e9, "exponentials": 1e9}
    shape = MambaLMConfig(**SHAPES["tiny"]).to_dict()
    date = "2026-01-01 00:00 UTC"
    return results.Part(name, "full", "command", date, machine, {"numpy": "1"}, 2, shape, limits, cases, 1.0)


def example() -> dict[str, results.Part]:
    """Results of made-up figures."""
    scan = {"kind": "forward", "backward": False, "length": 2048, "channels": 8, "states": 4}
    long = [{**scan, "length": length} for length in (128, 2048, 8192)]
    decode = {"kind": "decode", "batch": 1, "steps": 4, "precision": "float32"}
    skipped = Entry("mambapy pscan", "skipped", "pip install | mambapy")
    cases = [
        Case(
            "scan", scan, [entry("mambax numpy cpu", 1.0), entry("torch loop", 10.0), entry("C loop", 0.5), skipped]
        )
    ]
    cases += [Case("scan by length", job, [entry("mambax torch cpu", job["length"] * 1e-6)]) for job in long]
    written = [entry("mambax torch", 0.11, weights=1e8), entry("llama.cpp F32", 0.12, weights=1e8)]
    return {"scan": part_of("scan", cases), "decode": part_of("decode", [Case("decode", decode, written)])}


def test_goals_are_held_against_the_figures() -> None:
    found = {goal.about: goal for goal in goals.goals(example())}
    loop = found["scan, L 2048, forward: times as fast as the torch loop"]
    assert (loop.found, loop.reached) == (10.0, True)
    in_c = found["scan, L 2048, forward: times as long as the loop in C"]
    assert (in_c.found, in_c.reached) == (2.0, False)
    (linear,) = (goal for about, goal in found.items() if "L 128 to 8192" in about)
    assert linear.found == pytest.approx(1.0)
    llama = found["decode, batch 1, float32: times as fast as llama.cpp"]
    assert llama.found == pytest.approx(0.12 / 0.11)
    assert llama.reached is False
    reading = found["decode, batch 1, float32: times as long as reading the weights once"]
    assert reading.found == pytest.approx(1.1)
    assert reading.reached is True


def test_a_goal_without_figures_is_not_reached_and_not_missed() -> None:
    parts = example()
    parts["decode"].cases[0].entries.pop()
    (llama, _) = goals.goals({"decode": parts["decode"]})
    assert llama.found is None
    assert llama.reached is None


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    parts = example()
    path = tmp_path / "cpu.json"
    results.save(parts, path)
    assert results.load(path) == parts
    written = report.write(results.load(path), tmp_path, "cpu")
    assert {file.name for file in written} == {"cpu.md", "cpu-scan.png", "cpu-models.png"}
    page = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert "| mambax numpy cpu | 1 s | 1 s to 1 s | 1 s |" in page
    assert "skipped: pip install \\| mambapy" in page
    assert "**no**" in page
    assert results.load(tmp_path / "none.json") == {}
    path.write_text('{"format": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match="format 1"):
        results.load(path)


def test_results_are_put_into_the_documentation(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = report.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    report.update_page(example(), page)
    report.update_page(example(), page)
    found = page.read_text(encoding="utf-8")
    assert found.count("times as fast as the torch loop") == 1
    assert found.partition(report.BEGIN)[0] == text.partition(report.BEGIN)[0]
    assert found.partition(report.END)[2] == text.partition(report.END)[2]
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the lines"):
        report.update_page(example(), page)


def test_the_documentation_names_every_part() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    assert [name for name in PARTS if f"| `{name}` |" not in text] == []


def test_a_run_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_alone = PARTS["limits"]
    monkeypatch.setitem(PARTS, "limits", lambda context: memory_alone(context)[:1])
    arguments = ["--dry-run", "--only", "limits", "--threads", "1", "--results", str(tmp_path)]
    assert cpu.main(arguments) == 0
    part = results.load(tmp_path / "cpu-dry-run.json")["limits"]
    assert part.command == "python -m benchmarks.cpu --threads 1 --only limits --dry-run"
    assert {case.job["kind"] for case in part.cases} == {"read", "copy"}
    assert results.limits_of(part.cases).keys() == {"read", "copy"}
    assert str(tmp_path) not in (tmp_path / "cpu-dry-run.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--only", "scam"], "unknown part 'scam'"), (["--threads", "0"], "at least 1")]
)
def test_bad_arguments_run_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cpu.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_every_size_of_the_full_plan_can_be_made() -> None:
    context = Context(FULL, 2, NOWHERE, NOWHERE)
    jobs = [job for make in PARTS.values() for group in make(context) for job in group.jobs]
    assert {job["length"] for job in jobs if job["kind"] == "prefill"} == {512, 2048}
    assert max(job["length"] for job in jobs if job["kind"] == "forward") == 131072


# --- the short one for users -------------------------------------------------------------------------------------

LOADING: dict[str, Any] = {"device": None, "dtype": None, "scan": "auto", "local_files_only": False}


def test_the_short_benchmark_shows_each_backend(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.bench(str(folder / "float32"), [], 5, 3, 1, LOADING)
    shown = capsys.readouterr().out
    assert "reads 5" in shown
    assert [name for name in ("numpy", "torch", "mlx") if (name in shown) != is_installed(name)] == []
    assert shown.count("tokens/s") == 2 * sum(map(is_installed, ("numpy", "torch", "mlx")))


def test_the_short_benchmark_needs_no_model(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "SHAPE", SHAPES["tiny"])
    bench.bench(None, ["numpy"], 5, 3, 2, LOADING)
    assert "numpy" in capsys.readouterr().out
    with pytest.raises(ValueError, match="dtype was given, but no model"):
        bench.bench(None, ["numpy"], 5, 3, 1, LOADING | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="tokens is 0"):
        bench.bench(None, ["numpy"], 5, 0, 1, LOADING)
