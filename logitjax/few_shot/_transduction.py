"""TransCLIP and TDA: joint or online classification of pictures on top of any head."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.few_shot._method import unit_rows
from logitjax.ops import Array, Number, checks

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
    """Log-probabilities of pictures classified together, from the logits of a head.

    Classes are Gaussians with one diagonal covariance, fitted to all, and nearby pictures agree::

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


@functools.partial(jax.jit, static_argnames=("shots", "negative_shots"))
def adapt_online(
    logits: Float[Array, "n classes"],
    features: Float[Array, "n features"],
    *,
    weight: Number = 2.0,
    sharpness: Number = 5.0,
    negative: Number = 0.117,
    shots: int = 3,
    negative_shots: int = 2,
) -> Float[jax.Array, "n classes"]:
    """Logits of pictures in their order, each with the most confident earlier ones as a cache.

    ::

        s + weight sum exp(-sharpness (1 - f.F)) onehot(class predicted for F)
          - negative sum exp(-(1 - f.G)) [.03 < p_k(G) < 1]

    F are the `shots` pictures with the lowest entropy of each predicted class, G the
    `negative_shots` of those whose entropy is between .2 and .5 of the largest. As released, the
    entropy is in nats and the largest in bits, so the maximum is .693; and a picture enters the
    caches before it is scored itself. The order matters, so report it. The default weights are
    those for ImageNet; the code has others for each data set. Source: Karmanov et al., Efficient
    Test-Time Adaptation of Vision-Language Models (CVPR 2024, arXiv 2403.18293).

    Args:
        logits: `[n, classes]` of the zero-shot classifier, or of any head.
        features: `[n, features]` of the pictures.
        weight, sharpness: alpha and beta, 1 to 5 and 1 to 8 in the code.
        negative: Weight of the pictures that indicate what a picture is not.
        shots, negative_shots: Number of pictures of each class in the two caches.

    >>> import numpy as np
    >>> features = np.array([[1.0, 0], [0, 1], [0.8, 0.6]])
    >>> scores = adapt_online(8 * features, features, sharpness=1.0)
    >>> print(*(f"{score:.2f}" for score in scores[2]))
    9.92 6.02
    """
    checks.shapes(logits=(logits, "float n classes"), features=(features, "float n features"))
    logits, features = checks.as_float(logits, "logits"), unit_rows(features)
    classes, width = logits.shape[1], features.shape[1]

    def put(cache: tuple[Any, Any], where: Any, entropy: Any, item: Any, allowed: Any) -> Any:
        """Replace the worst picture of the class in a cache, if this one is better."""
        entropies, items = cache
        row, rows = entropies[where], items[where]
        better = allowed & (entropy < row[-1])
        row = row.at[-1].set(jnp.where(better, entropy, row[-1]))
        rows = rows.at[-1].set(jnp.where(better, item, rows[-1]))
        order = jnp.argsort(row)
        return entropies.at[where].set(row[order]), items.at[where].set(rows[order])

    def near(feature: jax.Array, cache: tuple[Any, Any], sharpness: Any) -> jax.Array:
        entropies, items = cache
        cosines = items[..., :width] @ feature
        return jnp.where(entropies < jnp.inf, jnp.exp(-sharpness * (1 - cosines)), 0.0)

    def step(caches: Any, row: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        (positive, negatives), (score, feature) = caches, row
        shares = jax.nn.softmax(score)
        entropy = -jax.scipy.special.xlogy(shares, shares).sum()
        where, doubt = score.argmax(), entropy / math.log2(classes)
        positive = put(positive, where, entropy, feature, True)
        unsure = (doubt > 0.2) & (doubt < 0.5)
        named = jnp.concatenate([feature, (shares > 0.03) & (shares < 1)])
        negatives = put(negatives, where, entropy, named, unsure)
        score = score + weight * near(feature, positive, sharpness).sum(-1)
        off = near(feature, negatives, 1.0)
        return (positive, negatives), score - negative * jnp.einsum(
            "cs,csk->k", off, negatives[1][..., width:]
        )

    def empty(count: int, width: int) -> tuple[jax.Array, jax.Array]:
        kind = features.dtype
        return jnp.full((classes, count), jnp.inf, kind), jnp.zeros((classes, count, width), kind)

    given: Any = (logits.astype(features.dtype), features)
    start = (empty(shots, width), empty(negative_shots, width + classes))
    return jax.lax.scan(step, start, given)[1]
