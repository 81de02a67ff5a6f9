"""A loop of one's own: an objective in flax.linen and equinox, a model that is a function."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from logitjax import decoding, losses
from logitjax.distillation import Objective, Teacher, terms

OBJECTIVE = Objective(terms=((terms.FullKL(temperature=2.0), 0.5), (terms.SFT(), 0.5)))
TOKENS = np.random.default_rng(0).integers(0, 20, (3, 9))
WHERE = np.ones((3, 8), bool)


class Trunk(linen.Module):
    """Tokens to hidden states, and a head that is tied to the embedding."""

    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(20, 6, name="embed")
        return jnp.tanh(linen.Dense(6)(embed(tokens)))


def in_linen(seed):
    trunk = Trunk()
    params = trunk.init(jax.random.key(seed), TOKENS[:, :-1])

    def states_and_head(params):
        head = losses.Head(params["params"]["embed"]["embedding"], vocab_axis=0)
        return trunk.apply(params, TOKENS[:, :-1]), head

    return params, states_and_head


class Model(equinox.Module):
    """The same with a head of its own."""

    embed: jax.Array
    mix: equinox.nn.Linear
    head: equinox.nn.Linear

    def __init__(self, key):
        first, second, third = jax.random.split(key, 3)
        self.embed = jax.random.normal(first, (20, 6))
        self.mix = equinox.nn.Linear(6, 6, key=second)
        self.head = equinox.nn.Linear(6, 20, key=third)


def in_equinox(seed):
    def states_and_head(model):
        hidden = jnp.tanh(jax.vmap(jax.vmap(model.mix))(model.embed[TOKENS[:, :-1]]))
        return hidden, losses.Head(model.head.weight, model.head.bias, vocab_axis=0)

    return Model(jax.random.key(seed)), states_and_head


@pytest.mark.parametrize("make", [in_linen, in_equinox], ids=["linen", "equinox"])
def test_an_objective_trains_in_a_loop_of_ones_own(make):
    params, states_and_head = make(0)
    teacher, _ = make(1)
    tx = optax.adam(0.03)

    @jax.jit
    def step(params, state):
        def loss(params):
            hidden, head = states_and_head(teacher)
            total, count, metrics = OBJECTIVE.value(
                *states_and_head(params),
                {"labels": TOKENS[:, 1:]},
                [Teacher(hidden=hidden, head=head)],
                where=WHERE,
            )
            return total / count, metrics

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, metrics

    state, seen = tx.init(params), []
    for _ in range(20):
        params, state, value, metrics = step(params, state)
        seen.append(float(value))
    (kl, count), (sft, _) = metrics["full_kl"], metrics["sft"]
    np.testing.assert_allclose(value, 0.5 * (kl + sft) / count, rtol=1e-5)
    assert seen[-1] < 0.8 * seen[0]


def test_a_function_of_whole_texts_decodes_and_is_scored():
    """Without a cache: a mean of what was read before decides, so that order and length count."""
    rng = np.random.default_rng(1)
    head, table = (np.float32(rng.normal(size=size)) for size in ((6, 20), (20, 6)))

    def apply(table, tokens):
        read = jnp.cumsum(table[tokens], 1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
        return jnp.tanh(read) @ head * 3

    model = (apply, table)
    prompts = [TOKENS[0, :4], TOKENS[1, :2]]
    out = decoding.generate(
        model, prompts, max_new_tokens=3, sampling=decoding.Sampling(temperature=0.0)
    )
    whole = jax.jit(apply)
    for row, prompt in enumerate(prompts):
        text, at = np.zeros_like(TOKENS), len(prompt)
        text[0, :at] = prompt
        for position in range(at, at + 3):
            text[0, position] = whole(table, text)[0, position - 1].argmax()
        np.testing.assert_array_equal(out.tokens[row], text[0, at : at + 3])
    targets = np.arange(9) >= np.array([[3], [1], [8]])
    nll, _ = decoding.nll_from_model(model)(TOKENS, targets)
    logits = np.asarray(whole(table, TOKENS), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    dense = -np.take_along_axis(log_p[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(nll[:, 1:], np.where(targets[:, 1:], dense, 0.0), atol=1e-5)
