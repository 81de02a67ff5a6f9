"""Dynamic fusion against oracles in float64, and what each search promises."""

import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from logitjax.fusion import DynamicFusion
from logitjax.fusion._dynamic import _visit_sum
from logitjax.fusion._path import Path
from logitjax.fusion._solve import Visit, find_root
from tests._marks import EVERY_CHANGE

BATCH, VOCAB = 24, 384
METHODS = ("grid", "jeffreys", "project")
# One of the methods: they differ in what they make equal.
FEWER = [pytest.param(m, marks=EVERY_CHANGE if m in METHODS[1:] else []) for m in METHODS]


def language_like(rng, batch=BATCH, vocab=VOCAB, boost=6.0):
    """Heavy-tailed logits of a large model, an expert and its base, which agree on the whole."""
    common = rng.permuted(np.tile(-1.2 * np.log(np.arange(1, vocab + 1)), (batch, 1)), axis=1)
    logits = [common + rng.normal(size=common.shape) for _ in range(2)]
    rows = np.arange(batch)[:, None]
    peaks = rng.integers(0, vocab, (batch, 3))
    for values in logits:
        values[rows, peaks] += rng.uniform(2, 2 + boost, (batch, 3))
    expert = logits[1] + 0.5 * rng.normal(size=common.shape)
    expert[rows, rng.integers(0, vocab, (batch, 2))] += rng.uniform(0, boost, (batch, 2))
    return [x.astype(np.float32) for x in (logits[0], expert, logits[1])]


LARGE, EXPERT, BASE = language_like(np.random.default_rng(0))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.cache
def fuse(**options):
    """A strategy as one program that gives numpy's arrays."""
    run = jax.jit(DynamicFusion(**options))
    return lambda *logits, **more: jax.device_get(run(*logits, **more))


def naive(large, expert, base, alphas):
    """F, R at each alpha from softmaxes and KL divergences, and their targets."""
    p, q, r = (log_softmax(np.asarray(x, np.float64)) for x in (large, expert, base))

    def kl(a, b):
        return (np.exp(a) * (a - b)).sum(-1)

    fused = [log_softmax(p + np.asarray(a)[..., None] * (q - r)) for a in alphas]
    forward, reverse = (
        np.array([kl(*pair) for pair in pairs])
        for pairs in ([(x, p) for x in fused], [(p, x) for x in fused])
    )
    return forward, reverse, kl(q, r), kl(r, q)


def naive_objective(large, expert, base, alphas):
    forward, reverse, target, back = naive(large, expert, base, alphas)
    return (forward - target) ** 2 + (reverse - back) ** 2


def test_a_search_that_sees_no_number_does_not_end_as_converged():
    def visit(alpha):
        unknown, one = jnp.full_like(alpha, jnp.nan), jnp.ones_like(alpha)
        return Visit(unknown, one, unknown, 0 * one, 2 * one, None)

    start = jnp.ones(1)
    search = functools.partial(find_root, visit, max_sweeps=99, unrolled=False)
    minimum = jax.jit(lambda start: search(0 * start, start, 0.0, 2.0))(start)
    assert not minimum.converged[0]


def test_a_sum_of_divergences_may_be_off_by_the_rounding_of_its_own_product():
    """Moments without an error leave that of alpha times the mean, in float32."""
    alpha, mean = np.float32(0.1), np.float32(3.3)
    at = types.SimpleNamespace(mean=mean, errors=np.zeros(3, np.float32), variance=np.float32(1))
    at.forward = at.reverse = mean
    path = mock.create_autospec(Path, instance=True)
    path.moments.return_value = at

    @jax.jit
    def run(alpha):
        target = jnp.float32(0.25), jnp.float32(0)
        return _visit_sum(path, alpha, target=target, axis_name=None)[:2]

    gap, error = run(alpha)
    off = abs(float(gap) - (float(alpha) * float(mean) - 0.25))
    assert 0 < off <= error < 1e-6


@pytest.mark.every_change
@pytest.mark.slow
def test_grid_is_the_papers():
    values = np.linspace(0, 2, 21)
    with jax.enable_x64(True):
        args = [x.astype(np.float64) for x in (LARGE, EXPERT, BASE)]
        fused, info = jax.device_get(jax.jit(DynamicFusion(method="grid"))(*args))
    objective = naive_objective(LARGE, EXPERT, BASE, values)
    expected = values[objective.argmin(0)]
    np.testing.assert_array_equal(info["alpha"][0], expected)
    difference = np.float64(EXPERT) - np.float64(BASE)
    target = LARGE + expected[:, None] * difference
    np.testing.assert_allclose(log_softmax(fused), log_softmax(target), rtol=0, atol=1e-12)
    # In float32 the same points are chosen, but for ties.
    alphas = np.asarray(fuse(method="grid")(LARGE, EXPERT, BASE)[1]["alpha"][0])
    assert (np.abs(alphas - expected) < 1e-6).mean() > 0.95


@pytest.mark.parametrize("boost", [2.0, 6.0, 12.0])
def test_the_grid_says_where_the_minimum_of_the_whole_range_is(boost):
    logits = language_like(np.random.default_rng(3), boost=boost)
    info = fuse(method="grid")(*logits)[1]
    values = np.linspace(0, 2, 2001)
    best = values[naive_objective(*logits, values).argmin(0)]
    alpha, lower, upper = (np.float64(info[name][0]) for name in ("alpha", "lower", "upper"))
    assert ((lower <= alpha) & (alpha <= upper)).all()
    assert ((lower - 1e-3 <= best) & (best <= upper + 1e-3)).all()
    # Mostly no wider than two steps of the grid.
    assert np.median(upper - lower) < 0.2


@pytest.mark.every_change
@pytest.mark.slow
def test_the_better_of_two_minima_is_in_the_interval():
    """The large model all but excludes a token that expert and base disagree about by 20."""
    vocab = 1000
    base = np.zeros(vocab)
    base[0] = np.log(vocab - 1)  # Half of the base's probability.
    large = np.zeros(vocab)
    large[0] = np.log(1e-6 * (vocab - 1))
    expert = base.copy()
    expert[0] += 20
    logits = [np.float32(x)[None] for x in (large, expert, base)]
    values = np.linspace(0, 2, 4001)
    objective = naive_objective(*logits, values)[:, 0]
    inner = objective[1:-1]
    minima = values[1:-1][(inner < objective[:-2]) & (inner < objective[2:])]
    np.testing.assert_allclose(minima, [0.602, 1.154], atol=2e-3)
    info = fuse(method="grid")(*logits)[1]
    assert info["lower"][0] <= minima[0] + 1e-3
    assert info["upper"][0] >= minima[0] - 1e-3


@pytest.mark.every_change
@pytest.mark.slow
def test_distributions_that_exclude_each_other_make_no_nan():
    """Their log-probabilities lie hundreds apart: in float32 all weights between them were 0."""
    large = np.float32([[0, -300, -320, -300]])
    expert, base = np.float32([[-250, 200, 0, 0]]), np.float32([[0, -200, 0, 1]])
    for high in (0.5, 1.0, 2.0):
        info = fuse(method="grid", alpha_range=(0.0, high), num=2)(large, expert, base)[1]
        forward, reverse, _, _ = naive(large, expert, base, [info["alpha"][0]])
        np.testing.assert_allclose(info["forward"], forward[0], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(info["reverse"], reverse[0], rtol=1e-5, atol=1e-4)


def test_entries_that_are_masked_by_a_large_number_do_not_matter():
    masked = [np.where(np.arange(VOCAB) < 300, x, -1e9).astype(np.float32) for x in (EXPERT, BASE)]
    large = np.where(np.arange(VOCAB) < 300, LARGE, -np.inf).astype(np.float32)
    cut = [x[:, :300] for x in (LARGE, EXPERT, BASE)]
    fused, info = fuse()(large, *masked)
    fused_alone, expected = fuse()(*cut)
    np.testing.assert_allclose(info["alpha"], expected["alpha"], atol=1e-4)
    np.testing.assert_allclose(fused[:, :300], fused_alone, atol=1e-3)


@pytest.mark.parametrize("method", ["jeffreys", "project"])
def test_roots_meet_their_equation(method):
    info = fuse(method=method)(LARGE, EXPERT, BASE)[1]
    alpha = np.asarray(info["alpha"][0], np.float64)
    forward, reverse, target, back = naive(LARGE, EXPERT, BASE, [alpha])
    p, q, r = (log_softmax(np.float64(x)) for x in (LARGE, EXPERT, BASE))
    fused = np.exp(log_softmax(p + alpha[:, None] * (q - r)))
    value, divergence = {
        "jeffreys": (forward[0] + reverse[0], target + back),
        "project": ((fused * (q - r)).sum(-1), target),
    }[method]
    at_high, at_low = alpha >= 2, alpha <= 0
    free = ~(at_high | at_low)
    assert free.any()
    np.testing.assert_allclose(value[free], divergence[free], rtol=2e-4, atol=1e-5)
    assert (value[at_high] <= divergence[at_high] + 1e-4).all()
    assert (value[at_low] >= divergence[at_low] - 1e-4).all()
    assert np.asarray(info["converged"]).all()
    assert (np.asarray(info["lower"]) <= alpha).all()
    assert (np.asarray(info["upper"]) >= alpha).all()
    np.testing.assert_allclose(info["forward"], forward[0], atol=2e-5)
    np.testing.assert_allclose(info["reverse"], reverse[0], atol=2e-5)
    np.testing.assert_allclose(info["target_forward"], target, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_base_equal_to_the_large_model_gives_the_expert(method):
    fused, info = fuse(method=method)(BASE, EXPERT, BASE)
    np.testing.assert_allclose(info["alpha"][0], 1.0, atol=2e-3)
    difference = log_softmax(np.asarray(fused)) - log_softmax(EXPERT)
    assert np.abs(np.exp(log_softmax(EXPERT)) * difference).max() < 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_did_not_move_changes_nothing(method):
    fused, info = fuse(method=method)(LARGE, BASE, BASE)
    np.testing.assert_allclose(fused, LARGE - LARGE.max(-1, keepdims=True), atol=1e-5)
    assert np.isfinite(info["alpha"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_constants_in_logits_cost_no_digits(method):
    """As coarse as float32 is at 2e4, all else is computed as if they were not there."""
    coarse = [np.float32(np.round(x * 512) / 512) for x in (LARGE, EXPERT, BASE)]
    fused, info = fuse(method=method)(*coarse)
    offsets = 2e4, -1e4, 15_000.0
    moved = [np.float32(x + offset) for x, offset in zip(coarse, offsets, strict=True)]
    shifted, other = fuse(method=method)(*moved)
    np.testing.assert_array_equal(info["alpha"], other["alpha"])
    np.testing.assert_array_equal(fused, shifted)


@pytest.mark.parametrize("method", FEWER)
def test_padding_never_makes_nan(method):
    padded = [np.pad(x, ((0, 0), (0, 16))) for x in (LARGE, EXPERT, BASE)]
    padded[1][:, VOCAB:] = -np.inf
    fused, info = fuse(method=method)(*padded)
    alone, expected_info = fuse(method=method)(LARGE, EXPERT, BASE)
    assert (np.asarray(fused)[:, VOCAB:] == -np.inf).all()
    np.testing.assert_allclose(info["alpha"], expected_info["alpha"], atol=1e-3)
    np.testing.assert_allclose(fused[:, :VOCAB], alone, atol=1e-2)
    where = np.arange(VOCAB + 16) < VOCAB
    garbage = [np.pad(x, ((0, 0), (0, 16)), constant_values=50.0) for x in (LARGE, EXPERT, BASE)]
    masked = fuse(method=method)(*garbage, vocab_where=where)
    np.testing.assert_allclose(masked[0][:, :VOCAB], alone, atol=1e-2)
    nothing = [np.full_like(x, -np.inf) for x in padded]
    fused, info = fuse(method=method)(*nothing)
    assert (np.asarray(fused) == -np.inf).all()


def test_gradient_takes_alpha_as_given():
    def loss(large, expert):
        fused, _ = DynamicFusion()(large, expert, BASE)
        return jax.nn.log_softmax(fused)[:, 0].sum()

    info = fuse()(LARGE, EXPERT, BASE)[1]
    by_large, by_expert = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(LARGE, EXPERT))
    np.testing.assert_allclose(by_expert, info["alpha"][0][:, None] * by_large, rtol=1e-4)


def test_vmap_and_leading_axes_equal_rows_one_by_one():
    strategy = DynamicFusion()
    together = fuse()(LARGE, EXPERT, BASE)
    shaped = fuse()(*[x.reshape(4, 6, VOCAB) for x in (LARGE, EXPERT, BASE)])
    mapped = jax.device_get(jax.jit(jax.vmap(strategy))(LARGE, EXPERT, BASE))
    np.testing.assert_allclose(shaped[0].reshape(BATCH, VOCAB), together[0], atol=1e-3)
    np.testing.assert_allclose(mapped[0], together[0], atol=1e-3)
    np.testing.assert_allclose(mapped[1]["alpha"][:, 0], together[1]["alpha"][0], atol=1e-3)


def test_bfloat16_comes_out_as_float32():
    fused, _ = fuse()(*[x.astype(jnp.bfloat16) for x in (LARGE, EXPERT, BASE)])
    assert fused.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(method="bisect"), "method: expected one of grid, jeffreys"),
        (dict(multi="all"), "multi: expected one of"),
        (dict(alpha_range=(1.0, 1.0)), "alpha_range"),
        (dict(num=1), "num"),
    ],
)
def test_mistakes_are_named(options, named, monkeypatch):
    # Under tests a wrong choice would fail before, by its annotation.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=named):
        DynamicFusion(**options)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="see vocabulary_map"):
        DynamicFusion()(LARGE, EXPERT[:, :-1], BASE)
    with pytest.raises(ValueError, match="one base or one for each of 3 experts, got 2"):
        DynamicFusion()(LARGE, np.stack([EXPERT] * 3), np.stack([BASE] * 2))
    with pytest.raises(ValueError, match="that this strategy needs, got none"):
        DynamicFusion()(LARGE, np.zeros((0, *LARGE.shape), np.float32), BASE)


@pytest.mark.parametrize("vocab", [pytest.param(49_152, marks=EVERY_CHANGE), 50_257])
def test_sums_over_a_large_vocabulary_keep_their_digits(vocab):
    """Added up in order, long tails lost two digits: divergences were off by up to 5e-4."""
    rng = np.random.default_rng(7)
    logits = [2.5 * rng.normal(size=(4, vocab)).astype(np.float32) for _ in range(3)]
    _, info = fuse(method="jeffreys")(*logits)
    alpha = np.asarray(info["alpha"][0])
    forward, reverse, target_forward, target_reverse = naive(*logits, [alpha])
    for name, exact in (
        ("target_forward", target_forward),
        ("target_reverse", target_reverse),
        ("forward", forward[0]),
        ("reverse", reverse[0]),
    ):
        np.testing.assert_allclose(info[name], exact, rtol=0, atol=1e-5, err_msg=name)
