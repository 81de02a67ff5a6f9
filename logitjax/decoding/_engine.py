"""Slots that are filled, stepped and emptied independently: the basis of a server."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding._draft_control import DraftControl
from logitjax.decoding._drafters import drafter_of
from logitjax.decoding._drafting import Rounds
from logitjax.decoding._ensemble import Ensemble, Plan
from logitjax.decoding._prompts import place_row, read_piece, row_of
from logitjax.decoding._requests import Request, fresh_rows, left_padded
from logitjax.decoding._speculate import Drafted, run_rounds
from logitjax.decoding._step import DecodeOptions, DecodeState, Emitted, constrain, run_steps, start

# Donated: caches are the bulk of the memory and are written in place.
_jit = functools.partial(jax.jit, static_argnames=("plan", "options"), donate_argnames="state")


@_jit
def _prefill_all(plan: Plan, options: DecodeOptions, params, state, tokens, positions):
    state = constrain(plan, options, state)
    state, emitted = start(plan, options, params, state, tokens, positions)
    return constrain(plan, options, state), emitted


@functools.partial(jax.jit, static_argnames=("plan", "options", "steps"), donate_argnames="state")
def _decode_chunk(plan: Plan, options: DecodeOptions, params, state, waits, steps: int):
    moving = dataclasses.replace(state, active=state.active & ~waits)
    after, emitted = run_steps(plan, options, params, moving, steps)
    # Waiting rows stay unchanged; their last token is still to be fed.
    token = jnp.where(waits, state.token, after.token)
    after = dataclasses.replace(after, active=after.active | (state.active & waits), token=token)
    return constrain(plan, options, after), emitted


@functools.partial(
    jax.jit,
    static_argnames=("plan", "drafter", "options", "rounds", "length"),
    donate_argnames=("state", "memory"),
)
def _speculate(plan: Plan, drafter: Any, options: DecodeOptions, params, state, memory, **static):
    state, *rest = run_rounds(plan, drafter, options, params, state, memory, **static)
    return constrain(plan, options, state), *rest


@_jit
def _freeze(plan: Plan, options: DecodeOptions, state: DecodeState, frozen):
    return constrain(plan, options, dataclasses.replace(state, active=state.active & ~frozen))


@_jit
def _laid_out(plan: Plan, options: DecodeOptions, state: DecodeState):
    return constrain(plan, options, state)


class Engine:
    """A fixed number of slots, each with its own prompt, settings and end.

    What a slot emits does not depend on the others. Every program is compiled once, for all slots.
    For continuous batching, fill a slot (``prefill``), let all decode some tokens
    (``decode_chunk``), read what they emitted, empty slots and fill them again.

    Args:
        model: a `Decoder`, a `CachedModel`, ``(apply_fn, params, cache)`` or an `Ensemble`.
        max_length: maximum number of tokens of a slot, prompt included.
        options: what to report, and which settings requests may use.
        extra: one slot's value of ``state.extra`` if a request brings none; a pytree of arrays.
        drafts: the drafter and the maximum draft length for ``speculate``; caches fit them.
        rings: let windowed layers drop positions before their window; False keeps all positions,
            which a `PromptReader` that shares prefixes needs.

    Raises:
        ValueError: for a drafting member that is not in the ensemble.

    >>> from logitjax.models import load_model
    >>> engine = Engine(load_model("tiny"), slots=2, max_length=32)
    >>> first = engine.prefill(0, Request(prompt=[1, 2, 3], max_new_tokens=4))
    >>> engine.decode_chunk(2).tokens.shape, engine.active.tolist()
    ((2, 2), [True, False])
    >>> engine.evict(0)
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int,
        max_length: int,
        options: DecodeOptions | None = None,
        extra: Any = None,
        drafts: DraftControl | None = None,
        rings: bool = True,
    ):
        ensemble = model if isinstance(model, Ensemble) else Ensemble(model)
        self.plan, self.params = ensemble.plan, ensemble.params
        self.slots, self.max_length = slots, max_length
        self._longest_draft = 0 if drafts is None else max(drafts.lengths)
        self._room = max_length
        self.rounds: Rounds | None = None
        if drafts is not None:
            arguments = (drafts.draft, drafts.token_map, self.plan, self.params)
            self._drafter, self._draft_params, self.plan = drafter_of(*arguments)
            keys = None if options is None else options.draw_keys
            if keys is not None and not self._drafter.rests:
                raise ValueError("draw_keys: expected None with models' drafts, got a function")
            # A rejected draft has overwritten what a ring without slack would still need.
            self.plan = self.plan.with_ring_slack(self._longest_draft)
            self._room += self._longest_draft
            self._memory = self._drafter.memory(slots, self._room)
            self.rounds = Rounds(self, drafts, rests=self._drafter.rests)
        self.rings = rings
        if not rings:
            # Nothing is overwritten.
            self.plan = self.plan.with_ring_slack(self._room)
        self.options = DecodeOptions() if options is None else options
        self._extra = extra
        # Drafters that are not members read the text.
        self._given = {"extra": extra, "room": 0 if drafts is None else self._room}
        self._row = self.empty_row()
        self._state: DecodeState | None = None

    @property
    def state(self) -> DecodeState:
        """All slots as arrays. Programs consume it: do not keep an old one."""
        if self._state is None:
            # Created on demand: `prefill_all` brings a state of its own.
            idle = [Request(prompt=[0], max_new_tokens=1)] * self.slots
            cache = self.plan.init_cache(self.slots, self._room)
            state = fresh_rows(self.plan, self.options, idle, cache=cache, **self._given)
            state = dataclasses.replace(state, active=np.zeros(self.slots, bool))  # none decodes
            self._state = state = _laid_out(self.plan, self.options, state)
            return state
        return self._state

    @property
    def active(self) -> np.ndarray:
        """bool ``[slots]``: the slots that are still decoding. Waits for the device."""
        return np.asarray(self.state.active)

    def prefill(self, slot: int, request: Request) -> Emitted:
        """Read a prompt into a slot and choose its first token; returns `Emitted` of one row.

        Raises:
            ValueError: for a slot that does not exist, or a request longer than ``max_length``.
        """
        streams = self.streams_of(request)
        tokens, positions = left_padded([streams], self._room)
        # The row's cache of another prompt is never seen: later positions are masked.
        arguments = (self.plan, self.options, self.params, (self._row,), tokens, positions, None)
        logits, (self._row,), _ = read_piece(*arguments, report=False)
        return self.place(slot, request, [len(s) for s in streams], self._row, logits[0])

    def place(
        self, slot: int, request: Request, lengths: list[int], cache: Any, logits: Any
    ) -> Emitted:
        """Fill a slot from a one-row cache that has read the prompts; returns `Emitted` of one row.

        Args:
            lengths: number of tokens of each stream's prompt.
            cache: a filled cache from `empty_row`.
            logits: after the last token, of each model ``[1, vocab]``.

        Raises:
            ValueError: for a slot that does not exist.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot: expected a number between 0 and {self.slots - 1}, got {slot}")
        row = row_of(self.plan, self.options, request, lengths, cache=cache, **self._given)
        self._state, emitted = place_row(self.plan, self.options, self.state, row, logits, slot)
        return emitted

    def empty_row(self) -> Any:
        """An empty cache of one row, as slots have them."""
        return self.plan.init_cache(1, self._room)

    def extra_of(self, request: Request | None) -> Any:
        """A slot's value of ``state.extra`` for a request; for None, that of an idle slot."""
        extra = None if request is None else request.extra
        return self._extra if extra is None else extra

    def prefill_all(self, requests: Sequence[Request]) -> Emitted:
        """Read one prompt for each slot at once.

        Raises:
            ValueError: for another number of requests, or one longer than ``max_length``.
        """
        if len(requests) != self.slots:
            raise ValueError(f"requests: expected {self.slots}, got {len(requests)}")
        tokens, positions = left_padded([self.streams_of(r) for r in requests], self._room)
        cache = self.plan.init_cache(self.slots, self._room)
        state = fresh_rows(self.plan, self.options, requests, cache=cache, **self._given)
        self._state, emitted = _prefill_all(
            self.plan, self.options, self.params, state, tokens, positions
        )
        return emitted

    def decode_chunk(self, steps: int, waits: np.ndarray | None = None) -> Emitted:
        """Decode at most ``steps`` tokens in every active slot except those of ``waits``.

        Args:
            waits: bool ``[slots]``: slots that stay unchanged; None for none.

        Returns:
            `Emitted` of ``[slots, steps]``; ``valid`` tells which tokens are there.
        """
        waits = np.zeros(self.slots, bool) if waits is None else waits
        self._state, emitted = _decode_chunk(
            self.plan, self.options, self.params, self.state, waits, steps=steps
        )
        return emitted

    def speculate(self, length: int, rounds: int = 1) -> tuple[Emitted, Drafted]:
        """Decode 1 to ``length + 1`` tokens a round in every active slot.

        The drafter gives ``length`` tokens, one pass of all members verifies them, and every slot
        advances as far as its draft is accepted. Tokens are distributed as in ``decode_chunk``.

        Returns:
            `Emitted` of ``[slots, rounds * (length + 1)]``, without gaps, and `Drafted`.

        Raises:
            ValueError: without ``drafts``, or for a length that exceeds its room.
        """
        if not self._longest_draft:
            raise ValueError("drafts: expected an engine with drafts, got one without")
        if not 1 <= length <= self._longest_draft:
            raise ValueError(
                f"length: expected a number between 1 and {self._longest_draft}, got {length}"
            )
        params, size = (self.params, self._draft_params), dict(rounds=rounds, length=length)
        arguments = (self.plan, self._drafter, self.options, params, self.state, self._memory)
        self._state, self._memory, emitted, drafted = _speculate(*arguments, **size)
        return emitted, drafted

    def advance(self, steps: int, *, stretch: int = 1) -> Emitted:
        """Run `decode_chunk`, or `speculate` for about as many tokens if that is faster.

        Args:
            stretch: number of chunks at once while drafting does not pay.
        """
        if self.rounds is None:
            return self.decode_chunk(steps)
        return self.rounds.advance(steps, stretch)

    def compile_drafts(self, steps: int) -> None:
        """Compile what ``advance(steps)`` may need; no slot may be active."""
        if self.rounds is not None:
            for length in self.rounds.control.lengths:
                self.speculate(length, self.rounds.rounds(length, steps))

    def allow(self, allowed: np.ndarray) -> None:
        """Set which tokens every slot may emit, until it is set again.

        To change it from token to token, decode chunks of one step.

        Args:
            allowed: uint32 ``[slots, words]``, bit ``v % 32`` of word ``v // 32`` for token v.

        Raises:
            ValueError: for another shape, or an engine whose options have no masks.
        """
        stored = self.state.allowed
        if stored is None or np.shape(allowed) != stored.shape:
            needed = "options with masks=True" if stored is None else f"shape {stored.shape}"
            raise ValueError(f"allowed: expected {needed}, got shape {np.shape(allowed)}")
        # Copied: the caller writes the next masks into the same array while this one is read. By a
        # program: an array put on a device has another type than its outputs, and all recompile.
        state = dataclasses.replace(self.state, allowed=np.array(allowed, np.uint32))
        self._state = _laid_out(self.plan, self.options, state)

    def evict(self, slot: int | Sequence[int]) -> None:
        """Freeze slots: they emit nothing until they are filled again."""
        # One program for any number of slots.
        frozen = np.zeros(self.slots, bool)
        frozen[slot] = True
        self._state = _freeze(self.plan, self.options, self.state, frozen)

    def streams_of(self, request: Request) -> list[np.ndarray]:
        """One prompt for each model, none of them too long.

        Raises:
            ValueError: for a request longer than ``max_length``, or a wrong one.
        """
        streams = request.streams(self.plan)
        longest = max(map(len, streams))
        # The last new token is emitted, not fed; without new tokens, only the prompt is fed.
        if longest + max(request.max_new_tokens, 1) - 1 > self.max_length:
            raise ValueError(
                f"request: {longest} prompt tokens and {request.max_new_tokens} new ones do "
                f"not fit max_length={self.max_length}"
            )
        return streams
