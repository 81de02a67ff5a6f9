"""Losses of whole methods on a decoder, against the same from logits."""

import functools
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from logitjax import losses, unlearning
from logitjax.losses import Head
from logitjax.models import Lora, load_model, with_layout
from logitjax.unlearning._reads import Read
from tests.unlearning import test_losses

METHODS = (
    "gradient_ascent",
    "gradient_difference",
    "npo",
    "npo_gradient_difference",
    "npo_kl",
    "simnpo",
    "rmu",
    "undial",
    "ce_u",
    "satimp",
    "task_vector",
    "wga",
    "gradient_ascent_kl",
    "idk_dpo",
    "pdu",
)
MULTIPLIER, BOUND = 3.0, 1.5
KEY = jax.random.key(0)


def method_of(name):
    options = f"(retain_weight={MULTIPLIER}, bound={BOUND})" if name == "pdu" else ""
    return unlearning.METHODS.parse(name + options)


@pytest.mark.slow
def test_losses_from_hidden_states_are_those_of_logits():
    rng = np.random.default_rng(0)

    def side(rows):
        tokens = rng.integers(1, 200, (rows, 8)).astype(np.int32)
        return {"tokens": tokens, "mask": np.arange(8) >= rng.integers(2, 5, (rows, 1))}

    batch = {"forget": side(3), "retain": side(2), "instead": side(3)}
    model, before = (with_layout(load_model(f"tiny:{seed}"), "listed") for seed in (1, 2))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    reference = nnx.to_pure_dict(nnx.state(before, nnx.Param))
    most = {side: int(rows["mask"][:, 1:].sum()) + 1 for side, rows in batch.items()}

    @functools.partial(jax.jit, static_argnums=2)
    def ours(params, reference, more=None):
        values = {}
        for name in METHODS:
            method = method_of(name)
            counts = None
            if more is not None:
                counts = [{side: n + more for side, n in most.items()}]
            loss_fn, _ = method.make_loss(model, counts=counts, key=KEY)
            values[name] = loss_fn(method.start(params), batch, None, reference)[0]
        return values

    @jax.jit
    def logits(params, tokens):
        return nnx.merge(graphdef, params, rest)(tokens)

    params = nnx.to_pure_dict(params)
    from_hidden = ours(params, reference)
    z, z0 = (
        {k: logits(p, s["tokens"])[:, :-1] for k, s in batch.items()} for p in (params, reference)
    )
    labels = {k: s["tokens"][:, 1:] for k, s in batch.items()}
    where = {k: s["mask"][:, 1:] for k, s in batch.items()}
    nll, nll0 = ({k: losses.cross_entropy(x[k], labels[k]) for k in batch} for x in (z, z0))

    def mean(values, k):
        return float((np.asarray(values) * where[k]).sum() / where[k].sum())

    def values_of(name, *arrays):
        return unlearning.METHODS.parse(name).values(*arrays)

    n, n0, nll_sum, said0 = (
        np.where(where[k], x[k], 0.0).sum(-1) for k in ("forget", "instead") for x in (nll, nll0)
    )
    lengths = where["forget"].sum(-1)
    npo = float(values_of("npo", n, n0).mean())
    simnpo = 0.125 * float(values_of("simnpo", n, lengths).mean())
    undial = test_losses.undial(z["forget"], z0["forget"], labels["forget"])
    ce_u = test_losses.undial(z["forget"], z["forget"], labels["forget"], beta=np.inf)
    flat = np.square(z["forget"].max(-1) - z["forget"].mean(-1))
    later = where["forget"] & (np.cumsum(where["forget"], -1) > 1)
    kept = mean(nll["retain"], "retain")
    diverged = mean(losses.kl_divergence(z["retain"], z0["retain"]), "retain")
    expected = {
        "gradient_ascent": -mean(nll["forget"], "forget"),
        "gradient_difference": kept - mean(nll["forget"], "forget"),
        "npo": npo,
        "npo_gradient_difference": npo + kept,
        "npo_kl": npo + diverged,
        "simnpo": simnpo + kept,
        "undial": mean(undial, "forget"),
        "ce_u": float((np.asarray(ce_u) * later).sum() / later.sum()),
        "satimp": 0.1 * mean(values_of("satimp", nll["forget"]), "forget") + kept,
        "task_vector": mean(nll["forget"], "forget"),
        "wga": mean(values_of("wga", nll["forget"]), "forget") + kept,
        "gradient_ascent_kl": diverged - mean(nll["forget"], "forget"),
        "idk_dpo": float(values_of("idk_dpo", nll_sum, n, said0, n0).mean()) + kept,
        "pdu": mean(flat, "forget") + MULTIPLIER * (kept - BOUND),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(from_hidden[name], value, rtol=2e-4, err_msg=name)
    for more in (0, -1):
        for name, value in ours(params, reference, more).items():
            np.testing.assert_allclose(value, from_hidden[name], rtol=1e-5, err_msg=name)
    for name, value in ours(params, reference, -2).items():
        assert np.isnan(value), name
    # Of the same model there is nothing to keep but itself; the direction is where RMU goes.
    assert float(from_hidden["rmu"]) > 0


@pytest.mark.slow
def test_adapters_give_what_the_merged_weights_give_beside_the_same_reference():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 200, (2, 8)).astype(np.int32)
    side = {"tokens": tokens, "mask": np.arange(8) >= np.array([[3], [5]])}
    other = {**side, "tokens": tokens[::-1].copy()}
    batch = {"forget": side, "retain": other, "instead": other}
    model = with_layout(load_model("tiny:1"), "listed")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    like = jax.eval_shape(
        lambda: Lora.init(model.config, 2, key=jax.random.key(0), layout="listed")
    )
    lora = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), like)

    @jax.jit
    def both(lora, params):
        graphdef, state = nnx.split(model)
        merged = lora.merged_into(nnx.merge(graphdef, state))
        weights = nnx.to_pure_dict(nnx.state(merged, nnx.Param))
        values = {}
        for name in METHODS:
            method = method_of(name)
            values[name] = tuple(
                method.make_loss(model, adapters=adapters, key=KEY)[0](
                    method.start(trained), batch, None, params
                )[0]
                for adapters, trained in ((False, weights), (True, lora))
            )
        return values

    for name, (whole, beside) in both(lora, params).items():
        np.testing.assert_allclose(beside, whole, rtol=1e-4, err_msg=name)


def test_flat_logits_are_asked_of_the_answers_tokens_alone():
    states, kernel = (
        np.random.default_rng(0).normal(size=s).astype("f4") for s in ((2, 3, 4), (4, 9))
    )
    read, answers = mock.Mock(spec=Read), np.arange(6).reshape(2, 3) > 2
    read.states.return_value, read.head.return_value = states, Head.of(kernel)
    read.put.side_effect, read.where.return_value = lambda side, values: values, answers
    values, where = unlearning.METHODS.parse("pdu(bound=1)").forget(read)
    logits = states @ kernel
    np.testing.assert_allclose(values, np.square(logits.max(-1) - logits.mean(-1)), rtol=1e-5)
    assert where is answers


def test_a_multiplier_climbs_by_what_its_constraint_is_missed_by(monkeypatch):
    """Minus the slack is its gradient in a descent; by itself it adds nothing to the loss."""
    method = unlearning.METHODS.parse("pdu(bound=1)")
    means = {"forget": 2.0, "retain": 1.5}
    monkeypatch.setattr(type(method).__mro__[1], "loss", lambda *_: (None, means))
    read = mock.Mock(spec=Read)
    loss, slope = jax.value_and_grad(lambda state: method.loss(read, state)[0])(3.0)
    assert loss == method.forget_weight * 2.0 + 3.0 * 0.5
    assert slope == -0.5


@pytest.mark.slow
def test_a_multiplier_grows_while_its_constraint_is_broken_and_never_below_nothing():
    method = unlearning.METHODS.parse(f"pdu(retain_weight=1, bound={BOUND})")
    model = with_layout(load_model("tiny:1"), "listed")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    side = {"tokens": np.arange(1, 9, dtype=np.int32)[None], "mask": np.arange(8)[None] > 2}
    batch = {"forget": side, "retain": side}
    loss_fn, _ = method.make_loss(model)
    tx = method.optimizer(optax.sgd(1e-3), warmup=1)

    @jax.jit
    def step(weights, state):
        gradient, parts = jax.grad(
            lambda weights: (lambda out: (out[0], out[2]))(loss_fn(weights, batch, None)),
            has_aux=True,
        )(weights)
        moves, state = tx.update(gradient, state, weights)
        return optax.apply_updates(weights, moves), state, parts["retain"][0]

    weights = method.start(params)
    state, seen, expected = tx.init(weights), [], 1.0
    for number in range(4):
        weights, state, retain = step(weights, state)
        expected += 0.0 if number == 0 else float(retain) - BOUND
        seen.append(float(weights["state"]))
        assert seen[-1] == pytest.approx(max(0.0, expected), rel=1e-4)
    assert seen[0] == 1.0
    assert seen[-1] > seen[1] > 1.0


class Sums(Read):
    """Summed losses of answers, of which the last has no token."""

    def __init__(self, rows):
        self.rows = rows

    def where(self, side):
        return np.arange(4) < np.array([[4], [2], [0]])[: self.rows]

    def answer_nll(self, side, *, before=False):
        shift = (2.0 if side == "forget" else 1.0) * (not before)
        return np.array([5.0 + shift, 3.0 - shift, 0.0], np.float32)[: self.rows]


@pytest.mark.parametrize("name", ["npo", "simnpo(retain='none')", "idk_dpo(retain='none')"])
def test_an_answer_without_a_token_counts_in_no_mean(name):
    method = unlearning.METHODS.parse(name)
    all_rows, answers = (jax.jit(lambda n=n: method.loss(Sums(n), None)[0])() for n in (3, 2))
    assert float(all_rows) == float(answers) != 0.0
