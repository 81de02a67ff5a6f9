"""Distillation losses of classifiers against float64 oracles, at extremes, and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import distillation
from tests._compiled import compiled, values_and_gradient
from tests._marks import EVERY_CHANGE

BATCH, CLASSES = 8, 16


def logits(seed: int, scale: float = 3.0, classes: int = CLASSES) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BATCH, classes), scale=scale)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def binary_kl_oracle(s: np.ndarray, t: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = s / tau, t / tau
    p, softplus = sigmoid(b), functools.partial(np.logaddexp, 0)
    value = tau**2 * (p * (softplus(-a) - softplus(-b)) + sigmoid(-b) * (softplus(a) - softplus(b)))
    return value.sum(-1), tau * (sigmoid(a) - p)


def binary_kl_norm_oracle(
    s: np.ndarray, t: np.ndarray, tau: float
) -> tuple[np.ndarray, np.ndarray]:
    x = (s - t) / (2 * tau)
    return (tau**2 * (np.logaddexp(x, -x) - np.log(2))).sum(-1), tau / 2 * np.tanh(x)


def kd_oracle(s: np.ndarray, t: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    log_q, log_p = log_softmax(s / tau), log_softmax(t / tau)
    p = np.exp(log_p)
    return tau**2 * (p * (log_p - log_q)).sum(-1), tau * (np.exp(log_q) - p)


ORACLES = [
    (distillation.binary_kl, binary_kl_oracle),
    (distillation.binary_kl_norm, binary_kl_norm_oracle),
    (distillation.knowledge_distillation, kd_oracle),
]


@pytest.mark.parametrize(("loss", "oracle"), ORACLES)
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_value_and_gradient_equal_float64_oracles(loss, oracle, tau):
    s, t = logits(0).astype(np.float32), logits(1).astype(np.float32)
    value, got = values_and_gradient(loss)(s, t, temperature=np.float32(tau))
    expected, gradient = oracle(s.astype(np.float64), t.astype(np.float64), tau)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(got, gradient, rtol=1e-6, atol=1e-6)


def test_decoupled_equals_the_released_form_in_float64():
    s, t = logits(2).astype(np.float32), logits(3).astype(np.float32)
    labels = np.arange(BATCH, dtype=np.int32) % CLASSES
    tau, alpha, beta = 4.0, 1.5, 6.0

    def released(s):
        s, teacher = s / tau, t.astype(np.float64) / tau
        hot = jax.nn.one_hot(labels, CLASSES, dtype=bool)
        q, p = jax.nn.softmax(s), jax.nn.softmax(teacher)

        def pair(x):
            return jnp.stack([(x * hot).sum(1), (x * ~hot).sum(1)], 1)

        target = (pair(p) * (jnp.log(pair(p)) - jnp.log(pair(q)))).sum(1)
        log_q, log_p = (jax.nn.log_softmax(x - 1000.0 * hot) for x in (s, teacher))
        others = (jnp.exp(log_p) * (log_p - log_q)).sum(1)
        return tau**2 * (alpha * target + beta * others)

    with jax.enable_x64(True):
        expected, gradient = values_and_gradient(released)(s.astype(np.float64))
        expected, gradient = np.asarray(expected), np.asarray(gradient)
    value, got = values_and_gradient(distillation.decoupled_knowledge_distillation)(
        s, t, labels, target_weight=alpha, other_weight=beta, temperature=tau
    )
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(got, gradient, rtol=1e-6, atol=2e-6)


def test_dist_equals_numpy_correlations():
    s, t = logits(4).astype(np.float32), logits(5).astype(np.float32)
    q, p = np.exp(log_softmax(s.astype(np.float64))), np.exp(log_softmax(t.astype(np.float64)))
    inter = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T)])
    dist = compiled(distillation.dist)
    value = dist(s, t, inter_weight=2.0, intra_weight=3.0)
    np.testing.assert_allclose(value, 2 * inter + 3 * intra, rtol=2e-5)
    padded = dist(
        np.concatenate([s, s[:2]]),
        np.concatenate([t, 7 + t[:2] ** 2]),
        inter_weight=2.0,
        intra_weight=3.0,
        where=np.arange(BATCH + 2) < BATCH,
    )
    np.testing.assert_allclose(np.asarray(padded)[:BATCH], value, rtol=1e-5)


def test_standardised_logits_equal_numpy_and_have_a_gradient_at_equal_logits():
    z = logits(6).astype(np.float32)
    wide = z.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / (wide.std(-1, ddof=1, keepdims=True) + 1e-7)
    values, flat = values_and_gradient(lambda z: distillation.standardize_logits(z) ** 3)(
        np.concatenate([z, np.ones((1, CLASSES), np.float32)])
    )
    np.testing.assert_allclose(np.cbrt(values)[:BATCH], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(flat).all()


@pytest.mark.parametrize("loss", [distillation.binary_kl, distillation.binary_kl_norm])
def test_finite_at_any_gap(loss):
    gaps = np.float32([-1e4, -1e3, -17.0, 0.0, 17.0, 1e3, 1e4])[:, None]
    run = values_and_gradient(loss)
    values, gradients = jax.device_get(run(gaps, np.zeros_like(gaps), temperature=1.0))
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()
    np.testing.assert_allclose(values[0], 5e3, rtol=1e-3)


def test_rows_and_teachers_without_classes_make_no_nan():
    s, t = logits(11).astype(np.float32), logits(12).astype(np.float32)
    s[0] = t[0] = s[1] = t[2] = -np.inf
    # The label's class alone, then another one alone.
    t[3, 1:] = t[4, :3] = t[4, 4:] = -np.inf
    labels = np.zeros(BATCH, np.int32)
    run = values_and_gradient(distillation.decoupled_knowledge_distillation)
    values, gradients = jax.device_get(run(s, t, labels))
    assert (values[[0, 2]] == 0).all()
    assert np.isposinf(values[1])
    assert np.isfinite(values[3:]).all()
    assert np.isfinite(gradients).all()
    values, gradients = jax.device_get(values_and_gradient(distillation.dist)(s, t))
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()


def test_the_released_float32_form_fails_where_ours_does_not():
    """Clamping a float32 sigmoid at 1 - 1e-8 clamps at 1: its log of the rest is -inf."""

    def released(student, teacher, temperature):
        tau = temperature
        q = jnp.clip(jax.nn.sigmoid(student / tau), 1e-8, 1 - 1e-8)
        p = jnp.clip(jax.nn.sigmoid(teacher / tau), 1e-8, 1 - 1e-8)
        return tau**2 * jnp.sum(p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q)), -1)

    def released_norm(student, teacher, temperature):
        return released(student - teacher, jnp.zeros_like(student), temperature)

    student, teacher = np.float32([36.0, 0.0]), np.zeros(2, np.float32)
    for broken, ours in (
        (released, distillation.binary_kl),
        (released_norm, distillation.binary_kl_norm),
    ):
        float32_form, ours = (
            functools.partial(values_and_gradient(f), temperature=2.0) for f in (broken, ours)
        )
        value, gradient = float32_form(student, teacher)
        assert not np.isfinite(value)
        assert not np.isfinite(gradient).all()
        value, gradient = ours(student, teacher)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        near = student / 8
        np.testing.assert_allclose(
            float32_form(near, teacher)[0], ours(near, teacher)[0], rtol=1e-5
        )


@given(st.floats(-50, 50), st.floats(0.5, 8))
def test_norm_is_the_divergence_from_one_half(gap, tau):
    gap, tau = np.float32(gap), np.float32(tau)
    norm = compiled(distillation.binary_kl_norm)
    value = norm(gap[None], np.zeros(1, np.float32), temperature=tau)
    gap, tau = np.float64(gap), np.float64(tau)
    q, other = sigmoid(gap / tau), sigmoid(-gap / tau)
    expected = tau**2 * -0.5 * (np.log(2 * q) + np.log(2 * other))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)


def all_losses(s, t, labels, where=None, axis_name=None):
    options = {"vocab_where": where, "axis_name": axis_name}
    standard = [distillation.standardize_logits(x, **options) for x in (s, t)]
    return jnp.stack(
        [
            distillation.binary_kl(s, t, **options),
            distillation.binary_kl(s, t, reduction="mean", **options),
            distillation.binary_kl_norm(s, t, **options),
            distillation.binary_kl_norm(s, t, reduction="mean", **options),
            distillation.knowledge_distillation(s, t, **options),
            distillation.knowledge_distillation(*standard, temperature=2.0, **options),
            distillation.decoupled_knowledge_distillation(s, t, labels, **options),
        ]
    )


loss_values = jax.jit(all_losses)


@jax.jit
def with_gradient(s, t, labels, where=None):
    return jax.value_and_grad(
        lambda s, t: (lambda x: (x.sum(), x))(all_losses(s, t, labels, where)),
        argnums=(0, 1),
        has_aux=True,
    )(s, t)


def test_classes_that_a_mask_leaves_out_change_nothing():
    s, t = logits(7).astype(np.float32), logits(8).astype(np.float32)
    labels = np.arange(BATCH)
    (_, values), (gradient, teacher_gradient) = jax.device_get(with_gradient(s, t, labels))
    assert not np.any(teacher_gradient)
    where = np.arange(CLASSES + 4) < CLASSES
    wide = [np.pad(x, ((0, 0), (0, 4)), constant_values=5) for x in (s, t)]
    (_, masked), (masked_gradient, _) = jax.device_get(with_gradient(*wide, labels, where[None, :]))
    np.testing.assert_allclose(masked, values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked_gradient[:, :CLASSES], gradient, rtol=1e-4, atol=1e-5)
    assert not np.any(masked_gradient[:, CLASSES:])


def test_split_vocabulary_equals_whole():
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    s, t = logits(9).astype(np.float32), logits(10).astype(np.float32)
    labels = np.arange(BATCH) * 2
    split = jax.jit(
        jax.shard_map(
            lambda s, t: all_losses(s, t, labels, axis_name="classes"),
            mesh=mesh,
            in_specs=(P(None, "classes"), P(None, "classes")),
            out_specs=P(),
        )
    )
    np.testing.assert_allclose(split(s, t), loss_values(s, t, labels), rtol=1e-5, atol=1e-5)


@jax.jit
@jax.value_and_grad
def total(s, t, labels):
    return all_losses(s, t, labels).sum() + distillation.dist(s, t).sum()


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=EVERY_CHANGE)]
)
def test_batch_split_over_devices(kind):
    s, t = logits(11).astype(np.float32), logits(12).astype(np.float32)
    labels = np.arange(BATCH)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    expected = total(s, t, labels)
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (s, t, labels)]
        value, gradient = total(*args)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_named():
    s = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="teacher_logits"):
        distillation.binary_kl(s, np.zeros((2, 4), np.float32))
    with pytest.raises(Exception, match="reduction"):  # or the type checker's, where it is on
        distillation.binary_kl_norm(s, s, reduction="max")
    with pytest.raises(ValueError, match="temperature"):
        distillation.knowledge_distillation(s, s, temperature=0.0)
