"""Requests against their own description: what it allows is taken, what it forbids refused."""

import json
import pathlib

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
    {"prompt": "a", "top_k": -1, "seed": -1, "stop": ["x"] * 5, "min_tokens": 16, "user": [7]},
    {"prompt": "a", "seed": -(2**63), "stop_token_ids": [5], "ignore_eos": True, "tools": []},
    {"prompt": "a", "structured_outputs": {"choice": ["A", "B"]}, "tool_choice": "none"},
    {"prompt": "a", "unknown": None},
    {"prompt": "a", "guided_choice": ["A"]},
    {"prompt": "a", "top_k": -2},
    {"prompt": "a", "stop": ["x"] * 33},
    {"prompt": "a", "stop": "x" * 257},
    {"prompt": "a", "allowed_token_ids": []},
    {"prompt": "a", "structured_outputs": {"choice": ["A"], "backend": "x"}},
    {"prompt": "a", "stream_options": {"usage": True}},
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
    {"prompt": "a", "seed": 2**63},
    {"prompt": "a", "stop": [""]},
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
    assert (asked.n, asked.max_tokens) == (1, 16)
    assert asked.sampling == schema.SamplingFields()
    assert asked.prompts == ["a"]
    assert schema.parse({"prompt": "a", "n": None}, LIMITS, chat=False) == asked
    messages = [{"role": "user", "content": "hi", "name": "me"}]
    chat = schema.parse({"messages": messages, "max_completion_tokens": 7}, LIMITS, chat=True)
    assert chat.max_tokens == 7
    assert chat.prompts == [[{"role": "user", "content": "hi", "name": "me"}]]


def test_a_request_for_a_completion_that_says_everything_is_taken_as_it_says():
    body = {"prompt": "a", "n": 2, "max_tokens": 5, "logprobs": 3, "prompt_logprobs": 1}
    body |= {"echo": True, "stop": ["x"], "top_k": -1, "stop_token_ids": [9, 5, 9], "min_p": 0.5}
    body |= {"cache_salt": "s", "return_tokens_as_token_ids": True, "add_special_tokens": False}
    asked = schema.parse(body | {"logit_bias": {"6": 1, "5": -1}}, LIMITS, chat=False)
    assert asked.prompt_shown == 3
    drawn = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.5, repetition_penalty=1.0)
    drawn |= dict(presence_penalty=0.0, frequency_penalty=0.0, seed=None, min_tokens=0)
    drawn |= dict(logit_bias=((5, -1.0), (6, 1.0)), stop_token_ids=(5, 9), ignore_eos=False)
    assert asked == schema.CompletionRequest(
        prompts=["a"],
        n=2,
        max_tokens=5,
        sampling=schema.SamplingFields(**drawn),
        logprobs=3,
        prompt_logprobs=1,
        stop=["x"],
        echo=True,
        stream=False,
        include_usage=False,
        continuous_usage=False,
        tokens_as_ids=True,
        cache_salt="s",
        add_special_tokens=False,
        template_variables={},
        model=None,
        chat=False,
    )
    plain = schema.parse({"prompt": "a"}, LIMITS, chat=False)
    assert (plain.prompt_shown, plain.cache_salt, plain.stop) == (None, "", [])
    assert plain.add_special_tokens
    assert plain.sampling.min_p == 0.0
    for name in ("include_usage", "continuous_usage"):
        options = {name + "_stats" * (name == "continuous_usage"): True}
        asked = schema.parse({"prompt": "a", "stream_options": options}, LIMITS, chat=False)
        told = (asked.include_usage, asked.continuous_usage)
        assert told == (name == "include_usage", name == "continuous_usage")


def test_a_request_for_an_answer_that_says_everything_is_taken_as_it_says():
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "logprobs": True}
    body |= {"top_logprobs": 2, "chat_template_kwargs": {"x": 1}, "add_generation_prompt": False}
    asked = schema.parse(body, LIMITS, chat=True)
    assert (asked.max_tokens, asked.logprobs) == (9, 2)
    assert asked.template_variables == {"x": 1, "add_generation_prompt": False}
    # The template has its own beginning, and nothing of it is answered.
    assert not asked.add_special_tokens
    assert not asked.echo
    assert schema.parse(body | {"max_completion_tokens": 7}, LIMITS, chat=True).max_tokens == 7
    few = {"messages": body["messages"], "logprobs": True}
    asked = schema.parse(few, LIMITS, chat=True)
    assert (asked.max_tokens, asked.logprobs) == (32, 0)
    assert asked.template_variables == {"add_generation_prompt": True}
    assert schema.parse(few | {"logprobs": False}, LIMITS, chat=True).logprobs is None


def test_of_several_wrong_fields_the_first_is_named_alone():
    with pytest.raises(BadRequestError) as error:
        schema.parse({"prompt": "a", "n": 0, "top_k": -2}, LIMITS, chat=False)
    assert str(error.value) == "n: input should be greater than or equal to 1"


def test_numbers_at_the_ends_of_their_ranges():
    largest = 2**31 - 1
    assert schema.parse({"prompt": [largest]}, LIMITS, chat=False).prompts == [[largest]]
    with pytest.raises(BadRequestError, match=r"^prompt: "):
        schema.parse({"prompt": [largest + 1]}, LIMITS, chat=False)
    asked = schema.parse({"prompt": "a", "seed": 2**32 + 5, "top_k": 3}, LIMITS, chat=False)
    assert (asked.sampling.seed, asked.sampling.top_k) == (5, 3)
    assert (asked.sampling.presence_penalty, asked.sampling.frequency_penalty) == (0.0, 0.0)
    with pytest.raises(BadRequestError, match=r"^top_p: input should be greater than") as error:
        schema.parse({"prompt": "a", "top_p": 0}, LIMITS, chat=False)
    assert "I" not in str(error.value)


def test_a_turn_of_several_parts_is_one_text():
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert schema.parse(body, LIMITS, chat=True).prompts == [
        [{"role": "user", "content": "Say hi"}]
    ]
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    nothing = {"messages": [{"role": "assistant", "content": None, "refusal": None}]}
    assert schema.parse(nothing, LIMITS, chat=True).prompts == [
        [{"role": "assistant", "content": ""}]
    ]
    for content in ([], [picture], [{"type": "text"}], 3):
        with pytest.raises(BadRequestError, match=r"^messages: "):
            schema.parse({"messages": [{"role": "user", "content": content}]}, LIMITS, chat=True)


def test_what_depends_on_several_fields_is_said():
    body = {"messages": [{"role": "a", "content": "b"}], "top_logprobs": 2}
    with pytest.raises(BadRequestError, match="top_logprobs needs logprobs"):
        schema.parse(body, LIMITS, chat=True)
    with pytest.raises(BadRequestError, match="at most 16 answers a request, got 9 for each"):
        schema.parse({"prompt": ["a", "b"], "n": 9}, LIMITS, chat=False)
    closed = ServerConfig(model="m", policy=LogitPolicy(top_k=1))
    with pytest.raises(BadRequestError, match="accepts no logit_bias"):
        schema.parse({"prompt": "a", "logit_bias": {"1": 1}}, closed, chat=False)


@pytest.mark.parametrize(
    "kind", ["vllm completion", "vllm chat", "openai completion", "openai chat"]
)
def test_every_field_of_other_servers_is_built_harmless_or_refused(kind):
    fields = json.loads(pathlib.Path(__file__).with_name("request_fields.json").read_text())
    chat = kind.endswith("chat")
    ground = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    plain = schema.parse(ground, LIMITS, chat=chat)
    built = schema.request_model(LIMITS, chat=chat).model_fields
    for name in fields[kind] + fields["earlier vllm"]:
        assert schema.parse({name: None} | ground, LIMITS, chat=chat) == plain
        if name in schema.HARMLESS:
            assert name not in built
            assert schema.parse(ground | {name: "x"}, LIMITS, chat=chat) == plain
        elif name not in built:
            with pytest.raises(BadRequestError, match=rf"^{name} is not supported") as error:
                schema.parse(ground | {name: {"x": 1}}, LIMITS, chat=chat)
            assert error.value.param == name


def test_a_field_that_nobody_knows_is_named():
    for body, message in (
        ({"max_token": 3}, "'max_token' is not a field of this API"),
        ({"\ud800" * 99: 1}, "is not a field of this API"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex is not supported, use structured"),
        (
            {"response_format": {"type": "text", "x": 1}},
            "response_format: 'x' is not one of its fields",
        ),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
    ):
        with pytest.raises(BadRequestError, match=message):
            schema.parse({"prompt": "a"} | body, LIMITS, chat=False)


def test_a_structure_is_one_value_however_it_is_asked_for():
    object_ = {"type": "object"}
    same = [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": object_}}},
        {"structured_outputs": {"json": object_}},
        {"structured_outputs": {"json": json.dumps(object_)}},
        {"structured_outputs": {"json_object": True}},
    ]
    bodies = [{"prompt": "a"} | more for more in same]
    fields = {schema.parse(body, LIMITS, chat=False).sampling for body in bodies}
    assert [each.structure for each in fields] == [("json", json.dumps(object_))]
    named = [schema.parse(body, LIMITS, chat=False).sampling.structure_field for body in bodies]
    assert named == ["response_format"] * 2 + ["structured_outputs"] * 3
    beside = schema.parse(bodies[0] | {"structured_outputs": {}}, LIMITS, chat=False)
    assert beside.sampling.structure_field == "response_format"
    deep: dict = {}
    for _ in range(900):
        deep = {"anyOf": [deep]}
    with pytest.raises(BadRequestError, match=r"^structured_outputs: nested too deeply"):
        schema.parse({"prompt": "a", "structured_outputs": {"json": deep}}, LIMITS, chat=False)
    for name, value in (("min_tokens", 1), ("ignore_eos", True), ("allowed_token_ids", [1])):
        with pytest.raises(BadRequestError, match=f"^{name} cannot be combined with a structure"):
            schema.parse({"prompt": "a", name: value} | same[0], LIMITS, chat=False)
    for more in (same[0] | same[2], {"structured_outputs": {}}):
        with pytest.raises(BadRequestError, match="expected one structure, got"):
            schema.parse({"prompt": "a"} | more, LIMITS, chat=False)


def test_too_many_token_ids_are_refused_as_that():
    limits = ServerConfig(model="m", policy=LogitPolicy(top_k=1), max_length=4)
    for prompt in ([1] * 5, [[1], [2] * 5], ["a", [2] * 5]):
        with pytest.raises(BadRequestError, match=r"^prompt: .*at most 4 items"):
            schema.parse({"prompt": prompt}, limits, chat=False)
