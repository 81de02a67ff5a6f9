"""Losses on a student's own samples: what TRL defines, what the gradients are in expectation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import losses
from logitjax.distillation import ChunkScores, Objective, Teacher, TokenSet, Vocabularies
from logitjax.distillation.terms import (
    SFT,
    TERMS,
    ChunkReward,
    MixedKL,
    ReverseKL,
    SampledKL,
    SkewKL,
)
from logitjax.losses.sweep._mixture import MixtureStatistic
from logitjax.ops import TopK

# The worked example: teacher and student, and the logits of more of them.
P, Q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
RNG = np.random.default_rng(0)
LOGITS = np.concatenate([np.log([[Q]]), RNG.normal(size=(1, 5, 3))], 1).astype(np.float32)
TEACHER = np.concatenate([np.log([[P]]), RNG.normal(size=(1, 5, 3))], 1).astype(np.float32)
HEAD = losses.Head(np.eye(3, dtype=np.float32), vocab_axis=1)
LIVE = Teacher(hidden=TEACHER, head=HEAD)


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def trl(log_p, log_q, beta):
    """The generalised divergence of TRL's GKD, in float64: beta is the teacher's share."""
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def skewed(log_p, log_q, alpha):
    return kl(log_p, np.logaddexp(np.log(alpha) + log_p, np.log1p(-alpha) + log_q))


def gated(log_p, log_q, tau):
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    return 0.5 * kl(log_q, log_p) + 0.5 * np.where(entropy > tau, kl(log_p, log_q), 0)


# Flag: the formula of log p and log q, and what the example gives.
EXACT = {
    "full_kl": (kl, 0.08512),
    "full_kl(forward=0)": (lambda p, q: kl(q, p), 0.09203),
    "mixed_kl(forward=0.3)": (
        lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p),
        0.3 * 0.08512 + 0.06442,
    ),
    "mixed_kl(entropy_above=0.8)": (lambda p, q: gated(p, q, 0.8), 0.17715 / 2),
    "mixed_kl(entropy_above=0.81)": (lambda p, q: gated(p, q, 0.81), 0.09203 / 2),
    "full_jsd(beta=0)": (lambda p, q: trl(p, q, 0), 0.08512),
    "full_jsd(beta=0.1)": (lambda p, q: trl(p, q, 0.1), 0.00769),
    "full_jsd": (lambda p, q: trl(p, q, 0.5), 0.02190),
    "full_jsd(beta=0.9)": (lambda p, q: trl(p, q, 0.9), 0.00818),
    "full_jsd(beta=1)": (lambda p, q: trl(p, q, 1), 0.09203),
    "full_jsd(beta=0.1,normalize=True)": (lambda p, q: trl(p, q, 0.1) / 0.09, 0.08550),
    "full_jsd(normalize=True)": (lambda p, q: trl(p, q, 0.5) / 0.25, 0.08760),
    "full_jsd(beta=0.9,normalize=True)": (lambda p, q: trl(p, q, 0.9) / 0.09, 0.09094),
    "skew_kl": (lambda p, q: skewed(p, q, 0.1), 0.06958),
    "skew_kl(direction=reverse)": (lambda p, q: skewed(q, p, 0.1), 0.07283),
}


def value_of(term, logits, labels, teacher=LIVE, **columns):
    objective = Objective(terms=((term, 1.0),))
    batch = {"labels": labels} | columns
    return objective.value(logits, HEAD, batch, [teacher], where=np.ones(labels.shape, bool))[0]


def test_whole_divergences_equal_trl_and_the_example_value_and_gradient():
    labels, rows = np.zeros((1, 6), np.int32), np.arange(6)

    @jax.jit
    def run(logits):
        def row(logits, row, name):
            teacher = dataclasses.replace(LIVE, hidden=jnp.asarray(TEACHER)[:, row][:, None])
            return value_of(TERMS.parse(name), logits[None, None], labels[:, :1], teacher)

        divergences = {
            name: jax.vmap(jax.value_and_grad(row), (0, 0, None))(logits, rows, name)
            for name in EXACT
        }
        top = TopK.of(jnp.asarray(TEACHER[0, 0]), 1)
        buckets = [
            losses.sparse_kl_divergence(logits[0], top, direction=direction)
            for direction in ("forward", "reverse")
        ]
        return divergences, buckets

    divergences, buckets = jax.device_get(run(LOGITS[0]))
    # What docs/distil.md says of one bucket.
    np.testing.assert_allclose(buckets, [0.08228, 0.08718], atol=1e-5)
    for name, (value, gradient) in divergences.items():
        formula, by_hand = EXACT[name]

        def exact(logits, formula=formula):
            return formula(log_softmax(TEACHER[0]), log_softmax(logits))

        step = 1e-5 * np.eye(3)
        slope = np.stack([exact(LOGITS[0] + e) - exact(LOGITS[0] - e) for e in step], -1) / 2e-5
        np.testing.assert_allclose(value, exact(LOGITS[0]), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(value[0], by_hand, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(gradient, slope, atol=1e-5, err_msg=name)


def test_a_column_that_neither_model_has_adds_nothing_to_a_skewed_divergence():
    statistic = MixtureStatistic(beta=0.1, weights=(1.0, 0.0))
    rows = np.log(np.float32([[0.25, 0.75], [0.5, 0.5]]))
    padded = np.pad(rows, ((0, 0), (0, 1)), constant_values=-np.inf)
    value, slope = jax.jit(statistic._terms)(*padded)
    q, p = np.exp(rows)
    mixture = 0.1 * p + 0.9 * q
    np.testing.assert_allclose(value, [*(p * np.log(p / mixture)), 0], rtol=1e-5)
    np.testing.assert_allclose(slope, [*(-0.9 * p * q / mixture), 0], rtol=1e-5)


def sampled(term, log_probs, teacher=LIVE):
    """Value and gradient of each label's position, where all stand at the example's."""
    labels = np.arange(3)[None]
    teacher = dataclasses.replace(LIVE, hidden=np.tile(TEACHER[:, :1], (1, 3, 1)))

    def total(logits):
        return value_of(term, logits, labels, teacher, log_probs=log_probs)

    return jax.value_and_grad(total)(jnp.tile(LOGITS[:, :1], (1, 3, 1)))


def test_gradients_at_samples_are_that_of_the_reverse_kl_in_expectation():
    """By all tokens, each as often as the law draws it: the student's own, or an older one's."""
    older = np.array([0.4, 0.4, 0.2])

    @jax.jit
    def run():
        terms = {"policy": SampledKL(), "k2": SampledKL(kind="k2")}
        laws = {"fresh": Q, "stale": older}
        return {
            (name, law): sampled(term, np.log(laws[law], dtype=np.float32)[None])
            for name, term in terms.items()
            for law in laws
        }

    exact = Q * (np.log(Q / P) - kl(np.log(Q), np.log(P)))
    for (name, law), (value, gradient) in jax.device_get(run()).items():
        weights = Q if law == "fresh" else older
        np.testing.assert_allclose(weights @ gradient[0], exact, atol=1e-6, err_msg=f"{name} {law}")
        if name == "policy":
            np.testing.assert_allclose(value / 3, 0.09203, atol=1e-5)
        if law == "fresh":
            # The trace of the covariance: what the exact baseline is for.
            spread = weights @ (gradient[0] ** 2).sum(-1) - (exact**2).sum()
            np.testing.assert_allclose(spread, {"policy": 0.0595, "k2": 0.0850}[name], atol=1e-4)


def test_ratios_of_stale_samples_are_clipped_and_what_was_not_sampled_is_not_seen():
    log_probs = np.log([[1e-3, 0.3, np.nan]]).astype(np.float32)
    (value, gradient), (_, fresh) = jax.jit(
        lambda: [sampled(SampledKL(), x) for x in (log_probs, np.log(Q)[None])]
    )()
    # Two of three labels count, each for one and a half.
    np.testing.assert_allclose(gradient[0, 0], 1.5 * 2 * fresh[0, 0], rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 1], 1.5 * fresh[0, 1], rtol=1e-5)
    assert np.isfinite(value)
    assert not gradient[0, 2].any()
    with pytest.raises(ValueError, match="clip: expected bounds below and above 1, got"):
        SampledKL(clip=(1.5, 2.0))


def test_estimates_with_a_wrong_gradient_are_reported_and_not_trained_on():
    for kind in ("k1", "k3"):
        with pytest.raises(
            ValueError, match=rf"kind='{kind}'.*expected weight 0, which reports it"
        ):
            Objective(terms=((SampledKL(kind=kind), 1.0),))
    with pytest.raises(ValueError, match="loss: expected a weight above 0, got none"):
        Objective(terms=((SampledKL(kind="k1"), 0.0),))
    reported = tuple((SampledKL(kind=kind), 0.0) for kind in ("k1", "k3"))
    # The teacher lacks the last token: what is reported is infinite.
    head = dataclasses.replace(HEAD, bias=np.float32([0, 0, -np.inf]))
    teacher = Teacher(hidden=np.tile(TEACHER[:, :1], (1, 3, 1)), head=head)
    labels = np.arange(3)[None]

    @jax.jit
    def run(logits):
        def total(logits, terms):
            batch = {"labels": labels, "log_probs": np.log(Q)[None]}
            objective = Objective(terms=terms)
            total, _, metrics = objective.value(
                logits, HEAD, batch, [teacher], where=np.ones((1, 3), bool)
            )
            return total, metrics

        alone = jax.value_and_grad(total, has_aux=True)(logits, ((SFT(), 1.0),))
        return alone, jax.value_and_grad(total, has_aux=True)(logits, ((SFT(), 1.0), *reported))

    (_, plain), ((_, metrics), gradient) = run(jnp.tile(LOGITS[:, :1], (1, 3, 1)))
    np.testing.assert_allclose(gradient, plain, atol=1e-7)
    assert np.isposinf(metrics["sampled_kl(kind='k1')"][0])
    assert np.isposinf(metrics["sampled_kl(kind='k3')"][0])


def test_a_discount_of_one_gives_the_policy_gradient_of_whole_samples():
    """By all samples of two tokens: the second token's law follows from the first."""
    first, second = LOGITS[0, :1], LOGITS[0, 1:4]
    one, two = np.arange(9) // 3, np.arange(9) % 3
    # A third label is text: nothing behind the samples is theirs.
    labels = np.stack([one, two, two], 1)
    teachers = np.stack([TEACHER[0, 0 * one], TEACHER[0, 1 + one], TEACHER[0, 0 * one]], 1)
    law = [np.exp(log_softmax(first))[0], np.exp(log_softmax(second))]
    log_probs = np.log([law[0][one], law[1][one, two], np.full(9, np.nan)]).T.astype(np.float32)

    @jax.jit
    def run():
        def total(logits, term):
            teacher = dataclasses.replace(LIVE, hidden=teachers)
            return value_of(term, logits, labels, teacher, log_probs=log_probs)

        logits = jnp.stack([first[0 * one], second[one], first[0 * one]], 1)
        return [jax.grad(total)(logits, term) for term in (SampledKL(discount=1.0), SampledKL())]

    whole, plain = jax.device_get(run())
    weights = law[0][one] * law[1][one, two]

    def exact(first, second):
        q = np.exp(log_softmax(first))
        later = kl(log_softmax(second), log_softmax(TEACHER[0, 1:4]))
        return kl(log_softmax(first), log_softmax(TEACHER[0, 0])) + q @ later

    steps = 1e-5 * np.eye(3)
    slope = [(exact(first[0] + e, second) - exact(first[0] - e, second)) / 2e-5 for e in steps]
    # Two of three labels of a row count, each for one and a half.
    np.testing.assert_allclose(weights @ whole[:, 0], 1.5 * np.array(slope), atol=1e-5)
    np.testing.assert_allclose(whole[:, 1:], plain[:, 1:], atol=1e-6)
    with pytest.raises(ValueError, match=r"discount: expected a number from 0 to 0, got 0\.5"):
        SampledKL(kind="k2", discount=0.5)


def test_distillm2_splits_its_skew_by_who_wrote_a_row_and_keeps_its_mixture():
    logits, teacher = (np.reshape(array[0], (2, 3, 3)) for array in (LOGITS, TEACHER))
    log_q, log_p = log_softmax(logits), log_softmax(teacher)
    log_probs = np.float32([[np.nan] * 3, [-1.0] * 3])
    split = (
        (SkewKL(rows="text"), 1.5),
        (SkewKL(direction="reverse", rows="own", fixed_mixture=True), 0.5),
    )

    @jax.jit
    @jax.value_and_grad
    def run(logits):
        batch = {"labels": np.zeros((2, 3), np.int32), "log_probs": log_probs}
        teachers = [dataclasses.replace(LIVE, hidden=teacher)]
        where = np.ones((2, 3), bool)
        return Objective(terms=split).value(logits, HEAD, batch, teachers, where=where)[0]

    value, gradient = run(jnp.asarray(logits))
    of_text, of_sample = skewed(log_p[0], log_q[0], 0.1), skewed(log_q[1], log_p[1], 0.1)
    # Each is a mean over its own half of six labels.
    np.testing.assert_allclose(value, 2 * (1.5 * of_text.sum() + 0.5 * of_sample.sum()), rtol=1e-5)
    log_m = np.logaddexp(np.log(0.1) + log_q[1], np.log(0.9) + log_p[1])
    q, gap = np.exp(log_q[1]), log_q[1] - log_m
    constant = q * (gap - (q * gap).sum(-1, keepdims=True))
    np.testing.assert_allclose(gradient[1], constant, atol=1e-5)
    slopes = [
        skewed(log_p[0], log_softmax(logits[0] + e), 0.1)
        - skewed(log_p[0], log_softmax(logits[0] - e), 0.1)
        for e in 1e-5 * np.eye(3)
    ]
    np.testing.assert_allclose(gradient[0], 3 * np.stack(slopes, -1) / 2e-5, atol=1e-5)
    with pytest.raises(ValueError, match="fixed_mixture: expected False for the forward"):
        SkewKL(fixed_mixture=True)


def test_the_forward_part_counts_above_a_quantile_of_a_rows_entropies():
    where = np.array([[True] * 5 + [False]])
    log_p, log_q = log_softmax(TEACHER), log_softmax(LOGITS)
    entropy = -(np.exp(log_p) * log_p).sum(-1)[0]
    gate = entropy > np.quantile(entropy[:5], 0.6)
    # What does not count may be anything.
    hidden = np.where(where[..., None], TEACHER, np.nan)

    @jax.jit
    @jax.value_and_grad
    def run(logits):
        objective = Objective(terms=((MixedKL(entropy_quantile=0.6), 1.0),))
        batch, teachers = (
            {"labels": np.zeros((1, 6), np.int32)},
            [Teacher(hidden=hidden, head=HEAD)],
        )
        return objective.value(logits, HEAD, batch, teachers, where=where)[0]

    value, gradient = run(jnp.asarray(LOGITS))
    exact = 0.5 * kl(log_q, log_p) + 0.5 * np.where(gate, kl(log_p, log_q), 0)
    assert gate[:5].sum() == 2
    np.testing.assert_allclose(value, exact[where].sum(), rtol=1e-5)
    q, p = np.exp(log_q), np.exp(log_p)
    slope = 0.5 * q * (log_q - log_p - kl(log_q, log_p)[..., None]) + 0.5 * gate[:, None] * (q - p)
    np.testing.assert_allclose(gradient[where], slope[where], atol=1e-5)


def test_a_chunk_rewards_its_tokens_by_what_the_teacher_finds_likelier():
    labels = np.array([[0, 1, 2, 0, 1]])
    chunks = ChunkScores(
        ids=np.array([[0, 0, 1, -1, 1]]),
        ends=np.array([[-1, 3, -1, -1, -1]]),
        scores=np.float32([[-2.0, -1.0, 0, 0, 0]]),
        where=np.array([[True, True, False, False, False]]),
    )
    words = np.array([False, True, True])
    vocabularies = Vocabularies(boundary=TokenSet(words))
    teacher = Teacher(chunks=chunks, vocabularies=vocabularies)
    log_q = log_softmax(LOGITS[0, 1:])
    at_label = np.take_along_axis(log_q, labels[0][:, None], -1)[:, 0]
    boundary = np.log(np.exp(log_q[3, words]).sum())
    lacks = np.array([at_label[:2].sum() + 2.0, at_label[[2, 4]].sum() + boundary + 1.0])

    def total(logits):
        columns = {"log_probs": at_label[None].astype(np.float32)}
        return value_of(ChunkReward(), logits, labels, teacher, **columns) / 5

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(LOGITS[:, 1:]))
    each = lacks[[0, 0, 1, 0, 1]] * np.array([1, 1, 1, 0, 1])
    np.testing.assert_allclose(value, each.sum() / 4, rtol=1e-5)
    slope = np.eye(3)[labels[0]] - np.exp(log_q)
    np.testing.assert_allclose(gradient[0], each[:, None] * slope / 4, atol=1e-6)


def test_draws_of_the_students_own_tail_reach_the_cached_reverse_kl():
    """A teacher that was asked at the student's own top tokens, and at draws of the student's."""
    teacher, logits = RNG.normal(size=(2, 1, 2, 9)).astype(np.float32)
    head = losses.Head(np.eye(9, dtype=np.float32), vocab_axis=1)

    @jax.jit
    def run(key):
        support = jax.lax.top_k(logits, 3)[1]
        drawn = losses.TailSample.draw(key, logits, support, 20_000)
        at = jnp.concatenate([support, drawn.indices], -1)
        values = jnp.take_along_axis(jnp.asarray(teacher), at, -1)
        tail = dataclasses.replace(drawn, values=values[..., 3:])
        statistics = losses.GraphStatistics(
            values=values[..., :3],
            indices=support,
            log_z=jax.nn.logsumexp(teacher, -1),
            mean=None,
            std=None,
            vocab_size=9,
            tail=tail,
        )
        objective = Objective(terms=((ReverseKL(), 1.0),))
        return objective.value(
            logits,
            head,
            {"labels": np.zeros((1, 2), np.int32)},
            [Teacher(statistics=statistics)],
            where=np.ones((1, 2), bool),
        )[0]

    exact = kl(log_softmax(logits), log_softmax(teacher)).sum()
    np.testing.assert_allclose(run(jax.random.key(0)), exact, rtol=0.02)
