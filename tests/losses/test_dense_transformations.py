"""What all dense losses have in common: they run under every transformation and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from logitjax.distillation import universal_logit_distance
from logitjax.losses import (
    cross_entropy,
    generalized_jensen_shannon,
    kl_divergence,
    total_variation,
)

VOCAB = 32


def _cross_entropy(student, teacher, **options):
    labels = jnp.full(student.shape[0], 3)
    loss = cross_entropy(student, labels, label_smoothing=0.1, z_loss=1e-3, **options)
    # Any function of the second argument, so that all losses have two.
    return loss + cross_entropy(teacher, labels + 1, **options)


LOSSES = {
    "cross_entropy": _cross_entropy,
    "forward_kl": functools.partial(kl_divergence, temperature=2.0),
    "reverse_kl": functools.partial(kl_divergence, direction="reverse"),
    "jensen_shannon": functools.partial(generalized_jensen_shannon, beta=0.3),
    "total_variation": total_variation,
    "universal_top": functools.partial(universal_logit_distance, top_k=5),
    "universal_full": functools.partial(universal_logit_distance, top_k=None),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def logits(dtype=np.float32):
    rng = np.random.default_rng(0)
    student, teacher = ((rng.normal(size=(8, VOCAB)) * 2).astype(dtype) for _ in range(2))
    student[:, 29:] = teacher[:, 29:] = -np.inf
    return student, teacher


def value_and_grads(loss):
    """Per-row values, and the gradients of a weighted sum of them."""

    def total(student, teacher):
        values = loss(student, teacher)
        weights = jnp.arange(1.0, 9.0)
        return (values * weights).sum(), values

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


def assert_close(result, expected, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), result, expected)


@every_loss
def test_jit_and_vmap_equal_eager(loss):
    arguments = logits()
    eager = loss(*arguments)
    assert eager.dtype == jnp.float32
    assert eager.shape == (8,)
    assert_close(jax.jit(loss)(*arguments), eager)
    halves = [x.reshape(2, 4, VOCAB) for x in arguments]
    assert_close(jax.vmap(loss)(*halves).reshape(8), eager)


@every_loss
def test_gradient_equals_finite_differences(loss):
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x[:2, :9]) for x in logits(np.float64))
        check_grads(loss, (student, teacher), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


@every_loss
def test_bfloat16_is_the_float32_of_rounded_logits(loss):
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in logits()]
    result = loss(*rounded)
    assert result.dtype == jnp.float32
    assert_close(result, loss(*(x.astype(jnp.float32) for x in rounded)))
    assert_close(result, loss(*logits()), rtol=0.05, atol=0.02)
    grad = jax.grad(lambda s, t: loss(s, t).sum())(*rounded)
    assert grad.dtype == jnp.bfloat16
    assert np.isfinite(grad.astype(np.float32)).all()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@every_loss
def test_batch_sharded_equals_local(loss, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    arguments = logits()
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arguments]
    run = value_and_grads(loss)
    assert_close(run(*sharded), run(*arguments))


@every_loss
def test_vocabulary_sharded_equals_local(loss):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arguments = logits()
    sharded = jax.shard_map(
        functools.partial(loss, axis_name="model"),
        mesh=mesh,
        in_specs=(P(None, "model"),) * 2,
        out_specs=P(),
    )
    assert_close(value_and_grads(sharded)(*arguments), value_and_grads(loss)(*arguments))


@every_loss
def test_data_parallel_under_pmap(loss):
    student, teacher = logits()

    def step(student, teacher):
        value, grad = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
        return jax.lax.psum(value, "data"), grad

    value, grad = jax.pmap(step, axis_name="data")(student[:, None], teacher[:, None])
    expected, expected_grad = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
    assert_close(value, np.full(8, expected))
    assert_close(grad[:, 0], expected_grad)
