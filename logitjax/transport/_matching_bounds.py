"""Lower bounds that hold for matchings: of Gram matrices a permutation is an optimal coupling.

GW_2^2 of two positive semi-definite matrices of equal size and uniform weights is the minimum of a
concave function, taken at a permutation. A permutation sends diagonal to diagonal, which couplings
in general do not, so that diagonals can be compared apart; in graphs of logits they carry most of
the mass. Beyond the order in `logitjax.transport._bounds`::

    diagonal <= gilmore_lawler <= GW,   third <= gilmore_lawler,   spectral <= GW
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from logitjax.transport._bounds import check_equal_sizes, row_costs, safe_sqrt
from logitjax.transport._graph import Graph, dense_matrix, diagonal, moments, num_nodes


def diagonal_lower_bound(c: Graph, d: Graph) -> Float[jax.Array, ""]:
    """Diagonals, and means and deviations of the rest of each row, each sorted; no n x n numbers.

    What `moment_lower_bound` is to all entries, with the diagonals apart. With c the diagonal of C
    and mu, s, r mean, deviation and RMS of the n - 1 other entries of each row, all sorted::

        (|c - d|^2 + (n - 1) max(|mu - mu'|^2 + |s - s'|^2, |r - r'|^2)) / n^2 <= GW_2^2(C, D)

    Args:
        c: symmetric positive semi-definite matrix ``[n, n]``, or `FactoredGraph`. (The bound holds
            for permutations of any matrices.)
        d: the same, with as many nodes; uniform weights.

    Returns:
        A scalar.

    Raises:
        ValueError: if the numbers of nodes differ.

    >>> import jax.numpy as jnp
    >>> diagonal_lower_bound(jnp.diag(jnp.array([2.0, 0.0])), jnp.zeros((2, 2)))
    Array(1., dtype=float32)

    References:
        A relaxation of the bound of Gilmore (1962) and Lawler (1963) by Gelbrich's moments; its use
        for Gromov-Wasserstein is ours.
    """
    check_equal_sizes(c, d, "diagonal_lower_bound")
    (own, *rest), (other, *others) = (_apart(g) for g in (c, d))
    return (_sorted_distance(own, other) + _rest_distance(rest, others)) / num_nodes(c) ** 2


def gilmore_lawler_lower_bound(c: Graph, d: Graph, *, branches: int = 8) -> Float[jax.Array, ""]:
    """The Gilmore-Lawler bound of the quadratic assignment, branched at the heaviest node; O(n^3).

    Matching node i with node k costs at least what their diagonal entries differ by, and what the
    rest of their rows differs by when both are sorted; the best assignment by these costs bounds
    the best matching. The node with the largest diagonal entry is then matched with each of the
    ``branches`` most promising nodes in turn, which makes its row exact, and with any other at the
    price of `diagonal_lower_bound`. The least of these counts::

        min_q sum_i [(C_ii - D_qq)^2 + sum_j (sort(C_i.)_j - sort(D_q.)_j)^2] / n^2 <= GW_2^2

    Args:
        c: symmetric positive semi-definite matrix ``[n, n]``, or `FactoredGraph` (whose matrix is
            formed).
        d: the same, with as many nodes; uniform weights.
        branches: assignments solved beyond the first; 0 for the plain bound.

    Returns:
        A scalar without gradient, at least `third_lower_bound` up to rounding.

    Raises:
        ValueError: if the numbers of nodes differ.

    >>> import jax.numpy as jnp
    >>> gilmore_lawler_lower_bound(jnp.diag(jnp.array([2.0, 0.0])), jnp.zeros((2, 2)))
    Array(1., dtype=float32)

    References:
        Gilmore, Optimal and suboptimal algorithms for the quadratic assignment problem (1962);
        Lawler, The quadratic assignment problem (1963).
    """
    return gilmore_lawler(c, d, branches=branches)[0]


def spectral_lower_bound(c: Graph, d: Graph) -> Float[jax.Array, ""]:
    """The projected eigenvalue bound, p = 2, O(n^3): near where two graphs are nearly alike.

    A matching P maps the all-ones vector to itself and acts orthogonally on its complement. What
    the two parts can gain at best, apart from each other, bounds ``tr(C P D P^T)`` from above: for
    the complement the product of the sorted eigenvalues, for the rest a linear assignment. The
    diagonals are once kept in the quadratic part and once moved to the linear one; the better
    bound counts::

        (|C|^2 + |D|^2 - 2 max_P (...)) / n^2 <= GW_2^2(C, D)

    Args:
        c: symmetric positive semi-definite matrix ``[n, n]``, or `FactoredGraph`. (A permutation
            is then an optimal coupling; the bound holds for permutations of any symmetric ones.)
        d: the same, with as many nodes; uniform weights.

    Returns:
        A scalar without gradient.

    Raises:
        ValueError: if the numbers of nodes differ.

    >>> import jax.numpy as jnp
    >>> print(spectral_lower_bound(jnp.diag(jnp.array([2.0, 0.0])), jnp.zeros((2, 2))))
    1.0

    References:
        Hadley, Rendl, Wolkowicz, A new lower bound via projection for the quadratic assignment
        problem (1992).
    """
    check_equal_sizes(c, d, "spectral_lower_bound")
    x, y = jax.lax.stop_gradient((dense_matrix(c), dense_matrix(d)))
    n = len(x)

    def gain(x, y, linear):
        (r, mu), (s, nu) = _split(x), _split(y)
        linear = linear + 2 * jnp.outer(r, s) / n
        i, j = optax.assignment.hungarian_algorithm(-linear)
        return x.sum() * y.sum() / n**2 + linear[i, j].sum() + mu @ nu

    own, other = jnp.diag(x), jnp.diag(y)
    apart = gain(x - jnp.diag(own), y - jnp.diag(other), jnp.outer(own, other))
    best = jnp.minimum(gain(x, y, jnp.zeros_like(x)), apart)
    return jnp.maximum(jnp.square(x).sum() + jnp.square(y).sum() - 2 * best, 0.0) / n**2


def _split(x):
    """Centred row sums, and the eigenvalues on the complement of the all-ones vector, sorted."""
    rows = x.sum(1)
    centred = x - rows[:, None] / len(x)
    centred = centred - centred.mean(0)
    centred = (centred + centred.T) / 2
    # The all-ones direction has eigenvalue zero: move it above the others and leave it out.
    shift = 2 * jnp.sqrt(jnp.square(centred).sum()) + 1.0
    return rows - rows.mean(), jnp.linalg.eigvalsh(centred + shift / len(x))[:-1]


def gilmore_lawler(c, d, *, branches):
    """The bound, and the matching ``[n]`` of the plain assignment, a good one to start from."""
    check_equal_sizes(c, d, "gilmore_lawler_lower_bound")
    x, y = jax.lax.stop_gradient((dense_matrix(c), dense_matrix(d)))
    n = len(x)
    plain, matching = _assign(x, y, jnp.zeros((n, n)))
    branches = min(branches, n)
    if branches and n > 2:
        heaviest = jnp.argmax(jnp.diag(x))
        floors = _pinned(x, y)
        least, partners = jax.lax.top_k(-floors, branches)
        matched = jax.lax.map(lambda k: _assign_rest(x, y, heaviest, k), partners)
        # Every partner that was not tried costs at least as much as the last that was.
        untried = jnp.inf if branches == n else -least[-1]
        branched = jnp.minimum(matched.min(), jnp.maximum(untried, plain))
        plain = jnp.maximum(plain, branched)
    return plain / n**2, matching


def _assign(x, y, linear):
    """Least sum of assignment costs, diagonals and sorted rests apart, and who takes whom."""
    n = len(x)
    rest, others = (jnp.sort(_off_diagonal(m), axis=1) for m in (x, y))
    own, other = jnp.diag(x), jnp.diag(y)
    costs = linear + jnp.square(own[:, None] - other) + (n - 1) * row_costs(rest, others, 2)
    i, k = optax.assignment.hungarian_algorithm(costs)
    return costs[i, k].sum(), jnp.zeros(n, jnp.int32).at[i].set(k.astype(jnp.int32))


def _assign_rest(x, y, h, k):
    """The same once node h is matched with k: their own rows are exact, and count twice."""
    rest, others = _others(len(x), h), _others(len(x), k)
    column = jnp.square(x[rest, h][:, None] - y[others, k])
    value, _ = _assign(x[rest][:, rest], y[others][:, others], 2 * column)
    return value + jnp.square(x[h, h] - y[k, k])


def _others(n, node):
    index = jnp.arange(n - 1)
    return jnp.where(index < node, index, index + 1)


def _pinned(x, y):
    """`diagonal_lower_bound` times n^2, with the heaviest node of x matched with each node of y."""
    (own, *rest), (other, *others) = _apart(x), _apart(y)
    order = jnp.argsort(-other)
    a, b = -jnp.sort(-own), other[order]
    zero = jnp.zeros(1)
    # The j-th largest of y is taken: those above it serve the next of x, those below stay.
    above = jnp.concatenate([zero, jnp.cumsum(jnp.square(a[1:] - b[:-1]))])
    below = jnp.concatenate([jnp.cumsum(jnp.square(a[1:] - b[1:])[::-1])[::-1], zero])
    pinned = jnp.square(a[0] - b) + above + below + _rest_distance(rest, others)
    return jnp.zeros_like(pinned).at[order].set(pinned)


def _apart(graph):
    """Diagonal ``[n]``, and of the other entries of each row mean, deviation and RMS."""
    n = num_nodes(graph)
    own = diagonal(graph)
    mean, square = moments(graph, None)
    others = max(n - 1, 1)
    mean = (n * mean - own) / others
    square = jnp.maximum((n * square - own * own) / others, 0.0)
    return own, mean, safe_sqrt(square - mean * mean), safe_sqrt(square)


def _rest_distance(rest, others):
    (mean, deviation, rms), (mean_, deviation_, rms_) = rest, others
    moments_ = _sorted_distance(mean, mean_) + _sorted_distance(deviation, deviation_)
    return (len(mean) - 1) * jnp.maximum(moments_, _sorted_distance(rms, rms_))


def _sorted_distance(f, g):
    return jnp.sum(jnp.square(jnp.sort(f) - jnp.sort(g)))


def _off_diagonal(x):
    """``[n, n - 1]``: each row without its diagonal entry."""
    n = len(x)
    column = jnp.arange(n - 1)
    row = jnp.arange(n)[:, None]
    return jnp.take_along_axis(x, jnp.where(column < row, column, column + 1), axis=1)
