"""The gallery is what its command makes of the files, and pages say what files say."""

import json
import sys
import types

import pytest
from etils import epath
from PIL import Image

from experiments import gallery
from experiments.shared.figures import Panel, Picture, Series
from experiments.shared.report import write_report


def test_page_and_pictures_are_made_of_the_files():
    assert gallery.results()
    assert (gallery.DOCS / "measurements" / "gallery.md").read_text() == gallery.page()
    drawn = gallery.pictures()
    assert set(drawn) == set((gallery.DOCS / "gallery").iterdir())
    for path, picture in drawn.items():
        with Image.open(path) as image:
            assert image.info["Source"] == picture.source, path.name


def test_marked_tables_say_what_their_files_say():
    assert gallery.disagreements() == []


def test_files_are_small_and_name_no_machine():
    for path in (gallery.DOCS / "results").rglob("*.json"):
        assert path.stat().st_size < 60_000, path.name
        assert not any(map(gallery._ABSOLUTE.search, gallery._texts(json.loads(path.read_text()))))


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """A gallery of one finished run."""
    tmp_path = tmp_path_factory.mktemp("docs")
    picture = Picture(panels=[Panel(x="x", y="%", series=[Series(name="a", runs=[[(0, 1)]])])])
    tables = {"accuracy": [{"arm": "ours", "score": 0.123456789}, {"arm": "other", "score": None}]}
    spec = types.SimpleNamespace(name="experiments.few_shot.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "__spec__", spec)
        patch.setattr(sys, "argv", ["x", "--preset=demo", "--workdir=/home/me/runs"])
        write_report(epath.Path(tmp_path / "run"), "# A", tables=tables, pictures={"one": picture})
    gallery.take(tmp_path / "run", "demo", "few_shot.md", docs=tmp_path)
    return tmp_path


def test_a_finished_run_is_taken_in(docs):
    text = gallery.page(docs)
    source = (gallery.DOCS.parent / "experiments" / "few_shot" / "__main__.py").read_text()
    assert source.removeprefix('"""').splitlines()[0] in text
    assert "`python -m experiments.few_shot --preset=demo`" in text
    assert "| ours  | 0.1235 |" in text
    assert json.loads((docs / "results" / "demo.json").read_text())["tables"]["accuracy"] == [
        {"arm": "ours", "score": 0.123456789},
        {"arm": "other", "score": None},
    ]
    assert [path.name for path in gallery.pictures(docs)] == ["demo-one.png"]


def test_parts_of_a_long_run_are_kept(tmp_path):
    (tmp_path / "run" / "parts").mkdir(parents=True)
    (tmp_path / "run" / "parts" / "npo-0.json").write_text('{"p": [0.123456789, 1], "text": "a"}')
    (path,) = gallery.take_parts(tmp_path / "run", "long", docs=tmp_path)
    assert path == tmp_path / "results" / "long" / "npo-0.json"
    assert json.loads(path.read_text()) == {"p": [0.123457, 1], "text": "a"}


@pytest.mark.parametrize(("cell", "agrees"), [("0.1235", True), ("0.1236", False)])
def test_a_cell_that_differs_from_its_file_is_found(docs, cell, agrees):
    table = f"| score  | arm  |\n|--------|------|\n| {cell} | ours |\n| - | other |\n"
    (docs / "page.md").write_text(f"# P\n\n<!-- results: demo/accuracy -->\n\n{table}")
    assert (gallery.disagreements(docs) == []) is agrees


def test_a_path_of_the_machine_is_refused(docs):
    path = docs / "run" / "results.json"
    record = json.loads(path.read_text()) | {
        "command": "python -m experiments.few_shot --data=/home/me/data"
    }
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="no path of this machine"):
        gallery.take(docs / "run", "demo", "few_shot.md", docs=docs)
