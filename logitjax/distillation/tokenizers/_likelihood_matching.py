import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from logitjax.distillation.tokenizers._alignment import Chunks
from logitjax.losses import Head, sweep
from logitjax.models import Tokenizer
from logitjax.ops import Array, AxisName, Number, checks, gather_at
from logitjax.ops import mesh as on_mesh

_LEAST = 1e-30
# Keeps chunks from being certain: the divergence's gradient has 1 - q in its denominator.
_OFFSET = 1e-6
# Minimum probability that a word begins for a chunk to end there (tokenkit).
_LEAST_BOUNDARY = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSet:
    """Set of tokens, bool `[vocab]`, as a static argument that is equal only to itself."""

    members: np.ndarray


def boundary_tokens(tokenizer: Tokenizer) -> TokenSet:
    """Tokens that begin a word: those with a leading space or line break, and special tokens."""
    return TokenSet(
        np.array([not text or text[:1] in b" \n\r\t" for text in tokenizer.token_bytes()])
    )


class Likelihood(NamedTuple):
    """Log-probabilities `[*batch]` of the label, and of any boundary token in its place."""

    label: Any
    boundary: Any


def linear_likelihood(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    labels: Int[Array, "*batch"],
    boundary: TokenSet,
    **options: Any,
) -> Likelihood:
    """Log-probabilities of labels and of word beginnings, from one sweep; differentiable."""
    tokens = {"labels": labels}
    return sweep.run(LikelihoodStatistic(boundary), hidden, head, tokens=tokens, **options)


class _Sums(NamedTuple):
    log_z: Any
    label: Any
    mass: Any


@dataclasses.dataclass(frozen=True)
class LikelihoodStatistic(sweep.Statistic):
    """The label's logit and the mass of a set of tokens."""

    boundary: TokenSet

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return sweep.OnlineSums.start(batch, dtype, terms=1), jnp.zeros(batch, dtype)

    def absorb(self, state: Any, block: sweep.LogitBlock, passed: Any) -> Any:
        sums, label = state
        hit = block.is_at(block.tokens["labels"])
        label = label + jnp.where(hit, block.student, 0.0).sum(-1)
        return sums.add(block.student, self._members(block)), label

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        sums, label = state
        return sums.reduce(axis_name), lax.psum(label, axis_name)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        sums, label = state
        total, mass = sums.sums
        out = _Sums(sums.log_sum, label, mass / jnp.maximum(total, _LEAST))
        # The sums are also the residuals, so no logit is kept for the backward pass.
        return out, out

    def gradient(self, residuals: Any, cotangents: Any, block: sweep.LogitBlock) -> jax.Array:
        log_z, _, mass = residuals
        q = jnp.exp(block.student - jnp.where(log_z == -jnp.inf, 0.0, log_z)[..., None])
        inside = self._members(block) - mass[..., None]
        slope = cotangents.log_z[..., None] + cotangents.mass[..., None] * inside
        hit = block.is_at(block.tokens["labels"])
        return q * slope + jnp.where(hit, cotangents.label[..., None], 0.0)

    def losses(self, outputs: Any, tokens: Any) -> Likelihood:
        boundary = jnp.log(jnp.maximum(outputs.mass, _LEAST))
        return Likelihood(outputs.label - outputs.log_z, boundary)

    def _members(self, block: sweep.LogitBlock) -> jax.Array:
        array = jnp.asarray(self.boundary.members)
        at = jnp.minimum(block.columns, len(array) - 1)
        return jnp.where(block.columns < len(array), array[at], False).astype(block.student.dtype)


def chunk_log_likelihood(
    logprobs: Float[Array, "*batch positions"],
    chunk_ids: Int[Array, "*batch positions"],
    num_chunks: int,
) -> Float[jax.Array, "*batch chunks"]:
    """Sum log-probabilities over each chunk's labels (id -1: no chunk); 0 for empty chunks."""
    logprobs, ids = jnp.asarray(logprobs), jnp.asarray(chunk_ids)

    def sums(logprobs: jax.Array, ids: jax.Array) -> tuple[jax.Array]:
        rows = tuple(lax.broadcasted_iota(jnp.int32, ids.shape, a) for a in range(ids.ndim))
        out = jnp.zeros((*ids.shape[:-1], num_chunks + 1), logprobs.dtype)
        stored = ids >= 0
        # Labels outside all chunks are added to an extra one, which is cut off.
        selected = jnp.where(stored, ids, num_chunks)
        return (out.at[(*rows[:-1], selected)].add(jnp.where(stored, logprobs, 0.0))[..., :-1],)

    return on_mesh.over_batch(sums, (ids.ndim,), logprobs, ids)[0]


def binarized_kl(
    student: Float[Array, "*batch"], teacher: Float[Array, "*batch"], temperature: Number
) -> Float[jax.Array, "*batch"]:
    """KL between two probabilities of one event: that this chunk comes next.

    ::

        p = exp(l_T / tau),  q = exp(l_S / tau),  l at most -1e-6
        p log(p/q) + (1 - p) log((1 - p) / (1 - q))
        tau = inf: tau times it -> a log(a/b) + b - a,  a = -l_T, b = -l_S

    References:
        Minixhofer et al., Universal cross-tokenizer distillation via approximate likelihood
        matching, 2025 (arXiv 2503.20083); tokenkit. The limit is ours.
    """
    checks.positive(temperature, "temperature")
    # Sums of rounded log-probabilities may come out above 0, where 1 - q is negative.
    log_q = jnp.minimum(jnp.asarray(student, jnp.float32), 0.0) - _OFFSET
    log_p = jnp.minimum(lax.stop_gradient(jnp.asarray(teacher, jnp.float32)), 0.0) - _OFFSET
    if isinstance(temperature, float) and math.isinf(temperature):
        a, b = -log_p, -log_q
        return a * jnp.log(a / b) + b - a
    log_q, log_p = log_q / temperature, log_p / temperature
    not_p, not_q = _log1mexp(log_p), _log1mexp(log_q)
    return jnp.exp(log_p) * (log_p - log_q) + jnp.exp(not_p) * (not_p - not_q)


def _log1mexp(x: jax.Array) -> jax.Array:
    """`log(1 - exp(x))` for negative x, accurate near both ends."""
    far = x < -math.log(2.0)
    # The derivative of the branch that is not taken must not be nan.
    return jnp.where(
        far,
        jnp.log1p(-jnp.exp(jnp.where(far, x, -1.0))),
        jnp.log(-jnp.expm1(jnp.where(far, -1.0, x))),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkScores:
    """A teacher's log-probabilities of chunks of text, at the student's positions.

    Attributes:
        ids: int32 `[rows, length - 1]`, the chunk of each of the student's labels; -1 for none.
        ends: int32 `[rows, length - 1]`, for each chunk the student's position after its last
            label, which predicts what follows; -1 if that is not used.
        scores: float32 `[rows, length - 1]`, the teacher's log-probability of each chunk.
        where: bool `[rows, length - 1]`, the chunks that exist.
    """

    ids: Any
    ends: Any
    scores: Any
    where: Any


def chunk_scores(
    chunks: Chunks, likelihoods: Mapping[str, np.ndarray], *, special: np.ndarray
) -> ChunkScores:
    """Sum a teacher's log-probabilities over chunks, on the host.

    A sequence of tokens implies that no longer token covers its end. So, as tokenkit recommends,
    chunks are joined until the teacher finds it probable enough that a word begins after them, and
    the log-probability of that is added on both sides.

    `likelihoods` has `label` and `boundary`, log-probabilities at the teacher's positions, and
    `special` marks labels that are special tokens, `[rows, teacher's length - 1]` each.
    """
    array = np.asarray(chunks.theirs)
    rows, places = np.nonzero(array >= 0)
    shape = chunks.ours.shape
    scores, ids = np.zeros(shape, np.float32), np.asarray(chunks.ours).copy()
    # `+=` with repeated indices would only add the last of each chunk.
    np.add.at(scores, (rows, array[rows, places]), np.asarray(likelihoods["label"])[rows, places])
    where = np.arange(shape[1]) < chunks.counts[:, None]
    ends = np.full(shape, -1, np.int32)
    sides = {"ours": ids, "theirs": array}
    last = {name: _extreme(np.maximum, side, shape, -9) for name, side in sides.items()}
    closing = np.zeros(shape, bool)
    closing[rows, array[rows, places]] = special[rows, places]
    # What follows a chunk is predicted from the position after its last label.
    after = np.clip(last["theirs"] + 1, 0, array.shape[1] - 1)
    boundary = np.take_along_axis(np.asarray(likelihoods["boundary"]), after, axis=1)
    with_boundary = where & ~closing
    existing = (last["theirs"] + 1 < array.shape[1]) & (last["ours"] + 1 < shape[1])
    cut = where & (closing | (existing & (boundary > np.log(_LEAST_BOUNDARY))))
    # A chunk also ends before a special token, and where its text is not continued.
    more = np.pad(where, ((0, 0), (0, 1)))[:, 1:]
    first = np.pad(_extreme(np.minimum, ids, shape, 1 << 30), ((0, 0), (0, 1)))[:, 1:]
    before = np.pad(closing, ((0, 0), (0, 1)))[:, 1:]
    cut |= where & existing & more & (before | (first != last["ours"] + 1))
    joined = np.cumsum(cut, axis=1) - cut
    complete = joined < cut.sum(1, keepdims=True)
    joined = np.where(where & complete, joined, -1)
    ids = np.where(ids >= 0, np.take_along_axis(joined, np.maximum(ids, 0), axis=1), -1)
    out = np.zeros(shape, np.float32)
    row, old = np.nonzero(joined >= 0)
    np.add.at(out, (row, joined[row, old]), scores[row, old])
    row, old = np.nonzero(cut & with_boundary)
    out[row, joined[row, old]] += boundary[row, old]
    ends[row, joined[row, old]] = last["ours"][row, old] + 1
    return ChunkScores(
        ids=ids.astype(np.int32),
        ends=ends,
        scores=out,
        where=np.arange(shape[1]) < cut.sum(1, keepdims=True),
    )


def _extreme(extreme: np.ufunc, ids: np.ndarray, shape: tuple[int, ...], none: int) -> np.ndarray:
    """First (`np.minimum`) or last (`np.maximum`) position of each chunk."""
    out = np.full(shape, none)
    row, location = np.nonzero(ids >= 0)
    extreme.at(out, (row, ids[row, location]), location)
    return out


def likelihood_matching(
    student: Likelihood, chunks: ChunkScores, *, temperature: Number = 100.0
) -> Float[jax.Array, "*batch chunks"]:
    """Divergence of each chunk; 0 for chunks that do not exist."""
    value = binarized_kl(chunk_likelihood(student, chunks), chunks.scores, temperature)
    return jnp.where(chunks.where, value, 0.0)


def chunk_likelihood(student: Likelihood, chunks: ChunkScores) -> Float[jax.Array, "*batch chunks"]:
    """The student's log-probability of each chunk, with a word's end wherever scores include it."""
    log_likelihood = chunk_log_likelihood(student.label, chunks.ids, chunks.ids.shape[-1])
    ends = jnp.asarray(chunks.ends)
    after = gather_at(student.boundary, jnp.maximum(ends, 0))
    return log_likelihood + jnp.where(ends >= 0, after, 0.0)
