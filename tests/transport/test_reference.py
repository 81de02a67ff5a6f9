"""ott-jax behind checks: agreement with the certificate, and no number without convergence."""

import numpy as np
import pytest

from logitjax import transport
from logitjax.transport import FactoredGraph, reference


def graphs():
    rng = np.random.default_rng(0)
    z = np.abs(rng.normal(size=(12, 16))).astype(np.float32)
    w = np.abs(rng.normal(size=(12, 16)) + 1).astype(np.float32)
    return FactoredGraph(z), FactoredGraph(w)


@pytest.mark.every_change
@pytest.mark.slow
def test_entropic_solution_lies_in_the_certificate():
    c, d = graphs()
    answer = reference.entropic_gw(c, d)
    assert answer.converged
    assert answer.marginal_error < 1e-3
    bounds = transport.certificate(
        c, d, scale="none", bounds="third", refine=transport.Refinement("search")
    )
    # Its plan is a coupling, so its cost is no lower than the bound, and it is close to ours.
    assert bounds.lower <= answer.value
    assert bounds.upper <= 1.02 * answer.value
    x, y = (np.asarray(g.values, np.float64).T @ np.asarray(g.values, np.float64) for g in (c, d))
    plan = np.asarray(answer.plan, np.float64)
    cost = np.einsum("ijkl,ik,jl->", (x[:, :, None, None] - y[None, None]) ** 2, plan, plan)
    np.testing.assert_allclose(answer.value, cost, rtol=1e-3)
    started = reference.entropic_gw(c, d, start=plan, epsilons=(0.01,))
    np.testing.assert_allclose(started.value, answer.value, rtol=0.05)


@pytest.mark.slow
def test_an_unfinished_solve_is_not_a_number():
    c, d = graphs()
    answer = reference.entropic_gw(c, d, epsilons=(0.01,), max_iterations=2)
    assert not answer.converged
    with pytest.raises(ValueError, match="value: expected a solve that finished"):
        _ = answer.value
    assert "not converged" in answer.reason or "marginals" in answer.reason
    strict = reference.entropic_gw(c, d, epsilons=(0.3,), marginal_tolerance=1e-12)
    assert not strict.converged
    assert "marginals are off" in strict.reason


def test_epsilons_have_to_fall():
    c, d = graphs()
    with pytest.raises(ValueError, match="epsilons: expected positive, falling numbers"):
        reference.entropic_gw(c, d, epsilons=(0.01, 0.1))
