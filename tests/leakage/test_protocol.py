"""A server is tested before anything that it answers is certified."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.leakage import LogitPolicy, audit
from logitjax.leakage._protocol import LEVEL, Protocol, _lattice
from tests.leakage._models import log_softmax
from tests.leakage.servers import KINDS, VOCAB, Server, is_false

PROMPTS = np.arange(16)[:, None]


def _audited(kind, seed=0):
    server = Server(kind, seed)
    return server, audit(server, PROMPTS, VOCAB)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "honest" in kind or ", said" in kind])
def test_a_server_that_is_as_declared_is_certified_within_its_error(kind):
    server, result = _audited(kind)
    assert not result.unlike
    assert not is_false(server, result)
    assert result.row.error_bound < 0.06
    assert result.row.known.mean() == 1.0 or "drawn" in kind
    assert result.verdict.startswith(("open", "part of a row"))


def test_fresh_noise_that_is_declared_widens_the_error_of_a_row_instead_of_hiding_it():
    server = Server("fresh noise", 0)
    server.policy = dataclasses.replace(server.policy, noise=0.1, noise_per="query")
    result = audit(server, PROMPTS, VOCAB)
    assert not result.unlike
    assert not is_false(server, result)
    assert 0.3 < result.row.error_bound < 3
    assert "nats" in result.verdict


# What each server does otherwise, and which test has to say so.
OTHERWISE = {
    "two decimals": "lattice",
    "bfloat16 values": "lattice",
    "fresh noise": "one prompt again",
    "faint noise": "one prompt again",
    "noise, token": "told again",
    "noise of the request": "told again",
    "bias of draws": "bias moves",
    "bias reported": "bias moves",
    "bias clipped": "told again",
    "two tokens biased": "told again",
    "values at the temperature": "temperature",
    "probabilities of four decimals": "told again",
    "two models": "one prompt again",
    "rarely another model": "told again",
    "cut at 90 %": "told again",
    "fewer values": "answers",
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_a_server_that_is_not_certifies_nothing(kind):
    _, result = _audited(kind)
    tests = [one.split(":")[0] for one in result.unlike]
    assert OTHERWISE[kind] in tests
    assert result.verdict.startswith("not as declared, so nothing is certified: ")


@pytest.mark.parametrize("seed", range(4))
def test_weights_that_change_at_any_time_make_no_false_row(seed):
    server, result = _audited("weights changed", seed)
    assert not is_false(server, result)
    assert result.unlike or server.changes > 70


def test_a_lattice_is_told_with_its_chance_and_widens_errors():
    values = log_softmax(2.5 * np.random.default_rng(0).standard_normal((8, 40)))[:, :5]
    logits = np.asarray(jnp.asarray(30 + values, jnp.bfloat16), np.float64)
    for shown, seen, step in (
        (values.round(2), "2 decimals", 0.005),
        (np.asarray(jnp.asarray(values, jnp.float16), np.float64), "float16 values", None),
        (logits - 0.1234567, "logits to 2^-3", 0.5),
        (values, "none", 0.0),
    ):
        protocol = Protocol(policy=LogitPolicy(top_k=5))
        _lattice(protocol, np.float32(shown).astype(np.float64))
        (finding,) = protocol.findings
        assert finding.seen.startswith(seen)
        assert finding.p < 1e-6 or seen == "none"
        assert step is None or protocol.step == step


def test_several_tests_share_one_level():
    protocol = Protocol(policy=LogitPolicy())
    for p in (0.9 * LEVEL, 0.4 * LEVEL, 0.5):
        protocol.add("one", "seen", p, 0.0, declared=False)
    # The second is beyond a third of the level, which Holm asks of the first of three.
    assert protocol.unlike == []
    protocol.add("two", "seen", 1e-9, 0.0, declared=False)
    assert [finding.test for finding in protocol.unlike] == ["two"]
