"""Budgets, rates and the log of what was given out."""

import asyncio
import json
import math

import pytest

from logitjax.commands import _flags, line_up, serve
from logitjax.decoding import Ensemble
from logitjax.leakage import LogitPolicy
from logitjax.models import load_tokenizer
from logitjax.serving import Key, ServerConfig, build_app
from logitjax.serving._accounts import Accounts, Rate
from logitjax.serving._errors import ApiError
from tests.decoding._bags import bag_of_words
from tests.serving.inside import call, running


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def refused(accounts, key, *, queries, tokens):
    before = dict(vars(accounts.spent(key)))
    with pytest.raises(ApiError) as error:
        accounts.reserve(key, queries=queries, tokens=tokens)
    assert error.value.status == 429
    assert vars(accounts.spent(key)) == before
    return error.value


def test_a_budget_counts_what_is_under_way_and_gets_back_what_was_not_used():
    key = Key(name="anna", queries=5, tokens=100)
    accounts = Accounts([key])
    assert accounts.ledger.limit == math.inf
    reservation = accounts.reserve(key, queries=2, tokens=90)
    assert refused(accounts, key, queries=1, tokens=11).code == "insufficient_quota"
    assert accounts.spent(key).nats == 0.0
    accounts.settle(reservation, tokens=30, record={})
    accounts.settle(accounts.reserve(key, queries=3, tokens=70), tokens=0, record=None)
    assert vars(accounts.spent(key)) == {"queries": 2, "tokens": 30, "nats": 0.0}
    assert refused(accounts, key, queries=4, tokens=1).code == "insufficient_quota"
    # Of what was to be told at most, what was not told is given back too.
    eve = Key(name="eve")
    kept = accounts.reserve(eve, queries=1, tokens=1, nats=3.0)
    assert accounts.spent(eve).nats == 3.0
    accounts.settle(kept, tokens=1, record={}, contexts={"context": 0.5, "another": 0.75})
    assert accounts.spent(eve).nats == 1.25
    # Another key's budget is its own.
    other = Key(name="ben", queries=1)
    accounts.reserve(other, queries=1, tokens=10**6)
    refused(accounts, other, queries=1, tokens=1)


def test_rates_say_when_to_come_back():
    clock = Clock()
    key = Key(name="anna", queries_per_minute=60, tokens_per_minute=600)
    accounts = Accounts([key], clock=clock)
    reservation = accounts.reserve(key, queries=10, tokens=600)
    error = refused(accounts, key, queries=1, tokens=100)
    assert error.code == "rate_limit_exceeded"
    assert "tokens" in str(error)
    assert error.headers["Retry-After"] == "11"
    # What an answer did not need is there again at once.
    accounts.settle(reservation, tokens=450, record={})
    accounts.reserve(key, queries=1, tokens=100)
    clock.now += 30
    # More than a minute's worth is had by who waits for a full minute's, and owed from then on.
    refused(accounts, key, queries=1, tokens=900)
    clock.now += 30
    accounts.reserve(key, queries=1, tokens=900)
    assert refused(accounts, key, queries=1, tokens=100).headers["Retry-After"] == "41"
    rate = Rate(60, clock)
    rate.take(60)
    assert [rate.wait(amount) for amount in (1, 30, 90)] == pytest.approx([1, 30, 60])


def test_a_rate_of_nothing_is_refused_as_any_other():
    key = Key(name="anna", queries_per_minute=0)
    error = refused(Accounts([key]), key, queries=1, tokens=1)
    assert error.headers["Retry-After"] == "3600"


def test_a_log_that_cannot_be_written_is_told_at_the_start(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "audit.jsonl"):
        with pytest.raises(OSError, match=str(path)):
            Accounts([Key()], str(path))
        config = _flags.build(serve.Config, dict(model="tiny", audit_log=str(path)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(line_up.LineUp, "load", lambda _: pytest.fail("weights are read"))
            with pytest.raises(OSError, match=str(path)):
                serve.run(config)


def test_a_log_is_what_a_restart_goes_on_from(tmp_path):
    path, key = tmp_path / "audit.jsonl", Key(name="anna", queries=3)
    accounts = Accounts([key], str(path))
    for values in (7, 8):
        reservation = accounts.reserve(key, queries=1, tokens=50)
        accounts.settle(reservation, tokens=20, record={"values": values})
    accounts.settle(accounts.reserve(key, queries=1, tokens=5), tokens=0, record=None)
    accounts.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["key"], line["tokens"], line["values"]) for line in lines] == [
        ("anna", 20, 7),
        ("anna", 20, 8),
    ]
    with path.open("a") as file:
        file.write('{"key": "anna", "quer')  # Its process was killed.
    again = Accounts([key], str(path))
    assert vars(again.spent(key)) == {"queries": 2, "tokens": 40, "nats": 0.0}
    again.reserve(key, queries=1, tokens=1)
    refused(again, key, queries=1, tokens=1)
    again.close()
    assert path.read_text().count("\n") == 2
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"audit\.jsonl:1: expected a line of an audit log"):
        Accounts([key], str(path))


@pytest.mark.every_change
@pytest.mark.slow
def test_a_server_keeps_to_budgets_and_logs_the_values_it_gave_out(tmp_path):
    path = tmp_path / "audit.jsonl"
    config = ServerConfig(
        model="bag",
        policy=LogitPolicy(top_k=3, bias="sampling"),
        slots=4,
        max_length=32,
        max_tokens=4,
        keys=(Key(name="anna", secret="s", queries=5), Key(name="ben", secret="t")),
        audit_log=str(path),
    )
    app = build_app(Ensemble(bag_of_words(4, 257)), load_tokenizer("tiny"), (), config)
    bodies = [
        {"prompt": [5, 6], "max_tokens": 2, "logprobs": 2, "temperature": 0},
        # Forced to a token that is none of the three: its own value is not given out.
        {"prompt": [5, 6], "max_tokens": 1, "logprobs": 3, "logit_bias": {"9": 100}, "n": 2},
        {"prompt": [5, 6], "max_tokens": 1, "n": 3},
        {"prompt": [5, 6], "max_tokens": 1},
        {"prompt": [5, 6], "max_tokens": 1, "n": 3},
    ]

    async def ask():
        async with running(app):
            return [await call(app, "/v1/completions", body, key="s") for body in bodies]

    answers = asyncio.run(ask())
    # Five are allowed: three more are too many, one more is not, and then it is over.
    assert [status for status, _ in answers] == [200, 200, 429, 200, 429]
    assert answers[2][1]["error"]["code"] == "insufficient_quota"
    values = []
    for _, answer in answers[:2]:
        shown = [choice["logprobs"] for choice in answer["choices"]]
        values.append(0)
        for one in shown:
            for name, logprob, top in zip(
                one["tokens"], one["token_logprobs"], one["top_logprobs"]
            ):
                values[-1] += len(top) + (logprob is not None and name not in top)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["key"], line["queries"], line["values"]) for line in lines] == [
        ("anna", 1, values[0]),
        ("anna", 2, values[1]),
        ("anna", 1, 0),
    ]
    assert values == [4, 6]
    assert [line["biased"] for line in lines] == [0, 1, 0]
