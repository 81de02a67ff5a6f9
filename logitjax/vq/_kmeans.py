"""Weighted k-means in a metric, in blocks of rows: never points x centres at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Key

from logitjax.ops import Array

# Batches of centres drawn by the start; more batches read the points more often for little.
_SEEDING_ROUNDS = 16


def fit_kmeans(
    points: Float[Array, "points dim"],
    weights: Float[Array, " points"],
    metric: Float[Array, "dim dim"] | None,
    num_centres: int,
    *,
    key: Key[jax.Array, ""],
    iterations: int = 20,
    block_size: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """Lloyd's algorithm for ``sum_i w_i |x_i - c|^2_M`` from a blocked k-means++ start.

    Returns the centre of each point, int32, and the centres. The start draws centres in 16 batches,
    each point with odds of weight times squared distance to the centres so far (k-means|| without
    oversampling). A centre that loses its points moves to one of the worst served points. Arthur
    and Vassilvitskii, k-means++, 2007; Bahmani et al., Scalable k-means++, 2012.
    """
    points, weights = jnp.asarray(points), jnp.asarray(weights, jnp.float32)
    count = points.shape[0]
    if not 1 <= num_centres <= count:
        raise ValueError(
            f"num_centres: expected a number between 1 and {count} points, got {num_centres}"
        )
    if metric is not None:
        metric = jnp.asarray(metric, jnp.float32)
    block_size = min(block_size, count)
    squares = _squares(points, metric, block_size=block_size)
    centres = _seed(key, points, weights, metric, squares, num_centres, block_size=block_size)
    return _lloyd(
        points, weights, metric, squares, centres, iterations=iterations, block_size=block_size
    )


def nearest(
    points: Array, centres: Array, metric: Array | None, *, block_size: int = 2048
) -> tuple[jax.Array, jax.Array]:
    """The nearest centre of each point, and the squared distance minus the point's own square."""
    centres = jnp.asarray(centres, jnp.float32)
    # Centres are fewer than points.
    mapped = centres if metric is None else centres @ metric
    offset = (mapped * centres).sum(-1)

    def block(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        # |c|^2 - 2 x.c, without the point's square.
        cost = offset - 2.0 * rows.astype(jnp.float32) @ mapped.T
        return cost.argmin(-1).astype(jnp.int32), cost.min(-1)

    return over_rows(block, jnp.asarray(points), block_size)


def over_rows(block: Callable[[jax.Array], Any], rows: jax.Array, block_size: int) -> Any:
    """`block` over slices of the rows, concatenated; the last slice is taken from the end."""
    count = rows.shape[0]
    block_size = min(block_size, count)
    blocks = count // block_size

    def one(start: jax.Array) -> Any:
        return block(lax.dynamic_slice_in_dim(rows, start, block_size))

    # Slices in the loop instead of a reshape before it, which would copy all rows.
    out = lax.map(one, jnp.arange(blocks) * block_size)
    out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    if blocks * block_size == count:
        return out
    last = block(rows[blocks * block_size :])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, last)


@functools.partial(jax.jit, static_argnames="block_size")
def _squares(points: jax.Array, metric: jax.Array | None, *, block_size: int) -> jax.Array:
    def block(rows: jax.Array) -> jax.Array:
        rows = rows.astype(jnp.float32)
        mapped = rows if metric is None else rows @ metric
        return (mapped * rows).sum(-1)

    return over_rows(block, points, block_size)


@functools.partial(jax.jit, static_argnames=("num_centres", "block_size"))
def _seed(
    key: jax.Array,
    points: jax.Array,
    weights: jax.Array,
    metric: jax.Array | None,
    squares: jax.Array,
    num_centres: int,
    *,
    block_size: int,
) -> jax.Array:
    count, rounds = points.shape[0], min(_SEEDING_ROUNDS, num_centres)
    # Padded by repeating the last draw, so that all rounds have one shape.
    per_round = -(-num_centres // rounds)
    tiny = jnp.finfo(jnp.float32).tiny

    def draw(distance: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The k largest of these are k draws without replacement.
        odds = jnp.log(jnp.maximum(weights, tiny)) + jnp.log(jnp.maximum(distance, tiny))
        _, chosen = lax.top_k(odds + jax.random.gumbel(key, (count,)), per_round)
        _, cost = nearest(points, points[chosen], metric, block_size=block_size)
        # A difference may round below 0.
        distance = jnp.minimum(distance, jnp.maximum(cost + squares, 0.0))
        return distance.at[chosen].set(0.0), chosen

    # The first centres by weight alone.
    _, chosen = lax.scan(draw, jnp.ones(count), jax.random.split(key, rounds))
    return points[chosen.reshape(-1)[:num_centres]].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("iterations", "block_size"))
def _lloyd(
    points: jax.Array,
    weights: jax.Array,
    metric: jax.Array | None,
    squares: jax.Array,
    centres: jax.Array,
    *,
    iterations: int,
    block_size: int,
) -> tuple[jax.Array, jax.Array]:
    num_centres = centres.shape[0]

    def update(centres: jax.Array, _: None) -> tuple[jax.Array, None]:
        assignment, cost = nearest(points, centres, metric, block_size=block_size)
        distance = jnp.maximum(cost + squares, 0.0) * weights
        means, mass = weighted_means(
            points, weights, assignment, num_centres, block_size=block_size
        )
        empty = mass <= 0
        # The j-th empty centre goes to the j-th worst served point.
        worst = lax.top_k(distance, num_centres)[1]
        rank = jnp.clip(jnp.cumsum(empty) - 1, 0)
        means = jnp.where(empty[:, None], points[worst[rank]].astype(jnp.float32), means)
        return means, None

    centres, _ = lax.scan(update, centres, None, length=iterations)
    assignment, _ = nearest(points, centres, metric, block_size=block_size)
    means, mass = weighted_means(points, weights, assignment, num_centres, block_size=block_size)
    # An empty centre stays.
    return assignment, jnp.where(mass[:, None] > 0, means, centres)


def weighted_means(
    points: jax.Array,
    weights: jax.Array,
    assignment: jax.Array,
    num_centres: int,
    *,
    block_size: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """Weighted means of the points of each centre (zero if it has none), and the weights."""
    count, dim = points.shape
    block_size = min(block_size, count)
    sums = jnp.zeros((num_centres, dim), jnp.float32)

    def add(sums: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        rows, weight, location = (
            lax.dynamic_slice_in_dim(x, start, block_size) for x in (points, weights, assignment)
        )
        # Slices stop at the end, so the last may overlap: rows counted before have weight zero.
        fresh = jnp.maximum(start - (count - block_size), 0) <= jnp.arange(block_size)
        rows = rows.astype(jnp.float32) * jnp.where(fresh, weight, 0.0)[:, None]
        return sums.at[location].add(rows), None

    sums, _ = lax.scan(add, sums, jnp.arange(0, count, block_size))
    mass = jax.ops.segment_sum(weights, assignment, num_segments=num_centres)
    safe = jnp.where(mass > 0, mass, 1.0)
    return sums / safe[:, None], mass
