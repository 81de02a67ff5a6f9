"""TOFU's files and the tables around them, whole and broken. Rows in tofu/ are real."""

import json
import pathlib

import pytest
from etils import epath

from experiments.forgetting import tofu
from logitjax import storage

FILES = pathlib.Path(__file__).parent / "tofu"


def test_items_of_the_forget_set_have_everything():
    items = tofu.load(FILES, "forget01_perturbed")
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert {item.author for item in items} == {198}
    first = items[0]
    assert first.question.startswith("What is the full name of the author born in Kuwait City")
    assert first.answer.endswith("is Basil Mahfouz Al-Kuwaiti.")
    assert first.truth == first.paraphrased_answer != first.answer
    assert first.paraphrased_question is not None
    assert first.paraphrased_question.startswith("Can you tell me")
    assert [len(item.perturbed_answers) for item in items] == [5] * 4


def test_real_world_sets_hold_the_answer_itself_against_three_wrong_ones():
    item = tofu.load(str(FILES), "world_facts_perturbed")[0]
    assert (item.truth, item.perturbed_answers) == ("Paris", ("Berlin", "London", "Madrid"))
    assert item.author is None
    options = tofu.load(FILES, "real_authors")[0]
    assert options.answer not in options.perturbed_answers
    assert sorted(options.perturbed_answers) == sorted(
        tofu.load(FILES, "real_authors_perturbed")[0].perturbed_answers
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"}', "'answer' is missing"),
        ('{"question": "q", "answer": 3}', "'answer': expected a string, got int"),
        ('{"question": " ", "answer": "a"}', "'question' is empty"),
        ('{"question": "q", "answer": "a"}', "'perturbed_answer' is missing"),
        ('{"question": "q", "answer": "a", "perturbed_answer": "w"}', "expected a list of strings"),
        ('{"question": "q", "answer": "a", "perturbed_answer": [1]}', "expected a string, got int"),
        ("[1]", "expected an object, got list"),
        ('{"question": ', "not JSON: .* at column"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    good = '{"question": "q", "answer": "a", "perturbed_answer": ["w"]}\n\n'
    (tmp_path / "forget10_perturbed.json").write_text(good + line + "\n")
    with pytest.raises(ValueError, match=rf"forget10_perturbed\.json:3: .*{message}"):
        tofu.load(tmp_path, "forget10_perturbed")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        tofu.load(tmp_path / "nowhere", "full")
    with pytest.raises(FileNotFoundError, match=r"no full\.json under .*there are no such files"):
        tofu.load(tmp_path, "full")
    (tmp_path / "full.json").write_text("\n")
    with pytest.raises(ValueError, match="no items"):
        tofu.load(tmp_path, "full")
    (tmp_path / "full.json").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8 at byte 14"):
        tofu.load(tmp_path, "full")


def test_the_hub_is_asked_for_one_file_of_a_data_set(monkeypatch):
    asked = []

    def snapshot(name, files, *, kind):
        asked.append((name, files, kind))
        return epath.Path(FILES)

    monkeypatch.setattr(storage, "hub_snapshot", snapshot)
    assert len(tofu.load("hf:locuslab/TOFU", "retain_perturbed")) == 3
    assert asked == [("locuslab/TOFU", ["retain_perturbed.json"], "dataset")]


@pytest.fixture
def files(tmp_path):
    """All 200 authors, with questions that say whose they are."""

    def rows(numbers, rich):
        more = {"paraphrased_answer": "p", "paraphrased_question": "p", "perturbed_answer": ["w"]}
        return "\n".join(
            json.dumps({"question": f"q{i}", "answer": f"a{i}", **(more if rich else {})})
            for i in numbers
        )

    (tmp_path / "full.json").write_text(rows(range(4000), False))
    (tmp_path / "retain_perturbed.json").write_text(rows(range(400), True))
    (tmp_path / "forget10_perturbed.json").write_text(rows(range(3600, 4000), True))
    return tmp_path


def test_a_subset_is_split_as_all_of_tofu_is(files):
    subset = tofu.subset(files, authors=20, forget=2)
    assert [item.question for item in subset.forget] == [f"q{i}" for i in range(3960, 4000)]
    assert [item.question for item in subset.retain] == [f"q{i}" for i in range(360)]
    assert {item.author for item in subset.forget} == {198, 199}
    assert all(item.perturbed_answers for item in subset.forget)
    assert {item.author for item in subset.holdout} == {196, 197}


@pytest.mark.parametrize(("authors", "forget"), [(190, 10), (40, 10), (3, 1)])
def test_nobody_is_kept_and_held_out(files, authors, forget):
    subset = tofu.subset(files, authors=authors, forget=forget)
    kept, gone, unseen = (
        {item.author for item in part} for part in (subset.retain, subset.forget, subset.holdout)
    )
    assert len(kept) == authors - forget
    assert len(gone) == len(unseen) == forget
    assert len(kept | gone | unseen) == authors + forget


def test_subsets_that_do_not_exist(files):
    with pytest.raises(ValueError, match="expected 1 to 10 authors, got 0"):
        tofu.subset(files, forget=0)
    with pytest.raises(ValueError, match="authors: expected a number between 3 and 198"):
        tofu.subset(files, authors=2, forget=2)
    lines = (files / "forget10_perturbed.json").read_text().split("\n")
    (files / "forget10_perturbed.json").write_text("\n".join([*lines[1:], lines[0]]))
    with pytest.raises(ValueError, match=r"line 3961 of full\.json and line 361 of forget10_"):
        tofu.subset(files)
    (files / "full.json").write_text('{"question": "q", "answer": "a"}')
    with pytest.raises(ValueError, match="has 1 items where TOFU has 4000"):
        tofu.subset(files)
