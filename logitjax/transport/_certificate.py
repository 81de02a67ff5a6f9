"""A two-sided answer: a lower bound, an upper bound, and a coupling that attains it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.transport import _graph as graphs
from logitjax.transport._answer import Certificate, in_float32, raised
from logitjax.transport._bounds import first_lower_bound, moment_lower_bound, third_lower_bound
from logitjax.transport._candidates import best_sorted_coupling, cheapest, densest, uniform_matching
from logitjax.transport._coupling import coupling_cost
from logitjax.transport._graph import FactoredGraph, Graph, ProductGraph, num_nodes
from logitjax.transport._linear import Linear, linear_lower_bound
from logitjax.transport._matching_bounds import diagonal_lower_bound, gilmore_lawler
from logitjax.transport._plans import Plan, as_candidate, plan_cost
from logitjax.transport._problems import from_problem, is_problem
from logitjax.transport._refine import Refinement, refine_matching
from logitjax.transport._rounding import UNDERFLOW, Weights, gamma, lowered
from logitjax.transport._scale import Pair, cast, known_parts, scaled
from logitjax.transport._sorted import Coupling

Scale = Literal["joint", "separate", "none"]
Bounds = Literal["cheap", "third"]


def certificate(
    c: Graph | Any,
    d: Graph | Any = None,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
    scale: Scale | None = None,
    bounds: Bounds = "cheap",
    refine: Refinement | None = None,
    key: jax.Array | None = None,
    candidates: Sequence[Any] = (),
) -> Certificate:
    """Bound the Gromov-Wasserstein cost of two graphs from both sides.

    Both bounds are theorems about the given numbers: a bound of the rounding is subtracted from the
    lower one and added to the upper one. Called with arrays it computes in float64 (except on a
    TPU). Under ``jit``, ``vmap`` and ``grad`` it computes in float32, and the bounds of large or
    nearly equal graphs are wider. Closed-over arrays count exactly; arguments of ``jit`` are
    rounded by JAX before: for bounds of x itself pass the pair ``high = np.float32(x)``, ``low =
    np.float32(x - high)`` in place of a graph.

    The upper bound is the cost of a coupling. Nodes are matched in the order of their row means,
    row RMS and row deviations. The cheapest of these couplings and of ``candidates`` is improved by
    ``refine``, which never makes it worse. The lower bound is the largest of the chosen ``bounds``.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`, or a pair of them; or a balanced
            ``QuadraticProblem`` of ott with squared loss, whose low-rank geometries are never
            multiplied out by the cheap bounds, and whose linear term counts.
        d: matrix ``[m, m]`` or `FactoredGraph`; after a problem, a solution of it or None. A
            solution of ``LRGromovWasserstein`` keeps its problem and may stand alone.
        c_weights, d_weights: node weights, by default uniform. If their values are known they must
            sum to one within 1e-3. They are divided by their sum.
        p: power of the cost; 1 or 2.
        scale: ``joint`` divides both graphs by the RMS entry of d, ``separate`` each by its own,
            ``none`` neither. The bounds are in these units. By default ``joint``, but ``none`` for
            problems of ott, so that its costs are comparable.
        bounds: ``cheap``: `moment_lower_bound` (p = 2) or `first_lower_bound`; where a refinement
            would be allowed and both graphs are factored, so that a matching is optimal, also
            `diagonal_lower_bound`; of a linear term a dual solution, or each node's least cost
            where its factors are not multiplied out. ``third``: also `third_lower_bound` and, for
            matchings, `gilmore_lawler`, whose assignment then is a candidate, n^3.
        refine: needs p = 2, equal sizes and uniform weights. Without it, nothing n x n is formed.
        key: key of the restarts, by default ``jax.random.key(0)``.
        candidates: more couplings to start from, such as the identity of one vocabulary, and, with
            p = 2, plans ``[n, m]`` of other solvers (POT's arrays, ott's outputs) to be evaluated.

    Returns:
        A `Certificate`. Gradients of ``upper`` are taken at the fixed coupling (envelope).

    Raises:
        TypeError: c or refine is of another type.
        ValueError: for unknown options, a refinement outside its conditions, or an unbalanced
            problem; if values are known also for entries that are not finite, weights that do not
            sum to one, plans whose marginals are far from the weights, and graphs whose cost
            float32 cannot represent in the requested units.

    >>> import jax.numpy as jnp
    >>> from logitjax.transport import FactoredGraph, Refinement
    >>> z, how = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]), Refinement("exchange")
    >>> answer = certificate(FactoredGraph(z), FactoredGraph(z[:, ::-1] + 0.1), refine=how)
    >>> bool(0 < answer.lower), bool(answer.lower <= answer.upper), answer.coupling.rows.shape
    (True, True, (3,))

    References:
        Memoli (2011) for the bounds.
    """
    candidates = list(candidates)
    linear = None
    if is_problem(c):
        candidates[:0] = [x for x in (c, d) if x is not None and not hasattr(x, "geom_xx")]
        scale = scale or "none"
        c, d, c_weights, d_weights, linear = from_problem(c)
    options = _Options(p, scale or "joint", bounds, refine)
    options.check(linear is not None)
    if d is None:
        raise ValueError("d: expected a second graph, or c to be a problem of ott; got None")
    (c, c_low), (d, d_low) = (x if isinstance(x, tuple) else (x, None) for x in (c, d))
    sizes, weights = (num_nodes(c), num_nodes(d)), (c_weights, d_weights)
    for name, marginal, n in zip(("c_weights", "d_weights"), weights, sizes, strict=True):
        graphs.check_weights(name, marginal, n)
    uniform = sizes[0] == sizes[1] and all(w is None for w in weights)
    if refine is not None and not (uniform and p == 2):
        raise ValueError(
            f"refine: {refine.kind!r} needs p=2, as many nodes in c as in d and no weights; "
            f"got p={p}, {sizes[0]} and {sizes[1]} nodes"
        )
    key = jax.random.key(0) if key is None else key
    plans = tuple(as_candidate(x, *sizes, p, weights) for x in candidates)
    sides: Any = ("c", c, c_low), ("d", d, d_low)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((sides, weights, key, plans))):
        pairs = [cast(*side) for side in sides]
        answer = raised(*_bracket(pairs, (0, 0), weights, key, plans, linear, options))
    else:
        answer = _known(sides, weights, key, plans, linear, options)
    claims = [
        (getattr(x, "primal_cost", jnp.nan), getattr(x, "converged", False)) for x in candidates
    ]
    return dataclasses.replace(
        answer,
        reported=jnp.array([x for x, _ in claims], jnp.float32) / answer.units[1] ** p,
        converged=jnp.array([x for _, x in claims], bool),
    )


class _Options(NamedTuple):
    p: int
    scale: Scale
    bounds: Bounds
    refine: Refinement | None

    def check(self, fused: bool) -> None:
        for name, kind in (("scale", Scale), ("bounds", Bounds)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}: expected one of {get_args(kind)}, got {getattr(self, name)!r}"
                )
        if not isinstance(self.refine, Refinement | None):
            raise TypeError(f"refine: expected a Refinement or None, got {self.refine!r}")
        graphs.check_power(self.p)
        if fused and (self.p != 2 or self.scale == "separate"):
            raise ValueError(
                "scale: a problem with a linear term needs p=2 and 'joint' or 'none', got "
                f"p={self.p} and {self.scale!r}"
            )


def _known(
    sides: Sequence[tuple[str, Graph, Any]],
    weights: Any,
    key: jax.Array,
    candidates: Any,
    linear: Linear,
    options: _Options,
) -> Certificate:
    """The answer for known numbers: in float64, of graphs scaled without any rounding."""
    # For nearly equal graphs float32 would certify little. TPUs have no fast float64.
    wide = jax.default_backend() != "tpu"
    pairs, halves = zip(*(known_parts(*side, wide=wide) for side in sides), strict=True)
    with jax.enable_x64(wide):
        arguments = pairs, halves, weights, key, candidates, linear, options
        answer, exponents = jax.device_get(_compiled(*arguments))
    if answer.upper == 0 and linear is None:
        # Unscaled: powers of two lose the last digits of entries that are small next to the rest.
        scaled_apart = options.scale == "separate"
        both = [
            pair[0] if scaled_apart else g for pair, (_, g, _) in zip(pairs, sides, strict=True)
        ]
        if not _equal(both[0], both[1], answer.coupling):
            # They differ by less than any product can represent.
            answer = dataclasses.replace(answer, upper=np.float64(UNDERFLOW))
    return in_float32(answer, exponents, options.scale)


def _equal(c: Any, d: Any, coupling: Coupling) -> bool:
    """Whether two graphs of known numbers are the same at a coupling, digit by digit."""
    here = np.asarray(coupling.mass) > 0
    rows, columns = (np.asarray(x)[here] for x in (coupling.rows, coupling.columns))
    if isinstance(c, FactoredGraph) and isinstance(d, FactoredGraph):
        with jax.enable_x64(True):
            z, w = (
                np.asarray(g.values if g.ids is None else graphs.dense_factor(g)) for g in (c, d)
            )
        return z.shape == w.shape and np.array_equal(z[:, rows], w[:, columns])
    if any(isinstance(g, FactoredGraph | ProductGraph) for g in (c, d)):
        return False
    x, y = np.asarray(c), np.asarray(d)
    return np.array_equal(x[np.ix_(rows, rows)], y[np.ix_(columns, columns)])


def _bracket(
    pairs: Sequence[Pair],
    halves: Sequence[Any],
    weights: tuple[Weights, Weights],
    key: jax.Array,
    candidates: tuple[Coupling | Plan, ...],
    linear: Linear,
    options: _Options,
) -> tuple[Certificate, tuple[Any, Any]]:
    """Bounds and units without their powers of two, and their exponents."""
    with jax.default_matmul_precision("highest"):
        (c, d), rest, unit, units, exponents = scaled(
            pairs, halves, weights, linear, p=options.p, scale=options.scale
        )
        answer = _bounds(c, d, weights, rest, key, candidates, options)
    lower, upper, coupling, costs = answer
    scale = 1 / unit**options.p
    lower, upper, costs = (x * scale for x in (lower, upper, costs))
    small = gamma(0)
    return Certificate(
        lower=lower - small * jnp.abs(lower),
        upper=upper + small * jnp.abs(upper),
        coupling=coupling,
        units=units,
        costs=costs + small * jnp.abs(costs),
    ), exponents


_compiled = jax.jit(_bracket, static_argnums=6)


def _bounds(
    c: Graph,
    d: Graph,
    weights: tuple[Weights, Weights],
    rest: dict[str, Any],
    key: jax.Array,
    candidates: tuple[Coupling | Plan, ...],
    options: _Options,
) -> tuple[jax.Array, jax.Array, Coupling, jax.Array]:
    c_weights, d_weights = weights
    p, refine = options.p, options.refine
    uniform = c_weights is None and d_weights is None and num_nodes(c) == num_nodes(d)
    # For Gram matrices a matching is optimal: its bounds hold, and its assignments are candidates.
    # Costs that are linear in the coupling do not change this.
    matching = uniform and p == 2 and all(isinstance(g, FactoredGraph) for g in (c, d))
    named = {"c_weights": c_weights, "d_weights": d_weights}
    sparse = c, d
    c, d = densest(c, c_weights), densest(d, d_weights)
    if p == 2:
        lower = [moment_lower_bound(c, d, **named)]
    else:
        lower = [first_lower_bound(c, d, p=p, **named)]
    if options.bounds == "third":
        lower.append(third_lower_bound(c, d, p=p, **named))
    if matching:
        lower.append(diagonal_lower_bound(c, d))
    plans = [x for x in candidates if isinstance(x, Coupling)]
    others = []
    if matching and options.bounds == "third":
        bound, assigned = gilmore_lawler(c, d, branches=8)
        lower.append(bound)
        others.append(uniform_matching(assigned))
    least = lowered(jnp.max(jnp.stack(lower)), p=p, root=rest["error"])
    linear = rest["linear"]
    if linear is not None:
        sides = graphs.node_weights(c, c_weights), graphs.node_weights(d, d_weights)
        least += linear_lower_bound(
            linear, *sides, uniform=uniform, exact=options.bounds == "third"
        )
    # Plans that are nearly matchings are tried as matchings.
    others += [
        x.matching() for x in candidates if isinstance(x, Plan) and uniform and x.right is None
    ]
    fixed = jax.lax.stop_gradient(sparse)
    rest = named | rest
    coupling, seen = best_sorted_coupling(*fixed, p, [*plans, *others], rest)
    if refine is not None:
        n = num_nodes(c)
        x, y = (graphs.dense_matrix(g).astype(jnp.float32) for g in fixed)
        start = jnp.zeros_like(coupling.columns).at[coupling.rows].set(coupling.columns)
        gains = (
            None if linear is None else (-n / 2 * graphs.dense_matrix(linear)).astype(jnp.float32)
        )
        refined = refine_matching((x, y, gains), start, how=refine, key=key)
        # Compared again by the cost itself, so that rounding cannot make it worse.
        coupling, _ = cheapest(*fixed, [coupling, uniform_matching(refined)], p, rest)
    best = coupling_cost(*sparse, coupling, p=p, **rest)
    # The sorted couplings come first.
    judged = iter(seen[3:])
    dense = jax.lax.stop_gradient((c, d))
    costs = [
        next(judged) if isinstance(x, Coupling) else plan_cost(*dense, x, **rest)
        for x in candidates
    ]
    upper = (best.value - jax.lax.stop_gradient(best.value)) + best.most
    for x, cost in zip(candidates, costs, strict=True):
        # A comparison with nan, from an invalid plan, is false.
        if isinstance(x, Plan):
            upper = jnp.where(cost < upper, cost, upper)
    return least, upper, coupling, jnp.stack(costs) if costs else jnp.zeros(0, upper.dtype)
