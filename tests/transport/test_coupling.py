"""The cost of a coupling in all its forms, and gradients at a fixed coupling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from logitjax import transport
from logitjax.transport import FactoredGraph, _coupling
from logitjax.transport._bounds import moment_lower_bound, third_lower_bound
from logitjax.transport._rounding import lowered
from logitjax.transport._sorted import Coupling
from tests._compiled import compiled

cost = compiled(transport.gw_at_coupling)


def data(n=12, m=12):
    rng = np.random.default_rng(0)

    def sparse(nodes, positions):
        values = rng.normal(size=(positions, 3)).astype(np.float32)
        ids = np.argsort(rng.random((positions, nodes)), -1)[:, :3].astype(np.int32)
        return FactoredGraph(values, ids, nodes)

    return sparse(n, 9), sparse(m, 7)


def dense_factor(graph):
    z = np.zeros((len(graph.values), graph.num_nodes), np.float32)
    np.put_along_axis(z, np.asarray(graph.ids), np.asarray(graph.values), -1)
    return z


def exact(c, d, coupling, p):
    z, w = (dense_factor(g).astype(np.float64) for g in (c, d))
    rows, columns, mass = (np.asarray(x) for x in (coupling.rows, coupling.columns, coupling.mass))
    x, y = (z.T @ z)[rows][:, rows], (w.T @ w)[columns][:, columns]
    return (np.abs(x - y) ** p * np.outer(mass, mass)).sum()


@pytest.mark.parametrize("m", [12, 8])
def test_all_forms_equal_the_oracle(m, monkeypatch):
    c, d = data(m=m)
    dense = [FactoredGraph(dense_factor(g)) for g in (c, d)]
    matrices = [g.values.T @ g.values for g in dense]
    coupling = compiled(transport.sorted_coupling)(*(x.sum(1) for x in matrices))
    forms = ((c, d), dense, matrices, (c, matrices[1]))

    def costs(forms, coupling, *, powers):
        of = transport.gw_at_coupling
        return [[of(*graphs, coupling, p=p) for graphs in forms] for p in powers]

    for p, got in enumerate(jax.jit(functools.partial(costs, powers=(1, 2)))(forms, coupling), 1):
        np.testing.assert_allclose(got, [exact(c, d, coupling, p)] * len(forms), rtol=1e-5)
    monkeypatch.setattr(_coupling, "_EXACT_PAIRS", 0)
    monkeypatch.setattr(_coupling, "_BLOCK_ENTRIES", 50)
    (in_blocks,) = jax.jit(functools.partial(costs, powers=(2,)))(((c, d), dense), coupling)
    np.testing.assert_allclose(in_blocks, [exact(c, d, coupling, 2)] * 2, rtol=1e-4)


def test_mass_that_is_missing_is_bounded_wherever_it_goes():
    c, d = (np.random.default_rng(seed).normal(size=(4, 4)) for seed in (0, 1))
    nodes, cost = np.arange(4), compiled(_coupling.coupling_cost)
    half, whole = (cost(c, d, Coupling(nodes, nodes, np.full(4, m / 4)), p=2) for m in (0.5, 1.0))
    np.testing.assert_allclose(half.value, whole.value / 4, rtol=1e-5)
    assert half.most >= whole.value


def test_blocks_do_not_change_the_value(monkeypatch):
    c, d = data()
    coupling = Coupling(*(np.arange(12, dtype=np.int32),) * 2, np.full(12, 1 / 12, np.float32))
    expected = cost(c, d, coupling)
    monkeypatch.setattr(_coupling, "_BLOCK_ENTRIES", 60)  # five rows a block; twelve do not divide
    got = jax.jit(lambda *x: transport.gw_at_coupling(*x))(c, d, coupling)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_envelope_gradient_of_the_upper_bound_equals_finite_differences():
    c, d = data()

    def upper(values):
        graph = FactoredGraph(values, c.ids, c.num_nodes)
        return transport.certificate(
            graph, d, scale="none", refine=transport.Refinement("exchange")
        )

    def with_coupling(values):
        answer = upper(values)
        return answer.upper, answer.coupling

    run = jax.jit(jax.grad(with_coupling, has_aux=True))
    gradient, coupling = jax.device_get(run(c.values))
    direction = np.random.default_rng(1).normal(size=c.values.shape)

    def at(step):
        moved = FactoredGraph(c.values + step * direction, c.ids, c.num_nodes)
        z = np.zeros((9, 12))
        np.put_along_axis(z, np.asarray(moved.ids), np.asarray(moved.values), -1)
        w = dense_factor(d).astype(np.float64)
        rows, columns = np.asarray(coupling.rows), np.asarray(coupling.columns)
        return np.square((z.T @ z)[rows][:, rows] - (w.T @ w)[columns][:, columns]).mean()

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3)


def test_subgradient_of_the_closed_form_equals_finite_differences():
    rng = np.random.default_rng(2)
    f, g, direction = rng.normal(size=(3, 10))
    g = g[:8]
    a = rng.dirichlet(np.ones(10))

    def value(x):
        return transport.sorted_gw_lower_bound(x, g, f_weights=a)

    gradient = np.asarray(jax.jit(jax.grad(value))(f.astype(np.float32)))

    def exact(x):
        return scipy.stats.wasserstein_distance(x, g, a)

    slope = (exact(f + 1e-6 * direction) - exact(f - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3)


def test_lower_bounds_have_finite_gradients_where_graphs_are_equal_or_empty():
    z = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32)
    z[:, 5] = 0.0

    def loss(x):
        graph, same = FactoredGraph(x), FactoredGraph(z)
        bounds = (
            moment_lower_bound(graph, same),
            third_lower_bound(graph, same),
            transport.first_lower_bound(graph, same),
        )
        return sum(bounds)

    gradient = jax.jit(jax.grad(loss))
    assert np.isfinite(gradient(z)).all()
    assert np.isfinite(gradient(0 * z)).all()


@pytest.mark.slow
@pytest.mark.every_change
def test_certificate_under_vmap():
    rng = np.random.default_rng(4)
    z, w = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)

    def one(x, y):
        return transport.certificate(
            FactoredGraph(x), FactoredGraph(y), refine=transport.Refinement("exchange")
        )

    together = jax.device_get(jax.jit(jax.vmap(one))(z, w))
    alone = jax.jit(one)
    for i in range(3):
        np.testing.assert_allclose(together.upper[i], alone(z[i], w[i]).upper, rtol=1e-5)


def test_a_permutation_with_masses_of_its_own_is_no_matching():
    z, w = np.random.default_rng(4).normal(size=(2, 2, 3)).astype(np.float32)
    c, d = z.T @ z, w.T @ w
    masses = np.float32([0.2, 0.3, 0.5])
    order = np.array([2, 0, 1], np.int32)
    value = cost(c, d, Coupling(np.arange(3, dtype=np.int32), order, masses))
    expected = np.square(np.float64(c) - d[order][:, order]) @ masses @ masses
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Nodes are counted from 0: the third is the last.
    beyond = np.array([3, 0, 1], np.int32)
    assert np.isnan(cost(c, d, Coupling(np.arange(3, dtype=np.int32), beyond, masses)))


def test_a_difference_whose_square_is_too_small_costs_something():
    c, d = np.float32([[0, 1e-30], [1e-30, 0]]), np.zeros((2, 2), np.float32)
    nodes = np.arange(2, dtype=np.int32)
    coupling = Coupling(nodes, nodes, np.full(2, 0.5, np.float32))
    assert compiled(_coupling.coupling_cost)(c, d, coupling, p=2).most > 0


def test_plans_of_other_solvers_are_judged():
    z = np.random.default_rng(0).normal(size=(3, 5))
    w = z + 0.1 * np.random.default_rng(1).normal(size=(3, 5))
    c, d = z.T @ z, w.T @ w
    plan = np.full((5, 5), 1 / 25)
    answer = transport.certificate(c, d, scale="none", candidates=[plan, np.eye(5) / 5])
    expected = np.square(c[:, :, None, None] - d).mean()
    np.testing.assert_allclose(answer.costs, [expected, np.square(c - d).mean()], rtol=1e-5)
    assert (answer.costs >= answer.upper).all()
    # What lacks in the marginals is added as the product of the weights, which this plan is.
    unfinished = transport.certificate(c, d, scale="none", candidates=[0.97 * plan])
    np.testing.assert_allclose(unfinished.costs[0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"candidates: expected .* shape \(5, 5\), got \(4, 5\)"):
        transport.certificate(c, d, candidates=[plan[:4]])


def test_a_bound_that_is_lowered_has_the_gradient_of_what_was_computed():
    bound = jax.value_and_grad(lambda x: lowered(jnp.square(x), p=2, relative=1e-3))
    value, gradient = jax.jit(bound)(np.float32(2.0))
    assert 3.99 < value <= 3.996
    assert gradient == 4.0
