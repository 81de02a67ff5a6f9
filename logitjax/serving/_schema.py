"""Requests of the completion API: one model says what is accepted and describes it for machines."""

import dataclasses
import functools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Optional

import pydantic
from pydantic import BaseModel, Field

from logitjax.serving._errors import BadRequestError

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 57
_TOKEN = r"^[0-9]{1,9}$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What one request may ask for."""

    max_tokens: int = 512
    max_length: int = 1024
    max_logprobs: int = 5
    max_prompts: int = 16
    max_logit_bias: int = 300
    bias_limit: float = 100.0
    max_body_bytes: int = 1 << 20
    logit_bias: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked request of either kind, with its defaults; prompts still as they came.

    `json_schema` is what an answer has to follow, None for any text.
    """

    prompts: Sequence[Any]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logprobs: int | None
    logit_bias: Mapping[int, float]
    stop: Sequence[str]
    json_schema: Mapping[str, Any] | None
    echo: bool
    stream: bool
    include_usage: bool
    tokens_as_ids: bool
    model: str | None
    chat: bool


def _integer(low: int, high: int) -> Any:
    return Optional[Annotated[int, Field(ge=low, le=high)]]  # noqa: UP045


def _number(low: float, high: float) -> Any:
    return Optional[Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]]  # noqa: UP045


Text = Annotated[str, Field(min_length=1)]


class TextPart(BaseModel, strict=True):
    """A part of a turn; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(BaseModel, strict=True):
    """One turn of a conversation."""

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)]

    def as_turn(self) -> dict[str, str]:
        """What a chat template takes: the parts are one text."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


class StreamOptions(BaseModel, strict=True):
    """What a stream holds beside the text."""

    include_usage: bool | None = None


class JsonSchema(BaseModel, strict=True):
    """A schema and what it is called."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    given: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel, strict=True):
    """Whether an answer is any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


@functools.lru_cache(maxsize=8)
def request_model(limits: ServerLimits, *, chat: bool) -> type[BaseModel]:
    """The body of a request to a server of these limits. `null` is as good as no field."""
    # Lists fail fast: a million wrong numbers would make a million messages.
    token = Annotated[int, Field(ge=0, le=2**31 - 1)]
    Tokens = Annotated[
        list[token], Field(fail_fast=True, min_length=1, max_length=limits.max_length)
    ]
    prompts = Field(fail_fast=True, min_length=1, max_length=limits.max_prompts)

    class Shared(BaseModel, strict=True):
        model: str | None = None
        n: _integer(1, limits.max_prompts) = None
        temperature: _number(0, 2) = None
        top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
        top_k: _integer(0, 1 << 30) = None
        min_p: _number(0, 1) = None
        repetition_penalty: _number(0.1, 10) = None
        presence_penalty: _number(-2, 2) = None
        frequency_penalty: _number(-2, 2) = None
        seed: _integer(0, 2**32 - 1) = None
        stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=4)] | None = None
        stream: bool | None = None
        stream_options: StreamOptions | None = None
        logit_bias: (
            Annotated[
                dict[
                    Annotated[str, Field(pattern=_TOKEN)],
                    Annotated[
                        float,
                        Field(ge=-limits.bias_limit, le=limits.bias_limit, allow_inf_nan=False),
                    ],
                ],
                # Pydantic describes the keys that are taken, not that there are no others.
                Field(
                    max_length=limits.max_logit_bias,
                    json_schema_extra={"additionalProperties": False},
                ),
            ]
            | None
        ) = None
        response_format: ResponseFormat | None = None
        return_tokens_as_token_ids: bool | None = None

    class Completion(Shared, strict=True):
        prompt: Text | Tokens | Annotated[list[Text | Tokens], prompts]
        # Nothing new is asked for where the prompt alone is to be told.
        max_tokens: _integer(0, limits.max_tokens) = None
        echo: bool | None = None
        logprobs: _integer(0, limits.max_logprobs) = None

    class Chat(Shared, strict=True):
        messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
        max_tokens: _integer(1, limits.max_tokens) = None
        max_completion_tokens: _integer(1, limits.max_tokens) = None
        logprobs: bool | None = None
        top_logprobs: _integer(0, limits.max_logprobs) = None

    return Chat if chat else Completion


# Where the neutral value is not given, an answer would not be what was asked for.
_UNSUPPORTED: tuple[tuple[str, Sequence[Any]], ...] = (
    ("suffix", ()),
    ("tools", ([],)),
    ("best_of", (1,)),
)


def parse(body: Any, limits: ServerLimits, *, chat: bool) -> CompletionRequest:
    """A request from JSON."""
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {_short(body)}")
    for name, neutral in _UNSUPPORTED:
        if body.get(name) is not None and body[name] not in neutral:
            raise BadRequestError(f"{name} is not supported", name)
    if body.get("logit_bias") and not limits.logit_bias:
        raise BadRequestError("this server takes no logit_bias", "logit_bias")
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > limits.max_logit_bias:
        raise BadRequestError(
            f"at most {limits.max_logit_bias} tokens may be biased, got {len(bias)}", "logit_bias"
        )
    model = request_model(limits, chat=chat)
    try:
        asked: Any = model.model_validate(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "string_unicode":  # Lone surrogates, which JSON can spell.
            name = str(first["loc"][0])
            raise BadRequestError(f"{name} is not valid Unicode", name) from None
        raise _explained(first["loc"], body, model, limits) from None
    shown, longest = asked.logprobs, asked.max_tokens
    if chat:
        prompts: Sequence[Any] = [[message.as_turn() for message in asked.messages]]
        shown = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs and not asked.logprobs:
            raise BadRequestError("top_logprobs needs logprobs", "top_logprobs")
        longest = asked.max_completion_tokens or longest
    elif longest == 0 and not asked.echo:
        raise BadRequestError("max_tokens may be 0 only with echo", "max_tokens")
    elif isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int):
        prompts = [asked.prompt]
    else:
        prompts = asked.prompt
    n = asked.n or 1
    if n * len(prompts) > limits.max_prompts:
        raise BadRequestError(
            f"at most {limits.max_prompts} answers a request, got {n} for each of "
            f"{len(prompts)} prompts",
            "n",
        )

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return CompletionRequest(
        prompts=prompts,
        n=n,
        max_tokens=given(longest, min(limits.max_tokens, 64 if chat else 16)),
        temperature=given(asked.temperature, 1.0),
        top_p=given(asked.top_p, 1.0),
        top_k=asked.top_k or 0,
        min_p=asked.min_p or 0.0,
        repetition_penalty=given(asked.repetition_penalty, 1.0),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        seed=asked.seed,
        logprobs=shown,
        logit_bias={int(token): value for token, value in (asked.logit_bias or {}).items()},
        stop=[asked.stop] if isinstance(asked.stop, str) else asked.stop or [],
        json_schema=_wanted_schema(asked.response_format),
        echo=bool(not chat and asked.echo),
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        tokens_as_ids=bool(asked.return_tokens_as_token_ids),
        model=asked.model,
        chat=chat,
    )


def _wanted_schema(wanted: ResponseFormat | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        needed = "response_format of type json_schema needs a json_schema with a schema"
        raise BadRequestError(needed, "response_format")
    return wanted.json_schema.given


@functools.lru_cache(maxsize=16)
def _properties(model: type[BaseModel]) -> Mapping[str, Any]:
    """The fields' descriptions; making them takes longer than all else that a refusal does."""
    return model.model_json_schema()["properties"]


def _short(value: Any) -> str:
    # Not `repr`: of a value nested a thousand deep, or of a megabyte.
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _explained(
    at: tuple[int | str, ...], body: Mapping[str, Any], model: type[BaseModel], limits: ServerLimits
) -> BadRequestError:
    """One line about the field at `at`, in the words of this API and with the schema's bounds."""
    name = str(at[0])
    value = body.get(name)
    many = isinstance(value, list)
    if name == "prompt":
        if value in ("", []) or (many and any(one in ("", []) for one in value)):
            return BadRequestError("prompt must not be empty", name)
        ids = [one for one in (value, *value) if _is_ids(one)] if many else []
        longest = max(map(len, ids), default=0)
        if longest > limits.max_length:
            return BadRequestError(f"{longest} prompt tokens do not fit {limits.max_length}", name)
        if many and len(value) > limits.max_prompts and not isinstance(value[0], int):
            return BadRequestError(f"at most {limits.max_prompts} prompts, got {len(value)}", name)
        kinds = "a string, a list of strings or token ids"
        return BadRequestError(f"prompt must be {kinds}, got {_short(value)}", name)
    if name == "messages":
        if not many or not value:
            return BadRequestError("messages must be a list that is not empty", name)
        one = value[at[1]] if len(at) > 1 and isinstance(at[1], int) else value
        needed = "messages must have a role and a content, strings or parts of text"
        return BadRequestError(f"{needed}, got {_short(one)}", name)
    if name == "response_format":
        needed = "response_format must have a type: text, json_object or json_schema with a schema"
        return BadRequestError(f"{needed}, got {_short(value)}", name)
    if name == "stop":
        if many and len(value) > 4:
            return BadRequestError(f"at most 4 stop strings, got {len(value)}", name)
        return BadRequestError("stop must be a string or a list of them, none empty", name)
    if name == "logit_bias":
        if not isinstance(value, dict):
            needed = "logit_bias must be an object from token id to number"
            return BadRequestError(f"{needed}, got {_short(value)}", name)
        if len(at) == 1:
            most = limits.max_logit_bias
            return BadRequestError(f"at most {most} tokens may be biased, got {len(value)}", name)
        if at[-1] == "[key]":
            return BadRequestError(f"logit_bias: {_short(at[1])} is not a token id", name)
        name, value = str(at[1]), value[at[1]]
        schema: Mapping[str, Any] = {
            "type": "number",
            "minimum": -limits.bias_limit,
            "maximum": limits.bias_limit,
        }
    else:
        described = _properties(model)[name]
        schema = next((s for s in described["anyOf"] if s.get("type") != "null"), described)
    return BadRequestError(f"{name} must be {_expected(schema, value)}, got {_short(value)}", name)


def _is_ids(value: Any) -> bool:
    """Whether a value is a prompt of token ids, by its first one."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def _expected(schema: Mapping[str, Any], value: Any) -> str:
    kind = schema.get("type", "object")
    words = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "a string",
        "object": "an object",
    }
    number = isinstance(value, int if kind == "integer" else int | float)
    if "maximum" not in schema or not number or isinstance(value, bool) or value != value:
        return words[kind]
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']:g} and at most {schema['maximum']:g}"
    # Numbers in full: %g would write 4294967295 as 4.29497e+09.
    return f"between {_plain(schema['minimum'])} and {_plain(schema['maximum'])}"


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
