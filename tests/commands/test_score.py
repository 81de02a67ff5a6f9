"""`logitjax score`: nats of texts and choices as the model's own log-probabilities say."""

import json
import math

import numpy as np
import pytest
from etils import epath

from logitjax import decoding, models
from logitjax.commands import _flags, score


def _config(**values):
    return _flags.build(score.Config, {"model": "tiny"} | values)


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


def test_every_window_and_what_is_left_of_a_prompt_begin_with_the_mark():
    ids = np.r_[99, np.arange(1, 23)].astype(np.int32)
    for most in (2, 3, 8):
        rows = score._windows(ids, most, [99])
        assert all(len(window) <= most and window[0] == 99 for window, _ in rows)
        assert not any(where[0] for _, where in rows)
        assert [i for window, where in rows for i in window[where]] == list(range(1, 23))
    row = ids, np.arange(23) >= 20
    cut, where = score._fitted(row, 8, [99], "row")
    assert cut.tolist() == [99, *range(16, 23)]
    assert cut[where].tolist() == [20, 21, 22]
    # Without a mark, or where the row does not begin with it, the last tokens are kept.
    for mark in ([], [98]):
        assert score._fitted(row, 8, mark, "row")[0].tolist() == list(range(15, 23))
    assert score._fitted(row, 23, [99], "row") is row
    with pytest.raises(ValueError, match="row: 3 tokens of an answer, max_length is 3"):
        score._fitted(row, 3, [99], "row")


def test_a_prompt_that_was_cut_is_told(tmp_path):
    tokenizer = models.load_tokenizer("tiny")
    asked = {"id": "q:1", "prompt": "abcdef", "choices": ["g", "hij"], "answer": 0}
    answered = {"id": "t:1", "prompt": "abcdef", "response": "g"}
    for most, cut in ((9, False), (8, True)):
        assert score._choice_item(tokenizer, asked, most).record["cut"] is cut
    for most, cut in ((7, False), (6, True)):
        assert score._text_item(tokenizer, answered, most).record["cut"] is cut
    records = [{"cut": cut, "nats": 1.0, "tokens": 1, "bytes": 1} for cut in (True, False, True)]
    results = {"texts": score._text_results(records)}
    assert results["texts"]["cut prompts"] == 2
    assert "`--max_length=6` or the models' context**: 2 of the texts." in score._cut(
        score.Config(max_length=6), results
    )
    assert not score._cut(score.Config(), {"texts": score._text_results(records[1:2])})


def test_questions_may_hold_any_end_of_line(tmp_path):
    asked = {"prompt": "a\u2028b\x85c", "choices": [" 2", " 3"], "answer": 0}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(asked, ensure_ascii=False) + "\r\n" + json.dumps(asked))
    questions = score._questions(str(path))
    assert [row["id"] for row in questions] == ["q.jsonl:1", "q.jsonl:2"]
    assert all(row["prompt"] == asked["prompt"] for row in questions)


def test_mistakes_are_told_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "load_ensemble", lambda *_, **__: pytest.fail("weights are read"))

    def refused(**values):
        with pytest.raises(ValueError, match=r"^\S") as error:
            score.run(_config(**values), epath.Path(tmp_path / "out"))
        return str(error.value)

    questions = write(tmp_path / "q.jsonl", [{"prompt": "a"}])
    assert "q.jsonl:1: expected a prompt" in refused(choices=questions)
    long = write(tmp_path / "t.jsonl", [{"prompt": "a", "response": "b" * 600}])
    assert "600 tokens of an answer, max_length is 512" in refused(data=f"jsonl:{long}")
    for spec, message in (
        ("dexperts", "top_p=1, which excludes no token of a text, got top_p=0.9"),
        ("contrastive", "plausibility=0, "),
        ("logit_difference:filter=clean,outside=exclude", "outside=keep, "),
    ):
        assert message in refused(choices=questions, fusion=spec)
    for spec in ("dexperts:top_p=1", "contrastive:plausibility=0"):
        assert "q.jsonl:1" in refused(choices=questions, fusion=spec)


def test_a_loss_that_is_not_finite_is_told_with_its_row():
    row = np.arange(4, dtype=np.int32), np.arange(4) > 0
    items = [score._Item({"id": f"t.jsonl:{i}"}, [[row, row]], [4]) for i in (1, 2)]

    def nll_fn(tokens, targets):
        # Batches of one keep their order: the third row is the second item's first.
        nll_fn.calls += 1
        return np.where(targets, np.inf if nll_fn.calls == 3 else 1.0, 0.0)

    nll_fn.calls = 0
    with pytest.raises(ValueError, match=r"^t\.jsonl:2: 3 of 3 losses are not finite"):
        score._scored(nll_fn, items, 1)


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
        score._answer_row(tokenizer, prompt, answer)
        for prompt, answer in (("The capital is ", "Paris."), ("The capital is", " Paris."))
    ]
    for row, expected in zip(*rows, strict=True):
        np.testing.assert_array_equal(row, expected)
    ids, where = rows[0]
    assert tokenizer.decode(ids[where].tolist()) == " Paris."


@pytest.mark.every_change
@pytest.mark.slow
def test_scores_are_the_sums_of_the_models_own_log_probabilities(tmp_path):
    texts = write(tmp_path / "t.jsonl", [{"text": "two\nlines"}, {"prompt": "a", "response": "bé"}])
    asked = [{"prompt": "1 + 1 =", "choices": [" 2", " twenty"], "answer": 1}]
    config = _config(data=f"jsonl:{texts}", choices=write(tmp_path / "q.jsonl", asked))
    out = epath.Path(tmp_path / "out")
    score.run(config, out)
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    model, tokenizer = models.load("tiny", layout="listed")

    def nats(prompt, text):
        ids = [tokenizer.encode(one) for one in (prompt, text)]
        first = ids[0] or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
        return -decoding.score(model, [first], [ids[1]]).logprobs.sum().item()

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
    # But not for other weights under the same name.
    moved = {"tiny": models.load("tiny:1", layout="listed")}
    load = models.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda spec, **options: moved.get(spec) or load(spec))
        score.run(config, out)
    again = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in again] == [line["id"] for line in lines]
    assert abs(again[0]["nats"] - lines[0]["nats"]) > 1e-3
