"""The command line: what goes to stdout and stderr, exit codes, errors in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result
from vocabularies import EOS, byte_level

import mambax
from mambax.checkpoint.layouts import Description
from mambax.cli import app, terminal
from mambax.cli.doctor import Check, checks
from mambax.cli.info import state_bytes
from mambax.registry import install_command, is_installed

NUMPY = ["--backend", "numpy"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random language model with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tok = mambax.Tokenizer(byte_level(), eos_token=EOS)
    config = mambax.MambaLMConfig(d_model=16, n_layer=2, d_state=4, vocab_size=tok.vocab_size)
    model = mambax.from_config(config, backend="numpy")
    model.tokenizer = tok
    mambax.save_pretrained(model, folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return mambax.load(checkpoint, backend="numpy")


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def failed(result: Result, *parts: str) -> None:
    """The command ended with exit code 1 and one message."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


# --- generate --------------------------------------------------------------------------------------------------


def test_generate_writes_the_text_alone_to_stdout(checkpoint: Path, model: Any) -> None:
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}
    text = model.generate("Hello", max_new_tokens=12, **options).text
    flags = ["-n", 12, *(x for name, value in options.items() for x in ("--" + name.replace("_", "-"), value))]
    result = run("generate", checkpoint, "Hello", *flags, *NUMPY)
    assert result.exit_code == 0
    assert result.stdout.removesuffix("\n") == text.removesuffix("\n")
    assert re.search(r"prompt: \d+ tokens in .* tokens/s\); text: 12 tokens in .*; ended by length", result.stderr)
    piped = run("generate", checkpoint, *flags, *NUMPY, "--quiet", stdin="Hello")
    assert (piped.stdout, piped.stderr) == (result.stdout, "")
    chunked = run("generate", checkpoint, "-", *flags, *NUMPY, "--prefill-chunk", 2, stdin="Hello")
    assert chunked.stdout == result.stdout


def test_generate_takes_text_as_it_is(checkpoint: Path, model: Any) -> None:
    text = model.generate("日本\n", max_new_tokens=5).text
    result = run("generate", checkpoint, "-n", 5, *NUMPY, stdin="日本\n".encode())
    assert result.stdout.removesuffix("\n") == text.removesuffix("\n")


def test_generate_stops_at_a_string(checkpoint: Path, model: Any) -> None:
    whole = model.generate("Hello", max_new_tokens=30, temperature=1.0, seed=1).text
    stop = whole[len(whole) // 2 :][:2]
    result = run("generate", checkpoint, "Hello", "-n", 30, "-t", 1, "--seed", 1, *NUMPY, "--stop", stop)
    assert result.stdout.removesuffix("\n") == whole[: whole.index(stop)].removesuffix("\n")
    assert "ended by stop" in result.stderr


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_generate_on_another_backend(backend: str, checkpoint: Path, model: Any) -> None:
    if not is_installed(backend):
        pytest.skip("its framework is not installed")
    result = run("generate", checkpoint, "Hello", "-n", 8, "--backend", backend, "--scan", "pscan")
    assert result.stdout.removesuffix("\n") == model.generate("Hello", max_new_tokens=8).text.removesuffix("\n")


def test_generate_names_the_backend_that_it_takes(checkpoint: Path) -> None:
    result = run("generate", checkpoint, "Hello", "-n", 1)
    assert f"using the {mambax.default_backend()} backend" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-t", "-1"], ["temperature is -1.0; expected a number from 0"]),
        (["--top-p", "0"], ["top_p is 0.0"]),
        (["--backend", "jax"], ["unknown backend 'jax'; expected one of: mlx, numpy, torch"]),
        ([*NUMPY, "--device", "cuda"], ["device is 'cuda'; the numpy backend has 'cpu' here"]),
        ([*NUMPY, "--dtype", "int8"], ["dtype is 'int8'; expected one of"]),
        ([*NUMPY, "--scan", "magic"], ["unknown scan implementation 'magic'; expected 'auto' or one of"]),
    ],
)
def test_bad_options_are_one_clear_line(arguments: list[str], parts: list[str], checkpoint: Path) -> None:
    result = run("generate", checkpoint, "Hello", *arguments)
    failed(result, *parts)
    assert len(result.stderr.strip().splitlines()) <= 2  # a second one names the backend


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["generate"], ["generate", "x", "-n", "0"], ["info", "-x"]])
def test_usage_errors(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["generate", "chat", "info", "convert"])
def test_a_model_that_is_not_there(command: str, tmp_path: Path) -> None:
    extra = {"generate": ["Hello"], "convert": [tmp_path / "new"]}.get(command, [])
    failed(run(command, tmp_path / "nowhere", *extra), "no such folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stdin", "part"), [("", "stdin is empty"), (b"\xff", "stdin is not UTF-8")])
def test_a_prompt_that_is_none(stdin: str | bytes, part: str, checkpoint: Path) -> None:
    failed(run("generate", checkpoint, *NUMPY, stdin=stdin), part)


def test_a_model_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    failed(run("generate", tmp_path, "Hello", *NUMPY), "has no tokenizer", "put a tokenizer.json")


def test_a_classifier_does_not_write(tmp_path: Path) -> None:
    config = mambax.MambaClassificationConfig(d_model=8, n_layer=1, vocab_size=16, num_labels=2)
    mambax.save_pretrained(mambax.from_config(config, backend="numpy"), tmp_path)
    failed(run("generate", tmp_path, "Hello", *NUMPY), "MambaForSequenceClassification; expected a causal language")


def test_debug_shows_where_an_error_comes_from(checkpoint: Path) -> None:
    for arguments in (["generate", checkpoint, "x", "-t", "-1", "--debug"], ["--debug", "info", "nowhere"]):
        result = run(*arguments)
        assert isinstance(result.exception, (ValueError, OSError))
        assert "error: " not in result.stderr


def test_mistakes_of_ours_are_not_hidden(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("a mistake")

    monkeypatch.setattr(mambax, "load", broken)
    assert isinstance(run("generate", checkpoint, "x").exception, TypeError)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["the model", "the writing"])
def test_ctrl_c_keeps_what_was_produced(where: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("generate", checkpoint, "Hello", "-n", 20, *NUMPY).stdout
    calls = 0

    def interrupted(original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 10:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    if where == "the model":
        numpy = mambax.get_backend("numpy")
        monkeypatch.setattr(numpy, "to_numpy", interrupted(numpy.to_numpy))
    else:
        monkeypatch.setattr(terminal, "write", interrupted(terminal.write))
    result = run("generate", checkpoint, "Hello", "-n", 20, *NUMPY)
    assert result.exit_code == 130
    assert "ended by interrupted" in result.stderr
    assert result.stdout
    assert whole.startswith(result.stdout.rstrip("\n").rstrip("\ufffd"))
    assert len(result.stdout) < len(whole)


def test_ctrl_c_while_loading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mambax, "load", interrupted)
    result = run("generate", checkpoint, "Hello")
    assert (result.exit_code, result.output) == (130, "")


# --- chat ------------------------------------------------------------------------------------------------------


def test_chat(checkpoint: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk"
    lines = [
        "/help",
        "Hello",
        f"/save {talk}",
        "More",
        "/undo",
        "/reset",
        f"/load {talk}",
        "/what",
        "/save",
        "/exit",
    ]
    flags = ["-n", 6, "--seed", 1, *NUMPY]
    result = run("chat", checkpoint, *flags, stdin="\n".join([*lines, "not said"]))
    assert result.exit_code == 0
    for part in ("no chat template", "forget the conversation", "(saved ", "(taken back)", "(loaded 1 turns"):
        assert part in result.stderr
    assert "error: there is no command /what; expected one of /reset" in result.stderr
    assert "error: /save needs a file" in result.stderr
    assert result.stderr.count("; text: 6 tokens") == 2
    saved = json.loads(talk.with_suffix(".json").read_text(encoding="utf-8"))
    first = saved["messages"][1]["content"]
    assert result.stdout.startswith(first)
    again = run("chat", checkpoint, *flags, "--quiet", "--load", talk, stdin="More\n")
    assert again.exit_code == 0
    assert again.stdout in result.stdout
    assert again.stderr == ""


def test_chat_goes_on_after_an_error(checkpoint: Path) -> None:
    with process("chat", checkpoint, "-n", 3, "--template", "chatml", *NUMPY) as started:
        out, err = started.communicate(b"/load nowhere\na\xff\n/undo\nHello\n")
    assert started.returncode == 0, err
    for part in (b"nowhere.json: no such file", b"is not Unicode", b"nothing to take back", b"text: 3 tokens"):
        assert part in err
    assert out.endswith(b"\n")


def test_chat_with_a_template_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8")
    result = run("chat", checkpoint, "-n", 2, "--template", path, "--system", "x", *NUMPY, stdin="Hello")
    assert result.exit_code == 0
    assert "no chat template" not in result.stderr
    failed(run("chat", checkpoint, "--template", "zefir", *NUMPY, stdin=""), "unknown chat template 'zefir'")


# --- info, convert ---------------------------------------------------------------------------------------------


def test_info(checkpoint: Path, model: Any) -> None:
    result = run("info", checkpoint)
    assert result.exit_code == 0
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.stdout.splitlines())
    count = sum(array.size for array in model.nn.parameters(model).values())
    assert rows["parameters"] == f"{count:,}"
    assert rows["size in float32"] == terminal.size(4 * count)
    assert rows["layout"] == "Hugging Face"
    assert (rows["family"], rows["d_model"], rows["n_layer"]) == ("Mamba-1", "16", "2")
    assert rows["weights"].startswith("model.safetensors, float32")
    assert EOS in rows["tokenizer"]
    assert state_bytes(Description(model.config), "float32") == model.init_state().get_cache_info().bytes
    narrow = mambax.load(checkpoint, backend="numpy", dtype="bfloat16")
    assert state_bytes(Description(model.config), "bfloat16") == narrow.init_state().get_cache_info().bytes
    held = sum(array.nbytes for array in narrow.nn.parameters(narrow).values())
    assert rows["size in bfloat16"] == terminal.size(held)


def test_info_checks_the_headers(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    failed(run("info", tmp_path), "missing: backbone.layers.2.")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}), encoding="utf-8")
    failed(run("info", tmp_path), "model_type 'llama' is not supported; supported are")


def test_convert(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    result = run("convert", checkpoint, tmp_path / "new", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "files, " in result.stderr
    new = mambax.load(tmp_path / "new", backend="numpy", dtype="float32")
    want, got = (m([[1, 2, 3]]).logits for m in (model, new))
    assert np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)
    failed(run("convert", checkpoint, checkpoint), "same folder")


# --- doctor ----------------------------------------------------------------------------------------------------


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert f"mambax {mambax.__version__}" in result.stdout
    assert f"mambax takes {mambax.default_backend()} on " in result.stdout
    for name in mambax.backend_names():
        expected = mambax.get_backend(name).version() if is_installed(name) else install_command(name)
        assert expected in result.stdout
    for op in ("selective_scan", "ssd"):
        assert re.search(rf"cpu +{op} +sequential +works, error \d\.\de-0\d", result.stdout)


@pytest.mark.parametrize("name", ["numpy", "torch", "mlx"])
def test_every_backend_says_what_runs_the_same_ops(name: str) -> None:
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    described = mambax.get_backend(name).describe()
    rows = ["device", "selective_scan", "causal_conv1d", "ssd", "products"]
    assert [row for row in described if row != "one token"] == rows
    assert all(described.values())


def test_doctor_sees_a_wrong_scan_and_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = mambax.get_backend("numpy")
    scan = numpy.selective_scan

    def planted(*arguments: Any, impl: str = "auto", **options: Any) -> Any:
        if impl == "pscan":
            raise RuntimeError("no such kernel")
        y, state = scan(*arguments, impl=impl, **options)
        return (y, state * 1.0001 if impl == "logcumsumexp" else state)

    monkeypatch.setattr(numpy, "selective_scan", planted)
    available = {"sequential": "", "pscan": "", "logcumsumexp": "", "metal": "needs an Apple GPU"}
    monkeypatch.setattr(numpy, "scan_implementations", lambda: available)
    found = {check.implementation: check for check in checks(numpy) if check.op == "selective_scan"}
    assert [found[name].failed for name in ("auto", "sequential", "pscan", "logcumsumexp", "metal")] == [
        False, False, True, True, False,
    ]  # fmt: skip
    assert found["metal"] == Check("numpy", "cpu", "selective_scan", "metal", None, "needs an Apple GPU")
    assert found["pscan"].reason == "RuntimeError: no such kernel"
    result = run("doctor")
    assert result.exit_code == 1
    assert "fails: RuntimeError: no such kernel" in result.stdout
    assert "WRONG, error" in result.stdout
    assert "not here: needs an Apple GPU" in result.stdout


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from mambax.cli import doctor

    monkeypatch.setattr(doctor, "is_installed", lambda name: name == "numpy")
    assert "torch  not installed: pip install torch" in run("doctor").stdout


# --- the terminal, and a real process --------------------------------------------------------------------------


def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a\x1b[31m\x07b\r\n\tc\x9b日"
    terminal.write(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal.write(text)
    assert capsys.readouterr().out == "a\\x1b[31m\\x07b\\x0d\n\tc\\x9b日"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**30, "5.0 GiB"), (2**52, "4096.0 TiB")],
)
def test_sizes(number: int, text: str) -> None:
    assert terminal.size(number) == text


@contextmanager
def process(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process of its own, which does not outlive the test."""
    command = [sys.executable, "-m", "mambax.cli", *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, env=environment, **(pipes | options)) as started:
        try:
            yield started
        finally:
            started.kill()


def test_a_process_writes_utf_8_and_loads_no_other_framework(checkpoint: Path, model: Any) -> None:
    with process("generate", checkpoint, "-n", 20, "-t", 1, "--seed", 4, *NUMPY) as started:
        out, err = started.communicate("日本".encode())
    assert started.returncode == 0, err
    text = model.generate("日本", max_new_tokens=20, temperature=1.0, seed=4).text
    assert out.decode("utf-8").replace("\r\n", "\n").removesuffix("\n") == text.removesuffix("\n")
    assert b"tokens/s" in err


def test_help_imports_little() -> None:
    code = (
        "import sys; from mambax.cli import app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'mlx', 'mlx.core', 'llvmlite', 'tokenizers', 'huggingface_hub', 'jinja2'}\n"
        "print(sorted((heavy | {'transformers'}) & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--version"], ["generate", "--version"]])
def test_version(arguments: list[str]) -> None:
    result = run(*arguments)
    if arguments == ["--version"]:
        assert (result.exit_code, result.stdout) == (0, f"mambax {mambax.__version__}\n")
    else:
        assert result.exit_code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_ctrl_c_in_a_process(checkpoint: Path) -> None:
    with process("generate", checkpoint, "Hello", "-n", 10**6, *NUMPY) as started:
        assert started.stdout is not None
        assert started.stdout.read(1)
        time.sleep(0.2)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert b"ended by interrupted" in err


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is told otherwise there")
def test_a_reader_that_goes_away(checkpoint: Path) -> None:
    with process("generate", checkpoint, "Hello", "-n", 10**6, *NUMPY) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.read(1)
        started.stdout.close()
        assert started.wait(timeout=60) == 1
        assert started.stderr.read() == b""
