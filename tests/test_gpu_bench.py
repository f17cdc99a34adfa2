"""The GPU benchmark, as far as a machine without a GPU can run it: every part at tiny sizes, and its failures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("psutil")
pytest.importorskip("rich")
pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("benchmarks", reason="needs the source tree")

import torch

from benchmarks import (
    gpu,
    gpu_commands,
    gpu_goals,
    gpu_models,
    gpu_peers,
    gpu_report,
    gpu_scan,
    gpu_ssd,
    gpu_training,
    results,
)
from benchmarks.contender import Unavailable
from benchmarks.gpu_context import Context
from benchmarks.gpu_plans import DRY_RUN, FULL
from benchmarks.gpu_rivals import Arena, Pace, Rival
from benchmarks.gpu_timing import Clock
from benchmarks.harness import Case, Entry, summary

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
MEASURED = [name for name in gpu.NAMES if name not in ("tests", "sanitizer", "peers")]
TOLERANCE = 1e-5


def arena(**changes: Any) -> Arena:
    return Arena(Clock("cpu"), Pace(**{"rounds": 2, "turn_s": 0.0, "most": 2, **changes}))


# --- every part ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("name", MEASURED)
def test_every_part_runs_and_computes_the_right_thing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "TRAINED", {"mambax": gpu_training.TRAINED["mambax"]})  # others take seconds
    monkeypatch.setattr(gpu_models, "transformers_model", gpu_models.mamba_ssm_model)
    cases = list(gpu.parts_by_name()[name](Context(DRY_RUN, arena(rounds=1, most=1))))
    assert cases
    measured = 0
    for case in cases:
        json.dumps(case.to_dict())
        for entry in case.entries:
            assert entry.status != "failed", entry.reason
            assert entry.median or entry.reason
            measured += entry.median is not None
            if "error" in entry.figures:
                assert entry.figures["error"] < TOLERANCE, entry.label
    assert measured >= len(cases)


def test_the_reference_of_the_scan_catches_an_error() -> None:
    given = gpu_scan.inputs(Context(DRY_RUN, arena()), 1, 9, 8, 4)
    want = gpu_scan.recurrence(given)
    wrong = gpu_scan.recurrence({**given, "delta_bias": given["delta_bias"] + 0.05})
    assert np.linalg.norm(wrong - want) > 1e-3 * np.linalg.norm(want)


def test_the_reference_of_ssd_catches_an_error() -> None:
    given = gpu_ssd.inputs(Context(DRY_RUN, arena()), 1, 9, (2, 4, 1, 4))
    want = gpu_ssd.recurrence(given)
    wrong = gpu_ssd.recurrence({**given, "A": given["A"] * 1.5})
    assert np.linalg.norm(wrong - want) > 1e-3 * np.linalg.norm(want)


def test_the_models_of_the_benchmark_are_alike_and_finite() -> None:
    c = Context(DRY_RUN, arena())
    a, b = (gpu_models.mambax_model(c, "tiny", torch.float32) for _ in range(2))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(a(ids).logits, b(ids).logits)
    assert torch.isfinite(a(ids).logits).all()
    narrow = gpu_models.mambax_model(c, "tiny", torch.bfloat16)
    dtypes = {name: p.dtype for name, p in narrow.named_parameters()}
    assert all(
        (dtype == torch.float32) == name.endswith(gpu_models.FLOAT32_ALWAYS) for name, dtype in dtypes.items()
    )


def test_transformers_gets_the_same_weights() -> None:
    pytest.importorskip("transformers")
    c = Context(DRY_RUN, arena())
    model = gpu_models.mambax_model(c, "tiny", torch.float32)
    other = gpu_models.transformers_model(c, "tiny", torch.float32, gpu_models.weights_of(model))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(other(ids, use_cache=False).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


# --- rivals ----------------------------------------------------------------------------------------------------


def rival(label: str, run: Any, **options: Any) -> Rival:
    return Rival(label, lambda: run, **options)


def test_a_failure_costs_no_other() -> None:
    def breaks() -> None:
        raise RuntimeError("CUDA out of\nmemory")

    def lacks() -> Any:
        raise Unavailable("not installed: pip install it")

    later = [None, None, None]
    case = arena().compare(
        "work",
        {"kind": "forward"},
        [
            rival("mambax", lambda: 1.0, check=lambda result: {"error": result}),
            rival("breaks", breaks),
            Rival("lacks", lacks),
            rival("breaks later", lambda: later.pop()),
            rival("other", lambda: None, parts=4),
        ],
    )
    states = {entry.label: (entry.status, entry.reason) for entry in case.entries}
    assert states["mambax"] == states["other"] == ("ok", "")
    assert states["breaks"] == ("failed", "RuntimeError: CUDA out of memory")
    assert states["lacks"] == ("skipped", "not installed: pip install it")
    assert states["breaks later"] == ("failed", "IndexError: pop from empty list")
    assert case.entries[0].figures["error"] == 1.0
    assert case.entries[0].seconds["count"] == 2  # of two rounds


def test_nothing_starts_when_the_time_of_a_part_is_over() -> None:
    case = arena(part_s=-1.0).compare("work", {"kind": "forward"}, [rival("mambax", lambda: None)])
    assert case.entries[0].status == "skipped"
    assert "of this part were over" in case.entries[0].reason


def test_rivals_that_are_alone_are_gone_before_the_next() -> None:
    alive: set[str] = set()

    class Held:
        def __init__(self, label: str) -> None:
            assert not alive
            self.label = label
            alive.add(label)

        def __call__(self) -> None: ...

        def __del__(self) -> None:
            alive.discard(self.label)

    rivals = [Rival(label, lambda label=label: Held(label)) for label in ("a", "b")]
    case = arena().compare("work", {"kind": "forward"}, rivals, alone=True)
    assert [entry.status for entry in case.entries] == ["ok", "ok"]


def test_gradients_are_recorded_only_where_asked_for() -> None:
    seen = []
    rivals = [
        rival(str(wanted), lambda: seen.append(torch.is_grad_enabled()), gradients=wanted)
        for wanted in (False, True)
    ]
    arena(rounds=1, most=1).compare("work", {"kind": "forward"}, rivals)
    assert sorted(set(seen)) == [False, True]


# --- peers -----------------------------------------------------------------------------------------------------


def archive(folder: Path, name: str, files: tuple[str, ...]) -> None:
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
        for file in files:
            info = tarfile.TarInfo(f"{name}/{file}")
            tar.addfile(info, io.BytesIO(b""))


def test_a_peer_that_is_missing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="pip download mamba_ssm"):
        gpu_peers.unpacked(tmp_path, "mamba_ssm")
    archive(tmp_path, "mamba_ssm-9", ("setup.py", *gpu_peers.SCAN_SOURCES[1:]))
    with pytest.raises(Unavailable, match=r"mamba_ssm-9\.tar\.gz lacks .*selective_scan\.cpp"):
        gpu_peers.unpacked(tmp_path, "mamba_ssm")
    archive(tmp_path, "causal_conv1d-9", gpu_peers.CONV_SOURCES)
    assert (gpu_peers.unpacked(tmp_path, "causal_conv1d") / gpu_peers.CONV_SOURCES[0]).exists()
    with pytest.raises(Unavailable, match="there is none"):
        gpu_peers.build(tmp_path, "causal_conv1d_cuda")
    case = next(gpu_commands.peers(Context(DRY_RUN, arena(), tmp_path)))
    assert [entry.status for entry in case.entries] == ["skipped", "skipped", "skipped"]
    with pytest.raises(Unavailable, match="nowhere cannot be imported"):
        gpu_peers.load("nowhere", folder=None)


def test_what_is_not_compiled_is_defined_elsewhere() -> None:
    """selective_scan.cpp names every input and weight dtype, in both directions."""
    compiled = {"fwd": {"at::BFloat16", "float"}, "bwd": {("at::BFloat16", "float"), ("float", "float")}}
    for kind in ("fwd", "bwd"):
        for inputs in ("at::Half", "at::BFloat16", "float"):
            for weights in ("float", "complex_t"):
                there = inputs in compiled[kind] or (inputs, weights) in compiled[kind]
                named = f"template void selective_scan_{kind}_cuda<{inputs}, {weights}>" in gpu_peers.MISSING_SCAN
                assert there != named, (kind, inputs, weights)


def test_a_source_loses_the_dtypes_that_nothing_calls(tmp_path: Path) -> None:
    pairs = [(a, b) for a in ("float", "at::Half", "at::BFloat16") for b in ("float", "at::Half", "at::BFloat16")]
    lines = [f"template void f_cuda<{a}, {b}>(ConvParamsBwd &params, cudaStream_t stream);" for a, b in pairs]
    source = "\n".join(["template <typename input_t> void f();", *lines, ""])
    kept, lacking = gpu_peers.without_other_dtypes(source)
    assert kept.startswith("template <typename input_t> void f();\n")
    for (a, b), line in zip(pairs, lines, strict=True):
        assert (line in kept) == (f"{a}, {b}" in gpu_peers.CONV_DTYPES)
        assert (line in lacking) != (line in kept)
    assert lacking.count("void f_cuda(ConvParamsBwd &params") == 1
    root = tmp_path / "causal_conv1d-9"
    for name in gpu_peers.CONV_SOURCES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")
    files = gpu_peers._files(root, "causal_conv1d", gpu_peers.CONV_SOURCES)
    times = [Path(file).stat().st_mtime_ns for file in files]
    assert gpu_peers._files(root, "causal_conv1d", gpu_peers.CONV_SOURCES) == files
    assert [Path(file).stat().st_mtime_ns for file in files] == times  # or each process would compile them again


# --- the run ---------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def told(label: str, command: Any, timeout: float, **variables: str) -> Entry:
        return Entry(label, seconds=summary([1.0]), figures={"passed": 3.0})

    monkeypatch.setattr(gpu_commands, "run", told)
    done = gpu.main(["--dry-run", "--only", "tests,sanitizer,kernels,decode", "--results", str(tmp_path)])
    assert done == 0, capsys.readouterr()
    parts = results.load(tmp_path / "gpu-dry-run.json")
    assert list(parts) == ["limits", "tests", "decode", "kernels", "sanitizer"]
    assert parts["decode"].limits.keys() == {"copy", "bfloat16", "float32"}
    assert (
        parts["decode"].command == "python -m benchmarks.gpu --only limits,tests,decode,kernels,sanitizer --dry-run"
    )
    page = (tmp_path / "gpu-dry-run.md").read_text(encoding="utf-8")
    assert "decode, tiny, B 1, float32" in page
    assert "3 passed" in page
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "gpu-dry-run-models.png").exists()
    again = gpu.main(["--dry-run", "--only", "limits", "--results", str(tmp_path)])
    assert again == 0
    assert "decode" in results.load(tmp_path / "gpu-dry-run.json")  # kept


def test_a_part_that_dies_is_reported(tmp_path: Path) -> None:
    """Here it does for want of a GPU."""
    chosen = gpu._arguments(["--only", "scan"])
    part = gpu._part(chosen, "scan", tmp_path)
    (case,) = part.cases
    assert case.entries[0].status == "failed"
    assert "there is no NVIDIA GPU that PyTorch can use" in case.entries[0].reason
    assert gpu._failures({"scan": part}) == 1


@pytest.mark.parametrize(
    ("words", "message"), [(["--only", "scan,sing"], "unknown part 'sing'"), (["--peers", "nowhere"], "no folder")]
)
def test_what_is_wrong_with_the_command_is_said(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err


def test_commands_report_what_they_said(tmp_path: Path) -> None:
    talk = "print('FAILED tests/a.py::b - no'); print('1 failed, 4 passed in 2s'); raise SystemExit(1)"
    entry = gpu_commands.run("mambax: talk", [sys.executable, "-c", talk], 60.0)
    assert (entry.status, entry.figures) == ("failed", {"failed": 1.0, "passed": 4.0})
    assert "FAILED tests/a.py::b" in entry.reason
    slow = gpu_commands.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert slow.reason == "stopped after 0 s"
    assert gpu_commands.run("none", [str(tmp_path / "none")], 1.0).status == "skipped"


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    nested = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {nested!r}])"
    start = time.perf_counter()
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_commands.finished([sys.executable, "-c", code], 1.0, dict(os.environ))
    assert time.perf_counter() - start < 20
    done = gpu_commands.finished([sys.executable, "-c", "print('a'); raise SystemExit(3)"], 60.0, dict(os.environ))
    assert (done.returncode, done.stdout) == (3, "a\n")


def test_the_suites_of_the_kernels_are_there() -> None:
    suites = gpu_commands.native_suites()
    assert {"tests/test_triton_scan.py", "tests/test_triton_native.py", "tests/test_graph_step.py"} <= set(suites)
    assert not {f"tests/{name}" for name in gpu_commands.ELSEWHERE} & set(suites)
    assert "tests/test_triton_native.py" not in gpu_commands._files_with_gpu_tests()
    assert "tests/test_triton_scan_sizes.py" in gpu_commands._files_with_gpu_tests()


def test_what_compute_sanitizer_watches_exists() -> None:
    """A name that matches nothing would end the run before anything is watched."""
    names = [f"tests/{name}" for name in gpu_commands.WATCHED]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, cwd=gpu_commands.ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-1000:]
    assert done.stdout.count("::") == len(names)
    watched = {name.partition("::")[0] for name in gpu_commands.WATCHED}
    kernels = {f"test_triton_{name}.py" for name in ("conv", "norm", "step", "scan", "ssd")}
    assert kernels | {"test_graph_step.py", "test_cuda_quantized.py"} <= watched


def test_tests_are_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: dict[str, list[str]] = {}

    def told(label: str, command: list[str], timeout: float, **variables: str) -> Entry:
        commands[label] = command
        assert timeout <= 240.0
        return Entry(label)

    monkeypatch.setattr(gpu_commands, "run", told)
    monkeypatch.setattr(gpu_commands.shutil, "which", lambda *given, **options: "compute-sanitizer")
    context = Context(FULL, Arena(Clock("cpu"), FULL.pace))
    assert len(list(gpu_commands.tests(context))) == 3  # so that what hangs costs nothing that was done before
    suites = commands["mambax: the kernels' suites"]
    assert ("-n" in suites) == (importlib.util.find_spec("xdist") is not None)
    assert suites[suites.index("-m", 3) + 1] == "not gpu"
    assert "-n" not in commands["mambax: pytest -m gpu"]  # they take most of the memory
    assert [case.entries[0].label for case in gpu_commands.sanitizer(context)] == [
        "mambax: memcheck", "mambax: racecheck",
    ]  # fmt: skip
    assert commands["mambax: racecheck"][:3] == ["compute-sanitizer", "--tool", "racecheck"]


def test_the_source_tree_needs_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    variables = gpu_commands.environment(tmp_path)
    monkeypatch.undo()
    code = "import importlib.metadata as m; print(*sorted(e.name for e in m.entry_points(group='mambax.backends')))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mlx", "numpy", "torch"]


# --- goals and the report --------------------------------------------------------------------------------------


def part_of(name: str, cases: list[Case], **limits: float) -> results.Part:
    chosen = gpu._arguments(["--dry-run"])
    part = gpu._empty(chosen, name)
    part.cases, part.limits = cases, limits
    part.shape = gpu._shape("tiny")
    return part


def timed(label: str, seconds: float, **figures: float) -> Entry:
    return Entry(label, seconds=summary([seconds]), figures=figures)


def test_goals_are_those_of_the_sizes() -> None:
    job = {"kind": "backward", "batch": 1, "length": 8192, "channels": 1536, "states": 16, "precision": "bfloat16"}
    rivals = [timed("mambax triton", 1.0, working=10.0), timed("mamba_ssm CUDA", 1.4, working=9.0)]
    cases = [Case("scan", job, rivals), Case("scan", job | {"batch": 8}, rivals)]
    found = gpu_goals.goals({"scan-backward": part_of("scan-backward", cases)})
    assert [(goal.bound, goal.reached) for goal in found] == [
        ((">=", 1.5), False), (("<=", 1.0), False), ((">=", 1.0), True), (("<=", 1.0), False),
    ]  # fmt: skip
    decode = Case(
        "decode", {"kind": "decode", "model": "tiny", "batch": 1, "precision": "bfloat16"},
        [timed("mambax graph", 1.0, weights=7.0, state=1.0)],
    )  # fmt: skip
    found = gpu_goals.goals({"decode": part_of("decode", [decode], copy=10.0)})
    assert [(goal.found, goal.reached) for goal in found] == [(0.9, True), (None, None)]
    failed = Case(
        "tests", {"kind": "tests"}, [Entry("mambax: a", "failed", "x"), Entry("mambax: b", "skipped", "y")]
    )
    assert [goal.reached for goal in gpu_goals.goals({"tests": part_of("tests", [failed])})] == [False, None]
    prefill = Case(
        "prefill", {"kind": "prefill", "model": "tiny", "batch": 1, "length": 9, "precision": "bfloat16"},
        [timed("mambax", 1e-3)],
    )  # fmt: skip
    (goal,) = gpu_goals.goals({"prefill": part_of("prefill", [prefill], bfloat16=1e12)})
    assert goal.found is not None
    assert 0 < goal.found < 1


def test_goals_and_limits_of_ssd() -> None:
    job = {"kind": "forward", "model": "tiny", "batch": 1, "length": 9, "precision": "bfloat16"}
    work = {"bytes": 20.0, "operations": 300.0}
    case = Case("ssd", job, [timed("mambax triton", 1e-2, **work), timed("mamba_ssm Triton", 1.1e-2, **work)])
    part = part_of("ssd", [case], copy=1e4, bfloat16=1e5)
    (goal,) = gpu_goals.goals({"ssd": part})
    assert goal.found == pytest.approx(1.1)
    assert goal.reached
    page = gpu_report.markdown({"ssd": part}, [])
    assert "30 % of what the limits allow" in page  # 3 ms of products, 2 ms of copies
    assert "27 % of what the limits allow" in page


def test_a_rival_without_a_time_has_its_reason_in_the_table() -> None:
    case = Case("norm", {"kind": "forward"}, [timed("mambax", 1.0), Entry("other", "failed", "no | kernel")])
    page = gpu_report.markdown({"kernels": part_of("kernels", [case])}, [])
    assert "| other |  |  |  |  |  |  | failed: no \\| kernel |" in page


def test_the_full_plan_has_the_sizes_that_were_promised() -> None:
    assert FULL.lengths[0] == 512
    assert FULL.lengths[-1] == 65536
    assert FULL.large[0] * FULL.large[1] > 2**31
    assert FULL.long == 1_000_000
