import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.ops import Array, checks, logsumexp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TailSample:
    """Tokens sampled with replacement from a distribution outside its top k.

    Attributes:
        values: the teacher's logits of them, on the scale of the top k logits, `[*batch, m]`.
        indices: their vocabulary ids, int32, `[*batch, m]`.
        log_probs: their log-probabilities `[*batch, m]` when sampled outside the top k; None for
            the teacher's. For a student's samples, replace `values` by the teacher's.
    """

    values: Any
    indices: Any
    log_probs: Any = None

    @classmethod
    def draw(
        cls,
        key: Any,
        logits: Float[Array, "*batch vocab"],
        top_indices: Int[Array, "*batch k"],
        samples: int,
    ) -> "TailSample":
        """Sample tokens outside the top k in proportion to their probabilities.

        `v_s ~ p_v / p_rest` for v outside the top k, `s = 1..m`.

        Args:
            key: `jax.random.key`.
            logits: `[*batch, vocab]`, of the model to sample from; `-inf` entries are never
                sampled.
            top_indices: `[*batch, k]`, ids to leave out.
            samples: m, at least 1.

        Returns:
            `TailSample`. If nothing is left outside the top k, arbitrary ids with logits of `-inf`.

        Raises:
            TypeError: logits that are not floating point, or ids that are not integers.
            ValueError: fewer than one sample, shapes that do not fit, or (outside of `jit`) an id
                outside the vocabulary.

        >>> import jax, jax.numpy as jnp
        >>> logits = jnp.array([5.0, 1.0, -jnp.inf])
        >>> draw = jax.jit(TailSample.draw, static_argnums=3)
        >>> drawn = draw(jax.random.key(0), logits, jnp.array([0]), 3)
        >>> drawn.indices.tolist(), drawn.values.tolist(), drawn.log_probs.tolist()
        ([1, 1, 1], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
        """
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        checks.shapes(
            logits=(logits, "float *batch vocab"), top_indices=(top_indices, "int *batch k")
        )
        checks.ids(top_indices, logits.shape[-1], "top_indices")
        logits = checks.as_float(logits, "logits")
        batch, vocab = logits.shape[:-1], logits.shape[-1]
        rows = logits.reshape(math.prod(batch), vocab)
        excluded = jnp.asarray(top_indices).reshape(len(rows), top_indices.shape[-1])
        # Negative ids would count from the end.
        excluded = jnp.where(excluded < 0, vocab, excluded)
        # Ids beyond the vocabulary are dropped.
        rest = rows.at[jnp.arange(len(rows))[:, None], excluded].set(-jnp.inf)
        log_rest = logsumexp(rest)
        some = log_rest != -jnp.inf
        shares = jnp.exp(rest - jnp.where(some, log_rest, 0.0)[:, None])
        cumulative = jnp.cumsum(shares, axis=-1)
        # Uniform up to the total, in the open interval, so that no entry of mass zero is hit.
        uniform = jax.random.uniform(
            key, (len(rows), samples), minval=jnp.finfo(jnp.float32).tiny, maxval=1.0
        )
        drawn = jax.vmap(jnp.searchsorted)(cumulative, uniform * cumulative[:, -1:])
        # Rounding may exceed the last id.
        ids = jnp.minimum(drawn, vocab - 1).astype(jnp.int32)
        values = jnp.where(some[:, None], jnp.take_along_axis(rows, ids, axis=-1), -jnp.inf)
        odd = jnp.isnan(log_rest) | (excluded >= vocab).any(-1)
        values = jnp.where(odd[:, None], jnp.nan, values).reshape(*batch, samples)
        log_rest = jnp.where(some, log_rest, 0.0).reshape(*batch, 1)
        return cls(values=values, indices=ids.reshape(values.shape), log_probs=values - log_rest)
