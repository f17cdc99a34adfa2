"""What each PTX instruction does, as the text of Python statements over all threads at once.

In that text R holds the registers, each an array of whole numbers without a sign with one for each thread, or of
truth values for a predicate; s is :class:`ptx.machine.Threads`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ptx import numbers
from ptx.text import Address, Instruction, Operand, Vector

TYPES = {
    **{f"{kind}{8 * size}": f"u{size}" for kind in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": f"i{size}" for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": f"f{size}" for size in (2, 4, 8)},
    "pred": "?", "bf16": "u2", "bf16x2": "u4", "f16x2": "u4",
}  # fmt: skip
"""How NumPy holds a type of PTX."""

PACKED = ("bf16", "bf16x2", "f16x2")
"""Types that NumPy cannot calculate in."""

REGISTERS = {"rs": 2, "h": 2, "r": 4, "f": 4, "rd": 8, "fd": 8, "p": 0}
"""Bytes of a register, by the letters of its name; a predicate has none."""

SPECIAL = {
    **{f"%{name}.{axis}": f"{name}_{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"},
    "%laneid": "lane",
}  # fmt: skip

SIGNS = {
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "lo": "<",
    "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip

PLAIN = {
    "abs": "np.abs(a)", "add": "a + b", "and": "a & b", "bfe": "field(a, b, c)", "copysign": "np.copysign(b, a)",
    "div": "quotient(a, b)", "max": "np.fmax(a, b)", "min": "np.fmin(a, b)", "neg": "-a",
    "not": "~a", "or": "a | b", "prmt": "permuted(a, b, c)", "rem": "a - quotient(a, b) * b",
    "selp": "np.where(c, a, b)", "shl": "shifted_left(a, b)", "shr": "shifted_right(a, b)", "sqrt": "np.sqrt(a)",
    "sub": "a - b", "xor": "a ^ b",
    "ex2": "roughly(np.exp2(a.astype('f8')), a, 2)", "lg2": "roughly(np.log2(a.astype('f8')), a, 2)",
    "rcp": "roughly(1 / a.astype('f8'), a, 1)", "rsqrt": "roughly(1 / np.sqrt(a.astype('f8')), a, 2)",
}  # fmt: skip
"""Instructions that do the same with every type that NumPy has."""

KNOWN = {"rn", "ftz", "approx", "full", "lo", "NaN", "relu"}
"""What may stand between the name of a plain instruction and its type."""

ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
"""To whole numbers, as floats or not."""

HELPERS = {name: value for name, value in vars(numbers).items() if callable(value) and name != "Any"}


def size_of(register: str) -> int:
    """Bytes of a register; 0 of a predicate."""
    letters = register[1:].partition("_")[0].rstrip("0123456789")
    if not register.startswith("%") or letters not in REGISTERS:
        raise NotImplementedError(f"register {register}")
    return REGISTERS[letters]


def filled(template: str, names: dict[str, str]) -> str:
    """The template with expressions in the place of its letters a, b and c."""
    return re.sub(r"\b([abc])\b", lambda found: f"({names[found[1]]})", template)


class Writer:
    """Writes statements; `names` is what they name besides R and s."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"np": np, **HELPERS}

    def constant(self, value: Any) -> str:
        name = f"K{len(self.names)}"
        self.names[name] = value
        return name

    # --- operands ----------------------------------------------------------------------------------------------

    def read(self, what: Operand, kind: str) -> str:
        """An operand as values of a PTX type."""
        dtype = TYPES[kind]
        if isinstance(what, (int, float)):
            return self.constant(_number(what, dtype))
        if isinstance(what, (Vector, Address)):
            raise NotImplementedError(f"{what} as a value")
        if what in SPECIAL:
            return f"s.{SPECIAL[what]}.astype({dtype!r})"
        if not what.startswith("%"):
            return self.constant(np.dtype(dtype).type(0))  # the only symbol is the start of shared memory
        if dtype == "?":
            return f"R[{what!r}]"
        size, held = int(dtype[1]), size_of(what)
        if size == held:
            return f"R[{what!r}].view({dtype!r})"
        if size > held:
            raise NotImplementedError(f"{what} as {kind}")
        return f"R[{what!r}].astype('u{size}').view({dtype!r})"

    def each(self, what: Operand, kind: str) -> list[str]:
        """The parts of a vector, or the one that is none, as values."""
        return [self.read(part, kind) for part in (what.parts if isinstance(what, Vector) else (what,))]

    def assign(self, target: Operand, expression: str, guard: str = "") -> str:
        """The statement that puts values in a register, or in those of a vector the items of a list."""
        if isinstance(target, Vector):
            each = (self.assign(part, f"got[{i}]", guard) for i, part in enumerate(target.parts))
            return "\n".join([f"got = {expression}", *each])
        if target == "_":
            return "pass"
        value = f"s.held({expression}, {size_of(str(target))})"
        if guard:
            value = f"np.where({self.truth(guard)}, {value}, R[{target!r}])"
        return f"R[{target!r}] = {value}"

    def truth(self, guard: str) -> str:
        """Where a guard lets through; None for everywhere."""
        if not guard:
            return "None"
        return f"~R[{guard[1:]!r}]" if guard.startswith("!") else f"R[{guard!r}]"

    def place(self, address: Operand, space: str) -> str:
        """Addresses of every lane."""
        if not isinstance(address, Address):
            raise NotImplementedError(f"{address} as an address")
        kind = "s64" if space == "global" else "s32"
        offset = self.constant(np.dtype(TYPES[kind]).type(address.offset))
        return f"s.full({self.read(address.base, kind)} + {offset})"

    # --- instructions ------------------------------------------------------------------------------------------

    def written(self, it: Instruction) -> str:
        """The statements of one instruction.

        Raises:
            NotImplementedError: for one that Triton made of no kernel of mambax so far.
        """
        special = getattr(self, f"_{it.parts[0]}", None)
        if special is not None:
            return special(it)
        if it.parts[0] not in PLAIN:
            raise NotImplementedError(it.line)
        return self._plain(it, PLAIN[it.parts[0]])

    def _plain(self, it: Instruction, template: str) -> str:
        name, kind, given = it.parts[0], it.parts[-1], it.operands[1:]
        if set(it.parts[1:-1]) - KNOWN:
            raise NotImplementedError(it.line)
        if "NaN" in it.parts:
            template = {"np.fmax(a, b)": "np.maximum(a, b)", "np.fmin(a, b)": "np.minimum(a, b)"}[template]
        if "relu" in it.parts:
            template = f"np.maximum({template}, 0)"
        if kind in PACKED:
            return self._packed(it, template)

        def kind_of(i: int) -> str:
            if (name in ("shl", "shr") and i == 1) or (name == "bfe" and i > 0):
                return "b32"
            return "pred" if name == "selp" and i == 2 else kind

        names = {letter: self.read(x, kind_of(i)) for i, (letter, x) in enumerate(zip("abc", given, strict=False))}
        if "ftz" not in it.parts:
            return self.assign(it.operands[0], filled(template, names), it.guard)
        names = {letter: f"flushed({text})" for letter, text in names.items()}
        return self.assign(it.operands[0], f"flushed({filled(template, names)})", it.guard)

    def _packed(self, it: Instruction, template: str) -> str:
        """In bfloat16, or in two numbers of 16 bits side by side, by way of float32."""
        kind, (target, *given) = it.parts[-1], it.operands
        wide, narrow = "{}.view('f2').astype('f4')", "({}).astype('f2').view('u2')"
        if kind.startswith("bf16"):
            wide, narrow = "from_bf16({})", "to_bf16({})"

        def calculated(part: str) -> str:
            texts = (wide.format(part.format(self.read(x, kind))) for x in given)
            return narrow.format(filled(template, dict(zip("abc", texts, strict=False))))

        if kind == "bf16":
            return self.assign(target, calculated("{}"), it.guard)
        return self.assign(
            target, f"joined({calculated('halves({})[0]')}, {calculated('halves({})[1]')})", it.guard
        )

    def _mul(self, it: Instruction) -> str:
        return self._product(it, "a * b")

    def _mad(self, it: Instruction) -> str:
        return self._product(it, "a * b + c")

    def _product(self, it: Instruction, template: str) -> str:
        """Of whole numbers the lower half, the upper half, or all."""
        kind, (target, *given) = it.parts[-1], it.operands
        if "wide" not in it.parts and "hi" not in it.parts:
            return self._plain(it, template)
        wide = kind[0] + str(2 * int(kind[1:]))
        names = {
            letter: f"{self.read(x, kind)}.astype({TYPES[wide]!r})" for letter, x in zip("ab", given, strict=False)
        }
        if "wide" in it.parts:
            names["c"] = self.read(given[2], wide) if len(given) > 2 else ""
            return self.assign(target, filled(template, names), it.guard)
        if len(given) > 2:
            raise NotImplementedError(it.line)
        shift = self.constant(np.dtype(TYPES[wide]).type(int(kind[1:])))
        return self.assign(target, f"({filled(template, names)} >> {shift}).astype({TYPES[kind]!r})", it.guard)

    def _fma(self, it: Instruction) -> str:
        return self._plain(it, "a * b + c" if it.parts[-1] in PACKED else "fma(a, b, c)")

    def _setp(self, it: Instruction) -> str:
        sign, kind = it.parts[1], it.parts[-1]
        if set(it.parts[2:-1]) - {"ftz"} or len(it.operands) != 3:
            raise NotImplementedError(it.line)
        a, b = (self.read(x, kind) for x in it.operands[1:])
        if "ftz" in it.parts:
            a, b = f"flushed({a})", f"flushed({b})"
        if kind == "bf16":
            a, b = f"from_bf16({a})", f"from_bf16({b})"
        either = f"(np.isnan({a}) | np.isnan({b}))"
        if sign in ("nan", "num"):
            text = either if sign == "nan" else f"~{either}"
        elif sign in SIGNS:
            text = f"({a} {SIGNS[sign]} {b})"
            if sign == "ne" and "f" in kind:
                text += f" & ~{either}"
        else:
            text = f"({a} {SIGNS[sign.removesuffix('u')]} {b}) | {either}"
        return self.assign(it.operands[0], text, it.guard)

    def _mov(self, it: Instruction) -> str:
        kind, (target, source) = it.parts[-1], it.operands
        dtype = np.dtype(TYPES[kind])
        if isinstance(target, Vector):
            size = int(kind[1:]) // len(target.parts)
            shifts = (self.constant(dtype.type(size * i)) for i in range(len(target.parts)))
            pieces = (f"({self.read(source, kind)} >> {shift}).astype('u{size // 8}')" for shift in shifts)
            return self.assign(target, f"[{', '.join(pieces)}]", it.guard)
        if isinstance(source, Vector):
            size = int(kind[1:]) // len(source.parts)
            pieces = (
                f"({text}.astype({dtype.str!r}) << {self.constant(dtype.type(size * i))})"
                for i, text in enumerate(self.each(source, f"b{size}"))
            )
            return self.assign(target, " | ".join(pieces), it.guard)
        return self.assign(target, self.read(source, kind), it.guard)

    def _cvt(self, it: Instruction) -> str:
        (to, source), (target, *given) = it.parts[-2:], it.operands
        if to in ("bf16x2", "f16x2"):
            narrow = "to_bf16({})" if to == "bf16x2" else "{}.astype('f2').view('u2')"
            high, low = (narrow.format(self.read(x, source)) for x in given)
            return self.assign(target, f"joined({low}, {high})", it.guard)
        x = self.read(given[0], source)
        if source == "bf16":
            x, source = f"from_bf16({x})", "f32"
        if "ftz" in it.parts and source == "f32":
            x = f"flushed({x})"
        for rounding in ROUNDINGS.keys() & it.parts:
            x = f"{ROUNDINGS[rounding]}({x})"
        if set(it.parts[1:-2]) - {"rn", "rna", "ftz", *ROUNDINGS}:
            raise NotImplementedError(it.line)
        if to == "tf32":
            text = f"to_tf32({x}, {'rna' in it.parts})"
        elif to == "bf16":
            text = f"to_bf16({x}.astype('f4'))"
        elif TYPES[to][0] in "ui" and TYPES[source][0] == "f":
            text = f"whole({x}, {TYPES[to]!r})"
        else:
            text = f"{x}.astype({TYPES[to]!r})"
        return self.assign(target, text, it.guard)

    def _shfl(self, it: Instruction) -> str:
        how, (target, source, lane, clamp, members) = it.parts[2], it.operands
        if clamp != (0 if how == "up" else 31) or members != -1 or it.guard:
            raise NotImplementedError(it.line)
        return self.assign(target, f"s.shuffled({how!r}, {self.read(source, 'b32')}, {self.read(lane, 'b32')})")

    # --- memory ------------------------------------------------------------------------------------------------

    def _ld(self, it: Instruction) -> str:
        space, kind, (target, address) = it.parts[1].split("::")[0], it.parts[-1], it.operands[:2]
        if space == "param":
            name = address.base if isinstance(address, Address) else ""
            return self.assign(target, f"s.full(s.launch.values[{name!r}]).astype({TYPES[kind]!r})", it.guard)
        count = len(target.parts) if isinstance(target, Vector) else 1
        call = f"s.load_{space}({self.place(address, space)}, {TYPES[kind]!r}, {count}, {self.truth(it.guard)})"
        return self.assign(target, call if isinstance(target, Vector) else f"{call}[0]", it.guard)

    def _st(self, it: Instruction) -> str:
        space, kind, (address, source) = it.parts[1].split("::")[0], "b" + it.parts[-1][1:], it.operands[:2]
        values = ", ".join(f"s.full({text})" for text in self.each(source, kind))
        return f"s.store_{space}({self.place(address, space)}, [{values}], {self.truth(it.guard)})"

    def _cp(self, it: Instruction) -> str:
        if it.name == "cp.async.commit_group" and not it.guard:
            return "s.commit()"
        if it.name == "cp.async.wait_group" and not it.guard:
            return f"s.arrive({it.operands[0]})"
        if it.name not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
            raise NotImplementedError(it.line)
        to, source, size, *rest = it.operands
        if size not in (4, 8, 16):
            raise NotImplementedError(it.line)
        count = self.read(rest[0] if rest else size, "b32")
        places = f"{self.place(to, 'shared')}, {self.place(source, 'global')}"
        return f"s.copy({places}, {size}, s.full({count}), {self.truth(it.guard)})"

    def _bar(self, it: Instruction) -> str:
        whom = {"bar.sync": (0,), "bar.warp.sync": (-1,)}
        if it.guard or it.operands != whom.get(it.name):
            raise NotImplementedError(it.line)
        return f"s.wait(of_block={it.parts[1] == 'sync'})"

    def _fence(self, it: Instruction) -> str:
        if it.guard:
            raise NotImplementedError(it.line)
        return "s.fence()" if it.name.startswith("fence.proxy.async") else "pass"

    # --- matrices ----------------------------------------------------------------------------------------------

    def _ldmatrix(self, it: Instruction) -> str:
        target, address = it.operands
        if not isinstance(target, Vector) or it.guard or not {"m8n8", "b16"} <= set(it.parts):
            raise NotImplementedError(it.line)
        place = self.place(address, "shared")
        return self.assign(target, f"s.load_matrices({place}, {len(target.parts)}, {'trans' in it.parts})")

    def _stmatrix(self, it: Instruction) -> str:
        address, source = it.operands
        if it.guard or not {"m8n8", "b16"} <= set(it.parts):
            raise NotImplementedError(it.line)
        values = ", ".join(self.each(source, "b32"))
        return f"s.store_matrices({self.place(address, 'shared')}, [{values}], {'trans' in it.parts})"

    def _mma(self, it: Instruction) -> str:
        *_, shape, _, _, sums, left, right, plus = it.parts
        if (sums, plus) != ("f32", "f32") or left != right or it.guard:
            raise NotImplementedError(it.line)
        target, *given = it.operands
        lists = ", ".join(f"[{', '.join(self.each(x, 'b32'))}]" for x in given)
        return self.assign(target, f"s.product({shape!r}, {left!r}, {lists})")

    def _wgmma(self, it: Instruction) -> str:
        if it.guard:
            raise NotImplementedError(it.line)
        if it.parts[1] != "mma_async":
            return "pass"  # a product is there at once
        target, a, b, add, sign_a, sign_b, *turned = it.operands
        *_, shape, sums, left, right = it.parts
        if (sign_a, sign_b, sums) != (1, 1, "f32") or left != right:
            raise NotImplementedError(it.line)
        turned = [*[0] * (2 - len(turned)), *turned]  # of A in registers nothing is said, and nothing of TF32
        first = f"[{', '.join(self.each(a, 'b32'))}]" if isinstance(a, Vector) else self.read(a, "b64")
        sums = "None" if add == 0 else f"[{', '.join(self.each(target, 'b32'))}]"
        call = f"{shape!r}, {left!r}, {first}, {self.read(b, 'b64')}, {sums}, {self.read(add, 'pred')}, {turned}"
        return self.assign(target, f"s.group_product({call})")


def _number(what: int | float, dtype: str) -> Any:
    """A constant of an instruction as NumPy's."""
    if isinstance(what, float):
        return np.dtype(dtype).type(what) if dtype[0] == "f" else np.float32(what).view(dtype)
    if dtype == "?":
        return np.bool_(what)
    size = int(dtype[1])
    return np.array(what % (1 << 8 * size), f"u{size}").view(dtype)[()]
