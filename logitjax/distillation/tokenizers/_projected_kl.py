"""Divergences from a teacher of another vocabulary, in that vocabulary."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from logitjax import losses
from logitjax.distillation.tokenizers._projection import Members, TokenProjection
from logitjax.losses import Blocks, Head, sweep
from logitjax.ops import Array, AxisName, TopK, checks, gather_at, logsumexp
from logitjax.ops.sharding import over_batch

# Logits of so many of our tokens a position are gathered; where there may be more, sums over the
# whole vocabulary are cheaper.
MOST_MEMBERS = 4096
_LEAST = 1e-37


def project_top_k(
    student: losses.Readout, teacher: TopK, members: Members
) -> tuple[losses.Readout, TopK]:
    """Student and teacher over the teacher's top k, whatever the student's vocabulary.

    ::

        q'_i = sum_{s: slot(s) = i} w_s q_s

    A token of the teacher that no token of ours stands for joins the rest: there both are `-inf`.
    What comes out goes into `losses.sparse_kl_divergence` of either direction.

    Args:
        student: the student's readout at `members.ids`, `[*batch, m]`.
        teacher: `TopK`, `[*batch, k]`, of `TokenProjection.merged`.
        members: members from `TokenProjection.members(teacher.indices)`.

    Returns:
        The student's `log q'` `[*batch, k]` with a `log_z` of 0, and the teacher's `TopK`.
    """
    k = teacher.values.shape[-1]
    log_q = jnp.where(members.slots < k, student.gathered - student.log_z[..., None], -jnp.inf)

    def sums(log_q: jax.Array, slots: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        zeros = jnp.zeros((*slots.shape[:-1], k + 1), log_q.dtype)
        masses = (weights * jnp.exp(log_q), weights)
        return tuple(zeros.at[_rows(slots)].add(mass)[..., :-1] for mass in masses)

    parts = log_q, members.slots, members.weights
    masses, held = over_batch(sums, (log_q.ndim,) * 2, *parts)
    return _in_theirs(masses, held > 0, teacher)


def _in_theirs(masses: jax.Array, held: jax.Array, teacher: TopK) -> tuple[losses.Readout, TopK]:
    log_q = jnp.where(held, jnp.log(jnp.maximum(masses, _LEAST)), -jnp.inf)
    values = jnp.where(held, teacher.values, -jnp.inf)
    return (
        losses.Readout(jnp.zeros_like(teacher.log_z), gathered=log_q),
        TopK(values, teacher.indices, teacher.log_z),
    )


def projected_kl_divergence(
    student: Float[Array, "*batch vocab"],
    teacher: TopK,
    projection: TokenProjection,
    *,
    direction: Literal["forward", "reverse"] = "forward",
) -> Float[jax.Array, "*batch"]:
    """KL divergence from a teacher of another vocabulary, known by its top k logits.

    The student's probabilities are summed up over its tokens that stand for the same token of the
    teacher, and the teacher's over its tokens that count as the same one. One bucket holds what is
    outside the teacher's top k, and what stands for no token.

    ::

        sum_{i<=k} p'_i log(p'_i / q'_i) + p_rest log(p_rest / q'_rest),   q' = W^T q

    With the rule `first_piece` it is sound wherever both models have read the same text: `q'_j` and
    `p'_j` are the probabilities that the next text begins with the token j of both.

    Args:
        student: logits `[*batch, vocab]`.
        teacher: `TopK`, `[*batch, k]`, of its own vocabulary. Gets no gradient.
        projection: W, from `token_projection`; static.
        direction: 'forward' for KL(teacher || student), 'reverse' for the other.

    Returns:
        `[*batch]`, float32.

    Raises:
        ValueError: shapes do not fit.

    >>> import jax, numpy as np
    >>> ours, theirs = ["201", "2", "0", "1", "x"], ["2", "0", "1", "x"]   # numerals, X-Token
    >>> first = np.array([[theirs.index(token[0])] for token in ours], np.int32)
    >>> projection = TokenProjection(ids=first, weights=np.ones((5, 1), np.float32), size=4)
    >>> student, teacher = np.log([0.5, 0.1, 0.1, 0.1, 0.2]), np.log([0.6, 0.1, 0.1, 0.2])
    >>> kl = jax.jit(lambda s, t: projected_kl_divergence(s, TopK.of(t, 3), projection))
    >>> bool(kl(student, teacher) < 1e-6)   # both models say the same
    True

    References:
        X-Token (arXiv 2605.21699), its P-KL: there W spreads each token over its pieces, a chunk's
        teacher is a mean of logarithms, and both are renormalised over 8192 columns.
    """
    logits = checks.as_float(student, "student")
    _check(logits.shape[-1], projection)
    teacher = projection.merged(lax.stop_gradient(teacher))
    members = projection.members(teacher.indices)
    held = losses.Readout(logsumexp(logits), gathered=gather_at(logits, members.ids))
    return _divergence(*project_top_k(held, teacher, members), direction)


def linear_projected_kl_divergence(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    teacher: TopK,
    projection: TokenProjection,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    weights: Float[Array, "*batch"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*losses"]:
    """`projected_kl_divergence` of a linear head's logits, which never exist as a whole.

    The sweep over the vocabulary picks the logits of our tokens that stand for the teacher's top k
    as it passes them. Where these may be too many (the teacher's vocabulary is much smaller), it
    sums each block over tokens that stand for the same one, which takes a byte for each of the
    teacher's tokens and each position.

    Args:
        hidden: `[*batch, hidden]`, the student's.
        head: a `Head`, or a kernel `[hidden, vocab]` or `[vocab, hidden]` alone.
        teacher: `TopK`, `[*batch, k]`. Gets no gradient.
        projection: W; static.
        direction: as in `projected_kl_divergence`.
        weights: `[*batch]`. Gives the scalar `sum(weights * loss)` and forms gradients in the same
            sweep as the value. A position of weight 0 counts for nothing.
        blocks: sizes of the blocks.
        axis_name: mesh axis that splits the head's vocabulary, inside `jax.shard_map`.

    Returns:
        `[*batch]` float32, or a scalar with `weights`.

    Raises:
        ValueError: shapes do not fit.
    """
    head = Head.of(head).resolve(jnp.shape(hidden)[-1])
    _check(head.vocab_size(axis_name), projection)
    teacher = lax.stop_gradient(teacher)
    if projection.capacity(teacher.indices.shape[-1]) > MOST_MEMBERS:
        statistic, tokens, scan = bucket_sums(teacher, projection, direction=direction)
        value = sweep.run(
            statistic,
            hidden,
            head,
            tokens=tokens,
            weights=weights,
            blocks=blocks or scan,
            axis_name=axis_name,
        )
        return value if weights is None else value[0]
    teacher = projection.merged(teacher)
    members = projection.members(teacher.indices)
    told = {"teacher": teacher, "members": members}
    loss = _forward if direction == "forward" else _reverse
    options: Any = dict(ids=members.ids, blocks=blocks, axis_name=axis_name)
    if weights is None:
        return loss(losses.linear_readout(hidden, head, **options), told)
    return losses.linear_fused_loss(hidden, head, loss, told, weights, **options)[0]


def bucket_sums(
    teacher: TopK, projection: TokenProjection, *, direction: str = "forward"
) -> tuple[sweep.Statistic, Any, Blocks]:
    """The statistic of a projected divergence from sums over whole rows, its tokens and blocks."""
    teacher = projection.merged(teacher)
    k = teacher.indices.shape[-1]
    statistic = _BucketSums(projection=projection, k=k, direction=direction)
    tokens = {"teacher": teacher, "slots": _slots(teacher.indices, projection.size)}
    # Whole rows of logits would be most of the memory that this saves.
    return statistic, tokens, Blocks(engine="scan")


def _forward(readout: losses.Readout, told: Any, direction: str = "forward") -> jax.Array:
    return _divergence(*project_top_k(readout, told["teacher"], told["members"]), direction)


def _reverse(readout: losses.Readout, told: Any) -> jax.Array:
    return _forward(readout, told, "reverse")


def _divergence(student: losses.Readout, teacher: TopK, direction: Any) -> jax.Array:
    return losses.sparse_kl_divergence(student, teacher, direction=direction)


def _check(vocab: int, projection: TokenProjection) -> None:
    if len(projection.ids) > vocab:
        raise ValueError(
            f"projection: expected at most the student's {vocab} tokens, got {len(projection.ids)}"
        )


def _slots(wanted: jax.Array, size: int) -> jax.Array:
    """Which of the k `wanted` each of their tokens is, `[*batch, size + 1]`; k if none."""
    k = wanted.shape[-1]
    small = jnp.uint8 if k < 1 << 8 else jnp.int32
    table = jnp.full((*wanted.shape[:-1], size + 1), k, small)
    numbers = lax.broadcasted_iota(jnp.int32, wanted.shape, wanted.ndim - 1)
    # What a model has beyond its tokenizer is nobody's.
    return table.at[_rows(wanted)].set(numbers.astype(small), mode="drop").at[..., size].set(k)


def _rows(ids: jax.Array) -> tuple[jax.Array, ...]:
    """Indices of `ids` along the last axis of an array with the same others."""
    batch = (lax.broadcasted_iota(jnp.int32, ids.shape, a) for a in range(ids.ndim - 1))
    return (*batch, ids)


class _Masses(NamedTuple):
    log_z: Any
    masses: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BucketSums(sweep.Statistic):
    """The student's mass at each of the teacher's top k, from sums over all of its tokens.

    A scatter of single numbers is slow everywhere. So whole columns of a block are added up, all
    positions at once: those whose tokens stand for the same one of theirs.
    """

    projection: TokenProjection
    k: int
    direction: str

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return sweep.OnlineSums.start(batch, dtype), jnp.zeros((*batch, self.k), dtype)

    def absorb(self, state: Any, block: sweep.LogitBlock, passed: Any) -> Any:
        sums, masses = state
        new = sums.add(block.student)
        mass = jnp.exp(block.student - new.peak[..., None])
        wanted = block.tokens["teacher"].indices
        found = jnp.zeros_like(masses)
        for ids, weights in self._columns(block):
            ordered = jnp.sort(ids)
            place = jnp.searchsorted(ordered, ids)
            columns = jnp.moveaxis(mass * weights, -1, 0)
            table = jax.ops.segment_sum(columns, place, num_segments=len(ids))
            at = jnp.minimum(jnp.searchsorted(ordered, wanted), len(ids) - 1)
            # Most are in other blocks: these read one line of memory, not each its own.
            here = ordered[at] == wanted
            at = jnp.where(here, at, 0)
            found += jnp.where(here, table[(at, *_rows(at)[:-1])], 0.0)
        return new, masses * jnp.exp(sums.peak - new.peak)[..., None] + found

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        sums, masses = state
        new = sums.reduce(axis_name)
        scale = jnp.exp(sums.peak - new.peak)[..., None]
        return new, lax.psum(masses * scale, axis_name)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        sums, masses = state
        out = _Masses(sums.log_sum, masses / jnp.maximum(sums.sums[0], 1e-30)[..., None])
        return out, out

    def gradient(self, residuals: Any, cotangents: Any, block: sweep.LogitBlock) -> jax.Array:
        log_z, masses = residuals
        q = jnp.exp(block.student - jnp.where(log_z == -jnp.inf, 0.0, log_z)[..., None])
        slots = block.tokens["slots"]
        told = jnp.concatenate([cotangents.masses, jnp.zeros_like(log_z)[..., None]], axis=-1)
        slope = cotangents.log_z - (cotangents.masses * masses).sum(-1)
        slope = slope[..., None] + sum(
            jnp.take_along_axis(told, slots[..., ids].astype(jnp.int32), axis=-1) * weights
            for ids, weights in self._columns(block)
        )
        return q * slope

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        teacher = tokens["teacher"]
        size = self.projection.size
        # A model may have more logits than its tokenizer has tokens.
        held = jnp.asarray(self.projection.sizes > 0)[jnp.minimum(teacher.indices, size - 1)]
        held = held & (teacher.indices < size)
        return _divergence(*_in_theirs(outputs.masses, held, teacher), self.direction)

    def _columns(self, block: sweep.LogitBlock) -> list[tuple[jax.Array, jax.Array]]:
        """For each entry of a row of W: their tokens and weights at the block's columns."""
        size = self.projection.size
        # The head may have more columns than the tokenizer has tokens.
        at = jnp.minimum(block.columns, len(self.projection.ids) - 1)
        known = block.columns < len(self.projection.ids)
        out = []
        for r in range(self.projection.ids.shape[1]):
            ids = jnp.asarray(self.projection.ids[:, r])[at]
            there = known & (ids >= 0)
            weights = jnp.where(there, jnp.asarray(self.projection.weights[:, r])[at], 0.0)
            out.append((jnp.where(there, ids, size), weights))
        return out
