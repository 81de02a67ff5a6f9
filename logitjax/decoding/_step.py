"""One decoding step of all slots: the only place where tokens are chosen."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from logitjax.decoding._ensemble import Plan
from logitjax.decoding._sampling import (
    SamplingRows,
    allow_only,
    penalize_counts,
    penalize_repetition,
    sample,
    sampling_logits,
)
from logitjax.ops import log_softmax, top_k
from logitjax.ops.sharding import MeshAxes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Options of a compiled step. A field costs time only if it is used.

    Attributes:
        logprobs: report the log-probability of every chosen token.
        top_logprobs: report this many of the most likely tokens with their log-probabilities.
        logprobs_of: ``'model'``: of the (fused) logits as served; ``'biased'``: after logit bias;
            ``'adjusted'``: after processors and repetition penalty too; ``'sampled'``: after
            temperature and truncation, the distribution that tokens are drawn from.
        info: report the fusion's ``info`` of every token.
        repetition: track seen tokens and how often they were generated, as penalties require.
        masks: let requests restrict the next token, see `Engine.allow`, and set a minimum number of
            tokens.
        max_logit_bias: maximum number of entries of a slot's logit bias.
        max_stop_ids: maximum number of stop tokens of a slot.
        pad_id: token that frozen rows emit.
        served: a function ``(logits [rows, vocab], extra) -> logits`` applied before any request's
            settings, such as noise and caps of an API; ``extra`` is each slot's value.
        processors: functions ``(logits [rows, vocab], state) -> logits`` applied after the bias and
            before the penalty; ``state.extra`` holds each slot's value for them.
        remember: ``(extra, tokens [rows], where [rows]) -> extra`` records chosen tokens.
        draw_keys: ``extra -> keys [rows]`` of the next draws; None for each row's seed, folded with
            the number of tokens that it has drawn.
        mesh: devices to work on; rows of the state over the axes of a batch, key heads of the cache
            over its axis ``tensor``, where those exist and divide.
    """

    logprobs: bool = False
    top_logprobs: int = 0
    logprobs_of: Literal["model", "biased", "adjusted", "sampled"] = "model"
    info: bool = False
    repetition: bool = False
    masks: bool = False
    max_logit_bias: int = 0
    max_stop_ids: int = 8
    pad_id: int = 0
    served: Callable[..., Any] | None = None
    processors: tuple[Callable[..., Any], ...] = ()
    remember: Callable[..., Any] | None = None
    draw_keys: Callable[..., Any] | None = None
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self) -> None:
        laws = ("model", "biased", "adjusted", "sampled")
        if self.logprobs_of not in laws:
            raise ValueError(f"logprobs_of: expected one of {laws}, got {self.logprobs_of!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All slots: axis 0 of every leaf but the cache and `lengths` is the slot."""

    cache: Any
    lengths: Any  # [streams, slots]
    # Emitted, but not fed yet.
    token: Any
    active: Any
    stopped: Any
    # Number of tokens that may still be emitted.
    left: Any
    # Number of tokens emitted so far.
    count: Any
    # Number of first tokens among which none stops.
    least: Any
    sampling: SamplingRows
    # Whether log-probabilities are wanted.
    reports: Any
    stop_ids: Any
    bias_ids: Any
    bias_values: Any
    seen: Any
    counts: Any
    allowed: Any
    extra: Any
    # The large model's tokens so far `[slots, room]`, the last not yet fed; None: not stored.
    text: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """Tokens of one step, axis 0 the slot; of several, ``[slots, steps, ...]``."""

    tokens: Any
    # False if a slot was frozen.
    valid: Any
    logprobs: Any = None
    top_ids: Any = None
    top_logprobs: Any = None
    info: Any = None


def step(
    plan: Plan, options: DecodeOptions, params: Any, state: DecodeState
) -> tuple[DecodeState, Emitted]:
    """Feed every active slot its last token and choose the next."""
    tokens = jnp.stack(plan.read(state.token))[..., None]
    # Frozen rows are fed padding, so that their caches stay unchanged.
    positions = jnp.where(state.active, state.lengths, -1)[..., None]
    lengths = state.lengths + state.active
    if not plan.screens or options.served or options.processors or options.info:
        logits, cache = plan.forward(params, tokens, positions, state.cache)
        state = dataclasses.replace(state, cache=cache, lengths=lengths)
        return emit(plan, options, state, [row[:, 0] for row in logits])
    model, before = plan.groups[0].apply.model(params[0]), state.cache[0]
    hidden, cache = model.hidden_states(tokens[0], positions=positions[0], cache=before)
    state = dataclasses.replace(state, cache=(cache,), lengths=lengths)

    def from_logits() -> Emitted:
        return _chosen(options, state, model.logits(hidden)[:, 0].astype(jnp.float32))

    def from_best() -> Emitted:
        best = model.head.top_k(hidden[:, 0], 1, model.embedding[...])
        now = state.active & (best.values[:, 0] > -jnp.inf)
        token = jnp.where(now, best.indices[:, 0], options.pad_id).astype(jnp.int32)
        # Values that no row reports.
        shapes = jax.eval_shape(from_logits)
        unused = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return dataclasses.replace(unused, tokens=token, valid=now)

    needs = _needs_logits(options, state, plan.vocab_size).any()
    emitted = lax.cond(needs, from_logits, from_best)
    return _after(options, state, emitted), emitted


def _needs_logits(options: DecodeOptions, state: DecodeState, vocab: int) -> jax.Array:
    """The slots whose next token, or report, depends on more than the most likely token."""
    rows, needs = state.sampling, state.sampling.temperature != 0
    if options.logprobs or options.top_logprobs:
        needs |= state.reports
    if options.max_logit_bias:
        needs |= (state.bias_ids < vocab).any(axis=-1)
    if state.seen is not None:
        needs |= rows.repetition_penalty != 1
    if state.counts is not None:
        needs |= (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    if state.allowed is not None:
        restricted = (state.allowed != jnp.uint32(0xFFFFFFFF)).any(axis=-1)
        needs |= restricted | (state.count < state.least)
    return needs & state.active


def start(
    plan: Plan,
    options: DecodeOptions,
    params: Any,
    state: DecodeState,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[DecodeState, Emitted]:
    """Feed left-padded prompts ``[streams, rows, time]`` to fresh rows; choose the first token."""
    logits, cache = plan.forward(params, tokens, positions, state.cache, last_only=True)
    seen = state.seen
    if seen is not None:
        # Padding goes to an id beyond the vocabulary, which the scatter drops.
        ids = jnp.where(positions[0] >= 0, tokens[0], seen.shape[1])
        seen = seen.at[jnp.arange(len(seen))[:, None], ids].set(True, mode="drop")
    # `[streams, rows]`.
    lengths = positions.max(axis=-1) + 1
    state = dataclasses.replace(state, cache=cache, lengths=lengths, seen=seen)
    return emit(plan, options, state, [row[:, -1] for row in logits])


def emit(
    plan: Plan,
    options: DecodeOptions,
    state: DecodeState,
    logits: list[jax.Array],
    choose: Callable[[jax.Array, DecodeState], jax.Array] | None = None,
) -> tuple[DecodeState, Emitted]:
    """Fuse logits ``[rows, vocab]``, choose a token (by ``choose(adjusted, state)`` if given), and
    end."""
    fused, info = plan.combine(logits)
    emitted = _chosen(options, state, fused, choose)
    emitted = dataclasses.replace(emitted, info=info if options.info else None)
    return _after(options, state, emitted), emitted


def _chosen(
    options: DecodeOptions, state: DecodeState, fused: jax.Array, choose: Any = None
) -> Emitted:
    moved = moved_logits(options, state, fused)
    adjusted = moved["adjusted"]
    # A row of nan, or without any likely token, has no next token: it ends here, not stopped.
    now = state.active & (adjusted.max(axis=-1) > -jnp.inf)
    if choose is None:
        keys = None if options.draw_keys is None else options.draw_keys(state.extra)
        chosen = sample(adjusted, state.sampling, state.count, keys)
    else:
        chosen = choose(adjusted, state)
    token = jnp.where(now, chosen, options.pad_id)
    emitted = Emitted(tokens=token, valid=now)
    if options.logprobs or options.top_logprobs:
        if options.logprobs_of == "sampled":
            moved["sampled"] = sampling_logits(adjusted, state.sampling)
        log_p = log_softmax(moved[options.logprobs_of])
        logprobs = jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
        emitted = dataclasses.replace(emitted, logprobs=logprobs)
        if options.top_logprobs:
            values, ids = top_k(log_p, options.top_logprobs)
            emitted = dataclasses.replace(emitted, top_ids=ids, top_logprobs=values)
    return emitted


def _after(options: DecodeOptions, state: DecodeState, emitted: Emitted) -> DecodeState:
    token, state = emitted.tokens, dataclasses.replace(state, active=emitted.valid)
    # Padded with -1.
    stopped = state.active & (token[:, None] == state.stop_ids).any(axis=-1)
    left = state.left - state.active
    seen = mark_seen(state.seen, token, state.active)
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(len(counts)), token].add(state.active.astype(counts.dtype))
    extra = state.extra
    if options.remember is not None:
        extra = options.remember(extra, token, state.active)
    text = state.text
    if text is not None:
        places = jnp.where(state.active, state.lengths[0], text.shape[1])
        text = text.at[jnp.arange(len(text)), places].set(token, mode="drop")
    return dataclasses.replace(
        state,
        token=token,
        active=state.active & ~stopped & (left > 0),
        stopped=state.stopped | stopped,
        left=left,
        count=state.count + state.active,
        seen=seen,
        counts=counts,
        extra=extra,
        text=text,
    )


def mark_seen(seen: jax.Array | None, token: jax.Array, where: jax.Array) -> jax.Array | None:
    if seen is None:
        return None
    # beyond: dropped.
    ids = jnp.where(where, token, seen.shape[1])
    return seen.at[jnp.arange(len(seen)), ids].set(True, mode="drop")


def moved_logits(
    options: DecodeOptions, state: DecodeState, logits: jax.Array
) -> dict[str, jax.Array]:
    """Fused logits under the names of ``logprobs_of``, each with all earlier adjustments."""
    if options.served is not None:
        logits = options.served(logits, state.extra)
    biased = _biased(state, logits) if options.max_logit_bias else logits
    adjusted = biased
    for processor in options.processors:
        adjusted = processor(adjusted, state)
    if state.seen is not None:
        adjusted = penalize_repetition(adjusted, state.seen, state.sampling.repetition_penalty)
    if state.counts is not None:
        adjusted = _less_frequent(state, adjusted)
    if state.allowed is not None:
        # Masks cost a pass over the vocabulary, and most steps have none.
        free = (state.allowed == jnp.uint32(0xFFFFFFFF)).all()
        adjusted = lax.cond(free, lambda x: x, lambda x: allow_only(x, state.allowed), adjusted)
        adjusted = _unstopped(state, adjusted)
    return {"model": logits, "biased": biased, "adjusted": adjusted}


def _less_frequent(state: DecodeState, logits: jax.Array) -> jax.Array:
    presence, frequency = state.sampling.presence_penalty, state.sampling.frequency_penalty

    # Only if some row needs it.
    def penalized() -> jax.Array:
        return penalize_counts(logits, state.counts, presence, frequency)

    return lax.cond(((presence != 0) | (frequency != 0)).any(), penalized, lambda: logits)


def _biased(state: DecodeState, logits: jax.Array) -> jax.Array:
    rows = jnp.arange(len(logits))[:, None]

    def biased() -> jax.Array:
        return logits.at[rows, state.bias_ids].add(state.bias_values, mode="drop")

    any_bias = (state.bias_ids < logits.shape[-1]).any()
    return lax.cond(any_bias, biased, lambda: logits)


def _unstopped(state: DecodeState, logits: jax.Array) -> jax.Array:
    early, vocab = state.count < state.least, logits.shape[-1]

    def masked() -> jax.Array:
        # The table is padded with -1, which would index the last token.
        ids = jnp.where(early[:, None] & (state.stop_ids >= 0), state.stop_ids, vocab)
        return logits.at[jnp.arange(len(logits))[:, None], ids].set(-jnp.inf, mode="drop")

    return lax.cond(early.any(), masked, lambda: logits)


def run_steps(
    plan: Plan, options: DecodeOptions, params: Any, state: DecodeState, steps: int
) -> tuple[DecodeState, Emitted]:
    """At most ``steps`` steps, fewer once every row is frozen; ``Emitted`` of ``[rows, steps]``."""
    # Only shapes: a loop cannot grow its outputs.
    out = jax.eval_shape(
        lambda s, x: emit(plan, options, s, x)[1], state, plan.next_logits(len(state.token))
    )
    empty = jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), out)
    empty = dataclasses.replace(empty, tokens=jnp.full_like(empty.tokens, options.pad_id))
    if steps == 0:
        return state, rows_first(empty)

    # A loop rather than a scan: it ends when the last row does.
    def unfinished(carry: Any) -> jax.Array:
        n, state, _ = carry
        return (n < steps) & state.active.any()

    def advance(carry: Any) -> Any:
        n, state, buffers = carry
        state, emitted = step(plan, options, params, state)
        return n + 1, state, jax.tree.map(lambda b, e: b.at[n].set(e), buffers, emitted)

    _, state, buffers = lax.while_loop(unfinished, advance, (jnp.int32(0), state, empty))
    return state, rows_first(buffers)


def each_leaf(
    function: Callable[..., Any], of_info: Callable[..., Any], *emitted: Emitted
) -> Emitted:
    """A function of the leaves, and another one of those of the fusion's info."""
    parts = [dataclasses.replace(one, info=None) for one in emitted]
    info = jax.tree.map(of_info, *[one.info for one in emitted])
    return dataclasses.replace(jax.tree.map(function, *parts), info=info)


def rows_first(emitted: Emitted) -> Emitted:
    """Move slots in front of stacked steps. The fusion's info keeps its steps in front."""
    return each_leaf(lambda leaf: jnp.swapaxes(leaf, 0, 1), lambda leaf: leaf, emitted)


def put_rows(plan: Plan, state: DecodeState, rows: DecodeState, slot: jax.Array) -> DecodeState:
    """``state`` with ``rows`` written from ``slot`` on."""

    def put(axis: int) -> Callable[..., jax.Array]:
        return lambda old, new: lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), slot, axis
        )

    cache = tuple(
        jax.tree.map(put(group.batch_axis), old, new)
        for group, old, new in zip(plan.groups, state.cache, rows.cache, strict=True)
    )
    lengths = put(1)(state.lengths, rows.lengths)
    rest = [
        dataclasses.replace(s, cache=(), lengths=()) for s in (state, rows)
    ]  # every other leaf has the slot in front
    merged = jax.tree.map(put(0), *rest)
    return dataclasses.replace(merged, cache=cache, lengths=lengths)


def constrain(plan: Plan, options: DecodeOptions, state: DecodeState) -> DecodeState:
    """Lay the state out over the mesh, in the same way before and after every program."""
    mesh = options.mesh
    if mesh is None:
        return state

    names = MeshAxes.current()

    def axes(names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        present = tuple(name for name in names if name in mesh.axis_names)
        return present if size % math.prod(mesh.shape[name] for name in present) == 0 else None

    def pin(leaf: jax.Array, rows: int, heads: int | None = None) -> jax.Array:
        entries: list[Any] = [None] * leaf.ndim
        if leaf.ndim > rows:
            entries[rows] = axes(names.rows, leaf.shape[rows])
        if heads is not None and leaf.ndim == heads + 3:
            entries[heads] = axes(names.columns, leaf.shape[heads])
        return lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*entries)))

    def pin_cache(leaf: jax.Array, axis: int) -> jax.Array:
        # Scanned layers have keys and values with the layer axis in front of the rows.
        axis += leaf.ndim == axis + 5
        return pin(leaf, axis, axis + 1)

    cache = tuple(
        jax.tree.map(functools.partial(pin_cache, axis=group.batch_axis), stored)
        for group, stored in zip(plan.groups, state.cache, strict=True)
    )
    lengths = pin(state.lengths, 1)
    rest = jax.tree.map(lambda leaf: pin(leaf, 0), dataclasses.replace(state, cache=(), lengths=()))
    return dataclasses.replace(rest, cache=cache, lengths=lengths)
