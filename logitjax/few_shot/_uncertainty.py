"""How sure a zero-shot classifier is of an image, as a factor of the bias added to its logits."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.few_shot._method import centred, z_score
from logitjax.ops import Array, Number, checks

Measure = Literal["none", "kurtosis", "entropy", "max", "margin", "top5", "energy", "std"]
_MEASURES = ("none", "kurtosis", "entropy", "max", "margin", "top5", "energy", "std")
# The released code divides the kurtosis of 1000 probabilities by this.
OFFICIAL_NORMALIZER = 250.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """The factor of the bias: large where the zero-shot classifier is unsure.

    ======== ==============================================================
    measure  factor, with x the probabilities or the logits
    ======== ==============================================================
    none     1
    kurtosis `(mean(z(x)^4) / normalizer) ^ -rho`
    entropy  `exp(rho * H(p) / log K)`
    max      `max(x) ^ -rho`
    margin   `(max(x) - min(x)) ^ -rho`
    top5     `(max(x) - fifth largest) ^ -rho`
    energy   `(2 log sum exp((x - max(x)) / 2) + 2 max(x)) ^ -rho`
    std      `std(x)`, whatever rho
    ======== ==============================================================

    z is `z_score`. The kurtosis of probabilities grows with the number of classes K (one-hot:
    about K), so a fixed normaliser makes beta mean something else on every data set;
    `'classes'`, K / 4, is 250 at K = 1000 and does not. The kurtosis of logits is 2 to 3 for any
    K and hardly depends on how sure the classifier is. A class at `-inf` is not there and not
    counted in K; of logits, `max` and `energy` want positive ones.

    Attributes:
        measure: A row of the table.
        of: `'probabilities'`, as in the released code, or `'logits'`, as in the paper; the
            entropy is always of probabilities.
        exponent: rho.
        normalizer: What the kurtosis is divided by: a number (released code: 250), `'classes'` or
            None for 1.
    """

    measure: Measure = "none"
    of: Literal["probabilities", "logits"] = "probabilities"
    exponent: Number = 0.4
    normalizer: Number | Literal["classes"] | None = None

    def __post_init__(self) -> None:
        if self.measure not in _MEASURES:
            raise ValueError(
                f"measure: expected one of {', '.join(_MEASURES)}, got {self.measure!r}"
            )
        if self.of not in ("probabilities", "logits"):
            raise ValueError(f"of: expected 'probabilities' or 'logits', got {self.of!r}")
        if isinstance(self.normalizer, str) and self.normalizer != "classes":
            raise ValueError(
                f"normalizer: expected a number, 'classes' or None, got {self.normalizer!r}"
            )


def uncertainty_weight(
    zero_shot: Float[Array, "*batch classes"], config: Uncertainty
) -> Float[jax.Array, "*batch 1"]:
    """The factor of the bias, for each image; it has no parameters and can be computed once.

    ::

        s = s0 + beta * uncertainty_weight(s0) * s_bias

    References:
        Tang et al., AMU-Tuning (arXiv 2404.08958); measures and constants from `clip/amu.py` of its
        repository (its energy adds the maximum after the division by the temperature 2 and before
        the product with it, which is kept).
    """
    logits = checks.as_float(zero_shot, "zero_shot")
    measure, rho = config.measure, config.exponent
    classes = logits.shape[-1]
    if measure == "none":
        return jnp.ones((*logits.shape[:-1], 1), logits.dtype)
    there = logits != -jnp.inf
    count = there.sum(-1, keepdims=True)
    if measure == "entropy":
        log_p = jax.nn.log_softmax(logits)
        # A class without mass has no part in the entropy.
        terms = jnp.where(there, jnp.exp(log_p) * jnp.where(there, log_p, 0.0), 0.0)
        most = jnp.log(jnp.maximum(count, 2))
        return jnp.exp(-rho * terms.sum(-1, keepdims=True) / most)
    x = jax.nn.softmax(logits) if config.of == "probabilities" else logits
    if measure == "std":
        deviation, _ = centred(x, there)
        return jnp.sqrt(jnp.square(deviation).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1))
    if measure == "kurtosis":
        fourth = z_score(jnp.where(there, x, -jnp.inf)) ** 4
        level = fourth.sum(-1, keepdims=True) / jnp.maximum(count, 1)
        if config.normalizer is not None:
            by = count / 4 if isinstance(config.normalizer, str) else config.normalizer
            level = level / by
        return level**-rho
    top = x.max(-1, keepdims=True)
    if measure == "max":
        level = top
    elif measure == "margin":
        level = top - x.min(-1, keepdims=True, where=there, initial=jnp.inf)
    elif measure == "top5":
        if classes < 5:
            raise ValueError(f"zero_shot: expected at least 5 classes for 'top5', got {classes}")
        level = top - jax.lax.top_k(x, 5)[0][..., -1:]
    else:
        parts = jnp.where(there, jnp.exp((x - top) / 2.0), 0.0)
        level = 2.0 * (jnp.log(parts.sum(-1, keepdims=True)) + top)
    return level**-rho
