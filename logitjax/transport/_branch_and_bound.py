"""The optimum of small Gromov-Wasserstein problems, with a proof: branch and bound on the host.

If both matrices, centred, are positive semi-definite (or both negative), the cost is concave in the
coupling and the best coupling of uniform weights is a matching: a quadratic assignment problem. It
is bounded by duals of its first-level linearisation, the bound of Hahn and Grant. Any `alpha[i, k,
j]` and `beta[i, k, l]` with, for i not j and k not l, ::

    alpha[i, k, j] + beta[i, k, l] + alpha[j, l, i] + beta[j, l, k] <= 2 (C_ij - D_kl)^2

give one: the least assignment of ``(C_ii - D_kk)^2 + sum_j alpha[i, k, j] + sum_l beta[i, k, l]``.
The remainder of a pair (i, k) beyond that assignment returns to its alphas, every pair takes half
of the inequalities' slack, and so on. The n^4 differences are visited, n^3 numbers stored.
"""

import dataclasses
import itertools
import time
from typing import Any

import jax
import numpy as np
from scipy import optimize

from logitjax.ops import checks
from logitjax.transport._answer import Certificate
from logitjax.transport._bounds import check_equal_sizes
from logitjax.transport._graph import Graph, rounded
from logitjax.transport._sorted import Coupling

# Duals of 1 GiB each.
_MOST_NODES = 512
# Up to this many nodes matchings are improved by exchanges in Python.
_FEW_NODES = 64
# Entries visited together: as many as fit a core's cache.
_ENTRIES = 1 << 17
# Rounds of sharing at the root, and at the nodes of the tree, which continue their parent's.
_ROUNDS, _MORE_ROUNDS = 100, 8
_STARTS = 6
# Beyond it the newest nodes are opened instead of the best ones, which frees memory.
_MEMORY = 2 << 30
_EPSILON = float(np.finfo(np.float64).eps)


def branch_and_bound(
    c: Graph, d: Graph, *, seconds: float = 60.0, tolerance: float = 1e-6
) -> Certificate:
    """Compute the Gromov-Wasserstein cost of two small graphs, p = 2, as good as proven optimal.

    The graphs have equally many nodes, at most 512, and uniform weights. For Gram matrices, such as
    graphs of logits, about 16 nodes take seconds; beyond 30 the time is likely to run out, and the
    bounds proven until then are returned. It runs on the host in float64, without gradients.

    Args:
        c, d: symmetric matrices `[n, n]` or `FactoredGraph`.
        seconds: Time after which the search ends.
        tolerance: Relative gap of the bounds at which it ends.

    Returns:
        A `Certificate` in the units of the graphs, in float64. The optimum is proven if `upper <=
        lower * (1 + 2 * tolerance)`.

    Raises:
        ValueError: sizes differ or are too large, entries are not finite or not symmetric, or the
            graphs are of a kind whose best coupling need not be a matching: centred, one has
            eigenvalues of both signs, or they have different ones.

    >>> import numpy as np
    >>> from logitjax.transport import branch_and_bound
    >>> z, w = np.random.default_rng(0).normal(size=(2, 20, 6))
    >>> answer = branch_and_bound(z.T @ z, w.T @ w)
    >>> bool(0 < answer.lower <= answer.upper <= 1.00001 * answer.lower)
    True

    References:
        Hahn and Grant, Lower bounds for the quadratic assignment problem based upon a dual
        formulation (1998). Matchings are optimal: Maron and Lipman, (Probably) concave graph
        matching (2018). Starting the duals from sorted rows (Gilmore and Lawler) is ours: it proves
        graphs of ranks by itself.
    """
    check_equal_sizes(c, d, "branch_and_bound")
    with jax.enable_x64(True):
        graphs = [rounded(graph) for graph in (c, d)]
    x, y = (np.asarray(graph.matrix, np.float64) for graph in graphs)
    n = len(x)
    if not 1 <= n <= _MOST_NODES:
        raise ValueError(f"c: expected 1 to {_MOST_NODES} nodes, got {n}")
    for name, matrix in (("c", x), ("d", y)):
        checks.values(matrix, np.isfinite, name, "finite entries")
        if np.abs(matrix - matrix.T).max() > 1e-9 * np.abs(matrix).max():
            raise ValueError(f"{name}: expected a symmetric matrix, got another")
    # Scaled so that squares neither overflow nor vanish.
    exponent = int(np.frexp(max(np.abs(x).max(), np.abs(y).max()))[1])
    root = sum(float(np.ldexp(float(graph.error), -exponent)) for graph in graphs)
    x, y = (np.ldexp((m + m.T) / 2, -exponent) for m in (x, y))
    root += _indefinite(x, y) + 4 * n * _EPSILON
    search = _Search(x, y, time.monotonic() + seconds, tolerance)
    lower, upper = (value / n**2 for value in search.run())
    # The root of the cost moves by no more than the matrices do.
    lower = max(np.sqrt(max(lower, 0.0)) - root, 0.0) ** 2 * (1 - 1e-15)
    exact = np.array_equal(x, y[np.ix_(search.matching, search.matching)]) and root < 1e-12
    upper = 0.0 if exact and upper == 0 else (np.sqrt(upper) + root) ** 2 * (1 + 1e-15)
    if (upper > 0) and not 1e-300 < np.ldexp(upper, 2 * exponent) < 1e300:
        raise ValueError(f"c: expected entries whose squares float64 holds, got 2^{exponent}")
    plan = Coupling(np.arange(n), search.matching, np.full(n, 1 / n))
    lower, upper = (np.asarray(np.ldexp(value, 2 * exponent)) for value in (lower, upper))
    nothing = np.zeros(0)
    return Certificate(lower, upper, plan, np.ones(2), nothing, nothing, nothing.astype(bool))


def _indefinite(x: np.ndarray, y: np.ndarray) -> float:
    """Bound how far the root of the cost moves until centred matrices are definite, of one sign."""
    n = len(x)
    values = []
    for matrix in (x, y):
        centred = matrix - matrix.mean(0)
        values.append(np.linalg.eigvalsh(centred - centred.mean(1, keepdims=True)))
    wrong = min(
        max(max(-(sign * v).min(), 0.0) for v in values) for sign in (1, -1)
    ) + 8 * n * _EPSILON * max(np.abs(v).max() for v in values)
    # Gram matrices in float32 are off by this much, which widens the bounds.
    if wrong > 1e-6 * n:
        raise ValueError(
            "c: expected graphs that are both positive or both negative semi-definite after "
            f"centring, like Gram matrices and squared distances, got an eigenvalue {wrong:g} off"
        )
    # It is added to the diagonals, whose mean square is this much in L_2 of all entries.
    return 2 * wrong / np.sqrt(n)


@dataclasses.dataclass
class _Node:
    """The remaining problem once some nodes are matched, at the cost `paid`, with its duals."""

    paid: float
    matched: tuple[tuple[int, int], ...]
    # The free nodes of either graph, their matrices, and the cost of each pair by itself.
    rows: np.ndarray
    columns: np.ndarray
    x: np.ndarray
    y: np.ndarray
    nodes: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    # The bound, its possible rounding error, and the costs of pairs beyond it.
    constant: float = 0.0
    doubt: float = 0.0
    rest: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

    def matching(self, row: int, column: int) -> "_Node":
        """The node with one more match, whose costs with all others are added to theirs."""
        i, k = (np.delete(np.arange(len(self.nodes)), index) for index in (row, column))
        pair = int(self.rows[row]), int(self.columns[column])
        apart = np.square(self.x[i, row][:, None] - self.y[k, column])
        return _Node(
            self.paid + float(self.nodes[row, column]),
            (*self.matched, pair),
            self.rows[i],
            self.columns[k],
            self.x[np.ix_(i, i)],
            self.y[np.ix_(k, k)],
            self.nodes[np.ix_(i, k)] + 2 * apart,
            self.alpha[np.ix_(i, k, i)],
            self.beta[np.ix_(i, k, k)],
        )

    def pay(self) -> np.ndarray:
        """Split off the cost that every assignment pays; return the best assignment."""
        costs = self.nodes + self.alpha.sum(2) + self.beta.sum(2)
        value, self.rest, columns = _assignment(costs)
        self.constant = self.paid + value
        # Each of m^2 inequalities has a few roundings, and so do the sums of 2 m duals.
        m, duals = len(costs), max(np.abs(self.alpha).max(), np.abs(self.beta).max())
        largest = np.square(self.x.max() - self.y.min()) + np.square(self.x.min() - self.y.max())
        each = 16 * (largest + duals) + 2 * m * duals + np.abs(costs).max()
        self.doubt = 4 * _EPSILON * (m * m * each + self.paid)
        return columns

    def share(self, turn: int, deadline: float) -> None:
        """One round, or part of it; rows and columns take turns to be first."""
        m = len(self.nodes)
        self.alpha -= (self.rest / (m - 1))[:, :, None]
        self.alpha[range(m), :, range(m)] = 0
        # Each of the two orders of two pairs has one half.
        halves = [np.ascontiguousarray(x.transpose(2, 0, 1)) / 2 for x in (self.alpha, self.beta)]
        new = np.zeros_like(self.alpha), np.zeros_like(self.beta)
        width = max(1, min(m, _ENTRIES // m**2))
        height = max(1, min(m, _ENTRIES // (width * m**2)))
        for i, k in itertools.product(range(0, m, height), range(0, m, width)):
            if time.monotonic() > deadline:
                break
            here = slice(i, i + height), slice(k, k + width)
            slack = self.x[here[0], None, :, None] - self.y[None, here[1], None, :]
            slack *= slack
            slack -= halves[0][here[0], None]
            slack -= halves[1][None, here[1]]
            slack -= self.alpha[here][..., None] / 2
            slack -= self.beta[here][:, :, None] / 2
            local, other = range(slack.shape[0]), range(slack.shape[1])
            # A node cannot be matched twice.
            slack[local, :, range(i, i + len(local))] = np.inf
            slack[:, other, :, range(k, k + len(other))] = np.inf
            for axis in ((3, 2), (2, 3))[turn % 2]:
                least = slack.min(axis, keepdims=True)
                least[np.isinf(least)] = 0
                slack -= least
                new[axis == 2][here] = least.squeeze(axis)
        self.alpha += new[0]
        self.beta += new[1]


class _Search:
    def __init__(self, x: np.ndarray, y: np.ndarray, deadline: float, tolerance: float) -> None:
        self.x, self.y, self.deadline, self.tolerance = x, y, deadline, tolerance
        self.best, self.matching, self.doubt = np.inf, np.arange(len(x)), 0.0

    def run(self) -> tuple[float, float]:
        """A lower bound of n^2 times the cost, and the cost of `matching`."""
        self._improve()
        node = _start(self.x, self.y)
        self._share(node, _ROUNDS)
        # A child is created when it is opened: its parent, row and column, and a bound.
        nodes: list[tuple[float, _Node, int, int]] = []
        while True:
            if node.constant < self._target:
                nodes += self._children(node)
            nodes = [entry for entry in nodes if entry[0] < self._target]
            if not nodes or time.monotonic() > self.deadline:
                lower = min((entry[0] for entry in nodes), default=self._target)
                return lower - self.doubt, self.best * (1 + 4 * len(self.x) ** 2 * _EPSILON)
            total = sum({id(parent): parent.alpha.nbytes for _, parent, _, _ in nodes}.values())
            best = min(range(len(nodes)), key=lambda i: nodes[i][0]) if total < _MEMORY else -1
            _, parent, row, column = nodes.pop(best)
            node = parent.matching(row, column)
            self._share(node, _MORE_ROUNDS)

    @property
    def _target(self) -> float:
        return self.best * (1 - self.tolerance)

    def _share(self, node: _Node, rounds: int) -> None:
        for turn in range(rounds + 1):
            matching = np.empty(len(self.x), int)
            matching[node.rows] = node.columns[node.pay()]
            for i, k in node.matched:
                matching[i] = k
            self._judge(matching)
            done = node.constant >= self._target or len(node.nodes) == 1 or turn == rounds
            if done or time.monotonic() > self.deadline:
                break
            node.share(turn, self.deadline)
        self.doubt = max(self.doubt, node.doubt)

    def _children(self, node: _Node) -> list[tuple[float, _Node, int, int]]:
        """Branch on the row or column whose partners differ most, one child per partner."""
        if len(node.nodes) == 1:
            return []
        costs = np.minimum(node.rest, max(self._target - node.constant, 0.0))
        rows, columns = costs.sum(1), costs.sum(0)
        m = range(len(costs))
        pairs = [(int(rows.argmax()), k) for k in m]
        if columns.max() > rows.max():
            pairs = [(i, int(columns.argmax())) for i in m]
        return [(node.constant + float(node.rest[pair]), node, *pair) for pair in pairs]

    def _judge(self, matching: np.ndarray) -> None:
        cost = float(np.square(self.x - self.y[np.ix_(matching, matching)]).sum())
        if cost < self.best:
            self.best, self.matching = cost, matching

    def _improve(self) -> None:
        """Initial matchings: conditional gradients and exchanges, from several starts."""
        n, rng = len(self.x), np.random.default_rng(0)
        order = np.argsort(np.argsort(self.x.sum(1)))
        starts = [np.arange(n), np.argsort(self.y.sum(1))[order]]
        starts += [rng.permutation(n) for _ in range(_STARTS if n <= _FEW_NODES else 0)]
        for start in starts:
            self._judge(start)
            plan = (np.eye(n)[start] + 1 / n) / 2
            common: Any = {"maximize": True, "rng": rng}
            options = common | {"P0": plan}
            result = optimize.quadratic_assignment(self.x, self.y, options=options).col_ind
            self._judge(result)
            if n > _FEW_NODES:
                continue
            options = common | {"partial_guess": np.stack([np.arange(n), result], 1)}
            result = optimize.quadratic_assignment(self.x, self.y, method="2opt", options=options)
            self._judge(result.col_ind)


def _start(x: np.ndarray, y: np.ndarray) -> _Node:
    """The root: each pair of nodes pays the cost of its sorted rows, in closed form."""
    n, index = len(x), np.arange(len(x))
    alpha, beta = np.zeros((n, n, n)), np.zeros((n, n, n))
    if n > 1:
        others = np.broadcast_to(index, (n, n))[~np.eye(n, dtype=bool)].reshape(n, n - 1)
        orders = [np.take_along_axis(m, others, 1).argsort(1) for m in (x, y)]
        orders = [np.take_along_axis(others, order, 1) for order in orders]
        local, other = (np.take_along_axis(m, o, 1) for m, o in zip((x, y), orders, strict=True))
        # For sorted numbers the matching in order is best, and tight next to it (Monge): duals.
        along = np.square(local[:, None] - other)
        v = np.zeros_like(along)
        np.cumsum(
            np.square(local[:, None, :-1] - other[:, 1:]) - along[..., :-1], 2, out=v[..., 1:]
        )
        np.put_along_axis(alpha, np.broadcast_to(orders[0][:, None], v.shape), along - v, -1)
        np.put_along_axis(beta, np.broadcast_to(orders[1], v.shape), v, -1)
    nodes = np.square(np.diag(x)[:, None] - np.diag(y))
    return _Node(0.0, (), index, index, x, y, nodes, alpha, beta)


def _assignment(costs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Bound the cost of every assignment: the non-negative remainders, and the best assignment."""
    rows, columns = optimize.linear_sum_assignment(costs)
    matched, v = costs[rows, columns], np.zeros(len(costs))
    # Prices by shortest paths; any prices are valid.
    for _ in range(len(costs)):
        shorter = np.minimum(v, ((v[columns] - matched)[:, None] + costs).min(0))
        if np.array_equal(shorter, v):
            break
        v = shorter
    u = (costs - v).min(1)
    rest = costs - u[:, None] - v
    least = rest.min(0)
    return float(u.sum() + v.sum() + least.sum()), np.maximum(rest - least, 0.0), columns
