"""Flags from dataclasses: one for each field, including the fields of nested dataclasses.

A `Config` may nest dataclasses of the library, which may nest others. Names are flat, so
`--learning_rate` sets `config.course.learning_rate`, and two fields of the same name are an error.
The help of a field is its entry under `Attributes:` in the docstring of its dataclass, unless
`field` gives it; its constraints are the values that the dataclass refuses.
"""

import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from absl import flags as absl_flags


@typing.runtime_checkable
class Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


REQUIRED: Any = dataclasses.MISSING
"""Default of a `field` that must be given."""

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def field(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    positional: bool = False,
    execution: bool = False,
    secret: bool = False,
    listing: Callable[[], str] | None = None,
) -> Any:
    """A dataclass field with the properties of its flag.

    Args:
        default: Value if neither the command line nor a file gives one; `REQUIRED` for none.
        help: Description, as a whole phrase.
        choices, minimum: The allowed values of text; the smallest allowed number.
        positional: Whether arguments without a flag are its values; for one tuple of text.
        execution, secret: As in `storage.option`.
        listing: Returns a line for each named value; `--NAME=help` prints it.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "positional": positional}
    metadata |= {"execution": execution, "secret": secret, "listing": listing}
    return dataclasses.field(default=default, metadata=metadata)


def nested(
    default: Any = REQUIRED,
    *,
    without: Collection[str] = (),
    rename: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
    """A dataclass field that holds a dataclass whose fields become flags.

    Args:
        default: An instance with this command's defaults. By default those of its class.
        rename: Flag names of fields whose own name is taken or unclear by itself.
    """
    metadata = {"without": frozenset(without), "rename": rename}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Flag:
    """A field of a configuration, or of a nested dataclass, as a flag; `owner` is its dataclass."""

    name: str
    # Names of the fields that lead to it.
    path: tuple[str, ...]
    owner: type
    # Type of its value, or of each of its values.
    kind: type
    several: bool
    optional: bool
    choices: tuple[Any, ...]
    default: Any
    help: str
    metadata: Mapping[str, Any]

    def read(self, value: Any) -> Any:
        """Convert a flag's text, or a value from a file or preset."""
        if value is None and self.optional:
            return None
        if not self.several:
            return self._read_one(value)
        items = list(value) if isinstance(value, list | tuple) else [value]
        # Text may contain commas, so the flag is repeated instead.
        if self.kind is not str:
            split = [item.split(",") if isinstance(item, str) else [item] for item in items]
            items = list(itertools.chain(*split))
        return tuple(self._read_one(item) for item in items if item != "")

    def _read_one(self, value: Any) -> Any:
        expected = _WORDS[self.kind]
        if isinstance(value, str) and self.kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        scalar = isinstance(value, str | int | float)
        # A bool is an int in Python: `--steps=true` would be one step.
        if not scalar or isinstance(value, bool) != (self.kind is bool):
            raise self._refusal(expected, value)
        try:
            parsed = self.kind(value)
        except (ValueError, OverflowError):
            raise self._refusal(expected, value) from None
        # A file may say 1000.0, but 1.5 must not become 1.
        if isinstance(value, float) and self.kind is int and parsed != value:
            raise self._refusal(expected, value)
        if self.choices and parsed not in self.choices:
            raise self._refusal(f"one of {', '.join(map(str, self.choices))}", value)
        least = self.metadata.get("minimum")
        if least is not None and not parsed >= least:
            raise self._refusal(f"at least {least}", value)
        return parsed

    def _refusal(self, expected: str, value: Any) -> ValueError:
        return ValueError(f"{self.name}: expected {expected}, got {value!r}")


def flags_of(*classes: type) -> list[Flag]:
    """The flags of configurations, in the order of their fields."""
    flags = [flag for one in classes for flag in _leaves(one)]
    # This is a mistake of the author of the Config: a TypeError, which no user sees.
    owners: dict[str, type] = {}
    for flag in flags:
        if flag.name in owners:
            first, second = (
                f"{o.__module__}.{o.__name__}" for o in (owners[flag.name], flag.owner)
            )
            raise TypeError(f"{flag.name}: expected one field, got those of {first} and {second}")
        owners[flag.name] = flag.owner
    return flags


def _leaves(
    owner: type,
    default: Any = REQUIRED,
    path: tuple[str, ...] = (),
    without: Collection[str] = (),
    rename: Mapping[str, str] = types.MappingProxyType({}),
) -> Iterator[Flag]:
    # Annotations may be strings; these are types.
    hints, docs = typing.get_type_hints(owner), attribute_docs(owner)
    for field_ in dataclasses.fields(owner):
        name, metadata = field_.name, field_.metadata
        if name in without or not field_.init:
            continue
        hint, value = hints[name], _default(field_, default)
        if dataclasses.is_dataclass(hint):
            yield from _leaves(
                typing.cast(type, hint),
                value,
                (*path, name),
                {*without, *metadata.get("without", ())},
                {**metadata.get("rename", {}), **rename},
            )  # the outer name wins
            continue
        yield Flag(
            rename.get(name, name),
            (*path, name),
            owner,
            *_kind(f"{owner.__name__}.{name}", hint, metadata.get("choices")),
            default=value,
            help=metadata.get("help") or docs.get(name, ""),
            metadata=metadata,
        )


def _default(field_: dataclasses.Field, instance: Any) -> Any:
    """The default of a field in a default instance of its dataclass, if there is one."""
    if instance is not REQUIRED:
        return getattr(instance, field_.name)
    if field_.default_factory is not dataclasses.MISSING:
        return field_.default_factory()
    return field_.default


def _kind(name: str, hint: Any, choices: Sequence[str] | None) -> tuple[type, bool, bool, tuple]:
    """Type, whether there are several values, whether None is one, and the choices."""
    optional = several = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        others = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        optional = len(others) < len(typing.get_args(hint))
        hint = others[0] if len(others) == 1 else hint
    if typing.get_origin(hint) is tuple:
        several, hint = True, typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    if hint not in _WORDS:
        raise TypeError(f"{name}: expected a type that a flag can have, got {hint}")
    return hint, several, optional, tuple(choices or ())


@functools.cache
def attribute_docs(owner: type) -> Mapping[str, str]:
    """Entries under `Attributes:` in the docstrings of a class and its base classes."""
    docs: dict[str, str] = {}
    # The docstring of the class takes precedence over those of its bases.
    for base in reversed(owner.__mro__):
        lines = inspect.cleandoc(base.__doc__ or "").splitlines()
        if "Attributes:" not in lines:
            continue
        below = lines[lines.index("Attributes:") + 1 :]
        block = itertools.takewhile(lambda line: not line or line.startswith(" "), below)
        for entry in re.split(r"\n(?=\S)", textwrap.dedent("\n".join(block))):
            name, _, text = entry.partition(":")
            text = " ".join(text.split()).replace("``", "`")
            docs[name.strip()] = text[:1].upper() + text[1:]
    return docs


def build(config_class: type, values: Mapping[str, Any]) -> Any:
    """A configuration from values by flag name; all others keep their defaults."""
    tree: dict[str, Any] = {}
    for flag in flags_of(config_class):
        branch = tree
        for name in flag.path[:-1]:
            branch = branch.setdefault(name, {})
        if flag.name in values:
            branch[flag.path[-1]] = values[flag.name]
        elif flag.default is REQUIRED:
            raise ValueError(f"{flag.name}: expected a value, got none; give --{flag.name}=...")
    return _build(config_class, REQUIRED, tree)


def _build(owner: type, default: Any, tree: Mapping[str, Any]) -> Any:
    hints, arguments = typing.get_type_hints(owner), {}
    for field_ in dataclasses.fields(owner):
        if field_.name not in tree:
            continue
        value = tree[field_.name]
        if dataclasses.is_dataclass(hints[field_.name]):
            try:
                value = _build(hints[field_.name], _default(field_, default), value)
            except ValueError as error:
                # The dataclass names its field in the error; the user knows the flag's name.
                name, colon, rest = str(error).partition(":")
                name = field_.metadata.get("rename", {}).get(name, name)
                raise ValueError(f"{name}{colon}{rest}") from None
        arguments[field_.name] = value
    return owner(**arguments) if default is REQUIRED else dataclasses.replace(default, **arguments)


def flatten(config: Dataclass) -> dict[str, Any]:
    """Values of a configuration by flag name, without secrets."""
    return {
        flag.name: functools.reduce(getattr, flag.path, config)
        for flag in flags_of(type(config))
        if not flag.metadata.get("secret")
    }


def read_command_line(
    program: str,
    flags: Sequence[Flag],
    others: Mapping[str, Sequence[str]],
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Values on the command line, by flag name."""
    defined = absl_flags.FlagValues()
    for name, choices in others.items():
        if choices:
            absl_flags.DEFINE_enum(name, None, list(choices), "", flag_values=defined)
        else:
            absl_flags.DEFINE_string(name, None, "", flag_values=defined)
    for flag in flags:
        # Text at first: `Flag.read` converts it as for files and presets, with the same errors.
        define: Any = absl_flags.DEFINE_string
        if flag.several:
            define = absl_flags.DEFINE_multi_string
        elif flag.kind is bool:
            define = absl_flags.DEFINE_bool
        define(flag.name, None, "", flag_values=defined)
    # The first item is the program.
    rest = defined([program, *arguments])[1:]
    names = [*others, *(flag.name for flag in flags)]
    values = {name: defined[name].value for name in names if defined[name].value is not None}
    for flag in flags:
        if rest and flag.metadata.get("positional"):
            values[flag.name], rest = [*(values.get(flag.name) or ()), *rest], ()
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}")
    return values


def check_names(source: str, names: Iterable[str], flags: Collection[str]) -> None:
    """Refuse names that are not flags."""
    for name in names:
        if name not in flags:
            # Most wrong names are typing errors.
            near = difflib.get_close_matches(str(name), flags, n=1)
            hint = f", perhaps {near[0]}" if near else ""
            raise ValueError(f"{source}: expected the name of a flag{hint}, got {name!r}")


def choice_of(presets: Mapping[str, Any] | None) -> str:
    """The flag that names a set of defaults: `recipe` where a command works without one."""
    return "recipe" if "none" in (presets or ()) else "preset"


def help_text(
    program: str, doc: str | None, flags: Sequence[Flag], presets: Mapping[str, Any] | None = None
) -> str:
    """The text of `--help`: the docstring, then each flag with its help."""
    shown, rest = [], ""
    if presets:
        name = f"--{choice_of(presets)}={'|'.join(presets)}"
        shown.append((name, "Named set of defaults. The first is the default."))
    for flag in flags:
        says = _sentence(flag.help)
        if flag.metadata.get("positional"):
            rest = f" {flag.name.upper()} ..."
        if flag.metadata.get("listing"):
            says += f" `--{flag.name}=help` lists them."
        if flag.several:
            says += " May be repeated." if flag.kind is str else " Commas separate several."
        if flag.default is REQUIRED:
            says += " Required."
        elif flag.default not in (None, (), ""):
            default = ", ".join(map(str, flag.default)) if flag.several else flag.default
            says += _sentence(f" Default: {default}")
        value = "|".join(map(str, flag.choices)) or ("TEXT" if flag.kind is str else "NUMBER")
        name = f"--[no]{flag.name}" if flag.kind is bool else f"--{flag.name}={value}"
        shown.append((name, says))
    shown.append(("--config=TEXT", "YAML file of flags. The command line takes precedence."))
    lines = [f"usage: {program} [--flag=value ...]{rest}", "", inspect.cleandoc(doc or ""), ""]
    for name, says in shown:
        lines += [f"  {name}", textwrap.indent(textwrap.fill(says, 90), " " * 6)]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
