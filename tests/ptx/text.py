"""Reads the PTX of one kernel, as Triton's compiler writes it.

PTX: NVIDIA, "Parallel Thread Execution ISA", version 9.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple, Union


class Vector(NamedTuple):
    """Several registers as one operand."""

    parts: tuple[Operand, ...]


class Address(NamedTuple):
    """A place in memory: a register or the name of a symbol, and bytes from there."""

    base: str
    offset: int


Operand = Union[str, int, float, Vector, Address]  # noqa: UP007 named before they are there
"""A string is a register, a special register, a symbol or a label."""


class Instruction(NamedTuple):
    """One statement. Its guard is a predicate, behind "!" where that must be false; none is ""."""

    guard: str
    name: str
    operands: tuple[Operand, ...]
    line: str

    @property
    def parts(self) -> list[str]:
        """The name and what follows it between dots."""
        return self.name.split(".")


class Kernel(NamedTuple):
    """The bytes of each parameter, the instructions, and the index of that behind each label."""

    parameters: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int]


LETTERS = {"pred": "p"} | {
    f"{kind}{size}": letters for size, letters in ((8, "rs"), (16, "rs"), (32, "r"), (64, "rd")) for kind in "busf"
}
"""What the names of registers begin with, by their types."""

SIZES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "u16": 2, "u8": 1}


def operand(text: str) -> Operand:
    """What one operand says."""
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(operand(part) for part in text[1:-1].split(",")))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset, 0) if offset else 0)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return struct.unpack(">f", bytes.fromhex(text[2:]))[0]
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


def instruction(text: str) -> Instruction:
    """One statement, of which only the semicolon is left out."""
    text = " ".join(text.split())
    guard, _, rest = text[1:].partition(" ") if text.startswith("@") else ("", "", text)
    name, _, operands = rest.strip().partition(" ")
    split = re.split(r",\s*(?![^{\[]*[}\]])", operands)  # at commas that no bracket holds
    return Instruction(guard, name, tuple(operand(part) for part in split if part.strip()), text)


def parse(ptx: str) -> Kernel:
    """The only kernel of a module.

    Raises:
        ValueError: when there is none.
    """
    found = re.search(r"\.visible \.entry \w+\((.*?)\)(.*?)// -- End function", ptx, re.DOTALL)
    if found is None:
        raise ValueError("expected PTX with a .visible .entry, found none")
    head, body = found.groups()
    for kind, name in set(re.findall(r"\.reg \.(\w+)\s+([a-z]\w*)<", body)):  # of a block of its own
        body = re.sub(rf"(?<![%.\w]){name}(\d+)\b", rf"%{LETTERS[kind]}_{name}\1", body)
    parameters = {name: SIZES[kind] for kind, name in re.findall(r"\.param \.(\w+)\b.*?(\w+_param_\d+)", head)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    begun = ""
    for line in re.sub(r"//.*", "", body).splitlines():
        text = line.strip()
        if re.fullmatch(r"[\w$]+:", text):
            labels[text[:-1]] = len(instructions)
        elif begun or not text.startswith("."):
            *whole, begun = (f"{begun} {text}").split(";")
            stripped = (each.strip(" {}") if each.count("{") != each.count("}") else each.strip() for each in whole)
            instructions += [instruction(each) for each in stripped if each and not each.startswith(".")]
            begun = begun.strip(" {}\t")
    return Kernel(parameters, instructions, labels)
