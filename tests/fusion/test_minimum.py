"""Branch and bound: what is proven of an interval holds inside it, and the search uses it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.fusion import DynamicFusion
from logitjax.fusion._inputs import read_inputs
from logitjax.fusion._minimum import Point, between
from logitjax.fusion._path import make_path
from tests.fusion.test_dynamic import naive_objective

ROWS, VOCAB = 400, 24


def student_t(seed=0) -> Any:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(1, 8, (ROWS, 1))
    return [(scale * rng.standard_t(3, (ROWS, VOCAB))).astype(np.float32) for _ in range(3)]


@jax.jit
def bounds(logits, left, right):
    path = make_path(read_inputs(*logits, None), None, extent=True)

    def point(alpha):
        at = path.moments(alpha[None], axis_name=None)
        error = 1e-6 * (at.variance + at.mean**2)
        gaps = alpha * at.mean - at.log_z - path.target_forward, at.log_z - path.target_reverse
        low = jnp.maximum(at.variance - error, 0)
        return Point(alpha[None], *gaps, at.mean, low, at.variance + error)

    return jax.tree.map(lambda x: x[0], between(path, point(left), point(right)))


def test_no_alpha_of_an_interval_is_better_than_its_bound():
    logits = student_t()
    rng = np.random.default_rng(1)
    width = 10.0 ** rng.uniform(-3, 0.3, ROWS)
    left = rng.uniform(0, 2 - np.minimum(width, 2)).astype(np.float32)
    right = np.minimum(left + width, 2).astype(np.float32)
    found = jax.device_get(bounds(logits, left, right))
    shares = np.linspace(0, 1, 401)[:, None]
    inside = naive_objective(*logits, left + shares * (right - left))
    least = inside.min(0)
    ends = np.minimum(inside[0], inside[-1])
    assert (found.bound <= least * (1 + 1e-4) + 1e-4).all()
    # Bounds that were always 0 would hold as well: most of these intervals need no search.
    assert (found.bound >= ends * (1 - 1e-3)).mean() > 0.6
    assert ((found.split > left) & (found.split < right)).all()


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
