"""How large the library is: lines, public names, long functions; `--strict` fails above the bars.

A public name is one that a package exports from its `__init__.py`, or that a module without an
underscore defines. Commands are called by their flags, and count only as lines. A function is long
without its docstring. Of a hundred lines that are not blank, docstrings included, those are counted
that hold a comment and nothing else; marks for tools (`noqa` and the like) are no comments.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY, TOGETHER, NAMES, LONG = 66_000, 94_000, 330, 0
LINES_OF_A_FUNCTION = 80
COMMENTS = 4.0
_MARK = re.compile(r"#\s*(noqa|type:|pyright:|fmt:|ruff:)")


def lines(folder: str) -> int:
    """Lines of all Python files below a folder."""
    return sum(len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py"))


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Each file of the library by its place inside the package, with its tree."""
    package = ROOT / "logitjax"
    for path in sorted(package.rglob("*.py")):
        yield str(path.relative_to(package)), ast.parse(path.read_text())


def public_names(module: str, tree: ast.Module) -> set[str]:
    """The names that a file makes public."""
    *folders, file = module.split("/")
    parts = [*folders, file.removesuffix(".py")]
    if parts[0] == "commands" or any(part.startswith("_") for part in parts if part != "__init__"):
        return set()
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and file == "__init__.py":
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
    return {name for name in names if not name.startswith("_")}


def long_functions(name: str, tree: ast.Module) -> Iterator[str]:
    """Functions that are too long without their docstrings, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                size -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if size > LINES_OF_A_FUNCTION:
                yield f"{name}:{node.lineno} {node.name}, {size} lines"


def comments_and_lines(name: str) -> tuple[int, int]:
    """Lines of a file that hold a comment alone, and those that are not blank."""
    text = (ROOT / "logitjax" / name).read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    alone = [token.string for token in comments if token.line.lstrip().startswith("#")]
    count = sum(not _MARK.match(comment) for comment in alone)
    return count, sum(bool(line.strip()) for line in text.splitlines())


def main(strict: bool) -> int:
    """Prints the counts; the status is 1 where `strict` and a count misses its bar."""
    files = list(trees())
    names = set().union(*(public_names(*file) for file in files))
    long = [function for file in files for function in long_functions(*file)]
    sizes = {folder: lines(folder) for folder in ("logitjax", "experiments", "tests/rigs")}
    counts = {
        "lines of the library": (sizes["logitjax"], LIBRARY),
        "lines with experiments and rigs": (sum(sizes.values()), TOGETHER),
        "public names": (len(names), NAMES),
        f"functions over {LINES_OF_A_FUNCTION} lines": (len(long), LONG),
    }
    for folder, count in sizes.items():
        print(f"{count:7,d}  lines of {folder}")
    for name, (count, bar) in counts.items():
        print(f"{count:7,d}  {name}, of at most {bar:,d}{' MISSED' if count > bar else ''}")
    comments, full = map(
        sum, zip(*(comments_and_lines(module) for module, _ in files), strict=True)
    )
    share = 100 * comments / full
    missed = " MISSED" if share < COMMENTS else ""
    print(f"{share:7.2f}  comments in a hundred lines not blank, of at least {COMMENTS:g}{missed}")
    print(*long, sep="\n")
    wrong = missed or any(count > bar for count, bar in counts.values())
    return int(strict and bool(wrong))


if __name__ == "__main__":
    sys.exit(main("--strict" in sys.argv[1:]))
