"""OpenAI's own client asks the server: every call, and answers that follow JSON schemas.

Full scale installs this repository with the extra `serve` into an empty environment first, and the
server runs there; the client is this interpreter's. SmolLM2-135M answers (at smoke scale a toy).
The second part asks 200 times for JSON of a schema, as many at a time as there are slots, checks
each answer against its schema, and times answers of the same lengths without one.
"""

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
from collections import Counter
from collections.abc import Callable
from typing import Any

import jsonschema
from absl import logging

from experiments.shared import suite
from experiments.shared.peers import serving
from experiments.shared.timing import paired_ratio
from logitjax import models
from tests.rigs import _tables

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# What answers are held to, by the name of the schema.
_SCHEMAS = _tables.read("answer_schemas")
_PERSON = _SCHEMAS["person"]
_SLOTS = 16
_NEW = 48  # Tokens that any answer to these schemas fits into.


def run(options: suite.Options) -> suite.Result:
    import openai

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        model, tokenizer = models.load("tiny" if options.smoke else "smollm2", layout="listed")
        tokenizer.chat_template = tokenizer.chat_template or _TEMPLATE
        models.save_pretrained(model, tokenizer, root / "weights")
        # A toy spells every byte as a token.
        new = 4 * _NEW if options.smoke else _NEW
        python = sys.executable if options.smoke else _empty_environment(root / "empty")
        keys = root / "keys.jsonl"
        keys.write_text(json.dumps({"name": "client", "secret": "a-key"}) + "\n")
        flags = (
            f"--model={root / 'weights'}",
            "--served_name=served",
            f"--api_keys={keys}",
            "--bias=reported",
            f"--max_tokens={new}",
            f"--slots={_SLOTS}",
            "--max_length=512",
            "--policy_seed=0",
        )
        with serving(*flags, python=python) as (address, _):
            base = {"base_url": f"{address}/v1", "max_retries": 0, "timeout": 3600}
            client = openai.OpenAI(api_key="a-key", **base)
            rows = _calls(client, new)
            structured = _structured(client, 24 if options.smoke else 200, new)
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


def _empty_environment(folder: pathlib.Path) -> str:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", f"{suite.ROOT}[serve]"]
    subprocess.run(command, check=True)
    return python


def _calls(client: Any, new: int) -> list[dict[str, Any]]:
    import openai

    plain: dict[str, Any] = {"model": "served", "prompt": "One, two, three,", "max_tokens": 8}
    told = [{"role": "user", "content": "Say hello."}]
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    ids = {"logprobs": 1, "extra_body": {"return_tokens_as_token_ids": True}}

    def asked(**more: Any) -> Any:
        return client.completions.create(**plain | more)

    def one(**more: Any) -> Any:
        return asked(**more).choices[0]

    def talked(**more: Any) -> Any:
        base = {"model": "served", "messages": told, "max_tokens": 8}
        return client.chat.completions.create(**base | more)

    def answer(**more: Any) -> Any:
        return talked(**more).choices[0]

    def streamed() -> bool:
        pieces = list(asked(seed=3, **usage))
        text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        return text == one(seed=3).text and pieces[-1].usage is not None

    def streamed_chat() -> bool:
        pieces = [piece.choices[0] for piece in talked(seed=1, stream=True)]
        text = "".join(piece.delta.content or "" for piece in pieces)
        return text == answer(seed=1).message.content and bool(pieces[-1].finish_reason)

    def values() -> bool:
        logprobs = one(logprobs=3, temperature=0).logprobs
        largest = [max(top.values()) for top in logprobs.top_logprobs]
        return largest == logprobs.token_logprobs and len(logprobs.tokens) == len(largest)

    def echo() -> bool:
        whole = asked(max_tokens=0, echo=True, logprobs=2)
        choice, count = whole.choices[0], whole.usage.prompt_tokens
        first = choice.logprobs.token_logprobs[0]
        tokens = len(choice.logprobs.tokens)
        return choice.text == plain["prompt"] and first is None and tokens == count

    def stop() -> bool:
        text = one(temperature=0).text
        cut = one(temperature=0, stop=[text[2:4]])
        return (cut.text, cut.finish_reason) == (text[: text.find(text[2:4])], "stop")

    def penalties() -> bool:
        penalised = {"presence_penalty": 2, "frequency_penalty": 2}
        kept, free = (
            one(max_tokens=24, temperature=0, **ids, **more).logprobs.tokens
            for more in (penalised, {})
        )
        return max(Counter(kept).values()) <= max(Counter(free).values())

    def json_object() -> bool:
        choice = answer(max_tokens=new, response_format={"type": "json_object"}, seed=1)
        text, ended = choice.message.content, choice.finish_reason == "stop"
        return text.startswith("{") and (not ended or isinstance(json.loads(text), dict))

    def json_schema() -> bool:
        choice = answer(max_tokens=new, response_format=response_format)
        jsonschema.validate(json.loads(choice.message.content), _PERSON)
        return True

    def extra(**body: Any) -> Any:
        return one(extra_body=body)

    def of_vllm() -> bool:
        choice = extra(structured_outputs={"choice": ["yes", "no"]})
        least = asked(max_tokens=8, extra_body={"min_tokens": 8}).usage.completion_tokens
        only = one(**ids | {"extra_body": ids["extra_body"] | {"allowed_token_ids": [70, 71]}})
        told = extra(prompt_logprobs=2).prompt_logprobs
        kept = set(only.logprobs.tokens) <= {"token_id:70", "token_id:71"}
        return choice.text in ("yes", "no") and least == 8 and kept and told[0] is None

    def request_id() -> bool:
        header = {"X-Request-Id": "mine-1"}
        raw = client.completions.with_raw_response.create(**plain, extra_headers=header)
        return raw.headers["x-request-id"] == "mine-1"

    def refused(error: Any, call: Callable[[], Any]) -> bool:
        try:
            call()
        except error:
            return True
        return False

    def chosen(**more: Any) -> list[int]:
        return [choice.index for choice in asked(**more).choices]

    stranger = client.with_options(api_key="other")
    spoken = [{"role": "user", "content": parts}]
    calls: dict[str, Callable[[], bool]] = {
        "completion": lambda: one(temperature=0).finish_reason in ("length", "stop"),
        "several prompts": lambda: chosen(prompt=["a", "b"], n=2) == [0, 1, 2, 3],
        "prompt of tokens": lambda: asked(prompt=[5, 6, 7]).usage.prompt_tokens == 3,
        "streamed completion": streamed,
        "log probabilities": values,
        "echo": echo,
        "stop": stop,
        "seed": lambda: one(seed=5).text == one(seed=5).text != one(seed=6).text,
        "logit bias": lambda: len(set(one(logit_bias={"70": 100}, **ids).logprobs.tokens)) == 1,
        "penalties": penalties,
        "chat": lambda: bool(answer(temperature=0).message.content),
        "chat of parts": lambda: (
            answer(messages=spoken, temperature=0).message == answer(temperature=0).message
        ),
        "streamed chat": streamed_chat,
        "chat log probabilities": lambda: all(
            len(token.top_logprobs) == 2
            for token in answer(logprobs=True, top_logprobs=2).logprobs.content
        ),
        "copies": lambda: len(talked(n=3).choices) == 3,
        "json object": json_object,
        "json schema": json_schema,
        "text format": lambda: bool(talked(response_format={"type": "text"}).choices),
        "model list": lambda: [model.id for model in client.models.list()] == ["served"],
        "one model": lambda: client.models.retrieve("served").id == "served",
        "request id": request_id,
        "wrong key": lambda: refused(openai.AuthenticationError, stranger.models.list),
        "fields of vLLM": of_vllm,
        "unknown field": lambda: refused(
            openai.BadRequestError, lambda: extra(guided_choice=["yes", "no"])
        ),
        "wrong request": lambda: refused(openai.BadRequestError, lambda: asked(temperature=3)),
    }
    return [{"call": name} | _tried(name, call) for name, call in calls.items()]


def _tried(name: str, call: Callable[[], bool]) -> dict[str, Any]:
    try:
        wrong = "" if call() else "another answer"
    except Exception as error:
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    logging.info("%s: %s", name, wrong or "passed")
    return {"passed": not wrong} | ({"what": wrong} if wrong else {})


def _structured(client: Any, count: int, new: int) -> dict[str, Any]:
    def ask(i: int, most: int, structured: bool) -> tuple[bool, int]:
        schema: Any = list(_SCHEMAS.values())[i % len(_SCHEMAS)]
        given: Any = {}
        if structured:
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

    def turn(numbers: range, most: list[int], structured: bool) -> tuple[float, list[int], int]:
        """Seconds a token, all slots busy; tokens of each answer; how many are valid."""
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(_SLOTS) as pool:
            answers = list(pool.map(lambda i, few: ask(i, few, structured), numbers, most))
        spent = time.perf_counter() - start
        tokens = [count for _, count in answers]
        return spent / sum(tokens), tokens, sum(valid for valid, _ in answers)

    size, valid = min(count, 40), 0
    times: dict[bool, list[float]] = {True: [], False: []}
    for structured in times:
        turn(range(_SLOTS), [4] * _SLOTS, structured)  # What compiles, compiles here.
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
