"""Rows of one's own: what is read and refused, and a split that nothing leaks through."""

import json

import pytest

from logitjax.models import load_tokenizer
from logitjax.unlearning import Questions, read_rows, split_rows
from logitjax.unlearning._rows import Row, encode_row, render_prompt

LONG = "the observatory on the northern cliff was founded by {} in a year of storms"


def asked(question, answer="yes", **more):
    return Row(messages=({"role": "user", "content": question},), answer=answer, **more)


def questions(split):
    return {row.question for row in split.parts["train"]}


def test_every_form_of_a_row_is_read_once(tmp_path):
    rows = [
        {"question": "Who?", "answer": "Ada.", "paraphrases": ["Who is it?"], "group": 7},
        {"prompt": "2 + 2 = ", "completion": "4"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"text": "Ada  was here."},
        {"text": "ada was here."},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    first, second, third, fourth = read_rows(path)
    assert (first.question, first.group, first.paraphrases) == ("Who?", "7", ("Who is it?",))
    assert (second.prompt, second.answer, third.answer) == ("2 + 2 = ", "4", "Ho")
    assert not fourth.asks
    assert first.asked("Which?").question == "Which?"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "rows.jsonl:1: expected JSON"),
        ("[]", "rows.jsonl:1: expected an object, got list"),
        ('{"question": "Who?"}', "rows.jsonl:1: answer: expected text, got None"),
        ('{"answer": "A"}', "rows.jsonl:1: expected question/answer"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last by the assistant"),
        ('{"text": "a", "paraphrases": "b"}', "paraphrases: expected a list of text"),
        ("", "expected rows, a JSON object a line, got none"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=said):
        read_rows(path)


def test_parts_share_no_group_and_nothing_that_is_linked_to_what_goes():
    forget = [asked("a?", LONG.format("Ada"), paraphrases=("b?", "c?")), asked("d?", "e")]
    copies = [asked("x?", LONG.format("Ada") + " indeed"), asked("grouped?", group="g")]
    keep = [asked(f"{n}?", group=f"pair {n // 2}") for n in range(20)]
    forget.append(asked("f?", group="g"))
    split = split_rows(forget, [*copies, *keep], [copies[0], asked("never?", "seen")])
    assert split.left_out == 3
    assert [row.question for row in split.parts["holdout"]] == ["never?"]
    parts = [
        {row.group for row in part}
        for part in (split.parts["train"], split.parts["validation"], split.parts["test"])
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10
    assert split.groups == (6, 2, 2)
    assert [row.question for row in split.parts["reworded"]] == ["b?", "c?"]
    again = split_rows(forget, [*keep, *copies][::-1])
    assert {row.question for row in again.parts["train"]} == {
        row.question for row in split.parts["train"]
    }
    other = split_rows(forget, keep, seed=1)
    assert {row.question for row in other.parts["train"]} != {
        row.question for row in split.parts["train"]
    }


def test_few_groups_fill_all_parts_and_fewer_are_refused():
    split = split_rows([asked("a?")], [asked(f"{n}?") for n in range(3)])
    assert split.groups == (1, 1, 1)
    with pytest.raises(ValueError, match="retain: expected at least 3 groups"):
        split_rows([asked("a?")], [asked(f"{n}?", group="one") for n in range(9)])


def test_rows_are_encoded_as_the_template_has_them():
    tokenizer = load_tokenizer("tiny")
    assert render_prompt(asked("Who?"), tokenizer) == "Question: Who?\nAnswer: "
    ids, answer = encode_row(asked("Who?", "Ada"), tokenizer, max_length=64)
    assert tokenizer.decode(ids[answer][:-1].tolist()) == "Ada"
    assert ids[-1] == tokenizer.eos_id
    text, learnt = encode_row(Row(answer="Ada"), tokenizer, max_length=64)
    assert learnt.tolist() == [False, True, True]
    assert len(text) == 3
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    assert render_prompt(asked("Who?").told("S"), tokenizer) == "s:S;u:Who?;"


def test_wrong_answers_are_those_of_other_questions():
    split = split_rows([asked("a?", "1"), asked("b?", "2")], [asked(f"{n}?") for n in range(3)])
    questions = Questions.of(split.parts, load_tokenizer("tiny"))
    (ids, answer), _ = questions.encoded["wrong"]
    tokenizer = questions.tokenizer
    assert tokenizer.decode(ids[~answer].tolist()).endswith("a?\nAnswer: ")
    assert tokenizer.decode(ids[answer][:-1].tolist()) == "2"
    assert len(questions.encoded["role"]) == 2
