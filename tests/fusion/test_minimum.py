"""Bounds proven for an interval of alphas hold in it, and the grid encloses the minimum."""

from typing import Any

import jax
import numpy as np
import pytest

from logitjax.fusion import DynamicFusion
from logitjax.fusion._inputs import read_inputs
from logitjax.fusion._minimum import Point, between
from logitjax.fusion._path import make_path
from tests.fusion.test_dynamic import naive_objective
from tests.rigs._guarantees_fusion import Path64, draw

ROWS, VOCAB = 400, 24


def student_t(seed=0) -> Any:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(1, 8, (ROWS, 1))
    return [(scale * rng.standard_t(3, (ROWS, VOCAB))).astype(np.float32) for _ in range(3)]


@jax.jit
def bounds(logits, left, right):
    path = make_path(read_inputs(*logits, None), None)
    targets = path.target_forward, path.target_reverse

    def point(alpha):
        return Point.of(path.moments(alpha[None], axis_name=None), targets, path.target_errors)

    return jax.tree.map(lambda x: x[0], between(path, point(left), point(right)))


def test_no_alpha_of_an_interval_is_better_than_its_bound():
    logits = student_t()
    rng = np.random.default_rng(1)
    width = 10.0 ** rng.uniform(-3, 0.3, ROWS)
    left = rng.uniform(0, 2 - np.minimum(width, 2)).astype(np.float32)
    right = np.minimum(left + width, 2).astype(np.float32)
    interval = jax.device_get(bounds(logits, left, right))
    shares = np.linspace(0, 1, 401)[:, None]
    inside = naive_objective(*logits, left + shares * (np.float64(right) - left))
    least = inside.min(0)
    ends = np.minimum(inside[0], inside[-1])
    assert (interval.bound <= least).all()
    # Bounds that were always 0 would hold as well: most of these intervals need no search.
    assert (interval.bound >= ends * (1 - 1e-3)).mean() > 0.6
    # Where the slope is said to grow, it grows.
    slopes = np.diff(inside, axis=0)
    convex = (interval.convex > 0) & (width > 1e-2)
    assert convex.mean() > 0.1
    assert (np.diff(slopes, axis=0)[:, convex] > -1e-9 * inside.max(0)[convex]).all()


@pytest.mark.every_change
@pytest.mark.slow
def test_alpha_of_divergences_of_a_thousandth_is_as_certain_as_of_large_ones():
    """An absolute tolerance called alpha = 1 converged where .77 was optimal."""
    rng = np.random.default_rng(2)
    large, base = (2 * rng.normal(size=(64, VOCAB)) for _ in range(2))
    expert = base + 10.0 ** rng.uniform(-5, -1, (64, 1)) * rng.normal(size=base.shape)
    logits = [x.astype(np.float32) for x in (large, expert, base)]
    path = Path64.of(tuple(logits))
    best, _ = path.optimum()
    for method in ("grid", "jeffreys", "project"):
        info = jax.device_get(jax.jit(DynamicFusion(method=method))(*logits)[1])
        alpha, lower, upper = (np.float64(info[x][0]) for x in ("alpha", "lower", "upper"))
        # A minimum lies beside the best of 100,001 points.
        target, reach = (best, 2e-5) if method == "grid" else (path.root(method), 1e-9)
        assert ((lower <= target + reach) & (target <= upper + reach)).all(), method
        assert ((lower <= alpha) & (alpha <= upper)).all(), method
    # An expert that is its base says nothing about alpha.
    info = jax.device_get(jax.jit(DynamicFusion(method="grid"))(large, base, base)[1])
    assert (info["upper"] - info["lower"] == 2).all()


@pytest.mark.every_change
@pytest.mark.slow
def test_of_large_models_that_are_all_but_certain_the_interval_holds_alpha_too():
    """The centre is off by a rounding, whose square is more than divergences of 1e-17."""
    some = [57, 95, 146, 997]
    logits = tuple(x[some] for x in draw("peaked", 1000, np.random.default_rng(5)))
    info = jax.device_get(jax.jit(DynamicFusion(method="jeffreys"))(*logits)[1])
    lower, upper = (np.float64(info[x][0]) for x in ("lower", "upper"))
    root = Path64.of(logits).root("jeffreys")
    assert ((lower <= root) & (root <= upper)).all()
    assert (upper - lower < 0.01).all()
