"""The pickles of torch checkpoints, read by a machine that can build tensors and nothing else.

A pickle is a program. The standard library's unpickler runs it with everything that Python can import; here the
few instructions that describe a dictionary of tensors are carried out on plain lists and dictionaries, and any
other instruction or name ends the reading. No name is ever looked up in a module, so there is nothing to call.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class StorageRef:
    """A block of elements that a pickle refers to.

    Args:
        kind: the name of its torch class, ``"FloatStorage"``.
        key: names the block in its container.
        numel: number of elements.
    """

    kind: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor over a storage; offset and strides count elements. Nothing about it has been checked."""

    storage: StorageRef
    offset: object
    shape: object
    strides: object


@dataclass(frozen=True)
class _Global:
    """A name that a pickle mentions. It stands for itself: nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


STORAGES = (
    "FloatStorage", "HalfStorage", "BFloat16Storage", "DoubleStorage", "LongStorage", "IntStorage", "ShortStorage",
    "CharStorage", "ByteStorage", "BoolStorage",
)  # fmt: skip
"""The names in ``torch`` that say what a storage holds."""

_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip


def load(data: bytes, start: int, where: str) -> tuple[Any, int]:
    """Read one pickle.

    Args:
        data: bytes that hold it; others may follow.
        start: where in ``data`` it begins.
        where: the file, for messages.

    Returns:
        What it describes: dictionaries with keys that are strings, lists, tuples, numbers, strings and
        :class:`TensorRef`; and where it ends.

    Raises:
        ValueError: for a pickle that needs anything else, naming it, and for one that is damaged.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    machine = _Machine(where)
    try:
        for op, argument, _ in pickletools.genops(stream):
            machine.step(op.name, argument)
    except IndexError as error:
        raise ValueError(
            f"{where}: the pickle is damaged: it takes more from its stack than it put there"
        ) from error
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: the pickle is damaged: {error}; download the file again") from error
    return machine.result, stream.tell()


class _Machine:
    """The stack, the marks and the memo of the pickle protocol."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.result: Any = None
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> NoReturn:
        """End the reading."""
        raise ValueError(
            f"{self.where}: refused: the pickle {what}, which a dictionary of tensors does not need. Nothing of it "
            "was run. Use a safetensors version of these weights, or save the plain state_dict() again"
        )

    def step(self, op: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self.stack
        if op in _VALUES:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op in _TUPLES:
            self.stack[-_TUPLES[op] :] = [tuple(self._last(_TUPLES[op]))]
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            if int(argument) not in self.memo:
                raise ValueError(f"it recalls what it never stored ({argument})")
            stack.append(self.memo[int(argument)])
        elif op == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif op == "GLOBAL":
            self._push_global(*argument.split(" ", 1))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            self._push_global(str(module), str(name))
        elif op == "STOP":
            self.result = stack.pop()
        elif op not in ("PROTO", "FRAME"):
            self._change(op)

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError(count)
        return self.stack[-count:]

    def _change(self, op: str) -> None:
        """The instructions that put things into other things, or make one of others."""
        items: list[Any] = []
        if op in ("TUPLE", "APPENDS", "SETITEMS"):
            items, self.stack = self.stack, self.marks.pop()
        elif op in ("APPEND", "REDUCE", "BUILD", "BINPERSID"):
            items = [self.stack.pop()]
        elif op == "SETITEM":
            items = self._last(2)
            del self.stack[-2:]
        else:
            self.refuse(f"uses the instruction {op}")

        if op == "TUPLE":
            self.stack.append(tuple(items))
        elif op in ("APPEND", "APPENDS"):
            self._target(list, op).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            self._set_items(items, op)
        elif op == "BINPERSID":
            self.stack.append(self._storage(items[0]))
        elif op == "REDUCE":
            self.stack.append(self._build(self.stack.pop(), items[0]))
        else:  # BUILD gives attributes to an object; those of a state_dict are version numbers
            self._target(dict, op)

    def _target(self, kind: type, op: str) -> Any:
        target = self.stack[-1]
        if not isinstance(target, kind):
            self.refuse(f"applies {op} to {_describe(target)}")
        return target

    def _set_items(self, items: list[Any], op: str) -> None:
        target = self._target(dict, op)
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                self.refuse(f"has a dictionary key that is {_describe(key)}")
            target[key] = value

    def _push_global(self, module: str, name: str) -> None:
        found = _Global(module, name)
        if str(found) not in _BUILDERS and not (module == "torch" and name in STORAGES):
            self.refuse(f"asks for {str(found)[:200]!r}")
        self.stack.append(found)

    def _storage(self, reference: Any) -> StorageRef:
        """("storage", class, key, location, numel), in the legacy format with a view after it, or None."""
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            self.refuse("refers to something that is not a storage")
        kind, key, numel = reference[1], reference[2], reference[4]
        if not isinstance(kind, _Global) or kind.name not in STORAGES:
            self.refuse(f"refers to a storage of kind {_describe(kind)}")
        if not isinstance(key, str) or not _is_count(numel):
            raise ValueError("a storage without a name or a size")
        if len(reference) == 6 and reference[5] is not None:
            self.refuse("uses views of storages, as torch did before 0.4")
        return StorageRef(kind.name, key, numel)

    def _build(self, function: Any, arguments: Any) -> Any:
        builder = _BUILDERS.get(str(function)) if isinstance(function, _Global) else None
        if builder is None or not isinstance(arguments, tuple):
            self.refuse(f"calls {_describe(function)}")
        result = builder(*arguments[:8])
        if result is None:
            self.refuse(f"calls {function} with other arguments than torch.save writes")
        return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _describe(value: object) -> str:
    return f"{value}" if isinstance(value, _Global) else f"an object of type {type(value).__name__}"


def _ordered_dict(*arguments: object) -> dict[str, Any] | None:
    return None if arguments else {}


def _tensor(*arguments: object) -> TensorRef | None:
    """(storage, offset, shape, strides), then what concerns gradients."""
    if len(arguments) < 4 or not isinstance(arguments[0], StorageRef):
        return None
    return TensorRef(arguments[0], *arguments[1:4])


def _parameter(tensor: object = None, *_: object) -> TensorRef | None:
    return tensor if isinstance(tensor, TensorRef) else None


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}
