"""Speculative steps: one member drafts, all members verify the draft in one pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from logitjax.decoding._ensemble import Plan
from logitjax.decoding._sampling import SamplingRows, row_keys, sampling_logits
from logitjax.decoding._step import (
    DecodeOptions,
    DecodeState,
    Emitted,
    emit,
    mark_seen,
    moved_logits,
    rows_first,
)
from logitjax.ops import Array, checks

# Draws of one token: the draft's, whether it is accepted, what comes instead.
_DRAFT, _ACCEPT, _INSTEAD = 1, 2, 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafted:
    """Of drafts, int32 `[slots]`: rounds, and tokens compared (up to a rejected one), accepted."""

    rounds: Any
    tested: Any
    accepted: Any


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Where in a plan the drafting member is."""

    stream: int
    group: int
    member: int
    alone: bool

    def params(self, params: Any) -> Any:
        """Its parameters; a copy where they lie in a stack."""
        stored = params[self.group]
        return stored if self.alone else jax.tree.map(lambda leaf: leaf[self.member], stored)

    def cache(self, cache: Any) -> Any:
        stored = cache[self.group]
        return stored if self.alone else jax.tree.map(lambda leaf: leaf[self.member], stored)

    def with_cache(self, cache: tuple, drafted: Any) -> tuple:
        """Choose the cache to verify into: the drafted one, or for a stack the original."""
        if not self.alone:
            return cache
        return (*cache[: self.group], drafted, *cache[self.group + 1 :])


def find_drafter(plan: Plan, draft: str | int) -> Drafter:
    if plan.outputs != plan.streams:
        raise ValueError("draft: the members share one pass, none can run ahead of the others")
    places = {"expert": 1 if plan.experts else None, "base": plan.experts + 1}
    stream = places.get(draft) if isinstance(draft, str) else draft
    if stream is None or not 0 < stream < plan.streams:
        raise ValueError(
            f"draft: expected 'expert', 'base' or a place from 1 to {plan.streams - 1}, "
            f"got {draft!r} with {plan.experts} experts and {plan.bases} bases"
        )
    for i, group in enumerate(plan.groups):
        if stream in group.streams:
            member = group.streams.index(stream)
            return Drafter(stream, i, member, len(group.streams) == 1)
    raise AssertionError("every stream is in a group")


def accept_or_redraw(
    logits: Float[Array, "rows vocab"],
    draft_logits: Float[Array, "rows vocab"],
    drafted: Int[Array, " rows"],
    rows: SamplingRows,
    counts: Int[Array, " rows"],
    *,
    present: Array | bool = True,
) -> Int[jax.Array, " rows"]:
    """The drafted token, or another one, such that what comes out is drawn from the target.

    `logits` are before temperature and truncation; the draft was drawn from the softmax of
    `draft_logits`. Where nothing is `present`, it is a plain draw. ::

        x ~ q;   accept with probability min(1, p(x) / q(x)),   else draw from (p - q)+ / |(p - q)+|

    References:
        Leviathan et al., 2023 (arXiv 2211.17192), algorithm 1; p may be a fused distribution (Fu et
        al., arXiv 2502.01662).
    """
    logits = checks.as_float(logits, "logits")
    greedy = logits.argmax(axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        p = jax.nn.softmax(sampling_logits(logits, rows), axis=-1)
        q = jax.nn.softmax(jnp.asarray(draft_logits), axis=-1)
        p_x, q_x = (
            jnp.take_along_axis(x, jnp.asarray(drafted)[:, None], axis=-1)[:, 0] for x in (p, q)
        )
        keys = row_keys(rows.seed, counts)
        # Without a division, as q may be nought: u < p / q.
        accepted = _uniform(keys) * q_x < p_x
        left = jnp.maximum(p - jnp.where(present, q, 0), 0)
        # Nothing is left where p equals q up to rounding.
        left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, p)
        other = (jnp.log(left) + _gumbel(keys, _INSTEAD, left.shape[-1])).argmax(axis=-1)
        chosen = jnp.where(accepted & present, drafted, other).astype(jnp.int32)
        return jnp.where(rows.temperature == 0, greedy, chosen)

    return lax.cond((jnp.asarray(rows.temperature) > 0).any(), draw, lambda: greedy)


def _gumbel(keys: jax.Array, purpose: int, size: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, purpose), (size,)))(keys)


def _uniform(keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _ACCEPT)))(keys)


def _draw_draft(
    logits: jax.Array, rows: SamplingRows, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens and the logits of the distribution that they were drawn from."""
    greedy = logits.argmax(axis=-1).astype(jnp.int32)

    def draw() -> tuple[jax.Array, jax.Array]:
        warm = sampling_logits(logits, rows)
        noise = _gumbel(row_keys(rows.seed, counts), _DRAFT, logits.shape[-1])
        drawn = (warm + noise).argmax(axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature == 0, greedy, drawn), warm

    return lax.cond((rows.temperature > 0).any(), draw, lambda: (greedy, logits))


def _propose(
    plan: Plan,
    drafter: Drafter,
    options: DecodeOptions,
    params: Any,
    state: DecodeState,
    length: int,
) -> tuple[jax.Array, jax.Array, tuple]:
    """Tokens ``[length, rows]``, the logits that they were drawn from, and the caches."""
    # Alone, whatever it is stacked with.
    group = dataclasses.replace(plan.groups[drafter.group], streams=(0,))

    def advance(carry: Any, ahead: jax.Array) -> tuple[Any, Any]:
        cache, token, seen = carry
        fed = jnp.asarray(plan.read(token)[drafter.stream])
        positions = jnp.where(state.active, state.lengths[drafter.stream] + ahead, -1)
        logits, cache = group.forward(
            params, fed[None, :, None], positions[None, :, None], cache, False
        )
        here = dataclasses.replace(state, token=token, seen=seen, count=state.count + ahead)
        adjusted = moved_logits(options, here, plan.at_large(logits[0][:, 0]))["adjusted"]
        token, warm = _draw_draft(adjusted, state.sampling, here.count)
        return (cache, token, mark_seen(seen, token, state.active)), (token, warm)

    carry = (drafter.cache(state.cache), state.token, state.seen)
    (cache, _, _), (tokens, warm) = lax.scan(advance, carry, jnp.arange(length))
    return tokens, warm, drafter.with_cache(state.cache, cache)


def _round(
    plan: Plan,
    drafter: Drafter,
    options: DecodeOptions,
    params: Any,
    draft_params: Any,
    length: int,
    carry: Any,
) -> Any:
    """Draft, verify, emit what is accepted and one token more."""
    state, buffers, written, stats = carry
    rows = len(state.token)
    drafts, warm, cache = _propose(plan, drafter, options, draft_params, state, length)
    # `[rows, length + 1]`.
    fed = jnp.concatenate([state.token[None], drafts]).T
    # `[streams, rows, length + 1]`.
    ahead = state.lengths[..., None] + jnp.arange(length + 1)
    positions = jnp.where(state.active[:, None], ahead, -1)
    logits, cache = plan.forward(params, jnp.stack(plan.read(fed)), positions, cache)
    # One column more, so that the last position has a draft to be told from.
    drafts = jnp.concatenate([drafts, jnp.full_like(drafts[:1], -1)])
    before = state.active
    state = dataclasses.replace(state, cache=cache)

    def at(values: jax.Array, n: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_index_in_dim(values, n, axis, keepdims=False)

    def unfinished(carry: Any) -> jax.Array:
        n, state, alive = carry[:3]
        return (n <= length) & (alive & state.active).any()

    def advance(carry: Any) -> Any:
        n, state, alive, buffers, written, tested, accepted = carry
        draft, present = at(drafts, n, 0), n < length
        now = state.active & alive

        def choose(adjusted: jax.Array, state: DecodeState) -> jax.Array:
            q = at(warm, jnp.minimum(n, length - 1), 0)
            return accept_or_redraw(
                adjusted, q, jnp.maximum(draft, 0), state.sampling, state.count, present=present
            )

        here = dataclasses.replace(state, active=now)
        after, emitted = emit(plan, options, here, [at(x, n, 1) for x in logits], choose)
        # Rows that rejected a draft before wait for the next round.
        after = dataclasses.replace(
            after,
            token=jnp.where(now, after.token, state.token),
            active=jnp.where(now, after.active, state.active),
        )
        buffers = _write(buffers, _by_row(emitted, rows), written, now)
        same = now & present & (after.token == draft)
        counts = (written + now, tested + (now & present), accepted + same)
        return (n + 1, after, same, buffers, *counts)

    zero = jnp.zeros(rows, jnp.int32)
    start = (jnp.int32(0), state, jnp.ones(rows, bool), buffers, zero + written, zero, zero)
    _, state, _, buffers, after, tested, accepted = lax.while_loop(unfinished, advance, start)
    # What was verified beyond is forgotten: the next round writes over those positions.
    state = dataclasses.replace(state, lengths=state.lengths + (after - written))
    stats = Drafted(
        rounds=stats.rounds + before,
        tested=stats.tested + tested,
        accepted=stats.accepted + accepted,
    )
    return state, buffers, after, stats


def _by_row(emitted: Emitted, rows: int) -> Emitted:
    """With rows in front in what the fusion said, too: rows advance by different numbers."""

    def front(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0 or leaf.shape[-1] != rows:
            raise ValueError(
                f"options: info of speculative decoding has to end in the rows ({rows}), "
                f"got shape {leaf.shape}"
            )
        return jnp.moveaxis(leaf, -1, 0)

    return dataclasses.replace(emitted, info=jax.tree.map(front, emitted.info))


def _write(buffers: Emitted, emitted: Emitted, written: jax.Array, where: jax.Array) -> Emitted:
    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        # Beyond the buffer, and so dropped, where a row has nothing.
        selected = jnp.where(where, written, len(buffer))
        return buffer.at[selected, jnp.arange(len(selected))].set(values, mode="drop")

    return jax.tree.map(put, buffers, emitted)


def run_rounds(
    plan: Plan,
    drafter: Drafter,
    options: DecodeOptions,
    params: Any,
    draft_params: Any,
    state: DecodeState,
    *,
    rounds: int,
    length: int,
) -> tuple[DecodeState, Emitted, Drafted]:
    """At most `rounds` rounds; `Emitted` of `[slots, rounds * (length + 1)]`, without gaps."""
    count = len(state.token)
    room = rounds * (length + 1)
    out = jax.eval_shape(
        lambda s, x: _by_row(emit(plan, options, s, x)[1], count), state, plan.next_logits(count)
    )
    empty = jax.tree.map(lambda leaf: jnp.zeros((room, *leaf.shape), leaf.dtype), out)
    empty = dataclasses.replace(empty, tokens=jnp.full_like(empty.tokens, options.pad_id))
    zero = jnp.zeros(count, jnp.int32)
    one_round = functools.partial(_round, plan, drafter, options, params, draft_params, length)

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < rounds) & carry[1][0].active.any()

    _, (state, buffers, _, stats) = lax.while_loop(
        unfinished,
        lambda carry: (carry[0] + 1, one_round(carry[1])),
        (jnp.int32(0), (state, empty, zero, Drafted(zero, zero, zero))),
    )
    info = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, -1), buffers.info)
    return state, rows_first(dataclasses.replace(buffers, info=info)), stats
