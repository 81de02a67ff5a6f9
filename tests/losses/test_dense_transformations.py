"""What all dense losses have in common: they run under every transformation and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.distillation import universal_logit_distance
from logitjax.losses import (
    cross_entropy,
    generalized_jensen_shannon,
    kl_divergence,
    total_variation,
)

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


@functools.cache
def value_and_grads(loss):
    """Per-row values, and the gradients of a weighted sum of them."""

    def total(student, teacher):
        values = loss(student, teacher)
        weights = np.arange(1.0, 9.0, dtype=np.float32)
        return (values * weights).sum(), values

    run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    return lambda *arguments: run(*arguments)[::-1]


def assert_close(result, expected, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), result, expected)


@pytest.mark.many_programs("called eagerly, each operation is one")
@every_loss
def test_jit_and_vmap_equal_eager(loss):
    arguments = logits()
    eager = loss(*arguments)
    assert eager.dtype == jnp.float32
    assert eager.shape == (8,)
    assert_close(jax.jit(loss)(*arguments), eager)
    halves = [x.reshape(2, 4, VOCAB) for x in arguments]
    assert_close(np.reshape(jax.jit(jax.vmap(loss))(*halves), 8), eager)


@every_loss
def test_gradient_equals_finite_differences(loss):
    with jax.enable_x64(True):
        arguments = tuple(x[:2, :9] for x in logits(np.float64))
        # One program for both: `check_grads` runs each operation by itself.
        rng = np.random.default_rng(1)
        along = [rng.normal(size=x.shape) for x in arguments]
        weights = rng.normal(size=2)

        @jax.jit
        def value_and_slope(*arguments):
            values, pull = jax.vjp(loss, *arguments)
            gradients = pull(jnp.asarray(weights, values.dtype))
            slope = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
            return (values * weights).sum(), slope

        def moved(step):
            return [x + step * d for x, d in zip(arguments, along, strict=True)]

        _, slope = value_and_slope(*arguments)
        (up, _), (down, _) = (value_and_slope(*moved(step)) for step in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-5, atol=1e-5)


@every_loss
def test_bfloat16_is_the_float32_of_rounded_logits(loss):
    rounded = [x.astype(jnp.bfloat16) for x in logits()]
    result, (grad, _) = value_and_grads(loss)(*rounded)
    assert result.dtype == jnp.float32
    run = jax.jit(loss)
    assert_close(result, run(*(x.astype(np.float32) for x in rounded)))
    assert_close(result, run(*logits()), rtol=0.05, atol=0.02)
    assert grad.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(grad, np.float32)).all()


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
    run = jax.jit(jax.value_and_grad(lambda s: loss(s, teacher).sum()))
    expected, expected_grad = run(student)
    assert_close(value, np.full(8, expected))
    assert_close(np.asarray(grad)[:, 0], expected_grad)
