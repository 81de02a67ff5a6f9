"""TDA: pictures arrive one after another and are classified with the earlier ones."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.few_shot._method import unit_rows
from logitjax.ops import Array, Number, checks


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
        """The cache with the picture in place of the worst of its class, if it is better."""
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

    inputs: Any = (logits.astype(features.dtype), features)
    start = (empty(shots, width), empty(negative_shots, width + classes))
    return jax.lax.scan(step, start, inputs)[1]
