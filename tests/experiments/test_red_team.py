"""Attackers made from a schema, before servers of a few lines: which of them read a row."""

import math
import zlib

import numpy as np
import pytest
from pydantic import Field

from logitjax.leakage import Choice, LogitPolicy
from logitjax.serving import ServerConfig
from logitjax.serving._schema import request_model
from tests.rigs import _red_team as team
from tests.rigs._red_team import Asker, Reply, attackers

ROW = np.random.default_rng(0).normal(0, 3.34, 200)
BODY = {"prompt": [1], "max_tokens": 1, "logprobs": 0}
SCHEMA = {
    "properties": {
        "temperature": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 2}]},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    }
}


def server(named, **rounded):
    """Answers from `ROW`; what `named(body, kept)` returns decides a draw's noise."""

    def one(body):
        body = body | {name: round(body[name] / step) * step for name, step in rounded.items()}
        law = team.choice_of(body).law(ROW)
        if "knob" in body:
            law = np.where(ROW.max() - ROW <= body["knob"], law, -np.inf)
        name = named(body, int(np.isfinite(law).sum()))
        noise = np.random.default_rng(zlib.crc32(repr(name).encode())).gumbel(size=ROW.size)
        return Reply((int((law + noise).argmax()),), body)

    return lambda bodies: [one(body) for body in bodies]


def by_seed(body, kept):
    return body["seed"]


def by_effect(body, kept):
    return (body["seed"], kept)


def by_request(body, kept):
    return tuple((name, body[name]) for name in sorted(body) if name != "prompt")


def judged(attack, ask, queries=1000):
    return attack(Asker(ask, queries), BODY, vocab=ROW.size, letters={}).judge(ROW, 0.0)


def test_one_noise_for_several_requests_reads_what_is_drawn():
    verdict = judged(team.seeds, server(by_seed))
    assert verdict["read"] == verdict["right"] > 30
    assert verdict["narrowest"] < 0.02
    assert judged(team.seeds, server(by_request))["read"] == 0


def test_draws_keyed_by_the_request_tell_counts_and_no_more():
    for attack in (team.counts, team.certificates):
        verdict = judged(attack, server(by_request))
        assert verdict["narrowest"] > 0.2
        assert verdict["right"] >= 0.9 * verdict["read"] > 0
        # Those of rare tokens too, although who is looked at is chosen by being drawn.
        assert verdict["rare hold"] >= 0.9 * verdict["rare"] > 0
        assert verdict["hold"] >= 0.9 * verdict["intervals"] > 0
        assert verdict["nats"] < 1000 * math.log(ROW.size)


@pytest.mark.parametrize("named", [by_seed, by_effect, by_request])
def test_a_key_that_knows_the_effect_fails_the_sweep(named):
    verdict = judged(attackers(SCHEMA)["field min_p"], server(named))
    assert (verdict["nats"] > 30) == (named is not by_request)


def test_a_field_that_nobody_knows_is_attacked_the_day_it_is_added():
    config = ServerConfig(model="m", policy=LogitPolicy(top_k=1))
    model = request_model(config, chat=False)

    class Tomorrow(model):
        knob: float | None = Field(None, ge=3, le=40)

    before, after = (attackers(kind.model_json_schema()) for kind in (model, Tomorrow))
    assert after.keys() - before.keys() == {"field knob"}
    expected = {"values", "counts", "seeds", "certificates", "orders", "penalties", "biases"}
    assert expected < before.keys()
    assert judged(after["field knob"], server(by_seed))["nats"] > 30
    assert judged(after["field knob"], server(by_request))["nats"] == 0


def test_penalties_at_temperature_0_bisect_now_and_stop_at_a_grid():
    letters = {"a": 3, "b": 4, "c": 5}

    def cold(step):
        def one(body):
            words = body["response_format"]["json_schema"]["schema"]["enum"]
            a, b = (letters[word[-1]] for word in words)
            taken = body["frequency_penalty"]
            taken = round(taken / step) * step if step else taken
            body = body | {"frequency_penalty": taken}
            return Reply((a,) * 3 + (a if ROW[a] - 3 * taken > ROW[b] else b,), body)

        return lambda bodies: [one(body) for body in bodies]

    def widths(step):
        asker = Asker(cold(step), 1000)
        readings = team.penalties(asker, BODY, letters=letters)
        judged = readings.judge(ROW, 0.0)
        assert judged["read"] == judged["right"] > 0
        return [high - low for low, high in readings.intervals.values()]

    assert max(widths(0)) < 0.002
    assert min(widths(0.5)) >= 0.5 * 3


def test_rows_still_possible_after_every_penalty_of_a_grid_are_as_wide_as_its_steps():
    gaps = np.linspace(-5, 5, 2001)
    rows = np.stack([np.zeros_like(gaps), gaps], -1)
    counts = np.array([3, 0])
    possible = np.ones(len(rows), bool)
    for penalty in np.arange(-2, 2.1, 0.5):
        choice = Choice(temperature=0.0, frequency_penalty=float(penalty))
        answer = int(choice.law(np.array([0.0, 0.7]), counts=counts).argmax())
        possible &= choice.likelihood(rows, answer, counts=counts) == 0
    assert np.ptp(gaps[possible]) == pytest.approx(0.5 * 3, abs=0.02)
