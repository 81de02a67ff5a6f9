"""One-dimensional transport of node features: the closed form, and its coupling."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.ops import Array, checks
from logitjax.transport._rounding import Scalar, Vector, Weights, gamma, lowered, real


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coupling:
    """A sparse transport plan: ``mass[s]`` goes from node ``rows[s]`` to node ``columns[s]``.

    Each marginal sums to the node weights. Entries of mass zero are padding.
    """

    rows: Array
    columns: Array
    mass: Array


def sorted_gw_lower_bound(
    f: Float[Array, "*batch n"],
    g: Float[Array, "*batch m"],
    *,
    f_weights: Float[Array, "*batch n"] | None = None,
    g_weights: Float[Array, "*batch m"] | None = None,
    p: int = 1,
) -> Float[Array, "*batch"]:
    """The closed form: the p-Wasserstein cost (to the power p) of two sets of node features.

    With row means as features it is a lower bound of the Gromov-Wasserstein cost::

        W_p^p(f_C, f_D) <= GW_p^p(C, D) = min_pi sum |C_ij - D_kl|^p pi_ik pi_jl

    for any matrices. With p = 1 and equal sizes it is ``mean |sort(f) - sort(g)|``; otherwise the
    quantile functions are compared. The gradient is the subgradient of the sorted matching.

    Args:
        f, g: features of the two graphs, ``[*batch, n]`` and ``[*batch, m]``.
        f_weights, g_weights: node weights of these shapes that sum to one; by default uniform.
        p: 1 or 2 (any power from 1 works).

    Returns:
        ``[*batch]`` float32.

    Raises:
        ValueError: if p is below 1.

    >>> import jax.numpy as jnp
    >>> sorted_gw_lower_bound(jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0]))
    Array(0.5, dtype=float32)

    References:
        InfiGFusion (arXiv 2505.13893), framework figure, prints ``sum_i |f(i) - g(i)|`` of sorted
        row sums: n^2 times this value with row means (n times, with its mean normalised).
        Memoli, Gromov-Wasserstein distances and the metric approach to object matching (2011),
        section 6: twice the first lower bound (his GW has a factor 1/2).
    """
    if p < 1:
        raise ValueError(f"p: expected at least 1, got {p}")
    _check(f, g, f_weights, g_weights)
    f, g = real(f), real(g)
    # Equal masses meet in order, which needs no plan.
    if f.shape[-1] == g.shape[-1] and f_weights is None and g_weights is None:
        return jnp.mean(_power(jnp.sort(f, axis=-1) - jnp.sort(g, axis=-1), p), axis=-1)
    plan = sorted_coupling(f, g, f_weights=f_weights, g_weights=g_weights)
    difference = jnp.take_along_axis(f, plan.rows, -1) - jnp.take_along_axis(g, plan.columns, -1)
    return jnp.sum(plan.mass * _power(difference, p), axis=-1)


def least_transport(
    f: Vector, g: Float[jax.Array, "m"], a: Weights, b: Weights, *, p: int, root: Any = 0.0
) -> Scalar:
    """`sorted_gw_lower_bound` minus its possible rounding error, including that of f and g."""
    raw = sorted_gw_lower_bound(f, g, f_weights=a, g_weights=b, p=p)
    n, m = f.shape[-1], g.shape[-1]
    absolute = 0.0
    if not (n == m and a is None and b is None):
        absolute = _misplaced(*jax.lax.stop_gradient((f, g)), p)
    return lowered(raw, p=p, relative=gamma(n + m), absolute=absolute, root=root)


def _misplaced(f: Vector, g: Float[jax.Array, "m"], p: int) -> Scalar:
    """Bound the additional transport cost if ends of intervals are off by tau each."""
    # A quantile function moves by no more than F(t + tau) - F(t - tau), whose integral is at most 2
    # tau times the range; the masses, as differences of ends, are off by the same share.
    tau = gamma(2 * (f.shape[-1] + g.shape[-1]))
    spread = jnp.ptp(f) + jnp.ptp(g)
    furthest = jnp.maximum(f.max() - g.min(), g.max() - f.min())
    furthest = jnp.maximum(furthest, 0.0)
    if p == 1:
        return tau * (2 * spread + 2 * furthest)
    return tau * (4 * spread * furthest + 2 * jnp.square(furthest))


def sorted_coupling(
    f: Float[Array, "*batch n"],
    g: Float[Array, "*batch m"],
    *,
    f_weights: Float[Array, "*batch n"] | None = None,
    g_weights: Float[Array, "*batch m"] | None = None,
) -> Coupling:
    """Match nodes in order of their features: the coupling behind the closed form.

    Equal sizes without weights give a permutation (n entries of mass 1/n); otherwise the quantile
    coupling with n + m entries. Gradients do not flow through it (envelope theorem: at a fixed
    coupling the derivative of the cost is that of the graphs alone).

    Args:
        f, g: features of the two graphs, ``[*batch, n]`` and ``[*batch, m]``.
        f_weights, g_weights: node weights that sum to one; by default uniform.

    Returns:
        A `Coupling` with fields ``[*batch, n]`` or ``[*batch, n + m]``, in descending order.

    >>> import jax.numpy as jnp
    >>> plan = sorted_coupling(jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0]))
    >>> plan.rows, plan.columns, plan.mass
    (Array([0, 1], dtype=int32), Array([1, 0], dtype=int32), Array([0.5, 0.5], dtype=float32))
    """
    _check(f, g, f_weights, g_weights)
    f, g = jax.lax.stop_gradient((real(f), real(g)))
    n, m = f.shape[-1], g.shape[-1]
    rows = jnp.argsort(-f, axis=-1).astype(jnp.int32)  # downwards
    columns = jnp.argsort(-g, axis=-1).astype(jnp.int32)
    if n == m and f_weights is None and g_weights is None:
        return Coupling(rows, columns, _seen(jnp.full(f.shape, 1.0 / n, f.dtype), f, g))
    upper_f = _cumulative(f_weights, rows, f.shape)
    upper_g = _cumulative(g_weights, columns, g.shape)
    # `[*batch, n + m]`.
    ends = jnp.sort(jnp.concatenate([upper_f, upper_g], axis=-1), axis=-1)
    starts = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], axis=-1)
    # Between two ends both quantile functions are constant: the middle shows whose nodes meet.
    middles = 0.5 * (starts + ends)
    # Rounding may exceed the last.
    at_f = jnp.clip(_search(upper_f, middles), 0, n - 1)
    at_g = jnp.clip(_search(upper_g, middles), 0, m - 1)
    return Coupling(
        jnp.take_along_axis(rows, at_f, -1),
        jnp.take_along_axis(columns, at_g, -1),
        _seen(ends - starts, f, g),
    )


def _seen(
    mass: Float[jax.Array, "*batch pairs"],
    f: Float[jax.Array, "*batch n"],
    g: Float[jax.Array, "*batch m"],
) -> Float[jax.Array, "*batch pairs"]:
    """The mass, but nan if a number has no place in the order: every cost is then nan."""
    fine = jnp.isfinite(f).all(-1, keepdims=True) & jnp.isfinite(g).all(-1, keepdims=True)
    return jnp.where(fine, mass, jnp.nan)


def _check(f: Array, g: Array, f_weights: Weights, g_weights: Weights) -> None:
    checks.shapes(
        f=(f, "number *batch n"),
        g=(g, "number *batch m"),
        f_weights=(f_weights, "number *weighted n"),
        g_weights=(g_weights, "number *others m"),
    )


def _power(x: jax.Array, p: int | float) -> jax.Array:
    return jnp.abs(x) if p == 1 else jnp.square(x) if p == 2 else jnp.abs(x) ** p


def _cumulative(
    weights: Weights, order: Int[jax.Array, "*batch n"], shape: tuple[int, ...]
) -> Float[jax.Array, "*batch n"]:
    """Upper ends of the nodes' intervals on [0, 1], in the order given; the last is exactly 1."""
    n = shape[-1]
    if weights is None:
        return jnp.broadcast_to(jnp.arange(1, n + 1, dtype=real(0.0).dtype) / n, shape)
    weights = jnp.broadcast_to(real(weights), shape)
    total = jnp.cumsum(jnp.take_along_axis(weights, order, -1), axis=-1)
    # Rounding may pass 1.
    return jnp.minimum(total / total[..., -1:], 1.0)


_search = jnp.vectorize(jnp.searchsorted, signature="(n),(pairs)->(pairs)")
