"""The MLX benchmark at tiny sizes: every contender runs, results are kept by part, goals are held against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mlx, mlx_report, quantized_loss, results
from benchmarks.contenders.mlx_scan import ScanOnMlx
from benchmarks.harness import Case, Entry
from benchmarks.mlx_parts import PLANS, Context, parts
from benchmarks.processes import Process, Skipped
from benchmarks.results import Part
from benchmarks.worker import Unavailable, Worker

mx = pytest.importorskip("mlx.core")


class InThisProcess:
    """A contender in the process of the test, in place of one in a process of its own."""

    def __init__(self, *_: Any) -> None:
        self.worker = Worker()

    def ask(self, do: str, timeout: float, **values: Any) -> dict[str, Any]:
        try:
            return getattr(self.worker, do)(json.loads(json.dumps(values)))
        except Unavailable as reason:
            raise Skipped(str(reason)) from None

    def end(self) -> None:
        return


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"ask", "end"} <= vars(Process).keys()
    monkeypatch.setattr("benchmarks.harness.Process", InThisProcess)
    monkeypatch.setattr("gc.collect", lambda: 0)  # it takes long in a process that has loaded every framework


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("in_this_process")
def test_a_dry_run_writes_its_results(tmp_path: Path) -> None:
    device = str(mx.default_device().type).rpartition(".")[2]
    arguments = ["--dry-run", "--device", device, "--threads", "1", "--results", str(tmp_path)]
    assert mlx.main([*arguments, "--work", str(tmp_path / "weights")]) == 0
    found = results.load(tmp_path / "mlx-dry-run.json")
    assert list(found) == list(parts(PLANS["dry-run"]))
    for name, part in found.items():
        assert f"--only {name}" in part.command.replace("'", "")
        for case in part.cases:
            ours = case.entries[0]
            assert ours.label.startswith("mambax")
            assert ours.status == "ok"
            assert {entry.status for entry in case.entries} <= {"ok", "skipped"}
    first, second = (case.entries[0].figures for case in found["memory"].cases)
    assert {"beyond", "graph"} <= first.keys() & second.keys()
    page = (tmp_path / "mlx-dry-run.md").read_text(encoding="utf-8")
    assert "decode 4 bits, times as fast as mlx-lm" in page
    assert str(tmp_path) not in page
    # a part that is run again replaces its own results alone
    before = {name: part.date for name, part in found.items()}
    found["scan"].date = "long ago"
    results.save(found, tmp_path / "mlx-dry-run.json")
    assert mlx.main([*arguments, "--only", "scan", "--work", str(tmp_path / "weights")]) == 0
    again = results.load(tmp_path / "mlx-dry-run.json")
    assert again["scan"].date != "long ago"
    assert {name: part.date for name, part in again.items() if name != "scan"} == {
        name: date for name, date in before.items() if name != "scan"
    }


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--only", "scam"], "unknown part 'scam'"), (["--threads", "0"], "at least 1")]
)
def test_bad_arguments_run_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        mlx.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["mambax", "mlx-lm"])
def test_gradients_of_the_scan_are_those_of_the_recurrence(package: str) -> None:
    device = str(mx.default_device().type).rpartition(".")[2]
    job = {"kind": "backward", "length": 9, "channels": 8, "states": 3, "backward": True}
    task = ScanOnMlx(package, device).prepare(job)
    task.run()
    found = task.check()
    assert found.keys() == {"error", "gradient_error"}
    assert max(found.values()) < 1e-5


def test_on_a_gpu_triton_is_beside_it() -> None:
    work = parts(PLANS["full"])["scan"](Context(PLANS["full"], Path(), Path(), "gpu", {"channels": 8, "states": 3}))
    assert [spec.label for spec in work.specs] == ["mambax mlx gpu", "mlx-lm's loop gpu", "mambax torch triton"]
    assert {job["kind"] for job in work.jobs} == {"forward", "backward"}


def part(name: str, job: dict[str, Any], *times: float, **figures: float) -> Part:
    """A part with a case in which mambax took the first time and mlx-lm the second."""
    labels = ("mambax mlx cpu", "mlx-lm cpu")
    entries = [
        Entry(label, seconds={"median": t, "min": t}, figures=dict(figures))
        for label, t in zip(labels, times, strict=True)
    ]
    return Part(name, "full", "", "", {}, {}, 1, {"n_layer": 24}, cases=[Case(name, job, entries)])


def test_goals_are_held_against_the_figures() -> None:
    long = {"kind": "long"}
    memory = part("memory", {**long, "length": 1000}, 1e-3, 1e-3, beyond=100.0, graph=5.0)
    memory.cases += part("memory", {**long, "length": 100_000}, 1e-3, 1e-3, beyond=300.0, graph=5.0).cases
    found = mlx_report.goals({
        "scan": part("scan", {"kind": "forward", "length": 512}, 0.004, 0.3),
        "prefill float32": part("prefill", {"kind": "prefill", "length": 512}, 0.001, 0.06),
        "decode float32": part("decode", {"kind": "decode", "steps": 8}, 0.02, 0.01),
        "memory": memory,
    })  # fmt: skip
    scan, prefill, decode, beyond, graph = found
    assert scan.found == pytest.approx(75)
    assert scan.bound == (">=", 20.0)
    assert prefill.found == pytest.approx(60)
    assert prefill.bound[1] == pytest.approx(1 / (1 - 24 * 0.3 / (512 * 0.06)))  # mlx-lm's time without its loop
    assert [goal.reached for goal in found] == [True, True, False, False, True]
    assert (decode.found, beyond.found, graph.found) == (0.5, 3.0, 1.0)


def test_the_loss_of_quantised_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4, encoding="utf-8")
    assert quantized_loss.main(["--text", str(text), "--held-out", "150"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["as they are", "8 bits (MLX)", "4 bits (MLX)", "int8", "int4"]
    size, nats = ([float(row[i].replace(",", "")) for row in rows] for i in (1, 2))
    assert sorted(size, reverse=True)[:1] == size[:1]
    assert all(abs(found / nats[0] - 1) < 0.1 for found in nats)
    assert 0.5 < nats[0] < 3
    with pytest.raises(SystemExit):
        quantized_loss.main(["--held-out", "1"])
