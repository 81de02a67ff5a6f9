"""Several experts: what each rule does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.fusion import _joint
from tests._marks import EVERY_CHANGE
from tests.fusion.test_dynamic import BASE, BATCH, FEWER, LARGE, fuse, language_like

EXPERTS = np.stack(
    [language_like(np.random.default_rng(seed))[1] - BASE for seed in (10, 11)]
).astype(np.float32)
EXPERTS = BASE + 0.4 * EXPERTS
INERT = np.stack([EXPERTS[0], BASE, BASE, BASE])


def test_inert_experts_dilute_the_papers_rule():
    """Known: it matches the mean divergence, so that three idle experts take most of the say."""
    one = fuse(method="grid")(LARGE, INERT[0], BASE)[1]
    four = fuse(method="grid", multi="single")(LARGE, INERT, BASE)[1]
    assert four["alpha"].shape == (4, BATCH)
    useful = np.asarray(four["expert"]) == 0
    assert useful.mean() > 0.5
    assert np.asarray(four["alpha"][0])[useful].mean() < 0.8 * np.asarray(one["alpha"]).mean()


@pytest.mark.parametrize("method", FEWER)
def test_single_follows_the_expert_of_the_least_summed_objective(method):
    info = fuse(method=method, multi="single")(LARGE, EXPERTS, BASE)[1]
    expert = np.asarray(info["expert"])
    alpha = np.asarray(info["alpha"])
    assert ((alpha > 0).sum(0) <= 1).all()
    assert {0, 1} >= set(expert.tolist())
    assert (alpha[expert, np.arange(BATCH)] >= 0).all()


def test_joint_steps_meet_the_mean_divergence_where_they_can():
    info = fuse(method="jeffreys", multi="joint")(LARGE, EXPERTS, BASE)[1]
    free = ~np.asarray(info["at_bound"]) & np.asarray(info["converged"])
    assert free.mean() > 0.5
    reached = np.asarray(info["forward"]), np.asarray(info["reverse"])
    targets = np.asarray(info["target_forward"]), np.asarray(info["target_reverse"])
    np.testing.assert_allclose(sum(reached)[free], sum(targets)[free], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("multi", ["joint", pytest.param("single", marks=EVERY_CHANGE)])
def test_a_base_for_each_expert(multi):
    bases = np.stack([BASE, BASE])
    shared = fuse(multi=multi)(LARGE, EXPERTS, BASE)[0]
    np.testing.assert_allclose(fuse(multi=multi)(LARGE, EXPERTS, bases)[0], shared, atol=1e-3)


def test_where_every_device_has_to_agree_as_many_sweeps_are_made_as_are_said():
    visits = []

    def visit(alphas, centre):
        visits.append(centre)
        gap = 1 - alphas
        done = jnp.zeros(alphas.shape[1:], bool)
        return _joint._Visit(gap[0], gap, done, alphas, (alphas, alphas))

    def run(start):
        halfway = lambda seen, damping: seen.slopes / 2  # noqa: E731
        return _joint._damped(visit, halfway, start, (0.0, 2.0), 5, unrolled=True)

    root = jax.jit(run)(np.zeros((2, 3), np.float32))
    assert len(visits) == int(root.sweeps) == 5
    np.testing.assert_allclose(root.alpha, np.full((2, 3), 1 - 2.0**-4))
