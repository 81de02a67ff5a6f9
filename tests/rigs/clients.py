"""OpenAI's own client asks the server: every call, and answers that follow JSON schemas.

Full scale installs this repository with the extra `serve` into an empty environment first, and the
server runs there; the client is this interpreter's. SmolLM2-135M answers (at smoke scale a toy).
The second part asks 200 times for JSON of a schema, as many at a time as there are slots, checks
each answer against its schema, and times answers of the same lengths without one.
"""

import collections
import concurrent.futures
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from typing import Any

import jsonschema
from absl import logging

from experiments.shared import suite
from experiments.shared.timing import paired_ratio
from logitjax import models
from tests.rigs._server_client import running

_ROOT = pathlib.Path(__file__).parents[2]
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Paris", "Rome", "Oslo"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
_SCHEMAS = (
    _PERSON,
    {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 9},
        "minItems": 1,
        "maxItems": 4,
    },
    {
        "type": "object",
        "properties": {
            "kind": {"const": "event"},
            "when": {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])$"},
            "who": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 8}]},
            "open": {"type": "boolean"},
        },
        "required": ["kind", "when", "who", "open"],
        "additionalProperties": False,
    },
)
_SLOTS = 16
_NEW = 48  # Tokens that any answer to these schemas fits into.


def run(options: suite.Options) -> suite.Result:
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        model, tokenizer = models.load("tiny" if options.smoke else "smollm2", layout="listed")
        tokenizer.chat_template = tokenizer.chat_template or _TEMPLATE
        models.save_pretrained(model, tokenizer, place / "weights")
        # A toy spells every byte as a token.
        new = 4 * _NEW if options.smoke else _NEW
        python = sys.executable if options.smoke else _empty_environment(place / "empty")
        keys = place / "keys.jsonl"
        keys.write_text(json.dumps({"name": "client", "secret": "a-key"}) + "\n")
        flags = (
            f"--model={place / 'weights'}",
            "--served_name=served",
            f"--api_keys={keys}",
            "--bias=reported",
            f"--max_tokens={new}",
            f"--slots={_SLOTS}",
            "--max_length=512",
            "--policy_seed=0",
        )
        with running(*flags, python=python) as (address, _):
            rows = _calls(address, new)
            structured = _structured(address, 24 if options.smoke else 200, new, options)
    passed = sum(row["passed"] for row in rows)
    rows.append(structured)
    bars = [
        suite.at_least("calls that pass", passed, len(rows) - 1),
        suite.at_least("valid answers", structured["valid"], structured["asked"]),
    ]
    if not options.smoke:
        slower = structured["over free"]
        bars.append(suite.at_most("seconds a token over free text's", slower, 1.10))
    return suite.Result(rows=rows, bars=bars)


def _empty_environment(place: pathlib.Path) -> str:
    """An interpreter that has this repository with the extra `serve`, and nothing else."""
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", f"{_ROOT}[serve]"]
    subprocess.run(command, check=True)
    return python


def _calls(address: str, new: int) -> list[dict[str, Any]]:
    """Each call of the client, and what is wrong with its answer."""
    import openai

    client: Any = openai.OpenAI(
        base_url=f"{address}/v1", api_key="a-key", max_retries=0, timeout=3600
    )
    plain: dict[str, Any] = {"model": "served", "prompt": "One, two, three,", "max_tokens": 8}
    talk: Any = [{"role": "user", "content": "Say hello."}]
    chat: dict[str, Any] = {"model": "served", "messages": talk, "max_tokens": 8}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}

    def completion() -> None:
        answer = client.completions.create(**plain, temperature=0)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.usage.completion_tokens <= 8

    def several_prompts() -> None:
        answer = client.completions.create(**plain | {"prompt": ["a", "b"]}, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]

    def prompt_of_tokens() -> None:
        answer = client.completions.create(**plain | {"prompt": [5, 6, 7]})
        assert answer.usage.prompt_tokens == 3

    def streamed_completion() -> None:
        whole = client.completions.create(**plain, seed=3).choices[0].text
        stream = client.completions.create(
            **plain, seed=3, stream=True, stream_options={"include_usage": True}
        )
        parts = list(stream)
        assert "".join(part.choices[0].text for part in parts if part.choices) == whole
        assert parts[-1].usage is not None

    def log_probabilities() -> None:
        said = client.completions.create(**plain, logprobs=3, temperature=0).choices[0].logprobs
        assert len(said.tokens) == len(said.token_logprobs) == len(said.top_logprobs)
        assert all(
            max(top.values()) == own for top, own in zip(said.top_logprobs, said.token_logprobs)
        )

    def echo() -> None:
        one = client.completions.create(**plain | {"max_tokens": 0}, echo=True, logprobs=2)
        choice = one.choices[0]
        assert choice.text == plain["prompt"]
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.tokens) == one.usage.prompt_tokens

    def stop() -> None:
        text = client.completions.create(**plain, temperature=0).choices[0].text
        cut = client.completions.create(**plain, temperature=0, stop=[text[2:4]]).choices[0]
        assert cut.text == text[: text.find(text[2:4])]
        assert cut.finish_reason == "stop"

    def seed() -> None:
        texts = {client.completions.create(**plain, seed=5).choices[0].text for _ in range(2)}
        other = client.completions.create(**plain, seed=6).choices[0].text
        assert len(texts) == 1
        assert other not in texts

    def logit_bias() -> None:
        answer = client.completions.create(**plain, logit_bias={"70": 100}, seed=0, logprobs=1)
        assert len(set(answer.choices[0].logprobs.tokens)) == 1

    def penalties() -> None:
        kept = client.completions.create(
            **plain | {"max_tokens": 24}, temperature=0, presence_penalty=2, frequency_penalty=2,
            logprobs=1, extra_body={"return_tokens_as_token_ids": True},
        )  # fmt: skip
        free = client.completions.create(
            **plain | {"max_tokens": 24}, temperature=0,
            logprobs=1, extra_body={"return_tokens_as_token_ids": True},
        )  # fmt: skip
        counts = [
            max(collections.Counter(answer.choices[0].logprobs.tokens).values())
            for answer in (kept, free)
        ]
        assert counts[0] <= counts[1]

    def chat_completion() -> None:
        answer = client.chat.completions.create(**chat, temperature=0)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content

    def chat_of_parts() -> None:
        parts: Any = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
        told = client.chat.completions.create(
            **chat | {"messages": [{"role": "user", "content": parts}]}, temperature=0
        )
        whole = client.chat.completions.create(**chat, temperature=0)
        assert told.choices[0].message.content == whole.choices[0].message.content

    def streamed_chat() -> None:
        whole = client.chat.completions.create(**chat, seed=1).choices[0].message.content
        parts = list(client.chat.completions.create(**chat, seed=1, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
        assert parts[-1].choices[0].finish_reason

    def chat_log_probabilities() -> None:
        answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
        said = answer.choices[0].logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in said)

    def copies() -> None:
        assert len(client.chat.completions.create(**chat, n=3).choices) == 3

    def json_object() -> None:
        answer = client.chat.completions.create(
            **chat | {"max_tokens": new}, response_format={"type": "json_object"}, seed=1
        )
        text = answer.choices[0].message.content
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
        assert text.startswith("{")

    def json_schema() -> None:
        answer = client.chat.completions.create(
            **chat | {"max_tokens": new}, response_format=wanted
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content), _PERSON)

    def text_format() -> None:
        assert client.chat.completions.create(**chat, response_format={"type": "text"}).choices

    def model_list() -> None:
        assert [model.id for model in client.models.list()] == ["served"]
        assert client.models.retrieve("served").id == "served"

    def request_ids() -> None:
        raw = client.completions.with_raw_response.create(
            **plain, extra_headers={"X-Request-Id": "mine-1"}
        )
        assert raw.headers["x-request-id"] == "mine-1"

    def wrong_key() -> None:
        other: Any = openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0)
        with contextlib.suppress(openai.AuthenticationError):
            other.models.list()
            raise AssertionError("a wrong key was taken")

    def wrong_request() -> None:
        with contextlib.suppress(openai.BadRequestError):
            client.completions.create(**plain, temperature=3)
            raise AssertionError("temperature 3 was taken")

    made: list[Callable[[], None]] = [
        completion, several_prompts, prompt_of_tokens, streamed_completion, log_probabilities, echo,
        stop, seed, logit_bias, penalties, chat_completion, chat_of_parts, streamed_chat,
        chat_log_probabilities, copies, json_object, json_schema, text_format, model_list,
        request_ids, wrong_key, wrong_request,
    ]  # fmt: skip
    rows = []
    for call in made:
        wrong = ""
        try:
            call()
        except Exception as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        name = call.__name__.replace("_", " ")
        logging.info("%s: %s", name, wrong or "passed")
        rows.append({"call": name, "passed": not wrong} | ({"what": wrong} if wrong else {}))
    return rows


def _structured(address: str, count: int, new: int, options: suite.Options) -> dict[str, Any]:
    """Answers that are held to schemas, and what that costs."""
    import openai

    client: Any = openai.OpenAI(
        base_url=f"{address}/v1", api_key="a-key", max_retries=0, timeout=3600
    )

    def ask(i: int, most: int, held: bool) -> tuple[bool, int]:
        schema: Any = _SCHEMAS[i % len(_SCHEMAS)]
        given: Any = {}
        if held:
            told = {"name": "answer", "schema": schema, "strict": True}
            given = {"response_format": {"type": "json_schema", "json_schema": told}}
        answer = client.completions.create(
            model="served",
            prompt=f'Record {i} as JSON, such as {{"name": "Ann", "age": 7}}:\n',
            max_tokens=most,
            seed=i,
            extra_body=given,
        )
        text, valid = answer.choices[0].text, False
        with contextlib.suppress(ValueError, jsonschema.ValidationError):
            jsonschema.validate(json.loads(text), schema)
            valid = True
        return valid, answer.usage.completion_tokens

    def turn(numbers: range, most: list[int], held: bool) -> tuple[float, list[int], int]:
        """Seconds a token, all slots busy; tokens of each answer; how many are valid."""
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(_SLOTS) as pool:
            found = list(pool.map(lambda i, few: ask(i, few, held), numbers, most))
        spent = time.perf_counter() - start
        tokens = [count for _, count in found]
        return spent / sum(tokens), tokens, sum(valid for valid, _ in found)

    size, valid = min(count, 40), 0
    times: dict[bool, list[float]] = {True: [], False: []}
    for held in times:
        turn(range(_SLOTS), [4] * _SLOTS, held)  # What compiles, compiles here.
    for start in range(0, count, size):
        numbers = range(start, min(count, start + size))
        seconds, tokens, right = turn(numbers, [new] * len(numbers), True)
        times[True].append(seconds)
        valid += right
        # As long as those: each answer pays for its prompt too.
        times[False].append(turn(numbers, tokens, False)[0])
        logging.info("%d answers, %d valid", numbers.stop, valid)
    return {
        "call": "answers of a schema",
        "asked": count,
        "valid": valid,
        "ms a token": 1e3 * statistics.median(times[True]),
        "ms a token, free": 1e3 * statistics.median(times[False]),
        "over free": paired_ratio(times[True], times[False]),
    }
