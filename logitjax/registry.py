"""Names for values of an open set, as written in flags: `npo`, `npo(beta=0.2)`, `package:Name`.

A set that others may extend (losses, unlearning methods, model families) has one `Registry`. A
table names its own members. Those of other packages are named by entry points of its group, or by
module and attribute without registration.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# A name or a module and its attribute, optionally followed by options in brackets.
_TEXT = re.compile(r"\s*([\w.-]+(?::[\w.]+)?)\s*(?:\((.*)\))?\s*", re.DOTALL)
# Types that an option accepts, by the type of its default, and their name in errors.
_KINDS = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a text"),
    tuple: (tuple, "values in brackets"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registry:
    """The members of an open set by name.

    A member is a frozen dataclass, a function that returns a value, or a value. Options of a value
    replace its fields.

    Attributes:
        kind: Name of a member in errors, such as `'method'`.
        group: Entry points by which other packages add members, such as `'logitjax.methods'`.
        members: The library's own members.
        base: Class of all values; anything is accepted if None.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Scaled:
    ...     "Values times a factor."
    ...     factor: float = 1.0
    >>> scales = Registry(kind="scale", group="example.scales",
    ...                   members={"same": Scaled, "double": Scaled(factor=2.0)})
    >>> scales.parse("same(factor=3)")
    Scaled(factor=3.0)
    >>> scales.parse("doubel")
    Traceback (most recent call last):
    ValueError: scale: expected one of double, same or package:Name, got 'doubel'; double is near
    >>> print(scales.help())
    double  Values times a factor. (factor=2.0)
    same    Values times a factor.
    """

    kind: str
    group: str
    members: Mapping[str, Any]
    base: type | None = None

    def names(self) -> list[str]:
        """The names of all members, including those of entry points, in alphabetical order."""
        return sorted({*self.members, *self._entry_points()})

    def help(self) -> str:
        """A line for each name: the summary of its docstring, and options other than defaults."""
        width = max(map(len, self.names()))
        return "\n".join(
            f"{name:{width}}  {_summary(self._member(name))}".rstrip() for name in self.names()
        )

    def parse(self, text: str) -> Any:
        """The value that a text describes.

        Args:
            text: `name`, `package.module:Name`, or either with options, `name(option=value, ...)`.
                The values are Python literals; a bare word is a text.

        Raises:
            ValueError: Unknown name, module or option, or an invalid value of an option.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{self.kind}: expected name, name(option=value) or package:Name, got {text!r}"
            )
        name, options = match[1], _options(self.kind, match[1], match[2] or "")
        member = self._imported(name) if ":" in name else self._member(name)
        value = _with_options(f"{self.kind} {name}", member, options)
        if self.base is not None and not isinstance(value, self.base):
            raise ValueError(
                f"{self.kind} {name}: expected a {self.base.__name__}, got {type(value).__name__}"
            )
        return value

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}

    def _member(self, name: str) -> Any:
        if name in self.members:
            return self.members[name]
        points = self._entry_points()
        if name not in points:
            expected = f"one of {', '.join(self.names())} or package:Name"
            raise ValueError(f"{self.kind}: {_unknown(expected, name, self.names())}")
        return self._loaded(name, points[name].load)

    def _imported(self, name: str) -> Any:
        module, _, attribute = name.partition(":")
        # An installed program does not search the working directory for modules.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        point = importlib.metadata.EntryPoint(name, f"{module}:{attribute}", self.group)
        return self._loaded(name, point.load)

    def _loaded(self, name: str, load: Any) -> Any:
        try:
            return load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{self.kind} {name}: expected an importable module, got {error}"
            ) from error


def _options(kind: str, name: str, text: str) -> dict[str, Any]:
    """The options of `name(text)`."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or not all(keyword.arg for keyword in call.keywords):
            # a bare value, or **mapping.
            raise SyntaxError
        return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"{kind} {name}: expected option=value, with literal values, got {text!r}"
        ) from None


def _literal(node: ast.expr) -> Any:
    """A literal, `inf` or a bare word."""
    if isinstance(node, ast.Name):
        # Python has no literal for it.
        return math.inf if node.id == "inf" else node.id
    return ast.literal_eval(node)


def _with_options(name: str, member: Any, options: Mapping[str, Any]) -> Any:
    """Build a member's value with the options, or replace the options of a given value."""
    make, defaults = _maker(member)
    fields = {}
    for key, value in options.items():
        if key not in defaults:
            expected = f"one of {', '.join(defaults)}" if defaults else "no options"
            raise ValueError(f"{name}: {_unknown(expected, key, defaults)}")
        fields[key] = _checked(f"{name}({key})", value, defaults[key])
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _maker(member: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The constructor of a member's value, and its options with their defaults."""
    if _is_value(member):
        fields = [field for field in dataclasses.fields(member) if field.init]
        replace = functools.partial(dataclasses.replace, member)
        return replace, {field.name: getattr(member, field.name) for field in fields}
    if callable(member):
        parameters = inspect.signature(member).parameters
        return member, {key: parameter.default for key, parameter in parameters.items()}
    return lambda: member, {}


def _is_value(member: Any) -> bool:
    return dataclasses.is_dataclass(member) and not isinstance(member, type)


def _checked(name: str, value: Any, default: Any) -> Any:
    kind, words = _KINDS.get(type(default), (object, ""))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        raise ValueError(f"{name}: expected {words}, got {value!r}")
    # Equal options must have equal texts, which belong to the identity of a run.
    return float(value) if isinstance(default, float) else value


def _unknown(expected: str, name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"expected {expected}, got {name!r}{f'; {near[0]} is near' if near else ''}"


def _summary(member: Any) -> str:
    described = type(member) if _is_value(member) else member
    summary = (inspect.getdoc(described) or "").split("\n")[0]
    if not _is_value(member):
        return summary
    changed = [
        f"{field.name}={getattr(member, field.name)!r}"
        for field in dataclasses.fields(member)
        if getattr(member, field.name) != field.default
    ]
    return f"{summary} ({', '.join(changed)})" if changed else summary
