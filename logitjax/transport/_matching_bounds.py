"""Lower bounds for matchings: for Gram matrices a permutation is an optimal coupling.

GW_2^2 of two positive semi-definite matrices of equal size and uniform weights is the minimum of a
concave function, taken at a permutation. It sends diagonal to diagonal, so that diagonals, which
carry most of the mass in graphs of logits, can be compared apart. Beyond the order in `_bounds`::

    diagonal <= gilmore_lawler <= GW,   third <= gilmore_lawler
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.transport import _graph as graphs
from logitjax.transport import _rounding as rounding
from logitjax.transport._bounds import check_equal_sizes, least_assignment, row_costs
from logitjax.transport._graph import FactoredGraph, Graph, RoundedMatrix
from logitjax.transport._rounding import Order, Scalar, Square, Vector


def diagonal_lower_bound(c: Graph, d: Graph) -> Float[jax.Array, ""]:
    """`moment_lower_bound` with separate diagonals; no n x n numbers.

    With c the diagonal and mu, s, r mean, deviation and RMS of the rest of each row, all sorted::

        (|c - d|^2 + (n - 1) max(|mu - mu'|^2 + |s - s'|^2, |r - r'|^2)) / n^2 <= GW_2^2(C, D)

    References:
        Gilmore (1962) and Lawler (1963), relaxed by Gelbrich's moments; its use here is ours.
    """
    check_equal_sizes(c, d, "diagonal_lower_bound")
    n = graphs.num_nodes(c)
    (local, own_error, *rest), (other, other_error, *others) = (_apart(g) for g in (c, d))
    value = _sorted_distance(local, other, own_error, other_error) + _rest_distance(rest, others)
    formed = sum(g.error for g in (c, d) if isinstance(g, RoundedMatrix))
    return rounding.lowered(value / n**2, p=2, relative=rounding.gamma(0), root=formed)


def gilmore_lawler(c: Graph, d: Graph, *, branches: int) -> tuple[Scalar, Order]:
    """The Gilmore-Lawler bound of the quadratic assignment, branched at the heaviest node; O(n^3).

    Matching node i with node k costs at least the difference of their diagonal entries, plus that
    of the rest of their rows when both are sorted; the best assignment by these costs bounds the
    best matching. The node with the largest diagonal entry is then matched with each of the
    `branches` most promising nodes in turn, which makes its row exact, and with any other at the
    cost of `diagonal_lower_bound`. The least of these counts::

        min_q sum_i [(C_ii - D_qq)^2 + sum_j (sort(C_i.)_j - sort(D_q.)_j)^2] / n^2 <= GW_2^2

    It also returns the matching ``[n]`` of the plain assignment, a good starting point.

    References:
        Gilmore, Optimal and suboptimal algorithms for the quadratic assignment problem (1962);
        Lawler, The quadratic assignment problem (1963).
    """
    check_equal_sizes(c, d, "gilmore_lawler")
    c, d = (graphs.rounded(g) for g in jax.lax.stop_gradient((c, d)))
    x, y = c.matrix, d.matrix
    n = len(x)
    plain, matching = _assign(x, y, jnp.zeros_like(x))
    branches = min(branches, n)
    if branches and n > 2:
        heaviest = jnp.argmax(jnp.diag(x))
        # The least floors.
        least, partners = jax.lax.top_k(-_pinned(x, y), branches)
        matched = jax.lax.map(lambda k: _assign_rest(x, y, heaviest, k), partners)
        # Every untried partner costs at least as much as the last one tried.
        untried = jnp.inf if branches == n else -least[-1]
        branched = jnp.minimum(matched.min(), jnp.maximum(untried, plain))
        plain = jnp.maximum(plain, branched)
    return rounding.lowered(
        plain / n**2, p=2, relative=rounding.gamma(4 * n), root=c.error + d.error
    ), matching


def _assign(x: Square, y: Square, linear: Square) -> tuple[Scalar, Order]:
    """Least sum of assignment costs, diagonals and sorted rests separately, and the assignment."""
    n = len(x)
    rest, others = (jnp.sort(_off_diagonal(m), axis=1) for m in (x, y))
    local, other = jnp.diag(x), jnp.diag(y)
    costs = linear + jnp.square(local[:, None] - other)
    if n > 1:
        costs += (n - 1) * row_costs(rest, others, 2)
    return least_assignment(costs)


def _assign_rest(x: Square, y: Square, h: Int[jax.Array, ""], k: Int[jax.Array, ""]) -> Scalar:
    """The same once node h is matched with k: their own rows are exact, and count twice."""
    rest, others = _others(len(x), h), _others(len(x), k)
    column = jnp.square(x[rest, h][:, None] - y[others, k])
    value, _ = _assign(x[rest][:, rest], y[others][:, others], 2 * column)
    return value + jnp.square(x[h, h] - y[k, k])


def _others(n: int, node: Int[jax.Array, "*row"]) -> Int[jax.Array, "*rest"]:
    index = jnp.arange(n - 1)
    return jnp.where(index < node, index, index + 1)  # all but node


def _pinned(x: Square, y: Square) -> Vector:
    """`diagonal_lower_bound` times n^2, with the heaviest node of x matched with each node of y."""
    (local, _, *rest), (other, _, *others) = _apart(x), _apart(y)
    order = jnp.argsort(-other)
    a, b = -jnp.sort(-local), other[order]
    zero = jnp.zeros(1, a.dtype)
    # The j-th largest of y is removed: those above it shift to the next of x, those below stay.
    above = jnp.concatenate([zero, jnp.cumsum(jnp.square(a[1:] - b[:-1]))])
    below = jnp.concatenate([jnp.cumsum(jnp.square(a[1:] - b[1:])[::-1])[::-1], zero])
    pinned = jnp.square(a[0] - b) + above + below + _rest_distance(rest, others)
    return jnp.zeros_like(pinned).at[order].set(pinned)


def _apart(graph: Graph) -> tuple[jax.Array, ...]:
    """Diagonal ``[n]`` and its error; mean, deviation, RMS of the other entries of rows; theirs."""
    n = graphs.num_nodes(graph)
    local, others = graphs.diagonal(graph), max(n - 1, 1)
    if not isinstance(graph, FactoredGraph):
        # Without subtraction of squares.
        rest = _off_diagonal(graphs.dense_matrix(graph))
        count, own_error = rounding.gamma(2 * n), jnp.zeros_like(local)
        mean = rest.sum(1) / others
        deviation = rounding.safe_sqrt(jnp.square(rest - mean[:, None]).sum(1) / others)
        rms = rounding.safe_sqrt(jnp.square(rest).sum(1) / others)
        mean_error = count * jnp.abs(rest).sum(1) / others
        errors = mean_error, mean_error + count * deviation, count * rms
    else:
        s = graphs.row_statistics(graph, None)
        own_error = rounding.gamma(len(graph.values)) * local
        # The statistics include all n entries of a row: subtract its diagonal one.
        mean = (n * s.mean - local) / others
        small = rounding.gamma(0) * (n * jnp.abs(s.mean) + local)
        mean_error = (n * s.mean_error + own_error + small) / others
        square = (n * s.square - local * local) / others
        small = rounding.gamma(0) * (n * jnp.abs(s.square) + local * local)
        square_error = (n * s.square_error + 3 * own_error * local + small) / others
        rms = rounding.safe_sqrt(square)
        deviation, deviation_error = rounding.deviation_of(mean, square, mean_error, square_error)
        errors = mean_error, deviation_error, rounding.sqrt_error(square, square_error)
    return (
        local,
        jax.lax.stop_gradient(own_error),
        mean,
        deviation,
        rms,
        *jax.lax.stop_gradient(errors),
    )


def _rest_distance(rest: list[jax.Array], others: list[jax.Array]) -> Scalar:
    (mean, deviation, rms, *errors), (mean_, deviation_, rms_, *errors_) = rest, others
    moments = _sorted_distance(mean, mean_, errors[0], errors_[0])
    moments += _sorted_distance(deviation, deviation_, errors[1], errors_[1])
    return (len(mean) - 1) * jnp.maximum(
        moments, _sorted_distance(rms, rms_, errors[2], errors_[2])
    )


def _sorted_distance(f: Vector, g: Vector, f_error: Vector, g_error: Vector) -> Scalar:
    """An upper bound of the squared distance of the sorted true features, by their errors."""
    n = len(f)
    raw = jnp.sum(jnp.square(jnp.sort(f) - jnp.sort(g)))
    root = jnp.sqrt(jnp.sum(jnp.square(f_error))) + jnp.sqrt(jnp.sum(jnp.square(g_error)))
    return rounding.lowered(
        raw, p=2, relative=rounding.gamma(n), root=root * (1 + rounding.gamma(n))
    )


def _off_diagonal(x: Square) -> Float[jax.Array, "n rest"]:
    return jnp.take_along_axis(x, _others(len(x), jnp.arange(len(x))[:, None]), axis=1)
