"""Properties of all dense losses: they run on every mesh, under `pmap` too.

All of them are one program a mesh. `tests/test_contract.py` has the other transformations.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.distillation import universal_logit_distance
from logitjax.losses import cross_entropy, generalized_jensen_shannon, kl_divergence

VOCAB = 32


def _cross_entropy(student, teacher, **options):
    labels = np.full(student.shape[0], 3)
    loss = cross_entropy(student, labels, label_smoothing=0.1, z_loss=1e-3, **options)
    # Any function of the second argument, so that all losses have two.
    return loss + cross_entropy(teacher, labels + 1, **options)


LOSSES = {
    "cross_entropy": _cross_entropy,
    "forward_kl": functools.partial(kl_divergence, temperature=2.0),
    "reverse_kl": functools.partial(kl_divergence, direction="reverse"),
    "jensen_shannon": functools.partial(generalized_jensen_shannon, beta=0.3),
    "universal_top": functools.partial(universal_logit_distance, top_k=5),
    "universal_full": functools.partial(universal_logit_distance, top_k=None),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def logits():
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 8, VOCAB)) * 2).astype(np.float32)
    student[:, 29:] = teacher[:, 29:] = -np.inf
    return student, teacher


def every(function):
    """`function(name, loss)` of each loss, called on arrays, in one program."""

    def run(*arguments):
        return {name: function(loss)(*arguments) for name, loss in LOSSES.items()}

    return jax.jit(run)


def value_and_grads(loss):
    """Per-row values, and the gradients of a weighted sum of them."""

    def total(student, teacher):
        values = loss(student, teacher)
        weights = np.arange(1.0, 9.0, dtype=np.float32)
        return (values * weights).sum(), values

    run = jax.grad(total, (0, 1), has_aux=True)
    return lambda *arguments: run(*arguments)[::-1]


all_values_and_grads = every(value_and_grads)


@functools.cache
def local():
    return all_values_and_grads(*logits())


def assert_close(result, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, result, expected)


@functools.cache
def batch_sharded(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    return all_values_and_grads(*jax.device_put(logits(), NamedSharding(mesh, P("data"))))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@every_loss
def test_batch_sharded_equals_local(name, kind):
    assert_close(batch_sharded(kind)[name], local()[name])


@functools.cache
def vocabulary_sharded():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def sharded(loss):
        return jax.shard_map(
            functools.partial(loss, axis_name="model"),
            mesh=mesh,
            in_specs=(P(None, "model"),) * 2,
            out_specs=P(),
        )

    return every(lambda loss: value_and_grads(sharded(loss)))(*logits())


@every_loss
def test_vocabulary_sharded_equals_local(name):
    assert_close(vocabulary_sharded()[name], local()[name])


@functools.cache
def data_parallel():
    def step(student, teacher):
        def one(loss):
            value, grad = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
            return jax.lax.psum(value, "data"), grad

        return {name: one(loss) for name, loss in LOSSES.items()}

    student, teacher = logits()
    return jax.pmap(step, axis_name="data")(student[:, None], teacher[:, None])


@every_loss
def test_data_parallel_under_pmap(name):
    value, grad = data_parallel()[name]
    values, (weighted, _) = local()[name]
    assert_close(value, np.full(8, np.asarray(values).sum()))
    # Rows do not see each other: their gradients in `local` are these, times their weights.
    assert_close(np.asarray(grad)[:, 0] * np.arange(1.0, 9.0)[:, None], weighted)
