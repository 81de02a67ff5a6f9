"""The API reference: a page for each package, made of the names that its `__init__.py` exports.

`conf.py` writes the pages before Sphinx reads; `tests/test_site.py` holds them against what the
packages really have.
"""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import types
from typing import Any

import logitjax
from logitjax.commands import COMMANDS, _flags

#: Packages with names of their own; `integrations` holds modules that need other programs.
PACKAGES = tuple(name for name in logitjax._PACKAGES if name not in ("integrations",))


def imported(package: str) -> types.ModuleType:
    """`logitjax.PACKAGE`."""
    return importlib.import_module(f"logitjax.{package}")


def public(module: types.ModuleType) -> dict[str, Any]:
    """Names that a package exports (`from x import name as name`) or a module defines, sorted."""
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # In lower case are variables of the module; types are classes by their looks.
            names |= {t.id for t in targets if isinstance(t, ast.Name) and t.id[0].isupper()}
    names = {name for name in names if not name.startswith("_")}
    return {name: getattr(module, name) for name in sorted(names, key=str.lower)}


def pages() -> dict[str, str]:
    """File name to reStructuredText."""
    out = {"index.rst": _index()}
    for package in logitjax._PACKAGES:
        if package == "commands":
            out["commands.rst"] = _commands()
        else:
            out[f"{package}.rst"] = _page(imported(package))
    return out


def write(directory: pathlib.Path) -> None:
    """Writes the pages that changed, so that Sphinx reads no other again."""
    directory.mkdir(exist_ok=True)
    wanted = pages()
    for path in directory.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = directory / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n\n"


def _index() -> str:
    names = "\n".join(f"   {name}" for name in logitjax._PACKAGES)
    text = (
        _title("API reference", "=")
        + "Everything that a package exports, with shapes, errors and sources. Import the package "
        "that you need, ``from logitjax import losses``; nothing heavy is imported before that.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{names}\n\n"
    )
    for package in PACKAGES:
        if package == "commands" or not public(imported(package)):
            continue
        text += _title(f"``logitjax.{package}``", "-")
        text += ".. list-table::\n   :widths: 35 65\n\n"
        for name, value in public(imported(package)).items():
            summary = _plain((inspect.getdoc(value) or "").partition("\n")[0])
            # What is no function or class has the docstring of its type.
            if not (inspect.isclass(value) or inspect.isroutine(value)) and "." not in summary:
                summary = "A value."
            # Modules have a section and no entry.
            entry = f":py:obj:`{name} <logitjax.{package}.{name}>`"
            entry = f"``{name}``" if isinstance(value, types.ModuleType) else entry
            text += f"   * - {entry}\n     - {summary}\n"
        text += "\n"
    return text


def _page(package: types.ModuleType) -> str:
    short = package.__name__.removeprefix("logitjax.")
    return _title(f"``logitjax.{short}``", "=") + _module(package, "-")


def _module(module: types.ModuleType, line: str) -> str:
    text = f".. automodule:: {module.__name__}\n   :no-members:\n\n"
    modules = []
    for name, value in public(module).items():
        if isinstance(value, types.ModuleType):
            modules.append(value)
            continue
        full = f"{module.__name__}.{name}"
        if inspect.isclass(value):
            text += f".. autoclass:: {full}\n   :members:\n\n"
        elif inspect.isroutine(value) or hasattr(value, "__wrapped__"):  # jitted ones
            text += f".. autofunction:: {full}\n\n"
        else:
            text += _constant(full, value)
    for inner in modules:
        short = inner.__name__.removeprefix("logitjax.")
        text += _title(f"``logitjax.{short}``", line) + _module(inner, "~")
    return text


def _commands() -> str:
    text = _title("Commands", "=")
    text += (
        "``logitjax NAME --flag=value`` runs a command. A flag whose default is a list may be "
        "repeated. ``logitjax NAME --help`` prints the same.\n\n"
    )
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"logitjax.commands.{name.replace('-', '_')}")
        text += _title(f"``logitjax {name}``", "-") + summary + "\n\n"
        text += "::\n\n" + _indented(inspect.cleandoc(module.__doc__ or "")) + "\n"
        if not dataclasses.fields(module.Config):
            continue
        text += ".. list-table::\n   :header-rows: 1\n   :widths: 20 20 60\n\n"
        text += "   * - flag\n     - default\n     - meaning\n"
        for flag in _flags.flags_of(module.Config):
            default = "required" if flag.default is dataclasses.MISSING else repr(flag.default)
            text += f"   * - ``--{flag.name}``\n     - ``{default}``\n     - {_plain(flag.help)}\n"
        text += "\n"
    text += ".. automodule:: logitjax.commands\n   :no-members:\n\n"
    text += ".. autofunction:: logitjax.commands.main\n\n"
    return text + _constant("logitjax.commands.COMMANDS", COMMANDS)


def _constant(name: str, value: Any) -> str:
    """An instance has only the docstring of its class, which says nothing about it."""
    kind = type(value).__name__
    listed = f": {', '.join(map(str, value))}" if isinstance(value, dict | tuple) else ""
    said = f"A ``{kind}``{_plain(listed)}."
    if kind.startswith("_"):  # of `typing`
        said = "A type of arguments: ``" + re.sub(r"\b[a-z]\w*\.", "", str(value)) + "``."
    module, _, short = name.rpartition(".")
    return f".. py:data:: {short}\n   :module: {module}\n\n   {said}\n\n"


def _plain(text: str) -> str:
    """Text whose signs mean nothing to reStructuredText."""
    return "".join(f"\\{c}" if c in "*`|_\\" else c for c in text)


def _indented(text: str) -> str:
    return "".join(f"   {line}\n" if line else "\n" for line in text.splitlines())
