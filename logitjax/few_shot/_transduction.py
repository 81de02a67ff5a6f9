"""TransCLIP: pictures classified together inform each other, given the logits of any head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.few_shot._method import unit_rows
from logitjax.ops import Array, checks

_HIGHEST = jax.lax.Precision.HIGHEST
# Number of pictures whose neighbours are searched at a time.
_BLOCK = 1024


@functools.partial(jax.jit, static_argnames=("rounds", "neighbours"))
def transduce(
    logits: Float[Array, "n classes"],
    features: Float[Array, "n features"],
    *,
    rounds: int = 10,
    neighbours: int = 3,
) -> Float[jax.Array, "n classes"]:
    """Log-probabilities of pictures that are classified together, from those of a head.

    Classes are Gaussians with one diagonal covariance, fitted to all, and near pictures agree::

        z = softmax(log y + (ll + 50 / (2 neighbours) (W'z + W z)) / 50)     five times a round
        ll_ik = -|(f_i - mu_k) / sigma|^2 / 2;    mu_k of length one, sigma of all pictures

    y are the head's probabilities and W the cosines with each picture's nearest. A class starts at
    the mean of its 8 most confident pictures. The result depends on the whole batch, so report its
    size. Source: Zanella et al., Boosting Vision-Language Models with Transduction (NeurIPS 2024,
    arXiv 2406.01837), without its labelled pictures: the head has learned from them.

    Args:
        logits: `[n, classes]` of the head.
        features: `[n, features]` of the pictures.
        rounds: Number of updates of the Gaussians.
        neighbours: Number of nearest pictures that should agree with each.

    >>> import numpy as np
    >>> features = np.repeat(np.eye(2), 4, 0) + np.arange(8)[:, None] / 100
    >>> logits = 5 * features
    >>> logits[3] = [0.0, 0.1]
    >>> transduce(logits, features).argmax(-1).tolist()
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    checks.shapes(logits=(logits, "float n classes"), features=(features, "float n features"))
    features = unit_rows(features)
    prior = jax.nn.log_softmax(checks.as_float(logits, "logits"))
    z, (count, width) = jnp.exp(prior), features.shape
    neighbours = min(neighbours, count - 1)

    def near(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosines, places = jax.lax.top_k(features @ row, neighbours + 1)
        # The first is the picture itself.
        return cosines[1:], places[1:]

    cosines, places = jax.lax.map(near, features, batch_size=_BLOCK)

    def agreement(z: jax.Array) -> jax.Array:
        # W z, [n, classes].
        total = (cosines[..., None] * z[places]).sum(1)
        # W' z: nearness is not mutual.
        return total.at[places].add(cosines[..., None] * z[:, None])

    surest, rows = jax.lax.top_k(z.T, min(8, count))  # [classes, 8]
    mu = unit_rows((surest[..., None] * features[rows]).mean(1))
    # For evenly distributed unit rows.
    variance = jnp.full((width,), 1 / width, features.dtype)

    def assign(z: jax.Array, mu: jax.Array, variance: jax.Array) -> jax.Array:
        # |f - mu|^2 / sigma^2 without an array of features for each picture and class.
        cross = jnp.matmul(features, (mu / variance).T, precision=_HIGHEST)
        local = jnp.square(features) @ (1 / variance)
        fit = cross - (local[:, None] + jnp.square(mu) @ (1 / variance)) / 2
        for _ in range(5):
            z = jax.nn.softmax(prior + fit / 50 + agreement(z) / (2 * max(neighbours, 1)))
        return z

    def one(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        z = assign(*carry)
        sums, counts = jnp.matmul(z.T, features, precision=_HIGHEST), z.sum(0)[:, None]
        mu = unit_rows(sums / jnp.maximum(counts, jnp.finfo(z.dtype).tiny))
        spread = jnp.square(features).sum(0) - 2 * (mu * sums).sum(0) + (counts * mu * mu).sum(0)
        # A constant column would divide by zero.
        return z, mu, jnp.maximum(spread / count, jnp.finfo(z.dtype).tiny)

    z = assign(*jax.lax.fori_loop(0, rounds, one, (z, mu, variance)))
    return jnp.log(jnp.maximum(z, jnp.finfo(z.dtype).tiny))
