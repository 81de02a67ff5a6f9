"""Problems and plans of other solvers, numbers of any size, and many pairs at once."""

import itertools
import types

import jax
import jaxtyping
import numpy as np
import pytest

from logitjax import transport
from logitjax.transport import FactoredGraph
from logitjax.transport import _certificate as implementation
from logitjax.transport._graph import ProductGraph
from logitjax.transport._scale import _cast_error

RNG = np.random.default_rng(0)
Z, W = np.abs(RNG.normal(size=(2, 4, 6)))
C, D = Z.T @ Z, W.T @ W


def problem(xx, yy, xy=None, **settings):
    """As much of ott's QuadraticProblem as is read."""
    squared = types.SimpleNamespace(func=lambda x: x**2)
    twice = types.SimpleNamespace(func=lambda x: 2 * x)
    fields = {"tau_a": 1.0, "tau_b": 1.0, "fused_penalty": 1.0}
    fields["loss"] = types.SimpleNamespace(f1=squared, h2=twice)
    fields |= {name: np.full(n, 1 / n) for name, n in (("a", xx.n), ("b", yy.n))}
    return types.SimpleNamespace(geom_xx=xx, geom_yy=yy, geom_xy=xy, **fields | settings)


def low_rank(left, right, bias=0.0):
    return types.SimpleNamespace(cost_1=left, cost_2=right, bias=bias, n=len(left))


def points(x, y=None):
    return types.SimpleNamespace(
        x=x, y=x if y is None else y, is_squared_euclidean=True, inv_scale_cost=0.5, n=len(x)
    )


def dense(matrix):
    return types.SimpleNamespace(cost_matrix=matrix, n=len(matrix))


def distances(x, y):
    return 0.5 * np.square(np.float64(x)[:, None] - np.float64(y)).sum(-1)


def best_of_permutations(c, d, linear):
    q = np.array(list(itertools.permutations(range(len(c)))))
    moved = d[q[:, :, None], q[:, None, :]]
    return (np.square(c - moved).mean((1, 2)) + linear[np.arange(len(c)), q].mean(1)).min()


def test_a_plan_costs_what_it_costs_once_it_is_repaired():
    """ott stops with columns off by a thousandth, for which the whole range of entries was paid."""
    plan = np.exp(RNG.normal(size=(6, 6)))
    for _ in range(300):
        plan /= 6 * plan.sum(1, keepdims=True)
        plan /= 6 * plan.sum(0)
    unfinished = plan * np.exp(1e-3 * RNG.normal(size=(6, 1)))
    true = np.minimum(1, 1 / 6 / unfinished.sum(1))[:, None] * unfinished
    true = true * np.minimum(1, 1 / 6 / true.sum(0))
    rows, columns = 1 / 6 - true.sum(1), 1 / 6 - true.sum(0)
    true = true + np.outer(rows, columns) / rows.sum()
    cost = np.einsum("ijkl,ik,jl->", np.square(C[:, :, None, None] - D), true, true)
    solution = types.SimpleNamespace(matrix=unfinished, primal_cost=7.0, converged=True)
    answer = transport.certificate(C, D, scale="none", candidates=[solution])
    assert cost <= answer.costs[0] <= cost * (1 + 1e-6)
    assert answer.upper <= answer.costs[0]
    assert (answer.reported[0], answer.converged[0]) == (7.0, True)
    with pytest.raises(ValueError, match=r"plan whose marginals are .* off by 0\.6 in L1"):
        transport.certificate(C, D, candidates=[0.7 * plan])


def test_numbers_beyond_float32_are_bounded_or_refused(monkeypatch):
    plain = transport.certificate(C, D)
    for scale in (1e-35, 1e35):
        answer = transport.certificate(C * scale, D * scale)
        np.testing.assert_allclose(
            [answer.lower, answer.upper], [plain.lower, plain.upper], rtol=1e-6
        )
    for scale in (1e160, 1e200, 1e240):
        with pytest.raises(ValueError, match="scale: expected units in which float32 holds"):
            transport.certificate(C * scale, D)
    with pytest.raises(ValueError, match="scale: expected units"):
        transport.certificate(C * 1e-250, D * 1e-250, scale="none")
    # Users have no checks of annotations.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="refine: expected a Refinement or None, got 'exchange'"):
        transport.certificate(C, D, refine="exchange")
    # Only graphs that are equal cost nothing, even if nothing else can tell them apart.
    other = C.copy()
    other[0, 0] = np.nextafter(C[0, 0], 9)
    assert transport.certificate(C, C).upper == 0
    assert transport.certificate(C, other).upper > 0
    tiny, other = np.diag([1e30] * 6), np.diag([1e30] * 6)
    tiny[0, 1], other[0, 1] = 1e-300, 2e-300
    assert transport.certificate(tiny, other).upper > 0


@pytest.mark.slow
@pytest.mark.every_change
def test_what_is_lost_by_a_cast_under_jit_belongs_to_the_bounds():
    other = C.copy()
    other[0, 0] += 1e-9
    true = 1e-18 / 36 / np.square(other).mean()
    pair = [(np.float32(x), np.float32(x - np.float32(x))) for x in (C, other)]
    constant = jax.jit(lambda key: transport.certificate(C, other, key=key))(jax.random.key(0))
    argument = jax.jit(transport.certificate)(*pair)
    for answer in (constant, argument):
        assert answer.lower <= true <= answer.upper < 1e-12
    certificate = transport.certificate(*pair)
    np.testing.assert_allclose(certificate.upper, true, rtol=1e-2)
    with pytest.raises(ValueError, match="c: expected a largest entry from 1e-18 to 1e18"):
        jax.jit(lambda key: transport.certificate(C * 1e30, other, key=key))(jax.random.key(0))


def test_what_a_cast_of_factors_loses_is_at_most_its_error():
    high, low = np.float32(Z), np.float32(1e-6 * RNG.normal(size=Z.shape))
    exact = np.float64(high) + low
    lost = exact.T @ exact - np.float64(high).T @ high
    error = jax.jit(_cast_error)(FactoredGraph(high), FactoredGraph(low), None, 0)
    assert np.sqrt(np.square(lost).mean()) <= error < 1e-4


@pytest.mark.slow
@pytest.mark.every_change
def test_the_rounding_of_units_counts_where_graphs_are_scaled_apart():
    z = np.float32(Z)
    graphs = [FactoredGraph(x) for x in (z, np.float32(z * np.float32(1.7)))]
    answer = jax.jit(lambda *x: transport.certificate(*x, scale="separate"))(*graphs)
    c, d = (np.float64(g.values).T @ np.float64(g.values) for g in graphs)
    units = np.float64(answer.units)
    true = np.square(c / units[0] - d / units[1]).mean()
    assert answer.lower <= true <= answer.upper


@pytest.mark.every_change
@pytest.mark.slow
def test_many_pairs_have_the_bounds_of_each():
    factors = [
        RNG.normal(size=(2, t, n)) * 10.0**e for n, t, e in ((1, 3, 0), (5, 4, -9), (6, 2, 9))
    ]
    pairs = [tuple(map(FactoredGraph, pair)) for pair in factors]
    pairs += [(z.T @ z - 1, w.T @ w) for z, w in factors] + [(C, D), (C, C), (C, 0 * C), (0 * C, C)]
    for p in (1, 2):
        many = transport.certificate_many(pairs, p=p)
        for i, pair in enumerate(pairs):
            c, d = (
                (x.values.T @ x.values if isinstance(x, FactoredGraph) else x) / many.units[i, 1]
                for x in pair
            )
            q = np.asarray(many.coupling.columns[i, : len(c)])
            moved = (np.abs(c - d[np.ix_(q, q)]) ** p).mean()
            first = (np.abs(np.sort(c.mean(1)) - np.sort(d.mean(1))) ** p).mean()
            assert first * (1 - 1e-6) - 1e-12 <= many.lower[i] <= many.upper[i]
            np.testing.assert_allclose(many.upper[i], moved, rtol=1e-6, atol=1e-12)
    for i in (2, 6, 7, 8):
        one = transport.certificate(*pairs[i])
        for name in ("lower", "upper", "units"):
            got, expected = getattr(many, name)[i], getattr(one, name)
            np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=name)
    assert many.upper[7] == 0
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        transport.certificate_many([])
    with pytest.raises(ValueError, match="d: expected finite entries"):
        transport.certificate_many([(C, C * np.nan)])


@pytest.mark.slow
@pytest.mark.every_change
def test_geometries_of_ott_give_the_bounds_of_their_matrices():
    x, y = RNG.normal(size=(2, 6, 3)) + 5
    factor = RNG.normal(size=(6, 2))
    for geometry, matrix in (
        (points(x), distances(x, x)),
        (low_rank(x, y, 0.3), x @ y.T + 0.3),
        (low_rank(factor, factor), factor @ factor.T),
    ):
        answer = transport.certificate(problem(geometry, points(y)))
        expected = transport.certificate(matrix, distances(y, y), scale="none")
        for name in ("lower", "upper"):
            np.testing.assert_allclose(getattr(answer, name), getattr(expected, name), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.every_change
def test_a_linear_term_is_bounded_with_the_graphs_and_moves_the_matching():
    x, y = RNG.normal(size=(2, 6, 3))
    xx, yy = low_rank(Z.T, Z.T), low_rank(W.T, W.T)
    for penalty, geometry, costs in (
        (0.3, points(x, y), distances(x, y)),
        (-5.0, dense(x @ y.T), x @ y.T),
    ):
        fused = problem(xx, yy, geometry, fused_penalty=penalty)
        best = best_of_permutations(C, D, penalty * costs)
        loose = transport.certificate(fused)
        near = transport.certificate(
            fused, bounds="third", refine=transport.Refinement("search", restarts=2)
        )
        assert loose.lower <= near.lower <= best * (1 + 1e-6) + 1e-6 * abs(best)
        assert best - 1e-6 * abs(best) <= near.upper <= loose.upper
        np.testing.assert_allclose(near.upper, best, rtol=0.05)


def test_problems_that_have_no_bound_here_are_refused_by_name():
    xx = points(RNG.normal(size=(6, 2)))
    with pytest.raises(ValueError, match=r"unbalanced one with tau_a=0\.5, tau_b=1"):
        transport.certificate(problem(xx, xx, tau_a=0.5))
    kl = types.SimpleNamespace(func=lambda x: x)
    loss = types.SimpleNamespace(f1=kl, h2=kl)
    with pytest.raises(ValueError, match="loss='sqeucl', got another loss"):
        transport.certificate(problem(xx, xx, loss=loss))
    with pytest.raises(TypeError, match="pass the problem, then the solution"):
        transport.certificate(types.SimpleNamespace(linear_state=None))


def test_twenty_thousand_points_need_no_square_array():
    n, rank = 20_000, 5
    graph = ProductGraph(*np.zeros((2, rank, n), np.float32))
    solution = types.SimpleNamespace(q=np.full((n, 3), 1 / n / 3), g=np.full(3, 1 / 3))
    solution.r = solution.q
    plan = implementation.as_candidate(solution, n, n, 2, (None, None))
    options = implementation._Options(2, "none", "cheap", None)
    program = jax.make_jaxpr(
        lambda c, d: implementation._bracket(
            ((c, None), (d, None)), (0, 0), (None, None), jax.random.key(0), (plan,), graph, options
        )
    )(graph, graph)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                yield from (
                    sizes(getattr(inner, "jaxpr", inner))
                    if hasattr(getattr(inner, "jaxpr", inner), "eqns")
                    else ()
                )

    # Blocks of the nearest nodes of the linear term are the largest: 256 rows.
    assert max(sizes(program.jaxpr)) <= 256 * n
