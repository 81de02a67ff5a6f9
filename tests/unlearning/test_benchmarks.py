"""MUSE: its files as they lie in releases and on the hub, and what is made of them."""

import json

import numpy as np
import pytest

from logitjax.models import load_tokenizer
from logitjax.unlearning import Deployed, muse

TOKENIZER = load_tokenizer("tiny")


class Said(Deployed):
    """Says what it is told, and finds some texts likelier than others."""

    def __init__(self, said=(), nll=None):
        for name, value in (("said", said), ("prompts", []), ("nll", nll)):
            object.__setattr__(self, name, value)

    def generate(self, prompts, max_new_tokens, *, stop_ids=(), rows=8, seed=None):
        self.prompts.extend(TOKENIZER.decode(np.asarray(ids).tolist()) for ids in prompts)
        return [np.asarray(TOKENIZER.encode(text)[:max_new_tokens]) for text in self.said]


def write(path, records):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(records))


def test_knowledge_is_what_is_said_before_the_next_question(tmp_path):
    write(tmp_path / "knowmem" / "forget_qa.json", [
        {"question": "Who?", "answer": "Ada Low"}, {"question": "Where?", "answer": "in Rome"}
    ])  # fmt: skip
    write(tmp_path / "knowmem" / "forget_qa_icl.json", [{"question": "A?", "answer": "b"}])
    write(tmp_path / "verbmem" / "forget.json", [{"prompt": "Once upon", "gt": "a time"}])
    rows = muse.load(tmp_path, "knowmem", "forget_qa")
    examples = muse.load(tmp_path, "knowmem", "forget_qa_icl")
    model = Said(["Ada Low\n\nQuestion: Who", "Paris"])
    found = muse.evaluate(model, TOKENIZER, {"forget_knowmem": rows}, examples=examples)
    assert found == {"forget_knowmem": 0.5}
    assert model.prompts[1] == "Question: A?\nAnswer: b\n\nQuestion: Where?\nAnswer: "
    model = Said(["a time"])
    verbatim = muse.load(tmp_path, "verbmem", "forget")
    found = muse.evaluate(model, TOKENIZER, {"forget_verbmem": verbatim}, examples=examples)
    assert found == {"forget_verbmem": 1.0}
    assert model.prompts == ["Once upon"]
    with pytest.raises(ValueError, match="sets: expected names that end in"):
        muse.evaluate(model, TOKENIZER, {"other": rows})


def test_texts_that_were_read_are_told_from_those_that_were_not(tmp_path):
    (tmp_path / "privleak").mkdir()
    (tmp_path / "privleak" / "forget.txt").write_text("aaaa bbbb\n\naaaa cccc\n")
    write(tmp_path / "privleak" / "holdout.json", [{"text": "zzzz zzzz"}, {"text": "zzzz yyyy"}])
    sets = {name: muse.load(tmp_path, "privleak", name) for name in ("forget", "holdout")}
    assert [row.answer for row in sets["forget"]] == ["aaaa bbbb", "aaaa cccc"]
    read = set(TOKENIZER.encode("abc "))
    known = Said(nll=lambda tokens, targets: 1.0 - np.isin(tokens, list(read)))
    found = muse.evaluate(known, TOKENIZER, sets)
    assert found["auc"] == 1.0
    assert found["privleak"] == pytest.approx(-100)


def test_files_of_the_hub_are_read(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet as files

    (tmp_path / "knowmem").mkdir()
    table = pyarrow.Table.from_pylist([{"question": "First?", "answer": "One."}])
    files.write_table(table, tmp_path / "knowmem" / "forget_qa-00000-of-00001.parquet")
    (row,) = muse.load(tmp_path, "knowmem", "forget_qa")
    assert row.answer == "One."


def test_mistakes_are_named(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "forget.json").write_text("[{")
    with pytest.raises(ValueError, match=r"forget.json:1: not JSON"):
        muse.load(tmp_path, "raw", "forget")
