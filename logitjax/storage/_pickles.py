"""Pickles read as data: a machine follows their steps and calls only the reader's stand-ins."""

import collections
import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, cast

import numpy as np

from logitjax.storage import _guard as guard

_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLAIN = (str, int, float, bytes, bool, type(None))


class StandIn:
    """Stand-ins that the machine may call for names in a pickle."""

    def __init__(self, call: Callable[..., Any]):
        self.call = call


class Machine:
    """Follows one pickle, and leaves its file positioned after the last step.

    `names(module, name)` returns the stand-in for a name, None if it is not allowed;
    `reference(pid)` resolves a persistent reference of torch.
    """

    def __init__(
        self,
        file: guard.Reader,
        names: Callable[[str, str], Any],
        reference: Callable[[Any], Any] | None = None,
    ):
        self._file, self._names, self._reference = file, names, reference
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def load(self) -> Any:
        """Load a pickle of plain values and arrays."""
        steps = pickletools.genops(cast(IO[bytes], self._file))
        for count, (opcode, argument, _) in enumerate(steps):
            if count > guard.LIMITS.opcodes:
                raise ValueError(f"expected at most {guard.LIMITS.opcodes} steps")
            try:
                self._step(opcode.name, argument)
            except (IndexError, TypeError, AttributeError) as error:
                what = f"step {count}, {opcode.name}"
                raise ValueError(f"{what}: {guard.one_line(error)}") from None
        if len(self._stack) != 1 or self._marks:
            raise ValueError("a pickle that ends with more than one value")
        return self._stack[0]

    def _copy(self, values: Any) -> Any:
        # A few bytes can copy a memoised list a thousand times.
        self._copied += len(values)
        if self._copied > guard.LIMITS.elements:
            raise ValueError(f"copies more than {guard.LIMITS.elements} values")
        return values

    def _marked(self) -> list[Any]:
        values, self._stack = self._stack, self._marks.pop()
        return values

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            if argument not in self._memo:
                raise ValueError(f"place {argument} is empty")
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("SHORT_BINSTRING", "BINSTRING"):
            # Texts of Python 2, which pickletools takes for Latin-1.
            stack.append(argument.encode("latin1").decode("utf-8", "surrogateescape"))
        elif name == "MARK":
            self._marks.append(stack)
            # What follows belongs to the mark.
            self._stack = []
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name == "POP":
            del stack[-1]
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in _TUPLES:
            self._stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        else:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        if name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            values = self._marked()
            container: Any = tuple(values) if name == "TUPLE" else values
            if name == "FROZENSET":
                container = frozenset(map(_key, values))
            elif name == "DICT":
                container = dict(_pairs(values))
            self._stack.append(container)
        elif name in ("APPENDS", "APPEND", "ADDITEMS"):
            values = [self._stack.pop()] if name == "APPEND" else self._marked()
            target = self._stack[-1]
            if name == "ADDITEMS" and type(target) is set:
                target.update(map(_key, values))
            elif name != "ADDITEMS" and type(target) is list:
                target.extend(values)
            else:
                raise ValueError(f"{name} to a {type(target).__name__}")
        elif name in ("SETITEMS", "SETITEM"):
            if name == "SETITEM":
                values = self._stack[-2:]
                del self._stack[-2:]
            else:
                values = self._marked()
            if not isinstance(self._stack[-1], dict):
                raise ValueError(f"{name} to a {type(self._stack[-1]).__name__}")
            self._stack[-1].update(_pairs(values))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = self._stack.pop()
            called = self._stack[-1]
            if not isinstance(called, StandIn) or type(arguments) is not tuple:
                raise ValueError(f"it calls a {type(called).__name__}")
            for value in arguments:
                if isinstance(value, list | tuple | dict | str | bytes):
                    self._copy(value)
            self._stack[-1] = called.call(*arguments)
        elif name == "BUILD":
            state = self._stack.pop()
            self._set_state(self._stack[-1], state)
        elif name == "BINPERSID" and self._reference is not None:
            self._stack[-1] = self._reference(self._stack[-1])
        else:
            raise ValueError(f"step {name} is not allowed")

    def _name(self, argument: Any) -> None:
        if argument is None:
            # For STACK_GLOBAL, the name on top.
            name, module = self._stack.pop(), self._stack.pop()
        else:
            module, _, name = argument.partition(" ")
        result = self._names(str(module), str(name))
        if result is None:
            raise ValueError(
                f"it asks for {str(module)[:60]}.{str(name)[:60]}, which is not allowed"
            )
        self._stack.append(result)

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, collections.OrderedDict):
            # Attributes such as `_metadata`, which nothing reads.
            return
        if not hasattr(type(target), "set_state"):
            raise ValueError(f"it sets the state of a {type(target).__name__}")
        if isinstance(state, dict | list):
            self._copy(state)
        target.set_state(state)


def _key(value: Any) -> Any:
    # Hashing nested tuples that repeat each other would take forever.
    flat = value if type(value) is tuple and len(value) <= 32 else (value,)
    if not all(isinstance(part, _PLAIN) for part in flat):
        raise ValueError(f"a key that is a {type(value).__name__}")
    return value


def _pairs(values: list[Any]) -> Iterable[tuple[Any, Any]]:
    if len(values) % 2:
        raise ValueError("a key without a value")
    return ((_key(values[i]), values[i + 1]) for i in range(0, len(values), 2))


class Attributes(dict):
    """Stands in for plain objects that hold options, such as ``argparse.Namespace``."""

    def set_state(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})


class Dtype:
    """Stands in for ``numpy.dtype``, whose own state could describe anything."""

    def __init__(self, name: Any, *unused: Any):
        if not isinstance(name, str) or len(name) > 8:
            raise ValueError("a numpy type that is not plain numbers")
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biufc":
            raise ValueError(f"a numpy type that is not plain numbers ({name})")

    def set_state(self, state: Any) -> None:
        # The state of numpy's plain types: a version, the byte order, and nothing else of interest.
        orders = ("<", ">", "=", "|")
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in orders:
            raise ValueError("a numpy type with a state that is not a plain number's")
        self.dtype = self.dtype.newbyteorder(state[1])


def ordered(entries: Any = ()) -> collections.OrderedDict:
    """An ordered dictionary, whose entries Python 2 wrote as a list of pairs."""
    pairs = [part for pair in entries for part in pair]
    return collections.OrderedDict(_pairs(pairs))


def latin_bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """Protocol 2 writes bytes as a call of ``codecs.encode``."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


def number(dtype: Any, data: Any = b"") -> Any:
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes):
        raise ValueError("a numpy scalar that is not a plain number")
    if len(data) != dtype.dtype.itemsize:
        raise ValueError("a numpy scalar of another size")
    return np.frombuffer(data, dtype.dtype, count=1)[0]


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): StandIn(ordered),
    ("numpy", "dtype"): StandIn(Dtype),
    ("_codecs", "encode"): StandIn(latin_bytes),
    ("numpy.core.multiarray", "scalar"): StandIn(number),
    ("numpy._core.multiarray", "scalar"): StandIn(number),
}


def plain(value: Any, arrays: Callable[[Any], Any]) -> Any:
    """Dictionaries, lists and tuples with `arrays(leaf)` for each leaf.

    An object that a pickle repeats stays one object; nested lists could otherwise fill memory.
    """
    entries: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if not isinstance(value, list | tuple | dict):
            return arrays(value)
        if id(value) in entries:
            if entries[id(value)] is entries:
                raise ValueError("a list that contains itself")
            return entries[id(value)]
        # Until it is complete.
        entries[id(value)] = entries
        if isinstance(value, dict):
            # Separate classes distinguish TorchScript's modules from tables.
            kind = type(value) if isinstance(value, Attributes) else dict
            copy: Any = kind((key, visit(item)) for key, item in value.items())
        else:
            copy = type(value)([visit(item) for item in value])
        entries[id(value)] = copy
        return copy

    return visit(value)
