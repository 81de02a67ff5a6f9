"""A head through a bottleneck: the plainest way to save parameters, to compare with."""

from typing import Any

import jax
import jax.numpy as jnp

from logitjax.heads import HeadCost


def fit_low_rank(
    rows: Any, unigram: Any, hidden_mean: Any, hidden_cov: Any, rank: int
) -> dict[str, jax.Array]:
    """The low-rank head `(h D) W^T + b` nearest to a full one, in the metric of the hidden states.

    Minimises `sum_v sqrt(u_v) (w_v - w'_v)^T Cov(h) (w_v - w'_v)`, by an eigendecomposition;
    what is lost at the mean hidden state goes into the bias.
    """
    rows = jnp.asarray(rows, jnp.float32)
    weights = jnp.asarray(unigram, jnp.float32)
    # A token that was never counted still weighs a hundredth of a mean one.
    weights = jnp.maximum(weights / weights.sum(), 0.01 / rows.shape[0]) ** 0.5
    root, inverse = metric_roots(hidden_cov)
    mapped = rows @ root
    _, vectors = jnp.linalg.eigh(jnp.einsum("vi,v,vj->ij", mapped, weights, mapped))
    # In the metric's coordinates the best of a rank is a projection (Eckart and Young). `eigh`
    # sorts upwards.
    best = vectors[:, ::-1][:, :rank]
    down, kernel = inverse @ best, mapped @ best
    mean = jnp.asarray(hidden_mean, jnp.float32)
    return {"down": down, "kernel": kernel, "bias": rows @ mean - kernel @ (mean @ down)}


def low_rank_cost(hidden: int, vocab: int, rank: int) -> HeadCost:
    """What such a head costs in float32."""
    parameters = rank * (vocab + hidden) + vocab
    return HeadCost(
        parameters=parameters,
        stored_bytes=parameters * 4,
        read_bytes=parameters * 4,
        decode_flops=2 * rank * (vocab + hidden),
        train_flops=6 * rank * (vocab + hidden),
        exact=rank >= hidden,
    )


def metric_roots(cov: Any) -> tuple[jax.Array, jax.Array]:
    """The square root of a covariance and its inverse; tiny eigenvalues are lifted."""
    values, vectors = jnp.linalg.eigh(jnp.asarray(cov, jnp.float32))
    values = jnp.sqrt(jnp.maximum(values, 1e-6 * values[-1]))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
