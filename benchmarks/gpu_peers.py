"""Other packages on the GPU: mamba_ssm and causal_conv1d, compiled from their source distributions.

``--peers FOLDER`` holds ``mamba_ssm-*.tar.gz`` and ``causal_conv1d-*.tar.gz`` as on PyPI, and in ``site`` what
else is to be importable, such as einops. They are unpacked and compiled in ``build`` beside them, for this chip
alone; of mamba_ssm's scan real bfloat16 and float32 alone, of causal_conv1d the dtypes of a model in bfloat16, in
float32 and under autocast: the rest takes as long again and twice as long, and nothing here calls it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

from benchmarks.contender import Unavailable

PACKAGES = ("causal_conv1d", "mamba_ssm")
SCAN = "csrc/selective_scan/"
SCAN_SOURCES = tuple(
    SCAN + name
    for name in (
        "selective_scan.cpp", "selective_scan_fwd_bf16.cu", "selective_scan_fwd_fp32.cu",
        "selective_scan_bwd_bf16_real.cu", "selective_scan_bwd_fp32_real.cu",
    )
)  # fmt: skip
CONV_SOURCES = tuple(f"csrc/causal_conv1d{name}" for name in (".cpp", "_fwd.cu", "_bwd.cu", "_update.cu"))
EXTENSIONS = {
    "causal_conv1d_cuda": ("causal_conv1d", CONV_SOURCES, "csrc"),
    "selective_scan_cuda": ("mamba_ssm", SCAN_SOURCES, SCAN),
}
"""Name of the compiled module -> its package, what is compiled, and where its headers are."""

NVCC = (
    "-O3", "-std=c++17", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math",
)  # fmt: skip
"""The flags of both packages' own setup.py, without line numbers for debuggers."""

MISSING_SCAN = """\
// The dtypes that are not compiled here: selective_scan.cpp names them all.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
#include <torch/python.h>
#include <c10/cuda/CUDAStream.h>
#include "selective_scan.h"
template <typename input_t, typename weight_t>
void selective_scan_fwd_cuda(SSMParamsBase &params, cudaStream_t stream) {
    TORCH_CHECK(false, "this dtype was left out of the build");
}
template <typename input_t, typename weight_t>
void selective_scan_bwd_cuda(SSMParamsBwd &params, cudaStream_t stream) {
    TORCH_CHECK(false, "this dtype was left out of the build");
}
using complex_t = c10::complex<float>;
template void selective_scan_fwd_cuda<at::Half, float>(SSMParamsBase &, cudaStream_t);
template void selective_scan_fwd_cuda<at::Half, complex_t>(SSMParamsBase &, cudaStream_t);
template void selective_scan_bwd_cuda<at::Half, float>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::Half, complex_t>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::BFloat16, complex_t>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<float, complex_t>(SSMParamsBwd &, cudaStream_t);
"""


CONV_DTYPES = ("float, float", "at::BFloat16, at::BFloat16", "at::BFloat16, float")
"""Inputs and weights that causal_conv1d is compiled for; its last lines name nine pairs for each function."""

CONV_INSTANCE = re.compile(r"^template void (\w+)<(.+)>\((\w+) &params, cudaStream_t stream\);$", re.MULTILINE)

MISSING_CONV = """\
// The dtypes that are not compiled here: causal_conv1d.cpp names them all.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/python.h>
#include <c10/cuda/CUDAStream.h>
#include "causal_conv1d.h"
"""
MISSING_FUNCTION = """\
template <typename input_t, typename weight_t>
void {name}({parameters} &params, cudaStream_t stream) {{
    TORCH_CHECK(false, "this dtype was left out of the build");
}}
"""


def without_other_dtypes(source: str) -> tuple[str, str]:
    """A source of causal_conv1d for :data:`CONV_DTYPES` alone, and definitions of what it lacks."""
    lacking = [found for found in CONV_INSTANCE.finditer(source) if found[2] not in CONV_DTYPES]
    functions = dict.fromkeys((found[1], found[3]) for found in lacking)
    bodies = (MISSING_FUNCTION.format(name=name, parameters=kind) for name, kind in functions)
    kept = CONV_INSTANCE.sub(lambda found: found[0] if found[2] in CONV_DTYPES else "", source)
    return kept, "".join([*bodies, *(f"{found[0]}\n" for found in lacking)])


def _write(file: Path, text: str) -> None:
    """Write a file that has another text: whatever is written is compiled again."""
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _files(root: Path, package: str, sources: tuple[str, ...]) -> list[str]:
    """What is compiled of a package; files that leave dtypes out are written beside its own."""
    folder = (root / sources[0]).parent
    if package == "mamba_ssm":
        own, missing = list(sources), MISSING_SCAN
    else:
        own, missing = [sources[0]], MISSING_CONV
        for name in sources[1:]:
            kept, lacking = without_other_dtypes((root / name).read_text(encoding="utf-8"))
            missing += lacking
            own.append(name.replace(".cu", "_kept.cu"))
            _write(root / own[-1], kept)
    rest = folder / "left_out.cpp"
    _write(rest, missing)
    return [*(str(root / name) for name in own), str(rest)]


def unpacked(folder: Path, package: str) -> Path:
    """The source tree of a package, unpacked from its source distribution.

    Raises:
        Unavailable: when there is no source distribution, or it lacks a file of the recipe.
    """
    archives = sorted(folder.glob(f"{package}-*.tar.gz"))
    if not archives:
        raise Unavailable(
            f"{folder.name} has no {package}-*.tar.gz: pip download {package} --no-deps --no-binary :all: "
            "--no-build-isolation"
        )
    root = folder / "build" / archives[-1].name.removesuffix(".tar.gz")
    if not root.exists():
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(root.parent, filter="data")
    for own, sources, _ in EXTENSIONS.values():
        lacking = [name for name in sources if own == package and not (root / name).exists()]
        if lacking:
            raise Unavailable(f"{archives[-1].name} lacks {', '.join(lacking)}, which the recipe compiles")
    return root


def build(folder: Path, name: str) -> Any:
    """The compiled module `name` of :data:`EXTENSIONS`, compiled unless it was before.

    Raises:
        Unavailable: when there is no compiler for it, or it does not compile, with what was said last.
    """
    import torch
    from torch.utils import cpp_extension

    package, sources, include = EXTENSIONS[name]
    root = unpacked(folder, package)
    if not torch.cuda.is_available():
        raise Unavailable(f"{name} is compiled for the GPU at hand, and there is none")
    if cpp_extension.CUDA_HOME is None:
        raise Unavailable(f"{name} needs CUDA's compiler, and there is no nvcc here")
    files = _files(root, package, sources)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability()))
    target = folder / "build" / name
    target.mkdir(parents=True, exist_ok=True)
    try:
        return cpp_extension.load(
            name, files, extra_cflags=["-O3", "-std=c++17"], extra_cuda_cflags=list(NVCC),
            extra_include_paths=[str(root / include)], build_directory=str(target),
        )  # fmt: skip
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
        raise Unavailable(f"{name} does not compile here: {lines[0][:200]}") from error


def add_site(folder: Path | None) -> None:
    """Let what is in ``site`` be imported, after what is installed."""
    site = None if folder is None else folder / "site"
    if site is not None and site.is_dir() and str(site) not in sys.path:
        sys.path.append(str(site))


def use(folder: Path | None, *, compiled: bool = True) -> None:
    """Let the packages of a folder be imported.

    Args:
        folder: as of ``--peers``; None leaves what is installed.
        compiled: False does without the compiled modules: mamba_ssm's Triton parts need none.

    Raises:
        Unavailable: saying what is missing.
    """
    if folder is None:
        return
    add_site(folder)
    for package in PACKAGES:
        root = unpacked(folder, package)
        if package not in sys.modules:
            # not by its __init__, which imports every family it has and what those need
            module = types.ModuleType(package)
            module.__path__ = [str(root / package)]
            sys.modules[package] = module
    for name in EXTENSIONS if compiled else ():
        if name not in sys.modules:
            sys.modules[name] = build(folder, name)
    if compiled:
        interface = load("causal_conv1d.causal_conv1d_interface", folder=None)
        package_module = sys.modules["causal_conv1d"]
        for function in ("causal_conv1d_fn", "causal_conv1d_update"):
            setattr(package_module, function, getattr(interface, function))


def load(module: str, *, folder: Path | None, compiled: bool = True) -> Any:
    """A module of another package.

    Raises:
        Unavailable: when it cannot be imported, with the reason.
    """
    if folder is not None:
        use(folder, compiled=compiled)
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise Unavailable(f"{module} cannot be imported: {type(error).__name__}: {str(error)[:200]}") from error
