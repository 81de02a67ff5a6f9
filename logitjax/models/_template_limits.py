"""What a chat template may cost.

Jinja's sandbox keeps a template from reaching Python, not from running for ever or from taking all
memory: loops within loops, `'a' * 10**10`, a string that is joined to itself sixty times, a list
within a list that is a line of source and longer than any memory when printed. Here the code that
Jinja makes of a template is interspersed with checks: each item of a loop, each call and each piece
of output looks at the time taken, and whatever makes a longer value says so before it is made.
"""

import contextlib
import contextvars
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from logitjax.storage import guard, require

# Widths of five digits and those that are arguments.
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\{|\d{5})|\d{9}")
# Quadratic in what they are given, or without a use in a chat.
_WITHOUT = ("urlize", "striptags", "pprint", "xmlattr", "wordwrap")
_BITS = 1 << 13
_NODES = 200_000  # values of a list and of the lists in it
_ENTRY = 64  # bytes that a small value in a list takes


@dataclasses.dataclass
class _Allowance:
    """What is left to one rendering."""

    bytes_left: int
    deadline: float

    def spend(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise ValueError("it makes too much text")
        # Of the processor: on a machine that is busy, the clock says what others do.
        if time.thread_time() > self.deadline:
            raise ValueError(f"it takes longer than {guard.LIMITS.seconds:g} s")


_current: contextvars.ContextVar[_Allowance | None] = contextvars.ContextVar(
    "allowance", default=None
)


@contextlib.contextmanager
def allowance(variables: Mapping[str, Any]) -> Iterator[None]:
    """One rendering, which may make so much of what it is given, and take so long."""
    limits = guard.LIMITS
    # Templates that join a text turn by turn make it once a turn.
    bytes_ = 2 * limits.text + 256 * _printed(dict(variables), sys.maxsize)
    token = _current.set(_Allowance(bytes_, time.thread_time() + limits.seconds))
    try:
        yield
    finally:
        _current.reset(token)


def _spend(count: int) -> None:
    allowed = _current.get()
    if allowed is not None:
        allowed.spend(count)


def _printed(value: Any, nodes: int = _NODES) -> int:
    """About how many characters a value would be as text; lists are followed, not copied.

    Raises:
        ValueError: More than may be printed, as a list within a list, each twice, can be.
    """
    if isinstance(value, str | bytes):
        return len(value)
    allowed = _current.get()
    most = allowed.bytes_left if allowed else sys.maxsize
    stack, size = [value], 0
    while stack:
        value = stack.pop()
        nodes -= 1
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, int):
            size += 4 + value.bit_length() // 3
        elif isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            stack.extend(value)
        elif isinstance(value, range):
            size += 4 * len(value)
        elif type(value).__name__ == "Namespace":
            stack.append(object.__getattribute__(value, "_Namespace__attrs"))
        size += 4
        if size > most or nodes < 0:
            raise ValueError("it makes lists that are too long as text")
    return size


def _made(value: Any) -> Any:
    """Counts what was made."""
    if isinstance(value, str | bytes):
        _spend(sys.getsizeof(value))
    elif isinstance(value, int):
        if value.bit_length() > _BITS:
            raise ValueError("it makes numbers that are too large")
        _spend(_ENTRY)
    else:
        _spend(_ENTRY)
        if isinstance(value, list | tuple | Mapping | set) or type(value).__name__ == "Namespace":
            _spend(sys.getsizeof(value))
            _printed(value)
    return value


def _times(count: Any, size: int) -> None:
    """Raises before a text is made `count` times as long as `size`."""
    if isinstance(count, int) and count > 0:
        _spend(count * size)


def _narrow(form: Any, *arguments: Any) -> None:
    if isinstance(form, str | bytes):
        text = form if isinstance(form, str) else form.decode("latin1")
        if _WIDE.search(text):
            raise ValueError("its formats are too wide")
        # Each field prints one argument whole.
        size = max((_printed(value) for value in arguments), default=0)
        _spend(len(text) + size * (text.count("%") + text.count("{")))


def _replacing(text: str, old: Any = "", new: Any = "", count: Any = -1) -> None:
    places = text.count(old) if isinstance(old, str) else 0
    if isinstance(count, int) and count >= 0:
        places = min(places, count)
    _times(places, len(new) if isinstance(new, str) else 0)


def _joining(separator: Any, items: list[Any]) -> None:
    size = len(separator) if isinstance(separator, str | bytes) else 0
    _spend(sum(_printed(item) + size for item in items))


def _operating(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for count, values in ((left, right), (right, left)):
            if isinstance(values, str | bytes | list | tuple):
                _times(count, max(8, _printed(values)))
    elif operator == "+" and isinstance(left, str | bytes | list | tuple):
        _spend(sys.getsizeof(left) + sys.getsizeof(right))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > _BITS:
            raise ValueError("it makes numbers that are too large")
    elif operator == "%":
        _narrow(left, *(right if isinstance(right, tuple) else (right,)))


def _pieces(text: str, separator: Any = None, *unused: Any) -> None:
    count = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    _times(count, _ENTRY)


_METHODS: dict[str, Callable[..., None]] = {
    **{
        name: lambda text, width=0, *unused: _times(width, 1)
        for name in ("center", "ljust", "rjust", "zfill")
    },
    **dict.fromkeys(("split", "rsplit"), _pieces),
    "splitlines": lambda text, *unused: _pieces(text, "\n"),
    "expandtabs": lambda text, size=8: _times(size, text.count("\t")),
    "replace": _replacing,
    "format": lambda text, *values: _narrow(text, *values),
    "format_map": lambda text, values: _narrow(text, *values.values()),
    "encode": lambda text, *unused: _times(8, len(text)),
}
_FILTERS: dict[str, Callable[..., Any]] = {
    "replace": lambda value, *rest: _replacing(str(value), *rest),
    "center": lambda value, width=80: _times(width, 1),
    "indent": lambda value, width=4, *unused: _times(
        len(width) if isinstance(width, str) else width, str(value).count("\n") + 2
    ),
    "tojson": lambda value, *rest: [_times(n, _printed(value)) for n in rest if n is not None],
    "batch": lambda value, count, fill=None: _times(count, 8),
    "slice": lambda value, count, fill=None: _times(count, _ENTRY),
    "format": _narrow,
    "round": lambda value, precision=0, *unused: _times(precision, 1 << 16),
    "list": lambda value: _times(len(value) if isinstance(value, str) else 0, _ENTRY),
}


def _bound(check: Callable[..., None], arguments: tuple, options: Mapping[str, Any]) -> None:
    # Whatever order or name they are given in: each is looked at. Within a loop Jinja adds its own.
    own = ("_loop_vars", "_block_vars")
    with contextlib.suppress(TypeError):
        check(*arguments, *(value for name, value in options.items() if name not in own))


def _generator() -> Any:
    """The class that turns templates into Python, with checks in what it writes."""
    compiler = require("jinja2.compiler", extra="models")
    nodes = require("jinja2.nodes", extra="models")
    makers = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Filter, nodes.Call)

    class Generator(compiler.CodeGenerator):
        """Code with checks in it."""

        def visit(self, node: Any, *arguments: Any, **options: Any) -> Any:
            before = "environment.items(" if node in self._iterated else ""
            loaded = getattr(node, "ctx", "load") == "load"
            sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
            if sliced or (isinstance(node, makers) and loaded):
                before += "environment.made("
            self.write(before) if before else None
            found = super().visit(node, *arguments, **options)
            self.write(")" * before.count("(")) if before else None
            return found

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self._iterated = _Identities()

        def visit_For(self, node: Any, frame: Any) -> None:
            self._iterated.add(node.iter)
            super().visit_For(node, frame)

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.joined(context, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def visit_Output(self, node: Any, frame: Any) -> None:
            texts = [part.data for part in node.nodes if isinstance(part, nodes.TemplateData)]
            # An `if` without an expression, a thousand times in a loop, is memory too.
            self.writeline(f"environment.spend({16 * len(node.nodes) + sum(map(len, texts))})")
            super().visit_Output(node, frame)

    return Generator


@functools.cache
def limited_sandbox() -> Any:
    """A class of environments, Jinja's immutable sandbox within the limits of `storage.guard`.

    What it renders is counted in `with allowance(variables)`.
    """
    runtime = require("jinja2.runtime", extra="models")
    sandbox = require("jinja2.sandbox", extra="models")

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """The immutable sandbox with limits."""

        code_generator_class = _generator()
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def __init__(self, **options: Any):
            super().__init__(optimized=False, finalize=_finalize, **options)
            self.globals.pop("lipsum", None)
            self.filters = {
                name: _guarded(name, function)
                for name, function in self.filters.items()
                if name not in _WITHOUT
            }

        def add_filter(self, name: str, function: Callable[..., Any]) -> None:
            self.filters[name] = _guarded(name, function)

        def _parse(self, source: str, *rest: Any) -> Any:
            guard.whole(len(source), "length", most=guard.LIMITS.template_bytes)
            return super()._parse(source, *rest)

        made, spend = staticmethod(_made), staticmethod(_spend)

        @staticmethod
        def items(values: Any) -> Any:
            return _Items(values) if hasattr(values, "__iter__") else values

        @staticmethod
        def joined(context: Any, parts: tuple[Any, ...]) -> str:
            _joining("", list(parts))
            escaped = context.eval_ctx.volatile or context.eval_ctx.autoescape
            return (runtime.markup_join if escaped else runtime.str_join)(parts)

        @staticmethod
        def concat(parts: Any) -> str:
            parts = list(parts)
            _spend(sum(map(len, parts)))
            return "".join(parts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _operating(operator, left, right)
            return _made(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr != "translate" and super().is_safe_attribute(obj, attr, value)

        def call(*arguments: Any, **options: Any) -> Any:
            self, context, called, *given = arguments
            _spend(_ENTRY)
            name = getattr(called, "__name__", "")
            # Jinja wraps `format`.
            owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)
            if isinstance(owner, str | bytes):
                if name == "join" and given:
                    given[0] = list(given[0])
                    _joining(owner, given[0])
                elif name in _METHODS:
                    _bound(_METHODS[name], (owner, *given), options)
            return sandbox.ImmutableSandboxedEnvironment.call(
                self, context, called, *given, **options
            )

    return Sandbox


class _Identities:
    """A set of nodes, which jinja compares by what they hold."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def add(self, node: Any) -> None:
        self._held[id(node)] = node

    def __contains__(self, node: Any) -> bool:
        return id(node) in self._held


class _Items:
    """What a loop runs over, counted item by item."""

    def __init__(self, values: Any):
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            _spend(0)
            yield value

    def __len__(self) -> int:
        return len(self._values)


def _finalize(value: Any) -> Any:
    _spend(_printed(value))
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        given = list(arguments)
        if len(given) > first:
            if name == "join" and not isinstance(given[first], str):
                given[first] = list(given[first])
                separator = next(iter(given[first + 1 :]), options.get("d", ""))
                _joining(separator, given[first])
            elif name == "sum" and not isinstance(options.get("start", 0), int | float):
                raise ValueError("it adds what are no numbers")
            _printed(given[first])
        if name in _FILTERS:
            _bound(_FILTERS[name], tuple(given[first:]), options)
        return _made(function(*given, **options))

    return call
