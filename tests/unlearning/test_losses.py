"""Unlearning losses against float64 oracles, at gaps of 200, and from hidden states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from logitjax import losses, ops, unlearning
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


def softplus(x):
    return np.logaddexp(0, x)


def undial_oracle(z):
    target = REFERENCE.astype(np.float64) - 10.0 * (np.arange(VOCAB) == LABELS[..., None])
    return -(np.exp(log_softmax(target)) * log_softmax(z)).sum(-1)


# From negative log-likelihoods of eight answers.
SEQUENCE = {
    "npo": (
        lambda n: unlearning.npo(n, REFERENCE_NLL),
        lambda n: 2 / 0.1 * softplus(-0.1 * (n - REFERENCE_NLL)),
    ),
    "simnpo": (
        lambda n: unlearning.simnpo(n, LENGTHS, beta=2.5, delta=0.3),
        lambda n: 2 / 2.5 * softplus(-2.5 * (n / LENGTHS - 0.3)),
    ),
    "dpo_chosen": (
        lambda n: unlearning.dpo(n, OTHER_NLL, REFERENCE_NLL, OTHER_REFERENCE_NLL),
        lambda n: 20 * softplus(-0.1 * (OTHER_NLL - OTHER_REFERENCE_NLL - (n - REFERENCE_NLL))),
    ),
    "dpo_rejected": (
        lambda n: unlearning.dpo(OTHER_NLL, n, OTHER_REFERENCE_NLL, REFERENCE_NLL),
        lambda n: 20 * softplus(-0.1 * (n - REFERENCE_NLL - (OTHER_NLL - OTHER_REFERENCE_NLL))),
    ),
    "gradient_ascent": (unlearning.gradient_ascent, lambda n: -n),
}
# From logits.
TOKEN = {
    "uniform_kl": (
        unlearning.uniform_kl,
        lambda z: -log_softmax(z).mean(-1) - np.log(VOCAB),
    ),
    "undial": (lambda z: unlearning.undial(z, REFERENCE, LABELS), undial_oracle),
    "rmu": (
        lambda h: unlearning.rmu(h, REFERENCE[0, 0]),
        lambda h: np.square(h - REFERENCE[0, 0].astype(np.float64)).mean(-1),
    ),
}


def given(name):
    return np.abs(normal(3, 8, scale=20.0)) if name in SEQUENCE else normal(0, BATCH, TIME, VOCAB)


@functools.cache
def found():
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
    value, gradient = found()[name]
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle(x.astype(np.float64)), rtol=1e-6, atol=1e-6)
    expected = finite_differences(oracle, x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_satimp_holds_its_weight_constant_and_counts_a_token_that_is_nearly_certain():
    nll = np.r_[np.abs(normal(4, 8, scale=1.0)), np.float32([1e-8, np.inf])]
    value, gradient = values_and_gradient(unlearning.satimp)(nll, beta1=5.0, beta2=1.0)
    wide = nll[:9].astype(np.float64)
    weight = np.exp(-5 * wide) * -np.expm1(-wide)
    np.testing.assert_allclose(value, [*(-weight * wide), 0.0], rtol=2e-6)
    np.testing.assert_allclose(gradient[:9], -weight, rtol=2e-6)


def test_ce_u_has_the_gradient_that_is_published():
    def ce_u(z):
        return unlearning.undial(z, z, np.array([0, 0]), beta=jnp.inf)

    z = np.float32([[2.0, 1.0, 0.0], [200.0, 0.0, 0.0]])
    value, gradient = values_and_gradient(ce_u)(z)
    np.testing.assert_allclose(value, [1.67655, 200.0], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, [[0.66524, -0.48633, -0.17891], [1.0, -0.5, -0.5]], atol=1e-5
    )


def test_weighted_gradient_ascent_holds_its_weight_constant():
    nll = np.r_[np.abs(normal(4, 8, scale=1.0)), np.float32([np.inf, np.nan])]
    value, gradient = values_and_gradient(unlearning.gradient_ascent)(nll, beta=2.0)
    np.testing.assert_array_equal(value[8:], [0.0, np.nan])
    weight = np.exp(-2.0 * nll[:8].astype(np.float64))
    np.testing.assert_allclose(value[:8], -weight * nll[:8], rtol=1e-6)
    np.testing.assert_allclose(gradient[:8], -weight, rtol=1e-6)


def all_losses(z: jax.Array, reference: jax.Array) -> dict[str, jax.Array]:
    """Every loss that logits reach, the labels' masked ones included."""
    labels = LABELS.copy()
    labels[1, 2] = -100
    answer = labels >= 0
    nll = losses.cross_entropy(z, labels)
    reference_nll = losses.cross_entropy(reference, labels)
    n, lengths = unlearning.sequence_nll(nll, answer)
    n_ref, _ = unlearning.sequence_nll(reference_nll, answer)
    retain = losses.kl_divergence(z, reference)
    tokens = {
        "ga": unlearning.gradient_ascent(nll),
        "wga": unlearning.gradient_ascent(nll, beta=1.0),
        "undial": unlearning.undial(z, reference, labels),
    }
    out = {
        name: unlearning.unlearning_objective(x, forget_where=answer)[0]
        for name, x in tokens.items()
    }
    answers = {
        "npo": unlearning.npo(n, n_ref),
        "simnpo": unlearning.simnpo(n, lengths),
        "dpo": unlearning.dpo(n, n_ref, n_ref, n),
    }
    out |= {name: unlearning.unlearning_objective(x, retain)[0] for name, x in answers.items()}
    out["gd"], _ = unlearning.unlearning_objective(
        tokens["ga"], nll, forget_where=answer, retain_where=answer
    )
    uniform = unlearning.uniform_kl(z)
    out["assistant"], _ = unlearning.unlearning_objective(nll, uniform, forget_where=answer)
    return out


with_jacobian = jax.jit(lambda z, r: (all_losses(z, r), jax.jacrev(all_losses)(z, r)))


@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_finite_at_gaps_of_200(gap):
    z = normal(5, BATCH, TIME, VOCAB)
    z[..., 3] += gap
    for args in ((z, REFERENCE), (REFERENCE, z)):
        for name, x in jax.tree.leaves_with_path(with_jacobian(*args)):
            assert np.isfinite(x).all(), (name, gap)


def test_the_released_uniform_loss_fails_where_ours_does_not():
    z = np.float32([120.0, 0.0, 0.0])
    released = jax.jit(lambda z: -jnp.log(jax.nn.softmax(z)).mean() - jnp.log(3.0))(z)
    assert not np.isfinite(released)
    uniform = compiled(unlearning.uniform_kl)(z)
    np.testing.assert_allclose(uniform, 80 - np.log(3), rtol=1e-6)


def test_objectives_weigh_means_of_what_counts():
    nll = np.float32([[1.0, 2.0], [3.0, np.nan]])
    where = np.isfinite(nll)
    loss, means = compiled(unlearning.unlearning_objective)(
        -nll, nll[0], forget_weight=0.5, retain_weight=4.0, forget_where=where
    )
    np.testing.assert_allclose(loss, -0.5 * 2.0 + 4.0 * 1.5, rtol=1e-6)
    np.testing.assert_allclose([means["forget"], means["retain"]], [-2.0, 1.5], rtol=1e-6)


def head_and_bias(dtype=np.float32):
    head = normal(6, VOCAB + 4, HIDDEN, scale=1.0)
    bias = np.r_[normal(7, VOCAB), np.full(4, -np.inf)].astype(np.float32)
    return head.astype(dtype), bias


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("masked_by", ["where", "bias"])
def test_blocked_forms_equal_dense_ones(masked_by, soft_cap):
    hidden, other = (normal(seed, BATCH, TIME, HIDDEN, scale=1.0) for seed in (8, 9))
    head, bias = head_and_bias()
    where = None
    if masked_by == "where":
        where, bias = np.isfinite(bias), np.where(np.isfinite(bias), bias, 3.0)

    def dense(hidden, head):
        z, reference = (x @ head.T + bias for x in (hidden, other))
        if soft_cap is not None:
            z, reference = (ops.soft_cap(x, soft_cap) for x in (z, reference))
        uniform = unlearning.uniform_kl(z, vocab_where=where)
        return uniform + unlearning.undial(z, reference, LABELS, vocab_where=where)

    def blocked(hidden, head):
        options = {"vocab_where": where, "blocks": losses.Blocks(vocab=8)}
        whole = losses.Head(head, bias, soft_cap=soft_cap)
        uniform = unlearning.linear_uniform_kl(hidden, whole, **options)
        reference = (other, jax.lax.stop_gradient(whole), LABELS)
        return uniform + unlearning.linear_undial(hidden, whole, *reference, **options)

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
    dense = compiled(unlearning.undial)(hidden @ head.T, other @ head.T, labels)
    value = compiled(unlearning.linear_undial)(
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
        return unlearning.unlearning_objective(
            losses.cross_entropy(z[:BATCH], labels[:BATCH]),
            unlearning.uniform_kl(z[BATCH:]),
            retain_weight=6.5,
            forget_where=where[:BATCH],
            retain_where=where[BATCH:],
        )

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
        z, reference = hidden @ head, other @ head
        return jnp.stack(
            [
                unlearning.uniform_kl(z, axis_name=axis_name),
                unlearning.undial(z, reference, LABELS, axis_name=axis_name),
                unlearning.linear_uniform_kl(hidden, head, axis_name=axis_name),
                unlearning.linear_undial(hidden, head, other, head, LABELS, axis_name=axis_name),
            ]
        )

    split = jax.jit(
        jax.shard_map(
            functools.partial(total, axis_name="vocab"),
            mesh=mesh,
            in_specs=P(None, "vocab"),
            out_specs=P(),
        )
    )
    values = np.asarray(split(head))
    np.testing.assert_allclose(values, jax.jit(total)(head), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values[:2], values[2:], rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named():
    n = np.zeros(2, np.float32)
    with pytest.raises(Exception, match="reference_nll"):
        unlearning.npo(n, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="beta"):
        unlearning.npo(n, n, beta=0.0)
    with pytest.raises(Exception, match="lengths"):
        unlearning.simnpo(n, n)
    with pytest.raises(ValueError, match="target"):
        unlearning.rmu(np.zeros((2, 3), np.float32), np.zeros(2, np.float32))


@pytest.mark.parametrize("scale", [0.3, 0.02])
def test_the_gradient_of_silence_is_exact_to_bfloat16_where_its_two_parts_cancel(scale):
    # Near the optimum every probability is almost 1/V, which used to be subtracted when rounded.
    positions, hidden_size, vocab = 64, 32, 256
    hidden = normal(0, positions, hidden_size, scale=1.0).astype(jnp.bfloat16)
    kernel = normal(1, hidden_size, vocab, scale=scale).astype(jnp.bfloat16)
    h, k = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    apart = (np.exp(log_softmax(h @ k)) - 1 / vocab) / positions
    exact = h.T @ apart

    def alone(kernel):
        return unlearning.linear_uniform_kl(hidden, kernel).mean()

    def of_assistant(kernel):
        retain, labels = np.ones(positions, bool), np.zeros(positions, np.int32)
        options = {"retain_weight": 1.0}
        return linear_assistant_objective(hidden, kernel, labels, retain, **options)[0]

    for loss in (alone, of_assistant):
        gradient = np.asarray(jax.jit(jax.grad(loss))(kernel), np.float64)
        assert np.linalg.norm(gradient - exact) < 0.005 * np.linalg.norm(exact)


def test_without_a_weight_ascent_has_no_end():
    nll = np.float32([2.0, np.inf])
    np.testing.assert_array_equal(compiled(unlearning.gradient_ascent)(nll), [-2.0, -np.inf])
