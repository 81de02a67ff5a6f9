"""Speculative steps: all members verify drafted tokens in one pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from logitjax.decoding._drafters import ACCEPT, INSTEAD, Proposal, gumbel
from logitjax.decoding._ensemble import Plan
from logitjax.decoding._sampling import SamplingRows, row_keys, sampling_logits
from logitjax.decoding._step import DecodeOptions, DecodeState, Emitted, emit, rows_first, step
from logitjax.ops import Array, checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafted:
    """Counts of drafts, int32 `[slots]`: rounds, tokens compared (to the first rejected), accepted.

    `plain` counts steps in which no slot had a draft; these are not rounds.
    """

    rounds: Any
    plain: Any
    tested: Any
    accepted: Any


def accept_or_redraw(
    logits: Float[Array, "rows vocab"],
    draft_logits: Float[Array, "rows vocab"],
    drafted: Int[Array, " rows"],
    rows: SamplingRows,
    counts: Int[Array, " rows"],
    *,
    present: Array | bool = True,
) -> Int[jax.Array, " rows"]:
    """The drafted token or another one, such that the result is distributed as the target.

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
        u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPT)))(keys)
        # Without a division, as q may be nought: u < p / q.
        accepted = u * q_x < p_x
        left = jnp.maximum(p - jnp.where(jnp.reshape(present, (-1, 1)), q, 0), 0)
        # Nothing is left if p equals q up to rounding.
        left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, p)
        other = (jnp.log(left) + gumbel(keys, INSTEAD, left.shape[-1])).argmax(axis=-1)
        chosen = jnp.where(accepted & present, drafted, other).astype(jnp.int32)
        return jnp.where(rows.temperature == 0, greedy, chosen)

    return lax.cond((jnp.asarray(rows.temperature) > 0).any(), draw, lambda: greedy)


def _verified(
    plan: Plan, options: DecodeOptions, params: Any, proposal: Proposal, carry: Any
) -> Any:
    """Verify drafts; emit the accepted tokens and one more."""
    state, buffers, written, stats = carry
    drafts, warm = proposal.tokens, proposal.warm
    length, rows = drafts.shape
    # `[rows, length + 1]`.
    fed = jnp.concatenate([state.token[None], jnp.maximum(drafts, 0)]).T
    # `[streams, rows, length + 1]`.
    ahead = state.lengths[..., None] + jnp.arange(length + 1)
    positions = jnp.where(state.active[:, None], ahead, -1)
    logits, cache = plan.forward(params, jnp.stack(plan.read(fed)), positions, state.cache)
    # One more column, so that the last position has a draft to differ from.
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
        draft = at(drafts, n, 0)
        present, now = draft >= 0, state.active & alive

        def choose(adjusted: jax.Array, state: DecodeState) -> jax.Array:
            q = at(warm, jnp.minimum(n, length - 1), 0)
            return accept_or_redraw(
                adjusted, q, jnp.maximum(draft, 0), state.sampling, state.count, present=present
            )

        here = dataclasses.replace(state, active=now, lengths=state.lengths + n + 1)
        # A certain draft is decided by a plain draw, so tokens are the same as in plain steps.
        after, emitted = emit(
            plan, options, here, [at(x, n, 1) for x in logits], None if warm is None else choose
        )
        # Rows that rejected a draft earlier wait for the next round.
        after = dataclasses.replace(
            after,
            lengths=state.lengths,
            token=jnp.where(now, after.token, state.token),
            active=jnp.where(now, after.active, state.active),
        )
        now = emitted.valid
        buffers = _write(buffers, _by_row(emitted, rows), written, now)
        same = now & (after.token == draft)
        counts = (written + now, tested + (now & present), accepted + same)
        return (n + 1, after, same, buffers, *counts)

    zero = jnp.zeros(rows, jnp.int32)
    start = (jnp.int32(0), state, jnp.ones(rows, bool), buffers, zero + written, zero, zero)
    _, state, _, buffers, after, tested, accepted = lax.while_loop(unfinished, advance, start)
    # Tokens verified beyond this point are discarded: the next round overwrites them.
    state = dataclasses.replace(state, lengths=state.lengths + (after - written))
    stats = dataclasses.replace(
        stats,
        rounds=stats.rounds + before,
        tested=stats.tested + tested,
        accepted=stats.accepted + accepted,
    )
    return state, buffers, after, stats


def _plain(plan: Plan, options: DecodeOptions, params: Any, carry: Any) -> Any:
    state, buffers, written, stats = carry
    stats = dataclasses.replace(stats, plain=stats.plain + state.active)
    state, emitted = step(plan, options, params, state)
    buffers = _write(buffers, _by_row(emitted, len(written)), written, emitted.valid)
    return state, buffers, written + emitted.valid, stats


def _where(condition: jax.Array, function: Any, carry: Any) -> Any:
    """`function(carry)` or the carry; a loop of one turn, since a conditional would copy caches."""
    once = lax.while_loop(
        lambda c: c[0], lambda c: (False & c[0], function(c[1])), (condition, carry)
    )
    return once[1]


def _by_row(emitted: Emitted, rows: int) -> Emitted:
    """Move rows to the front in the fusion's info, too, because rows advance differently."""

    def front(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0 or leaf.shape[-1] != rows:
            raise ValueError(
                f"options: info of speculative decoding must end in the rows ({rows}), "
                f"got shape {leaf.shape}"
            )
        return jnp.moveaxis(leaf, -1, 0)

    return dataclasses.replace(emitted, info=jax.tree.map(front, emitted.info))


def _write(buffers: Emitted, emitted: Emitted, written: jax.Array, where: jax.Array) -> Emitted:
    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        # Beyond the buffer, and so dropped, if a row has nothing.
        selected = jnp.where(where, written, len(buffer))
        return buffer.at[selected, jnp.arange(len(selected))].set(values, mode="drop")

    return jax.tree.map(put, buffers, emitted)


def run_rounds(
    plan: Plan,
    drafter: Any,
    options: DecodeOptions,
    params: tuple[Any, Any],
    state: DecodeState,
    memory: Any,
    *,
    rounds: int,
    length: int,
) -> tuple[DecodeState, Any, Emitted, Drafted]:
    """At most `rounds` rounds; `Emitted` of `[slots, rounds * (length + 1)]`, without gaps.

    `params` are those of all members and of the drafter.
    """
    count = len(state.token)
    room = rounds * (length + 1)
    out = jax.eval_shape(
        lambda s, x: _by_row(emit(plan, options, s, x)[1], count), state, plan.next_logits(count)
    )
    empty = jax.tree.map(lambda leaf: jnp.zeros((room, *leaf.shape), leaf.dtype), out)
    empty = dataclasses.replace(empty, tokens=jnp.full_like(empty.tokens, options.pad_id))
    zero = jnp.zeros(count, jnp.int32)
    verified = functools.partial(_verified, plan, options, params[0])

    def one_round(carry: Any) -> Any:
        n, memory, (state, *others) = carry
        proposal = drafter.propose(plan, options, params[1], state, memory, length)
        carry = dataclasses.replace(state, cache=proposal.cache), *others
        if drafter.rests:
            worth = (proposal.tokens >= 0).any()
            carry = _where(worth, functools.partial(verified, proposal), carry)
            carry = _where(~worth, functools.partial(_plain, plan, options, params[0]), carry)
        else:
            carry = verified(proposal, carry)
        return n + 1, proposal.memory, carry

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < rounds) & carry[2][0].active.any()

    start = (state, empty, zero, Drafted(zero, zero, zero, zero))
    _, memory, (state, buffers, _, stats) = lax.while_loop(
        unfinished, one_round, (jnp.int32(0), memory, start)
    )
    info = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, -1), buffers.info)
    return state, memory, rows_first(dataclasses.replace(buffers, info=info)), stats
