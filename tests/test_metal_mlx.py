"""How the GPU kernels are wired into MLX: the text that it compiles, transformations, which op takes which kernel.

MLX builds the graph of a Metal kernel without a GPU while it exports a function, and prints the kernel's text. That
is how the harness of ``test_metal_kernels.py`` is held to MLX's rules.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution.
"""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import metal_ssd
import numpy as np
import pytest
import reference
from harness import build, config_of, run, token_ids, weights_of
from metal_cases import CONVOLUTIONS, SCANS, Case, convolution_values, flags_of, scan_values
from metal_cases import run as run_case
from metal_harness import MISSING, Harness
from metal_ssd import SSDS
from metal_text import checked_by_clang, compiled_by_nvcc, metal_text
from tolerances import GRADIENT, assert_close

import mambax
from mambax.options import Mamba2Options

pytest.importorskip("mlx.core")

import mlx.core as mx
from mambax_mlx.kernels import convolution, launch, scan, ssd

nn = mambax.get_backend("mlx")
VALUES = {name: mx.array(x) for name, x in scan_values(Case(2, 70, 9, 5)).items()}
DUAL = {name: mx.array(x) for name, x in metal_ssd.values_of(metal_ssd.Case(2, 260, 4, 3, 2, 5)).items()}
TRACES = pytest.mark.skipif(
    tuple(int(part) for part in nn.version().split(".")[:2]) < (0, 32),
    reason="MLX before 0.32 builds no graph of a Metal kernel without Metal",
)


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("mambax-gpu-kernels")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Harness:
    """The harness in the place of an Apple GPU."""
    if MISSING:
        pytest.skip(MISSING)
    harness = Harness(folder)
    monkeypatch.setattr(launch, "missing", lambda dialect: "" if dialect == "metal" else "it is not there")
    monkeypatch.setattr(launch, "metal", harness)
    return harness


class Recorder:
    """A launch that runs nothing and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[launch.Call] = []

    def __call__(self, call: launch.Call) -> dict[str, Any]:
        self.calls.append(call)
        return {name: mx.zeros(shape, dtype) for name, (shape, dtype) in call.outputs.items()}


def calls_of(*cases: tuple[str, Any]) -> list[launch.Call]:
    """Every launch of the forward and backward passes of some cases."""
    recorder = Recorder()
    for kind, case in cases:
        if kind == "scan":
            run_case(partial(scan.selective_scan, recorder), scan_values(case), case, delta_softplus=case.softplus)
        elif kind == "ssd":
            run_case(partial(ssd.ssd, recorder), metal_ssd.values_of(case), case, **metal_ssd.options_of(case))
        else:
            run_case(partial(convolution.causal_conv1d, recorder), convolution_values(case), case)
    return recorder.calls


# --- the text -----------------------------------------------------------------------------------------------------


@TRACES
def test_the_harness_writes_what_mlx_writes(capfd, tmp_path, monkeypatch):
    cases = [("scan", SCANS[i]) for i in (0, 1, 4, 7)] + [("convolution", CONVOLUTIONS[i]) for i in (0, 1, 2)]
    cases += [("ssd", SSDS[i]) for i in (0, 2)]
    calls = {(call.kernel, launch.signature(call), str(call.template)): call for call in calls_of(*cases)}
    assert {call.kernel for call in calls.values()} == set(launch.KERNELS)
    kernels: list[tuple[str, Any]] = []
    metal_kernel = mx.fast.metal_kernel

    def verbose(**options: Any) -> Any:
        kernel = metal_kernel(**options)
        kernels.append((options["name"], kernel))
        return partial(kernel, verbose=True)

    monkeypatch.setattr(mx.fast, "metal_kernel", verbose)
    launch._kernel.cache_clear()
    for number, call in enumerate(calls.values()):

        def launched(*arrays: Any, call: launch.Call = call) -> list[Any]:
            inputs = dict(zip(call.inputs, arrays, strict=True))
            return list(launch.metal(call._replace(inputs=inputs)).values())

        capfd.readouterr()
        mx.export_function(str(tmp_path / f"{number}.mlxfn"), launched, *call.inputs.values())
        printed = capfd.readouterr().out
        name = re.findall(r"Generated source code for `(.*)`:", printed)[0]
        text = printed.split("```\n")[1].removesuffix("\n")
        assert text == metal_text(call, name, *launch.source(call.kernel, "metal"))
    launch._kernel.cache_clear()
    names = [name for name, _ in kernels]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not found")
def test_nvcc_compiles_the_cuda_dialect(tmp_path):
    cases = [("scan", SCANS[i]) for i in (0, 1, 7)] + [("convolution", CONVOLUTIONS[i]) for i in (0, 1)]
    cases += [("ssd", SSDS[i]) for i in (0, 1)]
    calls = {(call.kernel, launch.signature(call), str(call.template)): call for call in calls_of(*cases)}
    ptx = compiled_by_nvcc(list(calls.values()), str(shutil.which("nvcc")), tmp_path / "kernels.ptx")
    assert ptx.count(".entry") == len(calls)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not found")
def test_address_spaces_are_kept_apart(monkeypatch):
    calls = calls_of(("scan", SCANS[0]), ("scan", SCANS[7]), ("convolution", CONVOLUTIONS[0]), ("ssd", SSDS[2]))
    for call in calls:
        checked_by_clang(call, [str(shutil.which("clang++"))])
    source = launch.source
    monkeypatch.setattr(launch, "source", lambda *names: (source(*names)[0], "const float* p = delta;\n"))
    with pytest.raises(RuntimeError, match="cannot initialize"):
        checked_by_clang(calls[0], [str(shutil.which("clang++"))])


# --- transformations ----------------------------------------------------------------------------------------------


@TRACES
@pytest.mark.parametrize("inside", ["grad of compile", "compile of grad", "grad"])
def test_the_graph_of_the_gradient_is_lazy_and_compiles(tmp_path, inside):
    """Nothing in the ops asks for a value: their whole graph is built with no GPU to compute one.

    It ends there, since MLX cannot write a function with a gradient of its own to a file.
    """
    calls: list[launch.Call] = []

    def record(call: launch.Call) -> dict[str, Any]:
        calls.append(call)
        return launch.metal(call)

    names = list(VALUES)
    flags = mx.ones((2, 70), mx.bool_)
    weight = mx.ones((9, 1, 4))

    def forward(flags: Any, *arrays: Any) -> Any:
        values = dict(zip(names, arrays, strict=True))
        values["u"], _ = convolution.causal_conv1d(record, values["u"], weight, mask=flags)
        y, final = scan.selective_scan(record, **values, mask=flags, delta_softplus=True)
        dual, last = ssd.ssd(record, **{**DUAL, "x": DUAL["x"] * y.sum()}, dt_softplus=True)
        return y.sum() + final.sum() + dual.sum() + last.sum()

    numbers = list(range(1, len(names) + 1))
    function: Any = {
        "grad": mx.grad(forward, argnums=numbers),
        "grad of compile": mx.grad(mx.compile(forward), argnums=numbers),
        "compile of grad": mx.compile(mx.grad(forward, argnums=numbers)),
    }[inside]
    with pytest.raises(ValueError, match="Unable to serialize primitive"):
        mx.export_function(str(tmp_path / "it.mlxfn"), function, flags, *VALUES.values())
    assert {call.kernel for call in calls} == set(launch.KERNELS) - {"scan_step"}


def test_what_the_kernels_do_not_have_is_refused():
    op = partial(scan.selective_scan, Recorder())
    arrays = [VALUES[name] for name in ("u", "delta", "A", "B", "C")]
    with pytest.raises(NotImplementedError, match=r"batch axis .* 'chunked'"):
        mx.vmap(lambda *x: op(*x)[0], in_axes=(0, None, None, None, None))(mx.stack([arrays[0]] * 2), *arrays[1:])
    once = mx.grad(lambda u: op(u, *arrays[1:])[0].sum())
    with pytest.raises(NotImplementedError, match="first gradients in reverse mode"):
        mx.eval(mx.grad(lambda u: once(u).sum())(arrays[0]))
    with pytest.raises(NotImplementedError, match="first gradients in reverse mode"):
        mx.jvp(lambda u: op(u, *arrays[1:])[0], [arrays[0]], [arrays[0]])
    dual = partial(ssd.ssd, Recorder(), **{name: x for name, x in DUAL.items() if name != "x"})
    with pytest.raises(NotImplementedError, match=r"batch axis .* 'chunked'"):
        mx.vmap(lambda x: dual(x=x)[0])(mx.stack([DUAL["x"]] * 2))
    with pytest.raises(NotImplementedError, match="first gradients in reverse mode"):
        mx.jvp(lambda x: dual(x=x)[0], [DUAL["x"]], [DUAL["x"]])


def test_arguments_that_the_kernels_cannot_take_are_refused():
    record = Recorder()
    narrow = {name: x for name, x in VALUES.items() if name in ("u", "delta", "B", "C")}
    for changes, message in (
        ({"A": mx.ones((9, 257))}, r"B is \(2, 70, 5\); expected \(2, 70, 257\)"),
        ({"A": mx.ones((9, 257)), "B": mx.ones((2, 70, 257)), "C": mx.ones((2, 70, 257))}, "257.*at most 256"),
        ({"z": mx.ones((2, 70, 9), mx.int32)}, r"int32; the GPU kernels expect float32"),
        ({"mask": mx.ones((2, 70), mx.bool_), "boundaries": mx.ones((2, 70), mx.bool_)}, "expected one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            scan.selective_scan(record, **({**narrow, "A": VALUES["A"]} | changes))
    empty = {"u": (2, 0, 9), "delta": (2, 0, 9), "B": (2, 0, 5), "C": (2, 0, 5)}
    with pytest.raises(ValueError, match="no size to be zero"):
        scan.selective_scan(record, A=VALUES["A"], **{name: mx.zeros(shape) for name, shape in empty.items()})
    long, few = (mx.broadcast_to(mx.zeros((1, 1, size)), (1, 4194241, size)) for size in (9, 5))
    with pytest.raises(ValueError, match="at most 65535 rows of 4194240 steps"):
        scan.selective_scan(record, long, long, VALUES["A"], few, few)
    x = VALUES["u"]
    for weight, options, message in (
        (mx.ones((9, 1, 9)), {}, "9 wide; the GPU kernels hold at most 8"),
        (mx.ones((8, 1, 4)), {}, r"weight \(D, 1, K\), found"),
        (mx.ones((9, 1, 4)), {"bias": mx.ones((8,))}, r"bias is \(8,\); expected \(9,\)"),
        (mx.ones((9, 1, 4)), {"activation": "relu"}, "'relu'; expected 'silu' or None"),
        (mx.ones((9, 1, 4)), {"initial_state": mx.ones((2, 4, 9))}, r"\(2, 4, 9\); expected \(2, 3, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convolution.causal_conv1d(record, x, weight, **options)
    wide = mx.ones((2, 260, 2, 257))
    for changes, message in (
        ({"A": mx.ones((3,))}, r"A is \(3,\); expected \(4,\)"),
        ({"B": wide, "C": wide, "initial_state": None}, "257; the GPU kernels hold at most 256"),
        ({"D": mx.ones((4,), mx.int32)}, "int32; the GPU kernels expect float32"),
        ({"mask": mx.ones((2, 260)), "boundaries": mx.ones((2, 260))}, "expected one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd.ssd(record, **(DUAL | changes))
    assert not record.calls


@pytest.mark.parametrize("dialect", launch.DIALECTS)
def test_a_named_kernel_that_cannot_run_says_why(dialect):
    reason = nn.scan_implementations()[dialect]
    if not reason:
        pytest.skip(f"{dialect} runs here")
    with pytest.raises(
        ValueError, match=rf"'{dialect}' cannot run here: .*needs an (Apple|NVIDIA) GPU|default device"
    ):
        nn.selective_scan(**VALUES, impl=dialect)


# --- ops and models -----------------------------------------------------------------------------------------------


def test_auto_takes_the_kernels_of_the_gpu(on_gpu):
    assert nn.scan_implementations()["metal"] == ""
    y, final = nn.selective_scan(**VALUES, delta_softplus=True)
    want = reference.scan(**{name: np.array(x) for name, x in VALUES.items()}, delta_softplus=True)
    assert_close(np.array(y), want[0])
    assert_close(np.array(final), want[1])
    assert [call.kernel for call in on_gpu.launched] == ["scan_chunk", "scan_combine", "scan_output"]
    wide = {"A": mx.ones((9, 257)), "B": mx.ones((2, 3, 257)), "C": mx.ones((2, 3, 257))}
    nn.selective_scan(
        VALUES["u"][:, :3], VALUES["delta"][:, :3], **wide
    )  # wider than the kernels: MLX's operations
    nn.causal_conv1d(VALUES["u"], mx.ones((9, 1, 9)))
    assert len(on_gpu.launched) == 3


def test_auto_takes_the_kernels_for_mamba_2(on_gpu):
    case = metal_ssd.Case(1, 9, 2, 3, 1, 5)
    values = metal_ssd.values_of(case)
    arrays = {name: mx.array(x) for name, x in values.items()}
    want = metal_ssd.expected(values, case)
    for impl, kernels in (("auto", 1), ("metal", 1), ("chunked", 0), ("sequential", 0)):
        on_gpu.launched.clear()
        y, final = nn.ssd(**arrays, dt_softplus=True, impl=impl)
        assert_close(np.array(y), want["y"])
        assert_close(np.array(final), want["final state"])
        assert [call.kernel for call in on_gpu.launched] == ["ssd_output"] * kernels
    wide = mx.ones((1, 9, 1, 257))
    nn.ssd(arrays["x"], arrays["dt"], arrays["A"], wide, wide)  # wider than the kernels: MLX's operations
    assert len(on_gpu.launched) == 0
    with pytest.raises(ValueError, match="'cuda' cannot run here: it is not there"):
        nn.ssd(**arrays, impl="cuda")


def test_a_model_by_the_kernels(on_gpu):
    config = config_of(n_layer=2, scan="metal")
    weights = weights_of(config)
    model, ids = build(nn, config, weights), token_ids(2, 9)
    assert_close(run(model, ids)[0], reference.logits(weights, ids))
    assert {call.kernel for call in on_gpu.launched} == {"conv_forward", "scan_output"}
    first, state = run(model, ids[:, :8])
    last, _ = run(model, ids[:, 8:], state)
    assert_close(np.concatenate([first, last], 1), reference.logits(weights, ids))
    assert "scan_step" in {call.kernel for call in on_gpu.launched}
    mask = np.ones((2, 9), bool)
    mask[1, :4] = False
    assert_close(run(model, ids, mask=mask)[0][1, 4:], reference.logits(weights, ids[1:, 4:])[0])


def test_training_by_the_kernels_is_training_by_mlx(on_gpu, monkeypatch):
    import mlx.nn
    from mlx.utils import tree_flatten

    config = config_of(n_layer=1)
    ids = mx.array(token_ids(2, 9))

    def gradients(model: Any) -> dict[str, Any]:
        loss = mlx.nn.value_and_grad(model, lambda: (model(ids).logits.astype(mx.float32) ** 2).sum())
        return dict(tree_flatten(loss()[1]))

    got = gradients(build(nn, config))
    assert {"scan_backward", "conv_backward"} <= {call.kernel for call in on_gpu.launched}
    monkeypatch.undo()
    want = gradients(build(nn, config))
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert_close(np.array(got[name]), np.array(array), what=name, tolerance=GRADIENT["float32"])


def test_a_model_of_mamba_2_by_the_kernels(on_gpu, monkeypatch):
    """Logits, a state that goes on, and gradients, as without a GPU."""
    import mlx.nn
    from mlx.utils import tree_flatten

    sizes = Mamba2Options(n_heads=4, head_dim=5, d_state=6, n_groups=2)
    config = mambax.MambaLMConfig(d_model=16, n_layer=1, vocab_size=31, layer_types=("mamba2",), mamba2=sizes)
    model, ids = mambax.from_config(config, backend="mlx", seed=0), token_ids(2, 9) % 31

    def found() -> dict[str, Any]:
        first, state = run(model, ids[:, :8])
        last, _ = run(model, ids[:, 8:], state)
        loss = mlx.nn.value_and_grad(model, lambda: (model(mx.array(ids)).logits.astype(mx.float32) ** 2).sum())
        gradients = {name: np.array(x) for name, x in tree_flatten(loss()[1])}
        return {"first": first, "last": last, **gradients}

    got = found()
    assert {call.kernel for call in on_gpu.launched} >= {name for name in launch.KERNELS if name.startswith("ssd")}
    monkeypatch.undo()
    for name, want in found().items():
        assert_close(got[name], want, what=name, tolerance=GRADIENT["float32"])


def test_flags_reach_the_kernels_through_the_ops(on_gpu):
    case = Case(2, 30, 9, 5, flags="boundaries")
    values = {name: mx.array(x) for name, x in scan_values(case).items()}
    begins = flags_of(case)["boundaries"]
    y, _ = nn.selective_scan(**values, boundaries=mx.array(begins), delta_softplus=True, impl="metal")
    (where,) = np.nonzero(begins[1])
    start = int(where[-1])
    alone = {name: np.array(x)[1:, start:] if name in ("u", "delta", "B", "C", "z") else np.array(x)
             for name, x in values.items() if name != "initial_state"}  # fmt: skip
    assert_close(np.array(y)[1, start:], reference.scan(**alone, delta_softplus=True)[0][0])
