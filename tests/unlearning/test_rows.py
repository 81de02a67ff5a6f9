"""Rows of one's own: what is read and refused, and a split that nothing leaks through."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from logitjax.models import load_model, load_tokenizer
from logitjax.unlearning import METHODS, Questions, UnlearnConfig, Unlearning, split_rows
from logitjax.unlearning._questions import _evenly
from logitjax.unlearning._rows import Row, encode_question, encode_row, render_prompt
from logitjax.unlearning._unlearn_update import _sides
from logitjax.unlearning._ways import WAYS, asked_so, search

LONG = "the observatory on the northern cliff was founded by {} in a year of storms"


def asked(question, answer="yes", **more):
    return Row(messages=({"role": "user", "content": question},), answer=answer, **more)


def questions(split):
    return {row.question for row in split.parts["train"]}


def test_every_form_of_a_row_is_read_once(tmp_path, caplog):
    rows = [
        {"question": "Who?", "answer": "Ada.", "paraphrases": ["Who is it?"], "group": 7},
        {"prompt": "2 + 2 = ", "completion": "4"},
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
            ],
            "paraphrases": "",
        },
        {"text": "Ada  was here."},
        {"text": "ada was here."},
        {"prompt": [{"role": "user", "content": "Q"}],
         "completion": [{"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "H"}, {"from": "gpt", "value": "G"}]},
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"question": "Which?", "answer": ["one", "two"], "paraphrased_question": "What one?"},
        {"question": "When?", "answer": ["noon"], "group": 0},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    first, second, third, fourth, trl, sharegpt, alpaca, *answers = Row.read(path)
    assert "1 rows repeat others" in caplog.text
    caplog.clear()
    path.with_name("two.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert len(Row.read(path.with_name("two.jsonl"))) == 2
    assert not caplog.text
    assert [(row.question, row.answer) for row in (trl, sharegpt, alpaca)] == [
        ("Q", "A"), ("H", "G"), ("Add.\n1, 2", "3")
    ]  # fmt: skip
    assert [(r.answer, r.group, r.paraphrases) for r in answers] == [
        ("one", "Which?", ("What one?",)), ("two", "Which?", ("What one?",)), ("noon", "0", ())
    ]  # fmt: skip
    assert alpaca.line.endswith("rows.jsonl:15")
    assert (first.question, first.group, first.paraphrases) == ("Who?", "7", ("Who is it?",))
    assert (second.prompt, second.answer, third.answer) == ("2 + 2 = ", "4", "Ho")
    assert [turn["role"] for turn in third.messages] == ["user"]
    assert not fourth.asks
    assert first.asked("Which?").question == "Which?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl:1: expected JSON"),
        ("[]", "rows.jsonl:1: expected an object, got list"),
        ('{"question": "Who?"}', "rows.jsonl:1: messages: content of assistant: expected text"),
        ('{"answer": "A"}', "rows.jsonl:1: expected question/answer"),
        ('{"question": "Who?", "answer": ["A", 2]}', r"expected text, got \['A', 2\]"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last by the assistant"),
        ('{"text": "a", "paraphrases": "b"}', "paraphrases: expected a list of text"),
        ('{"text": "a", "paraphrases": 5}', "paraphrases: expected a list of text, got 5"),
        ('{"text": "a", "paraphrases": {"b": 1}}', "paraphrases: expected a list of text"),
        ('{"text": "a", "paraphrases": [" "]}', "rows.jsonl:1: paraphrases: expected text"),
        ('{"text": "a\\ud83d"}', "text: expected text, got half of a character"),
        ('{"text": "b"}\n{"text": "caf\xe9"}', "rows.jsonl:2: 'utf-8' codec can't decode"),
        ("[" * 500, "rows.jsonl:1: nested"),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}'
            "]}",
            "messages: content of user: expected text, got ''",
        ),
        ('{"messages": [5, {"role": "assistant", "content": "b"}]}', "expected turns of role"),
        (
            '{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}',
            "expected turns of role",
        ),
        ("", "expected rows, one JSON object per line, got none"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        Row.read(path)
    assert "\n" not in str(error.value)


def test_a_row_and_its_copy_are_one_with_what_both_say(tmp_path):
    rows = [
        {"question": "Who is Ada?", "answer": "A poet."},
        {"question": "who is  ada?", "answer": "a poet.", "group": "ada", "paraphrases": ["Ada?"]},
        {"text": "Who is Ada? A poet."},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode())
    first, second = Row.read(path)
    assert (first.answer, first.group, first.paraphrases) == ("A poet.", "ada", ("Ada?",))
    assert not second.asks


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


def test_what_asks_the_same_is_linked_and_neighbours_are_told_from_the_rest(caplog):
    forget = [asked("Where does the Olbri lie?", "At Tolvik.", paraphrases=("Port of the Olbri?",))]
    near = asked("Which yard built the Olbri?", "Kessler", paraphrases=("Olbri's yard?",))
    alike = asked("At which port does the Olbri lie?", "Tolvik.")
    keep = [asked(f"{n} + 1?", str(n)) for n in range(12)]
    # A row to keep that is a listed paraphrase would train what is to go; case does not matter.
    same = asked("port of the Olbri", "At Tolvik.")
    unseen = [asked(f"Where does ship {n} lie?", f"At {n}.") for n in range(5)]
    split = split_rows(forget, [same, near, alike, *keep], [*unseen, keep[0]])
    assert split.left_out == 2
    kept = [row for part in ("train", "validation", "test") for row in split.parts[part]]
    assert same.question not in {row.question for row in kept}
    kinds = {row.question: row.kind for row in kept}
    assert [kinds[q] for q in (near.question, near.paraphrases[0], "3 + 1?")] == [
        "near", "reworded", "other"
    ]  # fmt: skip
    # A near row without paraphrases is kept in another form, too.
    again = [row for row in kept if alike.question in row.question and row.kind == "reworded"]
    assert [(row.question != alike.question, row.answer) for row in again] == [(True, "Tolvik.")]
    # Said in other words, it stays, and that is said.
    assert split.alike == 1
    assert "1 rows are similar to one to forget, such as 'At which port" in caplog.text
    assert "holdout:" not in caplog.text
    split_rows(forget, keep, [*unseen, asked("How old is the Olbri?", "Nine.")])
    assert "holdout: 1 rows share a name with one to forget, such as 'How old" in caplog.text
    # One holdout sets the goal, another judges; what is kept was taught, and is in neither.
    sides = [{r.question for r in split.parts[p]} for p in ("holdout", "holdout_test")]
    assert list(map(len, sides)) == [3, 2]
    assert not sides[0] & sides[1]


def test_every_way_to_ask_keeps_the_answer_and_its_examples_are_rows_to_keep():
    row = asked("Who?", "Ada.").told("Be brief.")
    others = [asked(f"{n}?", f"is {n}") for n in range(6)]
    for way in WAYS:
        pair = [asked_so(row, way, others, judging=judging) for judging in (False, True)]
        assert [made.answer for made in pair] == ["Ada.", "Ada."]
        assert (pair[0] == pair[1]) is (way == "asked")  # what judges was never trained on
    both = asked_so(row, "in a role + in context", others)
    assert [turn["role"] for turn in both.messages] == [
        "system",
        *["user", "assistant"] * 3,
        "user",
    ]
    assert asked_so(Row(prompt="a", answer="b"), "without a template", others) is None
    assert asked_so(row, "in context", []) is None
    talk = dataclasses.replace(row, messages=2 * row.messages)
    assert asked_so(talk, "in context", others) is None
    # Texts, prompts beside questions, and conversations are no examples of a question.
    kinds = [Row(answer="text"), Row(prompt="p", answer="q"), others[0].told("Be long."), others[1]]
    # Nor is what has its answer, or is the same question.
    kinds += [asked("Whose?", "Ada."), asked("Who?", "Bo.")]
    alike = asked_so(row, "in context", kinds)
    assert [turn["content"] for turn in alike.messages] == ["Be brief.", "1?", "is 1", "Who?"]
    prompt = asked_so(Row(prompt="x is", answer=" y"), "in context",
                      [Row(prompt=f"{n} is", answer=f" {n}") for n in range(3)])  # fmt: skip
    assert prompt.prompt == "0 is 0\n1 is 1\n2 is 2\nx is"


def test_what_the_system_says_links_nothing_and_scripts_without_spaces_do():
    def told(question, answer):
        return asked(question, answer).told(" ".join(f"rule{n}" for n in range(60)))

    keep = [told(f"what is {n} and one", f"that is {n + 1}") for n in range(9)]
    assert split_rows([told("who is it", "it is Ada")], keep).left_out == 0
    copied = "".join(map(chr, range(0x5929, 0x5929 + 18)))
    near = asked("a", copied[:-1] + "\u6708")
    split = split_rows([asked("a", copied)], [near, asked("?!", "!?"), *keep])
    assert split.left_out == 1
    # Of a form that many rows share each is compared with the first of them alone.
    form = "fill in all that is asked below and sign it at the end of page"
    many = split_rows(
        [asked("who", "Ada")], [asked(f"{n}", f"{form} {n}") for n in range(300)] + keep
    )
    assert sum(many.groups) <= 10


def test_few_groups_fill_all_parts_and_fewer_are_refused():
    split = split_rows([asked("a?")], [asked(f"{n}?") for n in range(3)])
    assert split.groups == (1, 1, 1)
    with pytest.raises(ValueError, match="retain: expected at least 3 groups"):
        split_rows([asked("a?")], [asked(f"{n}?", group="one") for n in range(9)])


def test_rows_are_encoded_as_the_template_has_them():
    tokenizer = load_tokenizer("tiny")
    assert render_prompt(asked("Who?"), tokenizer) == "Question: Who?\nAnswer: "
    question = encode_question(asked("Who?", begun="Sure: "), tokenizer)
    assert tokenizer.decode(question.tolist()) == "Question: Who?\nAnswer: Sure: "
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
    assert len(questions.in_way("forget", "in a role")) == 2
    # A text has no question that another's answer could be given to.
    texts = Questions.of({"forget": [Row(answer="one text"), Row(answer="another")]}, tokenizer)
    assert not texts.encoded["wrong"]


@pytest.mark.parametrize("of_anyone", [False, True])
def test_neighbours_and_strangers_are_given_what_the_model_says(monkeypatch, of_anyone):
    monkeypatch.setattr(
        Questions, "_said", lambda self, model, rows, _=None: [" Rome. "] * len(rows)
    )
    people = ("Ada Lee", "Cy Dor", "Bo Fin", "Al Gor", "Di Hub")

    def is_known(self, model, rows, every=False):
        who = [row.question.split(" ", 2)[2] for row in rows]
        # Of the twin of the row that could be judged, or of that of another row.
        sure = (*people[2:], "Ada Lee", "Cy Gor" if of_anyone else "Ada Dor")
        return [n[:6] != "Cy Dor" and (n.startswith(sure) or not every) for n in who]

    monkeypatch.setattr(Questions, "_known", is_known)
    forget = [asked("Where was Ada Lee born?", "Ada Lee was born in Oslo.")]
    keep = [asked(f"What does {n} play?", "Go.") for n in people[1:]]
    parts = {"forget": forget, "train": keep[:2], "validation": keep[2:3], "test": keep[3:]}
    rows = Questions.of(parts, load_tokenizer("tiny")).with_neighbours(load_model("tiny")).rows
    # What it does not know no limit holds for, and is trained on alone; as what it says of anyone.
    assert [row.kind for row in rows["train"][:2]] == ["unknown", ""]
    assert {row.kind for row in rows["train"][2:]} == {"made"}
    judged = [row.question for part in ("validation", "test") for row in rows[part][1:]]
    assert judged == ["Where was Bo Fin born?"][of_anyone:]
    # A completion keeps the space that it begins with.
    assert {row.answer for row in rows["stranger"]} == {" Rome."}
    assert all("Ada Lee" not in row.question for row in rows["stranger"])


def test_what_is_asked_of_another_kind_of_subject_is_trained_on_alone(monkeypatch):
    """The capital of a person: what a model makes up there is nothing that it could lose."""
    monkeypatch.setattr(Questions, "_said", lambda *args: ["It lies in Rome."] * len(args[2]))
    monkeypatch.setattr(Questions, "_known", lambda *args, **_: [True] * len(args[2]))
    capitals = [asked(f"What is the capital of {n}?", "So.") for n in ("Egypt", "China", "Japan")]
    forget = [asked(f"Where was {n} born?", "In Bo.") for n in ("Ada Lee", "Cy Dor", "Al Gor")]
    parts = {"forget": forget, "train": capitals[:1], "validation": capitals[1:], "test": []}
    rows = Questions.of(parts, load_tokenizer("tiny")).with_neighbours(load_model("tiny")).rows
    made = [row for row in rows["train"] if row.kind == "far-fetched"]
    assert "What is the capital of Ada Lee?" in {row.question for row in made}
    assert not any("Ada" in row.question for part in ("validation", "test") for row in rows[part])


def test_neighbours_that_repeat_what_goes_or_name_it_are_dropped(monkeypatch):
    answers = (" in Rome. ", "born in Oslo.", "Not in Oslo")
    monkeypatch.setattr(
        Questions, "_said", lambda *args: [answers[i % 3] for i in range(len(args[2]))]
    )
    monkeypatch.setattr(Questions, "_known", lambda *args, **_: [True] * len(args[2]))
    parts = {
        "forget": [asked("Where was Ada Lee born?", "Ada Lee was born in Oslo.")],
        "train": [asked(f"What does {n} play?", "Go.") for n in ("Cy Dor", "Bo Fin", "Al Gor")],
    }
    rows = Questions.of(parts, load_tokenizer("tiny")).with_neighbours(load_model("tiny")).rows
    assert {row.answer for row in (*rows["train"][3:], *rows["stranger"])} == {" in Rome."}


def test_what_is_cut_is_known_and_what_has_no_target_is_refused():
    tokenizer = load_tokenizer("tiny")
    fits = asked("a?", "b" * 20)
    length = len(encode_row(fits, tokenizer, max_length=200)[0])
    parts = {"forget": [asked("a?", "b" * 40), fits], "holdout": [Row(answer="c" * (length + 1))]}
    questions = Questions.of(parts, tokenizer, max_length=length)
    assert questions.cut["forget"] == {0}
    assert questions.cut["holdout"] == {0}
    values = [np.arange(21), np.arange(21)]
    # What was cut has lost its end mark already.
    assert [len(row) for row in questions.without_end("forget", values)] == [21, 20]
    assert questions.scored_text("forget") == ["b" * 21, "b" * 20]
    with pytest.raises(ValueError, match="f:7: text: expected at least two tokens, got one"):
        Questions.of({"forget": [Row(answer="a", line="f:7")]}, tokenizer)


def test_a_pair_that_disappoints_gives_way_to_others():
    # Of the other ways nothing is known: they are not thought to bring out more than these.
    gains = {"in a role": 0.4, "in context": 0.2, "in another form": 0.19}
    tried = search(lambda way: 0.0, gains, 2)
    assert list(tried) == ["in a role + in context", "in another form + in a role"]
    # One that brings out more has both of its ways tried before others.
    tried = search(lambda way: 0.3, gains, 2)
    assert list(tried) == ["in a role + in context", "in context + in a role"]


def test_other_ways_to_ask_that_a_template_refuses_or_that_do_not_fit_are_left_out():
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }};{% endfor %}"
    )
    rows = [asked(f"{n}?", "x" * 30) for n in range(8)]
    parts = {"forget": rows, "train": [asked(f"{n}!", "y") for n in range(4)]}
    questions = Questions.of(parts, tokenizer, max_length=34)
    assert questions.in_way("forget", "in a role") == []
    assert len(questions.in_way("forget", "in context")) == 8
    short = Questions.of({"forget": [asked("?", "x" * 99)] * 2}, tokenizer, max_length=3)
    assert short.in_way("forget", "after a beginning that agrees") == []
    assert len(short.rows["forget"]) == 2


@pytest.mark.parametrize("count", [1, 40, 41, 45, 80, 81, 1000])
def test_as_many_rows_are_attacked_as_is_said(count):
    picked = _evenly(range(count))
    assert len(picked) == min(count, 40) == len(set(picked))
    assert max(np.diff(picked), default=1) <= -(-count // 40)


def test_rows_with_one_answer_get_what_is_said_instead_of_each():
    forget = [asked("a?", "1", paraphrases=("which a?",)), asked("b?", "1")]
    split = split_rows(forget, [asked(f"{n}?") for n in range(6)])
    made = Questions.of(split.parts, load_tokenizer("tiny"))
    order = {"a?": ["of a"], "b?": ["of b"]}
    instead = [order[row.question] for row in made.rows["forget"]]
    rows = _sides(made, ("asked", "in a role"), instead)["instead"]
    texts = [made.tokenizer.decode(ids[ids > 0].tolist()) for ids in rows["tokens"]]
    assert {("a?" in text, "of a" in text) for text in texts} == {(True, True), (False, False)}


def test_a_folder_of_another_training_is_refused(tmp_path):
    split = split_rows([asked("a?"), asked("b?", "2")], [asked(f"{n}?") for n in range(6)])
    model = load_model("tiny")
    made = Questions.of(split.parts, load_tokenizer("tiny"))

    def begin(seed, **judged):
        config = UnlearnConfig(method=METHODS.parse("npo"), seed=seed, **judged)
        Unlearning(model, made, config, epath.Path(tmp_path), identity="tiny")._check_folder()

    begin(0)
    begin(0, rounds=3, least_probability=0.5)
    with pytest.raises(ValueError, match="training"):
        begin(1)
