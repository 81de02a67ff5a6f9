"""How annotations are checked under tests: an int is fine where a float is asked for.

As `jaxtyping.install_import_hook` does it, with less work. Its decorator opens a scope for the axes
that annotations name, whether they name any or not, and checks arguments twice; it compiles two
more functions for every one, also for those that are made anew whenever their outer one runs. Of
ours one in eight names axes. The others need beartype alone, and many not even that.
"""

import ast
import functools
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

# Errors are of one type, whoever finds them.
typechecker = beartype(
    conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
)
_DECORATOR = "__checked__"


def install() -> None:
    """Checks annotations of all that is imported from logitjax from now on."""
    sys.meta_path.insert(0, _Finder())


def checked(what: Any) -> Any:
    """A function that checks what comes and goes, or a dataclass that checks its fields."""
    if inspect.isclass(what):
        return jaxtyping.jaxtyped(what, typechecker=typechecker)
    hints = [hint for hint in what.__annotations__.values() if hint is not Any]
    if any(isinstance(hint, str) for hint in hints):
        # Names that are not there yet, or never.
        return jaxtyping.jaxtyped(what, typechecker=typechecker)
    checking: Callable[..., Any] = typechecker(what) if hints else what
    if checking is what:
        return what
    if any(map(_names_axes, hints)):
        checking = jaxtyping.jaxtyped(checking, typechecker=None)

    @functools.wraps(what)
    def call(*args: Any, **options: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return what(*args, **options)
        return checking(*args, **options)

    return call


def _names_axes(hint: Any) -> bool:
    if getattr(hint, "__module__", "").startswith("jaxtyping"):
        return True
    return any(map(_names_axes, get_args(hint)))


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "logitjax":
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        # Bytecode is neither read nor written: that of others has no checks.
        return _instrumented(self.get_data(self.path), self.path)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)[_DECORATOR] = checked
        super().exec_module(module)


def _instrumented(source: bytes, path: str) -> types.CodeType:
    tree = ast.parse(source, path)
    _decorate(tree.body)
    return compile(tree, path, "exec", dont_inherit=True)


def _decorate(statements: Sequence[ast.AST]) -> None:
    """Classes after their other decorators, which make them dataclasses; functions before."""
    for node in statements:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list.append(_decorator(node))
        elif isinstance(node, ast.ClassDef):
            node.decorator_list.insert(0, _decorator(node))
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            _decorate(getattr(node, field, ()))


def _decorator(node: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Name(_DECORATOR, ast.Load()), node)
