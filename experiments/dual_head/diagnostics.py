"""Signs of collapse: whether the two gradients conflict, and the geometry of features and classes.

The measures are those of the neural-collapse literature (Papyan, Han and Donoho, 2020), in which
complete collapse means that all of them go to zero:

* `within`: variability within classes over that between them, `tr(S_w S_b^+) / C`;
* `norms` and `angles`: how unequal the class means' norms are, and how far their mean cosine
  stands from the simplex's `-1 / (C - 1)`, which no set of C vectors reaches in fewer than
  `C - 1` dimensions;
* `duality`: distance of the head's rows from the class means, both scaled to length one;
* `disagreement`: how often the head and the nearest class mean differ.

`cosine_trunk`, `cosine_head` and `ratio_trunk` compare the gradient of the logit loss (times alpha)
with that of the cross-entropy; two-head arms share no head, so they have no `cosine_head`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from logitjax import distillation

MEASURES = (
    "cosine_trunk",
    "cosine_head",
    "ratio_trunk",
    "within",
    "norms",
    "angles",
    "duality",
    "disagreement",
)


def head_kernel(model: Any) -> Any:
    """The kernel of the head that predicts."""
    head = model.head
    return (head.fc if hasattr(head, "fc") else head).kernel[...]


def geometry(features: Any, labels: Any, logits: Any, kernel: Any, classes: int) -> dict[str, Any]:
    """The neural-collapse measures of features `[n, d]`."""
    member = jax.nn.one_hot(labels, classes)
    counts = member.sum(0)
    present = counts > 0
    number = present.sum()
    means = member.T @ features / jnp.maximum(counts, 1)[:, None]
    centre = (means * present[:, None]).sum(0) / number
    centred = jnp.where(present[:, None], means - centre, 0.0)
    within = features - means[labels]
    scatter_within = within.T @ within / len(features)
    scatter_between = centred.T @ centred / number
    trace = jnp.trace(scatter_within @ jnp.linalg.pinv(scatter_between, hermitian=True, rtol=1e-5))
    norms = jnp.linalg.norm(centred, axis=1)
    mean_norm = norms.sum() / number
    spread = jnp.sqrt(jnp.where(present, jnp.square(norms - mean_norm), 0.0).sum() / number)
    unit = centred / jnp.maximum(norms, 1e-12)[:, None]
    cosines = unit @ unit.T
    pairs = present[:, None] & present[None, :] & ~jnp.eye(classes, dtype=bool)
    ideal = -1.0 / (number - 1)
    angles = jnp.where(pairs, jnp.abs(cosines - ideal), 0.0).sum() / pairs.sum()
    rows = jnp.where(present[:, None], kernel.T, 0.0)
    rows = rows - jnp.where(present[:, None], rows.sum(0) / number, 0.0)
    duality = jnp.linalg.norm(
        rows / jnp.linalg.norm(rows) - centred / jnp.maximum(jnp.linalg.norm(centred), 1e-12)
    )
    distance = jnp.square(features).sum(1)[:, None] - 2 * features @ means.T
    distance = jnp.where(present, distance + jnp.square(means).sum(1), jnp.inf)
    return {
        "within": trace / classes,
        "norms": spread / mean_norm,
        "angles": angles,
        "duality": duality,
        "disagreement": (distance.argmin(1) != logits.argmax(1)).mean(),
    }


def compare_gradients(losses: Callable[[Any], tuple[Any, Any]], params: Any) -> dict[str, Any]:
    """Cosines of the gradients of the task and logit losses, and a ratio of their norms."""
    values, pullback = jax.vjp(losses, params)
    one, zero = jnp.ones_like(values[0]), jnp.zeros_like(values[0])
    (task,), (logit,) = pullback((one, zero)), pullback((zero, one))
    trunk = distillation.align_gradients(task, logit, trunk="backbone")[1]
    head = distillation.align_gradients(task, logit, trunk="head")[1]
    return {
        "cosine_trunk": trunk["cosine"],
        "cosine_head": head["cosine"],
        "ratio_trunk": trunk["norm_ratio"],
    }
