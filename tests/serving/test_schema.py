"""Requests against their own description: what it allows is taken, what it forbids refused."""

import jsonschema
import pytest

from logitjax.leakage import LogitPolicy
from logitjax.serving import ServerConfig
from logitjax.serving import _schema as schema
from logitjax.serving._errors import BadRequestError

POLICY = LogitPolicy(top_k=4, bias="sampling", max_biased=2)
LIMITS = ServerConfig(model="m", policy=POLICY, max_tokens=32)
BODIES = [
    {"prompt": "a"},
    {"prompt": [1, 2], "max_tokens": 32, "logprobs": 4, "n": 3, "stop": "x"},
    {"prompt": ["a", [1]], "temperature": 2, "top_p": 1, "seed": 2**32 - 1, "stop": ["x", "y"]},
    {"prompt": "a", "logit_bias": {"5": -100, "6": 100}, "stream": True},
    {"prompt": "a", "max_tokens": None, "temperature": None, "stop": None, "logit_bias": None},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": ["a"] * 17},
    {"prompt": [-1]},
    {"prompt": "a", "max_tokens": 33},
    {"prompt": "a", "max_tokens": True},
    {"prompt": "a", "logprobs": 5},
    {"prompt": "a", "top_p": 0},
    {"prompt": "a", "temperature": 10**400},
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "stop": [""]},
    {"prompt": "a", "stop": ["x"] * 5},
    {"prompt": "a", "logit_bias": {"1": 1, "2": 1, "3": 1}},
    {"prompt": "a", "logit_bias": {"x": 1}},
    {"prompt": "a", "logit_bias": {"1": 100.5}},
    {"prompt": "a", "stream": 1},
    {},
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body)[:40])
def test_the_description_and_the_check_agree(body):
    described = schema.request_model(LIMITS, chat=False).model_json_schema()
    allowed = jsonschema.Draft202012Validator(described).is_valid(body)
    if allowed:
        assert schema.parse(body, LIMITS, chat=False).n in (1, 3)
    else:
        with pytest.raises(BadRequestError, match=" "):
            schema.parse(body, LIMITS, chat=False)


@pytest.mark.parametrize("chat", [False, True])
def test_any_field_may_hold_any_kind_of_value(chat):
    ground = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    few = [None, True, -1, 10**30, 0.5, 1e308, "", "a", "\ud800", [], {}, [[]], [{}], {"": 1}]
    many = [dict.fromkeys(map(str, range(20)), 1), [1] * 200, [None] * 9, {"type": {}}, [1, "a"]]
    for name in schema.request_model(LIMITS, chat=chat).model_fields:
        for value in few + many:
            told = ""
            try:
                schema.parse(ground | {name: value}, LIMITS, chat=chat)
            except BadRequestError as error:
                told = f"{error.param}: {error}"
            assert not told.startswith("None")
            assert len(told) < 250


def test_fields_left_out_have_openais_defaults():
    asked = schema.parse({"prompt": "a"}, LIMITS, chat=False)
    assert (asked.n, asked.max_tokens, asked.temperature, asked.top_p) == (1, 16, 1.0, 1.0)
    assert asked.prompts == ["a"]
    assert schema.parse({"prompt": "a", "n": None}, LIMITS, chat=False) == asked
    messages = [{"role": "user", "content": "hi", "name": "me"}]
    chat = schema.parse({"messages": messages, "max_completion_tokens": 7}, LIMITS, chat=True)
    assert chat.max_tokens == 7
    assert chat.prompts == [[{"role": "user", "content": "hi"}]]


def test_a_turn_of_several_parts_is_one_text():
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert schema.parse(body, LIMITS, chat=True).prompts == [
        [{"role": "user", "content": "Say hi"}]
    ]
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    for content in ([], [picture], [{"type": "text"}], 3, None):
        with pytest.raises(BadRequestError, match=r"^messages: "):
            schema.parse({"messages": [{"role": "user", "content": content}]}, LIMITS, chat=True)


def test_what_depends_on_several_fields_is_said():
    body = {"messages": [{"role": "a", "content": "b"}], "top_logprobs": 2}
    with pytest.raises(BadRequestError, match="top_logprobs needs logprobs"):
        schema.parse(body, LIMITS, chat=True)
    with pytest.raises(BadRequestError, match="at most 16 answers a request, got 9 for each"):
        schema.parse({"prompt": ["a", "b"], "n": 9}, LIMITS, chat=False)
    closed = ServerConfig(model="m", policy=LogitPolicy(top_k=1))
    with pytest.raises(BadRequestError, match="takes no logit_bias"):
        schema.parse({"prompt": "a", "logit_bias": {"1": 1}}, closed, chat=False)


def test_too_many_token_ids_are_refused_as_that():
    limits = ServerConfig(model="m", policy=LogitPolicy(top_k=1), max_length=4)
    for prompt in ([1] * 5, [[1], [2] * 5], ["a", [2] * 5]):
        with pytest.raises(BadRequestError, match=r"^prompt: .*at most 4 items"):
            schema.parse({"prompt": prompt}, limits, chat=False)
