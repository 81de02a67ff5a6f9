"""Reads what people read: pages, help texts and docstrings. Findings are a floor, not the goal.

    python .ci/prose.py [PATH ...]

`codespell` looks for misspelt words, `proselint` for clichés and the like, and `.ci/words.tsv` for
what a native writer would put differently. Code, tables and formulas are left out.
"""

import ast
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
BIN = pathlib.Path(sys.executable).parent
PLACES = ("README.md", "CONTRIBUTING.md", "docs", "launch", "logitjax", "experiments", "tests/rigs")
# Names of the field, of people, and words of test data in other languages.
WORDS = (
    "rouge,ot,nd,hist,te,lamda,ans,fo,handel,responde,uery,alue,strat,thr,wan,ist,manuel,arange,"
    "mor,vie,som,fro,doubel,als"
)
# What these say of ASCII, of dates in tables, and of words around code that was left out.
NOISE = re.compile(
    r" (typography|dates_times|lexical_illusions|skunked_terms|needless_variants)\.?[\w.]*: "
)
# The reference lists are made of docstrings, and results are data.
SKIPPED = ("docs/reference", "docs/results", "docs/claims", "docs/measurements/gallery.md")


def prose(path: pathlib.Path) -> str:
    """The text of a page, or the docstrings of a module, on the lines where they stand."""
    text = path.read_text()
    if path.suffix == ".py":
        lines = [""] * (text.count("\n") + 2)
        for node in ast.walk(ast.parse(text)):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            if isinstance(node, kinds) and ast.get_docstring(node):
                docstring = node.body[0]
                first, last = docstring.lineno, docstring.end_lineno or 0
                lines[first:last + 1] = text.splitlines()[first - 1:last]  # fmt: skip
        text = re.sub(r"^ *>>>.*?(?=\n *\n|\Z)", blank, "\n".join(lines[1:]), flags=re.M | re.S)
        text = re.sub(r"::\n\n(?: {4,}.*\n|\n)+", blank, text).replace('"""', "   ")
    text = re.sub(r"^(```|~~~).*?^\1", blank, text, flags=re.M | re.S)
    text = re.sub(r"^\s*\|.*$", "", text, flags=re.M)
    return re.sub(r"`[^`]*`|\$[^$\n]*\$|\]\([^)]*\)|https?://\S+", blank, text)


def blank(match: re.Match) -> str:
    return re.sub(r"\S", " ", match[0])


def paths(places: list[str]) -> list[pathlib.Path]:
    files = []
    for name in places or PLACES:
        path = ROOT / name
        files += [path] if path.is_file() else sorted([*path.rglob("*.md"), *path.rglob("*.py")])
    return [p for p in files if not str(p.relative_to(ROOT)).startswith(SKIPPED)]


def own_words(texts: dict[str, str]) -> list[str]:
    out = []
    rules = (ROOT / ".ci" / "words.tsv").read_text().splitlines()
    for rule in rules:
        pattern, _, better = rule.partition("\t")
        for name, text in texts.items():
            for match in re.finditer(pattern, text, flags=re.I | re.M):
                line = text.count("\n", 0, match.start()) + 1
                out.append(f"{name}:{line}: {match[0].strip()!r}: {better}")
    return out


def main() -> None:
    files = paths(sys.argv[1:])
    texts = {str(path.relative_to(ROOT)): prose(path) for path in files}
    findings = own_words(texts)
    spelling = [BIN / "codespell", f"--ignore-words-list={WORDS}", *files]
    findings += subprocess.run(spelling, capture_output=True, text=True).stdout.splitlines()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            copy = pathlib.Path(folder, name).with_suffix(".md")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        done = subprocess.run([BIN / "proselint", "check", folder], capture_output=True, text=True)
        lines = [line.removeprefix(f"{folder}/") for line in done.stdout.splitlines()]
        findings += [
            line for line in lines if re.match(r"\S+:\d+", line) and not NOISE.search(line)
        ]
        findings += done.stderr.splitlines()
    print(*findings, sep="\n")
    print(f"{len(texts)} files, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
