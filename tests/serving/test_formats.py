"""Token masks of JSON schemas: whatever is drawn under them is valid, and nothing else may end."""

import asyncio
import collections
import json
import os
import time
import types

import jsonschema
import numpy as np
import pytest

from logitjax import models
from logitjax.serving import _formats
from logitjax.serving._errors import BadRequestError
from logitjax.serving._formats import Follower, Formats

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def nested(depth):
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    return schema


@pytest.fixture(scope="module")
def tiny():
    tokenizer = models.load_tokenizer("tiny")
    # A vocabulary that is padded beyond the tokenizer's.
    formats = Formats(tokenizer, 300, (256,))
    yield tokenizer, formats
    formats.close()


def bits(follower):
    return np.flatnonzero(np.unpackbits(follower.allowed.view(np.uint8), bitorder="little"))


def test_random_walks_end_in_what_the_schema_allows(tiny):
    tokenizer, formats = tiny
    rng = np.random.default_rng(0)
    for _ in range(20):
        follower, tokens = formats.begin("json", json.dumps(SCHEMA)), []
        while 256 not in tokens:
            tokens.append(int(rng.choice(bits(follower))))
            follower.take(tokens[-1:])
            assert not follower.failed
            assert len(tokens) < 500
        jsonschema.validate(json.loads(tokenizer.decode(tokens[:-1])), SCHEMA)


def test_an_answer_may_end_where_it_is_complete_and_not_before(tiny):
    tokenizer, formats = tiny
    follower = formats.begin("json", '{"type": "object"}')
    for token in tokenizer.encode("{}"):
        assert 256 not in bits(follower)
        follower.take([token])
    assert bits(follower).tolist() == [256]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"$ref": "http://example.com/a"},
        {"type": "string", "pattern": "("},
        {"enum": ["x" * 70_000]},
        {"$ref": "#"},
        nested(100),
        # Begins in six seconds, or in minutes.
        {"allOf": [{"type": "string", "pattern": f"^(.*a.{{{i}}})$"} for i in range(1, 30)]},
    ],
    ids=["type", "reference", "pattern", "size", "circle", "depth", "time"],
)
def test_schemas_that_cannot_be_followed_are_refused_in_one_line(tiny, schema):
    for field in ("response_format", "structured_outputs"):
        start = time.process_time()
        with pytest.raises(BadRequestError, match=f"^{field}: .") as error:
            tiny[1].begin("json", json.dumps(schema), field)
        assert error.value.param == field
        assert "\n" not in str(error.value)
    # What was refused once is refused at once.
    assert time.process_time() - start < 0.05


def test_new_structures_rest_after_a_slow_one_and_known_ones_wait_for_nobody(tiny):
    formats, null_schema = tiny[1], '{"type": "null"}'
    formats.begin("json", null_schema)
    formats._next = time.monotonic() + 0.5

    async def both():
        new = asyncio.create_task(formats.follow("json", '{"enum": ["new"]}', "response_format"))
        await asyncio.sleep(0)
        await formats.follow("json", null_schema, "response_format")
        assert not new.done()
        await new

    start = time.monotonic()
    asyncio.run(both())
    assert time.monotonic() - start >= 0.5


def test_so_many_structures_are_remembered_and_the_oldest_is_forgotten(tiny, monkeypatch):
    formats = tiny[1]
    begun = formats.begin("json", '{"type": "null"}')
    monkeypatch.setattr(_formats, "_REMEMBERED", 2)
    monkeypatch.setattr(formats, "_known", collections.OrderedDict())
    monkeypatch.setattr(formats, "_begin", lambda kind, text: begun)
    for text in "abac":
        formats.begin("json", text)
    assert [text for _, text in formats._known] == ["a", "c"]


def test_an_answer_has_five_seconds_of_a_thread_for_its_structure(monkeypatch):
    clock = iter(np.arange(0, 99, 2.5))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    matcher = types.SimpleNamespace(
        consume_token=lambda token: None, compute_bitmask=lambda: bytes(8), is_error=lambda: False
    )
    matcher.deep_copy = lambda: matcher
    follower = Follower(matcher, 33, field="first")
    assert [follower.copy().field, follower.copy("second").field] == ["first", "second"]
    assert len(follower.allowed) == 2
    failed = []
    for _ in range(3):
        follower.take([0])
        failed.append(follower.failed)
    assert failed == [False, False, True]


def test_trials_of_structures_take_a_tenth_of_all_processors(tiny, monkeypatch):
    formats = tiny[1]
    # The last one has ended itself.
    said, asked = iter([b"passed 1.5\n", b"slow 0.2\n", b""]), []
    monkeypatch.setattr(formats, "_start", lambda: None)
    monkeypatch.setattr(formats, "_end", lambda: asked.append("end"))
    monkeypatch.setattr(formats, "_say", asked.append)
    process = types.SimpleNamespace(stdout=types.SimpleNamespace(readline=lambda: next(said)))
    monkeypatch.setattr(formats, "_process", process)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    for processors, passed, rest in ((2, True, 4 * 1.5), (20, False, 0.0), (2, False, 4 * 0.5)):
        monkeypatch.setattr(formats, "_next", 0.0)
        monkeypatch.setattr(os, "cpu_count", lambda count=processors: count)
        assert formats._passes("any") is passed
        assert formats._next == pytest.approx(100 + rest)
    assert asked == [*[{"grammar": "any", "seconds": 0.5}] * 3, "end"]
