"""Branch and bound: what is proven of an interval holds inside it, and the search uses it."""

from typing import Any

import jax
import numpy as np
import pytest

from logitjax.fusion import DynamicFusion
from logitjax.fusion._inputs import read_inputs
from logitjax.fusion._minimum import _Search, between
from logitjax.fusion._path import make_path
from tests.fusion.test_dynamic import naive_objective
from tests.rigs._guarantees_fusion import Path64

ROWS, VOCAB = 400, 24


def student_t(seed=0) -> Any:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(1, 8, (ROWS, 1))
    return [(scale * rng.standard_t(3, (ROWS, VOCAB))).astype(np.float32) for _ in range(3)]


@jax.jit
def bounds(logits, left, right):
    path = make_path(read_inputs(*logits, None), None)
    targets = path.target_forward, path.target_reverse
    search = _Search(path, *targets, path.target_errors[:2], None)

    def point(alpha):
        return search.point(path.moments(alpha[None], axis_name=None))

    return jax.tree.map(lambda x: x[0], between(path, point(left), point(right)))


def test_no_alpha_of_an_interval_is_better_than_its_bound():
    logits = student_t()
    rng = np.random.default_rng(1)
    width = 10.0 ** rng.uniform(-3, 0.3, ROWS)
    left = rng.uniform(0, 2 - np.minimum(width, 2)).astype(np.float32)
    right = np.minimum(left + width, 2).astype(np.float32)
    found = jax.device_get(bounds(logits, left, right))
    shares = np.linspace(0, 1, 401)[:, None]
    inside = naive_objective(*logits, left + shares * (np.float64(right) - left))
    least = inside.min(0)
    ends = np.minimum(inside[0], inside[-1])
    assert (found.bound <= least).all()
    # Bounds that were always 0 would hold as well: most of these intervals need no search.
    assert (found.bound >= ends * (1 - 1e-3)).mean() > 0.6
    assert ((found.split > left) & (found.split < right)).all()


@pytest.mark.every_change
@pytest.mark.slow
def test_newton_is_certified_no_worse_than_the_grid_and_never_ends_at_the_maximum_at_zero():
    logits = student_t()
    info = jax.device_get(jax.jit(DynamicFusion(method="newton"))(*logits)[1])
    alpha = np.float64(info["alpha"][0])
    objective = naive_objective(*logits, [alpha])[0]
    scan = naive_objective(*logits, np.linspace(0, 2, 1001))
    allowed = 1e-4 * objective + 1e-5
    assert (alpha > 0).all()
    assert info["converged"].all()
    assert (objective <= scan[::50].min(0) + allowed).all()
    assert (objective <= scan.min(0) + allowed).all()
    assert ((info["lower"] <= info["alpha"]) & (info["alpha"] <= info["upper"])).all()


@pytest.mark.every_change
@pytest.mark.slow
def test_alpha_of_divergences_of_a_thousandth_is_as_certain_as_of_large_ones():
    """An absolute tolerance called alpha = 1 converged where .77 was optimal."""
    rng = np.random.default_rng(2)
    large, base = (2 * rng.normal(size=(64, VOCAB)) for _ in range(2))
    expert = base + 10.0 ** rng.uniform(-5, -1, (64, 1)) * rng.normal(size=base.shape)
    logits = [x.astype(np.float32) for x in (large, expert, base)]
    path = Path64.of(tuple(logits))
    best, objective = path.optimum()
    for method in ("grid", "newton", "jeffreys", "project"):
        info = jax.device_get(jax.jit(DynamicFusion(method=method))(*logits)[1])
        alpha, lower, upper = (np.float64(info[x][0]) for x in ("alpha", "lower", "upper"))
        # A minimum lies beside the best of 100,001 points.
        target, reach = (best, 2e-5) if method in ("grid", "newton") else (path.root(method), 1e-9)
        assert ((lower <= target + reach) & (target <= upper + reach)).all(), method
        assert ((lower <= alpha) & (alpha <= upper)).all(), method
        if method == "newton":
            assert info["converged"].all()
            assert (path.objective(alpha) <= objective * 1.001 + 1e-6 * path.scale).all()
    # An expert that is its base says nothing about alpha.
    info = jax.device_get(jax.jit(DynamicFusion(method="newton"))(large, base, base)[1])
    assert (info["upper"] - info["lower"] == 2).all()


def test_a_search_that_is_cut_short_says_so_and_keeps_a_bracket():
    logits = [x[:100] for x in student_t()]
    info = jax.device_get(jax.jit(DynamicFusion(method="newton", max_sweeps=2))(*logits)[1])
    scan = naive_objective(*logits, np.linspace(0, 2, 1001))
    found = naive_objective(*logits, [np.float64(info["alpha"][0])])[0]
    best = np.linspace(0, 2, 1001)[scan.argmin(0)]
    better = scan.min(0) < found * (1 - 1e-4) - 1e-4
    assert better.any()
    assert not info["converged"][better].any()
    assert (info["lower"][0][better] <= best[better]).all()
    assert (best[better] <= info["upper"][0][better]).all()
