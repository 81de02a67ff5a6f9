"""Choice of a token from logits: penalties, truncation, and noise that each row draws itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, Integer, Shaped

from logitjax.ops import Array, checks

# Below this temperature, the most likely token is taken.
_COLDEST = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for choosing the next token.

    The order is that of transformers: penalties, temperature, top-k, top-p of the remaining tokens,
    min-p. Entries that tie with the last one kept are kept too.

    Attributes:
        temperature: 0 takes the most likely token; of the fields below only the penalties then
            matter.
        top_k: keep this many of the largest logits; 0 keeps all.
        top_p: keep the fewest most likely tokens that together have this probability.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: logits of tokens seen in the prompt or generated are divided by it where
            positive, multiplied where negative.
        presence_penalty: subtracted once from the logit of every token that was generated.
        frequency_penalty: the same, once for every time that the token was generated.
        seed: seed of the row's own noise. What a row draws depends on its seed and on how many
            tokens it has generated, not on its neighbours.

    >>> Sampling(temperature=0.7, top_p=0.9).top_k
    0
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.between(self.temperature, 0.0, float("inf"), "temperature")
        checks.between(self.top_k, 0, 2**31 - 1, "top_k")
        checks.between(self.min_p, 0.0, 1.0, "min_p")
        checks.between(self.seed, 0, 2**32 - 1, "seed")
        checks.between(self.presence_penalty, -1e6, 1e6, "presence_penalty")
        checks.between(self.frequency_penalty, -1e6, 1e6, "frequency_penalty")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(
                f"repetition_penalty: expected a positive number, got {self.repetition_penalty}"
            )

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """`Sampling` of several rows as arrays ``[rows]``, so that every row can have its own."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any


def sampling_rows(settings: Sequence[Sampling]) -> SamplingRows:
    kinds = {"top_k": np.int32, "seed": np.uint32}
    names = [field.name for field in dataclasses.fields(SamplingRows)]
    columns = {name: [getattr(s, name) for s in settings] for name in names}
    return SamplingRows(
        **{name: np.array(c, kinds.get(name, np.float32)) for name, c in columns.items()}
    )


def penalize_repetition(
    logits: Float[Array, "rows vocab"],
    seen: Bool[Array, "rows vocab"],
    penalty: Float[Array, " rows"],
) -> Float[jax.Array, "rows vocab"]:
    """Logits with seen tokens penalised: CTRL (arXiv 1909.05858), negative as in transformers."""
    logits, factor = checks.as_float(logits, "logits"), jnp.asarray(penalty)[:, None]
    # Less probable on either side of zero.
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def penalize_counts(
    logits: Float[Array, "rows vocab"],
    counts: Int[Array, "rows vocab"],
    presence: Float[Array, " rows"],
    frequency: Float[Array, " rows"],
) -> Float[jax.Array, "rows vocab"]:
    """Logits minus a penalty for every time that their token was generated."""
    # As in OpenAI's API reference, generated tokens count and the prompt does not.
    logits, often = checks.as_float(logits, "logits"), jnp.asarray(counts, jnp.float32)
    presence, frequency = (jnp.asarray(p)[:, None] for p in (presence, frequency))
    return logits - presence * (often > 0) - frequency * often


def allow_only(
    logits: Float[Array, "rows vocab"], allowed: Shaped[Array, "rows words"]
) -> Float[jax.Array, "rows vocab"]:
    """Logits of tokens whose bit is set, `v % 32` of word `v // 32`; `-inf` for the others."""
    logits, words = checks.as_float(logits, "logits"), jnp.asarray(allowed, jnp.uint32)
    tokens = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
    bits = jnp.repeat(words, 32, axis=-1)[:, : len(tokens)] >> (tokens % 32)
    return jnp.where(bits & 1 == 1, logits, -jnp.inf)


def _sortable(values: jax.Array) -> jax.Array:
    # Floats of one sign are ordered as their bits are; negative ones in reverse.
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    # Both zeros are one value.
    bits = jnp.where(values == 0, jnp.uint32(0), bits)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(keys: jax.Array, weights: jax.Array, total: jax.Array) -> jax.Array:
    """The largest t, bit by bit, such that weights of keys >= t reach ``total``; ``[rows]``."""

    def bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(keys >= candidate[:, None], weights, 0).sum(axis=-1)
        return jnp.where(reached >= total, candidate, threshold)

    # One bit at a time from the top: 32 sums instead of a sort of the vocabulary.
    return lax.fori_loop(0, 32, bit, jnp.zeros_like(keys, shape=keys.shape[:1]))


def truncate(
    logits: Float[Array, "rows vocab"],
    *,
    top_k: Int[Array, " rows"] | None = None,
    top_p: Float[Array, " rows"] | None = None,
    min_p: Float[Array, " rows"] | None = None,
) -> Float[jax.Array, "rows vocab"]:
    """Logits of the kept tokens, by `Sampling`'s thresholds; `-inf` for the others."""
    logits = checks.as_float(logits, "logits")
    peak = logits.max(axis=-1, keepdims=True)
    keep = jnp.isfinite(logits)
    if top_k is not None or top_p is not None:
        keys = _sortable(logits)
        if top_k is not None:
            selected = jnp.where(jnp.asarray(top_k) > 0, top_k, logits.shape[-1])
            threshold = _largest_threshold(keys, jnp.ones_like(keys), selected)
            keep &= keys >= threshold[:, None]
        if top_p is not None:
            weights = jnp.where(keep, jnp.exp(logits - peak), 0)
            selected = jnp.asarray(top_p) * weights.sum(axis=-1)
            threshold = _largest_threshold(keys, weights, selected)
            # Rounding of the sums must not cut anything when nothing should be cut.
            keep &= (keys >= threshold[:, None]) | (jnp.asarray(top_p) >= 1)[:, None]
    if min_p is not None:
        keep &= logits >= peak + jnp.log(jnp.asarray(min_p))[:, None]
    # The most likely token always stays, whatever the settings.
    return jnp.where(keep | (logits == peak), logits, -jnp.inf)


def row_keys(
    seeds: Integer[Array, " rows"], counts: Int[Array, " rows"]
) -> Shaped[jax.Array, " rows"]:
    """The PRNG key of each row's next draw: its seed, folded with its number of drawn tokens."""
    return jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(
        jnp.asarray(seeds), jnp.asarray(counts)
    )


def sampling_logits(
    logits: Float[Array, "rows vocab"], rows: SamplingRows
) -> Float[jax.Array, "rows vocab"]:
    """Logits whose softmax is the distribution that tokens are drawn from."""
    logits = checks.as_float(logits, "logits")
    cold = rows.temperature == 0
    # Minus the largest, divided by no denormal number: never infinity minus infinity.
    peak = logits.max(axis=-1, keepdims=True)
    scale = jnp.where(cold, 1, jnp.maximum(rows.temperature, _COLDEST))[:, None]
    level = jnp.minimum(peak, jnp.finfo(logits.dtype).max)
    warm = jnp.where(logits == -jnp.inf, -jnp.inf, (logits - level) / scale)
    used = ~cold & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))

    def cut(values: jax.Array) -> jax.Array:
        return truncate(values, top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p)

    warm = lax.cond(used.any(), cut, lambda values: values, warm)
    best = logits == peak
    return jnp.where(cold[:, None], jnp.where(best, 0.0, -jnp.inf), warm)


def sample(
    logits: Float[Array, "rows vocab"],
    rows: SamplingRows,
    counts: Int[Array, " rows"],
    keys: Shaped[jax.Array, " rows"] | None = None,
) -> Int[jax.Array, " rows"]:
    """One token per row after `counts` earlier draws; the most likely at temperature 0."""
    logits = checks.as_float(logits, "logits")
    greedy = logits.argmax(axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        warm = sampling_logits(logits, rows)
        local = row_keys(rows.seed, counts) if keys is None else keys
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(local)
        drawn = (warm + noise).argmax(axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature == 0, greedy, drawn)

    return lax.cond((jnp.asarray(rows.temperature) > 0).any(), draw, lambda: greedy)
