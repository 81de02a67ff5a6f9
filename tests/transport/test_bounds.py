"""Every guarantee, against brute force over all matchings of small graphs.

For Gram matrices GW_2^2 is the minimum of a concave function over couplings, so that a permutation
is optimal and the brute force exact.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from logitjax import transport
from logitjax.transport import FactoredGraph, _refine
from logitjax.transport._answer import towards
from logitjax.transport._bounds import moment_lower_bound, third_lower_bound
from logitjax.transport._matching_bounds import diagonal_lower_bound, gilmore_lawler
from logitjax.transport._sorted import Coupling
from tests._compiled import compiled

N, T = 6, 5
certificate = compiled(transport.certificate)
first = compiled(transport.first_lower_bound)
third = compiled(third_lower_bound)
lawler = compiled(gilmore_lawler)


def families(cases):
    """Factors Z, W ``[cases, T, N]`` of all kinds of graph that logits give, and others."""
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(2, cases, T, N))
    kind = np.arange(cases) % 6
    sparse = np.where(rng.random((2, cases, T, N)) < 0.4, np.abs(3 + 2 * np.stack([z, w])), 0.0)
    kinds = [
        (z, w),  # dense Gaussian
        (-np.sort(-z - 3), -np.sort(-w - 3)),  # rank nodes, positive
        (-np.sort(-z), -np.sort(-w)),  # rank nodes, mixed signs
        tuple(sparse),  # token nodes
        (z, z[..., rng.permutation(N)] + 1e-2 * w),  # nearly isomorphic
        (np.exp(2 * z), 1.5 * np.exp(2 * z)[..., ::-1]),  # heavy tails; a multiple of the other
    ]
    z = np.choose(kind[:, None, None], [pair[0] for pair in kinds])
    w = np.choose(kind[:, None, None], [pair[1] for pair in kinds])
    # Joint scaling, so that one tolerance fits all.
    scale = np.sqrt(np.linalg.norm(np.swapaxes(w, 1, 2) @ w, axis=(1, 2)) / N)
    return (z / scale[:, None, None]).astype(np.float32), (w / scale[:, None, None]).astype(
        np.float32
    )


def brute_force(c, d, p):
    """Least cost over all permutations, one of which is optimal for p = 2 and Gram matrices."""
    q = np.asarray(list(itertools.permutations(range(c.shape[-1]))))
    moved = d[q[:, :, None], q[:, None, :]]
    return jnp.min(jnp.mean(jnp.abs(c - moved) ** p, axis=(1, 2)))


def bracket(z, w):
    c, d = z.T @ z, w.T @ w
    out = {}
    for p in (1, 2):
        out[f"exact{p}"] = brute_force(c, d, p)
        out[f"first{p}"] = transport.first_lower_bound(FactoredGraph(z), FactoredGraph(w), p=p)
        out[f"third{p}"] = third_lower_bound(c, d, p=p)
        out[f"upper{p}"] = transport.certificate(c, d, p=p, scale="none").upper
    out["moment2"] = moment_lower_bound(FactoredGraph(z), FactoredGraph(w))
    out["diagonal2"] = diagonal_lower_bound(FactoredGraph(z), FactoredGraph(w))
    out["lawler2"] = gilmore_lawler(c, d, branches=0)[0]
    out["branched2"] = gilmore_lawler(c, d, branches=2)[0]
    out["all_branches2"] = gilmore_lawler(c, d, branches=N)[0]
    rms = (transport.graph_features(x, feature="row_rms") for x in (z, w))
    out["rms2"] = transport.sorted_gw_lower_bound(*rms, p=2)
    for refine in ("exchange", "search"):
        answer = transport.certificate(
            FactoredGraph(z),
            FactoredGraph(w),
            scale="none",
            refine=transport.Refinement(refine, restarts=2),
        )
        out[f"{refine}2"] = answer.upper
        out[f"mass_{refine}"] = jnp.abs(
            jnp.zeros(N).at[answer.coupling.columns].add(answer.coupling.mass) - 1 / N
        ).sum()
    return out


@pytest.mark.slow
def test_no_violation_in_1000_cases():
    graphs = families(1000)

    def values(graphs):
        program = jax.jit(lambda *x: jax.lax.map(lambda y: bracket(*y), x, batch_size=50))
        return jax.device_get(program(*graphs))

    got = values(graphs)
    with jax.enable_x64(True):
        precise = values([np.float64(graph) for graph in graphs])

    def below(low, high):
        excess = got[low] - got[high] * (1 + 1e-5)
        assert (excess <= 2e-6).all(), (low, high, excess.max(), int(excess.argmax()) % 6)

    def in_order(low, high):
        # Only so: float32's rounding is taken off one bound more than off another.
        excess = precise[low] - precise[high]
        assert (excess <= 1e-10).all(), (low, high, excess.max(), int(excess.argmax()) % 6)

    for p in "12":
        in_order(f"first{p}", f"third{p}")
        below(f"third{p}", f"exact{p}")
        below(f"exact{p}", f"upper{p}")
    in_order("first2", "moment2")
    in_order("diagonal2", "lawler2")
    in_order("third2", "lawler2")
    in_order("lawler2", "branched2")
    in_order("branched2", "all_branches2")
    below("all_branches2", "exact2")
    # Branching is not idle: somewhere it is what decides.
    assert (got["branched2"] > got["lawler2"] * 1.01).any()
    in_order("rms2", "moment2")
    in_order("moment2", "third2")
    for refine in ("exchange", "search"):
        below("exact2", f"{refine}2")
        in_order(f"{refine}2", "upper2")
        assert (got[f"mass_{refine}"] < 1e-6).all()
    in_order("search2", "exchange2")
    # The search is not only valid but nearly always finds the optimum of these small cases.
    assert np.mean(got["search2"] <= got["exact2"] * 1.0001 + 1e-6) > 0.9


@pytest.mark.slow
@pytest.mark.every_change
def test_seven_nodes():
    rng = np.random.default_rng(1)
    z, w = rng.normal(size=(2, 16, 4, 7)).astype(np.float32)

    def one(pair):
        x, y = pair
        c, d = x.T @ x, y.T @ y
        answer = transport.certificate(
            FactoredGraph(x),
            FactoredGraph(y),
            scale="none",
            bounds="third",
            refine=transport.Refinement("search"),
        )
        return answer.lower, brute_force(c, d, 2), answer.upper

    lower, exact, upper = jax.device_get(jax.jit(functools.partial(jax.lax.map, one))((z, w)))
    assert (lower <= exact * (1 + 1e-5)).all()
    assert (exact <= upper * (1 + 1e-5)).all()


def test_gilmore_lawler_equals_the_assignment_of_scipy():
    rng = np.random.default_rng(5)
    z, w = np.abs(rng.normal(size=(2, 4, 7)))
    c, d = z.T @ z, w.T @ w

    def plain(c, d, linear=0.0):
        n = len(c)
        off = ~np.eye(n, dtype=bool)
        x, y = (np.sort(m[off].reshape(n, n - 1), axis=1) for m in (c, d))
        costs = np.square(np.diag(c)[:, None] - np.diag(d)) + linear
        costs += np.square(x[:, None] - y).sum(-1)
        i, k = scipy.optimize.linear_sum_assignment(costs)
        return costs[i, k].sum()

    got = lawler(*np.float32([c, d]), branches=0)[0]
    np.testing.assert_allclose(got, plain(c, d) / 49, rtol=1e-5)
    h, values = np.argmax(np.diag(c)), []
    for k in range(7):
        rest, others = (np.delete(np.arange(7), node) for node in (h, k))
        exact = 2 * np.square(c[rest, h][:, None] - d[others, k])
        inner = plain(c[np.ix_(rest, rest)], d[np.ix_(others, others)], exact)
        values.append(inner + (c[h, h] - d[k, k]) ** 2)
    got = lawler(*np.float32([c, d]), branches=7)[0]
    np.testing.assert_allclose(got, min(values) / 49, rtol=1e-5)


def test_closed_form_is_exact_where_one_graph_is_a_multiple_of_the_other():
    rng = np.random.default_rng(2)
    z = np.abs(rng.normal(size=(5, 9)))
    c = (z.T @ z).astype(np.float32)
    order = rng.permutation(9)
    d = 1.7 * c[order][:, order]
    answer = transport.certificate(c, d, p=1, scale="none")
    np.testing.assert_allclose(answer.lower, 0.7 * c.mean(), rtol=1e-5)
    np.testing.assert_allclose(answer.upper, answer.lower, rtol=1e-5)


def test_every_bound_is_blind_to_hexagon_and_two_triangles():
    """All rows of both graphs hold the same numbers, and yet they differ by 2/9."""

    def cycle(n):
        return np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0)

    hexagon = (cycle(6) + 2 * np.eye(6)).astype(np.float32)
    triangles = np.kron(np.eye(2), cycle(3)).astype(np.float32) + 2 * np.eye(6, dtype=np.float32)
    answer = certificate(
        hexagon, triangles, scale="none", bounds="third", refine=transport.Refinement("search")
    )
    np.testing.assert_allclose(answer.lower, 0.0, atol=1e-7)
    np.testing.assert_allclose(answer.upper, 2 / 9, rtol=1e-5)
    np.testing.assert_allclose(compiled(brute_force)(hexagon, triangles, 2), 2 / 9, rtol=1e-5)


def weighted_case():
    rng = np.random.default_rng(3)
    z, w = rng.normal(size=(4, 7)), rng.normal(size=(4, 5))
    a, b = rng.dirichlet(np.ones(7)), rng.dirichlet(np.ones(5))
    return [x.astype(np.float32) for x in (z.T @ z, w.T @ w, a, b)]


def test_unequal_sizes_and_weights_equal_scipy():
    c, d, a, b = weighted_case()
    f, g = c @ a, d @ b
    got = first(c, d, c_weights=a, d_weights=b)
    np.testing.assert_allclose(got, scipy.stats.wasserstein_distance(f, g, a, b), rtol=1e-2)
    got = first(c, d)
    expected = scipy.stats.wasserstein_distance(c.mean(1), d.mean(1))
    np.testing.assert_allclose(got, expected, rtol=1e-2)


def test_weighted_third_bound_is_just_below_the_linear_program():
    c, d, a, b = weighted_case()
    costs = np.array([[scipy.stats.wasserstein_distance(x, y, a, b) for y in d] for x in c])
    marginals = np.concatenate(
        [np.kron(np.eye(7), np.ones((1, 5))), np.kron(np.ones((1, 7)), np.eye(5))]
    )
    exact = scipy.optimize.linprog(
        costs.ravel(), A_eq=marginals, b_eq=np.concatenate([a, b]), bounds=(0, None)
    ).fun
    got = third(c, d, c_weights=a, d_weights=b, p=1)
    assert 0.98 * exact < np.asarray(got) <= exact * (1 + 1e-5)


@pytest.mark.slow
@pytest.mark.every_change
def test_weighted_certificate_brackets_and_its_coupling_has_the_weights_as_marginals():
    c, d, a, b = weighted_case()
    for p in (1, 2):
        answer = certificate(c, d, c_weights=a, d_weights=b, p=p, bounds="third", scale="none")
        plan = dense_plan(answer.coupling, 7, 5)
        np.testing.assert_allclose(plan.sum(1), a, atol=1e-6)
        np.testing.assert_allclose(plan.sum(0), b, atol=1e-6)
        assert 0 < answer.lower <= answer.upper
        cost = dense_cost(c, d, plan, p)
        # In float32 the rounding of the masses is paid for at the largest difference of entries.
        assert cost * (1 - 1e-6) <= answer.upper <= cost * 1.01


def dense_plan(coupling: Coupling, n, m):
    plan = np.zeros((n, m))
    np.add.at(plan, (np.asarray(coupling.rows), np.asarray(coupling.columns)), coupling.mass)
    return plan


def dense_cost(c, d, plan, p):
    difference = np.abs(np.asarray(c, np.float64)[:, :, None, None] - d[None, None]) ** p
    return np.einsum("ijkl,ik,jl->", difference, plan, plan)


@pytest.mark.slow
@pytest.mark.every_change
def test_scales():
    c, d, _, _ = weighted_case()
    d = d[:5, :5]
    c = c[:5, :5]
    kwargs = {"refine": transport.Refinement("exchange")}
    none = certificate(c, d, scale="none", **kwargs)
    joint = certificate(c, d, **kwargs)
    unit = np.square(d).mean()
    np.testing.assert_allclose(joint.upper, np.asarray(none.upper) / unit, rtol=1e-4)
    np.testing.assert_allclose(joint.gap, none.gap, rtol=1e-3)
    separate = certificate(3 * c, d, scale="separate")
    again = certificate(c, d, scale="separate")
    np.testing.assert_allclose(separate.upper, again.upper, rtol=1e-4)


def test_bad_inputs_name_the_culprit():
    c, d, a, _ = weighted_case()
    with pytest.raises(ValueError, match="refine: 'exchange' needs p=2, as many nodes"):
        transport.certificate(c, d, refine=transport.Refinement("exchange"))
    with pytest.raises(ValueError, match="d: diagonal_lower_bound needs as many nodes as c, 7"):
        diagonal_lower_bound(c, d)
    with pytest.raises(ValueError, match="p: expected at least 1"):
        transport.sorted_gw_lower_bound(a, a, p=0)


def test_numbers_are_rounded_away_from_each_other_and_float32_ones_stay():
    values = np.array([0.5, 1 + 2.0**-30, 1 - 2.0**-30])
    np.testing.assert_array_equal(towards(values, -1), np.float32([0.5, 1, 1 - 2.0**-24]))
    np.testing.assert_array_equal(towards(values, 1), np.float32([0.5, 1 + 2.0**-23, 1]))


def test_graphs_of_one_node_are_their_difference_apart():
    bound = lawler(np.float32([[2.0]]), np.float32([[5.0]]), branches=0)[0]
    np.testing.assert_allclose(bound, 9.0, rtol=1e-4)


def test_batches_are_sorted_row_by_row():
    f, g = np.random.default_rng(6).normal(size=(2, 3, 5)).astype(np.float32)
    for rows in (g, g[:, :4]):
        bounds = compiled(transport.sorted_gw_lower_bound)(f, rows)
        coupling = compiled(transport.sorted_coupling)(f, rows)
        for i in range(3):
            alone = compiled(transport.sorted_gw_lower_bound)(f[i], rows[i])
            np.testing.assert_allclose(bounds[i], alone, rtol=1e-6)
            one = compiled(transport.sorted_coupling)(f[i], rows[i])
            np.testing.assert_array_equal(coupling.rows[i], one.rows)


def test_a_climb_ends_after_its_steps_or_at_the_top():
    """Node 3 is worth the number of its partner, and each move takes it to the next one."""
    c, d = jnp.diag(jnp.array([0.0, 0, 0, 1])), jnp.diag(jnp.arange(4.0))

    def climb(steps):
        start = jnp.array([1, 2, 3, 0]), jnp.zeros(())
        return _refine._climb(lambda _, q: (q + 1) % 4, (c, d, None), start, steps)

    for steps, top in ((2, 2), (9, 3)):
        matching, value = jax.jit(climb, static_argnums=0)(steps)
        assert (int(matching[3]), float(value)) == (top, top)


def test_an_assignment_of_diagonals_takes_the_largest_to_the_largest():
    c, d = jnp.diag(jnp.array([3.0, 1, 2])), jnp.diag(jnp.array([1.0, 2, 3]))
    matching = jax.jit(lambda q: _refine._assignment((c, d, None), q))(jnp.arange(3))
    np.testing.assert_array_equal(matching, [2, 0, 1])


def test_fewer_partners_that_are_tried_give_no_higher_bound():
    z, w = np.abs(np.random.default_rng(1).normal(size=(2, 4, 7)))
    some, every = (lawler(*np.float32([z.T @ z, w.T @ w]), branches=n)[0] for n in (3, 7))
    assert some <= every * (1 + 1e-6)
