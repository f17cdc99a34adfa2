"""Compiles the Triton scan for an H100 where there need be none, and prints what the machine code is like, as JSON.

A program of its own: in a process that interprets Triton's kernels they cannot be compiled. Needs Triton 3.3 or
newer with the tools that its wheels for Linux contain.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from mambax_torch.kernels import scan_adjoint, scan_backward, scan_carry, scan_forward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NARROW = ("u", "delta", "z", "y", "B", "C", "dy", "du", "ddelta", "dz")
FLAGS = {"mask": None, "boundaries": None}
SHAPE = {"SOFTPLUS": True, "EVEN_N": True, "BN": 16}
KERNELS = {
    "output": (scan_forward.output_kernel, FLAGS | SHAPE | {"BD": 64, "SIDE": 2, "INTERVAL": 64, "saved": None}),
    "output saving states": (scan_forward.output_kernel, FLAGS | SHAPE | {"BD": 64, "SIDE": 2, "INTERVAL": 64}),
    "advance": (scan_forward.advance_kernel, FLAGS | SHAPE | {"BD": 64, "SIDE": 2}),
    "carry": (scan_carry.carry_kernel, {"BACKWARDS": True, "ROWS": 16, "BD": 32}),
    "adjoint": (scan_adjoint.adjoint_kernel, FLAGS | SHAPE | {"BD": 64, "SIDE": 2}),
    "gradient": (
        scan_backward.gradient_kernel,
        FLAGS | SHAPE | {"BD": 32, "INTERVAL": 64, "EVEN_T": True, "ONCE": True},
    ),
}


def source(kernel: Any, constants: dict[str, Any]) -> ASTSource:
    """A kernel as for contiguous bfloat16 arrays whose sizes are multiples of 16."""
    floats = {
        "A",
        "skip",
        "bias",
        "starts",
        "final",
        "saved",
        "ends",
        "sums",
        "first",
        "before",
        "last",
        "adjoints",
    }
    floats |= {"scratch", "dB", "dC", "dskip", "dbias"}
    signature, multiples = {}, {}
    for number, parameter in enumerate(kernel.params):
        name = parameter.name
        kind = "*bf16" if name in NARROW else "*fp32" if name in floats else "i32"
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and not parameter.do_not_specialize:
            multiples[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=multiples)


def described(kernel: Any, constants: dict[str, Any]) -> dict[str, int]:
    """Of a kernel's machine code: registers, bytes of local memory, shuffles, and what its longest loop holds."""
    options = {"num_warps": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source(kernel, constants), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", what, file], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(
            f"cuobjdump -res-usage said nothing of registers; expected REG and STACK, found: {usage!r}"
        )
    counts = {"registers": int(found[1]), "local": int(found[2]), "shuffles": code.count("SHFL.BFLY")}
    return counts | longest_loop(code)


def longest_loop(code: str) -> dict[str, int]:
    """Instructions, and exponentials and the like, of the longest loop that has no other within."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    jumps = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(first, last) for first, last in jumps if first < last]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    body = [text for at, text in lines if first <= at <= last]
    return {"loop": len(body), "special": sum("MUFU" in text for text in body)}


if __name__ == "__main__":
    if not (TOOLS / "cuobjdump").exists() or not (TOOLS / "ptxas").exists():
        print(f"Triton's ptxas and cuobjdump are not in {TOOLS}")
        sys.exit(3)
    print(json.dumps({name: described(*kernel) for name, kernel in KERNELS.items()}))
