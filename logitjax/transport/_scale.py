"""Numbers of any size: exact removal of powers of two, units, and errors of casts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from logitjax.ops import checks
from logitjax.transport import _graph as graphs
from logitjax.transport._graph import FactoredGraph, Graph, ProductGraph, largest, parts, with_parts
from logitjax.transport._linear import Linear
from logitjax.transport._rounding import (
    Scalar,
    Weights,
    gamma,
    power_of_two,
    real,
    safe_sqrt,
    times_power_of_two,
)

# Below half the exponent of any nonzero number.
_NO_SCALE = -10_000

# A graph, and its remainder beyond float32 or None.
Pair = tuple[Graph, Any]


def cast(name: str, graph: Graph, low: Any) -> Pair:
    """A graph whose numbers are traced or float32, with the error of that cast."""

    def wide(x: Any) -> bool:
        return isinstance(x, np.ndarray) and not np.can_cast(x.dtype, np.float32)

    if real(0.0).dtype == jnp.float64 or not all(wide(x) for x in parts(graph)):
        return graph, low
    exact = [np.asarray(x, np.float64) for x in parts(graph)]
    if low is not None:
        exact = [x + np.asarray(y, np.float64) for x, y in zip(exact, parts(low), strict=True)]
    for x in exact:
        checks.values(x, np.isfinite, name, "finite entries")
        largest = np.max(np.abs(x), initial=0.0)
        if largest and not 2.0**-60 <= largest <= 2.0**60:
            raise ValueError(
                f"{name}: expected a largest entry from 1e-18 to 1e18 of arrays closed over under "
                f"a transformation, got {largest:g}; scale it, or call certificate with arrays"
            )
    return split(graph, exact)


def split(graph: Graph, exact: Sequence[np.ndarray]) -> Pair:
    high = [x.astype(np.float32) for x in exact]
    low = [(x - y).astype(np.float32) for x, y in zip(exact, high, strict=True)]
    return with_parts(graph, high), with_parts(graph, low) if any(map(np.any, low)) else None


def known_parts(name: str, graph: Graph, low: Any, *, wide: bool) -> tuple[Pair, np.int32]:
    """A graph of known numbers without its power of four, free of rounding."""
    exact = [np.asarray(x, np.float64) for x in parts(graph)]
    for x in exact:
        checks.values(x, np.isfinite, name, "finite entries")
    # On the host, because programs flush subnormal numbers to zero.
    exponent = int(np.frexp(max(np.max(np.abs(x), initial=0.0) for x in exact))[1])
    factored = isinstance(graph, FactoredGraph | ProductGraph)
    half = exponent if factored else (exponent + 1) // 2
    shift = -half if factored else -2 * half
    rest = None
    if low is not None:
        lower = [np.asarray(x, np.float64) for x in parts(low)]
        exact = [x + y for x, y in zip(exact, lower, strict=True)]
        # The pair's own remainder.
        rest = with_parts(low, [np.ldexp(np.abs(x), shift - 24) for x in lower])
    exact = [np.ldexp(x, shift) for x in exact]
    return (with_parts(graph, exact), rest) if wide else split(graph, exact), np.int32(half)


def scaled(
    pairs: Sequence[Pair],
    halves: Sequence[Any],
    weights: tuple[Weights, Weights],
    linear: Linear,
    *,
    p: int,
    scale: str,
) -> tuple[Any, dict[str, Any], Scalar, Float[jax.Array, "2"], tuple[Any, Any]]:
    """Both graphs with entries of about one at most, and the way back to the requested units.

    `halves` are powers of four that were removed before. It also returns the bounds' loss by casts.
    """
    inner = [graphs.half_exponent(jax.lax.stop_gradient(graph)) for graph, _ in pairs]
    items = [graphs.shifted(graph, -h) for (graph, _), h in zip(pairs, inner, strict=True)]
    errors = [
        _cast_error(g, low if low is None else graphs.shifted(low, -h), w, h)
        for g, (_, low), w, h in zip(items, pairs, weights, inner, strict=True)
    ]
    halves = [h + jnp.asarray(before, h.dtype) for h, before in zip(inner, halves, strict=True)]
    # The unit is the reported float32 number, so its rounding is no error.
    rms = [_rms(g, w) for g, w in zip(items, weights, strict=True)]
    if scale == "separate":
        # One graph is brought to the other's unit, so that equal ones are not rounded apart.
        c, d = items
        factor = rms[1] / rms[0]
        rounding = jnp.where(factor == 1, 0.0, gamma(8) * _norm(c, weights[0]))
        error = factor * (errors[0] + rounding) + errors[1]
        rest = {"linear": None, "error": jax.lax.stop_gradient(error)}
        units = 2 * jnp.stack(halves)
        return (graphs.multiply(c, factor), d), rest, rms[1], jnp.stack(rms), (0, units)
    # A graph of zeros has no scale: next to a tiny one it must not set the other's.
    scales = [
        jnp.where(largest(jax.lax.stop_gradient(g)) > 0, h, _NO_SCALE)
        for g, h in zip(items, halves, strict=True)
    ]
    common = jnp.maximum(*scales)
    common = jnp.where(common == _NO_SCALE, 0, common)
    both = [graphs.shifted(g, h - common) for g, h in zip(items, halves, strict=True)]
    error = sum(
        times_power_of_two(e, 2 * (h - common)) for e, h in zip(errors, halves, strict=True)
    )
    if isinstance(linear, ProductGraph):
        linear = graphs.shifted(linear, -p * common)
    elif linear is not None:
        linear = times_power_of_two(real(linear), -2 * p * common)
    unit, half = (rms[1], halves[1]) if scale == "joint" else (real(1.0), 0)
    rest = {"linear": linear, "error": jax.lax.stop_gradient(error)}
    return both, rest, unit, jnp.stack([unit, unit]), (2 * p * (common - half), 2 * half)


def _norm(graph: Graph, weights: Weights) -> Scalar:
    """At least the graph's norm in L_2 of the weights, with absolute values in its products."""
    a = graphs.node_weights(graph, weights)
    if isinstance(graph, FactoredGraph | ProductGraph):
        norms = [safe_sqrt(jnp.sum(a * norm)) for norm in graphs.factor_norms(graph)]
        return norms[0] * norms[1] * (1 + gamma(len(a) + graphs.rank(graph)))
    return safe_sqrt(a @ (jnp.square(graphs.dense_matrix(graph)) @ a)) * (1 + gamma(2 * len(a)))


def _cast_error(graph: Graph, low: Any, weights: Weights, half: Any) -> jax.Array:
    """Distance of a graph with entries of about one from its values before a cast, in `_norm`."""
    info = jnp.finfo(real(0.0).dtype)
    factored = isinstance(graph, FactoredGraph | ProductGraph)
    # Programs flush subnormal numbers to zero.
    flushed = 4.0 * (graphs.rank(graph) if factored else 1) * power_of_two(info.minexp - 2 * half)
    # Squares of such small numbers are negligible next to these.
    matters = half < info.minexp // 4
    if low is None:
        return jnp.where(matters, flushed, 0.0)
    most = jnp.stack([jnp.max(jnp.abs(real(x))) for x in parts(low)]).max()
    safe = jnp.where(most > 0, most, 1.0)
    low = with_parts(low, [real(x) / safe for x in parts(low)])
    if factored:
        a = graphs.node_weights(graph, weights)
        (left, right), (left_low, right_low) = (
            [jnp.sqrt(jnp.sum(a * norm)) for norm in graphs.factor_norms(g)] for g in (graph, low)
        )
        error = left_low * (right + most * right_low) + right_low * left
        error *= 1 + gamma(graphs.num_nodes(graph) + graphs.rank(graph))
    else:
        error = _norm(low, weights)
    # The pair itself has twice the digits of its type.
    error = most * error * (1 + 4 * float(info.eps)) + flushed
    return jnp.where((most > 0) | matters, error, 0.0)


def _rms(graph: Graph, weights: Weights) -> Scalar:
    """The RMS entry as a float32 number; 1 if all are zero."""
    square = graphs.node_weights(graph, weights) @ graphs.row_statistics(graph, weights).square
    rms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 1.0)
    # XLA removes a conversion to float32 and back, but not this.
    return jax.lax.reduce_precision(rms, exponent_bits=8, mantissa_bits=23)
