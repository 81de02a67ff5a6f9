"""Published tasks: rows as their authors write them, grades worked out by hand."""

import json

import numpy as np
import pytest
from flax import nnx

from experiments.dynamic_fusion import __main__ as dynamic_fusion
from experiments.dynamic_fusion import graded_tasks as tasks
from logitjax.models import Decoder, DecoderConfig, load_tokenizer

GSM8K = {"question": "2 and 3?", "answer": "It is <<2+3=5>>5.\n#### 1,005"}
ROWS = {
    "gsm8k": GSM8K,
    "trivia_qa": {"question": "Who?", "answer": {"value": "The Beatles", "aliases": ["Beatles"]}},
    "cnn_dm": {"article": "Long.", "highlights": "It was so."},
    "truthful_qa": {
        "question": "Is it?",
        "mc1_targets": {"choices": ["No.", "Yes."], "labels": [0, 1]},
    },
    "mmlu": {"question": "Which?", "choices": ["a", "b", "c"], "answer": 2},
}


def written(directory, name, rows=6):
    directory.mkdir(exist_ok=True)
    for split in ("train", "test"):
        text = "\n".join([json.dumps(ROWS[name])] * rows)
        (directory / f"{split}.jsonl").write_text(text + "\n\n")
    return f"{name}:{directory}"


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_published(name, tmp_path):
    task = tasks.load_graded(written(tmp_path, name))
    assert {s: len(q) for s, q in task.splits.items()} == {"train": 5, "validation": 1, "test": 6}
    question = task.splits["test"][0]
    assert question.prompt.endswith((":", "Answer:"))
    grade = task.kind.grade
    if grade is None:
        assert set(question.right) < set(question.choices)
        assert question.response in question.right
    else:
        assert grade(question.response, question.right) == 1.0
    spec = tasks.write_for_tuning(task, tmp_path / "tune")
    first = json.loads((tmp_path / "tune/train.jsonl").read_text().splitlines()[0])
    assert (first["prompt"], first["response"]) == (question.prompt, question.response)
    assert spec.startswith("jsonl:")


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("gsm8k", "First 12, so the answer is $1005.00.", 1.0),
        ("gsm8k", "1005 minus 1 is 1,004", 0.0),
        ("gsm8k", "no idea", 0.0),
        ("trivia_qa", " the  BEATLES!", 1.0),
        ("trivia_qa", "Beatles and others", 0.0),
        # Bigrams: "it was" of ("it was", "was so") and ("it was", "was not"): P = R = 1/2.
        ("cnn_dm", "It was not", 0.5),
        ("cnn_dm", "", 0.0),
    ],
)
def test_grades_by_hand(name, answer, expected):
    kind = tasks.KINDS[name]
    assert kind.grade is not None
    assert kind.grade(answer, kind.read(ROWS[name]).right) == pytest.approx(expected)


def test_the_response_of_gsm8k_has_no_calculator_notes():
    assert tasks.KINDS["gsm8k"].read(GSM8K).response == " It is 5.\nThe answer is 1,005"


def test_mistakes_name_file_and_line(tmp_path):
    with pytest.raises(ValueError, match="expected one of gsm8k"):
        tasks.load_graded("sudoku:x")
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl: gsm8k needs"):
        tasks.load_graded(f"gsm8k:{tmp_path}")
    spec = written(tmp_path, "mmlu")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS["mmlu"]) + "\n" + '{"question": "x"}')
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: KeyError: 'choices'"):
        tasks.load_graded(spec)


@pytest.mark.every_change
@pytest.mark.slow
def test_choices_and_free_answers_are_graded(tmp_path):
    tokenizer = load_tokenizer("tiny")
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
    mmlu = tasks.load_graded(written(tmp_path / "a", "mmlu"))
    questions = mmlu.splits["test"]
    by_size = [
        tasks.grade(model, mmlu.kind, questions, tokenizer, batch_size=size, max_prompt=64)
        for size in (18, 5)
    ]
    assert by_size[0] == by_size[1]
    assert len(set(by_size[0])) == 1  # the same question each time
    # Whichever letter it finds likeliest is right if the key says so.
    graded = []
    for letter in "ABC":
        row = {**ROWS["mmlu"], "answer": "ABC".index(letter)}
        one = [tasks.KINDS["mmlu"].read(row)]
        graded += tasks.grade(model, mmlu.kind, one, tokenizer, batch_size=4, max_prompt=64)
    assert sorted(graded) == [0.0, 0.0, 1.0]
    free = tasks.Kind(
        read=tasks.KINDS["gsm8k"].read, grade=lambda answer, right: 1.0, max_new_tokens=4
    )
    gsm8k = tasks.load_graded(written(tmp_path / "b", "gsm8k"))
    grades = tasks.grade(model, free, gsm8k.splits["test"], tokenizer, batch_size=4, max_prompt=8)
    np.testing.assert_array_equal(grades, np.ones(6))


def test_the_paper_preset_is_a_configuration():
    config = dynamic_fusion.Config(**dynamic_fusion.PRESETS["paper"])
    assert tasks.is_graded(config.domain)
    assert not tasks.is_graded("tfds:first_folio")
