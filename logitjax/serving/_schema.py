"""Requests of the completion API: one model validates them and describes them for machines."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Optional

import pydantic
from pydantic import BaseModel, Field

from logitjax.leakage import Choice
from logitjax.serving._config import ServerConfig
from logitjax.serving._errors import BadRequestError
from logitjax.serving._policy import MOST_STOP_IDS, Disclosure

_TOKEN = r"^[0-9]{1,9}$"
# Limits of one request and its answers.
_MOST_PROMPTS = 16
_MOST_STOPS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFields(Choice):
    """All fields of a request that determine the drawn tokens; a policy judges them together.

    `structure` is a kind to follow (`json`, `regex`, `choice`, `grammar`) and its text, and
    `structure_field` the field that a client named it in.
    """

    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    structure: tuple[str, str] | None = None
    structure_field: str = dataclasses.field(default="response_format", compare=False)


_FIELDS = dataclasses.fields(SamplingFields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked request of either kind with its defaults; prompts are not yet tokenized."""

    prompts: Sequence[Any]
    n: int
    max_tokens: int
    sampling: SamplingFields
    logprobs: int | None
    prompt_logprobs: int | None
    stop: Sequence[str]
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    tokens_as_ids: bool
    cache_salt: str
    add_special_tokens: bool
    # Values that a chat template reads besides the messages.
    template_variables: Mapping[str, Any]
    model: str | None
    chat: bool

    @property
    def prompt_shown(self) -> int | None:
        """Number of most likely tokens to report for each prompt token; None if not requested."""
        notes = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((few for few in notes if few is not None), default=None)


def _integer(low: int, high: int) -> Any:
    return Optional[Annotated[int, Field(ge=low, le=high)]]  # noqa: UP045


def _number(low: float, high: float) -> Any:
    return Optional[Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]]  # noqa: UP045


def _list(kind: Any, **limits: Any) -> Any:
    # It fails fast: a million wrong numbers would make a million messages.
    return Annotated[list[kind], Field(fail_fast=True, **limits)]


Text = Annotated[str, Field(min_length=1)]
# Every end of an answer's text is compared with every beginning of a stop string.
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Part(BaseModel, strict=True, extra="forbid"):
    """A value inside a request: it has these fields and no others."""


class TextPart(_Part):
    """A part of a turn; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """One message of a conversation."""

    role: str
    content: str | _list(TextPart, min_length=1) | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    # Clients send an answer back as they received it, with its empty fields.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    def as_turn(self) -> dict[str, Any]:
        """Convert to a template's turn: parts become one text, missing content an empty one."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        more = self.model_dump(exclude_none=True, exclude={"role", "content"})
        return {"role": self.role, "content": content} | more


class StreamOptions(_Part):
    """Options of a stream: what it contains besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    # OpenAI's padding; this server never pads.
    include_obfuscation: bool | None = None


class JsonSchema(_Part):
    """A schema and its name."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    given: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Part):
    """The format of an answer: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Part):
    """The structure that an answer follows, as in vLLM: exactly one of these."""

    given: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: _list(Text, min_length=1) | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    # JSON has one layout here, with or without this field.
    disable_any_whitespace: bool | None = None


# Fields that never change the answer.
_HARMLESS_NAMES = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "prompt_cache_options prediction parallel_tool_calls request_id session_id stream_interval "
    "truncation_side return_mm_kwargs return_token_offsets length_penalty early_stopping "
    "spaces_between_special_tokens"
)
HARMLESS = frozenset(_HARMLESS_NAMES.split())
# Fields that would change the answer if they had an effect.
_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
_UNSUPPORTED_NAMES = (
    "suffix tools functions echo add_special_tokens continue_final_message documents chat_template "
    "audio moderation web_search_options use_beam_search watermarking bad_words prompt_embeds "
    "include_stop_str_in_output repetition_detection truncate_prompt_tokens logprob_token_ids "
    "logits_processors priority routed_experts_prompt_start return_token_ids return_prompt_text "
    "media_io_kwargs mm_processor_kwargs kv_transfer_params ec_transfer_params vllm_xargs "
    "structural_tag guided_json guided_regex guided_choice guided_grammar guided_decoding_backend "
    "guided_whitespace_pattern"
)
_UNSUPPORTED = dict.fromkeys(_UNSUPPORTED_NAMES.split(), _NOTHING) | {
    **dict.fromkeys(("tool_choice", "function_call"), (None, "none", "auto")),
    **dict.fromkeys(("include_reasoning", "skip_special_tokens", "best_of"), (None, True)),
    **{"reasoning_effort": (None, "none"), "verbosity": (None, "medium")},
    **{"thinking_token_budget": (None, -1), "modalities": (None, ["text"])},
}


def _with_the_rest(schema: dict[str, Any]) -> None:
    """Describes the fields that `parse` removes before the model sees them."""
    rest: dict[str, Any] = {name: {} for name in HARMLESS}
    rest |= {name: {"enum": list(values)} for name, values in _UNSUPPORTED.items()}
    schema["properties"] = rest | schema["properties"]


@functools.lru_cache(maxsize=8)
def request_model(config: ServerConfig, *, chat: bool) -> type[BaseModel]:
    """The body of a request to a server with these limits. `null` means an absent field."""
    Tokens = _list(TokenId, min_length=1, max_length=config.max_length)
    bound = config.policy.bias_limit
    shown = Disclosure(config.policy).top_k

    class Shared(BaseModel, strict=True, extra="forbid", json_schema_extra=_with_the_rest):
        model: str | None = None
        n: _integer(1, _MOST_PROMPTS) = None
        temperature: _number(0, 2) = None
        top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
        top_k: _integer(-1, 1 << 30) = None
        min_p: _number(0, 1) = None
        repetition_penalty: _number(0.1, 10) = None
        presence_penalty: _number(-2, 2) = None
        frequency_penalty: _number(-2, 2) = None
        seed: _integer(-(2**63), 2**63 - 1) = None
        stop: StopText | _list(StopText, max_length=_MOST_STOPS) | None = None
        stop_token_ids: _list(TokenId, max_length=MOST_STOP_IDS) | None = None
        min_tokens: _integer(0, config.max_tokens) = None
        ignore_eos: bool | None = None
        allowed_token_ids: _list(TokenId, min_length=1) | None = None
        stream: bool | None = None
        stream_options: StreamOptions | None = None
        logit_bias: (
            Annotated[
                dict[
                    Annotated[str, Field(pattern=_TOKEN)],
                    Annotated[float, Field(ge=-bound, le=bound, allow_inf_nan=False)],
                ],
                # Pydantic describes the accepted keys, but not that there are no others.
                Field(
                    max_length=config.policy.max_biased,
                    json_schema_extra={"additionalProperties": False},
                ),
            ]
            | None
        ) = None
        response_format: ResponseFormat | None = None
        structured_outputs: StructuredOutputs | None = None
        prompt_logprobs: _integer(0, shown) = None
        cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
        return_tokens_as_token_ids: bool | None = None

    class Completion(Shared, strict=True):
        prompt: Text | Tokens | _list(Text | Tokens, min_length=1, max_length=_MOST_PROMPTS)
        # Nothing is generated if only the prompt is to be reported.
        max_tokens: _integer(0, config.max_tokens) = None
        echo: bool | None = None
        logprobs: _integer(0, shown) = None
        add_special_tokens: bool | None = None

    class Chat(Shared, strict=True):
        # A template may process all messages for each of them.
        messages: _list(Message, min_length=1, max_length=config.max_length)
        max_tokens: _integer(1, config.max_tokens) = None
        max_completion_tokens: _integer(1, config.max_tokens) = None
        logprobs: bool | None = None
        top_logprobs: _integer(0, shown) = None
        add_generation_prompt: bool | None = None
        chat_template_kwargs: dict[str, Any] | None = None

    return Chat if chat else Completion


def parse(body: Any, config: ServerConfig, *, chat: bool) -> CompletionRequest:
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(body).__name__}")
    model = request_model(config, chat=chat)
    if body.get("logit_bias") and config.policy.bias == "none":
        raise BadRequestError("this server accepts no logit_bias", "logit_bias")
    try:
        request: Any = model.model_validate(_of_use(body, model))
    except pydantic.ValidationError as error:
        raise _refusal(error) from None
    shown, longest = request.logprobs, request.max_tokens
    if chat:
        prompts: Sequence[Any] = [[message.as_turn() for message in request.messages]]
        shown = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs and not request.logprobs:
            raise BadRequestError("top_logprobs needs logprobs", "top_logprobs")
        longest = request.max_completion_tokens or longest
    elif longest == 0 and not request.echo:
        raise BadRequestError("max_tokens may be 0 only with echo", "max_tokens")
    elif isinstance(request.prompt, str) or isinstance(request.prompt[0], int):
        prompts = [request.prompt]
    else:
        prompts = request.prompt
    n = request.n or 1
    if n * len(prompts) > _MOST_PROMPTS:
        got = f"{n} for each of {len(prompts)} prompts"
        raise BadRequestError(f"at most {_MOST_PROMPTS} answers a request, got {got}", "n")
    if request.prompt_logprobs is not None and request.stream:
        raise BadRequestError("prompt_logprobs are not streamed", "prompt_logprobs")
    longest = _given(longest, min(config.max_tokens, 64 if chat else 16))
    if (request.min_tokens or 0) > longest:
        raise BadRequestError(f"min_tokens is larger than max_tokens={longest}", "min_tokens")
    options, variables = request.stream_options, {}
    if chat:
        prompted = {"add_generation_prompt": _given(request.add_generation_prompt, True)}
        variables = (request.chat_template_kwargs or {}) | prompted
    return CompletionRequest(
        prompts=prompts,
        n=n,
        max_tokens=longest,
        sampling=_sampling(request),
        logprobs=shown,
        prompt_logprobs=request.prompt_logprobs,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or [],
        echo=bool(not chat and request.echo),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        cache_salt=request.cache_salt or "",
        add_special_tokens=not chat and _given(request.add_special_tokens, True),
        template_variables=variables,
        model=request.model,
        chat=chat,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _of_use(body: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a request that the model has; any other field must have no effect."""
    kept = {}
    for name, value in body.items():
        if name in model.model_fields:
            kept[name] = value
        elif name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                hint = ", use structured_outputs" if name.startswith("guided_") else ""
                raise BadRequestError(f"{name} is not supported{hint}", name)
        elif name not in HARMLESS:
            raise BadRequestError(f"{name[:60]!r} is not a field of this API", name[:60])
    return kept


def _sampling(request: Any) -> SamplingFields:
    biases, allowed = request.logit_bias or {}, request.allowed_token_ids
    structure, structure_field = _structure(request)
    for name in ("allowed_token_ids", "min_tokens", "ignore_eos") if structure else ():
        # It may leave only tokens that these fields exclude.
        if getattr(request, name):
            raise BadRequestError(f"{name} cannot be combined with a structure", name)
    values = {field.name: getattr(request, field.name, None) for field in _FIELDS} | {
        # -1 keeps all, as 0 does.
        "top_k": max(request.top_k or 0, 0),
        "seed": None if request.seed in (None, -1) else request.seed % 2**32,
        # In one order, however they were written.
        "logit_bias": tuple(sorted((int(token), value) for token, value in biases.items())),
        "allowed_token_ids": None if allowed is None else tuple(sorted(set(allowed))),
        "stop_token_ids": tuple(sorted(set(request.stop_token_ids or ()))),
        "structure": structure,
        "structure_field": structure_field,
    }
    return SamplingFields(**{name: value for name, value in values.items() if value is not None})


def _structure(request: Any) -> tuple[tuple[str, str] | None, str]:
    """Return the structure that an answer has to follow, and the field that contains it."""
    items: list[tuple[str, Any]] = []
    form, outputs = request.response_format, request.structured_outputs
    if form is not None and form.type == "json_object":
        items.append(("json", {"type": "object"}))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            needed = "response_format of type json_schema needs a json_schema with a schema"
            raise BadRequestError(needed, "response_format")
        items.append(("json", form.json_schema.given))
    name = "response_format" if items or outputs is None else "structured_outputs"
    if outputs is not None:
        texts = (outputs.given, outputs.regex, outputs.choice, outputs.grammar)
        kinds = zip(("json", "regex", "choice", "grammar"), texts, strict=True)
        items += [(kind, value) for kind, value in kinds if value is not None]
        items += [("json", {"type": "object"})] if outputs.json_object else []
        if len(items) != 1:
            many = f"structured_outputs: expected one structure, got {len(items)}"
            raise BadRequestError(many, "structured_outputs")
    if not items:
        return None, name
    ((kind, value),) = items
    try:
        return (kind, value if isinstance(value, str) else json.dumps(value)), name
    except RecursionError:
        raise BadRequestError(f"{name}: nested too deeply", name) from None


def _refusal(error: pydantic.ValidationError) -> BadRequestError:
    """One line about the first wrong field, with the kinds of values it accepts."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)
    name = str(wrong[0]["loc"][0])
    for extra in wrong:
        if extra["type"] == "extra_forbidden" and extra["loc"][0] == name:
            inner = str(extra["loc"][-1])[:60]
            return BadRequestError(f"{name}: {inner!r} is not one of its fields", name)
    reasons = [e["msg"] for e in wrong if e["loc"][0] == wrong[0]["loc"][0]]
    message = ", or ".join(dict.fromkeys(reason[0].lower() + reason[1:] for reason in reasons))
    return BadRequestError(f"{name}: {message[:150]}", name)


_REF = "#/components/schemas/{model}"
_DETAIL = {"type": "object", "required": ["message", "type", "param", "code"]}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": _DETAIL}}


def openapi(config: ServerConfig) -> dict[str, Any]:
    kinds: Any = [(request_model(config, chat=chat), "validation") for chat in (False, True)]
    models, described = pydantic.json_schema.models_json_schema(kinds, ref_template=_REF)

    def content(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
        return {kind: {"schema": schema}}

    refused = {"description": "What is wrong with the request.", "content": content(_ERROR)}
    done = content({"type": "object"}) | content({"type": "string"}, "text/event-stream")
    answer = {"description": "Done; server-sent events where stream is true.", "content": done}

    def post(summary: str, model: Any) -> dict[str, Any]:
        body = {"required": True, "content": content(models[model])}
        codes = ("400", "401", "404", "413", "415", "429")
        responses = {"200": answer, **dict.fromkeys(codes, refused)}
        return {"post": {"summary": summary, "requestBody": body, "responses": responses}}

    def get(summary: str, *codes: str) -> dict[str, Any]:
        responses = {"200": {"description": summary}} | dict.fromkeys(codes, refused)
        return {"get": {"summary": summary, "responses": responses}}

    paths = {
        "/v1/completions": post("Continue a prompt.", kinds[0]),
        "/v1/chat/completions": post("Answer a conversation.", kinds[1]),
        "/v1/models": get("The served model.", "401"),
        "/version": get("The version of the server."),
        "/health": get("Whether the engine still decodes.", "503"),
    }
    bearer = {"key": {"type": "http", "scheme": "bearer"}}
    components = {"schemas": described["$defs"], "securitySchemes": bearer}
    info = {"title": "logitjax completions", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
