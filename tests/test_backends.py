"""Finding backends, saying what is missing, and importing no more than is asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest
from harness import config_of

import mambax
from mambax import registry


def test_an_unknown_backend_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'jaxx'.*mlx.*numpy.*torch"):
        mambax.get_backend("jaxx")
    with pytest.raises(ValueError, match="jaxx"):
        mambax.from_config(config_of(), backend="jaxx")


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_missing_framework_is_named_with_its_command(monkeypatch, name):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=re.escape(registry.install_command(name))):
        mambax.get_backend(name)
    assert mambax.backend_names() == ("mlx", "numpy", "torch")


def test_the_default_backend_is_the_best_installed(monkeypatch):
    def machine(platform: str, architecture: str, *installed: str) -> str:
        monkeypatch.setattr(registry.sys, "platform", platform)
        monkeypatch.setattr(registry.platform, "machine", lambda: architecture)
        monkeypatch.setattr(registry, "is_installed", lambda name: name in installed)
        return mambax.default_backend()

    assert machine("darwin", "arm64", "torch", "mlx", "numpy") == "mlx"
    assert machine("darwin", "x86_64", "torch", "numpy") == "torch"
    assert machine("linux", "x86_64", "torch", "mlx", "numpy") == "torch"
    assert machine("linux", "x86_64", "mlx", "numpy") == "mlx"
    assert machine("win32", "AMD64", "numpy") == "numpy"


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "mlx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mambax_imports_no_framework():
    loaded = python("import mambax, sys; print(*sorted(m for m in sys.modules if '.' not in m))").split()
    hub = {"transformers", "tokenizers", "huggingface_hub", "jinja2"}
    heavy = {"torch", "mlx", "mlx_lm", "llvmlite", "rich"} | hub
    assert not heavy & set(loaded)


def test_everything_works_with_neither_framework_installed():
    code = """
    import mambax
    assert mambax.default_backend() == "numpy"
    for name in ("torch", "mlx"):
        try:
            mambax.get_backend(name)
        except ImportError as error:
            assert str(error).endswith(mambax.registry.install_command(name)), error
        else:
            raise SystemExit(f"{name} was not blocked")
    config = mambax.MambaLMConfig(d_model=8, n_layer=1, vocab_size=9)
    print(len(mambax.from_config(config).generate([1, 2], max_new_tokens=5).tokens))
    """
    assert python(BLOCKED + textwrap.dedent(code)).split() == ["5"]
