"""Make the page of results, docs/measurements/gallery.md, from docs/results/*.json alone.

    python -m experiments.gallery
    python -m experiments.gallery --add=runs/few_shot --name=few_shot_stamps --page=few_shot.md

The second command first copies the results of a finished run of an experiment, a benchmark or the
planner from its workdir into a small file: command, versions, rows of tables, points of pictures. A
table of another page below `<!-- results: NAME/TABLE -->` has to agree with the file: it may have
fewer rows and columns, but no other cells.

`--parts` also keeps the records of the parts of a long run, in `docs/results/NAME`. Copied to
`WORKDIR/parts` they continue it, or draw its report again.
"""

import ast
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments.shared import figures
from experiments.shared.report import format_value, markdown_table
from logitjax import storage

DOCS = pathlib.Path(__file__).parents[1] / "docs"
_DIGITS = 6
_ABSOLUTE = re.compile(r"(?:^|[\s=:])/\w")
_INTRODUCTION = """\
# Result gallery

`python -m experiments.gallery` makes every table and picture of this page from the files in
`docs/results`. Each file holds the results of one finished run. Small points are seeds or samples,
large ones their means, and bars the 95 % intervals of the means (Student's t). Longer runs without
such a file are only on the pages of their papers.
"""


def take(workdir: pathlib.Path, name: str, page: str, docs: pathlib.Path = DOCS) -> pathlib.Path:
    """Makes a gallery file from a finished run's `results.json`.

    Args:
        workdir: Folder of an experiment, or of one benchmark.
        name: Name of the file and of the section.
        page: The page that discusses the results, `few_shot.md`.
        docs: The folder of pages.

    Returns:
        The file.

    Raises:
        ValueError: A value in it is a path of this machine.
    """
    result = json.loads((workdir / "results.json").read_text())
    record = {
        "title": _title(result["command"]),
        "command": result["command"],
        "page": page,
        "environment": result["environment"],
        "tables": result["tables"],
        # Tables keep every digit, because rounding twice is wrong.
        "pictures": _rounded(result["pictures"]),
    }
    for text in _texts(record):
        if _ABSOLUTE.search(text):
            raise ValueError(f"workdir: expected no path of this machine in results, got {text!r}")
    lines = (f"{json.dumps(key)}: {json.dumps(part)}" for key, part in record.items())
    path = docs / "results" / f"{name}.json"
    storage.write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def take_parts(workdir: pathlib.Path, name: str, docs: pathlib.Path = DOCS) -> list[pathlib.Path]:
    """Keeps the records of a run that is made in parts.

    Args:
        workdir: Folder of the run.
        name: Name of the folder to write.
        docs: The folder of pages.

    Returns:
        A file for each part.
    """
    parts = []
    for path in sorted((workdir / "parts").glob("*.json")):
        parts.append(docs / "results" / name / path.name)
        storage.write_atomic(parts[-1], json.dumps(_rounded(storage.read_json(path))) + "\n")
    return parts


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        for part in parts:
            yield from _texts(part)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def results(docs: pathlib.Path = DOCS) -> dict[str, dict[str, Any]]:
    """The files of the gallery by name."""
    paths = sorted((docs / "results").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def pictures(docs: pathlib.Path = DOCS) -> dict[pathlib.Path, figures.Picture]:
    """The pictures of the page, by the name of their file."""
    return {
        docs / "gallery" / _file(name, key): figures.Picture.from_json(picture)
        for name, record in results(docs).items()
        for key, picture in record["pictures"].items()
    }


def _file(name: str, picture: str) -> str:
    return f"{name}-{picture}.png"


def page(docs: pathlib.Path = DOCS) -> str:
    """The text of the page."""
    sections = [_INTRODUCTION]
    for name, record in results(docs).items():
        made_by = record["environment"]
        sections.append(
            f"## {name.replace('_', ' ').capitalize()}\n\n{record['title']}\n\n"
            f"`{record['command']}` ([{name}.json](../results/{name}.json)), Python "
            f"{made_by['python']}, jax {made_by['jax']}, {made_by['device']}. Discussed in "
            f"[{record['page'].removesuffix('.md')}](../{record['page']}).\n"
        )
        for key in record["pictures"]:
            sections.append(f"![{name}: {key}](../gallery/{_file(name, key)})\n")
        for key, rows in record["tables"].items():
            sections.append(f"{key.capitalize()}:\n\n{markdown_table(rows)}\n")
    return "\n".join(sections)


def _title(command: str) -> str:
    words = shlex.split(command)
    module = words[words.index("-m") + 1]
    if module == "experiments.benchmark":
        module = f"experiments.benchmarks.{words[words.index(module) + 1]}"
    path = DOCS.parent / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


_MARKED = re.compile(r"^<!-- results: (\w+)/(.+) -->\n+((?:\|.*\n)+)", re.MULTILINE)


def disagreements(docs: pathlib.Path = DOCS) -> list[str]:
    """Rows of pages' marked tables that are not rows of the table in the file."""
    files, wrong = results(docs), []
    for path in sorted(docs.rglob("*.md")):
        for name, table, text in _MARKED.findall(path.read_text()):
            rows = [
                {key: format_value(value) for key, value in row.items()}
                for row in files[name]["tables"][table]
            ]
            header, _, *lines = (
                [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            )
            for line in lines:
                shown = dict(zip(header, line, strict=True))
                if not any(all(r.get(k, "-") == v for k, v in shown.items()) for r in rows):
                    wrong.append(f"{path.name}, {name}/{table}: {shown}")
    return wrong


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    try:
        if values.add:
            name = values.name or pathlib.Path(values.add).name
            print(take(pathlib.Path(values.add), name, values.page))
            if values.parts:
                print(*take_parts(pathlib.Path(values.add), name), sep="\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    storage.write_atomic(DOCS / "measurements" / "gallery.md", page())
    for path, picture in pictures().items():
        print(figures.draw(path, picture))
    if wrong := disagreements():
        sys.exit("\n".join(["tables that differ from their files:", *wrong]))


if __name__ == "__main__":
    flags.DEFINE_string("add", None, "Workdir of a finished run to take in first.")
    flags.DEFINE_string(
        "name", None, "Name of its file in docs/results, in place of the workdir's."
    )
    flags.DEFINE_string("page", "measurements/benchmarks.md", "Page that discusses it.")
    flags.DEFINE_bool("parts", False, "Keep the records of the run's parts too.")
    app.run(main)
