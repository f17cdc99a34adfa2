"""What ``--quiet`` leaves on stderr: nothing, the choice of a backend included; and files that are no templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner
from vocabularies import EOS, byte_level

import mambax
from mambax.cli import app
from mambax.cli.chat import _template
from mambax.registry import default_backend


@pytest.mark.parametrize("command", [["generate"], ["chat"]], ids=" ".join)
def test_nothing_is_said_of_the_backend(command: list[str], tmp_path: Path) -> None:
    tok = mambax.Tokenizer(byte_level(), eos_token=EOS)
    config = mambax.MambaLMConfig(d_model=16, n_layer=1, d_state=4, vocab_size=tok.vocab_size)
    model = mambax.from_config(config, backend="numpy")
    model.tokenizer = tok
    mambax.save_pretrained(model, tmp_path)
    arguments = [*command, str(tmp_path), "-n", "3", "-t", "0"]
    told = CliRunner().invoke(app, arguments, input="Hello\n")
    assert told.exit_code == 0, told.stderr
    assert told.stderr.count(f"using the {default_backend()} backend") == 1
    quiet = CliRunner().invoke(app, [*arguments, "--quiet"], input="Hello\n")
    assert quiet.exit_code == 0, quiet.stderr
    assert (quiet.stdout, quiet.stderr) == (told.stdout, "")


def test_files_that_are_no_templates(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}", "utf-8")
    assert _template(str(path)) == "{{ messages }}"
    assert _template("chatml") == "chatml"
    path.write_text("once upon a time\n" * 100, "utf-8")
    with pytest.raises(ValueError, match=r"template\.jinja: expected a Jinja template, found text without {{"):
        _template(str(path))
    path.write_bytes(b"{{ \xff }}")
    with pytest.raises(ValueError, match=r"template\.jinja: expected a Jinja template in UTF-8"):
        _template(str(path))
