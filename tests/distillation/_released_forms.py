"""GOLD's and X-Token's losses as they were released, chunk by chunk, from two live models.

They need whole rows of both models, so they are for comparison: what `logitjax distill` trains with
is sound and needs the teacher's top logits alone. Each is a function of the logits of a chunk's
tokens; `linear_chunk_loss` calls it on a few chunks at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from logitjax.distillation.tokenizers._alignment import Chunks
from logitjax.distillation.tokenizers._matched_tokens import Matches
from logitjax.distillation.tokenizers._projection import TokenProjection
from logitjax.losses import Head
from logitjax.ops import Array, Number

Form = Literal["released", "corrected"]
_LEAST = 1e-8
_SORTED = 8192


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkTokens:
    """The positions and labels of each chunk on one side, padded.

    Attributes:
        row: int32 `[chunks]`, the row of the batch.
        positions: int32 `[chunks, most]`, where its labels are predicted.
        labels: int32 `[chunks, most]`.
        where: bool `[chunks, most]`, those that there are.
    """

    row: Any
    positions: Any
    labels: Any
    where: Any

    @classmethod
    def of(cls, ids: np.ndarray, tokens: np.ndarray, most: int = 4) -> "ChunkTokens":
        """From one side of `Chunks` and the tokens of its rows, `most` labels a chunk at most.

        Chunks of more labels have none here; there are `rows * (length - 1)`, most of them empty.
        """
        shape = ids.shape
        order = np.full((*shape, most), -1, np.int64)
        row, position = np.nonzero(ids >= 0)
        chunk = ids[row, position]
        fresh = np.ones(len(row), bool)
        fresh[1:] = (row[1:] != row[:-1]) | (chunk[1:] != chunk[:-1])
        start = np.maximum.accumulate(np.where(fresh, np.arange(len(row)), 0))
        rank = np.arange(len(row)) - start
        few = rank < most
        order[row[few], chunk[few], rank[few]] = position[few]
        long = np.zeros(shape, bool)
        long[row[~few], chunk[~few]] = True
        order[long] = -1
        flat = order.reshape(-1, most)
        rows = np.repeat(np.arange(shape[0]), shape[1])
        where = flat >= 0
        positions = np.maximum(flat, 0)
        labels = np.asarray(tokens)[rows[:, None], positions + 1]
        return cls(
            row=rows.astype(np.int32),
            positions=positions.astype(np.int32),
            labels=labels.astype(np.int32),
            where=where,
        )

    @classmethod
    def pair(
        cls, chunks: Chunks, ours: np.ndarray, teacher_ids: np.ndarray, most: int = 4
    ) -> "tuple[ChunkTokens, ChunkTokens]":
        """Both sides, without the chunks that are too long on either."""
        sides = [
            cls.of(np.asarray(ids), tokens, most)
            for ids, tokens in (
                (chunks.ours, ours),
                (_widened(chunks.theirs, chunks.ours), teacher_ids),
            )
        ]
        both = sides[0].where.any(-1) & sides[1].where.any(-1)
        one, two = (dataclasses.replace(s, where=s.where & both[:, None]) for s in sides)
        return one, two


def _widened(teacher_ids: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Their chunks in as many places as ours have, so that chunks are numbered alike."""
    if teacher_ids.shape[1] != ours.shape[1]:
        raise ValueError(
            f"chunks: expected rows of one length, got {ours.shape}, {teacher_ids.shape}"
        )
    return teacher_ids


def chunk_hybrid(
    student: Float[Array, "chunks most vocab"],
    teacher: Float[Array, "chunks most vocab2"],
    ours: ChunkTokens,
    teacher_tokens: ChunkTokens,
    matches: Matches,
    *,
    beta: float = 0.5,
    weight: float | None = None,
) -> Float[jax.Array, " chunks"]:
    """TRL's GOLD: JSD of matched tokens and L1 of the sorted others, of `bayesian` merges.

    ::

        merge  (prod of the probabilities of the actual earlier tokens) P(. | last token)
        loss   w JSD_beta(p_M, q_M) + (1 - w) sum_r |sort(p_U)_r - sort(q_U)_r|,  w = |M| / V_T

    GOLD's other merge, `observed`, multiplies rows that predict one token as if they predicted the
    one before. It is not implemented.

    Args:
        student: logits of each chunk's tokens.
        teacher: likewise.
        ours: which they are.
        theirs: likewise.
        matches: M.
        beta: share of the teacher in the mixture.
        weight: w; the share of the teacher's vocabulary that is matched if None.

    Returns:
        `[chunks]` float32; 0 for those that are empty.
    """
    q, p = _merged(student, ours), _merged(jax.lax.stop_gradient(teacher), teacher_tokens)
    at = np.flatnonzero(matches.ours >= 0)
    q_m, p_m = q[:, matches.ours[at]], p[:, at]
    log_q, log_p = (jnp.log(jnp.maximum(x, _LEAST)) for x in (q_m, p_m))
    if beta in (0.0, 1.0):
        over, under = (log_p, log_q) if beta == 0.0 else (log_q, log_p)
        matched = (jnp.exp(over) * (over - under)).sum(-1)
    else:
        mix = jnp.logaddexp(log_q + np.log1p(-beta), log_p + np.log(beta))
        matched = beta * (jnp.exp(log_p) * (log_p - mix)).sum(-1)
        matched += (1 - beta) * (jnp.exp(log_q) * (log_q - mix)).sum(-1)
    w = len(at) / max(matches.ours.shape[0], 1) if weight is None else weight
    q_u = q[:, np.flatnonzero(~np.isin(np.arange(q.shape[-1]), matches.ours[at]))]
    p_u = p[:, np.flatnonzero(~np.isin(np.arange(p.shape[-1]), at))]
    unmatched = _sorted_distance(p_u, q_u, None) if q_u.shape[-1] and p_u.shape[-1] else 0.0
    return jnp.where(ours.where.any(-1), w * matched + (1.0 - w) * unmatched, 0.0)


def chunk_projected_kl(
    student: Float[Array, "chunks most vocab"],
    teacher: Float[Array, "chunks most vocab2"],
    ours: ChunkTokens,
    teacher_tokens: ChunkTokens,
    projection: TokenProjection,
    columns: Any,
    *,
    form: Form = "released",
    temperature: Number = 1.0,
) -> Float[jax.Array, " chunks"]:
    """X-Token's P-KL on some of the teacher's columns.

    ::

        q' = W^T softmax(z_S / T) on K, arithmetic mean over the chunk, renormalised in K
        p  = exp(mean over the chunk of log_softmax(z_T / T on K)); corrected: the mean of softmaxes
        T^2 sum_K p (log p - log(q' + 1e-10))

    Where a chunk has several tokens the geometric mean has mass below 1, and the sum may be
    negative.

    Args:
        student: logits of each chunk's tokens.
        teacher: likewise.
        ours: which they are.
        theirs: likewise.
        projection: W.
        columns: int `[K]`, as `loudest_columns` has them.
        form: which mean.
        temperature: T.

    Returns:
        `[chunks]` float32; 0 for those that are empty.
    """
    q = _mean(jax.nn.softmax(student / temperature), ours)
    table = jnp.zeros((len(q), projection.size + 1), q.dtype)
    for r in range(projection.ids.shape[1]):
        ids, weights = projection.ids[:, r], projection.weights[:, r]
        part = q[:, : len(ids)] * np.where(ids >= 0, weights, 0.0)
        table = table.at[:, np.where(ids >= 0, ids, projection.size)].add(part)
    q = table[:, columns]
    q = q / jnp.maximum(q.sum(-1, keepdims=True), 1e-30)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher)[..., columns] / temperature)
    if form == "released":
        log_p = _mean(log_p, teacher_tokens)
    else:
        log_p = jnp.log(jnp.maximum(_mean(jnp.exp(log_p), teacher_tokens), 1e-30))
    value = temperature**2 * (jnp.exp(log_p) * (log_p - jnp.log(q + 1e-10))).sum(-1)
    return jnp.where(ours.where.any(-1), value, 0.0)


def chunk_hybrid_kl(
    student: Float[Array, "chunks most vocab"],
    teacher: Float[Array, "chunks most vocab2"],
    ours: ChunkTokens,
    teacher_tokens: ChunkTokens,
    matches: Matches,
    *,
    form: Form = "released",
    temperature: Number = 1.0,
) -> Float[jax.Array, " chunks"]:
    """X-Token's H-KL: KL over common tokens, and L1 of the sorted others.

    ::

        T^2 (sum_common p log(p / q) + sum_r |sort(p)_r - sort(q)_r| over the uncommon, top 8192)

    p and q are geometric means over the chunk (`released`), of mass below 1, or arithmetic ones.

    Args:
        student: logits of each chunk's tokens.
        teacher: likewise.
        ours: which they are.
        theirs: likewise.
        matches: the common tokens.
        form: which mean.
        temperature: T.

    Returns:
        `[chunks]` float32; 0 for those that are empty.
    """
    sides = []
    for logits, tokens in ((student, ours), (jax.lax.stop_gradient(teacher), teacher_tokens)):
        log_probs = jax.nn.log_softmax(logits / temperature)
        if form == "released":
            sides.append(_mean(log_probs, tokens))
        else:
            sides.append(jnp.log(jnp.maximum(_mean(jnp.exp(log_probs), tokens), 1e-30)))
    log_q, log_p = sides
    at = np.flatnonzero(matches.ours >= 0)
    mine = matches.ours[at]
    common = (jnp.exp(log_p[:, at]) * (log_p[:, at] - log_q[:, mine])).sum(-1)
    p = jnp.exp(log_p[:, np.flatnonzero(~np.isin(np.arange(log_p.shape[-1]), at))])
    q = jnp.exp(log_q[:, np.flatnonzero(~np.isin(np.arange(log_q.shape[-1]), mine))])
    ranks = min(_SORTED, p.shape[-1], q.shape[-1])
    others = _sorted_distance(p, q, ranks) if ranks else 0.0
    return jnp.where(ours.where.any(-1), temperature**2 * (common + others), 0.0)


def common_tokens(projection: TokenProjection, least: float = 0.6) -> Matches:
    """X-Token's common tokens: rows of a large weight, one of ours for each of theirs.

    The highest weight wins, then the lowest id.
    """
    best = projection.weights.max(-1)
    ours = np.full(projection.size, -1, np.int32)
    matched = np.zeros(len(best), bool)
    for id_ in np.lexsort((-np.arange(len(best)), best)):
        if best[id_] >= least and projection.only[id_] >= 0:
            ours[projection.only[id_]] = id_
    matched[ours[ours >= 0]] = True
    return Matches(ours=ours, matched=matched)


def loudest_columns(teacher: Float[Array, "*batch vocab"], size: int = 8192) -> jax.Array:
    """The columns with the largest logits over all positions, as X-Token chooses them."""
    peak = jnp.max(teacher, axis=tuple(range(teacher.ndim - 1)))
    return jax.lax.top_k(peak, min(size, peak.shape[-1]))[1]


def linear_chunk_loss(
    loss: Callable[..., jax.Array],
    student: tuple[Any, Any],
    teacher: tuple[Any, Any],
    ours: ChunkTokens,
    teacher_tokens: ChunkTokens,
    *,
    block: int = 32,
) -> Float[jax.Array, " chunks"]:
    """A loss of chunks from hidden states and heads, on a few chunks' logits at a time.

    Args:
        loss: `(student logits, teacher logits, ours, theirs) -> [chunks]`, one of this module with
            the rest of its arguments given.
        student: hidden states `[rows, positions, hidden]`, and the head.
        teacher: likewise. Gets no gradient.
        ours: the chunks.
        theirs: the chunks.
        block: chunks at a time.

    Returns:
        `[chunks]` float32.
    """
    heads = [Head.of(head).resolve(hidden.shape[-1]) for hidden, head in (student, teacher)]

    @jax.checkpoint
    def some(kernels: Any, here: Any) -> jax.Array:
        logits = []
        for hidden, kernel, tokens in zip((student[0], teacher[0]), kernels, here, strict=True):
            states = hidden[tokens.row[:, None], tokens.positions].astype(jnp.float32)
            logits.append(states @ kernel)
        return loss(*logits, *here)

    kernels = [(h.kernel if h.axis == 1 else h.kernel.T).astype(jnp.float32) for h in heads]
    count = len(ours.row)
    blocks = -(-count // block)
    padded = jax.tree.map(
        lambda x: jnp.pad(x, [(0, blocks * block - count)] + [(0, 0)] * (jnp.ndim(x) - 1)).reshape(
            blocks, block, *jnp.shape(x)[1:]
        ),
        (ours, teacher_tokens),
    )
    return jax.lax.map(lambda here: some(kernels, here), padded).reshape(-1)[:count]


def _merged(logits: Any, tokens: ChunkTokens) -> jax.Array:
    """The rows of each chunk's last label, times the probabilities of the labels before it."""
    probs = jax.nn.softmax(logits)
    count = tokens.where.sum(-1)
    last = jnp.take_along_axis(probs, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    actual = jnp.take_along_axis(probs, tokens.labels[..., None], axis=-1)[..., 0]
    earlier = jnp.arange(actual.shape[-1]) < (count - 1)[:, None]
    return last * jnp.where(earlier, jnp.maximum(actual, _LEAST), 1.0).prod(-1)[:, None]


def _mean(values: jax.Array, tokens: ChunkTokens) -> jax.Array:
    """Over the labels of each chunk."""
    where = tokens.where[..., None]
    return jnp.where(where, values, 0.0).sum(1) / jnp.maximum(where.sum(1), 1)


def _sorted_distance(p: jax.Array, q: jax.Array, ranks: int | None) -> jax.Array:
    p, q = (jnp.sort(x, axis=-1, descending=True) for x in (p, q))
    size = max(p.shape[-1], q.shape[-1]) if ranks is None else ranks
    p, q = (jnp.pad(x, [(0, 0), (0, max(size - x.shape[-1], 0))])[:, :size] for x in (p, q))
    return jnp.abs(p - q).sum(-1)
