"""Unlearning losses against float64 oracles, at gaps of 200, and from hidden states."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from logitjax import losses, ops
from logitjax.unlearning import METHODS
from logitjax.unlearning.assistant._objective import linear_assistant_objective
from tests._compiled import compiled, values_and_gradient

BATCH, TIME, HIDDEN, VOCAB = 2, 3, 5, 16


def normal(seed: int, *shape: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def finite_differences(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient of the summed float64 oracle."""
    x = x.astype(np.float64)
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (function(up).sum() - function(down).sum()) / (2 * step)
    return out


LABELS = np.array([[3, 0, 15], [7, 7, 1]])
REFERENCE = normal(1, BATCH, TIME, VOCAB)
REFERENCE_NLL, OTHER_NLL, OTHER_REFERENCE_NLL = np.abs(normal(2, 3, 8, scale=20.0))
LENGTHS = np.arange(1, 9)


def uniform_kl(z):
    """Divergence from the uniform distribution, from logits."""
    exists = z != -jnp.inf
    total = jnp.where(exists, z, 0.0).sum(-1)
    return ops.logsumexp(z) - total / exists.sum(-1) - jnp.log(exists.sum(-1))


def undial(z, reference, labels, beta=10.0):
    """UNDIAL from logits."""
    lowered = jnp.where(jnp.arange(z.shape[-1]) == labels[..., None], beta, 0.0)
    target = jax.lax.stop_gradient(reference - lowered)
    log_t = jax.nn.log_softmax(target)
    t = jnp.exp(log_t)
    entropy = -jnp.where(t > 0, t * log_t, 0.0).sum(-1)
    loss = losses.kl_divergence(z, target) + entropy
    return jnp.where((labels >= 0) & (labels < z.shape[-1]), loss, jnp.nan)


def identity(size):
    """A head whose hidden states are logits."""
    return losses.Head(jnp.eye(size), vocab_axis=0)


def values_of(text):
    """The losses of a method, on arrays."""
    return METHODS.parse(text).values


def softplus(x):
    return np.logaddexp(0, x)


def undial_oracle(z):
    target = REFERENCE.astype(np.float64) - 10.0 * (np.arange(VOCAB) == LABELS[..., None])
    return -(np.exp(log_softmax(target)) * log_softmax(z)).sum(-1)


# From negative log-likelihoods of eight answers.
SEQUENCE = {
    "npo": (
        lambda n: values_of("npo")(n, REFERENCE_NLL),
        lambda n: 2 / 0.1 * softplus(-0.1 * (n - REFERENCE_NLL)),
    ),
    "simnpo": (
        lambda n: values_of("simnpo(beta=2.5, delta=0.3)")(n, LENGTHS),
        lambda n: 2 / 2.5 * softplus(-2.5 * (n / LENGTHS - 0.3)),
    ),
    "dpo_chosen": (
        lambda n: values_of("idk_dpo")(n, OTHER_NLL, REFERENCE_NLL, OTHER_REFERENCE_NLL),
        lambda n: 20 * softplus(-0.1 * (OTHER_NLL - OTHER_REFERENCE_NLL - (n - REFERENCE_NLL))),
    ),
    "dpo_rejected": (
        lambda n: values_of("idk_dpo")(OTHER_NLL, n, OTHER_REFERENCE_NLL, REFERENCE_NLL),
        lambda n: 20 * softplus(-0.1 * (n - REFERENCE_NLL - (OTHER_NLL - OTHER_REFERENCE_NLL))),
    ),
    "gradient_ascent": (values_of("gradient_ascent"), lambda n: -n),
}
# From logits.
TOKEN = {
    "undial": (
        lambda z: values_of("undial")(z, identity(VOCAB), REFERENCE, identity(VOCAB), LABELS),
        undial_oracle,
    ),
    "rmu": (
        lambda h: values_of("rmu")(h, REFERENCE[0, 0]),
        lambda h: np.square(h - REFERENCE[0, 0].astype(np.float64)).mean(-1),
    ),
}


def given(name):
    return np.abs(normal(3, 8, scale=20.0)) if name in SEQUENCE else normal(0, BATCH, TIME, VOCAB)


@functools.cache
def gradient_of():
    """Values and gradients of each loss, in one program."""

    @jax.jit
    def run(given):
        losses = (SEQUENCE | TOKEN).items()
        return {name: values_and_gradient(loss)(given[name]) for name, (loss, _) in losses}

    return run({name: given(name) for name in SEQUENCE | TOKEN})


@pytest.mark.parametrize("name", [*SEQUENCE, *TOKEN])
def test_value_and_gradient_equal_float64_oracles(name):
    _, oracle = (SEQUENCE | TOKEN)[name]
    x = given(name)
    value, gradient = gradient_of()[name]
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle(x.astype(np.float64)), rtol=1e-6, atol=1e-6)
    expected = finite_differences(oracle, x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_satimp_holds_its_weight_constant_and_counts_a_token_that_is_nearly_certain():
    nll = np.r_[np.abs(normal(4, 8, scale=1.0)), np.float32([1e-8, np.inf])]
    value, gradient = values_and_gradient(values_of("satimp"))(nll)
    wide = nll[:9].astype(np.float64)
    weight = np.exp(-5 * wide) * -np.expm1(-wide)
    np.testing.assert_allclose(value, [*(-weight * wide), 0.0], rtol=2e-6)
    np.testing.assert_allclose(gradient[:9], -weight, rtol=2e-6)


def test_ce_u_has_the_gradient_that_is_published():
    def ce_u(z):
        return values_of("undial(beta=inf)")(z, identity(3), z, identity(3), np.array([0, 0]))

    z = np.float32([[2.0, 1.0, 0.0], [200.0, 0.0, 0.0]])
    value, gradient = values_and_gradient(ce_u)(z)
    np.testing.assert_allclose(value, [1.67655, 200.0], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, [[0.66524, -0.48633, -0.17891], [1.0, -0.5, -0.5]], atol=1e-5
    )


def test_weighted_gradient_ascent_holds_its_weight_constant():
    nll = np.r_[np.abs(normal(4, 8, scale=1.0)), np.float32([np.inf, np.nan])]
    value, gradient = values_and_gradient(values_of("wga(beta=2)"))(nll)
    np.testing.assert_array_equal(value[8:], [0.0, np.nan])
    weight = np.exp(-2.0 * nll[:8].astype(np.float64))
    np.testing.assert_allclose(value[:8], -weight * nll[:8], rtol=1e-6)
    np.testing.assert_allclose(gradient[:8], -weight, rtol=1e-6)


def all_losses(z: jax.Array, reference: jax.Array) -> dict[str, jax.Array]:
    """Every loss that logits reach, the labels' masked ones included."""
    labels = LABELS.copy()
    labels[1, 2] = -100
    answer = labels >= 0
    nll, before = (losses.cross_entropy(x, labels) for x in (z, reference))
    n, n_ref = (jnp.where(answer, x, 0.0).sum(-1) for x in (nll, before))
    eye = identity(VOCAB)
    retain = jnp.broadcast_to(jnp.arange(BATCH)[:, None] > 0, labels.shape)
    tokens = {
        "ga": values_of("gradient_ascent")(nll),
        "wga": values_of("wga")(nll),
        "undial": values_of("undial")(z, eye, reference, eye, labels),
    }
    return {name: ops.masked_mean(x, answer) for name, x in tokens.items()} | {
        "npo": values_of("npo")(n, n_ref),
        "simnpo": values_of("simnpo")(n, answer.sum(-1)),
        "dpo": values_of("idk_dpo")(n, n_ref, n_ref, n),
        "assistant": linear_assistant_objective(z, eye, labels, retain, where=answer | retain)[0],
    }


with_jacobian = jax.jit(lambda z, r: (all_losses(z, r), jax.jacrev(all_losses)(z, r)))


@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_finite_at_gaps_of_200(gap):
    z = normal(5, BATCH, TIME, VOCAB)
    z[..., 3] += gap
    for args in ((z, REFERENCE), (REFERENCE, z)):
        for name, x in jax.tree.leaves_with_path(with_jacobian(*args)):
            assert np.isfinite(x).all(), (name, gap)


def test_the_released_uniform_loss_fails_where_ours_does_not():
    z = np.float32([[120.0, 0.0, 0.0]])
    released = jax.jit(lambda z: -jnp.log(jax.nn.softmax(z)).mean() - jnp.log(3.0))(z)
    assert not np.isfinite(released)
    retain, labels, eye = np.ones(1, bool), np.zeros(1, np.int32), identity(3)
    _, means = compiled(linear_assistant_objective)(z, eye, labels, retain)
    np.testing.assert_allclose(means["retain"], 80 - np.log(3), rtol=1e-6)


def head_and_bias(dtype=np.float32):
    head = normal(6, VOCAB + 4, HIDDEN, scale=1.0)
    bias = np.r_[normal(7, VOCAB), np.full(4, -np.inf)].astype(np.float32)
    return head.astype(dtype), bias


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("masked_by", ["where", "bias"])
def test_blocked_undial_equals_the_dense_one(masked_by, soft_cap):
    hidden, other = (normal(seed, BATCH, TIME, HIDDEN, scale=1.0) for seed in (8, 9))
    head, bias = head_and_bias()
    where = None
    if masked_by == "where":
        where, bias = np.isfinite(bias), np.where(np.isfinite(bias), bias, 3.0)

    def dense(hidden, head):
        z, reference = (x @ head.T + bias for x in (hidden, other))
        if soft_cap is not None:
            z, reference = (ops.soft_cap(x, soft_cap) for x in (z, reference))
        if where is not None:
            z, reference = (jnp.where(where, x, -jnp.inf) for x in (z, reference))
        return undial(z, reference, LABELS)

    def blocked(hidden, head):
        options = {"vocab_where": where, "blocks": losses.Blocks(vocab=8)}
        whole = losses.Head(head, bias, soft_cap=soft_cap)
        reference = (other, jax.lax.stop_gradient(whole), LABELS)
        return values_of("undial")(hidden, whole, *reference, **options)

    @jax.jit
    def both(*arrays):
        def total(function, *arrays):
            values = function(*arrays)
            return values.sum(), values

        steps = (functools.partial(total, function) for function in (dense, blocked))
        return [jax.grad(step, (0, 1), has_aux=True)(*arrays) for step in steps]

    (gradients, expected), (got, values) = both(hidden, head)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for a, b in zip(got, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weighted_undial_is_the_weighted_sum():
    hidden, other = (normal(seed, BATCH, TIME, HIDDEN, scale=1.0) for seed in (8, 9))
    head = normal(6, VOCAB, HIDDEN, scale=1.0)
    labels = np.where(LABELS == 15, -100, LABELS)
    weights = (labels >= 0) / 5.0
    dense = compiled(undial)(hidden @ head.T, other @ head.T, labels)
    value = compiled(values_of("undial"))(
        hidden, head, other, head, labels, weights=weights.astype(np.float32)
    )
    np.testing.assert_allclose(value, np.where(labels >= 0, dense, 0.0).sum() / 5, rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(dense), labels < 0)


@pytest.mark.parametrize(("clean", "soft_cap"), [(True, None), (False, None), (True, 2.0)])
def test_assistant_in_one_sweep_equals_its_two_halves(clean, soft_cap):
    hidden = normal(10, 2 * BATCH, TIME, HIDDEN, scale=1.0)
    head, bias = normal(11, HIDDEN, VOCAB, scale=1.0), normal(12, VOCAB)
    answer = np.arange(TIME) > 0
    labels = np.where(answer, np.r_[LABELS, LABELS], -100)
    retain = np.broadcast_to(np.arange(2 * BATCH)[:, None] >= BATCH, labels.shape)
    where = np.broadcast_to(answer | (retain & (not clean)), labels.shape)

    def dense(hidden, head):
        z = hidden @ head + bias
        if soft_cap is not None:
            z = soft_cap * jnp.tanh(z / soft_cap)
        nll = losses.cross_entropy(z[:BATCH], labels[:BATCH])
        means = {
            "forget": ops.masked_mean(nll, where[:BATCH]),
            "retain": ops.masked_mean(uniform_kl(z[BATCH:]), where[BATCH:]),
        }
        return means["forget"] + 6.5 * means["retain"], means

    def blocked(hidden, head):
        whole = losses.Head(head, bias, soft_cap=soft_cap)
        return linear_assistant_objective(
            hidden, whole, labels, retain, where=where, blocks=losses.Blocks(vocab=8)
        )

    steps = [jax.value_and_grad(f, (0, 1), has_aux=True) for f in (dense, blocked)]
    both = jax.jit(lambda *x: [step(*x) for step in steps])
    ((expected, means), gradients), ((value, got_means), got) = both(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got_means), jax.tree.leaves(means), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(got, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_split_vocabulary_equals_whole():
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AxisType.Auto,))
    hidden, other = (normal(seed, BATCH, TIME, HIDDEN, scale=1.0) for seed in (8, 9))
    head = normal(13, HIDDEN, VOCAB, scale=1.0)

    def total(head, axis_name=None):
        loss, means = linear_assistant_objective(
            hidden, head, LABELS, np.arange(BATCH)[:, None] > np.zeros(TIME), axis_name=axis_name
        )
        before = (other, head, LABELS)
        values = values_of("undial")(hidden, head, *before, axis_name=axis_name)
        return {"assistant": loss, "undial": values, **means}

    split = jax.jit(
        jax.shard_map(
            functools.partial(total, axis_name="vocab"),
            mesh=mesh,
            in_specs=P(None, "vocab"),
            out_specs=P(),
        )
    )
    whole = jax.jit(total)(head)
    chex.assert_trees_all_close(split(head), whole, rtol=1e-5, atol=1e-6)
    expected = jax.jit(undial)(hidden @ head, other @ head, LABELS)
    np.testing.assert_allclose(whole["undial"], expected, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named():
    n = np.zeros(2, np.float32)
    with pytest.raises(Exception, match="reference_nll"):
        values_of("npo")(n, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="beta"):
        values_of("npo(beta=0)")(n, n)
    with pytest.raises(Exception, match="lengths"):
        values_of("simnpo")(n, n)
    with pytest.raises(ValueError, match="target"):
        values_of("rmu")(np.zeros((2, 3), np.float32), np.zeros(2, np.float32))


@pytest.mark.parametrize("scale", [0.3, 0.02])
def test_the_gradient_of_silence_is_exact_to_bfloat16_where_its_two_parts_cancel(scale):
    # Near the optimum every probability is almost 1/V, which used to be subtracted when rounded.
    positions, hidden_size, vocab = 64, 32, 256
    hidden = normal(0, positions, hidden_size, scale=1.0).astype(jnp.bfloat16)
    kernel = normal(1, hidden_size, vocab, scale=scale).astype(jnp.bfloat16)
    h, k = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    apart = (np.exp(log_softmax(h @ k)) - 1 / vocab) / positions
    exact = h.T @ apart

    def of_assistant(kernel):
        retain, labels = np.ones(positions, bool), np.zeros(positions, np.int32)
        options = {"retain_weight": 1.0}
        return linear_assistant_objective(hidden, kernel, labels, retain, **options)[0]

    gradient = np.asarray(jax.jit(jax.grad(of_assistant))(kernel), np.float64)
    assert np.linalg.norm(gradient - exact) < 0.005 * np.linalg.norm(exact)


def test_without_a_weight_ascent_has_no_end():
    nll = np.float32([2.0, np.inf])
    np.testing.assert_array_equal(compiled(values_of("gradient_ascent"))(nll), [-2.0, -np.inf])
