"""A two-sided answer: no lower than this, no higher than that, and the coupling that shows it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from logitjax.ops import Array, checks
from logitjax.transport._bounds import (
    first_lower_bound,
    moment_lower_bound,
    second_lower_bound,
    sorted_rows_lower_bound,
    third_lower_bound,
)
from logitjax.transport._coupling import coupling_cost
from logitjax.transport._graph import (
    FactoredGraph,
    Graph,
    RoundedMatrix,
    check_power,
    check_weights,
    dense_matrix,
    half_exponent,
    largest,
    multiply,
    node_weights,
    num_nodes,
    rounded,
    row_statistics,
    shifted,
)
from logitjax.transport._matching_bounds import (
    diagonal_lower_bound,
    gilmore_lawler,
)
from logitjax.transport._plans import Plan, as_candidate, from_problem, plan_cost
from logitjax.transport._refine import Refinement, refine_matching
from logitjax.transport._rounding import Order, Scalar, Weights, gamma, real, times_power_of_two
from logitjax.transport._sorted import Coupling, sorted_coupling

Scale = Literal["joint", "separate", "none"]
Bounds = Literal["cheap", "sorted_rows", "third"]

# Up to this many nodes a graph of more positions than nodes is multiplied out.
_DENSE_NODES = 2048
# Below half the exponent of any number that is not zero.
_NO_SCALE = -100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """``lower <= GW_p^p <= upper``, the upper one reached by ``coupling``.

    Attributes:
        lower: no coupling costs less.
        upper: some coupling costs no more; ``coupling`` is it but for rounding.
        coupling: the best that was seen.
        units: what c and d were divided by, ``[2]``; infinite or zero where float32 does not
            hold it.
        costs: what each of the ``candidates`` costs at most, ``[candidates]``, so that
            ``costs / lower`` says how far a solution is from the optimum at most.
    """

    lower: Array
    upper: Array
    coupling: Coupling
    units: Array
    costs: Array

    @property
    def gap(self) -> jax.Array:
        """upper / lower; one where both are zero, infinite where the lower one alone is."""
        return ratio(self.upper, self.lower)


def ratio(upper: Array, lower: Array) -> jax.Array:
    """How far apart two bounds are: one where both are zero, infinite where the lower one is."""
    upper, lower = jnp.asarray(upper), jnp.asarray(lower)
    apart = jnp.where(lower > 0, upper / jnp.where(lower > 0, lower, 1.0), jnp.inf)
    return jnp.where(upper > 0, apart, 1.0)


def certificate(
    c: Graph | Any,
    d: Graph | None = None,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
    scale: Scale = "joint",
    bounds: Bounds = "cheap",
    refine: Refinement | None = None,
    key: jax.Array | None = None,
    candidates: Sequence[Any] = (),
) -> Certificate:
    """Bound the Gromov-Wasserstein cost of two graphs from both sides.

    Both bounds are theorems about the given numbers: a bound of the rounding is subtracted from the
    lower one and added to the upper one. Called with arrays it computes in float64 (except on a
    TPU), where rounding is next to nothing. Under ``jit``, ``vmap`` and ``grad`` it computes in
    float32, and the bounds of large or nearly equal graphs are wider. Graphs are first divided by a
    power of two, so that nothing overflows or underflows.

    The upper bound is the cost of a coupling. Nodes are matched in the order of their row means,
    row RMS and row deviations. The cheapest of these couplings and of ``candidates`` is improved by
    ``refine``, which never makes it worse. The lower bound is the largest of the chosen ``bounds``.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`; or, without d, a ``QuadraticProblem`` of ott with
            squared loss.
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights; uniform if left out. Where their values are known they have to
            sum to one within 1e-3. They are divided by their sum.
        d_weights: the same for d.
        p: power of the cost; 1 or 2.
        scale: ``joint`` divides both graphs by the RMS entry of d, ``separate`` each by its own,
            ``none`` neither. The bounds are in these units.
        bounds: ``cheap``: `moment_lower_bound` (p = 2) or `first_lower_bound`; where a
            refinement would be allowed and both graphs are factored, so that a matching is
            optimal, also `diagonal_lower_bound`;
            ``sorted_rows``: also `sorted_rows_lower_bound` (with weights or unequal sizes
            `second_lower_bound`), n^2 log n; ``third``: also `third_lower_bound` or, for matchings,
            `gilmore_lawler`, whose assignment then is a candidate, n^3.
        refine: how the coupling is improved; it needs p = 2, equal sizes and uniform weights. Left
            out, nothing of size n x n is made.
        key: ``jax.random.key`` of the restarts; ``jax.random.key(0)`` if left out.
        candidates: more couplings to start from, for example the identity where nodes are the
            tokens of one vocabulary, and plans ``[n, m]`` of other solvers (POT's arrays, ott's
            outputs) to be judged; the latter need p = 2.

    Returns:
        A `Certificate`. Gradients of ``upper`` are taken at the fixed coupling (envelope).

    Raises:
        ValueError: for unknown options, or a refinement outside its conditions; where values are
            known also for entries that are not finite, weights that do not sum to one, and graphs
            whose cost float32 cannot hold in the units asked for.

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
    if d is None:
        c, d, c_weights, d_weights = from_problem(c)
    for name, value, kind in (
        ("scale", scale, Scale),
        ("bounds", bounds, Bounds),
    ):
        if value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {get_args(kind)}, got {value!r}")
    check_power(p)
    check_weights("c_weights", c_weights, num_nodes(c))
    check_weights("d_weights", d_weights, num_nodes(d))
    uniform = c_weights is None and d_weights is None and num_nodes(c) == num_nodes(d)
    if refine is not None and not (uniform and p == 2):
        raise ValueError(
            f"refine: {refine.kind!r} needs p=2, as many nodes in c as in d and no weights; "
            f"got p={p}, {num_nodes(c)} and {num_nodes(d)} nodes"
        )
    arrays: Any = (
        *(c, d, c_weights, d_weights, jax.random.key(0) if key is None else key),
        tuple(as_candidate(x, num_nodes(c), num_nodes(d), p) for x in candidates),
    )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
        return _bracket(*arrays, p=p, scale=scale, bounds=bounds, refine=refine)
    for name, graph in (("c", c), ("d", d)):
        values = graph.values if isinstance(graph, FactoredGraph) else graph
        checks.values(np.asarray(values), np.isfinite, name, "finite entries")
    # Of nearly equal graphs float32 would certify little. TPUs have no fast float64.
    with jax.enable_x64(jax.default_backend() != "tpu"):
        answer = _compiled()(*arrays, p=p, scale=scale, bounds=bounds, refine=refine)
    return _float32(jax.device_get(answer), scale)


@functools.cache
def _compiled() -> Any:
    return jax.jit(_bracket, static_argnames=("p", "scale", "bounds", "refine"))


def _float32(answer: Certificate, scale: Scale) -> Certificate:
    """The same claims about float32 numbers: bounds are rounded away from each other."""
    info = np.finfo(np.float32)
    lower, upper = float(answer.lower), float(answer.upper)
    largest, least = float(info.max), float(info.tiny)
    if not upper <= largest or (scale == "none" and 0 < upper < least):
        raise ValueError(
            f"scale: expected units in which float32 holds the cost, got a cost between {lower:g} "
            f"and {upper:g} with scale={scale!r}"
        )

    units = np.abs(np.asarray(answer.units))
    if not (units.min() >= least and units.max() <= largest):
        raise ValueError(
            f"scale: expected graphs whose RMS entry float32 holds, got {units.tolist()}; use "
            "scale='none' or other units"
        )

    return Certificate(
        lower=jnp.asarray(_towards(lower, -1)),
        upper=jnp.asarray(_towards(max(upper, least) if upper > 0 else 0.0, 1)),
        coupling=Coupling(
            jnp.asarray(answer.coupling.rows, jnp.int32),
            jnp.asarray(answer.coupling.columns, jnp.int32),
            jnp.asarray(answer.coupling.mass, jnp.float32),
        ),
        units=jnp.asarray(answer.units, jnp.float32),
        costs=jnp.asarray(_towards(answer.costs, 1)),
    )


def _towards(value: Any, direction: int) -> np.ndarray:
    """The nearest float32 that is not below (1), or not above (-1), a number in float64."""
    # Beside a float32 array a Python number would be compared as float32.
    value = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        near = value.astype(np.float32)
    wrong = near > value if direction < 0 else near < value
    return np.where(wrong, np.nextafter(near, np.float32(direction * np.inf)), near)


def _bracket(
    c: Graph,
    d: Graph,
    c_weights: Weights,
    d_weights: Weights,
    key: jax.Array,
    candidates: tuple[Coupling | Plan, ...],
    *,
    p: int,
    scale: Scale,
    bounds: Bounds,
    refine: Refinement | None,
) -> Certificate:
    with jax.default_matmul_precision("highest"):
        c, d, back, units = _scaled(c, d, c_weights, d_weights, p, scale)
        answer = _bounds(c, d, c_weights, d_weights, key, candidates, p, bounds, refine)
    lower, upper, coupling, costs = answer
    finite = jnp.finfo(lower.dtype).max
    return Certificate(
        lower=jnp.minimum(back(lower) * (1 - gamma(0)), finite),
        upper=back(upper) * (1 + gamma(0)),
        coupling=coupling,
        units=units,
        costs=back(costs) * (1 + gamma(0)),
    )


def _scaled(
    c: Graph, d: Graph, c_weights: Weights, d_weights: Weights, p: int, scale: Scale
) -> tuple[Graph, Graph, Callable[[jax.Array], jax.Array], Float[jax.Array, "2"]]:
    """Both graphs with entries of about one at most, and the way back to the units asked for."""
    halves = [half_exponent(jax.lax.stop_gradient(g)) for g in (c, d)]
    own = [shifted(g, -h) for g, h in zip((c, d), halves, strict=True)]
    # The unit is the number that is reported, to float32; that it was rounded is no error then.
    rms = [_rms(g, w) for g, w in zip(own, (c_weights, d_weights), strict=True)]
    if scale == "separate":
        c, d = (_divided(g, r, w) for g, r, w in zip(own, rms, (c_weights, d_weights), strict=True))
        units = [times_power_of_two(r, 2 * h) for r, h in zip(rms, halves, strict=True)]
        return c, d, lambda value: value, jnp.stack(units)
    # A graph of zeros has no scale: beside a tiny one it must not set the other's.
    scales = [
        jnp.where(largest(jax.lax.stop_gradient(g)) > 0, h, _NO_SCALE)
        for g, h in zip(own, halves, strict=True)
    ]
    common = jnp.maximum(*scales)
    c, d = (shifted(g, h - common) for g, h in zip(own, halves, strict=True))
    unit, half = (rms[1], halves[1]) if scale == "joint" else (real(1.0), 0)
    units = jnp.full(2, 1.0, unit.dtype) * times_power_of_two(unit, 2 * jnp.asarray(half))

    def back(value: jax.Array) -> jax.Array:
        return times_power_of_two(value / unit**p, 2 * p * (common - half))

    return c, d, back, units


def _divided(graph: Graph, unit: Scalar, weights: Weights) -> Graph:
    """The graph divided by its unit; of a matrix with the rounding of that, which counts."""
    if isinstance(graph, FactoredGraph):
        return multiply(graph, 1.0 / unit)
    rms = jnp.sqrt(node_weights(graph, weights) @ row_statistics(graph, weights).square)
    return RoundedMatrix(
        dense_matrix(graph) / unit, jax.lax.stop_gradient(2 * gamma(0) * rms / unit)
    )


def _bounds(
    c: Graph,
    d: Graph,
    c_weights: Weights,
    d_weights: Weights,
    key: jax.Array,
    candidates: tuple[Coupling | Plan, ...],
    p: int,
    bounds: Bounds,
    refine: Refinement | None,
) -> tuple[jax.Array, jax.Array, Coupling, jax.Array]:
    uniform = c_weights is None and d_weights is None and num_nodes(c) == num_nodes(d)
    # Of Gram matrices a matching is optimal: its bounds hold, and its assignments are candidates.
    matching = uniform and p == 2 and all(isinstance(g, FactoredGraph) for g in (c, d))
    given = c, d
    c, d = _densest(c, c_weights), _densest(d, d_weights)
    lower = [_lower(c, d, c_weights, d_weights, p, bounds, uniform)]
    if matching:
        lower.append(diagonal_lower_bound(c, d))
    plans = [x for x in candidates if isinstance(x, Coupling)]
    others = []
    if matching and bounds == "third":
        bound, assigned = gilmore_lawler(c, d, branches=8)
        lower.append(bound)
        others.append(_uniform(assigned))
    weights = {"c_weights": c_weights, "d_weights": d_weights}
    # Plans that are nearly matchings are tried as such.
    others += [x.matching() for x in candidates if isinstance(x, Plan) and uniform]
    fixed = jax.lax.stop_gradient(given)
    coupling, seen = best_sorted_coupling(*fixed, **weights, p=p, candidates=[*plans, *others])
    if refine is not None:
        x, y = (dense_matrix(g).astype(jnp.float32) for g in fixed)
        start = jnp.zeros_like(coupling.columns).at[coupling.rows].set(coupling.columns)
        refined = refine_matching(x, y, start, how=refine, key=key)
        # Compared once more by the cost itself, so that no rounding can make it worse.
        coupling, _ = _cheapest(*fixed, [coupling, _uniform(refined)], p, weights)
    best = coupling_cost(*given, coupling, p=p, **weights)
    # Those of the sorted couplings come first.
    judged = iter(seen[3:])
    costs = [
        next(judged) if isinstance(x, Coupling) else plan_cost(*fixed, x.plan, **weights)
        for x in candidates
    ]
    upper = (best.value - jax.lax.stop_gradient(best.value)) + best.most
    return (
        jnp.max(jnp.stack(lower)),
        upper,
        coupling,
        jnp.stack(costs) if costs else jnp.zeros(0, upper.dtype),
    )


def _uniform(matching: Order) -> Coupling:
    n = len(matching)
    return Coupling(jnp.arange(n, dtype=jnp.int32), matching, jnp.full(n, 1.0 / n, real(0.0).dtype))


def best_sorted_coupling(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
    candidates: Sequence[Coupling] = (),
) -> tuple[Coupling, Float[Array, "plans"]]:
    """The cheapest coupling among those that sort by row mean, row RMS and row deviation.

    It has no gradient. With what each costs at most, the three sorted ones first.
    """
    c, d = jax.lax.stop_gradient((c, d))
    weights = {"c_weights": c_weights, "d_weights": d_weights}
    own, other = (
        row_statistics(_densest(c, c_weights), c_weights),
        row_statistics(_densest(d, d_weights), d_weights),
    )
    plans = [
        sorted_coupling(
            getattr(own, name), getattr(other, name), f_weights=c_weights, g_weights=d_weights
        )
        for name in ("rms", "mean", "deviation")
    ]
    return _cheapest(c, d, [*plans, *candidates], p, weights)


def _cheapest(
    c: Graph, d: Graph, plans: Sequence[Coupling], p: int, weights: Mapping[str, Weights]
) -> tuple[Coupling, Float[jax.Array, "plans"]]:
    """The plan that is proven to cost least; shorter ones are padded with entries of no mass."""
    longest = max(plan.rows.shape[-1] for plan in plans)
    dtype = real(0.0).dtype

    def pad(plan: Coupling) -> Coupling:
        size = longest - plan.rows.shape[-1]
        return Coupling(
            jnp.pad(jnp.asarray(plan.rows, jnp.int32), (0, size)),
            jnp.pad(jnp.asarray(plan.columns, jnp.int32), (0, size)),
            jnp.pad(jnp.asarray(plan.mass, dtype), (0, size)),
        )

    def most(plan: Coupling) -> jax.Array:
        return coupling_cost(c, d, plan, p=p, **weights).most

    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *map(pad, plans))
    if all(plan.rows.shape[-1] == longest for plan in plans):
        costs = jax.lax.map(most, stacked)  # one program for all
    else:
        costs = jnp.stack([most(plan) for plan in plans])
    best = jnp.argmin(costs)
    return jax.tree.map(lambda x: x[best], stacked), costs


def _densest(graph: Graph, weights: Weights) -> Graph:
    """The matrix itself where it is smaller than its factor, and small."""
    if isinstance(graph, FactoredGraph):
        n = num_nodes(graph)
        if n <= min(_DENSE_NODES, graph.values.shape[0]):
            return rounded(graph, weights)
    return graph


def _rms(graph: Graph, weights: Weights) -> Scalar:
    """The RMS entry as a float32 number; one where all are zero."""
    square = node_weights(graph, weights) @ row_statistics(graph, weights).square
    rms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 1.0)
    # XLA takes a conversion to float32 and back for none; this it carries out.
    return jax.lax.reduce_precision(rms, exponent_bits=8, mantissa_bits=23)


def _lower(
    c: Graph,
    d: Graph,
    c_weights: Weights,
    d_weights: Weights,
    p: int,
    bounds: Bounds,
    uniform: bool,
) -> Scalar:
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
