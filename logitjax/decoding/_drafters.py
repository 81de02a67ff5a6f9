"""Drafters: a member of the ensemble, a separate model, a draft head, or the text itself."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from logitjax.decoding._cached_model import CachedModel
from logitjax.decoding._ensemble import Ensemble, Group, Plan, as_wide
from logitjax.decoding._sampling import SamplingRows, row_keys, sampling_logits
from logitjax.decoding._step import DecodeOptions, DecodeState, mark_seen, moved_logits
from logitjax.models import Cache, DecoderConfig, DraftHead
from logitjax.ops import Codes, Static

# Random draws of a token: the draft, its acceptance, its replacement.
DRAFT, ACCEPT, INSTEAD = 1, 2, 3
# Number of tokens that a drafting model reads at once to catch up.
_PIECE = 32


class Proposal(NamedTuple):
    """Drafts int32 `[length, rows]`, -1 for none, and the state after drafting."""

    tokens: jax.Array
    # Logits that they were drawn from, `[length, rows, vocab]`; None for certain drafts.
    warm: Any
    cache: tuple
    memory: Any


@dataclasses.dataclass(frozen=True)
class Member:
    """The drafting member, by its index in the plan; it drafts into the cache it verifies with."""

    rests: ClassVar[bool] = False

    stream: int
    group: int
    member: int
    alone: bool

    def own(self, stored: Any) -> Any:
        # A copy if it is part of a stack.
        return stored if self.alone else jax.tree.map(lambda leaf: leaf[self.member], stored)

    def memory(self, rows: int, room: int) -> Any:
        return ()

    def propose(
        self, plan: Plan, options: DecodeOptions, params: Any, state: DecodeState, memory: Any,
        length: int,
    ) -> Proposal:  # fmt: skip
        group = dataclasses.replace(plan.groups[self.group], streams=(0,))
        ids = _Ids(
            lambda x: jnp.asarray(plan.read(x)[self.stream]),
            lambda x: as_wide(plan.at_large(x), plan.vocab_size),
        )
        stored, at = self.own(state.cache[self.group]), state.lengths[self.stream]
        fed, positions = state.token[:, None], at[:, None]
        tokens, warm, drafted = _drawn(
            group, options, params, state, stored, (fed, positions), ids, length
        )
        # Verification continues from the original of a stack.
        cache = state.cache
        if self.alone:
            cache = (*cache[: self.group], drafted, *cache[self.group + 1 :])
        return Proposal(tokens, warm, cache, memory)


@dataclasses.dataclass(frozen=True)
class Beside:
    """A model that is not a member. It remembers what it has read, and reads what it has missed."""

    rests: ClassVar[bool] = False
    # Whether streams of the model itself come with the text that it has verified.
    on_features: ClassVar[bool] = False

    plan: Plan
    token_map: Any

    def memory(self, rows: int, room: int) -> Any:
        # Without rings: a new prompt in the slot may share a beginning from long before.
        cache = self.plan.with_ring_slack(room).init_cache(rows, room)
        return cache[0], jnp.full((rows, room), -1, jnp.int32)

    def propose(
        self, plan: Plan, options: DecodeOptions, params: Any, state: DecodeState, memory: Any,
        length: int,
    ) -> Proposal:  # fmt: skip
        group, at = self.plan.groups[0], state.lengths[0]
        rows, index = jnp.arange(len(at))[:, None], jnp.arange(state.text.shape[1])
        mapping = self.token_map
        if mapping is None:
            # Padding rows at the end of a vocabulary, which only one of the two has.
            last = self.plan.vocab_size - 1
            ids = _Ids(lambda x: jnp.minimum(x, last), lambda x: as_wide(x, plan.vocab_size))
        else:
            ids = _Ids(mapping.to_small, lambda x: as_wide(mapping.to_large(x), plan.vocab_size))
        # Includes the token before: if all drafts were accepted, the last has not been read. What
        # was read as drafts, with streams of the drafter, is read again.
        window = jnp.arange(-length if self.on_features else -1, 1)
        least = at + window[0]

        def num_read(read: jax.Array) -> jax.Array:
            # As far as the text it read still matches, despite later changes of drafts and slots.
            same = (read == state.text) & (index < least[:, None])
            return jnp.cumprod(same, axis=1, dtype=jnp.int32).sum(axis=1)

        def noted(read: jax.Array, places: jax.Array, tokens: jax.Array) -> jax.Array:
            places = jnp.where(places < 0, read.shape[1], places)
            return read.at[rows, places].set(tokens, mode="drop")

        def behind(carry: Any) -> jax.Array:
            return ((num_read(carry[1]) < least) & state.active).any()

        def catch_up(carry: Any) -> Any:
            cache, read = carry
            places = num_read(read)[:, None] + jnp.arange(min(_PIECE, len(index)))
            tokens = jnp.take_along_axis(state.text, jnp.minimum(places, index[-1]), axis=1)
            unread = (places < least[:, None]) & state.active[:, None]
            places = jnp.where(unread, places, -1)
            cache = self.ready(params, state, cache, places)
            _, cache = group.forward(params, ids.read(tokens)[None], places[None], cache, True)
            return cache, noted(read, places, tokens)

        cache, read = lax.while_loop(behind, catch_up, memory)
        places = at[:, None] + window
        fed = jnp.take_along_axis(state.text, jnp.maximum(places, 0), axis=1)
        cache = self.ready(params, state, cache, places)
        tokens, warm, cache = _drawn(
            group, options, params, state, cache, (fed, places), ids, length
        )
        places = places[:, :1] + jnp.arange(len(window) + length - 1)
        places = jnp.where(state.active[:, None], places, -1)
        drafts = jnp.full_like(tokens, -1) if self.on_features else tokens
        read = noted(read, places, jnp.concatenate([fed, drafts[:-1].T], axis=1))
        return Proposal(tokens, warm, state.cache, (cache, read))

    def ready(self, params: Any, state: DecodeState, cache: Any, places: jax.Array) -> Any:
        """The cache, with what else is needed to read the text at these places."""
        return cache


@dataclasses.dataclass(frozen=True)
class OnFeatures(Beside):
    """A draft head, which reads each token with the stream of the position before.

    That of verified tokens comes from features in the model's cache, that of drafts from itself.
    """

    on_features: ClassVar[bool] = True

    def ready(self, params: Any, state: DecodeState, cache: Any, places: jax.Array) -> Any:
        before = jnp.maximum(places - 1, 0)[..., None]
        features = jnp.take_along_axis(state.cache[0][1], before, axis=1)
        return cache[0], self.plan.groups[0].apply.head(params).fuse(features)


@dataclasses.dataclass(frozen=True)
class _HeadApply:
    """A draft head as decoding calls a model; its cache holds the stream to read next, too."""

    graphdef: Static

    def head(self, params: Any) -> DraftHead:
        return nnx.merge(self.graphdef.value, params[0])

    def __call__(self, params: Any, tokens: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
        head, table, (stored, stream) = self.head(params), params[1], cache
        embedded = table.rows(tokens) if isinstance(table, Codes) else table[tokens]
        # The first token of a text has no stream before it.
        positions = jnp.where(positions > 0, positions, -1)
        streams, stored = head.step(stream, embedded.astype(stream.dtype), positions, stored)
        last = streams[:, -1:]
        return head.logits(last), (stored, last)


@dataclasses.dataclass(frozen=True)
class _HeadCache:
    config: DecoderConfig
    dtype: Any

    def __call__(self, rows: int, room: int) -> Any:
        stream = jnp.zeros((rows, 1, self.config.hidden_size), self.dtype)
        return Cache.init(self.config, rows, room, self.dtype), stream


def _on_features(head: DraftHead, plan: Plan, params: Any) -> tuple[OnFeatures, Any, Plan]:
    """The drafter, its parameters, and the plan whose cache stores what the head reads."""
    large = plan.groups[0]
    apply: Any = large.apply
    init_cache: Any = large.init_cache
    if not hasattr(apply, "model"):
        raise ValueError("draft: a draft head expects a decoder, got another function")
    table = apply.model(params[0]).embedding[...]
    graphdef, state = nnx.split(head)
    local = CachedModel(
        apply=_HeadApply(Static(graphdef)),
        params=(nnx.to_pure_dict(state), table),
        init_cache=_HeadCache(head.config, head.fuse.kernel.dtype),
        vocab_size=head.config.vocab_size,
    )
    apply = dataclasses.replace(apply, layers=head.layers, screens=False)
    init_cache = dataclasses.replace(init_cache, features=head.fuse.kernel.shape[0])
    large = dataclasses.replace(large, apply=apply, init_cache=init_cache)
    plan = dataclasses.replace(plan, groups=(large, *plan.groups[1:]))
    return OnFeatures(Ensemble(local).plan, None), local.params, plan


@dataclasses.dataclass(frozen=True)
class LookUp:
    """Drafts the continuation of an earlier occurrence of the last tokens, as certain drafts.

    Of several occurrences it takes the longest match, and of those the latest. A draft that is a
    function of the text is accepted with its probability: if a plain draw gives it.
    """

    # If no row has a draft, a round is a plain step.
    rests: ClassVar[bool] = True

    least: int = 2
    most: int = 6

    def memory(self, rows: int, room: int) -> Any:
        return ()

    def propose(
        self, plan: Plan, options: DecodeOptions, params: Any, state: DecodeState, memory: Any,
        length: int,
    ) -> Proposal:  # fmt: skip
        text, at = state.text, state.lengths[0][:, None]
        index = jnp.arange(text.shape[1])
        agree = jnp.broadcast_to(index < at, text.shape)
        count = jnp.zeros_like(text)
        for back in range(self.most):
            last = jnp.take_along_axis(text, jnp.maximum(at - back, 0), axis=1)
            agree &= (jnp.roll(text, back, axis=1) == last) & (index >= back)
            count += agree
        best = (count * len(index) + index).argmax(axis=1)[:, None]
        # The continuation may reach the end of the text; it then repeats from the match.
        places = best + 1 + jnp.arange(length) % jnp.maximum(at - best, 1)
        tokens = jnp.take_along_axis(text, jnp.minimum(places, index[-1]), axis=1)
        enough = (jnp.take_along_axis(count, best, axis=1) >= self.least) & state.active[:, None]
        return Proposal(jnp.where(enough, tokens, -1).T, None, state.cache, memory)


class _Ids(NamedTuple):
    """Tokens as a drafting model reads them, and its logits at the large model's ids."""

    read: Callable[[jax.Array], jax.Array]
    wide: Callable[[jax.Array], jax.Array]


def _drawn(
    group: Group,
    options: DecodeOptions,
    params: Any,
    state: DecodeState,
    cache: Any,
    first: tuple[jax.Array, jax.Array],
    ids: _Ids,
    length: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Draw tokens one by one after feeding `first` (tokens, positions); also logits and cache."""

    def advance(carry: Any, ahead: Any, fed: jax.Array, places: jax.Array) -> tuple[Any, Any]:
        cache, token, seen = carry
        places = jnp.where(state.active[:, None], places, -1)
        logits, cache = group.forward(params, ids.read(fed)[None], places[None], cache, True)
        here = dataclasses.replace(state, token=token, seen=seen, count=state.count + ahead)
        adjusted = moved_logits(options, here, ids.wide(logits[0][:, -1]))["adjusted"]
        token, warm = _draw_draft(adjusted, state.sampling, here.count)
        return (cache, token, mark_seen(seen, token, state.active)), (token, warm)

    def onward(carry: Any, ahead: jax.Array) -> tuple[Any, Any]:
        return advance(carry, ahead, carry[1][:, None], first[1][:, -1:] + ahead)

    carry, out = advance((cache, state.token, state.seen), 0, *first)
    (cache, *_), rest = lax.scan(onward, carry, jnp.arange(1, length))
    tokens, warm = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), out, rest)
    return tokens, warm, cache


def _draw_draft(
    logits: jax.Array, rows: SamplingRows, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens and the logits of the distribution that they were drawn from."""
    greedy = logits.argmax(axis=-1).astype(jnp.int32)

    def draw() -> tuple[jax.Array, jax.Array]:
        warm = sampling_logits(logits, rows)
        noise = gumbel(row_keys(rows.seed, counts), DRAFT, logits.shape[-1])
        drawn = (warm + noise).argmax(axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature == 0, greedy, drawn), warm

    return lax.cond((rows.temperature > 0).any(), draw, lambda: (greedy, logits))


def gumbel(keys: jax.Array, purpose: int, size: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, purpose), (size,)))(keys)


def drafter_of(
    draft: Any, token_map: Any, plan: Plan, params: Any
) -> tuple[Member | Beside | LookUp, Any, Plan]:
    """The drafter that a `DraftControl` names or contains, its parameters, and its plan."""
    if isinstance(draft, str) and draft == "prompt":
        return LookUp(), (), plan
    if isinstance(draft, DraftHead):
        return _on_features(draft, plan, params)
    if not isinstance(draft, str | int):
        alone = Ensemble(draft)
        if alone.plan.outputs > 1:
            raise ValueError("draft: expected one model, got several")
        return Beside(alone.plan, token_map), alone.params[0], plan
    if plan.outputs != plan.streams:
        raise ValueError("draft: the members share one pass, so none can run ahead of the others")
    places = {"expert": 1 if plan.experts else None, "base": plan.experts + 1}
    stream = places.get(draft) if isinstance(draft, str) else draft
    if stream is None or not 0 < stream < plan.streams:
        raise ValueError(
            f"draft: expected 'expert', 'base', 'prompt', a model or an index from 1 to "
            f"{plan.streams - 1}, got {draft!r} with {plan.experts} experts and {plan.bases} bases"
        )
    index = next(i for i, group in enumerate(plan.groups) if stream in group.streams)
    streams = plan.groups[index].streams
    member = Member(stream, index, streams.index(stream), len(streams) == 1)
    return member, member.own(params[index]), plan
