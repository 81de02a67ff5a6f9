"""Requests of the completion API: one model says what is accepted and describes it for machines."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Optional

import pydantic
from pydantic import BaseModel, Field

from logitjax.serving._config import ServerConfig
from logitjax.serving._errors import BadRequestError
from logitjax.serving._policy import Disclosure

_TOKEN = r"^[0-9]{1,9}$"
_MOST_PROMPTS = 16  # of one request, and of its answers


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
def request_model(config: ServerConfig, *, chat: bool) -> type[BaseModel]:
    """The body of a request to a server of these limits. `null` is as good as no field."""
    # Lists fail fast: a million wrong numbers would make a million messages.
    token = Annotated[int, Field(ge=0, le=2**31 - 1)]
    Tokens = Annotated[
        list[token], Field(fail_fast=True, min_length=1, max_length=config.max_length)
    ]
    prompts = Field(fail_fast=True, min_length=1, max_length=_MOST_PROMPTS)
    bound = config.policy.bias_limit
    shown = Disclosure(config.policy).top_k

    class Shared(BaseModel, strict=True):
        model: str | None = None
        n: _integer(1, _MOST_PROMPTS) = None
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
                    Annotated[float, Field(ge=-bound, le=bound, allow_inf_nan=False)],
                ],
                # Pydantic describes the keys that are taken, not that there are no others.
                Field(
                    max_length=config.policy.max_biased,
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
        max_tokens: _integer(0, config.max_tokens) = None
        echo: bool | None = None
        logprobs: _integer(0, shown) = None

    class Chat(Shared, strict=True):
        messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
        max_tokens: _integer(1, config.max_tokens) = None
        max_completion_tokens: _integer(1, config.max_tokens) = None
        logprobs: bool | None = None
        top_logprobs: _integer(0, shown) = None

    return Chat if chat else Completion


# Where the neutral value is not given, an answer would not be what was asked for.
_UNSUPPORTED: dict[str, Sequence[Any]] = {"suffix": (), "tools": ([],), "best_of": (1,)}


def parse(body: Any, config: ServerConfig, *, chat: bool) -> CompletionRequest:
    """A request from JSON."""
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(body).__name__}")
    for name, neutral in _UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise BadRequestError(f"{name} is not supported", name)
    if body.get("logit_bias") and config.policy.bias == "none":
        raise BadRequestError("this server takes no logit_bias", "logit_bias")
    try:
        asked: Any = request_model(config, chat=chat).model_validate(body)
    except pydantic.ValidationError as error:
        raise _refusal(error) from None
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
    if n * len(prompts) > _MOST_PROMPTS:
        raise BadRequestError(
            f"at most {_MOST_PROMPTS} answers a request, got {n} for each of "
            f"{len(prompts)} prompts",
            "n",
        )

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return CompletionRequest(
        prompts=prompts,
        n=n,
        max_tokens=given(longest, min(config.max_tokens, 64 if chat else 16)),
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


def _refusal(error: pydantic.ValidationError) -> BadRequestError:
    """One line about the first field that is wrong: what is expected of each kind of value."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)
    name = str(wrong[0]["loc"][0])
    reasons = [e["msg"] for e in wrong if e["loc"][0] == wrong[0]["loc"][0]]
    said = ", or ".join(dict.fromkeys(reason[0].lower() + reason[1:] for reason in reasons))
    return BadRequestError(f"{name}: {said[:150]}", name)


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


_REF = "#/components/schemas/{model}"


def openapi(config: ServerConfig) -> dict[str, Any]:
    """The API's description, for clients, fuzzers and people."""
    schemas: dict[str, Any] = {}

    def described(model: type[BaseModel]) -> dict[str, str]:
        schema = model.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        return {"$ref": _REF.format(model=model.__name__)}

    refused = {
        "description": "What is wrong with the request.",
        "content": {"application/json": {"schema": described(Error)}},
    }
    answer = {
        "description": "Done; server-sent events where stream is true.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }

    def post(summary: str, *, chat: bool) -> dict[str, Any]:
        schema = described(request_model(config, chat=chat))
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        codes = ("400", "401", "404", "413", "415", "429")
        responses = {"200": answer, **dict.fromkeys(codes, refused)}
        return {"post": {"summary": summary, "requestBody": body, "responses": responses}}

    def get(summary: str, *codes: str) -> dict[str, Any]:
        responses = {"200": {"description": summary}} | dict.fromkeys(codes, refused)
        return {"get": {"summary": summary, "responses": responses}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "logitjax completions", "version": "1"},
        "paths": {
            "/v1/completions": post("Goes on from a prompt.", chat=False),
            "/v1/chat/completions": post("Answers a conversation.", chat=True),
            "/v1/models": get("What is served.", "401"),
            "/health": get("Whether it still decodes.", "503"),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
