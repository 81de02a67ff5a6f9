"""Bounds hold for the numbers given, whatever their scale and however nearly they agree.

And what a search calls converged is so. `python -m tests.rigs guarantees` tries the same
on 10,000 pairs of graphs and 100,000 rows of logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import transport
from logitjax.fusion import DynamicFusion
from logitjax.transport import FactoredGraph, Refinement
from logitjax.transport._sorted import Coupling
from tests._compiled import compiled
from tests.rigs import _guarantees_fusion as rows_of_logits
from tests.rigs import _guarantees_transport as fuzzer


def identity(n):
    nodes = np.arange(n, dtype=np.int32)
    return Coupling(nodes, nodes, np.full(n, 1 / n, np.float32))


def exact_cost(z, w, columns):
    z, w = np.float64(z), np.float64(w)[:, columns]
    return np.square(z.T @ z - w.T @ w).mean()


def nearly_equal(positions, nodes, noise, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(positions, nodes)).astype(np.float32)
    return z, (z + noise * rng.normal(size=z.shape)).astype(np.float32)


@pytest.mark.every_change
@pytest.mark.slow
def test_the_cost_of_the_identity_keeps_its_digits_where_squares_would_cancel():
    z, w = nearly_equal(8, 5_000, 3e-5)
    expected = exact_cost(z, w, np.arange(5_000))
    graphs = FactoredGraph(z), FactoredGraph(w)
    got = jax.jit(transport.gw_at_coupling)(*graphs, identity(5_000))
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    answer = transport.certificate(*graphs, scale="none", candidates=[identity(5_000)])
    assert 0 < answer.lower <= expected <= answer.upper <= expected * (1 + 1e-6)


@pytest.mark.every_change
@pytest.mark.slow
def test_sparse_graphs_keep_their_digits_too(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(9, 3)).astype(np.float32)
    ids = np.argsort(rng.random((9, 12)), -1)[:, :3].astype(np.int32)
    moved = (values + 3e-5 * rng.normal(size=values.shape)).astype(np.float32)
    z, w = np.zeros((2, 9, 12))
    np.put_along_axis(z, ids, values, -1)
    np.put_along_axis(w, ids, moved, -1)
    monkeypatch.setattr("logitjax.transport._coupling._EXACT_PAIRS", 0)
    graphs = (FactoredGraph(x, ids, 12) for x in (values, moved))
    got = jax.jit(lambda *x: transport.gw_at_coupling(*x))(*graphs, identity(12))
    np.testing.assert_allclose(got, exact_cost(z, w, np.arange(12)), rtol=1e-3)


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True])
def test_nearly_equal_permuted_graphs_are_bracketed(traced):
    z, w = nearly_equal(4, 7, 1e-5)
    order = np.random.default_rng(1).permutation(7)
    least = exact_cost(z, w, np.arange(7))
    run = transport.certificate
    if traced:
        run = jax.jit(run, static_argnames="scale")
    answer = run(FactoredGraph(z), FactoredGraph(w[:, order]), scale="none")
    assert 0 <= answer.lower <= least <= answer.upper * (1 + 1e-6)
    assert traced or answer.upper < least * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.every_change
def test_nearly_equal_permuted_graphs_are_bracketed_by_the_third_bound():
    z, w = nearly_equal(4, 7, 1e-5)
    order = np.random.default_rng(1).permutation(7)
    answer = transport.certificate(
        FactoredGraph(z),
        FactoredGraph(w[:, order]),
        bounds="third",
        refine=Refinement("exchange"),
        scale="none",
    )
    least = exact_cost(z, w, np.arange(7))
    assert 0.1 * least < answer.lower <= least * (1 + 1e-6)
    assert least <= answer.upper * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.every_change
def test_graphs_that_are_constant_or_zero_give_numbers():
    answer = transport.certificate(
        np.ones((3, 3), np.float32), np.ones((5, 5), np.float32), bounds="third"
    )
    assert answer.lower == 0
    assert answer.upper < 1e-10
    weights = np.float32([0.2, 0.3, 0.5])
    zeros = np.zeros((3, 3), np.float32)
    answer = transport.certificate(zeros, zeros, c_weights=weights, bounds="third")
    assert answer.lower == answer.upper == 0
    assert answer.gap == 1


@pytest.mark.slow
@pytest.mark.every_change
def test_a_graph_of_zeros_does_not_set_the_scale_of_a_tiny_one():
    """Its squares fell below what rounding is allowed for: lower was 0 and upper 10."""
    tiny = np.float32(1e-14) * np.float32([[4, 1], [1, 3]])
    answer = transport.certificate(np.zeros((2, 2), np.float32), tiny)
    np.testing.assert_allclose([answer.lower, answer.upper], 1, rtol=1e-5)


@pytest.mark.every_change
@pytest.mark.slow
def test_graphs_of_any_scale_are_measured_and_a_cost_beyond_float32_is_refused():
    rng = np.random.default_rng(0)
    c, d = np.square(rng.normal(size=(2, 6, 6))).astype(np.float32)
    plain = transport.certificate(c, d)
    assert plain.lower > 0
    for scale in (1e25, 1e-25):
        answer = transport.certificate(np.float32(scale) * c, np.float32(scale) * d)
        np.testing.assert_allclose(answer.upper, plain.upper, rtol=1e-5)
        np.testing.assert_allclose(answer.lower, plain.lower, rtol=1e-5)
    unlike = np.float32(1e25) * c, np.float32(1e-25) * d
    with pytest.raises(ValueError, match="scale: expected units in which float32 holds the cost"):
        transport.certificate(*unlike)
    traced = jax.jit(transport.certificate)(*unlike)
    assert traced.lower > 1e38
    assert traced.upper == np.inf
    with pytest.raises(ValueError, match="scale: expected units"):
        transport.certificate(unlike[0], unlike[0][::-1], scale="none")


@pytest.mark.every_change
@pytest.mark.slow
def test_weights_have_to_sum_to_one_and_then_are_divided_by_their_sum():
    c, d = np.square(np.random.default_rng(0).normal(size=(2, 3, 3))).astype(np.float32)
    with pytest.raises(ValueError, match=r"c_weights: .* sum to one, got a sum of 0\.6"):
        transport.certificate(c, d, c_weights=np.float32([0.1, 0.2, 0.3]))
    with pytest.raises(
        ValueError, match=r"d_weights: expected finite weights from zero up, got -0\.5"
    ):
        transport.first_lower_bound(c, d, d_weights=np.float32([-0.5, 0.5, 1.0]))
    run = jax.jit(lambda w: transport.certificate(c, d, c_weights=w))
    half, whole = run(np.float32([0.1, 0.1, 0.3])), run(np.float32([0.2, 0.2, 0.6]))
    np.testing.assert_allclose(half.upper, whole.upper, rtol=1e-5)
    assert half.lower <= half.upper


@pytest.mark.every_change
@pytest.mark.slow
def test_the_gap_of_identical_graphs_is_one():
    z = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    for graph in (FactoredGraph(z), z.T @ z):
        answer = transport.certificate(graph, graph)
        assert answer.lower == answer.upper == 0
        assert answer.gap == 1


@pytest.mark.every_change
@pytest.mark.slow
def test_a_negative_node_id_belongs_to_no_node():
    values = np.float32([[1.0, 2.0], [3.0, 4.0]])
    ids = np.int32([[0, -1], [1, 2]])
    features = compiled(transport.graph_features)
    for feature in ("row_sum", "row_rms"):
        got = features(values, ids, num_nodes=3, feature=feature)
        alone = features(
            values * np.float32([[1, 0], [1, 1]]), np.int32([[0, 1], [1, 2]]),
            num_nodes=3, feature=feature,
        )  # fmt: skip
        np.testing.assert_allclose(got, alone, rtol=1e-6)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_graph_has_a_node():
    with pytest.raises(ValueError, match="graph: expected at least one node, got 0"):
        transport.certificate(np.zeros((0, 0), np.float32), np.zeros((2, 2), np.float32))


@pytest.mark.slow
@pytest.mark.every_change
def test_a_problem_and_a_solution_of_ott_are_taken():
    from ott.geometry.geometry import Geometry
    from ott.problems.quadratic.quadratic_problem import QuadraticProblem
    from ott.solvers import quadratic

    z, w = nearly_equal(3, 5, 0.1)
    c, d = z.T @ z, w.T @ w
    problem = QuadraticProblem(Geometry(jnp.asarray(c)), Geometry(jnp.asarray(d)))
    solution = quadratic.solve(*(Geometry(jnp.asarray(x)) for x in (c, d)))
    answer = transport.certificate(problem, candidates=[solution])
    # A problem has its own units.
    plain = transport.certificate(c, d, scale="none")
    np.testing.assert_allclose(answer.lower, plain.lower, rtol=1e-5)
    assert answer.costs[0] >= answer.lower


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["factored", "weights, p = 1"])
def test_a_few_cases_of_the_fuzzer(kind, monkeypatch):
    monkeypatch.setattr(fuzzer, "_SHAPES", ((6, 4),))
    cases = [case | {"kind": kind} for case in fuzzer.run(kind, 20, seed=0)]
    _, bars = fuzzer.report(cases)
    assert all(bar.met for bar in bars), [bar for bar in bars if not bar.met]


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("method", ["jeffreys", "project"])
def test_root_searches_converge_to_their_roots(method):
    """At 12 sweeps up to 189 of 4,096 such rows had not: some 11 of 250.

    A row in 2,000 is not called converged, for its bound of rounding exceeds a hundredth of its
    target; which rows they are depends on the processor's instructions.
    """
    rng = np.random.default_rng(0)
    run = jax.jit(lambda *logits: DynamicFusion(method=method)(*logits)[1])
    for kind in ("student t", "peaked", "offsets"):
        logits = rows_of_logits.draw(kind, 250, rng)
        path = rows_of_logits.Path64.of(logits)
        counts = rows_of_logits.judge(path, method, jax.device_get(run(*logits)), None)
        failures = ("NaN", "worse", "false", "outside")
        assert not any(counts[name] for name in failures), (kind, counts)
        assert counts["unconverged"] <= 2, (kind, counts)
