"""A two-sided answer: no lower than this, no higher than that, and the coupling that shows it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.transport._bounds import (
    first_lower_bound,
    moment_lower_bound,
    second_lower_bound,
    sorted_rows_lower_bound,
    third_lower_bound,
)
from logitjax.transport._coupling import gw_at_coupling
from logitjax.transport._graph import (
    FactoredGraph,
    Graph,
    dense_matrix,
    moments,
    multiply,
    num_nodes,
)
from logitjax.transport._matching_bounds import (
    diagonal_lower_bound,
    gilmore_lawler,
    spectral_lower_bound,
)
from logitjax.transport._refine import Refinement, refine_matching
from logitjax.transport._sorted import Coupling, sorted_coupling

Scale = Literal["joint", "separate", "none"]
Bounds = Literal["cheap", "sorted_rows", "third"]

# Up to this many nodes a graph of more positions than nodes is multiplied out.
_DENSE_NODES = 2048


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """``lower <= GW_p^p <= upper``, the upper one reached by ``coupling``."""

    lower: Array
    upper: Array
    coupling: Coupling

    @property
    def gap(self) -> jax.Array:
        """upper / lower, at least one up to rounding; infinite if the lower bound is zero."""
        return jnp.asarray(self.upper) / self.lower


def certificate(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
    scale: Scale = "joint",
    bounds: Bounds = "cheap",
    refine: Refinement | None = None,
    key: jax.Array | None = None,
    candidates: Sequence[Coupling] = (),
) -> Certificate:
    """Bound the Gromov-Wasserstein cost of two graphs from both sides.

    Upper: nodes are matched in the order of their row means, row RMS and row deviations; the
    cheapest of these couplings and of ``candidates`` is kept, then improved by ``refine``, and its
    cost is evaluated. Improvement never makes it worse. Lower: the largest of the bounds asked for.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`.
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights that sum to one; uniform if left out.
        d_weights: the same for d.
        p: power of the cost; 1 or 2.
        scale: ``joint`` divides both graphs by the RMS entry of d, ``separate`` each by its own,
            ``none`` neither. The bounds are in these units.
        bounds: ``cheap``: `moment_lower_bound` (p = 2) or `first_lower_bound`; where a
            refinement would be allowed and both graphs are factored, so that a matching is
            optimal, also `diagonal_lower_bound`;
            ``sorted_rows``: also `sorted_rows_lower_bound` (with weights or unequal sizes
            `second_lower_bound`), n^2 log n; ``third``: also `third_lower_bound` or, for matchings,
            `gilmore_lawler_lower_bound` (whose assignment then is a candidate) and
            `spectral_lower_bound`, n^3.
        refine: how the coupling is improved; it needs p = 2, equal sizes and uniform weights. Left
            out, nothing of size n x n is made.
        key: ``jax.random.key`` of the restarts; ``jax.random.key(0)`` if left out.
        candidates: more couplings to start from, for example of a shared vocabulary.

    Returns:
        A `Certificate`. Gradients of ``upper`` are taken at the fixed coupling (envelope).

    Raises:
        ValueError: for unknown options, or a refinement outside its conditions.

    >>> import jax.numpy as jnp
    >>> from logitjax.transport import FactoredGraph, Refinement
    >>> z, how = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]), Refinement("exchange")
    >>> answer = certificate(FactoredGraph(z), FactoredGraph(z[:, ::-1] + 0.1), refine=how)
    >>> bool(0 < answer.lower), bool(answer.lower <= answer.upper), answer.coupling.rows.shape
    (True, True, (3,))

    References:
        Memoli (2011) for the bounds. That the coupling found by sorting is near the optimum on
        graphs of logits while the closed-form value is not, is an observation of ours; see
        ``python -m experiments.benchmark gromov_wasserstein``.
    """
    for name, value, kind in (
        ("scale", scale, Scale),
        ("bounds", bounds, Bounds),
    ):
        if value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {get_args(kind)}, got {value!r}")
    uniform = c_weights is None and d_weights is None and num_nodes(c) == num_nodes(d)
    if refine is not None and not (uniform and p == 2):
        raise ValueError(
            f"refine: {refine.kind!r} needs p=2, as many nodes in c as in d and no weights; "
            f"got p={p}, {num_nodes(c)} and {num_nodes(d)} nodes"
        )
    if scale != "none":
        d_scale = _rms(d, d_weights)
        c = multiply(c, 1.0 / (d_scale if scale == "joint" else _rms(c, c_weights)))
        d = multiply(d, 1.0 / d_scale)

    # Of Gram matrices a matching is optimal: its bounds hold, and its assignments are candidates.
    matching = uniform and p == 2 and all(isinstance(g, FactoredGraph) for g in (c, d))
    c, d = _densest(c), _densest(d)
    lower = [_lower(c, d, c_weights, d_weights, p, bounds, uniform)]
    if matching:
        lower.append(diagonal_lower_bound(c, d))
    if matching and bounds == "third":
        bound, assigned = gilmore_lawler(c, d, branches=8)
        lower += [bound, spectral_lower_bound(c, d)]
        candidates = [*candidates, _uniform(assigned)]
    coupling, _ = best_sorted_coupling(
        c, d, c_weights=c_weights, d_weights=d_weights, p=p, candidates=candidates
    )
    if refine is not None:
        fixed = jax.lax.stop_gradient((c, d))
        x, y = (dense_matrix(g) for g in fixed)
        start = jnp.zeros_like(coupling.columns).at[coupling.rows].set(coupling.columns)
        key = jax.random.key(0) if key is None else key
        refined = refine_matching(x, y, start, how=refine, key=key)
        # Compared once more by the cost itself, so that no rounding can make it worse.
        coupling, _ = _cheapest(*fixed, [coupling, _uniform(refined)], p)
    return Certificate(
        lower=jnp.max(jnp.stack(lower)),
        upper=gw_at_coupling(c, d, coupling, p=p),
        coupling=coupling,
    )


def _uniform(matching):
    n = len(matching)
    return Coupling(jnp.arange(n, dtype=jnp.int32), matching, jnp.full(n, 1.0 / n))


def best_sorted_coupling(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
    candidates: Sequence[Coupling] = (),
) -> tuple[Coupling, Float[Array, ""]]:
    """The cheapest coupling among those that sort by row mean, row RMS and row deviation.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`.
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights that sum to one; uniform if left out.
        d_weights: the same for d.
        p: power of the cost.
        candidates: further couplings to choose from.

    Returns:
        The coupling, without gradient, and its cost.

    >>> import jax.numpy as jnp
    >>> c = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> plan, cost = best_sorted_coupling(c, c[::-1, ::-1])
    >>> plan.columns, float(cost)
    (Array([1, 0], dtype=int32), 0.0)
    """
    c, d = jax.lax.stop_gradient((c, d))
    (f, f_square), (g, g_square) = moments(c, c_weights), moments(d, d_weights)
    features = (
        (f_square, g_square),
        (f, g),
        (f_square - f * f, g_square - g * g),
    )
    plans = [sorted_coupling(*pair, f_weights=c_weights, g_weights=d_weights) for pair in features]
    return _cheapest(c, d, [*plans, *candidates], p)


def _cheapest(c, d, plans, p):
    """Folds over the plans, so that entries of different lengths are padded with mass zero."""
    longest = max(plan.rows.shape[-1] for plan in plans)

    def pad(x):
        return jnp.pad(x, (0, longest - x.shape[-1]))

    if any(plan.rows.shape[-1] != longest for plan in plans):
        plans = [jax.tree.map(pad, plan) for plan in plans]
    costs = jnp.stack([gw_at_coupling(c, d, plan, p=p) for plan in plans])
    best = jnp.argmin(costs)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *plans)
    return jax.tree.map(lambda x: x[best], stacked), costs[best]


def _densest(graph):
    """The matrix itself where it is smaller than its factor, and small."""
    if isinstance(graph, FactoredGraph):
        n = num_nodes(graph)
        if n <= min(_DENSE_NODES, graph.values.shape[0]):
            return dense_matrix(graph)
    return graph


def _rms(graph, weights):
    n = num_nodes(graph)
    a = jnp.full(n, 1.0 / n) if weights is None else weights
    square = moments(graph, weights)[1] @ a
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 1.0)


def _lower(c, d, c_weights, d_weights, p, bounds, uniform):
    weights = {"c_weights": c_weights, "d_weights": d_weights}
    if p == 2:
        found = [moment_lower_bound(c, d, **weights)]
    else:
        found = [first_lower_bound(c, d, p=p, **weights)]
    if bounds in ("sorted_rows", "third"):
        if uniform:
            found.append(sorted_rows_lower_bound(c, d, p=p))
        else:
            found.append(second_lower_bound(c, d, p=p, **weights))
    if bounds == "third":
        found.append(third_lower_bound(c, d, p=p, **weights))
    return jnp.max(jnp.stack(found))
