"""What is shipped: the wheel's content and entry points, one source for the version, pins that fit the ranges."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mambax

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
in_source_tree = pytest.mark.skipif(
    not (ROOT / "mambax").is_dir() or not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree"
)
ENVIRONMENTS = [
    {"python_version": version, "python_full_version": f"{version}.9", "sys_platform": system, "os_name": "posix"}
    | {"platform_machine": "x86_64" if system == "linux" else "arm64"}
    for version in ("3.10", "3.11", "3.12", "3.13")
    for system in ("linux", "darwin")
]

WITHOUT_FRAMEWORKS = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "mlx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Missing())
import mambax

assert mambax.__file__.startswith(sys.argv[1]), mambax.__file__
assert mambax.default_backend() == "numpy"
config = mambax.MambaLMConfig(d_model=8, n_layer=1, vocab_size=11)
assert len(mambax.from_config(config).generate([1, 2], max_new_tokens=3).tokens) == 3
for name in ("torch", "mlx"):
    try:
        mambax.get_backend(name)
    except ImportError as error:
        assert str(error).endswith(mambax.registry.install_command(name)), error
    else:
        raise SystemExit(f"{name} was imported")
"""


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    """Everything that mambax and its extras ask for, other than mambax."""
    project = pyproject()["project"]
    texts = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    return [r for r in map(Requirement, texts) if r.name != "mambax"]


def pins(environment: dict[str, str]) -> dict[str, str]:
    """name -> version in constraints.txt, where its markers hold."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            assert canonicalize_name(pin.name) not in found, f"{pin.name} is pinned twice for {environment}"
            found[canonicalize_name(pin.name)] = specifier.version
    return found


@in_source_tree
def test_the_version_has_one_source() -> None:
    project = pyproject()
    assert "version" in project["project"]["dynamic"]
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "mambax/__init__.py"
    places = [
        path
        for path in [*ROOT.glob("mambax/**/*.py"), *ROOT.glob("backends/**/*.py")]
        if re.search(r"^__version__\s*=", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert places == [ROOT / "mambax" / "__init__.py"]


def test_the_installed_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("mambax") == mambax.__version__


def test_entry_points_load() -> None:
    points = importlib.metadata.entry_points()
    scripts = [
        p for p in points.select(group="console_scripts", name="mambax") if p.dist and p.dist.name == "mambax"
    ]
    assert scripts
    assert callable(scripts[0].load())
    assert {"numpy", "torch", "mlx"} <= set(mambax.backend_names())
    assert mambax.get_backend("numpy").name == "numpy"


@in_source_tree
def test_every_backend_is_shipped() -> None:
    packages = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    folders = {f"backends/{path.parent.name}" for path in ROOT.glob("backends/*/__init__.py")}
    assert set(packages) == {"mambax"} | folders


@in_source_tree
def test_the_wheel_has_the_packages_and_nothing_else() -> None:
    shipped = {Path(file.distribution_path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    sources = {
        path.relative_to(ROOT if base == "." else ROOT / base)
        for base, pattern in ((".", "mambax/**/*.py"), ("backends", "mambax_*/**/*.py"))
        for path in (ROOT / base).glob(pattern)
    }
    assert sources <= shipped
    assert {path.parts[0] for path in shipped} == {path.parts[0] for path in sources}
    assert not [path for path in shipped if "__pycache__" in path.parts or path.suffix in (".pyc", ".so")]


@in_source_tree
def test_a_built_wheel_works_without_frameworks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("mambax-*.whl")
    assert wheel.name == f"mambax-{mambax.__version__}-py3-none-any.whl"
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (information,) = site.glob("*.dist-info")
    assert (information / "licenses" / "LICENSE").is_file()
    assert "mambax = mambax.cli:main" in (information / "entry_points.txt").read_text(encoding="utf-8")

    script = f"import sys; sys.path.insert(0, sys.argv[1])\n{WITHOUT_FRAMEWORKS}"
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, str(site)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


@in_source_tree
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: f"{e['sys_platform']}-{e['python_version']}")
def test_constraints_pin_every_dependency_within_its_range(environment: dict[str, str]) -> None:
    pinned = pins(environment)
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement} has no pin; see the first lines of constraints.txt"
            assert requirement.specifier.contains(version), f"{requirement}, but pinned is {version}"
    assert pinned["torch"] == "2.13.0"
