"""The examples run as they stand, and the notebooks are made of them."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def names(paths):
    return [path.stem for path in paths]


def each(path):
    """Minutes of solvers of twenty thousand nodes are not for every change."""
    every = () if path.stem == "compare_with_ott" else pytest.mark.every_change
    return pytest.param(path, marks=every, id=path.stem)


@pytest.mark.slow
@pytest.mark.parametrize("path", [each(path) for path in EXAMPLES])
def test_an_example_runs_and_says_that_it_worked(path, tmp_path):
    # Of another trainer's the docstring says by which extra it comes.
    for extra in re.findall(r"(?:logitjax|'\.)\[(\w+)\]", path.read_text()):
        pytest.importorskip(extra)
    # As a user has it: outside of the repository, and with one device but for the mesh's own eight.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("worked: ")
    assert not list(tmp_path.iterdir())


def test_examples_are_few_short_and_on_their_page():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert set(re.findall(r"\(../examples/(\w+)\.py\)", page)) == set(names(EXAMPLES))
    assert 5 <= len(EXAMPLES) <= 13
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 60, path.name


def cells(text):
    """(kind, source) of a file in percent form."""
    parts = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
        parts.append(("markdown" if "[markdown]" in head else "code", body.strip()))
    return parts


def test_notebooks_are_their_files_run_from_top_to_bottom():
    listed = re.search(r"^NOTEBOOKS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(names(NOTEBOOKS)) == set(listed[1].split())
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        made = json.loads(path.read_text())["cells"]
        assert [(c["cell_type"], "".join(c["source"]).strip()) for c in made] == cells(
            path.with_suffix(".py").read_text()
        ), f"{path.name}: make notebooks"
        outputs = [o for c in made if c["cell_type"] == "code" for o in c["outputs"]]
        assert "worked: " in json.dumps(outputs[-1]), path.name
