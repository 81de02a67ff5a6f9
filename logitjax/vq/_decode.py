"""The vector-quantised head in decoding: exact top-k and exact samples from K cluster scores."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Key

from logitjax.ops import Array, TopK, checks, logsumexp
from logitjax.vq._loss import cluster_log_mass, code_scores, on_batch, token_bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQTables:
    """Look-up tables for decoding, made once per bias and temperature by `VQTables.of`.

    Attributes:
        best: ``[codes, width]`` tokens of a cluster by decreasing bias, padded with -1. Rows are
            ordered by their first token, so that of equal logits the lowest token comes first.
        best_bias: ``[codes, width]``, their biases, padded with ``-inf``.
        code: ``[codes]``, the cluster of each of these rows.
        members: ``[vocab]`` tokens, cluster by cluster.
        starts: ``[codes + 1]``, the start of each cluster in ``members``.
        cumulative: ``[vocab]``, running sum of ``exp(bias) / B`` within a cluster, in that order.
        log_mass: ``[codes]``, ``log B``.
        temperature: the divisor of the biases.
    """

    best: jax.Array
    best_bias: jax.Array
    code: jax.Array
    members: jax.Array
    starts: jax.Array
    cumulative: jax.Array
    log_mass: jax.Array
    temperature: jax.Array

    @classmethod
    def of(
        cls,
        bias: Float[Array, " vocab"] | None,
        assignment: Int[Array, " vocab"],
        num_codes: int,
        *,
        width: int = 64,
        temperature: float | Array = 1.0,
        vocab_where: Bool[Array, " vocab"] | None = None,
    ) -> "VQTables":
        """Sort every cluster by bias, in O(V log V).

        The temperature divides the biases here, and the scores in `top_k` and `sample`.

        Args:
            bias: ``[vocab]``, or None for the head as published.
            assignment: ``[vocab]``, cluster of each entry.
            width: the largest ``k`` for `top_k`.
            vocab_where: ``[vocab]``, True for the entries that exist.

        Raises:
            TypeError: arrays of another kind.
            ValueError: ``width`` is not positive, shapes do not fit, or (outside ``jit``) a token
                is in a cluster that does not exist.

        >>> tables = VQTables.of(jnp.array([0.0, 1.0, 2.0]), jnp.array([1, 0, 1]), 2, width=2)
        >>> print(tables.best.tolist(), tables.code.tolist())
        [[1, -1], [2, 0]] [0, 1]
        """
        if width < 1:
            raise ValueError(f"width: expected a positive number, got {width}")
        checks.shapes(assignment=(assignment, "int vocab"), bias=(bias, "float vocab"))
        checks.ids(assignment, num_codes, "assignment")
        return _sorted(bias, assignment, temperature, vocab_where, num_codes, width)

    def top_k(
        self, hidden: Float[Array, "*batch hidden"], codebook: Float[Array, "codes hidden"], k: int
    ) -> TopK:
        """The k largest logits in O(K d + k^2) per token, exactly those of `vq_logits`.

        Inside a cluster the order is that of the biases, whatever the hidden state. Each of the k
        best clusters has a token that beats all tokens of lower-ranked clusters, so k tokens from
        each of k clusters are enough. Of equal logits the lowest token comes first. Returns
        ``[*batch, k]`` logits (divided by the temperature) and tokens, and ``log_z`` over the whole
        vocabulary: ``values - log_z[..., None]`` are log-probabilities.

        Args:
            codebook: ``[codes, hidden]``.
            k: number of tokens, from 1 to the width of the tables, otherwise ValueError.

        >>> tables = VQTables.of(jnp.array([0.0, 1.0, 2.0]), jnp.array([1, 0, 1]), 2, width=2)
        >>> tables.top_k(jnp.ones((1, 1)), jnp.array([[5.0], [1.0]]), 2).indices
        Array([[1, 2]], dtype=int32)
        """
        width = self.best.shape[1]
        if not 1 <= k <= width:
            raise ValueError(f"k: expected 1 to the width of the tables, {width}, got {k}")
        self._check(hidden, codebook)

        def run(hidden: Array, codebook: Array, tables: VQTables) -> tuple[jax.Array, ...]:
            scores = code_scores(hidden, codebook) / tables.temperature
            log_z = logsumexp(scores + tables.log_mass)
            by_row = jnp.take(scores, tables.code, axis=-1)  # [*batch, codes]
            _, rows = lax.top_k(by_row + tables.best_bias[:, 0], min(k, by_row.shape[-1]))
            values = jnp.take_along_axis(by_row, rows, axis=-1)[..., None]
            values = values + tables.best_bias[rows, :k]  # [*batch, k clusters, k tokens]
            values = values.reshape(*rows.shape[:-1], rows.shape[-1] * k)
            tokens = tables.best[rows, :k].reshape(values.shape)
            # Two keys: among equal logits the lowest token, whatever its cluster's rank.
            negative, tokens = lax.sort((-values, tokens), num_keys=2)
            return -negative[..., :k], tokens[..., :k], log_z

        ndim = jnp.ndim(hidden)
        return TopK(*on_batch(run, (ndim, ndim, ndim - 1), hidden, codebook, self))

    def sample(
        self,
        key: Key[jax.Array, ""],
        hidden: Float[Array, "*batch hidden"],
        codebook: Float[Array, "codes hidden"],
    ) -> Int[jax.Array, "*batch"]:
        """Tokens drawn from the exact distribution, at the tables' temperature.

        It draws the cluster, ``k ~ softmax(z + log B)``, then a token within it, ``v ~ exp(b_v) /
        B_k``, by inverting a cumulative table of that cluster only, in O(K d + log V). A single
        table over all V would be too coarse in float32. Arguments are those of `top_k`.

        >>> tables = VQTables.of(jnp.array([0.0, -jnp.inf, 2.0]), jnp.array([1, 1, 0]), 2)
        >>> tables.sample(jax.random.key(0), jnp.ones((3, 1)), jnp.array([[-50.0], [0.0]]))
        Array([0, 0, 0], dtype=int32)
        """
        self._check(hidden, codebook)

        def run(hidden: Array, codebook: Array, tables: VQTables, key: Array) -> tuple[jax.Array]:
            scores = code_scores(hidden, codebook) / tables.temperature
            cluster_key, token_key = jax.random.split(key)
            # The cluster: k ~ softmax(z + log B).
            code = jax.random.categorical(cluster_key, scores + tables.log_mass)
            start, stop = tables.starts[code], tables.starts[code + 1]
            last = jnp.maximum(stop - 1, start)
            uniform = jax.random.uniform(token_key, code.shape) * tables.cumulative[last]

            def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                low, high = bounds
                middle = (low + high) // 2
                # A finished search, low == high, stays put.
                beyond = (tables.cumulative[middle] > uniform) | (low >= high)
                return jnp.where(beyond, low, middle + 1), jnp.where(beyond, middle, high)

            steps = math.ceil(math.log2(tables.members.shape[0] + 1)) + 1
            location, _ = lax.fori_loop(0, steps, halve, (start, last))
            return (tables.members[jnp.minimum(location, last)],)

        return on_batch(run, (jnp.ndim(hidden) - 1,), hidden, codebook, self, key)[0]

    def _check(self, hidden: Any, codebook: Any) -> None:
        checks.shapes(
            hidden=(hidden, "float *batch hidden"),
            codebook=(codebook, "float codes hidden"),
            **{"tables.log_mass": (self.log_mass, "float codes")},
        )


# One program; outside `jit` each operation would be one.
@functools.partial(jax.jit, static_argnames=("num_codes", "width"))
def _sorted(
    bias: Any, assignment: Any, temperature: Any, vocab_where: Any, num_codes: int, width: int
) -> VQTables:
    assignment = jnp.asarray(assignment)
    vocab = assignment.shape[0]
    width = min(width, vocab)
    added = token_bias(bias, assignment, temperature=temperature, vocab_where=vocab_where)
    # By code, then decreasing bias.
    members = jnp.lexsort((jnp.arange(vocab), -added, assignment)).astype(jnp.int32)
    starts = jnp.searchsorted(assignment[members], jnp.arange(num_codes + 1)).astype(jnp.int32)
    places = starts[:-1, None] + jnp.arange(width)
    exists = places < starts[1:, None]  # [codes, width]
    best = jnp.where(exists, members[jnp.minimum(places, vocab - 1)], -1)
    best_bias = jnp.where(exists, added[best], -jnp.inf)
    code = jnp.argsort(jnp.where(best[:, 0] < 0, vocab, best[:, 0])).astype(jnp.int32)
    log_mass = cluster_log_mass(added, assignment, num_codes)
    # For an empty cluster.
    finite = jnp.where(jnp.isfinite(log_mass), log_mass, 0.0)
    shares = jnp.exp(added - finite[assignment])[members]
    return VQTables(
        best=best[code],
        best_bias=best_bias[code],
        code=code,
        members=members,
        starts=starts,
        cumulative=_segmented_sum(shares, assignment[members]),
        log_mass=log_mass,
        temperature=jnp.asarray(temperature, jnp.float32),
    )


def _segmented_sum(values: jax.Array, segments: jax.Array) -> jax.Array:
    """Cumulative sums that restart with each segment."""
    fresh = jnp.concatenate([jnp.ones((1,), bool), segments[1:] != segments[:-1]])

    def combine(left: tuple, right: tuple) -> tuple:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return lax.associative_scan(combine, (fresh, values))[1]
