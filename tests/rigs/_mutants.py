"""Small faults made by rule: each mutant is one edit of one place in a file's text.

Rules look at Python's syntax tree and edit the text it was read from, so that everything else in
the file stays as it was written. Nothing is made of docstrings, messages, annotations, decorators
and code that only raises: a fault there is not what tests of numbers are for.
"""

import ast
import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

EDGES = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
EXTREMES = {"max": "min", "maximum": "minimum", "argmax": "argmin", "pmax": "pmin", "any": "all"}
EXTREMES |= {after: before for before, after in EXTREMES.items()}
# Pairs of arguments whose exchange goes through without an error of its own.
_ROLES = (
    {"student", "teacher"},
    {"reference", "hypothesis"},
    {"large", "small"},
    {"low", "high"},
    {"begin", "end"},
    {"over", "under"},
    {"query", "key"},
    {"values", "weights"},
    {"rows", "columns"},
    {"old", "new"},
    {"offset", "size"},
)
# Which of two arguments comes first decides nothing here, or nothing that is computed.
_UNORDERED = {
    *("isinstance", "issubclass", "issubdtype", "getattr", "hasattr", "setattr", "replace"),
    *("split", "join", "append", "zip", "map", "maximum", "minimum", "max", "min", "logaddexp"),
    *("add", "multiply", "logical_and", "logical_or", "swapaxes", "promote_types"),
    *("result_type", "broadcast_shapes", "array_equal", "allclose"),
}
# What is only shown.
_SILENT = {"info", "warning", "error", "debug", "warn", "print", "tqdm", "named_scope"}
_MASKS = ("where", "vocab_where", "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One edit: ``text[start:end]`` of the file becomes ``new``, by a rule.

    `path` is from the root of the tree; `before` and `after` are the lines that the edit touches,
    without indentation, and `line` is the number of the first of them.
    """

    path: str
    rule: str
    start: int
    end: int
    new: str
    before: str
    after: str
    line: int

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def changes(self, text: str) -> bool:
        """Whether the edited file is another program, and one that can be read."""
        try:
            return ast.dump(ast.parse(self.apply(text))) != ast.dump(ast.parse(text))
        except SyntaxError:
            return False


@dataclasses.dataclass(frozen=True)
class Edit:
    rule: str
    start: int
    end: int
    new: str


class Source:
    """A file's text and tree, with places counted in characters."""

    def __init__(self, text: str):
        self.text, self.tree = text, ast.parse(text)
        self._lines = text.splitlines(keepends=True)
        self._begins = [0]
        for line in self._lines:
            self._begins.append(self._begins[-1] + len(line))

    def _place(self, line: int, column: int) -> int:
        # The tree counts bytes of UTF-8.
        prefix = self._lines[line - 1].encode()[:column] if column else b""
        return self._begins[line - 1] + len(prefix.decode())

    def begin(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        return self._place(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._place(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.expr | ast.stmt | ast.keyword) -> str:
        return self.text[self.begin(node) : self.end(node)]

    def replace(self, rule: str, node: ast.expr | ast.stmt, new: str) -> Edit:
        return Edit(rule, self.begin(node), self.end(node), new)

    def between(
        self, rule: str, left: ast.expr, right: ast.expr, changes: Mapping[str, str]
    ) -> Iterator[Edit]:
        """The operator between two operands, which parentheses and comments may surround."""
        start, end = self.end(left), self.begin(right)
        gap = re.sub(r"#[^\n]*", lambda comment: " " * len(comment[0]), self.text[start:end])
        operator = re.search(r"[<>=!]=|[-+<>&]|\b(?:and|or)\b", gap)
        if operator and operator[0] in changes:
            at = start + operator.start()
            yield Edit(rule, at, at + len(operator[0]), changes[operator[0]])

    def lines(self, start: int, end: int) -> tuple[int, int, int]:
        """Where the lines of a place begin and end, and the number of the first."""
        begin = self.text.rfind("\n", 0, start) + 1
        stop = self.text.find("\n", end)
        return begin, len(self.text) if stop < 0 else stop, self.text.count("\n", 0, start) + 1


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _number(node: ast.AST) -> float | int | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return None if isinstance(node.value, bool) else node.value
    return None


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str | bytes)
    return isinstance(node, ast.JoinedStr)


def _comparison(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        sides = (node.left, node.comparators[0])
        if not any(map(_is_text, sides)):
            yield from source.between("comparison", *sides, EDGES)


def _sign(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        listed = ast.List | ast.Tuple | ast.JoinedStr
        sides = (node.left, node.right)
        if not any(isinstance(side, listed) or _is_text(side) for side in sides):
            yield from source.between("sign", *sides, {"+": "-", "-": "+"})
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _number(node) is None:
        yield source.replace("sign", node, source.of(node.operand))


def _mask(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield source.replace("mask", node, f"({source.of(node.left)})")
        yield source.replace("mask", node, f"({source.of(node.right)})")
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitAnd):
        yield source.replace("mask", node, "pass")
    if not isinstance(node, ast.Call):
        return
    if _name(node.func) == "where" and len(node.args) == 3:
        yield source.replace("mask", node, f"({source.of(node.args[1])})")
    if _name(node.func)[:1].isupper():
        return  # a field, which is missed at once
    given = [*node.args, *node.keywords]
    for keyword in node.keywords:
        if keyword.arg in _MASKS and not isinstance(keyword.value, ast.Constant):
            index = given.index(keyword)
            if index:
                yield Edit("mask", source.end(given[index - 1]), source.end(keyword), "")
            elif len(given) > 1:
                yield Edit("mask", source.begin(keyword), source.begin(given[1]), "")


def _stop_gradient(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Call) and _name(node.func) == "stop_gradient" and node.args:
        yield source.replace("stop_gradient", node, f"({source.of(node.args[0])})")


def _alike(first: ast.expr, second: ast.expr) -> bool:
    """Whether two arguments seem to be of one kind, by what they are called."""
    ours, their_parts = (set(filter(None, _root(x).split("_"))) for x in (first, second))
    if not ours or not their_parts:
        return False
    roles = any(ours & pair and their_parts & pair - ours for pair in _ROLES)
    letters = all(len(part) == 1 for part in ours | their_parts)
    return roles or letters or bool(ours & their_parts)


def _root(node: ast.expr) -> str:
    """The name of a variable, an attribute, or of what one is indexed from."""
    while isinstance(node, ast.Subscript | ast.UnaryOp):
        node = node.value if isinstance(node, ast.Subscript) else node.operand
    return _name(node)


def _swap(source: Source, node: ast.AST) -> Iterator[Edit]:
    if not isinstance(node, ast.Call) or len(node.args) < 2:
        return
    name, (first, second) = _name(node.func), node.args[:2]
    divergence = "kl" in name.lower() or "divergence" in name
    if name in _UNORDERED or name.lstrip("_").startswith("check"):
        return
    if not divergence and not (len(node.args) == 2 and _alike(first, second)):
        return
    texts = source.of(first), source.of(second)
    if ast.Starred in (type(first), type(second)) or texts[0] == texts[1]:
        return
    comma = source.text[source.end(first) : source.begin(second)]
    yield Edit("swap", source.begin(first), source.end(second), texts[1] + comma + texts[0])


def _axis(source: Source, node: ast.AST) -> Iterator[Edit]:
    if not isinstance(node, ast.Call):
        return
    axes = [keyword.value for keyword in node.keywords if keyword.arg == "axis"]
    reductions = {"sum", "mean", "prod", "argmax", "argmin", "max", "min", "any", "all", "cumsum"}
    if isinstance(node.func, ast.Attribute) and node.func.attr in reductions:
        # Of a module's function the first argument is the array.
        root = node.func.value
        module = isinstance(root, ast.Name) and root.id in ("jnp", "np")
        axes += node.args[1:2] if module else node.args[:1]
    for axis in axes:
        value = _number(axis)
        if value in (-1, -2, 1):
            yield source.replace("axis", axis, "0")
        elif value == 0:
            yield source.replace("axis", axis, "-1")


def _off_by_one(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        if _number(node.right) == 1:
            yield source.replace("off_by_one", node, f"({source.of(node.left)})")
        elif _number(node.left) == 1 and isinstance(node.op, ast.Add):
            yield source.replace("off_by_one", node, f"({source.of(node.right)})")
    if isinstance(node, ast.Slice):
        if node.lower is not None and node.upper is None and _number(node.lower) == 1:
            yield source.replace("off_by_one", node.lower, "")
        if node.upper is not None and node.lower is None and _number(node.upper) in (1, -1):
            yield source.replace("off_by_one", node.upper, "")
    if isinstance(node, ast.Call) and len(node.args) == 1 and not _is_text(node.args[0]):
        inner = node.args[0]
        if _name(node.func) == "range" and not isinstance(inner, ast.Starred):
            yield source.replace("off_by_one", inner, f"{source.of(inner)} - 1")
        if _name(node.func) == "arange" and not isinstance(inner, ast.Starred):
            yield source.replace("off_by_one", inner, f"1, {source.of(inner)} + 1")


def _constant(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Constant) and type(node.value) is float:
        value = node.value
        if value == 0:
            new = "1.0"
        elif abs(value) <= 1e-2:
            new = "0.0"
        else:
            new = {0.5: "1.0", 1.0: "2.0", 2.0: "1.0"}.get(value, repr(2 * value))
        yield source.replace("constant", node, new)
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.LShift | ast.RShift):
        for side in (node.left, node.right):
            if isinstance(side, ast.Constant) and type(side.value) is int and side.value > 1:
                new = 1 if side.value == 2 else side.value + 1
                yield source.replace("constant", side, str(new))


def _extreme(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Call) and _name(node.func) in EXTREMES:
        name, end = _name(node.func), source.end(node.func)
        yield Edit("extreme", end - len(name), end, EXTREMES[name])


def _logic(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.BoolOp):
        first, second = node.values[:2]
        yield from source.between("logic", first, second, {"and": "or", "or": "and"})
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield from source.between("logic", node.left, node.right, {"&": "|"})
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield source.replace("logic", node, f"({source.of(node.operand)})")


def _fold_in(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Call) and _name(node.func) == "fold_in" and node.args:
        yield source.replace("fold_in", node, f"({source.of(node.args[0])})")


def _infinity(source: Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Attribute) and node.attr == "inf":
        yield source.replace("infinity", node, "0.0")


RULES: Mapping[str, Callable[[Source, ast.AST], Iterator[Edit]]] = {
    "comparison": _comparison,
    "sign": _sign,
    "mask": _mask,
    "stop_gradient": _stop_gradient,
    "swap": _swap,
    "axis": _axis,
    "off_by_one": _off_by_one,
    "constant": _constant,
    "extreme": _extreme,
    "logic": _logic,
    "fold_in": _fold_in,
    "infinity": _infinity,
}


def _only_raises(body: Iterable[ast.stmt]) -> bool:
    """Nothing but a raise, after what its message needs."""
    statements = [s for s in body if not _is_docstring(s)]
    plain = ast.Assign | ast.Raise | ast.Return
    return any(isinstance(s, ast.Raise) for s in statements) and all(
        isinstance(s, plain) for s in statements
    )


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and _is_text(node.value)


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    skipped: set[str] = {"annotation", "returns", "decorator_list", "type_params"}
    if isinstance(node, ast.If) and _only_raises(node.body):
        skipped |= {"test", "body"}
    if isinstance(node, ast.keyword) and node.arg in ("axis_name", "desc"):
        return
    for field, value in ast.iter_fields(node):
        if field in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_out(child):
                yield child


def _is_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.FunctionDef):
        checks = node.name.lstrip("_").startswith("check") or node.name in ("__repr__", "__str__")
        return checks or _only_raises(node.body)
    if isinstance(node, ast.ExceptHandler):
        return _only_raises(node.body)
    if isinstance(node, ast.Call):
        return _name(node.func) in _SILENT
    return _is_docstring(node)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for part in _parts(node):
        yield from _walk(part)


def mutants(path: str, text: str) -> list[Mutant]:
    """All mutants of a file that the rules make.

    >>> [m.after for m in mutants("f.py", "def f(x):\\n    return x[1:] < 0\\n")]
    ['return x[1:] <= 0', 'return x[:] < 0']
    """
    source = Source(text)
    made: dict[tuple[int, int, str], Mutant] = {}
    for node in _walk(source.tree):
        for rule in RULES.values():
            for edit in rule(source, node):
                begin, stop, line = source.lines(edit.start, edit.end)
                after = text[begin : edit.start] + edit.new + text[edit.end : stop]
                mutant = Mutant(
                    path=path,
                    before=_stripped(text[begin:stop]),
                    after=_stripped(after),
                    line=line,
                    **dataclasses.asdict(edit),
                )
                made.setdefault((edit.start, edit.end, edit.new), mutant)
    return list(made.values())


def _stripped(lines: str) -> str:
    return "\n".join(line.strip() for line in lines.strip().splitlines())


def named(path: str, text: str, before: str, after: str) -> Mutant:
    """A mutant written by hand: ``before``, which must stand once in the text, becomes ``after``.

    >>> named("f.py", "x = 1\\ny = 2\\n", "y = 2", "y = 3").line
    2
    """
    if text.count(before) != 1:
        raise ValueError(f"{path}: expected once, got {text.count(before)} times: {before}")
    start = text.index(before)
    return Mutant(
        path=path,
        rule="named",
        start=start,
        end=start + len(before),
        new=after,
        before=_stripped(before),
        after=_stripped(after),
        line=text.count("\n", 0, start) + 1,
    )


def choose(texts: Mapping[str, str], count: int, seed: int) -> list[Mutant]:
    """So many mutants of some files (path -> text), spread over files and rules."""
    # Draws hang on mutants' texts, not their number: changes elsewhere leave most of them alone.
    drawn = {
        path: sorted(mutants(path, texts[path]), key=lambda mutant: _rank(mutant, seed))
        for path in sorted(
            texts, key=lambda path: hashlib.sha256(f"{seed} {path}".encode()).digest()
        )
    }
    uses: collections.Counter[str] = collections.Counter()
    chosen: list[Mutant] = []
    while len(chosen) < count and any(drawn.values()):
        for path, left in drawn.items():
            # The rule least used so far; among its mutants the first of the draw.
            for mutant in sorted(left, key=lambda mutant: uses[mutant.rule]):
                left.remove(mutant)
                if mutant.changes(texts[path]):
                    uses[mutant.rule] += 1
                    chosen.append(mutant)
                    break
            if len(chosen) == count:
                break
    return chosen


def _rank(mutant: Mutant, seed: int) -> bytes:
    return hashlib.sha256(
        f"{seed}\n{mutant.path}\n{mutant.before}\n{mutant.after}".encode()
    ).digest()
