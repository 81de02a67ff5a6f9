"""Anybody's model as a pure function: a Linen toy and an nnx toy learn from each other."""

import flax.linen
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from logitjax.losses import kl_divergence
from logitjax.models import from_nnx
from tests._modules import call

TOKENS = np.arange(24).reshape(3, 8) % 7


class LinenToy(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, tokens):
        x = flax.linen.Embed(7, 5)(tokens)
        x = flax.linen.BatchNorm(use_running_average=True)(x)
        return flax.linen.Dense(7)(x)


class NnxToy(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.head = nnx.Linear(6, 7, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.dropout(self.embed(tokens)))

    def hidden(self, tokens):
        return self.embed(tokens)


def toys():
    linen = LinenToy()
    variables = jax.jit(linen.init)(jax.random.key(0), TOKENS)
    rest = {"batch_stats": variables["batch_stats"]}

    def apply_fn(params, tokens):
        return linen.apply({"params": params, **rest}, tokens)

    made = nnx.jit(lambda: NnxToy(nnx.Rngs(1)))()
    return (apply_fn, variables["params"]), from_nnx(made)


@pytest.mark.parametrize("turn", [1, -1])
def test_either_toy_is_fused_into_the_other(turn):
    (student, params), (teacher, teacher_params) = toys()[::turn]
    target = jax.jit(teacher)(teacher_params, TOKENS)
    tx = optax.adam(0.05)

    def loss(params):
        return kl_divergence(student(params, TOKENS), target).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(tx.init)(params)
    values = []
    for _ in range(40):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]


def test_other_methods():
    module = NnxToy(nnx.Rngs(0))
    apply_fn, params = from_nnx(module, method="hidden")
    assert set(params) == {"embed", "head"}
    np.testing.assert_array_equal(
        jax.jit(apply_fn)(params, TOKENS), call(module, TOKENS, method="hidden")
    )


def test_what_is_no_nnx_module_is_refused():
    for module, kind in ((flax.linen.Dense(3), "Dense"), ({}, "dict")):
        with pytest.raises(TypeError, match=f"expected an nnx module, got {kind}$"):
            from_nnx(module)
