import pytest

from experiments.shared.wikitext103 import split_articles
from logitjax import data

SPEC = "tfds:experiments.shared.wikitext103:Wikitext103"

# In the files every line begins and ends with a space, empty ones are a single space.
ARTICLE = "\n".join(
    f" {line} " if line else " "
    for line in (
        "",
        "= Robert <unk> =",
        "",
        "Robert is a naïve actor , born 1 @,@ 970 . He = no one .",
        "",
        "= = Career = =",
        "",
        "He acted .",
        "= x =",
        "He acted on .",
        "",
        "",
    )
)


def test_articles_begin_at_titles_between_empty_lines():
    both = ARTICLE + ARTICLE.replace("Robert <unk>", "Du = o")
    articles = list(split_articles(both.splitlines()))
    assert [title for title, _ in articles] == ["Robert <unk>", "Du = o"]
    assert articles[0][1].startswith("= Robert <unk> =")
    assert articles[0][1].endswith("He acted . \n = x = \n He acted on .")
    assert "= = Career = =" in articles[1][1]


def test_prepared_from_files_that_were_fetched_by_hand(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is made from files.*wiki\.train\.raw"):
        data.load_examples(SPEC, data_dir=tmp_path)
    folder = tmp_path / "downloads" / "manual" / "wikitext-103-raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 3), ("valid", 1), ("test", 2)):
        (folder / f"wiki.{name}.raw").write_text(ARTICLE * count, encoding="utf-8")
    sizes = {
        split: len(data.load_examples(SPEC, split=split, data_dir=tmp_path))
        for split in ("train", "validation", "test")
    }
    assert sizes == {"train": 3, "validation": 1, "test": 2}
    first = data.load_examples(SPEC, data_dir=tmp_path)[0]
    assert first["title"] == "Robert <unk>"
    assert "naïve" in first["text"]
