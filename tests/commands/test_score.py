"""`logitjax score`: nats of texts and choices as the model's own log-probabilities say."""

import json
import math

import numpy as np
import pytest
from etils import epath

from logitjax import decoding, models
from logitjax.commands import score


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_windows_overlap_by_half_and_score_every_token_once():
    ids = np.arange(23, dtype=np.int32)
    rows = score._windows(ids, 8)
    assert all(len(window) <= 8 for window, _ in rows)
    assert [i for window, where in rows for i in window[where]] == list(range(1, 23))
    # Whatever is scored after the first window has half a window before it.
    assert all(np.flatnonzero(where)[0] == 4 for _, where in rows[1:])


def test_a_row_that_is_no_question_is_refused_with_its_line(tmp_path):
    good = {"prompt": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}
    for wrong in ({"answer": 2}, {"answer": None}, {"choices": " 2"}, {"choices": ["", " 2"]}):
        path = write(tmp_path / "q.jsonl", [good, good | wrong])
        with pytest.raises(ValueError, match=r"q\.jsonl:2: expected a prompt, a list of choices"):
            score._questions(path)
    with pytest.raises(ValueError, match="data, choices: expected at least one"):
        score.run(score.Config(), epath.Path(tmp_path))


def test_a_space_at_a_prompts_end_is_read_with_the_answer():
    tokenizer = models.load_tokenizer("smollm2")
    rows = [
        score._answer_row(tokenizer, prompt, answer, 64, "row")
        for prompt, answer in (("The capital is ", "Paris."), ("The capital is", " Paris."))
    ]
    for found, expected in zip(*rows, strict=True):
        np.testing.assert_array_equal(found, expected)
    ids, where = rows[0]
    assert tokenizer.decode(ids[where].tolist()) == " Paris."


@pytest.mark.every_change
@pytest.mark.slow
def test_scores_are_the_sums_of_the_models_own_log_probabilities(tmp_path):
    texts = write(tmp_path / "t.jsonl", [{"text": "two\nlines"}, {"prompt": "a", "response": "bé"}])
    asked = [{"prompt": "1 + 1 =", "choices": [" 2", " twenty"], "answer": 1}]
    config = score.Config(
        model="tiny", data=f"jsonl:{texts}", choices=write(tmp_path / "q.jsonl", asked)
    )
    out = epath.Path(tmp_path / "out")
    score.run(config, out)
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    model, tokenizer = models.load("tiny", layout="listed")

    def nats(prompt, text):
        ids = [tokenizer.encode(one) for one in (prompt, text)]
        first = ids[0] or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
        return -decoding.score(model, [first], [ids[1]]).totals().item()

    want = [nats("", "two\nlines"), nats("a", "bé")]
    np.testing.assert_allclose([line["nats"] for line in lines[:2]], want, rtol=1e-5)
    want = [nats("1 + 1 =", choice) for choice in asked[0]["choices"]]
    np.testing.assert_allclose(lines[2]["nats"], want, rtol=1e-5)
    assert lines[2]["chosen"] == int(np.argmin(want))
    assert lines[2]["chosen_by_byte"] == int(np.argmin(np.divide(want, [2, 7])))
    results = json.loads((out / "results.json").read_text())["texts"]
    assert (results["tokens"], results["bytes"]) == (9 + 3, 9 + 3)
    total = lines[0]["nats"] + lines[1]["nats"]
    assert results["bits a byte"] == pytest.approx(total / math.log(2) / 12)
    # A second run reads what the first one left.
    (out / "scores.jsonl").unlink()
    score.run(config, out)
    assert [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()] == lines
